"""The run folder's log, and the line of progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmm.errors import ConfigError
from fedmm.federation.rounds import RoundRecord
from fedmm.report.record import append_round, format_seconds, progress_line, read_config, read_rounds

LEDGER = {"unprotected": 0, "ledger_sequence": 9, "ledger_hash": "ab" * 32}


def record(number: int, **changes: Any) -> RoundRecord:
    content: dict[str, Any] = {
        "round": number,
        "rounds": 40,
        "private": True,
        "trained": ["aachen", "basel"],
        "failures": [],
        "epsilon": {
            "aachen": {"spent": 1.336, "ceiling": 20.0, "delta": 1e-4, **LEDGER},
            "basel": {"spent": 1.2, "ceiling": 3.0, "delta": 1e-4, **LEDGER},
        },
        "evaluated": True,
        "withheld": [],
        "arrived": [{"hospital": "aachen", "what": "weights", "bytes": 12_840_000}],
        "scores": {"aachen": {"mean_auroc": 0.9}, "basel": {"mean_auroc": 0.8}},
        "bytes_up": 12_840_000,
        "bytes_down": 1,
        "seconds": 9.41,
    }
    return RoundRecord(**{**content, **changes})


def failure(hospital: str) -> dict[str, Any]:
    return {"hospital": hospital, "kind": "silent", "code": 0, "reason": "no answer"}


# --- run.jsonl --------------------------------------------------------------------------------------------------------


def test_what_is_appended_is_read_back_in_order(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        append_round(tmp_path, record(number))
    assert read_rounds(tmp_path) == [vars(record(number)) for number in (1, 2, 3)]


def test_folder_without_a_log_has_no_rounds(tmp_path: Path) -> None:
    assert read_rounds(tmp_path) == []


def test_half_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    append_round(tmp_path, record(1))
    append_round(tmp_path, record(2))
    log = tmp_path / "run.jsonl"
    log.write_text(log.read_text()[:-40])
    assert [r["round"] for r in read_rounds(tmp_path)] == [1]


def test_repeated_round_counts_once_and_the_later_line_holds(tmp_path: Path) -> None:
    for line in (record(1), record(2, seconds=1.0), record(2, seconds=2.0), record(3)):
        append_round(tmp_path, line)
    assert [(r["round"], r["seconds"]) for r in read_rounds(tmp_path)] == [(1, 9.41), (2, 2.0), (3, 9.41)]


@pytest.mark.parametrize("damage", ['{"round": 2, "rou', "[]", '{"rounds": 4}', '{"round": "two"}', ""])
def test_damaged_line_in_the_middle_is_refused_with_its_number(tmp_path: Path, damage: str) -> None:
    good = json.dumps(vars(record(1)))
    (tmp_path / "run.jsonl").write_text(f"{good}\n{damage}\n{good}\n")
    with pytest.raises(ConfigError, match=r"line 2 of .*run\.jsonl is damaged"):
        read_rounds(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", '{"labels": {}}', '{"settings": {}}'])
def test_folder_without_a_runs_config_is_no_run_folder(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="is not a run folder"):
        read_config(tmp_path)


# --- the line of progress ---------------------------------------------------------------------------------------------


def test_progress_line_says_round_hospitals_score_budget_size_and_time() -> None:
    line = progress_line(record(7, failures=[failure("essen")]), seconds_left=300)
    assert line.split(" | ") == [
        "round  7/40",
        "2 of 3 hospitals",
        "auroc 0.850",
        "epsilon 1.20 of 3.00",
        "12.8 MB up",
        "9.4 s",
        "5 min left",
    ]


def test_progress_line_counts_a_hospital_once_that_trained_and_failed_to_evaluate() -> None:
    assert "2 of 2 hospitals" in progress_line(record(1, failures=[failure("basel")]), seconds_left=0)


def test_progress_line_shows_no_score_where_there_is_none() -> None:
    assert "auroc" not in progress_line(record(1, scores={}), seconds_left=0)
    assert "auroc" not in progress_line(record(1, scores={"aachen": {"mean_auroc": None}}), seconds_left=0)


POOLED = {"noisy": True, "mean_auroc": 0.8142, "mean_auroc_interval": [0.7391, 0.8812]}


def test_progress_line_shows_the_pooled_score_with_its_interval_where_there_are_no_exact_ones() -> None:
    noisy = {"aachen": {"noisy": True, "mean_auroc": 0.9}, "basel": {"noisy": True, "mean_auroc": None}}
    line = progress_line(record(1, scores=noisy, pooled=POOLED), seconds_left=0)
    assert " | auroc 0.81 (0.74 to 0.88) | " in line
    hidden = {"noisy": True, "mean_auroc": None, "mean_auroc_interval": [0.0, 1.0]}
    assert " | auroc not known (0.00 to 1.00) | " in progress_line(
        record(1, scores=noisy, pooled=hidden), seconds_left=0
    )


def test_progress_line_takes_the_mean_of_exact_scores_alone() -> None:
    mixed = {"aachen": {"noisy": True, "mean_auroc": 0.5}, "basel": {"mean_auroc": 0.9}, "chur": {"mean_auroc": 0.8}}
    assert " | auroc 0.850 | " in progress_line(record(1, scores=mixed, pooled=POOLED), seconds_left=0)


def test_progress_line_of_a_run_without_privacy_shows_no_epsilon() -> None:
    line = progress_line(record(1, private=False), seconds_left=0)
    assert "NOT PRIVATE" in line
    assert "epsilon" not in line


def test_progress_line_does_not_invent_an_epsilon() -> None:
    assert "epsilon unknown" in progress_line(record(1, epsilon={}), seconds_left=0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (12.4, "12 s"), (89, "89 s"), (90, "2 min"), (300, "5 min"), (5399, "90 min"), (11520, "3.2 h")],
)
def test_seconds_are_written_in_the_unit_that_reads_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_run_goes_on_after_a_power_cut_in_the_middle_of_a_line(tmp_path: Path, cut: int) -> None:
    for number in (1, 2):
        append_round(tmp_path, record(number))
    log = tmp_path / "run.jsonl"
    log.write_bytes(log.read_bytes()[:-cut])
    left = [r["round"] for r in read_rounds(tmp_path)]
    append_round(tmp_path, record(3))
    assert [r["round"] for r in read_rounds(tmp_path)] == [*left, 3]
    assert left == ([1, 2] if cut == 1 else [1]), "only the line's end was lost, or the line"
