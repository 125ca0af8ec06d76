"""The ledger under kill -9, races and a wrong clock: it may over-count, it never forgets. Disks: test_ledger_disk.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedmm.privacy import accounting, chain, vault
from fedmm.privacy.ledger import Ledger
from tests.privacy.faults import ROOT, WORKER, Aftermath, examine, forking, kill_many, kill_one, race
from tests.privacy.ledger_worker import EVENT, Kill, site, story

# --- kill -9 ----------------------------------------------------------------------------------------------------------


def clean(result: Aftermath) -> bool:
    return (result.under, result.problems) == (0, []) and result.over <= 1


def test_kill_minus_nine_forgets_nothing() -> None:
    result = kill_many(range(25))
    assert clean(result), result
    assert result.kills >= 23


@pytest.mark.slow
def test_three_hundred_kills_forget_nothing() -> None:
    result = kill_many(range(1000, 1320))
    print(result)
    assert clean(result), result
    assert result.kills >= 300


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["make", "round", "void", "rotate", "reopen", "split"])
def test_kill_minus_nine_at_each_durable_step_of_each_operation(operation: str, tmp_path: Path) -> None:
    """79 steps one after the other, from where the operation begins and on into what follows."""
    seed = next(seed for seed in range(100) if operation in story(seed)[:8])
    number = story(seed).index(operation)
    with forking() as worker:
        for step in range(1, 80):
            (folder := tmp_path / str(step)).mkdir()
            result = kill_one(worker, folder, seed, kill=Kill("step", number, step))
            assert clean(result), (step, result)
            assert result.kills == 1


def test_what_was_promised_and_is_gone_would_be_counted(tmp_path: Path) -> None:
    """The measurement can fail."""
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.reserve(EVENT, run="r", round=0)
    said = [["made"], ["ask", "round"], ["reserved", "2"], ["reserved", "9"], ["sent", "ab"], ["covered", "1", "2"]]
    examine(tmp_path, said, result := Aftermath())
    assert (result.under, result.over) == (1 + 1 + 2, 0)
    examine(tmp_path, [["made"], ["ask", "round"]], result := Aftermath())
    assert result.over == 2  # what `examine` itself spent when it went on


@pytest.mark.parametrize("how", ["step", "instruction", "torn", "outside"])
def test_a_process_whose_fate_never_comes_tells_its_story_to_the_end(how: str, tmp_path: Path) -> None:
    with forking() as worker:
        result = kill_one(worker, tmp_path, 5, kill=Kill(how, 99, 1))
    assert (result.kills, result.over, clean(result)) == (0, 0, True)


# --- races ------------------------------------------------------------------------------------------------------------


def test_racing_processes_get_exactly_what_fits(tmp_path: Path) -> None:
    assert race(tmp_path, processes=4, attempts=8, ceiling=1.0) < 32


def test_processes_that_make_the_ledger_at_once_make_one(tmp_path: Path) -> None:
    command = [*WORKER, "race", str(tmp_path), "1", "8.0"]
    makers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [maker.communicate(timeout=600)[0] for maker in makers] == ["1\n"] * 3
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.verify()
        assert ledger.spent().releases == 3


def test_processes_that_rotate_at_once_leave_one_usable_key(tmp_path: Path) -> None:
    Ledger.open(tmp_path, site()).close()
    command = [*WORKER, "rotate", str(tmp_path), "10"]
    begun = [subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    for process in begun:
        assert process.stdout is not None
        process.stdout.readline()  # it has the ledger open
    assert [(process.communicate(b"go\n", timeout=600), process.returncode)[1] for process in begun] == [0] * 3
    with Ledger.open(tmp_path, site(), create=False) as ledger:
        ledger.verify()
        assert ledger.head().seq == 31
    assert [path.name for path in tmp_path.glob("ledger.key*")] == ["ledger.key"]


def test_a_rotation_that_was_cut_short_is_finished_before_the_next_one_overwrites_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with Ledger.open(tmp_path, site()) as ledger, Ledger.open(tmp_path, site()) as other:
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                ledger.rotate()
        assert other.rotate() == other.public_key()
        other.verify()
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.reserve(EVENT, run="r", round=0)


def test_a_key_that_another_process_puts_in_place_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger.open(tmp_path, site()) as ledger:
        old = (tmp_path / "ledger.key").read_bytes()
        ledger.rotate()
        read, first = vault._read_key, iter([chain.key_from_pem(old)])
        monkeypatch.setattr(vault, "_read_key", lambda path: next(first, None) or read(path))
        assert chain.public_hex(vault.key_of(tmp_path / "ledger.sqlite", ledger.public_key()).public_key())


# --- the clock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_jumps_by_ten_years_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    def use(folder: Path, ats: list[str]) -> tuple[float, list[Any]]:
        folder.mkdir()
        for number, at in enumerate(ats):
            monkeypatch.setattr(vault, "now", lambda at=at: at)
            with Ledger.open(folder, site()) as ledger:
                ledger.reserve(EVENT, run="r", round=number).settle(sha256=f"{number:064x}")
                ledger.record_sent(
                    "update", run="r", round=number, size=1, sha256=f"{number:064x}", charge=2 + 4 * number
                )
                ledger.rotate()
        with Ledger.open(folder, site()) as ledger:
            ledger.verify(against=[ledger.head()])
            assert {row.at for row in vault.rows(ledger._db, after=0)} == set(ats)
            return ledger.epsilon(), [(event["seq"], event["round"], event["state"]) for event in ledger.events()]

    now, then = (f"{2026 + shift}-02-28T12:00:00+00:00" for shift in (0, years))
    steady, jumping = use(tmp_path / "steady", [now] * 3), use(tmp_path / "jumping", [now, then, now])
    assert steady == jumping
    assert steady[0] == pytest.approx(accounting.epsilon_pld([EVENT] * 3, 1e-5), abs=1e-9)
