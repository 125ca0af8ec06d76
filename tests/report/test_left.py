"""What left each hospital: every message, its bytes, and whether epsilon covers it; and which level is promised."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pytest

from fedmm.report.record import read_config, read_rounds
from tests.report.run_folder import NAMES, Page, arrive, cells, config, make_run, noisy_record, record, write_run


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_messages_are_counted_by_kind_and_the_sum_is_all_bytes_up(content: str, finished: Path) -> None:
    rounds, hellos = read_rounds(finished), read_config(finished)["arrived"]
    for kind in ("hello", "weights", "exact scores", "refusal 1001"):
        own = [a for a in [*hellos, *(a for line in rounds for a in line["arrived"])] if a["what"] == kind]
        (row,) = (row for row in cells(content, kind) if len(row) == 5)
        assert row[3:] == [f"{len(own):,}", f"{sum(a['bytes'] for a in own):,}"]
    up, early = sum(line["bytes_up"] for line in rounds), sum(a["bytes"] for a in hellos)
    by_kind, by_hospital = (row for row in cells(content, "all") if len(row) in (4, 5))
    assert number(by_kind[-1]) == number(by_hospital[-1]) == up + early
    assert f"All bytes: {up:,} up in the rounds and {early:,} before the first one." in content
    assert "Damaged records" not in content


def test_messages_are_counted_by_hospital(tmp_path: Path, page: Page) -> None:
    line = noisy_record(1, rounds=1, levels={"aachen": 0.8}, exact=["basel"])
    line["failures"] = [{"hospital": "node 9", "kind": "refused", "code": 1002, "reason": "no"}]
    content = page(write_run(tmp_path, config(["aachen", "basel"], rounds=1), [arrive(line)]))
    table = content[content.index("<th>hospital</th><th>what left</th>") :]
    assert cells(table, "aachen")[0] == ["aachen", "hello", "1", "300"]
    assert cells(table, "basel")[0] == ["basel", "hello", "1", "300"]
    assert [row[1:] for row in cells(table, "") if len(row) == 4] == [
        ["weights", "1", "1,234,567"],
        ["score histogram", "1", "5,123"],
        ["weights", "1", "1,234,567"],
        ["exact scores", "1", "3,210"],
    ]
    assert cells(table, "node 9")[0] == ["node 9", "refusal 1002", "1", "71"]


def test_each_kind_says_whether_epsilon_covers_it(tmp_path: Path, page: Page) -> None:
    line = noisy_record(1, rounds=1, levels={"aachen": 0.8}, exact=["basel"])
    line["failures"] = [{"hospital": "basel", "kind": "failed", "code": 1099, "reason": ""}]
    arrive(line)
    line["arrived"] += [
        {"hospital": "basel", "what": "unusable", "bytes": 0},
        {"hospital": "basel", "what": "scores withheld", "bytes": 0},
        {"hospital": "basel", "what": "refusal 1001", "bytes": 0},
    ]
    content = page(write_run(tmp_path, config(["aachen", "basel"], rounds=1), [line]))
    covered = {
        kind: row[2].split(":")[0].split(".")[0] for kind in KINDS for row in cells(content, kind) if len(row) == 5
    }
    assert covered == KINDS
    (refused,) = (row for row in cells(content, "refusal 1001") if len(row) == 5)
    assert refused[1].startswith("BUDGET_EXHAUSTED")


KINDS = {
    "hello": "needs none",
    "weights": "yes",
    "score histogram": "yes",
    "exact scores": "NO",
    "scores withheld": "needs none",
    "refusal 1099": "needs none",
    "unusable": "not known",
}


def test_weights_of_a_run_without_privacy_are_not_covered(tmp_path: Path, page: Page) -> None:
    content = page(make_run(tmp_path, private=False))
    (row,) = (row for row in cells(content, "weights") if len(row) == 5)
    assert row[2] == "NO. No noise was added"
    assert "as trained" in row[1]


@pytest.mark.parametrize(
    ("weights", "said"),
    [("uniform", "the same for every hospital"), ("declared", "site.toml declares"), ("noisy", "charged once")],
)
def test_the_weight_in_the_average_is_named(tmp_path: Path, page: Page, weights: str, said: str) -> None:
    settings = config(NAMES, rounds=1)
    settings["settings"]["federation.weights"] = weights
    content = page(write_run(tmp_path, settings, [record(1, NAMES, rounds=1)]))
    (row,) = (row for row in cells(content, "weights") if len(row) == 5)
    assert said in row[1]


def test_records_that_do_not_add_up_are_called_damaged(tmp_path: Path, page: Page) -> None:
    line = record(1, NAMES, rounds=1)
    line["bytes_up"] += 1
    assert "Damaged records." in page(write_run(tmp_path, config(NAMES, rounds=1), [line]))


def test_many_hospitals_are_folded_up(tmp_path: Path, page: Page) -> None:
    names = [f"h{i}" for i in range(9)]
    content = page(write_run(tmp_path, config(names, rounds=1), [record(1, names, rounds=1)]))
    assert "<summary>What left, by hospital</summary>" in content


# --- level ------------------------------------------------------------------------------------------------------------


def planned(folder: Path, **changes: Any) -> Path:
    settings = config(NAMES, rounds=1)
    settings["plan"] |= changes
    return write_run(folder, settings, [record(1, NAMES, rounds=1, scored=False)])


def test_a_run_at_record_level_says_so_at_the_top_and_in_the_plan(tmp_path: Path, page: Page) -> None:
    content = page(planned(tmp_path, unit="record"))
    top, plan = content[: content.index("<section>")], content[content.index("Privacy plan") :]
    assert "<p class=warning><b>RECORD LEVEL</b>" in top
    assert "class=private" not in top
    assert "RECORD LEVEL. A patient with several records is protected less" in plan
    assert "All studies of a patient are protected together" not in content
    assert "per record and hospital for this run" in content
    assert "holds this run to at most 8 at delta 0.0001 per record." in content
    assert "the epsilon shown per hospital is the patient" in html.unescape(top)


def test_a_run_at_patient_level_does_not_speak_of_records(tmp_path: Path, page: Page) -> None:
    content = page(planned(tmp_path))
    assert "RECORD LEVEL" not in content
    assert "All studies of a patient are protected together" in content
    assert "with at most 5 studies of a patient" in content


def test_the_plan_says_what_noise_is_on_test_scores(tmp_path: Path, page: Page) -> None:
    assert "sigma = 3.125 x their sensitivity" in page(planned(tmp_path, evaluation_noise=3.125))
    assert "Test scores: none are released under this epsilon" in page(planned(tmp_path, evaluation_noise=0.0))


@pytest.mark.parametrize(("wire", "said"), [("fp32", "after noise; "), ("int8", "rounded at random to 8 bits; ")])
def test_how_weights_were_coded_is_said_where_they_are_said_to_have_left(
    tmp_path: Path, page: Page, wire: str, said: str
) -> None:
    run = config(["aachen", "basel"], rounds=1)
    run["settings"]["federation.wire"] = wire
    content = html.unescape(
        page(write_run(tmp_path, run, [arrive(noisy_record(1, rounds=1, levels={"aachen": 0.8}, exact=["basel"]))]))
    )
    (row,) = (row for row in cells(content, "weights") if len(row) == 5)
    assert said in row[1]
