"""The ledger's rows as a signed chain, and what a sequence of them means. No database here: rows in, book or error out.

Each row's hash covers its content and the hash before it; the hospital's Ed25519 key signs each hash. So the signature
of the last row vouches for every row before it, and a change anywhere breaks the chain from there on.

    genesis ─▶ reserve ─▶ settle ─▶ sent  spent, for ever; digest of what was made; that it left, each time it does
                      ├─▶ void            given back; only the process that reserved it, and only before the first step
                      ├─▶ resume          its process is gone, nothing of it left: another attempt under the same charge
                      └─▶ (crash)         stays reserved = spent
               refuse                     what was asked and denied; costs nothing
               sent                       an answer that no charge covers and that holds nothing of a patient
               rotate                     the next key, signed by the one before: from here on rows carry the new one's
               split                      another ledger began, for patients who are not under this one
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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

from fedmm.errors import FedmmError, LedgerTampered
from fedmm.privacy.accounting import History, Term
from fedmm.privacy.plan import RELATION, Event, Rate

FORMAT = 1
UNIT = "patient"
NO_HASH = "0" * 64
# A signature of this key over one can never be mistaken for one over the other.
SIGNED_AS, STATED_AS = b"fedmm ledger row v1\n", b"fedmm ledger statement v1\n"


class Head(NamedTuple):
    """The last row: enough to see later that the ledger was cut back or replaced."""

    seq: int
    hash: str
    signature: str


class Row(NamedTuple):
    """One line of the ledger.

    ref: the reserve row that a settle or void closes, a resume goes on under, that pays for a sent; else 0.
    at: the clock, for people; order is by seq alone.
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
        """Raises: LedgerTampered."""
        if not is_signed(self.hash, self.signature, key):
            raise tampered(self.seq, "its signature is not this hospital's")

    @property
    def facts(self) -> dict[str, Any]:
        """`note` of the rows that have one. Raises: ValueError, TypeError."""
        facts = json.loads(self.note)
        if canonical(facts) != self.note:
            raise ValueError("its note is not in canonical form")
        return dict(facts)

    @property
    def event(self) -> Event:
        """Raises: PlanInvalid if the row holds none."""
        return Event(self.kind, self.noise_multiplier, Rate(self.sampling_rate), self.steps)


def is_signed(hash: str, signature: str, key: Ed25519PublicKey) -> bool:
    """Is this the signature of a row with this hash? hash, signature: hexadecimal."""
    try:
        raw = bytes.fromhex(signature)
        key.verify(raw, SIGNED_AS + bytes.fromhex(hash))
        return raw.hex() == signature  # capitals and spaces would be another spelling of the same bytes
    except (InvalidSignature, ValueError):
        return False


def sign_statement(facts: Mapping[str, Any], key: Ed25519PrivateKey) -> str:
    """What a ledger says about itself to others, signed as such. Returns hexadecimal."""
    return key.sign(STATED_AS + canonical(facts).encode()).hex()


def statement_is_signed(facts: Mapping[str, Any], signature: str, public_key: str) -> bool:
    """signature, public_key: hexadecimal, from anywhere."""
    try:
        public_from_hex(public_key).verify(bytes.fromhex(signature), STATED_AS + canonical(facts).encode())
    except (InvalidSignature, ValueError):
        return False
    return True


TYPES = (int, str, int, str, float, float, int, str, int, str, str, str, str, str, str, str)


def canonical(facts: Mapping[str, Any]) -> str:
    """One spelling of the same facts."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)


class Sent(NamedTuple):
    """A message that left this hospital. what: its kind.  bytes: of its content.  sha256: of its content.

    charge: the reserve row that paid for it; 0 for an answer that holds nothing of a patient.
    """

    seq: int
    run: str
    round: int
    what: str
    bytes: int
    sha256: str
    charge: int


@dataclass(frozen=True)
class Charged:
    """A reservation and what became of it: reserved, settled or voided.

    made: what `settle` wrote: "sha256" of the release, values that are public once released.
    attempts: how often work began under it.  sent: how often the release has left.
    """

    row: Row
    state: str = "reserved"
    made: dict[str, Any] = field(default_factory=dict)
    attempts: int = 1
    sent: int = 0

    def pay(self, sha256: str) -> Charged:
        """For the one release that it was settled for, as often as it is asked for: the same bytes tell nothing new.
        Raises: ValueError."""
        if self.made.get("sha256") != sha256:
            raise ValueError(f"charge {self.row.seq} does not pay for it")
        return replace(self, sent=self.sent + 1)


@dataclass
class Book:
    """What the rows say together. `add` accepts only the next legal row."""

    genesis: dict[str, Any] = field(default_factory=dict)
    charges: dict[int, Charged] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    refusals: int = 0
    refused: set[tuple[str, str]] = field(default_factory=set)  # kind and plan of each
    is_split: bool = False
    last: Row | None = None
    key: str = ""  # public key that must sign the next row, hexadecimal
    signer: str = ""  # the one that must have signed the last row
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

    def copy(self) -> Book:
        """One to add rows to while this one stays."""
        charges, sent, refused, steps = dict(self.charges), list(self.sent), set(self.refused), dict(self._steps)
        return replace(self, charges=charges, sent=sent, refused=refused, _steps=steps)

    def add(self, row: Row) -> None:
        """Raises: LedgerTampered naming the row if it does not follow from the rows before."""
        head = self.head
        if row.seq != head.seq + 1:
            raise tampered(head.seq + 1, f"it is missing; row {row.seq} follows row {head.seq}")
        if row.prev_hash != head.hash or row.digest() != row.hash:
            raise tampered(row.seq, "its content does not match its hash")
        if (row.type == "genesis") != (row.seq == 1):
            raise tampered(row.seq, "a ledger has one genesis row, the first")
        before = self.key
        try:
            self._apply(row)
        except (FedmmError, ValueError, KeyError, TypeError) as error:
            raise tampered(row.seq, str(error).partition("\n")[0]) from None
        self.signer = before or self.key  # the genesis row is signed by the key that it names
        if row.type == "rotate":  # at once: whoever could forge this row could sign all that follow
            row.check_signature(public_from_hex(self.signer))
        self.last = row

    def _apply(self, row: Row) -> None:
        if row.type == "genesis":
            self.genesis = _read_genesis(row)
            self.key = self.genesis["public_key"]
        elif row.type == "reserve":
            self._count(row.event, 1)
            self.charges[row.seq] = Charged(row)
        elif row.type == "refuse":
            _ = row.event
            self.refusals += 1
            self.refused.add((row.kind, row.plan))
        elif row.type in ("settle", "void"):
            charge = self._charge(row, "reserved")
            state = {"settle": "settled", "void": "voided"}[row.type]
            self.charges[row.ref] = replace(charge, state=state, made=row.facts if row.note else {})
            if row.type == "void":
                self._count(charge.row.event, -1)
        elif row.type == "resume":
            charge = self._charge(row, "reserved")
            self.charges[row.ref] = replace(charge, attempts=charge.attempts + 1)
        elif row.type == "sent":
            payer = self._charge(row, "settled") if row.ref else None
            facts = row.facts
            what, size, sha256 = str(facts["what"]), int(facts["bytes"]), str(facts["sha256"])
            if payer is not None:
                self.charges[row.ref] = payer.pay(sha256)
            self.sent.append(Sent(row.seq, row.run, row.round, what, size, sha256, row.ref))
        elif row.type == "rotate":
            public_from_hex(row.facts["public_key"])
            self.key = row.facts["public_key"]
        elif row.type == "split":
            public_from_hex(row.facts["public_key"])
            self.is_split = True
        else:
            raise ValueError(f"its type {row.type[:20]!r} is unknown")

    def _charge(self, row: Row, state: str) -> Charged:
        charge = self.charges.get(row.ref)
        if charge is None or charge.state != state:
            raise ValueError(f"it refers to row {row.ref}, which is not a charge that is {state}")
        return charge

    def _count(self, event: Event, sign: int) -> None:
        if event.private:
            pair = (event.noise_multiplier, event.sampling_rate)
            self._steps[pair] = self._steps.get(pair, 0) + sign * event.steps


def tampered(seq: int, why: str) -> LedgerTampered:
    """The error for a ledger that was changed from outside."""
    return LedgerTampered(
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
    return Row(1, "genesis", 0, "", 0.0, 0.0, 0, "", 0, code, "", canonical(facts), at, NO_HASH).signed(key)


def _read_genesis(row: Row) -> dict[str, Any]:
    facts = row.facts
    if facts["format"] != FORMAT:
        raise ValueError(f"ledger format {facts['format']} is not {FORMAT}")
    if (facts["unit"], facts["relation"]) != (UNIT, RELATION):
        raise ValueError("it protects another unit or relation")
    public_from_hex(facts["public_key"])
    return facts


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
