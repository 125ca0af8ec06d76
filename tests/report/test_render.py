"""The page about a run: what it must never contain, and that it works for every state of a run."""

from __future__ import annotations

import html
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedmm.errors import ConfigError
from fedmm.report.page import short
from fedmm.report.plots import NAMED, marks
from fedmm.report.render import write_report
from tests.report.run_folder import (
    CLASSES,
    FINDINGS,
    HOSTILE,
    NAMES,
    OUTPUTS,
    Page,
    cells,
    config,
    drawn,
    make_run,
    record,
    write_run,
)

# --- nothing leaves the page, nothing gets in -------------------------------------------------------------------------


def test_page_fetches_nothing_and_runs_nothing(content: str) -> None:
    assert "http" not in content
    assert "//" not in content
    assert "<script" not in content.lower()
    assert "@import" not in content
    assert not re.search(r"<(link|img|iframe|object|embed|base|image)\b|\ssrc=|\son\w+=", content)
    assert set(re.findall(r'href="([^"]{1})', content)) == {"#"}
    assert set(re.findall(r"url\((.)", content)) == {"#"}


def test_every_reference_inside_a_figure_has_its_target_and_no_id_is_used_twice(content: str) -> None:
    ids = re.findall(r'\sid="([^"]+)"', content)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', content))
    assert len(ids) == len(set(ids))
    assert used
    assert used <= set(ids)


def test_hostile_names_and_reasons_are_shown_as_text(tmp_path: Path) -> None:
    names = [HOSTILE, '"><svg onload=x>', "$\\frac{$", "\u202eevil\x00\ud800", "ünïcode 病院"]
    settings = config(names, rounds=2)
    settings["labels"] = {"findings": [HOSTILE], "class_name": "</style>", "class_values": ["<b>", "&amp;"]}
    settings["run"] = settings["started"] = settings["settings"]["model.image"] = HOSTILE
    settings["absent"] = [{"hospital": HOSTILE, "kind": HOSTILE, "code": 1, "reason": HOSTILE}]
    line = record(2, names, rounds=2)
    for score in line["scores"].values():
        score["auroc"] = {HOSTILE: 0.7, "</style>=<b>": 0.6}
        score["confusion"] = {"</style>": {"values": ["<b>", "&amp;"], "counts": [[3, 1], [1, 3]]}}
    for said in line["epsilon"].values():
        said["ledger_hash"] = said["ledger_signature"] = said["ledger_key"] = "<b>&</b>"
        said["unprotected"] = 2
    line["arrived"] += [{"hospital": HOSTILE, "what": HOSTILE, "bytes": 0}]
    settings["arrived"] = [{"hospital": HOSTILE, "what": f"refusal {HOSTILE}", "bytes": 1}]
    line["withheld"] = [HOSTILE]
    line["failures"] = [{"hospital": HOSTILE, "kind": HOSTILE, "code": 7, "reason": f"{HOSTILE}</td><script>x"}]
    content = drawn(write_run(tmp_path, settings, [line]))
    assert html.escape(HOSTILE) in content
    assert "<img" not in content
    assert "<script" not in content
    assert "<svg onload" not in content
    assert "<b>&" not in content
    assert content.count("</style>") == 1
    assert "\u202e" not in content
    assert "\x00" not in content
    assert "病院" in content


def test_scores_of_another_form_than_agreed_are_left_out(tmp_path: Path, page: Page) -> None:
    line = record(1, NAMES, rounds=1)
    line["scores"][NAMES[0]] = {"mean_auroc": HOSTILE, "studies": "many", "auroc": [HOSTILE], "by_modality": 3}
    line["scores"][NAMES[1]] = {
        "studies": 10,
        "mean_auroc": math.nan,
        "confusion": {"finding3": {"values": CLASSES, "counts": [[HOSTILE]]}, "abnormal": {"values": [HOSTILE]}},
        "calibration": {"predicted": ["x"], "observed": None, "count": [1]},
        "by_modality": {HOSTILE: {"only": HOSTILE}, "image": HOSTILE},
        "by_subset": {HOSTILE: {"studies": 3}, "image": {"studies": HOSTILE}, "audio": HOSTILE},
        "collapsed": {"finding3": {"collapsed": HOSTILE}, HOSTILE: {"collapsed": True}},
    }
    line["scores"][NAMES[2]] = HOSTILE
    content = page(write_run(tmp_path, config(NAMES, rounds=1), [line]))
    assert "onerror" not in content
    assert cells(content, NAMES[0])[0] == [NAMES[0], "–"]
    kept = line["scores"][NAMES[3]]
    assert cells(content, "mean, weighted by studies")[0][1] == f"{kept['mean_auroc']:.3f}"
    shown = [cell.split()[0] for cell in cells(content, "covid19")[-1]]
    assert shown == ["covid19", *map(str, kept["confusion"]["finding3"]["counts"][0])]


def test_paths_of_the_coordinator_are_not_shown(content: str, finished: Path) -> None:
    assert "/secret/place" not in content
    assert str(finished) not in content


# --- every state of a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, NAMED + 3])
def test_page_works_for_any_number_of_hospitals(tmp_path: Path, count: int) -> None:
    names = [f"university_hospital_of_place_{i:02d}" for i in range(count)]
    content = drawn(make_run(tmp_path, names=names, rounds=2))
    assert content.count("<svg") == 5
    assert all(any("0.0001" in row for row in cells(content, name)) for name in names)


def test_unfinished_run_says_how_far_it_is(tmp_path: Path, page: Page) -> None:
    content = page(make_run(tmp_path, done=5, rounds=12))
    assert "5 of 12 – unfinished" in content
    assert cells(content, "hospital")[0] == ["hospital", "round 2", "round 4"]


def test_run_with_one_evaluation_is_shown_by_hospital_and_not_as_lines(tmp_path: Path) -> None:
    assert "Round 2, by hospital" in drawn(make_run(tmp_path, done=3))


def test_run_without_any_round_has_no_figures_and_every_section(tmp_path: Path, page: Page) -> None:
    content = page(make_run(tmp_path, done=0))
    assert "0 of 4 – unfinished" in content
    assert "<svg" not in content
    assert content.count("<section>") == 8


def test_scores_kept_at_home_by_policy_are_said_to_be_and_epsilon_is_still_shown(tmp_path: Path, page: Page) -> None:
    records = [record(number, NAMES, rounds=2, scored=False) for number in (1, 2)]
    records[1].update(evaluated=True, withheld=NAMES)
    content = page(write_run(tmp_path, config(NAMES, rounds=2), records))
    assert f"Scores kept at home by policy: {', '.join(NAMES)}" in content
    assert cells(content, "exact scores") == []
    assert content.count("<svg") == 1
    assert "exact counts of held-back patients" not in content
    assert "not covered by any epsilon" not in content


def test_hospital_that_keeps_its_scores_at_home_is_told_apart_from_one_that_failed(tmp_path: Path, page: Page) -> None:
    line = record(1, NAMES, rounds=1)
    del line["scores"][NAMES[0]], line["scores"][NAMES[1]]
    line["withheld"] = [NAMES[0]]
    content = page(write_run(tmp_path, config(NAMES, rounds=1), [line]))
    assert f"Scores kept at home by policy: {NAMES[0]}." in content
    assert cells(content, NAMES[0])[0] == [NAMES[0], "at home"]
    assert cells(content, NAMES[1])[0] == [NAMES[1], "–"]


@pytest.mark.parametrize(
    ("evaluated", "reason"), [(False, "no evaluation was due so far"), (True, "no hospital gave usable ones")]
)
def test_page_says_why_there_are_no_scores(tmp_path: Path, page: Page, *, evaluated: bool, reason: str) -> None:
    line = {**record(1, NAMES, rounds=2, scored=False), "evaluated": evaluated}
    assert reason in page(write_run(tmp_path, config(NAMES, rounds=2), [line]))


@pytest.mark.parametrize("private", [True, False])
def test_releases_that_no_epsilon_covers_are_counted_and_named_at_the_top(
    tmp_path: Path, page: Page, *, private: bool
) -> None:
    records = [record(number, NAMES, rounds=3, private=private, scored=False) for number in (1, 2, 3)]
    for line in records[1:]:
        line["epsilon"][NAMES[0]]["unprotected"] = 4
    content = page(write_run(tmp_path, config(NAMES, rounds=3, private=private), records))
    top = html.unescape(re.sub(r"<[^>]*>", "", content[: content.index("<section>")]))
    said = "4 releases at these hospitals (exact test scores or runs without privacy, allowed by their research policy)"
    assert f"{said} are not covered by any epsilon: {NAMES[0]} (4)." in top
    assert NAMES[1] + " (" not in top


def test_the_ledgers_own_count_is_shown_and_nothing_is_added_to_it(tmp_path: Path, page: Page) -> None:
    records = [record(number, NAMES[:2], rounds=2) for number in (1, 2)]
    for line in records:
        line["epsilon"][NAMES[0]]["unprotected"], line["epsilon"][NAMES[1]]["unprotected"] = 7, 0
    content = page(write_run(tmp_path, config(NAMES[:2], rounds=2), records))
    assert f"are not covered by any epsilon: {NAMES[0]} (7)." in content


def test_run_without_unprotected_releases_has_no_amber_warning(tmp_path: Path, page: Page) -> None:
    content = page(make_run(tmp_path, scored=False))
    assert "class=warning" not in content


def test_absent_hospitals_are_refusals_of_round_zero(tmp_path: Path, page: Page) -> None:
    settings = config(NAMES, rounds=1)
    settings["absent"] = [{"hospital": "node 7", "kind": "refused", "code": 1002, "reason": "POLICY_REFUSED: no"}]
    content = page(write_run(tmp_path, settings, [record(1, NAMES, rounds=1)]))
    row = ["0", "node 7", "refused: its own decision", "1002 POLICY_REFUSED", "POLICY_REFUSED: no"]
    assert row in cells(content, "0")
    assert "<dt>Hospitals that refused</dt><dd><b>1</b>node 7" in content


def test_private_run_carries_the_statement_and_not_the_warning(content: str) -> None:
    assert "Patient-level (epsilon, delta) differential privacy, epsilon shown per hospital." in content
    assert "NOT PRIVATE" not in content


@pytest.mark.parametrize("where", ["config", "one round", "config says nothing"])
def test_run_counts_as_private_only_if_config_and_every_round_say_so(tmp_path: Path, where: str, page: Page) -> None:
    settings, records = config(NAMES, rounds=2), [record(number, NAMES, rounds=2) for number in (1, 2)]
    if where == "config":
        settings["private"] = False
    elif where == "one round":
        records[0]["private"] = False
    else:
        del settings["private"]
    content = page(write_run(tmp_path, settings, records))
    assert "<b>NOT PRIVATE</b>" in content
    assert "Patient-level (epsilon, delta)" not in content
    assert f"{records[1]['epsilon'][NAMES[0]]['spent']:.6f}" not in content


def test_scores_that_are_not_defined_are_dashes(tmp_path: Path, page: Page) -> None:
    line = record(1, ["a", "b"], rounds=1)
    for score in line["scores"].values():
        score.update(accuracy=None, mean_auroc=None, majority=None, auroc=dict.fromkeys(OUTPUTS))
        for by in score["by_modality"].values():
            by["only"] = by["without"] = {"accuracy": None, "mean_auroc": None, "auroc": {}}
    content = page(write_run(tmp_path, config(["a", "b"], rounds=1), [line]))
    assert ["image only", "–", "–", "–"] in cells(content, "image only")
    assert "<dt>Mean AUROC</dt><dd><b>–</b>" in content


def test_findings_without_a_class_and_a_class_without_findings_both_work(tmp_path: Path, page: Page) -> None:
    for labels, gone in (
        ({"findings": FINDINGS, "class_name": "", "class_values": []}, "rows are the truth"),
        ({"findings": [], "class_name": "finding3", "class_values": CLASSES}, "Findings, at a probability"),
    ):
        settings = {**config(NAMES, rounds=1), "labels": labels}
        content = page(write_run(tmp_path, settings, [record(1, NAMES, rounds=1)]))
        assert gone not in content
        assert "Expected calibration error (ECE)" in content


@pytest.mark.parametrize("part", ["plan", "hospitals", "run", "started", "arrived"])
def test_config_that_lacks_a_part_is_refused_by_its_name(tmp_path: Path, part: str) -> None:
    settings = config(NAMES, rounds=1)
    del settings[part]
    with pytest.raises(ConfigError, match="is damaged or of another version") as caught:
        write_report(write_run(tmp_path, settings, [record(1, NAMES, rounds=1)]))
    assert part in caught.value.why


@pytest.mark.parametrize("part", ["epsilon", "scores", "withheld", "private", "trained", "arrived"])
def test_record_that_lacks_a_part_is_refused_by_its_name(tmp_path: Path, part: str) -> None:
    line = record(1, NAMES, rounds=1)
    del line[part]
    with pytest.raises(ConfigError) as caught:
        write_report(write_run(tmp_path, config(NAMES, rounds=1), [line]))
    assert part in caught.value.why


# --- the file ---------------------------------------------------------------------------------------------------------


def test_same_folder_gives_the_same_bytes_whatever_the_matplotlibrc(
    finished: Path, content: str, tmp_path: Path
) -> None:
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.grid: True\nsvg.fonttype: path\n")
    code = "import sys, pathlib, fedmm.report.render as page; page.write_report(pathlib.Path(sys.argv[1]))"
    environment = {"MATPLOTLIBRC": str(tmp_path), "PYTHONHASHSEED": "7", "PATH": "", "HOME": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", code, str(finished)], check=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert (finished / "report.html").read_text(encoding="utf-8") == content


def test_drawing_leaves_the_style_of_the_caller_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawn(make_run(tmp_path, rounds=1, scored=False))
    assert dict(matplotlib.rcParams) == before


def test_report_replaces_the_old_one_and_leaves_no_draft(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=0)
    (folder / "report.html").write_text("old")
    assert write_report(folder) == folder / "report.html"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "report.html", "run.jsonl"]
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_importing_the_page_loads_neither_torch_nor_flower_nor_matplotlib() -> None:
    code = "import sys, fedmm.report.render; print({'torch', 'flwr', 'matplotlib'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder"):
        write_report(tmp_path)


def test_figures_tell_hospitals_apart_by_colour_and_marker() -> None:
    look = marks([f"h{i}" for i in range(NAMED)])
    assert len({(mark.colour, mark.marker) for mark in look.values()}) == NAMED


def test_long_names_keep_their_ends_in_figures() -> None:
    assert short("aachen") == "aachen"
    assert short("university_hospital_basel") == "university_ho…_basel"
