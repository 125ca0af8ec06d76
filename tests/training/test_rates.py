"""Scores of one yes/no answer: against their definitions, written out, and against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmm.training.rates import auprc, auroc, mean, rates, reliability

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30)


def columns(pairs: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s / 5 for s, _ in pairs], dtype=float), np.array([t for _, t in pairs], dtype=bool)


@given(PAIRS)
def test_auroc_is_the_share_of_pairs_in_the_right_order_ties_half(pairs: list[tuple[int, bool]]) -> None:
    scores, truth = columns(pairs)
    positive, negative = scores[truth], scores[~truth]
    got = auroc(scores, truth)
    if not (len(positive) and len(negative)):
        assert got is None
    else:
        wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
        assert got == pytest.approx(np.mean(wins))


@given(PAIRS)
def test_auprc_is_the_mean_precision_at_the_score_of_each_positive_study(pairs: list[tuple[int, bool]]) -> None:
    scores, truth = columns(pairs)
    got = auprc(scores, truth)
    if truth.all() or not truth.any():
        assert got is None
    else:
        assert got == pytest.approx(np.mean([truth[scores >= s].mean() for s in scores[truth]]))


def test_golden_scores_of_four_studies() -> None:
    """AUROC 3 of 4 pairs; AUPRC (1/1 + 2/3) / 2; at 0.5: one found, one missed, none falsely."""
    made, truth = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    got = rates(made, made > 0.5, truth)
    assert got["auroc"] == pytest.approx(0.75)
    assert got["auprc"] == pytest.approx(5 / 6)
    assert (got["studies"], got["positive"], got["accuracy"]) == (4, 2, 0.75)
    assert (got["sensitivity"], got["specificity"], got["balanced_accuracy"]) == (0.5, 1, 0.75)
    assert (got["ppv"], got["npv"], got["f1"]) == (1, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert got["brier"] == pytest.approx((0.01 + 0.16 + 0.65**2 + 0.04) / 4)
    assert got["ece"] == pytest.approx((0.1 + 0.4 + 0.65 + 0.2) / 4)


@given(PAIRS)
def test_rates_are_what_their_names_say(pairs: list[tuple[int, bool]]) -> None:
    made, truth = columns(pairs)
    said = made > 0.5
    got = rates(made, said, truth)
    for name, part, whole in (
        ("sensitivity", said & truth, truth),
        ("specificity", ~said & ~truth, ~truth),
        ("ppv", said & truth, said),
        ("npv", ~said & ~truth, ~said),
        ("accuracy", said == truth, np.ones_like(truth)),
    ):
        assert got[name] == (pytest.approx(part.sum() / whole.sum()) if whole.any() else None), name
    precision, recall = got["ppv"], got["sensitivity"]
    if precision and recall:
        assert got["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    elif len(truth) and (said.any() or truth.any()):
        assert got["f1"] == 0


def test_probabilities_that_keep_their_word_have_no_calibration_error_and_boasting_ones_have() -> None:
    truth = np.array([True] * 7 + [False] * 3)
    assert reliability(np.full(10, 0.7), truth)["expected_calibration_error"] == pytest.approx(0)
    boast = reliability(np.full(10, 0.99), truth)
    assert boast["expected_calibration_error"] == pytest.approx(0.29)
    assert (boast["count"][-1], sum(boast["count"])) == (10, 10)


def test_a_mean_is_of_what_is_defined() -> None:
    assert mean([1.0, None, 0.0]) == 0.5
    assert mean([None]) is None
