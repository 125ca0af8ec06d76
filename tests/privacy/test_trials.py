"""Statistical tests of noise and sampling: honest draws pass, and each wrong law fails its own test."""

from __future__ import annotations

import numpy as np
import pytest

from fedmm.errors import ConfigError
from fedmm.privacy.trials import (
    accountants_agree,
    noise_fresh,
    noise_shape,
    noise_spread,
    same_epsilon,
    same_steps,
    sampler,
)

RATE = 0.3


def passed(taken_TN: np.ndarray) -> dict[str, bool]:
    return {check.name: check.passed for check in sampler(taken_TN, RATE)}


def draws(seed: int, rate: float = RATE) -> np.ndarray:
    return np.random.default_rng(seed).random((400, 200)) < rate


def test_a_hundred_honest_samplers_pass() -> None:
    """400 tests with a false alarm of 1e-6 each: one failure in 2,500 runs of this test, if the seeds were not fixed."""
    assert all(all(passed(draws(seed)).values()) for seed in range(100))


def test_another_rate_is_found() -> None:
    assert not passed(draws(1, RATE + 0.02))["sampling rate"]


def test_batches_of_one_size_are_found() -> None:
    """A shuffled batch has the right rate and no variance."""
    rng = np.random.default_rng(2)
    taken_TN = np.zeros((400, 200), dtype=bool)
    for row in taken_TN:
        row[rng.choice(200, 60, replace=False)] = True
    found = passed(taken_TN)
    assert not found["sizes of the samples vary as N q (1 - q)"]
    assert found["sampling rate"]


def test_a_patient_who_is_drawn_less_often_is_found() -> None:
    taken_TN = draws(3)
    taken_TN[:, :20] &= draws(4, 0.5)[:, :20]
    assert not passed(taken_TN)["each patient is drawn as often"]


def test_pairs_that_come_together_are_found() -> None:
    taken_TN = draws(5)
    taken_TN[:, 1::2] = taken_TN[:, ::2]
    assert not passed(taken_TN)["draws are independent"]


def test_a_sampler_that_takes_everybody_cannot_be_tested() -> None:
    with pytest.raises(ConfigError, match="rate"):
        sampler(np.ones((4, 4), dtype=bool), 1.0)


def test_noise_of_the_planned_law_passes_and_others_fail() -> None:
    rng = np.random.default_rng(6)
    honest = rng.normal(0, 2.0, (4, 20_000))
    assert noise_spread(honest, 2.0).passed
    assert noise_shape(honest, 2.0).passed
    assert noise_fresh(honest).passed
    assert not noise_spread(honest / 4, 2.0).passed
    assert not noise_spread(honest * 1.05, 2.0).passed
    assert not noise_shape(rng.uniform(-1, 1, (4, 20_000)) * np.sqrt(12), 2.0).passed  # the right spread
    assert not noise_fresh(np.concatenate([honest, honest[:1]])).passed  # a seed that was set again
    assert not noise_fresh(np.repeat(honest, 2, axis=1)).passed  # each value twice


def test_noise_that_is_not_there_fails_and_does_not_divide_by_it() -> None:
    assert not noise_spread(np.zeros((4, 100)), 1.0).passed
    assert not noise_fresh(np.zeros((4, 100))).passed


def test_books_that_differ_are_found() -> None:
    assert same_epsilon(1.0, 1.0 + 5e-7).passed
    assert not same_epsilon(1.0, 1.001).passed
    assert same_steps([3, 3], [3, 3]).passed
    assert not same_steps([3, 3], [3]).passed
    assert accountants_agree(1.0, 1.01, 1.2).passed
    assert accountants_agree(60.0, None, 62.0).passed
    assert not accountants_agree(1.3, 1.01, 1.2).passed
    assert not accountants_agree(1.0, 1.3, 1.2).passed
