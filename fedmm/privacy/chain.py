"""The ledger's rows as a signed chain, and what a sequence of them means. No database here: rows in, book or error out.

Each row's hash covers its content and the hash before it; the hospital's Ed25519 key signs each hash. So the signature
of the last row vouches for every row before it, and a change anywhere breaks the chain from there on.

    genesis ─▶ reserve ─▶ settle          spent, for ever
                      ├─▶ void            given back; only the process that reserved it, and only before the first step
                      └─▶ (crash)         stays reserved = spent
               refuse                     what was asked and denied; costs nothing
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fedmm.errors import FedmmError, LedgerUnusable
from fedmm.privacy.accounting import History, Term
from fedmm.privacy.plan import RELATION, Event

FORMAT = 1
UNIT = "patient"
NO_HASH = "0" * 64
# A signature of this key can never be mistaken for one over something else.
SIGNED_AS = b"fedmm ledger row v1\n"


class Head(NamedTuple):
    """The last row: enough to see later that the ledger was cut back or replaced."""

    seq: int
    hash: str
    signature: str


class Row(NamedTuple):
    """One line of the ledger.

    ref: the reserve row that a settle or void closes, else 0.  at: the clock, for people; order is by seq alone.
    """

    seq: int
    type: str
    ref: int
    kind: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    run: str
    round: int
    code: str
    plan: str
    note: str
    at: str
    prev_hash: str
    hash: str = ""
    signature: str = ""

    def digest(self) -> str:
        """What `hash` must be."""
        content = json.dumps(self[:-2], separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def signed(self, key: Ed25519PrivateKey) -> Row:
        digest = self.digest()
        return self._replace(hash=digest, signature=key.sign(SIGNED_AS + bytes.fromhex(digest)).hex())

    def check_signature(self, key: Ed25519PublicKey) -> None:
        """Raises: LedgerUnusable."""
        try:
            signature = bytes.fromhex(self.signature)
            if signature.hex() != self.signature:  # capitals and spaces would be another spelling of the same bytes
                raise ValueError
            key.verify(signature, SIGNED_AS + bytes.fromhex(self.hash))
        except (InvalidSignature, ValueError):
            raise tampered(self.seq, "its signature is not this hospital's") from None

    @property
    def event(self) -> Event:
        """Raises: PlanInvalid if the row holds none."""
        return Event(self.kind, self.noise_multiplier, self.sampling_rate, self.steps)


TYPES = (int, str, int, str, float, float, int, str, int, str, str, str, str, str, str, str)


@dataclass
class Charged:
    """A reservation and what became of it: reserved, settled or voided."""

    row: Row
    state: str = "reserved"


@dataclass
class Book:
    """What the rows say together. `add` accepts only the next legal row."""

    genesis: dict[str, Any] = field(default_factory=dict)
    charges: dict[int, Charged] = field(default_factory=dict)
    refusals: int = 0
    last: Row | None = None
    _steps: dict[tuple[float, float], int] = field(default_factory=dict)

    @property
    def head(self) -> Head:
        return Head(self.last.seq, self.last.hash, self.last.signature) if self.last else Head(0, NO_HASH, "")

    @property
    def history(self) -> History:
        """What is spent by private releases, merged; in order of first appearance."""
        return tuple(Term(*pair, steps) for pair, steps in self._steps.items() if steps)

    @property
    def spent(self) -> list[Charged]:
        """Reserved and settled charges, private or not, by sequence."""
        return [charge for charge in self.charges.values() if charge.state != "voided"]

    def history_with(self, events: Sequence[Event]) -> History:
        """The history if the private ones of these events were charged too."""
        steps = dict(self._steps)
        for event in events:
            if event.private:
                pair = (event.noise_multiplier, event.sampling_rate)
                steps[pair] = steps.get(pair, 0) + event.steps
        return tuple(Term(*pair, count) for pair, count in steps.items() if count)

    def add(self, row: Row) -> None:
        """Raises: LedgerUnusable naming the row if it does not follow from the rows before."""
        head = self.head
        if row.seq != head.seq + 1:
            raise tampered(head.seq + 1, f"it is missing; row {row.seq} follows row {head.seq}")
        if row.prev_hash != head.hash or row.digest() != row.hash:
            raise tampered(row.seq, "its content does not match its hash")
        if (row.type == "genesis") != (row.seq == 1):
            raise tampered(row.seq, "a ledger has one genesis row, the first")
        try:
            self._apply(row)
        except (FedmmError, ValueError, KeyError, TypeError) as error:
            raise tampered(row.seq, str(error).partition("\n")[0]) from None
        self.last = row

    def _apply(self, row: Row) -> None:
        if row.type == "genesis":
            self.genesis = _read_genesis(row)
        elif row.type == "reserve":
            self._count(row.event, 1)
            self.charges[row.seq] = Charged(row)
        elif row.type == "refuse":
            _ = row.event
            self.refusals += 1
        elif row.type in ("settle", "void"):
            charge = self.charges.get(row.ref)
            if charge is None or charge.state != "reserved":
                raise ValueError(f"it closes row {row.ref}, which is not an open reservation")
            charge.state = {"settle": "settled", "void": "voided"}[row.type]
            if row.type == "void":
                self._count(charge.row.event, -1)
        else:
            raise ValueError(f"its type {row.type[:20]!r} is unknown")

    def _count(self, event: Event, sign: int) -> None:
        if event.private:
            pair = (event.noise_multiplier, event.sampling_rate)
            self._steps[pair] = self._steps.get(pair, 0) + sign * event.steps


def tampered(seq: int, why: str) -> LedgerUnusable:
    """The error for a ledger that was changed from outside."""
    return LedgerUnusable(
        f"row {seq} of the ledger cannot be trusted",
        why=why,
        fix="the privacy officer restores ledger and key together from the latest backup; "
        "releases since that backup must be charged again by hand",
    )


# --- the first row and the key ----------------------------------------------------------------------------------------


def genesis_row(key: Ed25519PrivateKey, *, hospital: str, code: str, at: str) -> Row:
    """Row 1: whose ledger this is, what it protects, and the key that speaks for it."""
    facts = {
        "format": FORMAT,
        "hospital": hospital,
        "unit": UNIT,
        "relation": RELATION,
        "public_key": public_hex(key.public_key()),
    }
    note = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return Row(1, "genesis", 0, "", 0.0, 0.0, 0, "", 0, code, "", note, at, NO_HASH).signed(key)


def _read_genesis(row: Row) -> dict[str, Any]:
    facts = json.loads(row.note)
    if facts["format"] != FORMAT:
        raise ValueError(f"ledger format {facts['format']} is not {FORMAT}")
    if (facts["unit"], facts["relation"]) != (UNIT, RELATION):
        raise ValueError("it protects another unit or relation")
    bytes.fromhex(facts["public_key"])
    return dict(facts)


def public_hex(key: Ed25519PublicKey) -> str:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def public_from_hex(text: str) -> Ed25519PublicKey:
    """Raises: ValueError."""
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))


def key_to_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def key_from_pem(pem: bytes) -> Ed25519PrivateKey:
    """Raises: ValueError or TypeError if this is no unencrypted Ed25519 key."""
    key = load_pem_private_key(pem, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("not an Ed25519 key")
    return key
