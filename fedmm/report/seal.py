"""Signed and sealed: the report's JSON and its page as files, and the check of either without the hospital.

    {"document": …, "signature": {"algorithm", "public_key", "head", "document_sha256", "page_sha256", "value"} or null}

The page holds this JSON in a block that no browser runs. The signature is Ed25519, with the ledger's key, over the SHA-256
of the document and of the page around that block, and the ledger's head: one changed byte of either file is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fedmm.config import load_site
from fedmm.errors import FedmmError, LedgerTampered, LedgerUnusable
from fedmm.privacy import accounting, chain, roster
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import Event
from fedmm.report import spending
from fedmm.report.deployment import registry
from fedmm.report.disclosure import FORMAT, LEDGER, VERSION, digest_of, drawn_with

OPEN, CLOSE = '<script type="application/json" id="privacy-report">', "</script>"
BEFORE = "</body>"
INTEGRITY = ("signature", "document", "page", "ledger", "key")
CLOSE_ENOUGH = 1e-6  # of an epsilon that is computed again
Draw = Callable[[Mapping[str, Any], str], str]  # document and its SHA-256 to a page without the block


class Check(NamedTuple):
    """One question that was asked of a report. passed: None where it could not be asked."""

    name: str
    passed: bool | None
    text: str


def seal(document: Mapping[str, Any], draw: Draw, *, hospital: Path | None) -> tuple[str, str]:
    """JSON and HTML, as they are written. hospital: whose ledger signs; None leaves it unsigned.

    Raises: LedgerUnusable if the ledger went on meanwhile, or is not the one in the document.
    """
    page = draw(document, digest_of(document))
    signature = _sign(document, page, hospital) if hospital else None
    text = chain.canonical({"document": document, "signature": signature})
    at = page.rindex(BEFORE)
    block = OPEN + _inside(text) + CLOSE
    return text + "\n", page[:at] + block + page[at:]


def _sign(document: Mapping[str, Any], page: str, hospital: Path) -> dict[str, Any]:
    head = _head(document)
    signature: dict[str, Any] = {
        "algorithm": "Ed25519",
        "head": head,
        "document_sha256": digest_of(document),
        "page_sha256": _sha256(page),
    }
    with Ledger.open(hospital, load_site(hospital), create=False) as ledger:
        if ledger.head()[:2] != (head["sequence"], head["hash"]):
            raise LedgerUnusable("the ledger went on while the report was made", fix="make the report again")
        return {**signature, "public_key": ledger.public_key(), "value": ledger.sign(_signed(signature))}


def _signed(signature: Mapping[str, Any]) -> dict[str, Any]:
    """What the signature is under; the name keeps it apart from every other statement of a ledger."""
    keys = ("algorithm", "head", "document_sha256", "page_sha256")
    return {"what": FORMAT, "version": VERSION, **{key: signature[key] for key in keys}}


def _head(document: Mapping[str, Any]) -> dict[str, Any]:
    row = spending.rows_from(document["ledger"]["rows"][-1:])[0]
    return {"sequence": row.seq, "hash": row.hash}


def _inside(text: str) -> str:
    """JSON that cannot end the block it stands in."""
    return text.replace("<", "\\u003c")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- checking ---------------------------------------------------------------------------------------------------------


def verify(path: Path, draw: Draw, *, key: str = "", today: date | None = None) -> list[Check]:
    """Everything that can be checked without the hospital. path: the .json or the .html of a report.

    key: what is known of the hospital from elsewhere: its public key, or a ledger head as SEQUENCE:HASH.
    Guarantee: never raises for what is in the file; a report is good if no check has failed.
    Raises: OSError if it cannot be read.
    """
    try:
        text, page = _parts(path.read_bytes())
        sealed = json.loads(text)
        if chain.canonical(sealed) != text or set(sealed) != {"document", "signature"}:
            raise ValueError("it is not in canonical form: something was added, removed or respelt")
        document, signature = sealed["document"], sealed["signature"]
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise ValueError("it is of another version of fedmm")
        if signature is None:
            return [Check("signature", False, "unsigned: nobody vouches for it, and nothing below can be checked")]
    except _BROKEN as error:
        return [Check("form", False, _why(error))]
    done: list[Check] = []
    try:
        for check in _checks(document, signature, page, draw, key=key, today=today or datetime.now(UTC).date()):
            done.append(check)
            if check.name in INTEGRITY and check.passed is False:  # what follows would be about somebody's invention
                break
    except _BROKEN as error:
        done.append(Check("form", False, _why(error)))
    return done


_BROKEN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, MemoryError, FedmmError)


def _why(error: Exception) -> str:
    if isinstance(error, FedmmError):
        return f"{error.what}{': ' if error.why else ''}{error.why}"
    return str(error) if type(error) is ValueError else f"it has not the form of a report ({type(error).__name__})"


def _parts(content: bytes) -> tuple[str, str | None]:
    """The JSON, and the page around it if it is one. Raises: ValueError."""
    text = content.decode("utf-8")
    if text.startswith("{"):
        if not text.endswith("}\n"):
            raise ValueError("it does not end where a report ends")
        return text[:-1], None
    if text.count(OPEN) != 1:
        raise ValueError("it is neither the JSON nor the page of a privacy report")
    start = text.index(OPEN)
    end = text.index(CLOSE, start)
    inside, page = text[start + len(OPEN) : end], text[:start] + text[end + len(CLOSE) :]
    found = inside.replace("\\u003c", "<")
    if _inside(found) != inside or page.rindex(BEFORE) != start:
        raise ValueError("the JSON inside the page was respelt or moved")
    return found, page


def _checks(
    document: Mapping[str, Any], signature: Mapping[str, Any], page: str | None, draw: Draw, *, key: str, today: date
) -> Iterator[Check]:
    """The checks in turn; whatever is not of the expected form raises."""
    public = str(signature["public_key"])
    signed = set(signature) == {*_signed(signature), "public_key", "value"} - {"what", "version"}
    signed = signed and chain.statement_is_signed(_signed(signature), str(signature["value"]), public)
    signed = signed and bytes.fromhex(signature["value"]).hex() == signature["value"]
    yield Check("signature", signed, "Ed25519, by the key below" if signed else "it is not this key's")
    same = signature["document_sha256"] == digest_of(document)
    yield Check("document", same, f"SHA-256 {digest_of(document)}" if same else "its content was changed")
    if page is not None:
        unchanged = _sha256(page) == signature["page_sha256"]
        yield Check("page", unchanged, "what was signed" if unchanged else "it was changed after it was signed")
    rows = spending.rows_from(document["ledger"]["rows"])
    book = spending.book_of(rows)
    owner = book.genesis["hospital"] == document["hospital"] and _head(document) == signature["head"]
    yield Check("ledger", owner, f"{len(rows)} rows, every hash and signature" if owner else "it is another ledger's")
    yield Check(
        "key",
        book.key == public,
        f"{public} (fingerprint {fingerprint(public)}), named by the ledger's own chain"
        if book.key == public
        else "the signing key is not the one that the ledger's chain names",
    )
    yield _known(key, rows, public)
    yield _recomputed(document, rows, book)
    yield _drawn(document, signature, draw)
    expires = date.fromisoformat(document["made"]["expires"])
    yield Check("expiry", today <= expires, f"holds until {expires.isoformat()}, today is {today.isoformat()}")


def fingerprint(public_key: str) -> str:
    """Short enough to be read out on the telephone: the first 16 bytes of the SHA-256 of the public key."""
    digest = hashlib.sha256(bytes.fromhex(public_key)).hexdigest()[:32]
    return " ".join(digest[i : i + 4] for i in range(0, 32, 4))


def _known(key: str, rows: Sequence[chain.Row], public: str) -> Check:
    """Against what is known from elsewhere."""
    if not key:
        text = "not compared: give --key what you know of this hospital, or read the fingerprint to it"
        return Check("hospital", None, text)
    if ":" in key:
        number, _, start = key.partition(":")
        found = [row for row in rows if str(row.seq) == number and len(start) >= 16 and row.hash.startswith(start)]
        return Check("hospital", bool(found), "the head you know is in its ledger" if found else "no such row in it")
    if key.lower() == public:
        return Check("hospital", True, "the key is the one you know")
    old = [each for each in spending.keys_of(rows) if each["public_key"] == key.lower()]
    why = f"it was replaced after row {old[0]['named_by_row']}: compare the new one" if old else "another key"
    return Check("hospital", False, f"the key is not the one you know: {why}")


def _recomputed(document: Mapping[str, Any], rows: Sequence[chain.Row], book: chain.Book) -> Check:
    """Every number about epsilon, from the rows; then the total once more, from the listed events alone."""
    ledger, (entry,) = document["ledger"], document["accounting"]
    delta, ceiling = float(ledger["delta"]), float(ledger["ceiling"])
    again = spending.spending(rows, book, delta=delta, ceiling=ceiling)
    wrong = [name for name, value in again.items() if not _near(ledger.get(name), value)]
    history = accounting.merge(Event.from_dict({k: e[k] for k in Event.__dataclass_fields__}) for e in entry["events"])
    total = accounting.pld_of(history, delta)
    rules = document["policy"]["privacy"]
    bare = spending.events(book, protected=False)
    wrong += ["events"] * (entry["events"] != spending.events(book, protected=True))
    wrong += ["unprotected"] * (ledger["unprotected"] != bare or entry["unprotected"] != len(bare))
    wrong += ["accounting"] * (
        not _near(entry["epsilon"], total) or not _near(entry["epsilon_rdp"], again["epsilon_rdp"])
    )
    wrong += ["accounting"] * ((entry["hospital"], entry["scope"]) != (document["hospital"], LEDGER))
    wrong += ["policy"] * any(
        (each["delta"], limit) != (delta, ceiling)
        for each, limit in ((entry, entry["ceiling"]), (rules, rules["epsilon"]))
    )
    wrong += ["odds"] * (not _near(document["odds"], spending.odds(again["epsilon"], delta, again["profile"])))
    text = f"{total:.6f} at delta {delta:g}, by PLD from {len(entry['events'])} events, as stated"
    return Check("epsilon", not wrong, text if not wrong else f"another result for {', '.join(dict.fromkeys(wrong))}")


def _near(stated: Any, found: Any) -> bool:
    """The same JSON, numbers up to CLOSE_ENOUGH (or that share of them)."""
    if isinstance(found, float) and isinstance(stated, int | float):
        return abs(stated - found) <= CLOSE_ENOUGH * max(1.0, abs(found))
    if isinstance(found, dict) and isinstance(stated, dict):
        return set(found) == set(stated) and all(_near(stated[key], value) for key, value in found.items())
    if isinstance(found, list) and isinstance(stated, list):
        return len(found) == len(stated) and all(map(_near, stated, found))
    return type(stated) is type(found) and bool(stated == found)


def _drawn(document: Mapping[str, Any], signature: Mapping[str, Any], draw: Draw) -> Check:
    """Is the page that was signed what the JSON says? Only the program that drew it can tell to the byte."""
    if document["made"]["drawn_with"] != drawn_with():
        text = f"not drawn again: {document['made']['drawn_with']} drew it, here is {drawn_with()}"
        return Check("drawing", None, text)
    same = _sha256(draw(document, digest_of(document))) == signature["page_sha256"]
    if document["registry"] != registry(document):
        return Check("drawing", False, "the registry's fields say something else than the rest of the JSON")
    return Check("drawing", same, "the page is what the JSON says" if same else "the page says something else")


def compare(path: Path, hospital: Path) -> list[Check]:
    """A good report beside the ledger that it is about: is its head still in it, and are the patients the same?

    For the hospital itself; `verify` comes first. Raises: as Ledger.open where there is no ledger.
    """
    document = json.loads(_parts(path.read_bytes())[0])["document"]
    site = load_site(hospital)
    last = spending.rows_from(document["ledger"]["rows"][-1:])[0]
    with Ledger.open(hospital, site, create=False) as ledger:
        try:
            ledger.verify(against=[chain.Head(last.seq, last.hash, last.signature)])
            since = ledger.head().seq - last.seq
            here = Check("at home", True, f"the report's head is in this ledger, {since} rows came since")
        except LedgerTampered as error:
            here = Check("at home", False, _why(error))
    found = document["ledger"]["fingerprint"]
    opened = roster.commitment(hospital / site.ledger.path, bytes.fromhex(found["nonce"]))
    same = opened is not None and opened == found["commitment"]
    text = "the same as when it was made" if same else "not the same list: others came since, or it is another one"
    return [here, Check("patients", True if same else None, text)]
