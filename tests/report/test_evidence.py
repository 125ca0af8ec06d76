"""What comes into the privacy report from audit, attacks and evaluate: all that they really write, and no number of patients."""

from __future__ import annotations

import copy
import html
import json
import random
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedmm.cli import main
from fedmm.config import installed_version
from fedmm.errors import ConfigError
from fedmm.privacy import accounting
from fedmm.privacy.audit import clopper_pearson
from fedmm.privacy.plan import Event, Rate
from fedmm.report import evidence, privacy, privacy_measured, seal, values
from fedmm.report.audited import read_audit
from fedmm.report.reading import load_run
from tests.report import disclosed
from tests.report.run_folder import make_run

NOT_KNOWN = {"value": None, "low": None, "high": None}
MOST = 500  # patients: how far the inversion looks


def real(run: str = "", *, private: bool = True) -> dict[str, Any]:
    """What `fedmm attack` writes at a hospital of 61 patients, whose non-members are 19."""
    tpr = {
        "0.1": {"value": 5 / 42, "low": 0.0397826, "high": 0.2563171},
        "0.01": {**NOT_KNOWN, "reason": "1.0% of 19 non-members is less than one: it takes 100"},
        "0.001": {**NOT_KNOWN, "reason": "no members"},
    }
    few = {**NOT_KNOWN, "reason": "fewer than 20 patients have both"}
    links = {"candidates": 0, "top1": few, "top5": few, "mean_rank": few, "chance_top1": None, "chance_top5": None}
    parts = {
        "membership": [
            {"attack": "lira", "modality": "all", "members": 42, "non_members": 19, "tpr": tpr,
             "auc": {"value": 0.5213, "low": 0.3701, "high": 0.6688}},
            {"attack": "lira", "modality": "audio", "members": 4, "non_members": 3, "tpr": tpr,
             "auc": {**NOT_KNOWN, "reason": "fewer than 10 patients of a side"}},
        ],
        "relinkage": [
            {"from": "image", "to": "report", "matcher": None, **links},
            {"from": "audio", "to": "report", "matcher": "ridge", "candidates": 21,
             "top1": {"value": 2 / 21, "low": 0.0117, "high": 0.3038}, "top5": few,
             "chance_top1": 1 / 21, "chance_top5": 5 / 21},
        ],
        "inversion": [
            {"what": "tokens recovered", "patients": 4, "value": 0.123456, "low": -0.05, "high": 0.3, "baseline": 0.00417},
            {"what": "image ssim", "not_applicable": "image encoder hog has a fixed part"},
        ],
    }  # fmt: skip
    about = {"hospital": "aachen", "run": run, "date": "2026-11-28", "private": private}
    return {**about, **copy.deepcopy(parts), "control": copy.deepcopy(parts)}


def read(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    disclosed.put(folder / "attack-aachen.json", content)
    found = evidence.read_attacks(folder, "aachen")
    assert found is not None
    return found


def block(**parts: Any) -> str:
    """The ninth block of a report at epsilon 1."""
    document = {
        "hospital": "aachen", "run": {"name": "r", "hospitals": ["aachen"]}, "ledger": None, "audit": None, "attacks": None,
        "made": {"by": f"fedmm {installed_version()}"}, "odds": {"epsilon": 1.0, "delta": 1e-4}, "attacks_by_hospital": {},
    }  # fmt: skip
    return html.unescape(privacy_measured.attacks({**document, **parts}))


# --- attacks ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_told_and_what_does_not_apply_are_read_and_said_in_words(tmp_path: Path) -> None:
    shown = block(attacks=read(tmp_path, real()))
    assert "cannot be told at 0.1 %, 1 %" in shown
    assert "cannot be told: too few patients" in shown
    assert "not applicable: image encoder hog has a fixed part" in shown
    assert "None" not in shown


def test_what_cannot_be_told_is_not_in_the_figure(tmp_path: Path) -> None:
    found = read(tmp_path, real())
    assert "<svg" in block(attacks=found)
    for part in (found, found["control"]):
        for entry in part["membership"]:
            entry["tpr"] = [t for t in entry["tpr"] if t["value"] is None]
    shown = block(attacks=found)
    assert "<svg" not in shown
    assert "No figure" in shown


def test_a_reason_is_kept_without_its_counts(tmp_path: Path) -> None:
    found = read(tmp_path, real())
    reasons = {t["false_alarm"]: t["reason"] for t in found["membership"][0]["tpr"]}
    assert reasons == {0.1: "", 0.01: "too few patients", 0.001: "no members"}
    stated = re.findall(r"(?<![\w.])\d+(?![\w.])", json.dumps(found))
    assert not {"42", "19", "21", "61"} & set(stated)


def test_a_value_outside_of_its_interval_is_refused(tmp_path: Path) -> None:
    broken = real()
    broken["membership"][0]["auc"] |= {"low": 0.6}
    with pytest.raises(ConfigError, match="damaged"):
        read(tmp_path, broken)


def test_a_model_without_privacy_has_no_bound_to_pass(tmp_path: Path) -> None:
    def much(*, private: bool) -> str:
        content = real(private=private)
        content["membership"][0]["tpr"]["0.01"] = {"value": 0.9, "low": 0.8, "high": 0.95}
        return block(attacks=read(tmp_path, content))

    assert "Above the bound" in much(private=True)
    assert "the best conceivable one" in much(private=True)
    assert "Above the bound" not in much(private=False)
    assert "the best conceivable one" not in much(private=False)
    assert "no epsilon bounds what is found" in much(private=False)


def test_the_warning_counts_the_comparisons_that_could_have_come_out_so(tmp_path: Path) -> None:
    content = real()
    content["membership"] = [copy.deepcopy(content["membership"][0]) for _ in range(20)]
    content["membership"][0]["tpr"]["0.1"] = {"value": 0.9, "low": 0.8, "high": 0.95}
    shown = block(attacks=read(tmp_path, content))
    assert "Of 20 comparisons" in shown
    assert "up to 0.5 on average" in shown


# --- nobody is counted ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shares() -> dict[tuple[int, int], tuple[Any, ...]]:
    """k of n patients, as the report has that share and its interval."""
    return {
        (k, n): tuple(values.rounded(k / n, *clopper_pearson(k, n)).values()) for n in range(5, MOST) for k in places(n)
    }


def places(n: int) -> range:
    """Every k of few patients, and some forty of many."""
    return range(0, n + 1, max(1, n // 40))


def test_a_share_with_its_interval_leaves_many_numbers_of_patients_possible(shares: Any) -> None:
    """Not every k of more than 80 is among `shares`, so there are even more than are counted here."""
    possible = defaultdict(set)
    for (_, n), said in shares.items():
        possible[said].add(n)
    for n in (12, 20, 35, 60, 123, 301):
        least = min(len(possible[shares[k, n]]) for k in places(n))
        assert least >= 8, n


def test_three_shares_of_the_same_patients_together_leave_several(shares: Any) -> None:
    possible, chance = defaultdict(set), random.Random(3)
    for (_, n), said in shares.items():
        possible[said].add(n)
    for n in (12, 20, 35):
        for _ in range(200):
            three = [possible[shares[chance.choice(places(n)), n]] for _ in range(3)]
            assert len(set.intersection(*three)) >= 3, n


def test_rounding_goes_outward_and_stays_among_the_probabilities() -> None:
    chance = random.Random(5)
    for _ in range(2000):
        low, value, high = sorted(chance.choice((0.0, 1.0, chance.random(), chance.random() / 1000)) for _ in range(3))
        for step in (None, values.TWO_DIGITS):
            said = values.rounded(value, low, high, step=step)
            assert 0 <= said["low"] <= low + 1e-9
            assert high - 1e-9 <= said["high"] <= 1
            assert said["low"] <= said["value"] <= said["high"]


def test_chance_which_is_one_over_the_candidates_is_rounded_up_to_1_2_5(tmp_path: Path) -> None:
    link = read(tmp_path, real())["relinkage"][1]
    assert (link["chance_top1"], link["chance_top5"]) == (0.05, 0.5)
    steps = [values.up125(1 / n) for n in range(5, 500)]
    assert len(set(steps)) == 6
    assert all(a >= b for a, b in pairwise(steps))


def test_scores_of_groups_and_exact_ones_have_two_digits(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = (run / "run.jsonl").read_text()
    assert '"majority":0.45' in lines.replace(" ", "")
    (run / "run.jsonl").write_text(re.sub(r'"majority": ?0.45', '"majority": 0.6666666666', lines))
    grouped = disclosed.grouped()
    grouped["by_group"]["sex"]["f"]["accuracy"] = 211 / 301
    grouped["intervals"]["by_group"]["sex"]["f"] = [0.751234, 0.861234]
    name = load_run(run).hospitals[0]
    disclosed.put(run / f"evaluate-{name}.json", grouped)
    found = evidence.utility(load_run(run), run)
    female = found["groups"][0]
    assert (female["accuracy"], female["mean_auroc"]["low"], female["mean_auroc"]["high"]) == (0.7, 0.75, 0.87)
    exact = [s for s in found["hospitals"] if s["kind"] == "exact"]
    assert exact
    for score in exact:
        numbers = [score["accuracy"]["value"], score["majority"], *(p["accuracy"] for p in score["subsets"])]
        assert all(n is None or n == round(n, 2) for n in numbers)


# --- the audit --------------------------------------------------------------------------------------------------------


def put(folder: Path, content: dict[str, Any]) -> Path:
    return disclosed.put(folder / "audit.json", content)


def raised(content: dict[str, Any]) -> None:
    content["claimed_epsilon"] = 0.1


def spoiled(content: dict[str, Any]) -> None:
    content["checks"][1]["passed"] = False


def emptied(content: dict[str, Any]) -> None:
    content["checks"] = []


def crowded(content: dict[str, Any]) -> None:
    content["checks"] = content["checks"] * 200
    content["checks"][-1]["passed"] = False  # the same one each time, and the last is beyond what is read
    content["checks"][:-1] = [{**check, "passed": True} for check in content["checks"][:-1]]


def lowered(content: dict[str, Any]) -> None:
    content["views"][0]["lower_bound"] = content["lower_bound"] = 0.0


def invented(content: dict[str, Any]) -> None:
    content["views"][1]["lower_bound"] = 0.2  # not the highest, and not that of its counts


def recounted(content: dict[str, Any]) -> None:
    content["views"][0]["correct"] = content["correct"] = 99


def hidden(content: dict[str, Any]) -> None:
    content |= content["views"][1]


def thinned(content: dict[str, Any]) -> None:
    content["views"].pop()  # fewer views share the significance, so each bound is another


def trusting(content: dict[str, Any]) -> None:
    content["significance"] = 1e-300


@pytest.mark.parametrize(
    "change", [raised, spoiled, emptied, crowded, lowered, invented, recounted, hidden, thinned, trusting]
)
def test_an_audit_whose_numbers_do_not_follow_from_its_counts_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    content = disclosed.audit()
    assert read_audit(put(tmp_path, content))["verdict"] == "consistent"
    change(content)
    with pytest.raises(ConfigError):
        read_audit(put(tmp_path, content))


def test_a_bound_above_the_claim_and_a_failed_check_are_each_broken(tmp_path: Path) -> None:
    for content in (disclosed.audit(claimed=0.1), disclosed.audit(passed=False)):
        found = read_audit(put(tmp_path, content))
        assert found["verdict"] == "broken"
        assert "BROKEN" in block(audit=found)


def test_counts_of_relabelled_patients_stay_out_and_those_of_invented_ones_stay_in(tmp_path: Path) -> None:
    found = read_audit(put(tmp_path, disclosed.audit()))
    counts = {view["canary"]: view["canaries"] for view in found["views"]}
    assert counts == {"dirac": 500, "stranger": 50, "mislabelled": None}
    best = (("mislabelled", disclosed.PUBLIC, 37, 36, 36), ("dirac", disclosed.PUBLIC, 500, 100, 50))
    found = read_audit(put(tmp_path, disclosed.audit(claimed=9.0, guessed=best)))
    assert [found[key] for key in ("canaries", "guesses", "correct")] == [None] * 3
    assert found["lower_bound"] == round(found["lower_bound"], 1) > 0
    shown = block(audit=found)
    assert "mislabelled" in shown
    assert not re.search(r"(?<![\w.])3[67](?![\w.])", re.sub(r"<svg.*?</svg>", "", shown, flags=re.DOTALL))


def test_bounds_are_rounded_down(tmp_path: Path) -> None:
    content = disclosed.audit()
    found = read_audit(put(tmp_path, content))
    assert 0 <= content["lower_bound"] - found["lower_bound"] < 0.01


def test_an_audit_of_another_hospital_or_version_says_so_and_settings_leave_a_digest_only(tmp_path: Path) -> None:
    own = read_audit(put(tmp_path, disclosed.audit()))
    assert "Another" not in block(audit=own)
    assert re.fullmatch(r"[0-9a-f]{64}", own["settings_sha256"])
    assert "secret" not in json.dumps(own)
    other = read_audit(put(tmp_path, {**disclosed.audit(), "hospital": "basel", "fedmm": "0.0.1"}))
    assert own["real_patients"] is True
    assert "Another hospital:" in block(audit=other)
    assert "Another version:" in block(audit=other)
    assert "Another hospital:" not in block(
        audit=other, hospital=None, run={"name": "r", "hospitals": ["aachen", "basel"]}
    )


def test_the_audits_claim_is_said_to_be_of_its_own_run(tmp_path: Path) -> None:
    shown = block(audit=read_audit(put(tmp_path, disclosed.audit())))
    assert "Epsilon 2.1 at delta 0.0001 is the claim of the audit's own run" in shown


def test_bars_are_the_bounds_of_the_verdict_by_who_guesses_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[tuple[str, float]]] = []
    monkeypatch.setattr(privacy_measured.privacy_plots, "claim", lambda bounds, **_: drawn.append(bounds) or "<svg>")
    found = read_audit(put(tmp_path, disclosed.audit()))
    shown = block(audit=found)
    assert [name for name, _ in drawn[0]] == [
        "dirac, seen by the coordinator", "stranger, seen by the public", "mislabelled, seen by the coordinator"
    ]  # fmt: skip
    assert found["fdp_lower_bound"] > found["lower_bound"] == drawn[0][0][1]
    assert f"not part of the verdict: at least {found['fdp_lower_bound']:.2f}" in shown


# --- the page and the command -----------------------------------------------------------------------------------------


def test_the_script_on_the_page_gives_the_number_of_record_where_rdp_is_the_lesser(tmp_path: Path) -> None:
    event = Event("train", 200.0, Rate(0.01), 10**6)
    history = accounting.merge([event])
    stated = accounting.pld_of(history, 1e-5)
    assert stated == accounting.rdp_of(history, 1e-5)
    line = {"hospital": "aachen", "delta": 1e-5, "epsilon": stated, "events": [event.to_dict()]}
    (tmp_path / "script.py").write_text(privacy.SCRIPT)
    file = disclosed.put(tmp_path / "report.json", {"document": {"accounting": [line]}})
    command = [sys.executable, str(tmp_path / "script.py"), str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert abs(float(said[1]) - stated) < 1e-6


def test_the_commands_that_measure_are_given_with_all_that_they_require() -> None:
    assert "fedmm audit HOSPITAL --out AUDIT" in block()
    assert "fedmm attack RUN HOSPITAL" in block()


@pytest.mark.parametrize(
    ("passed", "last"),
    [
        (True, ": good"),
        (None, ": good, but the page was not drawn again (another version drew it): read the JSON"),
        (False, ": NOT GOOD: do not rely on it"),
    ],
)
def test_the_last_line_of_verify_says_if_the_page_was_not_drawn_again(
    *, passed: bool | None, last: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [seal.Check("signature", True, ""), seal.Check("hospital", None, ""), seal.Check("drawing", passed, "")]
    monkeypatch.setattr(seal, "verify", lambda *_, **__: checks)
    main(["report", "--verify", "x.html"])
    assert capsys.readouterr().out.splitlines()[-1] == "x.html" + last
