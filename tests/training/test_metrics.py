"""Scores: against definitions, and defined or None in every corner."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmm.schema import MODALITIES, SUBSETS, Labels
from fedmm.training.metrics import FEWEST, WHOLE, Predictions, join, score
from fedmm.training.rates import auroc
from tests.training.cohorts import LABELS, only, predictions

KINDS = {
    "both": LABELS,
    "findings": Labels(findings=("a",)),
    "class": Labels(class_name="c", class_values=("x", "y")),
}
PARTS = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1_macro", "mean_auroc", "mean_auprc", "brier")


@given(st.integers(0, 20), st.integers(0, 100), st.sampled_from(list(KINDS)))
def test_every_score_is_in_range_or_none_and_json(count: int, seed: int, kind: str) -> None:
    labels = KINDS[kind]
    result = score(predictions([1] * count, seed=seed, labels=labels), labels)
    json.dumps(result, allow_nan=False)
    for part in (result, *result["by_subset"].values(), *(by["without"] for by in result["by_modality"].values())):
        assert all(part[name] is None or 0 <= part[name] <= 1 for name in PARTS)
    assert result["majority"] is None or 0 <= result["majority"] <= 1
    assert set(result["auroc"]) == set(result["outputs"]) == set(labels.outputs)
    assert set(result["by_modality"]) == set(MODALITIES)
    assert set(result["by_subset"]) == set(SUBSETS)


def test_a_perfect_model_scores_one_and_an_inverted_one_zero() -> None:
    p = predictions([1] * 40)
    known = ~np.isnan(p.finding_BF)
    perfect = np.concatenate([np.where(known, p.finding_BF, 0.3), np.eye(3)[p.class_B.clip(min=0)]], axis=1)
    right = score(replace(p, probability_BO=perfect), LABELS)
    assert [right[name] for name in PARTS[:-1]] == [1] * 7
    assert right["calibration"]["expected_calibration_error"] == right["ece"] == right["brier"] == 0
    wrong = score(replace(p, probability_BO=1 - perfect), LABELS)
    assert wrong["mean_auroc"] == wrong["accuracy"] == wrong["balanced_accuracy"] == 0


def test_the_class_is_scored_by_its_most_probable_value_and_findings_at_one_half() -> None:
    """Three classes at 0.4, 0.35, 0.25: no value reaches 0.5 and x is still the answer; exactly 0.5 is no finding."""
    labels = Labels(findings=("a",), class_name="c", class_values=("x", "y", "z"))
    p = replace(
        predictions([1] * 4, labels=labels),
        probability_BO=np.array([[0.5, 0.4, 0.35, 0.25]] * 3 + [[0.51, 0.2, 0.2, 0.6]]),
        finding_BF=np.array([[1.0], [0.0], [np.nan], [1.0]]),
        class_B=np.array([0, 0, 1, 2]),
        subset={},
    )
    result = score(p, labels)
    assert result["accuracy"] == 0.75
    assert result["balanced_accuracy"] == result["sensitivity"] == pytest.approx((1 + 0 + 1) / 3)
    assert result["specificity"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert [result["outputs"][f"c={v}"]["sensitivity"] for v in "xyz"] == [1, 0, 1]
    assert (result["outputs"]["a"]["sensitivity"], result["outputs"]["a"]["specificity"]) == (0.5, 1)
    assert result["by_subset"] == result["by_modality"] == {}


def test_without_a_class_the_whole_is_of_the_findings() -> None:
    labels = Labels(findings=("a", "b"))
    p = predictions([1] * 30, labels=labels)
    result, known = score(p, labels), ~np.isnan(p.finding_BF)
    assert result["accuracy"] == pytest.approx(((p.probability_BO > 0.5) == p.finding_BF)[known].mean())
    each = [result["outputs"][name]["balanced_accuracy"] for name in "ab"]
    assert result["balanced_accuracy"] == pytest.approx(np.mean(each))


def test_majority_is_the_most_frequent_class() -> None:
    p = predictions([1] * 30)
    known = p.class_B[p.class_B >= 0]
    assert score(p, LABELS)["majority"] == pytest.approx(max((known == c).mean() for c in range(3)))


@pytest.mark.parametrize("name", SUBSETS)
def test_a_subset_is_scored_on_the_studies_that_have_all_of_it_given_only_that(name: str) -> None:
    p = predictions([1, 2, 3] * 20)
    rows = p.seen_BM[:, [MODALITIES.index(m) for m in SUBSETS[name]]].all(1)
    alone = score(only(replace(p, probability_BO=p.subset[name]), rows), LABELS)
    part = score(p, LABELS)["by_subset"][name]
    assert 0 < part["studies"] < 120
    assert {key: alone[key] for key in part} == part


def test_by_modality_is_read_from_the_subsets() -> None:
    p = predictions([1] * 30)
    p.seen_BM[:, 0] = False
    result = score(p, LABELS)
    image = result["by_modality"]["image"]
    assert image["studies"] == 0
    assert image["only"]["accuracy"] is None
    without = score(replace(p, probability_BO=p.subset["report+audio"]), LABELS)
    assert image["without"] == {key: without[key] for key in image["without"]}
    assert result["by_modality"]["audio"]["only"].items() <= result["by_subset"]["audio"].items()


def test_confusion_counts_every_known_label_once() -> None:
    p = predictions([1] * 50)
    tables = score(p, LABELS)["confusion"]
    assert sum(map(sum, tables["c"]["counts"])) == (p.class_B >= 0).sum()
    assert sum(map(sum, tables["a"]["counts"])) == (~np.isnan(p.finding_BF[:, 0])).sum()
    assert [sum(row) for row in tables["c"]["counts"]] == [(p.class_B == c).sum() for c in range(3)]


def test_hospitals_scored_together_equal_one_large_hospital() -> None:
    first = replace(predictions([1] * 10, seed=1), groups={"sex": ("F",) * 10})
    second = predictions([1] * 20, seed=2)
    whole = join([first, second], ["north", "south"])
    assert score(whole, LABELS)["studies"] == 30
    assert whole.patient_B.tolist() == list(range(30))
    assert whole.groups == {"sex": ("F",) * 10 + ("",) * 20, "hospital": ("north",) * 10 + ("south",) * 20}
    assert score(join([whole]), LABELS) == score(whole, LABELS)
    assert "hospital" not in join([first], ["north"]).groups


def test_what_may_leave_has_no_group_and_no_interval_and_is_small() -> None:
    """The exact scores of a research run: 10 kB beside megabytes of weights, and no group of patients by itself."""
    p = replace(predictions([2] * 100), groups={"sex": ("F", "M") * 100})
    text = json.dumps(score(p, LABELS))
    assert "by_group" not in text
    assert "intervals" not in text
    assert len(text) < 12_000


def test_further_outputs_do_not_count_as_classes() -> None:
    labels = Labels(findings=("a",), class_name="c", class_values=("x", "y"), value_name="risk", value_range=(0, 1))
    short = Labels(findings=("a",), class_name="c", class_values=("x", "y"))
    p = predictions([1] * 30, labels=short)
    long = np.concatenate([p.probability_BO, np.ones((30, 1))], axis=1)  # would win every comparison with a class
    q = replace(
        p,
        probability_BO=long,
        subset={name: np.concatenate([v, np.ones((30, 1))], axis=1) for name, v in p.subset.items()},
        further_BK=np.linspace(0, 1, 30)[:, None],
    )
    result = score(q, labels)
    further = result.pop("further")
    assert result == score(p, short)
    assert further["regression"]["label"] == "risk"


# --- collapse to the majority -----------------------------------------------------------------------------------------


def collapsed(p: Predictions, labels: Labels = LABELS) -> dict[str, bool | None]:
    return {name: found["collapsed"] for name, found in score(p, labels)["collapsed"].items()}


def test_a_constant_model_is_flagged_and_a_good_one_is_not() -> None:
    good = predictions([1] * 100, skill=0.6)
    assert collapsed(good) == {"c": False, "a": False, "b": False}
    constant = replace(good, probability_BO=np.tile([0.1, 0.9, 0.2, 0.3, 0.5], (100, 1)))
    assert collapsed(constant) == {"c": True, "a": True, "b": True}
    found = score(constant, LABELS)["collapsed"]
    assert (found["c"]["answer"], found["a"]["answer"], found["b"]["answer"]) == ("z", "no", "yes")
    assert found["c"]["share"] == 1
    assert found["c"]["most_frequent"] == pytest.approx(score(good, LABELS)["majority"])


def test_one_answer_for_everybody_is_flagged_even_if_the_order_is_right() -> None:
    p = predictions([1] * 100, skill=0.6)
    never = replace(p, probability_BO=p.probability_BO * [0.3, 1, 1, 1, 1])
    assert collapsed(never) == {"c": False, "a": True, "b": False}
    assert auroc(never.probability_BO[:, 2], p.class_B == 0) > 0.8


def test_no_to_everybody_is_right_where_the_finding_is_rare_unless_it_is_the_same_no() -> None:
    labels, truth = Labels(findings=("a",)), np.arange(100) < 3
    p = predictions([1] * 100, labels=labels)
    spread = np.where(truth, 0.4, 0.1) + np.linspace(0, 0.05, 100)
    rare = replace(p, finding_BF=truth[:, None].astype(float), probability_BO=spread[:, None])
    assert collapsed(rare, labels) == {"a": False}
    assert collapsed(replace(rare, probability_BO=np.full((100, 1), 0.03)), labels) == {"a": True}
    nobody = replace(rare, finding_BF=np.zeros((100, 1)), probability_BO=np.full((100, 1), 0.001))
    assert collapsed(nobody, labels) == {"a": False}


def test_of_a_few_studies_nothing_is_said() -> None:
    p = predictions([1] * (FEWEST - 1))
    assert set(collapsed(p).values()) == {None}


def test_the_whole_is_one_of_the_subsets() -> None:
    p = predictions([1] * 60)
    p.seen_BM[:] = True
    result = score(p, LABELS)
    assert result["by_subset"][WHOLE].items() <= result.items()
