"""What this hospital has spent, on its own disk: pay, then train. A crash over-counts and never forgets.

    with ledger.reserve(plan.round_event(), run=run, round=r) as charge:   # BudgetExhausted before anything exists
        charge.start()                                                     # from here on nothing is given back
        update = fit(...)
        charge.settle()

One SQLite file (WAL, synchronous=FULL) and one Ed25519 key beside it. Rows are only ever added; fedmm.privacy.chain
says what they mean. Opening reads all rows, checks the hash chain, the transitions and the signature of the last row,
which vouches for the rest; `verify` checks every signature, the file's schema and its pages as well.
Two processes that reserve at once are put in order by SQLite's write lock; the clock orders nothing.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmm.config import Scalar, SiteConfig
from fedmm.errors import BudgetExhausted, LedgerUnusable, PolicyRefused
from fedmm.privacy import accounting, chain, vault
from fedmm.privacy.chain import Book, Charged, Head, Row
from fedmm.privacy.plan import RELATION, UNPROTECTED, Event

MAX_NAME = 200  # characters of a run's name: a coordinator must not be able to fill the disk with one row
MAX_FORECAST = 10_000  # as many rounds as a run may have


@dataclass(frozen=True)
class Spent:
    """What the ledger holds, at the site's delta and against its ceiling. Epsilons cover all private releases, and only
    those: `not_private` counts the releases that no epsilon covers.

    epsilon: PLD, the number of record.  epsilon_prv: None when not asked for or above 50.
    releases: reserved + settled ones that epsilon covers.  reserved: those never settled.
    """

    unit: str
    relation: str
    delta: float
    epsilon: float
    epsilon_prv: float | None
    epsilon_rdp: float
    ceiling: float
    releases: int
    reserved: int
    refusals: int
    not_private: int


class Charge:
    """A reservation on disk. Without `settle` it stays reserved, and reserved is spent."""

    def __init__(self, ledger: Ledger, row: Row) -> None:
        self._ledger = ledger
        self.seq = row.seq
        self.event = row.event
        self.started = False
        self.state = "reserved"

    def start(self) -> None:
        """The first step is about to be computed: from now on `void` does nothing."""
        self.started = True

    def settle(self) -> None:
        """The release exists. Twice is once. Raises: LedgerUnusable if the disk refuses or the charge was voided."""
        if self.state == "voided":
            raise LedgerUnusable(
                f"charge {self.seq} was given back and cannot be settled",
                why="what was computed under it must not leave",
            )
        if self.state == "reserved":
            self._ledger._close_charge(self.seq, "settle")
            self.state = "settled"

    def void(self) -> bool:
        """Give the charge back, if nothing was computed under it. False, and no effect, once started or settled.

        Raises: LedgerUnusable.
        """
        if self.started or self.state != "reserved":
            return False
        self._ledger._close_charge(self.seq, "void")
        self.state = "voided"
        return True

    def __enter__(self) -> Charge:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Nothing on purpose: what is not settled stays charged."""


class Ledger:
    """One hospital's ledger. Not shared between threads or forks: each opens its own, the file keeps them in order."""

    def __init__(self, path: Path, site: SiteConfig, db: sqlite3.Connection, key: Ed25519PrivateKey) -> None:
        self._path, self._site, self._db, self._key = path, site, db, key
        self._book = Book()
        self._pending: Row | None = None
        self._pid = os.getpid()
        self._code = vault.code_version()

    @classmethod
    def open(cls, hospital: Path, site: SiteConfig, *, create: bool = True) -> Ledger:
        """The ledger of a hospital folder; made with its key on first use, unless `create` is False.

        Guarantee: hash chain, transitions and the last signature are intact, and the file belongs to this hospital.
        Raises: LedgerUnusable if it cannot be read, written or trusted: key or ledger alone, open permissions, damage.
        """
        path = hospital / site.ledger.path
        with vault.as_refusal(path):
            db, key = vault.unlock(path, hospital=site.hospital.name, create=create)
            ledger = cls(path, site, db, key)
            try:
                with ledger._reading():
                    genesis = ledger._book.genesis
                vault.check_owner(genesis, key, hospital=site.hospital.name)
            except BaseException:
                db.close()
                raise
        return ledger

    # --- charging -----------------------------------------------------------------------------------------------------

    def reserve(self, event: Event, *, run: str, round: int, plan_digest: str = "") -> Charge:
        """Charge `event` before anything of it exists. On return the charge is on disk.

        Raises: BudgetExhausted if it would pass the ceiling (the refusal is recorded), PolicyRefused for a run without
        privacy where site.toml does not allow it (recorded too), LedgerUnusable if the disk refuses.
        """
        if any(len(name) > MAX_NAME or not name.isprintable() for name in (run, plan_digest)):
            raise ValueError(f"run and plan_digest must be printable and at most {MAX_NAME} characters")
        if type(round) is not int or not 0 <= round < 2**31:
            raise ValueError("round must be a whole number from 0")
        asked = {"run": run, "round": round, "plan": plan_digest}
        with self._reading():
            self._over(event)  # slow the first time; remembered, so that the write lock below is held shortly
        refused: BudgetExhausted | PolicyRefused | None = None
        with self._writing():
            if not event.private and not self._site.privacy.allow_not_private:
                refused = PolicyRefused(
                    "a run without privacy is not allowed here",
                    fix="set privacy.enabled = true, or privacy.allow_not_private in site.toml for research data",
                )
            elif self._over(event):
                refused = self._exhausted(event, round)
            row = self._append("refuse" if refused else "reserve", event, asked)
        if refused:
            raise refused
        return Charge(self, row)

    def _over(self, event: Event) -> bool:
        rules = self._site.privacy
        if not event.private:
            return False
        return accounting.exceeds(self._book.history_with([event]), rules.delta, ceiling=rules.epsilon)

    def _exhausted(self, event: Event, round: int) -> BudgetExhausted:
        rules = self._site.privacy
        after = accounting.pld_of(self._book.history_with([event]), rules.delta)
        return BudgetExhausted(
            f"round {round} would bring epsilon to {after:.2f} of {rules.epsilon:.2f} at delta {rules.delta:g}",
            why=f"the ledger holds {len(self._book.spent)} releases",
            fix="ask for fewer rounds, more noise, or a higher ceiling in site.toml",
        )

    def _close_charge(self, seq: int, how: str) -> None:
        with self._writing():
            charge = self._book.charges[seq]
            if charge.state != "reserved":  # another process restored or closed it under our hands
                raise LedgerUnusable(f"charge {seq} is already {charge.state}")
            row = charge.row
            self._append(how, row.event, {"run": row.run, "round": row.round, "plan": row.plan}, ref=seq)

    def _append(self, kind: str, event: Event, asked: Mapping[str, Any], *, ref: int = 0) -> Row:
        head = self._book.head
        row = Row(
            head.seq + 1,
            kind,
            ref,
            **event.to_dict(),  # type: ignore[arg-type]
            **asked,
            code=self._code,
            note="",
            at=vault.now(),
            prev_hash=head.hash,
            hash="",
            signature="",
        ).signed(self._key)
        self._db.execute(vault.INSERT, row)
        self._pending = row
        return row

    # --- reading ------------------------------------------------------------------------------------------------------

    def epsilon(self) -> float:
        """Everything ever spent by private releases, at the site's delta, by PLD."""
        with self._reading():
            return accounting.pld_of(self._book.history, self._site.privacy.delta)

    def would_exceed(self, events: Sequence[Event]) -> bool:
        """Would these events together pass the ceiling? Charges nothing. Not-private events cost no epsilon."""
        rules = self._site.privacy
        with self._reading():
            history = self._book.history_with(events)
        return accounting.exceeds(history, rules.delta, ceiling=rules.epsilon)

    def forecast(self, event: Event) -> int:
        """How many more times `event` fits under the ceiling; 10,000 when more, or when it costs no epsilon."""
        rules = self._site.privacy
        with self._reading():
            history = self._book.history
        if not event.private:
            return MAX_FORECAST
        return accounting.room(history, event, rules.delta, ceiling=rules.epsilon, most=MAX_FORECAST)

    def spent(self, *, cross_check: bool = False) -> Spent:
        """The ledger in numbers. cross_check: also Opacus' PRV, which imports torch."""
        rules = self._site.privacy
        with self._reading():
            charges, history, refusals = self._book.spent, self._book.history, self._book.refusals
        prv = None
        if cross_check:
            from fedmm.privacy.crosscheck import prv_of

            prv = prv_of(history, rules.delta)
        return Spent(
            unit=chain.UNIT,
            relation=RELATION,
            delta=rules.delta,
            epsilon=accounting.pld_of(history, rules.delta),
            epsilon_prv=prv,
            epsilon_rdp=accounting.rdp_of(history, rules.delta),
            ceiling=rules.epsilon,
            releases=sum(charge.row.event.private for charge in charges),
            reserved=sum(charge.state == "reserved" for charge in charges),
            refusals=refusals,
            not_private=sum(not charge.row.event.private for charge in charges),
        )

    def events(self) -> list[dict[str, Scalar]]:
        """Every charge ever made, voided ones too, by sequence."""
        with self._reading():
            return [_exported(charge) for charge in self._book.charges.values()]

    def export_json(self) -> dict[str, Any]:
        """All that anybody needs to recompute epsilon: `events`, every one spent. `unprotected`: releases without epsilon."""
        spent = [event for event in self.events() if event["state"] != "voided"]
        return {
            "delta": self._site.privacy.delta,
            "events": [event for event in spent if event["kind"] not in UNPROTECTED],
            "unprotected": [event for event in spent if event["kind"] in UNPROTECTED],
        }

    def as_json(self) -> dict[str, Any]:
        """For `fedmm ledger show`."""
        runs: dict[tuple[str, str], dict[str, Any]] = {}
        for event in (event for event in self.events() if event["state"] != "voided"):
            run, kind = str(event["run"]), str(event["kind"])
            fresh = {"run": run, "kind": kind, "releases": 0, "reserved": 0, "steps": 0}
            entry = runs.setdefault((run, kind), fresh)
            entry["releases"] += 1
            entry["reserved"] += event["state"] == "reserved"
            entry["steps"] += event["steps"]
        head = self.head()
        return {
            **asdict(self.spent(cross_check=True)),
            "head": {"sequence": head.seq, "hash": head.hash},
            "by_run": list(runs.values()),
        }

    def head(self) -> Head:
        """(seq, hash, signature) of the last row: kept elsewhere, it shows later that nothing was cut off."""
        with self._reading():
            return self._book.head

    def verify(self, *, against: Sequence[Head] = ()) -> None:
        """Check everything from the first row on: chain, transitions, every signature, schema, pages of the file.

        against: heads that were kept elsewhere; each must still be in the ledger.
        Raises: LedgerUnusable naming the first bad row.
        """
        with self._reading():
            book, public = Book(), self._key.public_key()
            rows: list[Row] = []
            for row in vault.rows(self._db, after=0):
                book.add(row)
                row.check_signature(public)
                rows.append(row)
            seen = {row.seq: row.hash for row in rows}
            for head in against:
                if seen.get(head.seq) != head.hash:
                    raise chain.tampered(head.seq, "a copy of the ledger's head kept elsewhere holds another row")
            vault.check_file(self._db, self._path, rows)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- transactions -------------------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._transaction("BEGIN"):
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside, the book is up to date and nobody else can write. Leaving commits; an exception leaves no row."""
        self._pending = None
        with self._transaction("BEGIN IMMEDIATE"):
            yield
        if self._pending:
            self._book.add(self._pending)

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        if os.getpid() != self._pid:
            raise LedgerUnusable("the ledger was opened before a fork", fix="open it in the process that uses it")
        with vault.as_refusal(self._path):
            self._db.execute(begin)
            try:
                self._catch_up()
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _catch_up(self) -> None:
        """Read and check what others have added. The signature of the last row vouches for the new ones before it."""
        before = self._book.head.seq
        for row in vault.rows(self._db, after=before):
            self._book.add(row)
        last = self._book.last
        if last is None:
            raise chain.tampered(1, "it is missing")
        if last.seq > before:
            last.check_signature(self._key.public_key())


def _exported(charge: Charged) -> dict[str, Scalar]:
    place = {"seq": charge.row.seq, **charge.row.event.to_dict()}
    return {**place, "run": charge.row.run, "round": charge.row.round, "state": charge.state}
