"""Scores of levels, values and times, by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from fedmm.schema import Labels
from fedmm.training.outcomes import concordance, score_further

NAN = math.nan
LABELS = Labels(
    findings=("a",), ordinal_name="stage", ordinal_levels=("I", "II", "III"), value_name="risk",
    time_name="time", event_name="event", time_edges=(10.0, 40.0),
)  # fmt: skip


def scores(levels: list[list[float]], values: list[float], gone: list[list[float]], truth: list[list[float]]) -> dict:  # type: ignore[type-arg]
    """levels: P(level >= II), P(level >= III).  gone: P(T <= 10), P(T <= 40).  truth: level, value, time, event."""
    probability_BO = np.concatenate([np.full((len(values), 1), 0.5), levels, np.array(values)[:, None], gone], axis=1)
    return score_further(probability_BO, np.array(truth, dtype=np.float32), LABELS)


def test_all_scores_of_five_studies_by_hand() -> None:
    found = scores(
        levels=[[0.9, 0.6], [0.9, 0.4], [0.2, 0.1], [0.8, 0.3], [0.5, 0.5]],
        values=[0.2, 0.5, 0.9, 0.4, 0.7],
        gone=[[0.6, 0.9], [0.5, 0.8], [0.1, 0.3], [0.1, 0.3], [0.2, 0.6]],
        truth=[[2, 0.1, 5, 1], [2, 0.7, 20, 1], [0, 0.8, 30, 0], [1, NAN, 50, 0], [NAN, 0.7, NAN, NAN]],
    )
    # said 2 1 0 1, true 2 2 0 1: one wrong by one. Squares by chance: said {0: 1, 1: 2, 2: 1} against {0: 1, 1: 1, 2: 2}.
    by_chance = (1 * (1 * 1 + 2 * 4) + 2 * (1 * 1 + 2 * 1) + 1 * (1 * 4 + 1 * 1)) / 16
    assert found["ordinal"] == {
        "label": "stage",
        "studies": 4,
        "accuracy": 0.75,
        "mean_absolute_error": 0.25,
        "quadratic_weighted_kappa": pytest.approx(1 - 0.25 / by_chance),
    }
    value = found["regression"]
    errors, truth = np.array([0.1, -0.2, 0.1, 0.0]), np.array([0.1, 0.7, 0.8, 0.7])
    assert value["studies"] == 4
    assert value["mean_absolute_error"] == pytest.approx(0.1, abs=1e-6)
    assert value["root_mean_squared_error"] == pytest.approx(math.sqrt(0.015), abs=1e-6)
    assert value["r2"] == pytest.approx(1 - (errors**2).sum() / ((truth - truth.mean()) ** 2).sum(), abs=1e-6)
    assert value["spearman"] == pytest.approx(spearmanr([0.2, 0.5, 0.9, 0.7], truth).statistic)
    survival = found["survival"]
    assert (survival["label"], survival["studies"], survival["events"]) == ("time", 4, 2)
    # Known pairs: the first before the three others, the second before the third and the fourth: all in order.
    assert survival["concordance"] == 1.0
    at_10 = (0.4**2 + 0.5**2 + 0.1**2 + 0.1**2) / 4
    at_40 = (0.1**2 + 0.2**2 + 0.3**2) / 3  # the third was lost at 30
    assert survival["brier"] == {"10": pytest.approx(at_10), "40": pytest.approx(at_40)}
    assert survival["integrated_brier"] == pytest.approx((10 * at_10 + 30 * at_40) / 40)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("risk", "time", "event", "expected"),
    [
        ([3, 2, 1], [1, 2, 3], [1, 1, 1], 1.0),
        ([1, 2, 3], [1, 2, 3], [1, 1, 1], 0.0),
        ([1, 1, 1], [1, 2, 3], [1, 1, 1], 0.5),
        ([2, 2, 1], [1, 2, 3], [1, 1, 1], 2.5 / 3),
        ([1, 2], [1, 2], [0, 1], None),  # who was lost first may have lived longer
        ([1, 2], [2, 2], [1, 1], None),  # both at once: nobody was first
        ([2, 1], [2, 2], [1, 0], 1.0),  # still observed at the other's event
        ([], [], [], None),
    ],
)
def test_concordance_counts_known_pairs_and_halves_ties(
    risk: list[float], time: list[float], event: list[int], expected: float | None
) -> None:
    found = concordance(np.array(risk, dtype=float), np.array(time, dtype=float), np.array(event, dtype=bool))
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_perfect_answer_has_perfect_scores() -> None:
    found = scores(
        levels=[[0, 0], [1, 0], [1, 1]],
        values=[0.1, 0.5, 0.8],
        gone=[[1, 1], [0, 1], [0, 0]],
        truth=[[0, 0.1, 3, 1], [1, 0.5, 40, 1], [2, 0.8, 41, 0]],
    )
    assert found["ordinal"]["accuracy"] == found["ordinal"]["quadratic_weighted_kappa"] == 1
    assert found["regression"]["r2"] == pytest.approx(1)
    assert found["regression"]["spearman"] == pytest.approx(1)
    assert found["survival"]["concordance"] == 1
    assert found["survival"]["integrated_brier"] == 0


@given(st.integers(0, 4), st.sampled_from([0.0, 1.0, NAN]))
def test_no_study_no_spread_and_no_label_give_none_and_never_nan(count: int, value: float) -> None:
    found = scores([[0.5, 0.5]] * count or np.zeros((0, 2)), [0.5] * count, [[0.5, 0.5]] * count or np.zeros((0, 2)),  # type: ignore[arg-type]
                   [[value] * 4] * count or np.zeros((0, 4)))  # type: ignore[arg-type] # fmt: skip
    json.dumps(found, allow_nan=False)
    assert found["regression"]["r2"] is None
    assert found["regression"]["spearman"] is None
    assert found["survival"]["concordance"] is None
    if count and value == 0.0:
        assert found["ordinal"]["accuracy"] == 1.0
        assert found["ordinal"]["quadratic_weighted_kappa"] is None


def test_only_kinds_that_there_are_have_scores() -> None:
    assert score_further(np.zeros((2, 1)), np.zeros((2, 0)), Labels(findings=("a",))) == {}
    assert list(score_further(np.zeros((2, 1)), np.zeros((2, 1)), Labels(value_name="v"))) == ["regression"]
