"""The privacy report: what it says, what it must not say, and that nobody changes it unseen."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedmm.cli import main
from fedmm.errors import ConfigError, LedgerTampered
from fedmm.privacy import accounting, roster
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import Event, Rate
from fedmm.report import disclosure, seal, spending
from fedmm.report.audited import read_audit
from fedmm.report.privacy import draw
from tests.report import disclosed
from tests.report.run_folder import HOSTILE, NAMES, config, make_run, record, write_run

BLOCKS = 12


class Made(NamedTuple):
    """A hospital, its run, and the two files of its report."""

    hospital: Path
    run: Path
    json: Path
    html: Path

    @property
    def document(self) -> dict[str, Any]:
        return dict(json.loads(self.json.read_text())["document"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A report with all that can be in one, from a ledger with a failed run, a crash and a new key."""
    folder = tmp_path_factory.mktemp("report")
    hospital, run = disclosed.make_pair(folder, rotate=True), folder / "run"
    name = json.loads((run / "config.json").read_text())["run"]
    disclosed.put(run / "attack-aachen.json", disclosed.attack(name))
    disclosed.put(run / "evaluate-aachen.json", disclosed.grouped())
    audit = disclosed.put(folder / "audit" / "audit.json", disclosed.audit())
    assert main(["report", str(run), "--privacy", str(hospital), "--audit", str(audit.parent)]) == 0
    return Made(hospital, run, run / "privacy-aachen.json", run / "privacy-aachen.html")


def checks(path: Path, **more: Any) -> dict[str, bool | None]:
    return {check.name: check.passed for check in seal.verify(path, draw, **more)}


def resealed(made: Made, path: Path, change: Callable[[dict[str, Any]], None], drawn: seal.Draw = draw) -> Path:
    """The report with a change, signed again with the hospital's own key."""
    document = made.document
    change(document)
    path.write_text(seal.seal(document, drawn, hospital=made.hospital)[0])
    return path


# --- nobody changes it unseen -----------------------------------------------------------------------------------------


def test_both_files_are_found_good_without_the_hospital(made: Made, tmp_path: Path, capsys: Any) -> None:
    for file in (made.json, made.html):
        alone = Path(shutil.copy(file, tmp_path))
        assert main(["report", "--verify", str(alone)]) == 0
        said = capsys.readouterr().out
        assert made.document["ledger"]["keys"][-1]["public_key"] in said
        assert "by PLD from 5 events" in said


@pytest.mark.parametrize("kind", ["json", "html"])
def test_every_sampled_byte_that_is_changed_added_or_removed_is_found(made: Made, tmp_path: Path, kind: str) -> None:
    content = getattr(made, kind).read_bytes()
    chance, file = random.Random(7), tmp_path / "changed"
    places = {0, len(content) - 1, *chance.sample(range(len(content)), 200)}
    for at in places:
        flipped = bytes([content[at] ^ (1 << chance.randrange(8))])
        for change in (flipped, b"", content[at : at + 1] + b" "):
            changed = content[:at] + change + content[at + 1 :]
            file.write_bytes(changed)
            assert not all(check.passed is not False for check in seal.verify(file, draw)), (at, change)


def test_the_command_says_no_with_the_reason(made: Made, tmp_path: Path, capsys: Any) -> None:
    changed = tmp_path / "changed.html"
    changed.write_text(made.html.read_text().replace("The promise.", "The premise."))
    assert main(["report", "--verify", str(changed), "--format", "json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    assert {"name": "page", "passed": False, "text": "it was changed after it was signed"} in said["checks"]


def test_the_hospital_itself_cannot_sign_a_smaller_epsilon_than_its_rows_give(made: Made, tmp_path: Path) -> None:
    def less(document: dict[str, Any]) -> None:
        document["accounting"][0]["epsilon"] -= 1e-3
        document["ledger"]["epsilon"] -= 1e-3

    found = checks(resealed(made, tmp_path / "less.json", less))
    assert found["signature"]
    assert found["epsilon"] is False


@pytest.mark.parametrize("part", ["delta", "ceiling", "epsilon_rdp", "unprotected", "hospital", "scope"])
def test_a_signed_line_of_the_accounting_that_is_not_the_ledgers_is_found(
    made: Made, tmp_path: Path, part: str
) -> None:
    def other(document: dict[str, Any]) -> None:
        line = document["accounting"][0]
        line[part] = f"not {line[part]}" if isinstance(line[part], str) else line[part] + 1

    found = checks(resealed(made, tmp_path / "other.json", other, lambda *_: "<body></body>"))
    assert found["epsilon"] is False


def test_signed_fields_of_the_registry_that_say_something_else_are_found(made: Made, tmp_path: Path) -> None:
    def other(document: dict[str, Any]) -> None:
        document["registry"]["deployment"]["privacy_loss"]["privacy_unit"] = "country"

    assert checks(resealed(made, tmp_path / "other.json", other))["drawing"] is False


@pytest.mark.parametrize("part", ["events", "curve", "runs", "refusals", "forecast", "profile", "keys"])
def test_a_signed_list_that_is_not_that_of_the_rows_is_found(made: Made, tmp_path: Path, part: str) -> None:
    def fewer(document: dict[str, Any]) -> None:
        place = document["accounting"][0] if part == "events" else document["ledger"]
        place[part] = None if part == "forecast" else [*place[part], {}] if part == "refusals" else place[part][1:]

    assert False in checks(resealed(made, tmp_path / "fewer.json", fewer, lambda *_: "<body></body>")).values()


def test_a_signed_page_that_says_something_else_than_its_json_is_found(made: Made, tmp_path: Path) -> None:
    def lying(document: Mapping[str, Any], digest: str) -> str:
        return draw(document, digest).replace("2. Who is one unit", "2. Nobody is at risk")

    found = checks(resealed(made, tmp_path / "lying.json", lambda _: None, lying))
    assert [name for name, passed in found.items() if passed is False] == ["drawing"]


def test_rows_cut_off_at_the_end_do_not_fit_the_signed_head(made: Made, tmp_path: Path) -> None:
    whole = json.loads(made.json.read_text())
    whole["document"]["ledger"]["rows"].pop()
    file = tmp_path / "cut.json"
    file.write_text(seal.chain.canonical(whole) + "\n")
    assert checks(file) == {"signature": True, "document": False}


def test_another_hospitals_ledger_cannot_be_lent_to_a_report(made: Made, tmp_path: Path) -> None:
    def renamed(document: dict[str, Any]) -> None:
        document["hospital"] = "basel"

    assert checks(resealed(made, tmp_path / "lent.json", renamed))["ledger"] is False


def test_a_known_key_or_head_is_compared(made: Made) -> None:
    first, last = (key["public_key"] for key in made.document["ledger"]["keys"])
    row = made.document["ledger"]["rows"][3]
    for known, expected in (
        (last, True),
        (first, False),  # it was replaced: whoever stole it could have forged what follows
        ("ab" * 32, False),
        (f"{row[0]}:{row[14]}", True),
        (f"{row[0]}:{row[14][:16]}", True),
        (f"{row[0]}:{'0' * 64}", False),
        (f"{row[0]}:", False),
    ):
        assert checks(made.json, key=known)["hospital"] is expected, known


def test_the_hospital_finds_its_own_report_again_and_sees_who_came_since(
    made: Made, tmp_path: Path, capsys: Any
) -> None:
    hospital = Path(shutil.copytree(made.hospital, tmp_path / "home"))
    words = ["report", "--verify", str(made.json), "--at", str(hospital), "--format", "json"]
    assert main(words) == 0
    found = {check["name"]: check["passed"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert (found["at home"], found["patients"]) == (True, True)
    roster.cover(hospital / "ledger.sqlite", [44], first=False)
    assert main(words) == 0
    found = {check["name"]: check["passed"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert found["patients"] is None
    other = disclosed.make_pair(tmp_path / "other", crash=False)
    assert main([*words[:4], str(other)]) == 1


def test_a_report_expires(made: Made, tmp_path: Path) -> None:
    last = date.fromisoformat(made.document["made"]["expires"])
    assert checks(made.json, today=last)["expiry"] is True
    after = checks(made.html, today=last + timedelta(days=1))
    assert [name for name, passed in after.items() if passed is False] == ["expiry"]


def test_what_is_no_report_is_a_no_and_not_a_traceback(tmp_path: Path, made: Made) -> None:
    file = tmp_path / "odd"
    signed = json.loads(made.json.read_text())
    for content in (
        "",
        "{}\n",
        "[]",
        '{"document":{},"signature":{}}\n',
        '{"a":NaN}\n',
        "[" * 100_000,
        "<html></html>",
        "\x00",
    ):
        file.write_text(content)
        assert False in checks(file).values(), content[:40]
    for broken in ({**signed, "signature": 7}, {**signed, "document": {**signed["document"], "ledger": []}}):
        file.write_text(seal.chain.canonical(broken) + "\n")
        assert False in checks(file).values()


def test_a_page_drawn_by_another_version_is_not_called_wrong(made: Made, tmp_path: Path) -> None:
    def older(document: dict[str, Any]) -> None:
        document["made"]["drawn_with"] = "fedmm 0.0.1, matplotlib 1.0"

    found = checks(resealed(made, tmp_path / "older.json", older))
    assert found["drawing"] is None
    assert False not in found.values()


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_epsilon_computed_from_the_json_alone_by_the_script_on_the_page_is_the_ledgers(
    made: Made, tmp_path: Path
) -> None:
    found = re.search(r"<pre>(.*?)</pre>", made.html.read_text(), re.DOTALL)
    assert found
    script = tmp_path / "recompute.py"
    script.write_text(html.unescape(found[1]))
    command = [sys.executable, str(script), str(made.json)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    with Ledger.open(made.hospital, disclosed.site_of(made.hospital)) as ledger:
        truth = ledger.epsilon()
    assert said[0] == "aachen"
    assert abs(float(said[1]) - truth) < 1e-6
    assert abs(made.document["accounting"][0]["epsilon"] - truth) < 1e-6


def test_a_charge_that_crashed_and_a_run_that_failed_count(made: Made) -> None:
    document = made.document
    assert document["ledger"]["reserved"] == 1
    assert [run["run"] for run in document["ledger"]["runs"]] == ["failed before", document["run"]["name"]]
    crashed = [e for e in document["accounting"][0]["events"] if e["state"] == "reserved"]
    assert [(e["run"], e["round"]) for e in crashed] == [("failed before", 2)]
    settled = [Event("train", 5.0, Rate(0.25), 2)] + [Event("train", disclosed.SIGMA, Rate(0.25), 2)] * disclosed.ROUNDS
    assert document["ledger"]["epsilon"] > accounting.epsilon_pld(settled, 1e-4) + 1e-3


def test_each_run_alone_costs_what_its_own_events_cost_and_the_curve_ends_at_the_total(made: Made) -> None:
    ledger = made.document["ledger"]
    alone = accounting.epsilon_pld([Event("train", disclosed.SIGMA, Rate(0.25), 2 * disclosed.ROUNDS)], 1e-4)
    assert ledger["runs"][1]["epsilon_alone"] == pytest.approx(alone, abs=1e-6)
    curve = [at["epsilon"] for at in ledger["curve"]]
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(ledger["epsilon"], abs=1e-9)
    assert len(curve) == 2 + disclosed.ROUNDS


def test_the_three_accountants_are_in_order(made: Made) -> None:
    entry = made.document["accounting"][0]
    assert entry["epsilon"] <= entry["epsilon_prv"] + 0.02 <= entry["epsilon_rdp"] + 0.04


def test_the_forecast_is_that_of_the_ledger_command(made: Made, capsys: Any) -> None:
    assert main(["ledger", "forecast", str(made.hospital), "--format", "json"]) == 0
    left = json.loads(capsys.readouterr().out)["rounds_left"]
    forecast = made.document["ledger"]["forecast"]
    assert forecast["rounds_left"] == left > 0
    assert forecast["refused_at_round"] == disclosed.ROUNDS + left + 1
    assert forecast["path"][-1]["epsilon"] <= made.document["ledger"]["ceiling"]


def test_a_long_ledger_is_shown_at_some_points_and_at_the_end_of_each_run(tmp_path: Path) -> None:
    hospital = disclosed.make_hospital(tmp_path / "hospital", epsilon=20.0)
    with Ledger.open(hospital, disclosed.site_of(hospital)) as ledger:
        for number in range(1, 61):
            ledger.reserve(Event("train", 8.0, Rate(0.1), 1), run=f"run {number // 50}", round=number).settle()
    rows = spending.read_rows(hospital, disclosed.site_of(hospital))
    curve = spending.spending(rows, spending.book_of(rows), delta=1e-4, ceiling=20.0)["curve"]
    charges = [at["charge"] for at in curve]
    assert charges[0] == 1
    assert {49, 60} <= set(charges)
    assert len(charges) <= spending.POINTS + 2


def test_odds_move_by_e_to_the_epsilon_and_stay_probabilities() -> None:
    odds = spending.odds(1.0986122886681098, 1e-4)  # log 3
    assert odds["factor"] == pytest.approx(3)
    assert odds["beliefs"][0] == {"before": 0.5, "at_most": pytest.approx(0.75), "at_least": pytest.approx(0.25)}
    for epsilon in (0.0, 1.0, 50.0, 1e4):
        for line in spending.odds(epsilon, 1e-4)["beliefs"]:
            assert 0 <= line["at_least"] <= line["before"] + 1e-12
            assert line["before"] - 1e-12 <= line["at_most"] <= 1


def test_the_bound_on_an_attacker_holds_for_the_best_one_and_is_tighter_than_one_pair() -> None:
    from statistics import NormalDist

    history = (accounting.Term(1.0, 1.0, 1),)
    pairs = [(accounting.pld_of(history, delta), delta) for delta in (1e-4, *spending.DELTAS)]
    normal = NormalDist()
    for false_alarm in (0.001, 0.01, 0.1, 0.5):
        best = normal.cdf(normal.inv_cdf(false_alarm) + 1.0)  # the likelihood ratio test of N(0, 1) against N(1, 1)
        bound = spending.most_found(false_alarm, pairs)
        assert best <= bound + 1e-9
        assert bound <= spending.most_found(false_alarm, pairs[:1])
    assert spending.most_found(0.01, pairs) < 0.9 * spending.most_found(0.01, pairs[:1])


# --- what it says and must not say ------------------------------------------------------------------------------------


def test_the_page_fetches_nothing_and_runs_nothing(made: Made) -> None:
    content = made.html.read_text()
    page = re.sub(r'<script type="application/json".*?</script>', "", content, flags=re.DOTALL)
    assert "http" not in page
    assert "//" not in page
    assert not re.search(
        r"<(script|link|img|iframe|object|embed|base|image)\b|\ssrc=|\son\w+=|@import", page, re.IGNORECASE
    )
    assert set(re.findall(r'href="(.)', page)) <= {"#"}
    assert content.count("<script") == 1


def test_the_twelve_blocks_are_there_in_order(made: Made) -> None:
    titles = re.findall(r"<h2>(\d+)\. ", made.html.read_text())
    assert titles == [str(number) for number in range(1, BLOCKS + 1)]


def test_the_page_holds_the_very_json_and_its_digest(made: Made) -> None:
    content = made.html.read_text()
    inside = content[content.index(seal.OPEN) + len(seal.OPEN) :].partition(seal.CLOSE)[0]
    assert json.loads(inside) == json.loads(made.json.read_text())
    assert content.count(disclosure.digest_of(made.document)) >= 2
    assert "NaN" not in inside


def test_neither_paths_nor_numbers_of_patients_are_in_it(made: Made) -> None:
    for file in (made.json, made.html):
        content = file.read_text()
        for secret in ("/secret/place", str(made.run), str(made.hospital)):
            assert secret not in content
        for number in (123, 4567, 4711, 613, 301, 299):  # of members, candidates, held-back patients, a group
            assert not re.search(rf"(?<![\w.,]){number}(?![\w.,])", content), number
    keys = set(walked(made.document))
    assert not keys & {"members", "non_members", "candidates", "patients", "studies"}
    listed = json.loads((made.hospital / "ledger.patients").read_text())
    for hidden in (listed["salt"], *listed["ids"]):
        assert hidden not in made.json.read_text()


def walked(value: Any) -> Iterator[str]:
    """Every key in a JSON value."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walked(inner)


def test_two_reports_of_the_same_patients_do_not_show_that_they_are_the_same(made: Made) -> None:
    again = disclosure.of_hospital(disclosure.Sources(made.run), made.hospital)
    assert again["ledger"]["fingerprint"]["commitment"] != made.document["ledger"]["fingerprint"]["commitment"]


def test_the_fields_of_the_deployments_registry_are_there(made: Made) -> None:
    deployment = made.document["registry"]["deployment"]
    assert set(deployment) == {
        "product",
        "dp_flavor",
        "privacy_loss",
        "model",
        "accounting",
        "implementation",
        "resources",
    }
    loss = deployment["privacy_loss"]
    assert loss["privacy_unit"] == "patient"
    assert loss["privacy_parameters"] == {"epsilon": made.document["ledger"]["epsilon"], "delta": 1e-4}
    assert deployment["dp_flavor"]["name"] == "Approximate DP"
    assert any("own" in line for line in made.document["conforms_to"])


def test_what_was_not_measured_is_said_with_the_command_that_measures_it(tmp_path: Path) -> None:
    disclosed.make_pair(tmp_path, crash=False)
    document = disclosure.of_hospital(disclosure.Sources(tmp_path / "run"), tmp_path / "hospital")
    content = draw(document, "0" * 64)
    for command in ("fedmm audit", "fedmm attack", "fedmm evaluate", "--compare"):
        assert command in content
    assert content.count("Not measured") == 2


def test_a_broken_audit_is_shown_as_broken(made: Made, tmp_path: Path) -> None:
    document = made.document
    document["audit"] = read_audit(disclosed.put(tmp_path / "audit.json", disclosed.audit(passed=False)))
    assert "<p class=danger><b>BROKEN</b>" in draw(document, "0" * 64)


def test_an_attack_that_does_better_than_the_claim_allows_is_shouted_about(made: Made) -> None:
    document = made.document
    assert "Above the bound" not in draw(document, "0" * 64)
    document["attacks"]["membership"][0]["tpr"][0] = {"false_alarm": 0.001, "value": 0.5, "low": 0.4, "high": 0.6}
    assert "<b>Above the bound</b> loss threshold, all at 0.1 %" in draw(document, "0" * 64)


def test_an_open_run_is_put_beside_the_private_one(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.run, tmp_path / "open")
    settings = json.loads((made.run / "config.json").read_text())
    disclosed.put(tmp_path / "open" / "config.json", {**settings, "private": False, "run": "0pen"})
    found = disclosure.of_hospital(disclosure.Sources(made.run, compare=tmp_path / "open"), made.hospital)
    assert found["utility"]["compared_with"]["run"] == "0pen"
    assert "+0.00" in draw(found, "0" * 64)
    with pytest.raises(ConfigError, match="with privacy"):
        disclosure.of_hospital(disclosure.Sources(made.run, compare=made.run), made.hospital)


def test_runs_without_privacy_are_shouted_about(tmp_path: Path) -> None:
    disclosed.make_pair(tmp_path, crash=False, allow_not_private=True)
    site = disclosed.site_of(tmp_path / "hospital")
    with Ledger.open(tmp_path / "hospital", site) as ledger:
        ledger.reserve(Event("not_private", 0.0, Rate(1.0), 1), run="open", round=1).settle()
    document = disclosure.of_hospital(disclosure.Sources(tmp_path / "run"), tmp_path / "hospital")
    assert "1 release without epsilon" in draw(document, "0" * 64)
    assert document["ledger"]["not_private"] == 1
    assert "NOT PRIVATE" in draw({**document, "run": {**document["run"], "private": False}}, "0" * 64)


# --- the coordinator's, and the command -------------------------------------------------------------------------------


def test_the_coordinator_makes_one_without_ledgers_that_calls_itself_unsigned(tmp_path: Path, capsys: Any) -> None:
    run = make_run(tmp_path / "run", scored=False)
    assert main(["report", str(run), "--privacy"]) == 0
    assert "unsigned" in capsys.readouterr().out
    content = (run / "privacy.html").read_text()
    assert "<b>Unsigned:</b> made from the coordinator" in content
    assert len(re.findall(r"<h2>(\d+)\. ", content)) == BLOCKS
    for name in NAMES:
        assert name in content
    assert main(["report", "--verify", str(run / "privacy.html")]) == 1
    assert "nobody vouches" in capsys.readouterr().out


def test_this_run_alone_is_what_the_plan_costs_for_the_rounds_that_arrived(tmp_path: Path) -> None:
    document = disclosure.of_run(disclosure.Sources(make_run(tmp_path / "run", scored=False)))
    entry = {entry["hospital"]: entry for entry in document["accounting"]}[NAMES[0]]
    assert [e["round"] for e in entry["events"]] == [1, 2, 3, 4]
    expected = accounting.epsilon_pld([Event("train", 1.2208, Rate(0.25), 8)], 1e-4)
    assert entry["epsilon"] == pytest.approx(expected, abs=1e-6)


def test_a_run_before_its_first_round_has_a_page_too(tmp_path: Path) -> None:
    content = draw(disclosure.of_run(disclosure.Sources(make_run(tmp_path / "run", done=0))), "0" * 64)
    assert len(re.findall(r"<h2>(\d+)\. ", content)) == BLOCKS


def test_hostile_names_are_shown_as_text(tmp_path: Path) -> None:
    names = [HOSTILE, "</script><script>x"]
    settings = config(names, rounds=2)
    settings["run"] = HOSTILE
    settings["labels"] = {"findings": [HOSTILE], "class_name": "", "class_values": []}
    line = record(2, names, rounds=2)
    line["arrived"] += [{"hospital": HOSTILE, "what": HOSTILE, "bytes": 0}]
    run = write_run(tmp_path / "run", settings, [line])
    document = disclosure.of_run(disclosure.Sources(run))
    hostile = disclosed.audit(guessed=[(HOSTILE, HOSTILE, 500, 100, 82)])
    hostile["checks"][0]["name"] = HOSTILE
    hostile |= {"date": HOSTILE, "fedmm": HOSTILE, "hospital": HOSTILE}
    document["audit"] = read_audit(disclosed.put(tmp_path / "audit.json", hostile))
    content = seal.seal(document, draw, hospital=None)[1]
    assert html.escape(HOSTILE) in content
    assert "<img" not in content
    assert content.count("<script") == content.count("</script") == 1


def test_a_ledger_put_back_to_a_backup_signs_no_report(tmp_path: Path) -> None:
    hospital = disclosed.make_pair(tmp_path, crash=False)
    for file in hospital.glob("ledger*"):
        file.unlink()
    with Ledger.open(hospital, disclosed.site_of(hospital)) as fresh:
        fresh.reserve(Event("train", 5.0, Rate(0.25), 2), run="other", round=1).settle()
    with pytest.raises(LedgerTampered):
        disclosure.of_hospital(disclosure.Sources(tmp_path / "run"), hospital)


def test_evidence_that_is_damaged_or_anothers_is_refused(made: Made, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    for content in ({**disclosed.attack("x"), "hospital": "basel"}, {**disclosed.attack("x"), "membership": [{}]}):
        disclosed.put(run / "attack-aachen.json", content)
        with pytest.raises(ConfigError):
            disclosure.of_hospital(disclosure.Sources(run), made.hospital)
    for content in ({}, {**disclosed.audit(), "lower_bound": None}, {**disclosed.audit(), "checks": 7}):
        damaged = disclosed.put(tmp_path / "audit.json", content)
        assert main(["report", str(made.run), "--privacy", str(made.hospital), "--audit", str(damaged)]) == 2


@pytest.mark.parametrize(
    "words", [["report"], ["report", "RUN", "--verify", "x"], ["report", "RUN", "--privacy", "nowhere"]]
)
def test_wrong_use_is_exit_code_2(words: list[str], made: Made) -> None:
    assert main([str(made.run) if word == "RUN" else word for word in words]) in (2, 3)
