"""The page about a run: what it shows, what it must never contain, and that it works for every state of a run."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmm.errors import ConfigError
from fedmm.report.plots import NAMED, marks, short
from fedmm.report.record import read_rounds
from fedmm.report.render import write_report

FINDINGS, CLASSES = ["abnormal", "effusion"], ["covid19", "no_finding", "pneumonia"]
OUTPUTS = [*FINDINGS, *(f"finding3={value}" for value in CLASSES)]
NAMES = ["aachen", "basel_university_clinic", "mhh_hannover", "nih_us_ap"]
HOSTILE = "<img src=x onerror=1>"


# --- a synthetic run folder -------------------------------------------------------------------------------------------


def summary(level: float, rng: np.random.Generator) -> dict[str, Any]:
    """Scores around `level` of AUROC."""
    areas = {name: float(np.clip(level + rng.normal(0, 0.03), 0, 1)) for name in OUTPUTS}
    mean = float(np.mean(list(areas.values())))
    return {"accuracy": mean - 0.12, "f1_macro": mean - 0.15, "auroc": areas, "mean_auroc": mean}


def scores(level: float, rng: np.random.Generator, *, studies: int) -> dict[str, Any]:
    """What fedmm.training.metrics.score gives."""
    drop = {"image": 0.09, "report": 0.05, "audio": 0.02}
    count = rng.integers(5, 60, 10)
    predicted = (np.arange(10) + 0.5) / 10
    confusion = {name: {"values": ["no", "yes"], "counts": rng.integers(3, 40, (2, 2)).tolist()} for name in FINDINGS}
    counts = (np.eye(3, dtype=int) * 20 + rng.integers(0, 9, (3, 3))).tolist()
    return {
        "studies": studies,
        "patients": studies // 2,
        **summary(level, rng),
        "majority": 0.45,
        "by_modality": {
            name: {
                "studies": int(studies * share),
                "only": summary(0.5 + (level - 0.5) * 0.6 + less, rng),
                "without": summary(level - less, rng),
            }
            for (name, less), share in zip(drop.items(), (1, 0.9, 0.6), strict=True)
        },
        "confusion": {**confusion, "finding3": {"values": CLASSES, "counts": counts}},
        "calibration": {
            "predicted": predicted.tolist(),
            "observed": (predicted**1.3).tolist(),
            "count": count.tolist(),
            "expected_calibration_error": 0.04,
        },
    }


def record(number: int, names: list[str], *, rounds: int, private: bool = True, scored: bool = True) -> dict[str, Any]:
    """One line of run.jsonl. Hospital i has spent 0.3 i in earlier runs and, of five, learns a little more slowly."""
    rng = np.random.default_rng(number)
    level = 0.55 + 0.35 * (1 - math.exp(-number / 5))
    epsilon = {
        name: {"spent": 0.3 * i + 0.9 * math.sqrt(number), "ceiling": 10.0 if i % 2 else 20.0, "delta": 1e-4}
        for i, name in enumerate(names)
    }
    shown = {n: scores(level - 0.02 * (i % 5), rng, studies=40 + 30 * i) for i, n in enumerate(names)}
    return {
        "round": number,
        "rounds": rounds,
        "private": private,
        "trained": list(names),
        "failures": [],
        "epsilon": epsilon,
        "scores": shown if scored else {},
        "bytes_up": 1_234_567 * len(names),
        "bytes_down": 1_200_000 * len(names),
        "seconds": 7.25,
    }


def config(names: list[str], *, rounds: int, private: bool = True) -> dict[str, Any]:
    """What the coordinator writes beside the model."""
    settings = {
        "data.hospitals": "/secret/place/hospitals",
        "data.image_size": 64,
        "data.report_tokens": 256,
        "model.image": "cnn",
        "model.report": "ngrams",
        "model.audio": "cnn",
        "model.fusion": "concat",
        "training.batch_size": 32,
        "training.sampling_rate": 0.25,
        "training.local_steps": 2,
        "training.learning_rate": 0.5,
        "privacy.enabled": private,
        "privacy.epsilon": 8.0,
        "privacy.delta": 1e-4,
        "federation.rounds": rounds,
        "federation.strategy": "fedavgm",
        "federation.weights": "uniform",
        "federation.evaluate_every": 2,
    }
    plan = {
        "unit": "patient",
        "relation": "add_or_remove_one",
        "epsilon": 8.0,
        "delta": 1e-4,
        "max_grad_norm": 1.0,
        "sampling_rate": 0.25,
        "steps_per_round": 2,
        "rounds": rounds,
        "noise_multiplier": 1.2208 if private else 0.0,
        "private": private,
    }
    return {
        "format": 1,
        "labels": {"findings": FINDINGS, "class_name": "finding3", "class_values": CLASSES},
        "settings": settings,
        "plan": plan,
        "run": "7f3a90c2d1e4b856",
        "fedmm": "0.1.0",
        "private": private,
        "hospitals": names,
        "started": "2026-03-14T09:26:53+00:00",
        "weights": 123456,
        "engine": "local",
    }


def write_run(folder: Path, settings: dict[str, Any], records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "run.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def make_run(
    folder: Path,
    *,
    names: list[str] = NAMES,
    rounds: int = 12,
    done: int | None = None,
    private: bool = True,
    scored: bool = True,
) -> Path:
    """A run folder: evaluation in every second round; the last of several hospitals refuses from round 9."""
    records = []
    for number in range(1, (rounds if done is None else done) + 1):
        line = record(number, names, rounds=rounds, private=private, scored=scored and number % 2 == 0)
        if len(names) > 1 and number >= 9 and private:
            line["trained"].remove(names[-1])
            del line["epsilon"][names[-1]]
            line["failures"] = [refusal(names[-1], number)]
        records.append(line)
    return write_run(folder, config(names, rounds=rounds, private=private), records)


def refusal(hospital: str, number: int) -> dict[str, Any]:
    reason = f"BUDGET_EXHAUSTED: round {number} would bring epsilon to 10.04 of 10.00 at delta 0.0001"
    return {"hospital": hospital, "kind": "refused", "code": 1001, "reason": reason}


def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def cells(content: str, first: str) -> list[list[str]]:
    """Rows of all tables whose first cell is `first`, as a reader sees them."""
    rows = re.findall(r"<tr>(.*?)</tr>", content)
    read = [[html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]
    return [row for row in read if row and row[0] == first]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def content(finished: Path) -> str:
    """The page of the finished run, drawn once."""
    return page(finished)


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
    settings["run"] = settings["engine"] = settings["settings"]["model.image"] = HOSTILE
    settings["plan"]["unit"] = HOSTILE
    line = record(2, names, rounds=2)
    for score in line["scores"].values():
        score["auroc"] = {HOSTILE: 0.7, "</style>=<b>": 0.6}
        score["confusion"] = {"</style>": {"values": ["<b>", "&amp;"], "counts": [[3, 1], [1, 3]]}}
    line["failures"] = [{"hospital": HOSTILE, "kind": HOSTILE, "code": HOSTILE, "reason": f"{HOSTILE}</td><script>x"}]
    content = page(write_run(tmp_path, settings, [line]))
    assert html.escape(HOSTILE) in content
    assert "<img" not in content
    assert "<script" not in content
    assert "<svg onload" not in content
    assert "<b>&" not in content
    assert content.count("</style>") == 1
    assert "\u202e" not in content
    assert "\x00" not in content
    assert "病院" in content


def test_scores_of_another_form_than_agreed_are_left_out(tmp_path: Path) -> None:
    line = record(1, NAMES, rounds=1)
    line["scores"][NAMES[0]] = {"mean_auroc": HOSTILE, "studies": "many", "auroc": [HOSTILE], "by_modality": 3}
    line["scores"][NAMES[1]] = {
        "studies": 10,
        "mean_auroc": math.nan,
        "confusion": {"finding3": {"values": CLASSES, "counts": [[HOSTILE]]}, "abnormal": {"values": [HOSTILE]}},
        "calibration": {"predicted": ["x"], "observed": None, "count": [1]},
        "by_modality": {HOSTILE: {"only": HOSTILE}, "image": HOSTILE},
    }
    line["scores"][NAMES[2]] = HOSTILE
    line["epsilon"][NAMES[1]] = {"spent": math.inf, "ceiling": "high"}
    content = page(write_run(tmp_path, config(NAMES, rounds=1), [line]))
    assert "onerror" not in content
    assert cells(content, NAMES[0])[0] == [NAMES[0], "–"]
    kept = line["scores"][NAMES[3]]
    assert cells(content, "mean, weighted by studies")[0][1] == f"{kept['mean_auroc']:.3f}"
    assert cells(content, "covid19")[-1] == ["covid19", *map(str, kept["confusion"]["finding3"]["counts"][0])]


def test_paths_of_the_coordinator_are_not_shown(content: str, finished: Path) -> None:
    assert "/secret/place" not in content
    assert str(finished) not in content


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_every_hospital_is_shown_with_its_own_last_epsilon(content: str, finished: Path) -> None:
    last = {}
    for line in read_rounds(finished):
        last.update({name: (line["round"], e) for name, e in line["epsilon"].items()})
    for name in NAMES:
        number, e = last[name]
        row = next(row for row in cells(content, name) if row[-1] == "0.0001")
        left = e["ceiling"] - e["spent"]
        assert row[1:] == [str(number), str(number), f"{e['spent']:.6f}", f"{e['ceiling']:g}", f"{left:.6f}", "0.0001"]


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


def test_confusion_and_calibration_are_summed_over_hospitals(content: str, finished: Path) -> None:
    last = read_rounds(finished)[-1]["scores"]
    table = sum(np.array(s["confusion"]["finding3"]["counts"]) for s in last.values())
    for value, row in zip(CLASSES, table, strict=True):
        assert [value, *map(str, row)] in cells(content, value)
    (tn, fp), (fn, tp) = sum(np.array(s["confusion"]["effusion"]["counts"]) for s in last.values())
    shown = next(row for row in cells(content, "effusion") if len(row) == 8)
    assert shown[1:7] == [*map(str, (tp, fn, fp, tn)), f"{tp / (tp + fn):.2f}", f"{tn / (tn + fp):.2f}"]
    counts = sum(np.array(s["calibration"]["count"]) for s in last.values())
    for b, predicted in enumerate(last[NAMES[0]]["calibration"]["predicted"]):
        assert cells(content, f"{predicted:.3f}")[0][2] == str(counts[b])


def test_highest_epsilon_is_rounded_up_because_it_is_a_bound(tmp_path: Path) -> None:
    line = record(1, ["a"], rounds=1)
    line["epsilon"]["a"]["spent"] = 1.2301
    content = page(write_run(tmp_path, config(["a"], rounds=1), [line]))
    assert "<dt>Highest epsilon spent</dt><dd><b>1.24</b>" in content


def test_refusals_are_listed_with_round_code_and_reason_and_repeated_ones_are_joined(tmp_path: Path) -> None:
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
    assert ["1", "aachen", "silent: no answer in time", "0 ", "no answer"] in rows
    assert "<dt>Hospitals that refused</dt><dd><b>1</b>basel; other failures at aachen" in content


def test_hospitals_that_spend_alike_share_one_line_and_the_page_says_so(tmp_path: Path) -> None:
    records = [record(number, NAMES, rounds=3) for number in (1, 2, 3)]
    for line in records:
        line["epsilon"] = {name: line["epsilon"][NAMES[0]] for name in NAMES}
    content = page(write_run(tmp_path, config(NAMES, rounds=3), records))
    assert "All 4 hospitals spent the same in every round" in content
    assert "all 4 1.56" in content


# --- every state of a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 12, 20, NAMED + 3])
def test_page_works_for_any_number_of_hospitals(tmp_path: Path, count: int) -> None:
    names = [f"university_hospital_of_place_{i:02d}" for i in range(count)]
    content = page(make_run(tmp_path, names=names, rounds=2))
    assert content.count("<svg") == 7
    assert all(any(row[-1] == "0.0001" for row in cells(content, name)) for name in names)


def test_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    content = page(make_run(tmp_path, done=5))
    assert "5 of 12 – unfinished" in content
    assert cells(content, "hospital")[0] == ["hospital", "round 2", "round 4"]


def test_run_with_one_evaluation_is_shown_by_hospital_and_not_as_lines(tmp_path: Path) -> None:
    assert "Round 2, by hospital" in page(make_run(tmp_path, done=3))


def test_run_without_any_round_has_no_figures_and_every_section(tmp_path: Path) -> None:
    content = page(make_run(tmp_path, done=0))
    assert "0 of 12 – unfinished" in content
    assert "<svg" not in content
    assert content.count("<section>") == 8


def test_run_whose_hospitals_keep_scores_at_home_says_so_and_still_shows_epsilon(tmp_path: Path) -> None:
    content = page(make_run(tmp_path, scored=False))
    assert "the policies of the hospitals keep them at home" in content
    assert cells(content, "Test scores") == [["Test scores", "stayed at home", "nothing left"]]
    assert content.count("<svg") == 2
    assert "exact counts of held-back patients" not in content


def test_exact_scores_are_named_as_outside_of_epsilon(content: str) -> None:
    (row,) = cells(content, "Test scores")
    assert row[2].startswith("NO. Exact test scores are not covered by epsilon")
    assert "research policy" in row[2]


def test_private_run_carries_the_statement_and_not_the_warning(content: str) -> None:
    assert "Patient-level (epsilon, delta) differential privacy, epsilon shown per hospital." in content
    assert "NOT PRIVATE" not in content


@pytest.mark.parametrize("where", ["config", "one round", "config says nothing"])
def test_run_counts_as_private_only_if_config_and_every_round_say_so(tmp_path: Path, where: str) -> None:
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


def test_scores_that_are_not_defined_are_dashes(tmp_path: Path) -> None:
    line = record(1, ["a", "b"], rounds=1)
    for score in line["scores"].values():
        score.update(accuracy=None, mean_auroc=None, majority=None, auroc=dict.fromkeys(OUTPUTS))
        for by in score["by_modality"].values():
            by["only"] = by["without"] = {"accuracy": None, "mean_auroc": None, "auroc": {}}
    content = page(write_run(tmp_path, config(["a", "b"], rounds=1), [line]))
    assert ["image only", "–", "–", "–"] in cells(content, "image only")
    assert "<dt>Mean AUROC</dt><dd><b>–</b>" in content


def test_findings_without_a_class_and_a_class_without_findings_both_work(tmp_path: Path) -> None:
    for labels, gone in (
        ({"findings": FINDINGS, "class_name": "", "class_values": []}, "Confusion, numbers"),
        ({"findings": [], "class_name": "finding3", "class_values": CLASSES}, "Findings, at a probability"),
    ):
        settings = {**config(NAMES, rounds=1), "labels": labels}
        content = page(write_run(tmp_path, settings, [record(1, NAMES, rounds=1)]))
        assert gone not in content
        assert "Reliability curve" in content


def test_config_with_nothing_but_labels_and_settings_is_enough(tmp_path: Path) -> None:
    content = page(write_run(tmp_path, {"labels": {}, "settings": {}}, [record(1, NAMES, rounds=1)]))
    assert "1 of 1" in content
    assert "config.json holds no plan." in content


# --- the file ---------------------------------------------------------------------------------------------------------


def test_same_folder_gives_the_same_bytes_whatever_the_matplotlibrc(finished: Path, tmp_path: Path) -> None:
    first = write_report(finished).read_bytes()
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.grid: True\nsvg.fonttype: path\n")
    code = "import sys, pathlib, fedmm.report.render as page; page.write_report(pathlib.Path(sys.argv[1]))"
    environment = {"MATPLOTLIBRC": str(tmp_path), "PYTHONHASHSEED": "7", "PATH": "", "HOME": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", code, str(finished)], check=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert (finished / "report.html").read_bytes() == first


def test_drawing_leaves_the_style_of_the_caller_alone(finished: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(finished)
    assert dict(matplotlib.rcParams) == before


def test_report_replaces_the_old_one_and_leaves_no_draft(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=0)
    (folder / "report.html").write_text("old")
    assert write_report(folder) == folder / "report.html"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "report.html", "run.jsonl"]
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_importing_the_page_does_not_load_matplotlib() -> None:
    code = "import sys, fedmm.report.render; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder"):
        write_report(tmp_path)


def test_figures_tell_hospitals_apart_by_colour_and_marker() -> None:
    look = marks([f"h{i}" for i in range(NAMED)])
    assert len({(mark.colour, mark.marker) for mark in look.values()}) == NAMED


def test_long_names_keep_their_ends_in_figures() -> None:
    assert short("aachen") == "aachen"
    assert short("university_hospital_basel") == "university_ho…_basel"
