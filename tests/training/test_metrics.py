"""Scores: against definitions, and defined or None in every corner."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmm.schema import MODALITIES, Labels
from fedmm.training.metrics import Predictions, auroc, join, score

LABELS = Labels(findings=("a", "b"), class_name="c", class_values=("x", "y", "z"))


def predictions(count: int, *, seed: int = 0, labels: Labels = LABELS) -> Predictions:
    rng = np.random.default_rng(seed)
    outputs = len(labels.outputs)
    finding_BF = rng.integers(0, 2, (count, len(labels.findings))).astype(float)
    finding_BF[rng.random(finding_BF.shape) < 0.3] = np.nan
    return Predictions(
        probability_BO=rng.random((count, outputs)),
        finding_BF=finding_BF,
        class_B=rng.integers(-1, len(labels.class_values) or 1, count) if labels.class_name else np.full(count, -1),
        seen_BM=rng.random((count, 3)) < 0.5,
        alone={m: rng.random((count, outputs)) for m in MODALITIES},
        without={m: rng.random((count, outputs)) for m in MODALITIES},
        patient_B=np.arange(count),
        patients=count,
    )


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30))
def test_auroc_is_the_share_of_pairs_in_the_right_order_ties_half(pairs: list[tuple[int, bool]]) -> None:
    scores, truth = np.array([s for s, _ in pairs], dtype=float), np.array([t for _, t in pairs], dtype=bool)
    positive, negative = scores[truth], scores[~truth]
    got = auroc(scores, truth)
    if not (len(positive) and len(negative)):
        assert got is None
    else:
        wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
        assert got == pytest.approx(np.mean(wins))


@given(st.integers(0, 20), st.integers(0, 100), st.sampled_from(["both", "findings", "class"]))
def test_every_score_is_in_range_or_none_and_json(count: int, seed: int, kind: str) -> None:
    labels = {
        "both": LABELS,
        "findings": Labels(findings=("a",)),
        "class": Labels(class_name="c", class_values=("x", "y")),
    }[kind]
    result = score(predictions(count, seed=seed, labels=labels), labels)
    json.dumps(result, allow_nan=False)
    for name in ("accuracy", "f1_macro", "mean_auroc", "majority"):
        assert result[name] is None or 0 <= result[name] <= 1
    assert set(result["auroc"]) == set(labels.outputs)
    assert set(result["by_modality"]) == set(MODALITIES)


def test_a_perfect_model_scores_one_and_an_inverted_one_zero() -> None:
    p = predictions(40)
    known = ~np.isnan(p.finding_BF)
    perfect = np.concatenate([np.where(known, p.finding_BF, 0.3), np.eye(3)[p.class_B.clip(min=0)]], axis=1)
    right = score(Predictions(**{**vars(p), "probability_BO": perfect}), LABELS)
    assert (right["accuracy"], right["f1_macro"], right["mean_auroc"]) == (1, 1, 1)
    assert right["calibration"]["expected_calibration_error"] == 0
    wrong = score(Predictions(**{**vars(p), "probability_BO": 1 - perfect}), LABELS)
    assert wrong["mean_auroc"] == 0
    assert wrong["accuracy"] == 0


def test_majority_is_the_most_frequent_class() -> None:
    p = predictions(30)
    known = p.class_B[p.class_B >= 0]
    assert score(p, LABELS)["majority"] == pytest.approx(max((known == c).mean() for c in range(3)))


def test_only_scores_the_studies_that_have_the_modality() -> None:
    p = predictions(30)
    p.seen_BM[:, 0] = False
    result = score(p, LABELS)["by_modality"]["image"]
    assert result["studies"] == 0
    assert result["only"]["accuracy"] is None
    assert result["without"]["accuracy"] is not None


def test_confusion_counts_every_known_label_once() -> None:
    p = predictions(50)
    tables = score(p, LABELS)["confusion"]
    assert sum(map(sum, tables["c"]["counts"])) == (p.class_B >= 0).sum()
    assert sum(map(sum, tables["a"]["counts"])) == (~np.isnan(p.finding_BF[:, 0])).sum()
    assert [sum(row) for row in tables["c"]["counts"]] == [(p.class_B == c).sum() for c in range(3)]


def test_hospitals_scored_together_equal_one_large_hospital() -> None:
    first, second = predictions(10, seed=1), predictions(20, seed=2)
    whole = join([first, second])
    assert score(whole, LABELS)["studies"] == 30
    assert whole.patient_B.tolist() == list(range(30))
    assert score(join([whole]), LABELS) == score(whole, LABELS)
