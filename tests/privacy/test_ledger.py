"""The ledger under use, crash, race and tampering: it may over-count, it never forgets."""

from __future__ import annotations

import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedmm.errors import BudgetExhausted, LedgerUnusable, PolicyRefused
from fedmm.privacy import accounting, chain, vault
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import UNPROTECTED, Event
from tests.privacy.ledger_worker import EVENT, site

WORKER = [sys.executable, "-m", "tests.privacy.ledger_worker"]
ROOT = Path(__file__).parents[2]
NAMES = ("ledger.sqlite", "ledger.key")


def fill(folder: Path, releases: int = 6) -> None:
    """Some settled, some voided, some left open, one refused."""
    with Ledger.open(folder, site(epsilon=5.0)) as ledger:
        for number in range(releases):
            charge = ledger.reserve(EVENT, run="first", round=number, plan_digest="ab" * 32)
            if number % 3 == 0:
                charge.settle()
            elif number % 3 == 1:
                charge.void()
        with pytest.raises(BudgetExhausted):
            ledger.reserve(Event("train", 0.5, 1.0, 50), run="greedy", round=0)


def copy(filled: Path, to: Path) -> Path:
    for name in NAMES:
        shutil.copy2(filled / name, to / name)
    return to


def refuses(folder: Path) -> bool:
    try:
        with Ledger.open(folder, site()) as ledger:
            ledger.verify()
    except LedgerUnusable:
        return True
    return False


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    fill(folder)
    return folder


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path, site(allow_not_private=True)) as opened:
        yield opened


# --- use --------------------------------------------------------------------------------------------------------------


def test_a_fresh_ledger_has_spent_nothing(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.epsilon() == 0.0
    assert ledger.export_json() == {"delta": 1e-5, "events": [], "unprotected": []}
    assert ledger.head().seq == 1
    ledger.verify()
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in NAMES] == [0o600, 0o600]


def test_wal_files_are_private_too(ledger: Ledger, tmp_path: Path) -> None:
    ledger.reserve(EVENT, run="r", round=0)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_epsilon_is_that_of_the_export_by_dp_accounting_alone(ledger: Ledger) -> None:
    for number, noise in enumerate((2.0, 3.0, 2.0, 2.5)):
        ledger.reserve(Event("train", noise, 0.1, 4), run=f"run{number % 2}", round=number).settle()
    exported = ledger.export_json()
    accountant = PLDAccountant()
    for e in exported["events"]:
        gaussian = dp_event.GaussianDpEvent(e["noise_multiplier"])
        accountant.compose(dp_event.PoissonSampledDpEvent(e["sampling_rate"], gaussian), e["steps"])
    assert abs(accountant.get_epsilon(exported["delta"]) - ledger.epsilon()) < 1e-6


def test_it_remembers_over_restarts_and_runs(tmp_path: Path) -> None:
    seen = []
    for number in range(3):
        with Ledger.open(tmp_path, site()) as ledger:
            ledger.reserve(EVENT, run=f"run{number}", round=0).settle()
            seen.append(ledger.epsilon())
    assert seen[0] < seen[1] < seen[2] == pytest.approx(accounting.epsilon_pld([EVENT] * 3, 1e-5), abs=1e-9)


def test_a_charge_over_the_ceiling_is_refused_and_the_refusal_recorded(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, site(epsilon=1.0)) as ledger:
        fits = ledger.forecast(EVENT)
        assert fits > 1
        for number in range(fits):
            ledger.reserve(EVENT, run="r", round=number).settle()
        assert ledger.epsilon() <= 1.0
        assert ledger.would_exceed([EVENT])
        assert ledger.forecast(EVENT) == 0
        with pytest.raises(BudgetExhausted, match=r"of 1\.00 at delta 1e-05"):
            ledger.reserve(EVENT, run="r", round=fits)
        assert (ledger.spent().releases, ledger.spent().refusals) == (fits, 1)
        ledger.verify()


def test_leaving_the_with_unsettled_leaves_it_spent(ledger: Ledger) -> None:
    def train() -> None:
        with ledger.reserve(EVENT, run="r", round=0) as charge:
            charge.start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert (ledger.spent().releases, ledger.spent().reserved) == (1, 1)
    assert ledger.epsilon() > 0


def test_a_void_counts_only_before_the_first_step(ledger: Ledger) -> None:
    charge = ledger.reserve(EVENT, run="r", round=0)
    assert charge.void()
    assert ledger.epsilon() == 0.0
    with pytest.raises(LedgerUnusable, match="given back"):
        charge.settle()
    started = ledger.reserve(EVENT, run="r", round=1)
    started.start()
    assert not started.void()
    started.settle()
    started.settle()
    assert not started.void()
    assert [event["state"] for event in ledger.events()] == ["voided", "settled"]
    assert [event["round"] for event in ledger.export_json()["events"]] == [1]


def test_one_charge_closes_once_whoever_does_it(ledger: Ledger, tmp_path: Path) -> None:
    charge = ledger.reserve(EVENT, run="r", round=0)
    with Ledger.open(tmp_path, site()) as other:
        other._close_charge(charge.seq, "settle")
    with pytest.raises(LedgerUnusable, match="already settled"):
        charge.void()


@pytest.mark.parametrize("kind", UNPROTECTED)
def test_unprotected_releases_are_counted_and_not_composed(ledger: Ledger, kind: str) -> None:
    free = Event(kind, 0.0, 1.0, 3)
    ledger.reserve(free, run="r", round=0).settle()
    ledger.reserve(EVENT, run="r", round=1).settle()
    spent = ledger.spent()
    assert (spent.releases, spent.not_private) == (1, 1)
    assert spent.epsilon == accounting.epsilon_pld([EVENT], 1e-5)
    exported = ledger.export_json()
    assert [event["kind"] for event in exported["unprotected"]] == [kind]
    assert [event["kind"] for event in exported["events"]] == ["train"]
    assert ledger.forecast(free) > 1000
    assert not ledger.would_exceed([free] * 5)


def test_unprotected_releases_need_the_hospitals_word(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, site()) as ledger:
        with pytest.raises(PolicyRefused):
            ledger.reserve(Event("not_private", 0.0, 1.0, 3), run="r", round=0)
        assert (ledger.spent().releases, ledger.spent().refusals) == (0, 1)


def test_show_has_the_agreed_keys(ledger: Ledger) -> None:
    ledger.reserve(EVENT, run="r", round=0).settle()
    shown = ledger.as_json()
    agreed = {"unit", "relation", "delta", "epsilon", "epsilon_prv", "epsilon_rdp", "ceiling", "releases", "reserved"}
    assert agreed | {"refusals", "not_private", "by_run"} <= set(shown)
    assert shown["epsilon"] <= shown["epsilon_prv"] <= shown["epsilon_rdp"] + 0.02
    assert shown["by_run"] == [{"run": "r", "kind": "train", "releases": 1, "reserved": 0, "steps": 4}]


@pytest.mark.parametrize(
    ("run", "round"), [("x" * 300, 0), ("a\x00b", 0), ("\ud800", 0), ("r", -1), ("r", True), ("r", 2**40)]
)
def test_names_from_a_coordinator_are_bounded(ledger: Ledger, run: str, round: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        ledger.reserve(EVENT, run=run, round=round)
    assert ledger.head().seq == 1


def test_the_clock_orders_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in ("2036-01-01T00:00:00+00:00", "2016-01-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00"):
        monkeypatch.setattr(vault, "now", lambda at=at: at)
        ledger.reserve(EVENT, run="r", round=0).settle()
    ledger.verify()
    assert ledger.epsilon() == pytest.approx(accounting.epsilon_pld([EVENT] * 3, 1e-5), abs=1e-9)


def test_a_ledger_is_not_used_over_a_fork(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(LedgerUnusable, match="fork"):
        ledger.epsilon()


class Machine(RuleBasedStateMachine):
    """Against a model that is a list: whatever the order of calls and restarts, spent is reserved plus settled."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp(prefix="fedmm-ledger-"))
        self.ledger = Ledger.open(self.folder, site(epsilon=0.9))
        self.open: list[Any] = []
        self.spent: list[Event] = []

    @rule(steps=st.integers(1, 5), noise=st.sampled_from([2.0, 3.0]))
    def reserve(self, steps: int, noise: float) -> None:
        event = Event("train", noise, 0.1, steps)
        over = accounting.epsilon_pld([*self.spent, event], 1e-5) > 0.9
        try:
            self.open.append(self.ledger.reserve(event, run="r", round=0))
            assert not over
            self.spent.append(event)
        except BudgetExhausted:
            assert over

    @precondition(lambda self: self.open)
    @rule()
    def settle(self) -> None:
        self.open.pop().settle()

    @precondition(lambda self: self.open)
    @rule(started=st.booleans())
    def void(self, *, started: bool) -> None:
        charge = self.open.pop()
        if started:
            charge.start()
        assert charge.void() is not started
        if not started:
            self.spent.remove(charge.event)

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.ledger = Ledger.open(self.folder, site(epsilon=0.9))
        self.open = []  # the old process is gone: nobody can settle or void its charges

    @invariant()
    def nothing_is_forgotten(self) -> None:
        assert self.ledger.spent().releases == len(self.spent)
        assert sum(term.steps for term in self.ledger._book.history) == sum(event.steps for event in self.spent)

    def teardown(self) -> None:
        self.ledger.verify()
        self.ledger.close()
        shutil.rmtree(self.folder)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)


# --- crash and race ---------------------------------------------------------------------------------------------------


def crash_at(step: int, folder: Path) -> bool:
    """Kill a process at its n-th durable step and check what it left; True if it ended before that step."""
    result = subprocess.run([*WORKER, "crash", str(folder), str(step)], cwd=ROOT, capture_output=True, text=True)
    said = result.stdout.split("\n")
    assert result.returncode == (0 if "end" in said else -9), result.stderr
    released = [int(line.split()[1]) for line in said if line.startswith("released")]
    settled = [int(line.split()[1]) for line in said if line.startswith("settled")]
    with Ledger.open(folder, site()) as ledger:
        ledger.verify()
        events = {event["seq"]: event["state"] for event in ledger.events()}
        assert all(events[seq] in ("reserved", "settled") for seq in released)  # no under-count
        assert all(events[seq] == "settled" for seq in settled)
        assert len(events) - len(released) <= 1  # over-count of at most one round
        ledger.reserve(EVENT, run="after", round=0).settle()
        ledger.verify()
    return "end" in said


# steps 1 … 8 make the two files, the rest opens, reads, reserves and settles
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 7, 9, 16, 25, 27, 33])
def test_kill_minus_nine_forgets_nothing(step: int, tmp_path: Path) -> None:
    crash_at(step, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_kill_minus_nine_forgets_nothing_three_hundred_times(seed: int, tmp_path: Path) -> None:
    crash_at(random.Random(seed).randrange(1, 60), tmp_path)


def race(folder: Path, *, processes: int, attempts: int, ceiling: float) -> int:
    with Ledger.open(folder, site(ceiling)) as ledger:
        fits = ledger.forecast(EVENT)
    command = [*WORKER, "race", str(folder), str(attempts), str(ceiling)]
    racers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    won = sum(int(racer.communicate(timeout=600)[0]) for racer in racers)
    with Ledger.open(folder, site(ceiling)) as ledger:
        ledger.verify()
        spent = ledger.spent()
    assert won == spent.releases
    assert (spent.releases + spent.refusals, spent.epsilon <= ceiling) == (processes * attempts, True)
    assert won == min(fits, processes * attempts)
    return won


def test_racing_processes_get_exactly_what_fits(tmp_path: Path) -> None:
    assert race(tmp_path, processes=8, attempts=4, ceiling=1.0) < 32


def test_processes_that_make_the_ledger_at_once_make_one(tmp_path: Path) -> None:
    command = [*WORKER, "race", str(tmp_path), "1", "8.0"]
    makers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [maker.communicate(timeout=600)[0] for maker in makers] == ["1\n"] * 3
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.verify()
        assert ledger.spent().releases == 3


# --- tampering --------------------------------------------------------------------------------------------------------


def test_every_random_edit_of_the_file_is_seen(filled: Path, tmp_path: Path) -> None:
    copy(filled, tmp_path)
    intact = (filled / "ledger.sqlite").read_bytes()
    assert not refuses(tmp_path)
    rng = random.Random(7)
    for _ in range(300):
        edited = bytearray(intact)
        at = rng.randrange(len(edited))
        edited[at] ^= rng.randrange(1, 256)
        (tmp_path / "ledger.sqlite").write_bytes(edited)
        assert refuses(tmp_path), f"byte {at}: {intact[at]} became {edited[at]}"


@pytest.mark.parametrize("column", chain.Row._fields)
def test_every_edited_cell_is_seen_and_its_row_named(filled: Path, tmp_path: Path, column: str) -> None:
    copy(filled, tmp_path)
    with sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None) as db:
        db.execute("DROP TRIGGER no_update")
        (old,) = db.execute(f"SELECT {column} FROM ledger WHERE seq = 4").fetchone()
        new = old + "0" if isinstance(old, str) else old + 100
        db.execute(f"UPDATE ledger SET {column} = ? WHERE seq = 4", (new,))
        db.execute(vault.SCHEMA["no_update"])
    db.close()
    with pytest.raises(LedgerUnusable, match="row 4 "), Ledger.open(tmp_path, site()) as ledger:
        ledger.verify()


def test_rows_cannot_be_changed_or_deleted_through_sql(filled: Path, tmp_path: Path) -> None:
    shutil.copy2(filled / "ledger.sqlite", tmp_path / "ledger.sqlite")
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    for statement in ("UPDATE ledger SET steps = 0", "DELETE FROM ledger"):
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            db.execute(statement)
    db.close()


@pytest.mark.parametrize("lost", [1, 2, 5])
def test_a_backup_put_back_is_seen_against_a_kept_head(filled: Path, tmp_path: Path, lost: int) -> None:
    """The older file is authentic in every byte: only a head that was kept elsewhere gives it away."""
    copy(filled, tmp_path)
    with Ledger.open(tmp_path, site()) as ledger:
        kept = [ledger.head()]
        for number in range(lost):
            ledger.reserve(EVENT, run="later", round=number)
            kept.append(ledger.head())
        ledger.verify(against=kept)
    copy(filled, tmp_path)
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.verify(against=kept[:1])
        with pytest.raises(LedgerUnusable, match=f"row {kept[1].seq} "):
            ledger.verify(against=kept)


def append(folder: Path, **changed: Any) -> None:
    """A row that is well signed by the true key and wrong in one thing: a bug or a thief of the key."""
    with Ledger.open(folder, site()) as ledger:
        last, key = ledger._book.last, ledger._key
    assert last is not None
    row = last._replace(seq=last.seq + 1, prev_hash=last.hash, **changed).signed(key)
    with sqlite3.connect(folder / "ledger.sqlite", isolation_level=None) as db:
        db.execute(vault.INSERT, row)
    db.close()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"type": "settle", "ref": 1}, "not an open reservation"),
        ({"type": "settle", "ref": 2}, "not an open reservation"),
        ({"type": "void", "ref": 99}, "not an open reservation"),
        ({"type": "refund"}, "unknown"),
        ({"type": "genesis"}, "one genesis"),
        ({"type": "reserve", "noise_multiplier": -1.0}, "does not fit"),
        ({"type": "refuse", "kind": "tune"}, "unknown"),
    ],
)
def test_illegal_transitions_are_seen(filled: Path, tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    copy(filled, tmp_path)
    append(tmp_path, **changed)
    with pytest.raises(LedgerUnusable, match="cannot be trusted") as caught:
        Ledger.open(tmp_path, site())
    assert why in caught.value.why


@pytest.mark.parametrize("facts", ['{"format":2}', "[]", "{}", "not json"])
def test_a_foreign_first_row_is_refused(facts: str) -> None:
    key = chain.Ed25519PrivateKey.generate()
    row = chain.genesis_row(key, hospital="north", code="", at="")._replace(note=facts).signed(key)
    with pytest.raises(LedgerUnusable, match="row 1 "):
        chain.Book().add(row)


# --- files that are not as they should be -----------------------------------------------------------------------------


def test_a_missing_key_or_ledger_fails_closed(filled: Path, tmp_path: Path) -> None:
    for name, what in zip(NAMES, ("ledger is missing", "key is missing"), strict=True):
        copy(filled, tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(LedgerUnusable, match=what) as caught:
            Ledger.open(tmp_path, site())
        assert "backup" in caught.value.fix
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content", [b"", b"\0" * 5000, b"SQLite format 3\0" + b"\xff" * 5000, b"-----BEGIN PRIVATE KEY-----\n"]
)
def test_rubbish_files_are_refused(filled: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (copy(filled, tmp_path) / name).write_bytes(content)
    with pytest.raises(LedgerUnusable):
        Ledger.open(tmp_path, site())


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_or_link_or_open_permissions_are_refused(filled: Path, tmp_path: Path, name: str) -> None:
    file = copy(filled, tmp_path) / name
    file.chmod(0o644)
    with pytest.raises(LedgerUnusable, match="read by others"):
        Ledger.open(tmp_path, site())
    file.unlink()
    file.symlink_to(filled / name)
    with pytest.raises(LedgerUnusable, match="plain file"):
        Ledger.open(tmp_path, site())
    file.unlink()
    file.mkdir()
    with pytest.raises(LedgerUnusable, match="plain file"):
        Ledger.open(tmp_path, site())


def test_another_hospitals_ledger_or_key_is_refused(filled: Path, tmp_path: Path) -> None:
    copy(filled, tmp_path)
    elsewhere = site().model_copy(update={"hospital": site().hospital.model_copy(update={"name": "south"})})
    with pytest.raises(LedgerUnusable, match="another hospital"):
        Ledger.open(tmp_path, elsewhere)
    (tmp_path / "ledger.key").write_bytes(chain.key_to_pem(chain.Ed25519PrivateKey.generate()))
    with pytest.raises(LedgerUnusable):
        Ledger.open(tmp_path, site())


def test_a_foreign_database_is_not_taken_for_a_ledger(filled: Path, tmp_path: Path) -> None:
    copy(filled, tmp_path)
    (tmp_path / "ledger.sqlite").unlink()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("CREATE TABLE patients (id)")
    db.commit()
    db.close()
    (tmp_path / "ledger.sqlite").chmod(0o600)
    with pytest.raises(LedgerUnusable, match="is no"):
        Ledger.open(tmp_path, site())


def test_a_path_that_cannot_hold_a_ledger_is_refused(tmp_path: Path) -> None:
    for path, what in (("ledger.key", "must not end"), ("no/such/ledger.sqlite", "folder does not exist")):
        where = site().model_copy(update={"ledger": site().ledger.model_copy(update={"path": path})})
        with pytest.raises(LedgerUnusable, match=what):
            Ledger.open(tmp_path, where)


def test_appended_bytes_are_seen(filled: Path, tmp_path: Path) -> None:
    with (copy(filled, tmp_path) / "ledger.sqlite").open("ab") as file:
        file.write(b"\0" * 4096)
    assert refuses(tmp_path)


def test_a_full_disk_refuses_before_anything_exists(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.reserve(EVENT, run="r", round=0).settle()
        ledger._db.execute("PRAGMA max_page_count = 1")  # SQLite takes the present size: not a page more

        def fill_the_disk() -> None:
            for number in range(1000):
                ledger.reserve(EVENT, run="r" * 200, round=number).void()

        with pytest.raises(LedgerUnusable, match="SQLITE_FULL"):
            fill_the_disk()
        assert ledger.spent().releases in (1, 2)  # 2: there was room for the charge and not for giving it back
        ledger.verify()


def test_a_file_size_limit_refuses_and_the_ledger_recovers(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, site()) as ledger:
        before, soft = ledger.head(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, soft[1]))
        try:
            with pytest.raises(LedgerUnusable):
                ledger.reserve(EVENT, run="r", round=0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        assert ledger.head() == before
        ledger.reserve(EVENT, run="r", round=0).settle()
        ledger.verify()


def test_a_disk_that_cannot_be_written_refuses(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger.open(copy(filled, tmp_path), site()) as ledger:
        ledger._db.execute("PRAGMA query_only = ON")
        with pytest.raises(LedgerUnusable, match="READONLY"):
            ledger.reserve(EVENT, run="r", round=0)

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    (tmp_path / "new").mkdir()
    with pytest.raises(LedgerUnusable, match="No space left"):
        Ledger.open(tmp_path / "new", site())
