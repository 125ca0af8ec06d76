"""The ledger under use: what it charges, refuses, remembers and says. Faults and tampering: the files beside this one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
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
from fedmm.privacy.ledger import MOST_ATTEMPTS, Ledger
from fedmm.privacy.plan import UNPROTECTED, Event
from fedmm.privacy.statement import export, show
from tests.privacy.ledger_worker import EVENT, site

NAMES = ("ledger.sqlite", "ledger.key")
SHA = "ab" * 32


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path, site(allow_not_private=True)) as opened:
        yield opened


# --- charges ----------------------------------------------------------------------------------------------------------


def test_a_fresh_ledger_has_spent_nothing(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.epsilon() == 0.0
    assert export(ledger) == {"delta": 1e-5, "events": [], "unprotected": [], "sent": []}
    assert ledger.head().seq == 1
    ledger.verify()
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in NAMES] == [0o600, 0o600]


def test_wal_files_are_private_too(ledger: Ledger, tmp_path: Path) -> None:
    ledger.reserve(EVENT, run="r", round=0)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_epsilon_is_that_of_the_export_by_dp_accounting_alone(ledger: Ledger) -> None:
    for number, noise in enumerate((2.0, 3.0, 2.0, 2.5)):
        ledger.reserve(Event("train", noise, 0.1, 4), run=f"run{number % 2}", round=number).settle()
    exported = export(ledger)
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
    assert [event["round"] for event in export(ledger)["events"]] == [1]


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
    exported = export(ledger)
    assert [event["kind"] for event in exported["unprotected"]] == [kind]
    assert [event["kind"] for event in exported["events"]] == ["train"]
    assert ledger.forecast(free) > 1000
    assert ledger.reserve(free, run="r", round=2).void()


def test_a_question_that_was_refused_is_one_row_however_often_it_is_asked(tmp_path: Path) -> None:
    free = Event("not_private", 0.0, 1.0, 3)
    with Ledger.open(tmp_path, site()) as ledger:
        for number, plan in enumerate(("a", "a", "b", "a")):
            with pytest.raises(PolicyRefused):
                ledger.reserve(free, run=f"r{number}", round=number, plan_digest=plan)
        assert ledger.spent().refusals == 2
        ledger.verify()
    with Ledger.open(tmp_path, site()) as again:
        with pytest.raises(PolicyRefused):
            again.reserve(free, run="r", round=9, plan_digest="b")
        assert again.spent().refusals == 2, "a new process knows of it too"
        assert again.reserve(EVENT, run="r", round=0, plan_digest="b").seq == again.head().seq


def test_unprotected_releases_need_the_hospitals_word(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, site()) as ledger:
        with pytest.raises(PolicyRefused):
            ledger.reserve(Event("not_private", 0.0, 1.0, 3), run="r", round=0)
        assert (ledger.spent().releases, ledger.spent().refusals) == (0, 1)


# --- what leaves ------------------------------------------------------------------------------------------------------


def test_what_leaves_is_what_was_settled_as_often_as_it_is_asked_for(ledger: Ledger) -> None:
    charge = ledger.reserve(EVENT, run="r", round=3)
    assert ledger.payable("r", 3, SHA, kinds=("train",)) is None
    charge.settle(sha256=SHA)
    assert [
        ledger.payable(*asked, kinds=("train",)) for asked in (("r", 3, "cd" * 32), ("r", 4, SHA), ("other", 3, SHA))
    ] == [None] * 3
    assert ledger.payable("r", 3, SHA, kinds=("train",)) == charge.seq
    ledger.record_sent("update", run="r", round=3, size=7, sha256=SHA, charge=charge.seq)
    assert ledger.payable("r", 3, SHA, kinds=("train",)) == charge.seq
    ledger.record_sent("update", run="r", round=3, size=7, sha256=SHA, charge=charge.seq)
    assert [message._asdict() for message in ledger.sent()] == [
        {"seq": seq, "run": "r", "round": 3, "what": "update", "bytes": 7, "sha256": SHA, "charge": charge.seq}
        for seq in (4, 5)
    ]
    assert [(c.row.seq, c.sent) for c in ledger.charges_of("r")] == [(charge.seq, 2)]
    assert export(ledger)["sent"] == [message._asdict() for message in ledger.sent()]
    ledger.verify()


def test_of_two_equal_releases_each_leaves_under_its_own_charge(ledger: Ledger) -> None:
    charges = [ledger.reserve(EVENT, run="r", round=0) for _ in range(2)]
    for charge in charges:
        charge.settle(sha256=SHA)
    paid = []
    for _ in range(3):
        seq = ledger.payable("r", 0, SHA, kinds=("train",))
        assert seq is not None
        ledger.record_sent("update", run="r", round=0, size=1, sha256=SHA, charge=seq)
        paid.append(seq)
    assert paid == [charges[1].seq, charges[0].seq, charges[1].seq]


def test_an_attempt_that_was_never_settled_is_resumed_under_its_own_charge_only(ledger: Ledger, tmp_path: Path) -> None:
    asked = {"run": "r", "round": 3, "plan_digest": "p"}
    charge = ledger.reserve(EVENT, **asked)
    epsilon = ledger.epsilon()
    others = [{"run": "s"}, {"round": 4}, {"plan_digest": "q"}]
    assert [ledger.resume(EVENT, **(asked | other)) for other in others] == [None] * 3
    assert ledger.resume(Event("train", 2.0, 1.0, 1), **asked) is None
    again = ledger.resume(EVENT, **asked)
    assert again is not None
    assert (again.seq, again.started, again.void()) == (charge.seq, True, False)
    assert ledger.epsilon() == epsilon
    with Ledger.open(tmp_path, site()) as other:
        other.verify()
        assert [c.attempts for c in other.charges_of("r")] == [2]
    again.settle(sha256=SHA)
    with pytest.raises(LedgerUnusable, match="already settled"):  # whoever comes too late settles nothing
        charge.settle(sha256="cd" * 32)
    assert ledger.resume(EVENT, **asked) is None


def test_a_charge_is_tried_so_often_and_not_for_ever(ledger: Ledger) -> None:
    ledger.reserve(EVENT, run="r", round=0)
    tried = [ledger.resume(EVENT, run="r", round=0) is not None for _ in range(MOST_ATTEMPTS)]
    assert tried == [True] * (MOST_ATTEMPTS - 1) + [False]


def test_nothing_leaves_for_a_charge_that_is_not_settled_or_was_settled_for_something_else(ledger: Ledger) -> None:
    reserved, voided, used = (ledger.reserve(EVENT, run="r", round=n) for n in range(3))
    voided.void()
    used.settle(sha256=SHA)
    ledger.record_sent("update", run="r", round=2, size=1, sha256=SHA, charge=used.seq)
    head = ledger.head()
    for charge, sha in ((reserved.seq, SHA), (voided.seq, SHA), (used.seq, "cd" * 32), (1, SHA), (999, SHA)):
        with pytest.raises(LedgerUnusable, match="does not pay for this"):
            ledger.record_sent("update", run="r", round=0, size=1, sha256=sha, charge=charge)
    assert ledger.head() == head


def test_a_charge_pays_for_what_it_was_settled_for_and_nothing_else(ledger: Ledger) -> None:
    charge = ledger.reserve(EVENT, run="r", round=0)
    charge.settle(sha256=SHA)
    with pytest.raises(LedgerUnusable, match="does not pay for this"):
        ledger.record_sent("update", run="r", round=0, size=1, sha256="cd" * 32, charge=charge.seq)
    ledger.record_sent("update", run="r", round=0, size=1, sha256=SHA, charge=charge.seq)


def test_a_row_that_no_reader_would_accept_is_not_written(ledger: Ledger, tmp_path: Path) -> None:
    """It was committed first and checked after, and the ledger never opened again."""
    before = ledger.head()
    with pytest.raises(LedgerUnusable):
        ledger.record_split("south", "no key")
    assert ledger.head() == before
    assert not ledger.is_split()
    ledger.reserve(EVENT, run="r", round=0).settle()
    with Ledger.open(tmp_path, site()) as again:
        again.verify()
        assert again.spent().releases == 1


def test_an_answer_that_costs_nothing_is_written_once_for_each_content(ledger: Ledger) -> None:
    for what, sha in (("hello", SHA), ("hello", SHA), ("hello", "cd" * 32), ("refusal 1001", SHA), ("hello", SHA)):
        ledger.record_sent(what, run="", round=0, size=5, sha256=sha)
    assert [(message.what, message.sha256) for message in ledger.sent()] == [
        ("hello", SHA),
        ("hello", "cd" * 32),
        ("refusal 1001", SHA),
    ]
    assert ledger.epsilon() == 0.0


def test_a_public_value_is_bought_once_and_read_again_after_a_restart(ledger: Ledger, tmp_path: Path) -> None:
    count = Event("count", 10.0, 1.0, 1)
    ledger.reserve(count, run="r", round=0)  # paid, never made
    ledger.reserve(EVENT, run="r", round=0).settle(sha256=SHA)
    ledger.reserve(count, run="r", round=0).settle(count=41.5, public_patients=100)
    with Ledger.open(tmp_path, site()) as again:
        assert again.made("count") == [{"count": 41.5, "public_patients": 100}]
        assert again.made("train") == [{"sha256": SHA}]
        assert again.made("evaluate") == []


def test_a_note_that_is_no_number_is_refused_and_the_charge_stays(ledger: Ledger) -> None:
    charge = ledger.reserve(EVENT, run="r", round=0)
    with pytest.raises(ValueError, match="JSON"):
        charge.settle(count=float("nan"))
    assert (charge.state, ledger.spent().reserved) == ("reserved", 1)


# --- keys and other ledgers -------------------------------------------------------------------------------------------


def test_a_rotation_changes_the_key_and_nothing_else(ledger: Ledger, tmp_path: Path) -> None:
    charge = ledger.reserve(EVENT, run="r", round=0)
    old, kept, before = ledger.public_key(), ledger.head(), ledger.spent()
    old_pem = (tmp_path / "ledger.key").read_bytes()
    new = ledger.rotate()
    assert new == ledger.public_key() != old
    assert sorted(path.name for path in tmp_path.glob("ledger.key*")) == ["ledger.key"]
    assert (tmp_path / "ledger.key").read_bytes() != old_pem
    assert (tmp_path / "ledger.key").stat().st_mode & 0o777 == 0o600
    charge.settle()
    assert ledger.spent() == replace(before, reserved=0)
    ledger.verify(against=[kept, ledger.head()])
    with Ledger.open(tmp_path, site(), create=False) as again:
        again.reserve(EVENT, run="r", round=1)
        again.verify(against=[kept])


def test_a_ledger_that_is_open_elsewhere_follows_a_rotation(ledger: Ledger, tmp_path: Path) -> None:
    charge = ledger.reserve(EVENT, run="r", round=0)
    with Ledger.open(tmp_path, site()) as other:
        keys = [other.rotate(), other.rotate()]
    charge.settle()
    assert ledger.public_key() == keys[1]
    assert ledger.rotate() not in keys
    ledger.verify()


def test_a_split_is_written_down(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "south").mkdir()
    with Ledger.open(tmp_path / "south", site(name="south")) as other:
        ledger.record_split("south", other.public_key())
        (row,) = vault.rows(ledger._db, after=1)
        assert (row.type, row.facts) == ("split", {"hospital": "south", "public_key": other.public_key()})
    ledger.verify()


# --- what it says -----------------------------------------------------------------------------------------------------


def test_show_has_the_agreed_keys(ledger: Ledger) -> None:
    ledger.reserve(EVENT, run="r", round=0).settle(sha256=SHA)
    ledger.reserve(EVENT, run="r", round=1)
    ledger.reserve(EVENT, run="r", round=2).void()
    ledger.record_sent("update", run="r", round=0, size=100, sha256=SHA, charge=2)
    free = ledger.reserve(Event("exact_scores", 0.0, 1.0, 1), run="r", round=3)
    free.settle(sha256=SHA)
    ledger.record_sent("exact scores", run="r", round=3, size=4, sha256=SHA, charge=free.seq)
    for sha in (SHA, "cd" * 32):
        ledger.record_sent("hello", run="", round=0, size=8, sha256=sha)
    shown = show(ledger)
    agreed = {"unit", "relation", "delta", "epsilon", "epsilon_prv", "epsilon_rdp", "ceiling", "releases", "reserved"}
    assert set(shown) == agreed | {"refusals", "not_private", "by_run", "sent", "head", "public_key"}
    assert shown["epsilon"] <= shown["epsilon_prv"] <= shown["epsilon_rdp"] + 0.02
    assert shown["by_run"] == [
        {"run": "r", "kind": "train", "releases": 2, "reserved": 1, "steps": 8},
        {"run": "r", "kind": "exact_scores", "releases": 1, "reserved": 0, "steps": 1},
    ]
    assert shown["sent"] == [
        {"what": "update", "covered": "yes", "messages": 1, "bytes": 100},
        {"what": "exact scores", "covered": "no", "messages": 1, "bytes": 4},
        {"what": "hello", "covered": "needs none", "messages": 2, "bytes": 16},
    ]
    assert shown["head"] == {"sequence": ledger.head().seq, "hash": ledger.head().hash}
    assert shown["public_key"] == ledger.public_key()


@pytest.mark.parametrize(
    ("run", "round"), [("x" * 300, 0), ("a\x00b", 0), ("\ud800", 0), ("r", -1), ("r", True), ("r", 2**40)]
)
def test_names_from_a_coordinator_are_bounded(ledger: Ledger, run: str, round: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        ledger.reserve(EVENT, run=run, round=round)
    assert ledger.head().seq == 1


def test_a_ledger_is_not_used_over_a_fork(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(LedgerUnusable, match="fork"):
        ledger.epsilon()


def test_a_statement_is_signed_by_the_key_of_today_and_is_no_row(ledger: Ledger) -> None:
    facts, old = {"epsilon": 1.5, "run": "r"}, ledger.public_key()
    first = ledger.sign(facts)
    assert chain.statement_is_signed(facts, first, old)
    key = ledger.rotate()
    second = ledger.sign(facts)
    wrong = [(facts, first, key), (facts, second, old), ({**facts, "epsilon": 1.4}, second, key)]
    wrong += [(facts, ledger.head().signature, key), (facts, "no hex", key), (facts, second, "ab"), (facts, "", key)]
    assert chain.statement_is_signed(facts, second, key)
    assert not [case for case in wrong if chain.statement_is_signed(*case)]
    assert not chain.is_signed(ledger.head().hash, second, chain.public_from_hex(key))


class Machine(RuleBasedStateMachine):
    """Against a model that is a list: whatever the order of calls and restarts, spent is reserved plus settled."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="fedmm-ledger-"))
        self.ledger = Ledger.open(self.folder, site(epsilon=0.9))
        self.open: list[Any] = []
        self.settled: list[int] = []
        self.sent: list[int] = []
        self.heads = [self.ledger.head()]
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
        charge = self.open.pop()
        charge.settle(sha256=f"{charge.seq:064x}")
        self.settled.append(charge.seq)

    @precondition(lambda self: self.settled)
    @rule()
    def send(self) -> None:
        seq = self.settled.pop()
        assert self.ledger.payable("r", 0, f"{seq:064x}", kinds=("train",)) == seq
        for _ in range(2):
            try:
                self.ledger.record_sent("update", run="r", round=0, size=1, sha256=f"{seq:064x}", charge=seq)
                self.sent.append(seq)
            except LedgerUnusable:
                assert self.sent.count(seq) == 1

    @rule(content=st.integers(0, 2))
    def answer(self, content: int) -> None:
        self.ledger.record_sent("hello", run="", round=0, size=1, sha256=f"{content:064x}")

    @rule()
    def rotate(self) -> None:
        assert self.ledger.rotate() == self.ledger.public_key()

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
        assert [message.charge for message in self.ledger.sent() if message.charge] == self.sent
        self.heads.append(self.ledger.head())
        assert sum(term.steps for term in self.ledger._book.history) == sum(event.steps for event in self.spent)

    def teardown(self) -> None:
        self.ledger.verify(against=self.heads)
        self.ledger.close()
        shutil.rmtree(self.folder)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)


def test_a_key_that_is_rotated_while_a_ledger_is_opened_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger.open(tmp_path, site()):
        pass
    check, rotated = vault.check_owner, []

    def rotate_now(*arguments: Any, **more: Any) -> None:
        check(*arguments, **more)
        if not rotated:
            rotated.append(True)
            with Ledger.open(tmp_path, site()) as other:
                other.rotate()

    monkeypatch.setattr(vault, "check_owner", rotate_now)
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.reserve(EVENT, run="r", round=0).settle()
        ledger.verify()


def test_a_copy_of_the_file_alone_holds_what_was_spent(tmp_path: Path) -> None:
    """A backup that leaves out the write-ahead log of a hospital that is training was empty."""
    (tmp_path / "live").mkdir()
    (tmp_path / "backup").mkdir()
    with Ledger.open(tmp_path / "live", site()) as ledger:
        for number in range(3):
            ledger.reserve(EVENT, run="r", round=number).settle()
        for name in NAMES:
            shutil.copy2(tmp_path / "live" / name, tmp_path / "backup" / name)
        with Ledger.open(tmp_path / "backup", site()) as copied:
            copied.verify(against=[ledger.head()])
            assert copied.epsilon() == ledger.epsilon() > 0


def test_a_ledger_that_was_taken_away_is_not_begun_again_beside_its_list_of_patients(tmp_path: Path) -> None:
    (tmp_path / "ledger.patients").write_text("{}", encoding="utf-8")
    with pytest.raises(LedgerUnusable, match="its list of patients is there"):
        Ledger.open(tmp_path, site())
    assert not (tmp_path / "ledger.sqlite").exists()
