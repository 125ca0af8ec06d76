"""The data protection officer: is this ledger the one the coordinator saw, and how much is left?"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.e2e.conftest import fedmm, simulate


def keep(hospital: Path, to: Path) -> None:
    to.mkdir()
    for file in hospital.glob("ledger*"):
        shutil.copy2(file, to)


def put_back(kept: Path, hospital: Path) -> None:
    for file in hospital.glob("ledger*"):
        file.unlink()
    for file in kept.iterdir():
        shutil.copy2(file, hospital)


def test_a_ledger_put_back_to_a_backup_is_seen_against_the_run_and_only_there(hospitals: Path, tmp_path: Path) -> None:
    hospital = hospitals / "north"
    assert simulate(hospitals, tmp_path / "first").code == 0
    keep(hospital, tmp_path / "backup")
    assert simulate(hospitals, tmp_path / "second").code == 0
    assert fedmm("ledger", "verify", hospital, "--against", tmp_path / "second").code == 0
    put_back(tmp_path / "backup", hospital)
    assert fedmm("ledger", "verify", hospital).code == 0, "on its own the older copy is sound"
    assert fedmm("ledger", "verify", hospital, "--against", tmp_path / "first").code == 0
    caught = fedmm("ledger", "verify", hospital, "--against", tmp_path / "second", "--format", "json")
    assert caught.code == 1
    assert caught.json["ok"] is False


def test_a_ledger_that_was_removed_with_its_key_is_not_called_intact(hospitals: Path, tmp_path: Path) -> None:
    hospital = hospitals / "north"
    assert simulate(hospitals, tmp_path / "run").code == 0
    for file in hospital.glob("ledger*"):
        file.unlink()
    asked = fedmm("ledger", "verify", hospital)
    assert asked.code == 1
    assert "no ledger" in asked.said
    assert not list(hospital.glob("ledger*")), "looking made one"


def test_verify_against_a_run_without_this_hospital_is_wrong_use(hospitals: Path, tmp_path: Path) -> None:
    assert simulate(hospitals / "north", tmp_path / "run").code == 0
    asked = fedmm("ledger", "verify", hospitals / "south", "--against", tmp_path / "run")
    assert asked.code == 2
    assert "trained in no round" in asked.said


def test_the_forecast_is_how_many_more_rounds_the_ledger_then_accepts(hospitals: Path, tmp_path: Path) -> None:
    hospital = hospitals / "north"
    assert simulate(hospitals, tmp_path / "run").code == 0
    policy = hospital / "site.toml"
    spent = fedmm("ledger", "show", hospital, "--format", "json").json["epsilon"]
    ceiling = next(line for line in policy.read_text().splitlines() if line.startswith("epsilon"))
    policy.write_text(policy.read_text().replace(ceiling, f"epsilon = {spent + 1.5}"))
    before = fedmm("ledger", "forecast", hospital, "--format", "json").json
    assert 0 < before["rounds_left"] < 100
    assert before["like"]["kind"] == "train"

    from fedmm.config import load_site
    from fedmm.errors import BudgetExhausted
    from fedmm.privacy.ledger import Ledger
    from fedmm.privacy.plan import Event

    accepted = 0
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        try:
            while accepted < 100:
                ledger.reserve(Event.from_dict(before["like"]), run="forecast", round=accepted).settle()
                accepted += 1
        except BudgetExhausted:
            pass
    assert accepted == before["rounds_left"]
    assert fedmm("ledger", "forecast", hospital, "--format", "json").json["rounds_left"] == 0


def test_the_forecast_of_an_unused_ledger_is_for_the_default_plan(hospitals: Path) -> None:
    asked = fedmm("ledger", "forecast", hospitals / "north")
    assert asked.code == 0
    assert "more round(s)" in asked.said
