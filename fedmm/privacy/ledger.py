"""What this hospital has spent, on its own disk: pay, then train. A crash over-counts and never forgets.

    with ledger.reserve(plan.round_event(r), run=run, round=r) as charge:  # BudgetExhausted before anything exists
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
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedmm.config import Scalar, SiteConfig
from fedmm.errors import BudgetExhausted, LedgerUnusable, PolicyRefused
from fedmm.privacy import accounting, chain, vault
from fedmm.privacy.chain import Book, Charged, Head, Row, Sent
from fedmm.privacy.charge import Charge
from fedmm.privacy.plan import RELATION, Event, PrivacyPlan

MAX_NAME = 200  # characters of a run's name: a coordinator must not be able to fill the disk with one row
NOTHING = {"run": "", "round": 0, "plan": ""}
MAX_FORECAST = 10_000  # as many rounds as a run may have
MOST_ATTEMPTS = (
    8  # guess: under one charge; that an attempt ended, and when, is not hidden, so it must not be free for ever
)


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


class Ledger:
    """One hospital's ledger. Not shared between threads or forks: each opens its own, the file keeps them in order."""

    def __init__(self, path: Path, site: SiteConfig, db: sqlite3.Connection) -> None:
        self._path, self._site, self._db = path, site, db
        self._key: Ed25519PrivateKey | None = None
        self._book = Book()
        self._pending: Row | None = None
        self._pid = os.getpid()
        self._code = vault.code_version()

    @classmethod
    def open(cls, hospital: Path, site: SiteConfig, *, create: bool = True, split_off: bool = False) -> Ledger:
        """The ledger of a hospital folder; made with its key on first use, unless `create` is False.

        split_off: a list of patients is there before the ledger is, as `ledger split` leaves it.
        Guarantee: hash chain, transitions and the last signature are intact, and the file belongs to this hospital.
        Raises: LedgerUnusable if it cannot be read, written or trusted: key or ledger alone, open permissions, damage.
        """
        path = hospital / site.ledger.path
        with vault.as_refusal(path):
            ledger = cls(
                path, site, db := vault.unlock(path, hospital=site.hospital.name, create=create, split_off=split_off)
            )
            try:
                with ledger._reading():
                    vault.check_owner(ledger._book.genesis, hospital=site.hospital.name)
                ledger._find_key()
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
        _check_names(run, plan_digest, round=round)
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
            if refused is None:
                return Charge(self, self._append("reserve", event, asked))
            self._refuse(event, asked)
        raise refused

    def resume(self, event: Event, *, run: str, round: int, plan_digest: str = "") -> Charge | None:
        """Another attempt under the charge for exactly this that was reserved and never closed; None if there is none.

        For the one who holds the hospital's training lock: the process that reserved it is gone then.
        Guarantee: one charge, one release. Nothing of an earlier attempt has left, since the gate lets out only what a
        charge was settled for, and a charge is settled once, for one digest, whoever does it: if two processes worked under
        it after all, the second could not settle. Attempts have noise and sample of their own, and only the settled one's
        output is seen; the others show that they ended. That is why there are at most MOST_ATTEMPTS (then None: it is
        charged anew), and why an attempt that ends in an answer made of its result must close the charge (`settle()`).
        Raises: LedgerUnusable.
        """
        asked = {"run": run, "round": round, "plan": plan_digest}
        with self._writing():
            for charge in self._book.charges.values():
                row = charge.row
                same = (row.event, row.run, row.round, row.plan) == (event, run, round, plan_digest)
                if same and charge.state == "reserved" and charge.attempts < MOST_ATTEMPTS:
                    self._append("resume", event, asked, ref=row.seq)
                    resumed = Charge(self, row)
                    resumed.start()  # an earlier attempt may have computed: it cannot be given back any more
                    return resumed
        return None

    def charges_of(self, run: str) -> list[Charged]:
        """What a run was charged and what became of it, by sequence. To read, not to change."""
        with self._reading():
            return [charge for charge in self._book.charges.values() if charge.row.run == run]

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

    def _close_charge(self, seq: int, how: str, *, note: str = "") -> None:
        with self._writing():
            charge = self._book.charges[seq]
            if charge.state != "reserved":  # another process restored or closed it under our hands
                raise LedgerUnusable(f"charge {seq} is already {charge.state}")
            row = charge.row
            self._append(how, row.event, {"run": row.run, "round": row.round, "plan": row.plan}, ref=seq, note=note)

    def _refuse(self, event: Event, asked: Mapping[str, Any]) -> None:
        """Once for each kind and plan: who asks the same again must not fill the disk."""
        if (event.kind, asked["plan"]) not in self._book.refused:
            self._append("refuse", event, asked)

    def _append(self, kind: str, event: Event | None, asked: Mapping[str, Any], *, ref: int = 0, note: str = "") -> Row:
        head = self._book.head
        cost = event.to_dict() if event else {"kind": "", "noise_multiplier": 0.0, "sampling_rate": 0.0, "steps": 0}
        row = Row(
            head.seq + 1,
            kind,
            ref,
            **cost,
            **asked,
            code=self._code,
            note=note,
            at=vault.now(),
            prev_hash=head.hash,
            hash="",
            signature="",
        ).signed(self._signing_key())
        self._db.execute(vault.INSERT, row)
        self._pending = row
        return row

    def _find_key(self) -> None:
        """Another process may rotate the key between our reading the chain and the key: then the chain is read again."""
        for _ in range(2):
            with suppress(LedgerUnusable), self._reading():
                self._signing_key()
                return
        with self._reading():
            self._signing_key()

    def _signing_key(self) -> Ed25519PrivateKey:
        """The key that the chain names now: another process may have rotated it."""
        if self._key is None or chain.public_hex(self._key.public_key()) != self._book.key:
            self._key = vault.key_of(self._path, self._book.key)
        return self._key

    # --- what leaves --------------------------------------------------------------------------------------------------

    def payable(self, run: str, round: int, sha256: str, *, kinds: Sequence[str]) -> int | None:
        """The settled charge of this run, round and one of these kinds whose release has this digest; of several one whose
        release has not left yet, the last. None if there is none."""
        with self._reading():
            fits = [
                charge
                for charge in self._book.charges.values()
                if (charge.row.run, charge.row.round) == (run, round) and charge.row.kind in kinds
                if charge.state == "settled" and charge.made.get("sha256") == sha256
            ]
        return max(fits, key=lambda charge: (not charge.sent, charge.row.seq)).row.seq if fits else None

    def record_sent(self, what: str, *, run: str, round: int, size: int, sha256: str, charge: int = 0) -> None:
        """Write down, before it leaves, that a message leaves. An answer without a charge is written once for each
        content: saying the same again tells nothing new, and must not fill the disk.

        Raises: LedgerUnusable, also if the charge does not exist or is not settled for this: then nothing may leave.
        """
        _check_names(run, what, round=round)
        with self._writing():
            if charge == 0 and any(s.sha256 == sha256 and s.what == what for s in self._book.sent if s.charge == 0):
                return
            if charge:
                paid = self._book.charges.get(charge)
                if paid is None or paid.state != "settled" or paid.made.get("sha256") != sha256:
                    raise LedgerUnusable(f"charge {charge} does not pay for this", why="one charge, one release")
            note = chain.canonical({"what": what, "bytes": size, "sha256": sha256})
            self._append("sent", None, {"run": run, "round": round, "plan": ""}, ref=charge, note=note)

    def made(self, kind: str) -> list[dict[str, Any]]:
        """What settled charges of this kind wrote down, by sequence: values that were paid for and are public."""
        with self._reading():
            charges = self._book.charges.values()
            return [c.made for c in charges if c.state == "settled" and c.row.kind == kind and c.made]

    def record_split(self, hospital: str, public_key: str) -> None:
        """Another ledger began, for patients who are not under this one (fedmm.privacy.roster keeps them apart)."""
        with self._writing():
            self._append("split", None, NOTHING, note=chain.canonical({"hospital": hospital, "public_key": public_key}))

    def is_split(self) -> bool:
        """Are there other ledgers of this hospital, whose patients may not be under this one?"""
        with self._reading():
            return self._book.is_split

    def rotate(self) -> str:
        """A new signing key; the old one signs the row that names it, and is overwritten. Returns the new public key.

        A kill before the row leaves the old key in force, after it the new one. Raises: LedgerUnusable.
        """
        with self._writing():
            self._signing_key()  # finishes a rotation that was cut short: its key lies where the next one is written
            key = vault.write_next_key(self._path)
            public = chain.public_hex(key.public_key())
            self._append("rotate", None, NOTHING, note=chain.canonical({"public_key": public}))
        with self._writing():  # nobody rotates meanwhile
            self._signing_key()
        return public

    # --- reading ------------------------------------------------------------------------------------------------------

    def epsilon(self) -> float:
        """Everything ever spent by private releases, at the site's delta, by PLD."""
        with self._reading():
            return accounting.pld_of(self._book.history, self._site.privacy.delta)

    def least_noise(
        self, plan: PrivacyPlan, *, rounds: int, also: Sequence[Event] = (), paid: Collection[int] = ()
    ) -> float:
        """The least noise_multiplier, at least the plan's, with which the last `rounds` rounds of it fit into what is left.

        also: what the run will cost besides training.  paid: rounds that are charged already.
        Depends on plans and on this ledger, never on a patient.
        Raises: BudgetExhausted if no noise is enough (recorded), PlanInvalid for more rounds than the plan has.
        """
        if not plan.private or not rounds:
            return plan.noise_multiplier
        event, rules = plan.round_event(1), self._site.privacy
        done = plan.rounds - rounds
        with self._reading():
            before = self._book.history_with(also)
            after = self._book.history_with([*also, *plan.rest(after=done, without=paid)])
        if not (stages := plan.stages(after=done, without=paid)) or not accounting.exceeds(
            after, rules.delta, ceiling=rules.epsilon
        ):
            return plan.noise_multiplier
        try:
            noise = accounting.calibrate(
                epsilon=rules.epsilon,
                delta=rules.delta,
                sampling_rate=event.sampling_rate,
                steps={times: count * event.steps for times, count in stages.items()},
                before=before,
            )
        except ValueError:
            spent = accounting.pld_of(before, rules.delta)
            with self._writing():
                self._refuse(event, {**NOTHING, "plan": plan.digest()})
            raise BudgetExhausted(
                f"epsilon {spent:.2f} of {rules.epsilon:.2f} is spent: no noise makes room for {rounds} rounds",
                fix="ask for fewer rounds or steps, or for a higher ceiling in site.toml",
            ) from None
        # a hair above, so that the way back to the event's noise cannot round below what was calibrated
        return max(plan.noise_multiplier, noise * plan.noise_multiplier / event.noise_multiplier * (1 + 1e-9))

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

    def sent(self) -> list[Sent]:
        """Every message that left, by sequence."""
        with self._reading():
            return list(self._book.sent)

    def public_key(self) -> str:
        """Of the hospital's signing key, hexadecimal."""
        with self._reading():
            return self._book.key

    def head(self) -> Head:
        """(seq, hash, signature) of the last row: kept elsewhere, it shows later that nothing was cut off."""
        with self._reading():
            return self._book.head

    def sign(self, facts: Mapping[str, Any]) -> str:
        """The hospital's signature under a statement about this ledger, hexadecimal."""
        with self._reading():
            return chain.sign_statement(facts, self._signing_key())

    def verify(self, *, against: Sequence[Head] = ()) -> None:
        """Check everything from the first row on: chain, transitions, every signature, schema, pages of the file.

        against: heads that were kept elsewhere; each must still be in the ledger.
        Raises: LedgerUnusable naming the first bad row.
        """
        with self._reading():
            book = Book()
            rows: list[Row] = []
            keys: dict[str, Ed25519PublicKey] = {}
            for row in vault.rows(self._db, after=0):
                book.add(row)
                row.check_signature(keys.setdefault(book.signer, chain.public_from_hex(book.signer)))
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
        try:
            with self._transaction("BEGIN IMMEDIATE"):
                yield
                if self._pending:
                    self._book.add(self._pending)  # before COMMIT: a row that no reader would accept is not written
        except BaseException:
            self._book = Book()  # it may be a row ahead of the file: read it again
            raise

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        if os.getpid() != self._pid:
            raise LedgerUnusable("the ledger was opened before a fork", fix="open it in the process that uses it")
        with vault.as_refusal(self._path):
            self._db.execute(begin)
            try:
                if self._book.last is None:
                    self._book = vault.book_of(self._db, self._path)
                else:
                    vault.catch_up(self._book, self._db)
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


def _check_names(*names: str, round: int) -> None:
    if any(len(name) > MAX_NAME or not name.isprintable() for name in names):
        raise ValueError(f"names must be printable and at most {MAX_NAME} characters")
    if type(round) is not int or not 0 <= round < 2**31:
        raise ValueError("round must be a whole number from 0")


def _exported(charge: Charged) -> dict[str, Scalar]:
    place = {"seq": charge.row.seq, **charge.row.event.to_dict()}
    return {**place, "run": charge.row.run, "round": charge.row.round, "state": charge.state}
