"""Statistical tests of noise and sampling: honest draws pass, and each wrong law fails its own test."""

from __future__ import annotations

import numpy as np
import pytest

from fedmm.errors import ConfigError
from fedmm.privacy.trials import (
    accountants_agree,
    as_planned,
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


def of(noise_KW: np.ndarray, parts: int = 4) -> dict[str, np.ndarray]:
    """The values as if they were those of several weights."""
    return {f"w{i}": part for i, part in enumerate(np.array_split(noise_KW, parts, axis=1))}


def test_noise_of_the_planned_law_passes_and_others_fail() -> None:
    rng = np.random.default_rng(6)
    honest = rng.normal(0, 2.0, (4, 20_000))
    assert noise_spread(of(honest), 2.0).passed
    assert noise_shape(of(honest), 2.0).passed
    assert noise_fresh(of(honest)).passed
    assert not noise_spread(of(honest / 4), 2.0).passed
    assert not noise_spread(of(honest * 1.05), 2.0).passed
    assert not noise_shape(of(rng.uniform(-1, 1, (4, 20_000)) * np.sqrt(12)), 2.0).passed  # the right spread
    assert not noise_fresh(of(np.concatenate([honest, honest[:1]]))).passed  # a seed that was set again
    assert not noise_fresh(of(np.repeat(honest, 2, axis=1))).passed  # each value twice
    assert not noise_fresh({"a": honest, "b": honest}).passed  # two weights with the same noise


def test_a_small_weight_without_noise_is_not_hidden_by_the_others() -> None:
    rng = np.random.default_rng(7)
    released = of(rng.normal(0, 2.0, (4, 20_000)))
    assert noise_spread(released | {"head": rng.normal(0, 2.0, (4, 3))}, 2.0).passed
    found = noise_spread(released | {"head": np.zeros((4, 3))}, 2.0)
    assert not found.passed
    assert "head" in found.measured


def test_noise_that_is_used_again_in_a_second_step_is_found() -> None:
    rng = np.random.default_rng(8)
    first, second = rng.normal(0, 2.0, (2, 4, 5_000))
    assert noise_spread(of(first + second), 2.0, steps=2).passed
    assert not noise_spread(of(first + first), 2.0, steps=2).passed


def test_noise_that_is_not_there_fails_and_does_not_divide_by_it() -> None:
    assert not noise_spread(of(np.zeros((4, 2000))), 1.0).passed
    assert not noise_fresh(of(np.zeros((4, 2000)))).passed


def test_a_charge_that_is_not_the_plans_is_found() -> None:
    plan = {1: ["train", 2.0, 0.5, 3], 2: ["train", 2.0, 0.5, 3]}
    assert as_planned({1: plan[1]}, plan).passed
    assert not as_planned({1: plan[1], 2: ["train", 4.0, 0.5, 3]}, plan).passed


def test_books_that_differ_are_found() -> None:
    assert same_epsilon(1.0, 1.0 + 5e-7).passed
    assert not same_epsilon(1.0, 1.001).passed
    assert same_steps([3, 3], [3, 3]).passed
    assert not same_steps([3, 3], [3]).passed
    assert accountants_agree(1.0, 1.01, 1.2).passed
    assert accountants_agree(60.0, None, 62.0).passed
    assert not accountants_agree(1.3, 1.01, 1.2).passed
    assert not accountants_agree(1.0, 1.3, 1.2).passed
