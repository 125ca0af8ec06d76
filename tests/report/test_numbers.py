"""The numbers on the page are those of the records."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedmm.report.record import read_rounds
from fedmm.schema import SUBSETS
from tests.report.run_folder import (
    CLASSES,
    NAMES,
    Page,
    cells,
    config,
    drawn,
    record,
    write_run,
)


def test_every_hospital_is_shown_with_its_own_last_epsilon_and_the_head_of_its_ledger(
    content: str, finished: Path
) -> None:
    last, trained = {}, dict.fromkeys(NAMES, 0)
    for line in read_rounds(finished):
        last.update({name: (line["round"], e) for name, e in line["epsilon"].items()})
        trained.update({name: trained[name] + 1 for name in line["trained"]})
    assert trained[NAMES[-1]] == 2, "a statement that comes with scores is no training"
    for name in NAMES:
        number, e = last[name]
        row = next(row for row in cells(content, name) if len(row) == 9)
        head = f"{e['ledger_sequence']}: {e['ledger_hash'][:16]}"
        numbers = [f"{e['spent']:.6f}", f"{e['ceiling']:g}", f"{e['ceiling'] - e['spent']:.6f}", "0.0001"]
        assert row[1:] == [head, *numbers, str(e["unprotected"]), str(trained[name]), str(number)]
    assert "Epsilon spent by this run alone is not in the records" in content
    assert "earlier runs there included" in content


def test_the_whole_head_of_each_ledger_is_there_with_its_signature_and_public_key(content: str, finished: Path) -> None:
    last = {name: e for line in read_rounds(finished) for name, e in line["epsilon"].items()}
    for name in NAMES:
        e = last[name]
        chain = [str(e["ledger_sequence"]), e["ledger_hash"], e["ledger_signature"], e["ledger_key"]]
        assert [name, *chain] in cells(content, name)


def test_epsilon_table_equals_the_records_and_leaves_a_gap_where_a_hospital_refused(
    content: str, finished: Path
) -> None:
    assert ["round", *NAMES] in cells(content, "round")
    for line in read_rounds(finished):
        shown = next(row for row in cells(content, str(line["round"])) if len(row) == 1 + len(NAMES))
        spent = [line["epsilon"].get(name, {}).get("spent") for name in NAMES]
        assert shown[1:] == ["–" if value is None else f"{value:.6f}" for value in spent]


def test_score_table_equals_the_records_and_their_study_weighted_mean(content: str, finished: Path) -> None:
    scored = [line["scores"] for line in read_rounds(finished) if line["scores"]]
    for name in NAMES:
        assert [name, *(f"{s[name]['mean_auroc']:.3f}" for s in scored)] in cells(content, name)
    means = [np.average([s[n]["mean_auroc"] for n in NAMES], weights=[s[n]["studies"] for n in NAMES]) for s in scored]
    assert cells(content, "mean, weighted by studies")[0][1:] == [f"{mean:.3f}" for mean in means]
    assert f"<dt>Mean AUROC</dt><dd><b>{means[-1]:.3f}</b>" in content


def test_modality_rows_are_weighted_by_the_studies_that_they_stand_for(content: str, finished: Path) -> None:
    last = read_rounds(finished)[-1]["scores"]
    audio = [last[name]["by_modality"]["audio"] for name in NAMES]
    only = np.average([a["only"]["mean_auroc"] for a in audio], weights=[a["studies"] for a in audio])
    without = np.average([a["without"]["accuracy"] for a in audio], weights=[last[n]["studies"] for n in NAMES])
    each = [f"{a['only']['mean_auroc']:.3f}" for a in audio]
    assert ["audio only", f"{only:.3f}", *each] in cells(content, "audio only")
    assert f"{without:.3f}" in [row[1] for row in cells(content, "without audio")]


def test_every_combination_of_modalities_has_its_row_weighted_by_its_own_studies(content: str, finished: Path) -> None:
    last = read_rounds(finished)[-1]["scores"]
    for name in SUBSETS:
        parts = [last[hospital]["by_subset"][name] for hospital in NAMES]
        studies = [part["studies"] for part in parts]
        area, right = (np.average([p[key] for p in parts], weights=studies) for key in ("mean_auroc", "accuracy"))
        shown = name.replace("+", " + ")
        assert [shown, f"{sum(studies):,}", f"{area:.3f}", f"{right:.3f}"] in cells(content, shown)


def test_a_model_that_says_the_same_of_everybody_is_named_with_its_hospital(tmp_path: Path, page: Page) -> None:
    line = record(1, NAMES, rounds=1)
    folder = write_run(tmp_path, config(NAMES, rounds=1), [line])
    assert "hardly tells patients apart" not in page(folder)
    line["scores"][NAMES[2]]["collapsed"]["finding3"] = {"collapsed": True, "answer": "covid19"}
    content = page(write_run(tmp_path, config(NAMES, rounds=1), [line]))
    assert "hardly tells patients apart.</b> Nearly every patient" in content
    assert f"finding3 at {NAMES[2]}." in content


def test_confusion_and_calibration_are_summed_over_hospitals(content: str, finished: Path) -> None:
    last = read_rounds(finished)[-1]["scores"]
    table = sum(np.array(s["confusion"]["finding3"]["counts"]) for s in last.values())
    for value, row in zip(CLASSES, table, strict=True):
        assert [value, *(f"{count} ({count / row.sum():.0%})" for count in row)] in cells(content, value)
    (tn, fp), (fn, tp) = sum(np.array(s["confusion"]["effusion"]["counts"]) for s in last.values())
    shown = next(row for row in cells(content, "effusion") if len(row) == 8)
    assert shown[1:7] == [*map(str, (tp, fn, fp, tn)), f"{tp / (tp + fn):.2f}", f"{tn / (tn + fp):.2f}"]
    counts = sum(np.array(s["calibration"]["count"]) for s in last.values())
    for b, predicted in enumerate(last[NAMES[0]]["calibration"]["predicted"]):
        assert cells(content, f"{predicted:.3f}")[0][2] == str(counts[b])


def test_highest_epsilon_is_rounded_up_because_it_is_a_bound(tmp_path: Path, page: Page) -> None:
    line = record(1, ["a"], rounds=1)
    line["epsilon"]["a"]["spent"] = 1.2301
    content = page(write_run(tmp_path, config(["a"], rounds=1), [line]))
    assert "<dt>Highest epsilon spent</dt><dd><b>1.24</b>" in content


def test_refusals_are_listed_with_round_code_and_reason_and_repeated_ones_are_joined(
    tmp_path: Path, page: Page
) -> None:
    records = [record(number, NAMES, rounds=5, scored=False) for number in range(1, 6)]
    for number in (2, 3, 5):
        records[number - 1]["failures"] = [
            {"hospital": "basel", "kind": "refused", "code": 1002, "reason": "POLICY_REFUSED: not here"}
        ]
    records[0]["failures"] = [{"hospital": "aachen", "kind": "silent", "code": 0, "reason": "no answer"}]
    content = page(write_run(tmp_path, config(NAMES, rounds=5), records))
    rows = [row for first in ("1", "2 – 3", "5") for row in cells(content, first) if len(row) == 5 and row[4]]
    refused = ["basel", "refused: its own decision", "1002 POLICY_REFUSED", "POLICY_REFUSED: not here"]
    assert ["2 – 3", *refused] in rows
    assert ["5", *refused] in rows
    assert ["1", "aachen", "silent: no answer in time", "0", "no answer"] in rows
    assert "<dt>Hospitals that refused</dt><dd><b>1</b>basel; other failures at aachen" in content


def test_hospitals_that_spend_alike_share_one_line_and_the_page_says_so(tmp_path: Path) -> None:
    records = [record(number, NAMES, rounds=3) for number in (1, 2, 3)]
    for line in records:
        line["epsilon"] = {name: line["epsilon"][NAMES[0]] for name in NAMES}
    content = drawn(write_run(tmp_path, config(NAMES, rounds=3), records))
    assert "All 4 hospitals spent the same in every round" in content
    assert "all 4 1.56" in content
    assert "ceiling 20: all 4" in content
