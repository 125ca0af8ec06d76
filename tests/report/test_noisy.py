"""Noisy scores on the page: with their intervals, never mixed with exact ones, whatever is in them."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmm.federation import messages
from fedmm.report import reading
from fedmm.report.reading import Estimate, load_run
from fedmm.schema import Labels
from fedmm.training.histograms import cells as cells_of
from fedmm.training.histograms import noisy_score
from tests.report.run_folder import (
    CLASSES,
    FINDINGS,
    HOSTILE,
    NAMES,
    OUTPUTS,
    Page,
    arrive,
    cells,
    config,
    drawn,
    make_run,
    noisy_record,
    record,
    write_run,
)

LABELS = Labels(findings=tuple(FINDINGS), class_name="finding3", class_values=tuple(CLASSES))


def last_round(folder: Path, levels: dict[str, float | None], *, exact: list[str] | None = None) -> Path:
    """A run of two rounds: exact hospitals are scored after both, those of `levels` after the last."""
    exact = exact or []
    first = record(1, [*levels, *exact], rounds=2, scored=bool(exact))
    first["scores"] = {name: first["scores"][name] for name in exact}
    settings = config([*levels, *exact], rounds=2)
    settings["plan"]["evaluation_noise"] = 3.1
    return write_run(folder, settings, [arrive(first), noisy_record(2, rounds=2, levels=levels, exact=exact)])


def test_the_kinds_of_messages_are_those_of_the_federation() -> None:
    for name in ("HELLO", "UPDATE", "HISTOGRAM", "EXACT", "WITHHELD"):
        assert getattr(reading, name) == getattr(messages, name)


def test_noisy_scores_are_shown_with_their_intervals_by_hospital_and_pooled(tmp_path: Path) -> None:
    content = drawn(last_round(tmp_path, {"aachen": 0.81, "basel": 0.71, "chur": None}))
    line = noisy_record(2, rounds=2, levels={"aachen": 0.81, "basel": 0.71, "chur": None}, exact=[])
    low, high = line["scores"]["aachen"]["mean_auroc_interval"]
    shown = next(row for row in cells(content, "aachen") if len(row) == 4)
    assert shown[1] == f"0.81 ({low:.2f} to {high:.2f})"
    assert next(row for row in cells(content, "chur") if len(row) == 4)[1:] == [
        "not known (0.00 to 1.00)",
        "not known (0.00 to 1.00)",
        "100",
    ]
    low, high = line["pooled"]["mean_auroc_interval"]
    assert cells(content, "pooled")[0][1] == f"0.76 ({low:.2f} to {high:.2f})"
    assert "charged to the ledger; the 95 % interval includes privacy noise and the number of patients" in content
    assert f"<dt>Mean AUROC</dt><dd><b>0.76</b>95 %: {low:.2f} to {high:.2f}" in content
    assert "noisy scores of 3 of 3 hospitals" in content
    assert ["output", "aachen", "basel", "chur", "pooled"] in cells(content, "output")
    assert len(cells(content, OUTPUTS[0])[0]) == 5
    assert content.count("<svg") == 4  # by hospital, by output, epsilon, reliability
    assert "exact counts of held-back patients" not in content


def test_what_noisy_scores_do_not_hold_is_said_and_breaks_nothing(tmp_path: Path, page: Page) -> None:
    content = page(last_round(tmp_path, {"aachen": 0.81}))
    assert "Not known: noisy scores are of studies as they are" in content
    assert "Which answers were wrong is not in noisy scores" in content
    assert "rows are the truth" not in content
    assert cells(content, "pooled") == [], "of one hospital it would be the same again"


def test_scores_that_the_noise_hides_altogether_are_not_known(tmp_path: Path) -> None:
    content = drawn(last_round(tmp_path, {"aachen": None, "basel": None}))
    assert "<dt>Mean AUROC</dt><dd><b>not known</b>hidden by the privacy noise" in content
    assert "Expected calibration error (ECE) not known" in content


def test_means_are_of_exact_scores_alone_and_noisy_ones_stand_beside(tmp_path: Path, page: Page) -> None:
    folder = last_round(tmp_path, {"aachen": 0.31, "basel": 0.33}, exact=["chur", "davos"])
    content, exact = (
        page(folder),
        noisy_record(2, rounds=2, levels={"aachen": 0.31, "basel": 0.33}, exact=["chur", "davos"]),
    )
    scores = [exact["scores"][name] for name in ("chur", "davos")]
    mean = np.average([s["mean_auroc"] for s in scores], weights=[s["studies"] for s in scores])
    assert f"<dt>Mean AUROC</dt><dd><b>{mean:.3f}</b>" in content
    assert "2 of 4 hospitals, exact; noisy scores of 2: 0.32 (" in content
    assert cells(content, "mean, weighted by studies")[0][-1] == f"{mean:.3f}"
    by_round = cells(content, "hospital")
    assert ["hospital", "round 1", "round 2"] in by_round
    assert [row[0] for name in ("aachen", "chur") for row in cells(content, name) if len(row) == 3] == ["chur"]
    assert "studies of hospitals with exact scores together (rows are the truth)" in content
    assert "All outputs of hospitals with exact scores" in content
    assert "All outputs of hospitals with noisy scores" in content
    modality = next(row for row in cells(content, "all that are present") if row[1] == f"{mean:.3f}")
    assert len(modality) == 4, "mean and the two exact hospitals"


def test_before_the_last_round_the_page_says_when_noisy_scores_come(tmp_path: Path, page: Page) -> None:
    settings, line = config(NAMES, rounds=2), {**record(1, NAMES, rounds=2, scored=False), "evaluated": True}
    settings["plan"]["evaluation_noise"] = 3.1
    assert "noisy ones are asked for once, after the last round" in page(write_run(tmp_path, settings, [line]))


def test_exact_scores_that_call_themselves_noisy_are_not_taken_for_charged_ones(tmp_path: Path, page: Page) -> None:
    line = record(1, ["aachen", "basel"], rounds=1)
    line["scores"]["aachen"] |= {"noisy": True, "mean_auroc_interval": [0.0, 1.0]}
    folder = write_run(tmp_path, config(["aachen", "basel"], rounds=1), [line])
    run = load_run(folder)
    assert set(run.rounds[0].scores) == {"aachen", "basel"}
    assert run.noisy is None
    assert "charged to the ledger; the 95" not in page(folder)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, Estimate(0.8, 0.7, 0.9)),
        ({"mean_auroc": None}, Estimate(None, 0.7, 0.9)),
        ({"mean_auroc": HOSTILE}, Estimate(None, 0.7, 0.9)),
        ({"mean_auroc": math.nan}, Estimate(None, 0.7, 0.9)),
        ({"mean_auroc": True}, Estimate(None, 0.7, 0.9)),
        ({"mean_auroc": 0.95}, Estimate()),
        ({"mean_auroc_interval": None}, Estimate()),
        ({"mean_auroc_interval": [0.9, 0.7]}, Estimate()),
        ({"mean_auroc_interval": [0.9, 0.7], "mean_auroc": None}, Estimate()),
        ({"mean_auroc_interval": [-1.0, 2.0]}, Estimate()),
        ({"mean_auroc_interval": [0.7, math.inf]}, Estimate()),
        ({"mean_auroc_interval": [0.7, 0.8, 0.9]}, Estimate()),
        ({"mean_auroc_interval": {"low": 0.7}}, Estimate()),
        ({"mean_auroc_interval": HOSTILE}, Estimate()),
        ({"auroc": HOSTILE, "accuracy": [HOSTILE], "calibration": 3, "patients": -1}, Estimate(0.8, 0.7, 0.9)),
        (
            {"calibration": {"predicted": [HOSTILE], "observed": [1], "observed_interval": [3], "count": [1]}},
            Estimate(0.8, 0.7, 0.9),
        ),
    ],
)
def test_noisy_scores_of_another_form_are_not_known(
    tmp_path: Path, page: Page, change: dict[str, Any], found: Estimate
) -> None:
    folder = last_round(tmp_path, {"aachen": 0.8})
    settings, (first, line) = (
        config(["aachen"], rounds=2),
        [record(1, ["aachen"], rounds=2, scored=False), noisy_record(2, rounds=2, levels={"aachen": 0.8}, exact=[])],
    )
    for part in (line["scores"]["aachen"], line["pooled"]):
        part |= {"mean_auroc": 0.8, "mean_auroc_interval": [0.7, 0.9]} | change
    folder = write_run(tmp_path, settings, [first, line])
    score = load_run(folder).rounds[-1].noisy["aachen"]
    assert score.mean_auroc == found
    content = page(folder)
    assert "<img" not in content
    assert html.escape(HOSTILE) not in content


@pytest.mark.parametrize("wrong", [None, HOSTILE, 3, [], {}, {"noisy": "yes"}])
def test_a_histogram_without_noisy_scores_is_left_out(tmp_path: Path, page: Page, wrong: Any) -> None:
    line = noisy_record(1, rounds=1, levels={"aachen": 0.8, "basel": 0.7}, exact=[])
    line["scores"]["basel"] = line["pooled"] = wrong
    folder = write_run(tmp_path, config(["aachen", "basel"], rounds=1), [line])
    run = load_run(folder)
    assert list(run.rounds[0].noisy) == ["aachen"]
    assert run.rounds[0].pooled is None
    assert "0.80" in page(folder)


def test_what_the_coordinator_computes_is_read_without_a_loss(tmp_path: Path) -> None:
    """Contract with fedmm.training.histograms: a histogram of 400 patients, almost without noise."""
    rng = np.random.default_rng(3)
    values = rng.uniform(1, 20, cells_of(LABELS))
    line = noisy_record(1, rounds=1, levels={"aachen": 0.8}, exact=[])
    line["scores"]["aachen"] = line["pooled"] = made = noisy_score(list(values), LABELS, noise_std=0.01)
    score = load_run(write_run(tmp_path, config(["aachen"], rounds=1), [line])).rounds[0].noisy["aachen"]
    assert score.mean_auroc == Estimate(made["mean_auroc"], *made["mean_auroc_interval"])
    assert score.mean_auroc.value is not None
    assert {name: e.value for name, e in score.auroc.items()} == made["auroc"]
    assert score.accuracy.value == made["accuracy"]
    assert score.patients == made["patients"]
    assert [e.value for _, e, _ in score.bins.values()] == made["calibration"]["observed"]
    assert score.calibration_error == made["calibration"]["expected_calibration_error"]


def test_exact_runs_have_no_word_about_noisy_scores(tmp_path: Path, page: Page) -> None:
    content = page(make_run(tmp_path))
    assert "Noisy scores" not in content
    assert "All outputs of all hospitals" in content
