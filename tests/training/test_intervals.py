"""Bootstrap by patient: weights are copies, the patient is the unit, and the interval holds what it should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmm.schema import SUBSETS, Labels
from fedmm.training import intervals as module
from fedmm.training.intervals import View, areas, drawn, intervals
from fedmm.training.metrics import FEWEST, Predictions, score
from fedmm.training.rates import auroc
from tests.training.cohorts import LABELS, only, predictions

COLUMN = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 1.0, np.nan]), st.integers(0, 3)), max_size=25)


@given(COLUMN)
def test_a_weighted_auroc_is_that_of_studies_copied_so_many_times(rows: list[tuple[int, float, int]]) -> None:
    made, truth, weight = (np.array([row[i] for row in rows], dtype=float) for i in range(3))
    (got,) = areas(View(made[:, None], truth[:, None]), weight[None, :])[:, 0]
    known = ~np.isnan(truth)
    copies = np.repeat(np.flatnonzero(known), weight[known].astype(int))
    want = auroc(made[copies], truth[copies] > 0.5)
    assert np.isnan(got) if want is None else got == pytest.approx(want)


def test_all_studies_of_a_patient_are_drawn_together_and_as_many_patients_as_there_are() -> None:
    p = predictions([3, 1, 2, 5] * 5)
    (weight_DB,) = drawn(p, 50)
    first = np.searchsorted(p.patient_B, np.arange(p.patients))
    assert np.array_equal(weight_DB, weight_DB[:, first][:, p.patient_B])
    assert set(weight_DB[:, first].sum(1)) == {20}


def test_the_draws_are_the_same_whatever_fits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    p = predictions([1, 2] * 15)
    whole = intervals(p, LABELS, draws=100)
    monkeypatch.setattr(module, "CELLS", 45 * 7)
    assert len(list(drawn(p, 100))) == 15
    assert intervals(p, LABELS, draws=100) == whole


def test_each_interval_is_the_middle_of_what_score_gives_for_drawn_patients() -> None:
    """Brute force: copy the studies of the drawn patients, score them, take the percentiles."""
    p = predictions([1, 2, 3] * 8, skill=0.3)
    p.seen_BM[:, 1] = True
    (weight_DB,) = drawn(p, 40)
    scores = [score(copied(p, weight_B), LABELS) for weight_B in weight_DB]
    got = intervals(p, LABELS, draws=40)

    def middle(values: list[float]) -> list[float]:
        return [pytest.approx(q) for q in np.quantile(values, [0.025, 0.975])]

    assert got["accuracy"] == middle([s["accuracy"] for s in scores])
    assert got["mean_auroc"] == middle([s["mean_auroc"] for s in scores])
    assert got["auroc"] == {name: middle([s["auroc"][name] for s in scores]) for name in LABELS.outputs}
    for name in SUBSETS:
        assert got["by_subset"][name] == middle([s["by_subset"][name]["mean_auroc"] for s in scores])


def copied(p: Predictions, weight_B: np.ndarray) -> Predictions:
    return only(p, np.repeat(np.arange(len(weight_B)), weight_B.astype(int)))


def test_a_patient_with_many_equal_studies_does_not_make_the_interval_shorter() -> None:
    """Thirty patients of one study, and the same with each study ten times: the same information."""
    one = predictions([1] * 30, skill=0.2)
    ten = replace(only(one, np.repeat(np.arange(30), 10)), patient_B=np.repeat(np.arange(30), 10), patients=30)
    short, same = intervals(one, LABELS, draws=200), intervals(ten, LABELS, draws=200)
    assert same["mean_auroc"] == pytest.approx(short["mean_auroc"])
    by_study = replace(ten, patient_B=np.arange(300), patients=300)
    low, high = intervals(by_study, LABELS, draws=200)["mean_auroc"]
    assert high - low < 0.6 * (short["mean_auroc"][1] - short["mean_auroc"][0])


def test_the_interval_covers_the_true_auroc_about_as_often_as_it_says() -> None:
    """200 cohorts of 60 patients, true AUROC 0.76 (two normals one standard deviation apart: Phi(1 / sqrt 2)).

    The percentile interval of so few covers a little less than 95 %. Below 176 of 200 it were broken: at a true coverage
    of 93 % this happens in fewer than 1 of 100 runs, and the seed is fixed.
    """
    rng, labels, true, covered = np.random.default_rng(0), Labels(findings=("a",)), 0.76025, 0
    for _ in range(200):
        truth = rng.integers(0, 2, 60).astype(float)
        made = 1 / (1 + np.exp(-(truth + rng.standard_normal(60))))
        p = replace(
            predictions([1] * 60, labels=labels), finding_BF=truth[:, None], probability_BO=made[:, None], subset={}
        )
        low, high = intervals(p, labels, draws=200)["auroc"]["a"]
        covered += low <= true <= high
    assert covered >= 176


def test_the_same_predictions_give_the_same_interval() -> None:
    assert intervals(predictions([2] * 20), LABELS, draws=30) == intervals(predictions([2] * 20), LABELS, draws=30)


def test_nothing_is_said_of_too_few_patients_or_of_one_class() -> None:
    few = predictions([4] * (FEWEST - 1))
    got = intervals(few, LABELS, draws=20)
    assert got["accuracy"] is got["mean_auroc"] is None
    assert set(got["auroc"].values()) == {None}
    p = predictions([1] * 40)
    p.finding_BF[:, 0] = 1
    assert intervals(p, LABELS, draws=20)["auroc"]["a"] is None
    assert intervals(p, LABELS, draws=20)["auroc"]["b"] is not None


def test_nobody_has_no_interval() -> None:
    assert intervals(predictions([]), LABELS, draws=20)["mean_auroc"] is None
