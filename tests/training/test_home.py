"""Scores that stay at home: groups and intervals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fedmm.training.home import score_at_home
from fedmm.training.metrics import FEWEST, Predictions, score
from tests.training.cohorts import LABELS, only, predictions


def grouped() -> Predictions:
    """60 patients of two studies: 30 F, 20 M, 10 not known; 55 and 5 by age."""
    sex = ("F",) * 60 + ("M",) * 40 + ("",) * 20
    return replace(predictions([2] * 60), groups={"sex": sex, "age": ("18-39",) * 110 + ("80+",) * 10})


def test_a_group_is_scored_as_if_it_were_alone() -> None:
    p = grouped()
    result = score_at_home(p, LABELS, draws=0)
    assert list(result["by_group"]["sex"]) == ["F", "M", "unknown"]
    for value, name in (("F", "F"), ("M", "M"), ("", "unknown")):
        alone = score(only(p, np.array(p.groups["sex"]) == value), LABELS)
        part = result["by_group"]["sex"][name]
        assert part == {key: alone[key] for key in part}
        assert {"studies", "patients", "mean_auroc", "sensitivity"} <= set(part)


def test_of_a_small_group_only_the_number_of_patients_is_said() -> None:
    result = score_at_home(grouped(), LABELS, draws=10)
    assert result["by_group"]["age"]["80+"] == {"patients": 5, "too_few": True}
    assert result["intervals"]["by_group"]["age"]["80+"] is None
    assert result["by_group"]["sex"]["unknown"]["patients"] == FEWEST


def test_it_is_the_score_with_more_beside_it_and_json() -> None:
    p = grouped()
    result = score_at_home(p, LABELS, draws=50)
    json.dumps(result, allow_nan=False)
    assert {key: value for key, value in result.items() if key not in ("by_group", "intervals")} == score(p, LABELS)
    low, high = result["intervals"]["by_group"]["sex"]["F"]
    assert low <= result["by_group"]["sex"]["F"]["mean_auroc"] <= high
    assert result["intervals"]["draws"] == 50


@pytest.mark.parametrize("groups", [{}, {"sex": ("",) * 40}])
def test_where_nothing_is_known_of_groups_there_are_none(groups: dict[str, tuple[str, ...]]) -> None:
    result = score_at_home(replace(predictions([1] * 40), groups=groups), LABELS, draws=0)
    assert "by_group" not in result
    assert "intervals" not in result
