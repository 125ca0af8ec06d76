"""What a copy of a ledger's rows says in numbers: epsilon by charge, by run and in total, and when it will be used up.

The hospital computes this for its report, and whoever checks the report computes it again from the rows inside it: one
function for both, of nothing but the rows, delta and the ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedmm.config import SiteConfig
from fedmm.privacy import accounting, chain, vault
from fedmm.privacy.accounting import History
from fedmm.privacy.chain import TYPES, Book, Charged, Row
from fedmm.privacy.ledger import MAX_FORECAST
from fedmm.privacy.plan import UNPROTECTED, Event

POINTS = 24  # epsilon by charge: PLD takes up to half a second a point (measured), and a line needs no more
AHEAD = 8  # points of the forecast
# (epsilon, delta) pairs that all hold at once: together they bound an attack better than the one pair of the promise
DELTAS = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.4)


def read_rows(hospital: Path, site: SiteConfig) -> list[Row]:
    """All rows of a hospital's ledger, as they are. Raises: LedgerUnusable if there is none or it cannot be read."""
    path = hospital / site.ledger.path
    with vault.as_refusal(path):
        db = vault.unlock(path, hospital=site.hospital.name, create=False)
        try:
            return list(vault.rows(db, after=0))
        finally:
            db.close()


def rows_from(values: Iterable[Sequence[Any]]) -> list[Row]:
    """Rows out of a report. Raises: ValueError for one that has not the form of a row."""
    rows = []
    for each in values:
        if len(each) != len(TYPES) or any(type(v) is not t for v, t in zip(each, TYPES, strict=True)):
            raise ValueError("a row of the ledger has not the form of one")
        rows.append(Row(*each))
    return rows


def book_of(rows: Iterable[Row]) -> Book:
    """What the rows mean, after every hash, transition and signature was checked.

    Raises: LedgerTampered naming the first row that does not follow from those before.
    """
    book = Book()
    for row in rows:
        book.add(row)
        row.check_signature(chain.public_from_hex(book.signer))
    return book


def keys_of(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The ledger's signing keys in turn, with the row that names each: the last one speaks for it now."""
    named = (row for row in rows if row.type in ("genesis", "rotate"))
    return [{"public_key": str(row.facts["public_key"]), "named_by_row": row.seq, "at": row.at} for row in named]


def spending(rows: Sequence[Row], book: Book, *, delta: float, ceiling: float) -> dict[str, Any]:
    """The ledger in numbers, by PLD, as JSON.

    rows, book: `book` is that of `rows`.
    Guarantee: depends on the arguments alone; the same on every machine up to 1e-6.
    """
    charged = list(book.charges.values())
    protected = [charge for charge in book.spent if charge.row.event.private]
    history = book.history
    epsilon = accounting.pld_of(history, delta)
    return {
        "delta": delta,
        "ceiling": ceiling,
        "epsilon": epsilon,
        "epsilon_rdp": accounting.rdp_of(history, delta),
        "left": max(0.0, ceiling - epsilon),
        "releases": len(protected),
        "reserved": sum(charge.state == "reserved" for charge in charged),
        "voided": sum(charge.state == "voided" for charge in charged),
        "resumed": sum(row.type == "resume" for row in rows),
        "not_private": sum(not charge.row.event.private for charge in book.spent),
        "runs": _runs(charged, delta),
        "curve": _curve(protected, delta),
        "refusals": [_place(row) for row in rows if row.type == "refuse"],
        "forecast": _forecast(protected, history, delta=delta, ceiling=ceiling),
        "profile": [{"delta": d, "epsilon": accounting.pld_of(history, d)} for d in sorted({*DELTAS, delta})],
        "keys": keys_of(rows),
        "sent": _sent(book),
    }


def events(book: Book, *, protected: bool) -> list[dict[str, Any]]:
    """Every charge that counts, crashed ones too, as `fedmm ledger export` gives it; protected or not by an epsilon."""
    return [
        {**_place(charge.row), **charge.row.event.to_dict(), "state": charge.state}
        for charge in book.spent
        if charge.row.event.private == protected
    ]


def _place(row: Row) -> dict[str, Any]:
    return {"seq": row.seq, "run": row.run, "round": row.round, "at": row.at}


def _epsilon(charges: Iterable[Charged], delta: float) -> float:
    return accounting.epsilon_pld([charge.row.event for charge in charges], delta)


def _runs(charged: Sequence[Charged], delta: float) -> list[dict[str, Any]]:
    """Every run that was ever charged here, in order: failed ones and those that only tuned a setting are among them."""
    found: dict[str, list[Charged]] = {}
    for charge in charged:
        found.setdefault(charge.row.run, []).append(charge)
    listed = []
    for run, own in found.items():
        counted = [charge for charge in own if charge.state != "voided" and charge.row.event.private]
        kinds = list(dict.fromkeys(charge.row.kind for charge in own))
        listed.append(
            {
                "run": run,
                "kinds": kinds,
                "first_seq": own[0].row.seq,
                "since": own[0].row.at,
                "releases": len(counted),
                "settled": sum(charge.state == "settled" for charge in counted),
                "reserved": sum(charge.state == "reserved" for charge in counted),
                "voided": sum(charge.state == "voided" for charge in own),
                "steps": sum(charge.row.steps for charge in counted),
                "unprotected": sum(charge.row.kind in UNPROTECTED and charge.state != "voided" for charge in own),
                "epsilon_alone": _epsilon(counted, delta),
            }
        )
    return listed


def _curve(protected: Sequence[Charged], delta: float) -> list[dict[str, Any]]:
    """Epsilon of the first n charges, at the first and last of each run and evenly between, POINTS or a few more."""
    number = len(protected)
    edges = [
        n for n in range(1, number + 1) if n == number or protected[n - 1].row.run != protected[n].row.run
    ]  # the last charge of each run
    even = {round(1 + i * (number - 1) / (POINTS - 1)) for i in range(POINTS)} if number else set()
    shown = sorted(even | set(edges[-POINTS:]))
    return [
        {"charge": n, **_place(protected[n - 1].row), "epsilon": _epsilon(protected[:n], delta)}
        for n in shown
        if 1 <= n <= number
    ]


def _forecast(protected: Sequence[Charged], history: History, *, delta: float, ceiling: float) -> dict[str, Any] | None:
    """How many rounds like the last one still fit, as `fedmm ledger forecast` counts them; None before the first one.

    refused_at_charge, refused_at_round: the first that will be refused; None where more fit than a run may have.
    """
    trained = [charge for charge in protected if charge.row.kind == "train"]
    if not trained:
        return None
    last = trained[-1].row
    left = accounting.room(history, last.event, delta, ceiling=ceiling, most=MAX_FORECAST)
    ahead = sorted({round(left * ((i + 1) / AHEAD) ** 2) for i in range(AHEAD)} - {0})  # it bends most at first
    spent = [charge.row.event for charge in protected]
    more = {n: [*spent, Event("train", last.noise_multiplier, last.event.sampling_rate, n * last.steps)] for n in ahead}
    ends = left < MAX_FORECAST
    return {
        "like": last.event.to_dict(),
        "run": last.run,
        "after_round": last.round,
        "rounds_left": left,
        "refused_at_charge": len(protected) + left + 1 if ends else None,
        "refused_at_round": last.round + left + 1 if ends else None,
        "path": [
            {"charge": len(protected) + n, "epsilon": accounting.epsilon_pld(more[n], delta)} for n in ahead if ends
        ],
    }


def _sent(book: Book) -> list[dict[str, Any]]:
    """Messages that left, by kind. covered: yes, no, or needs none; as `fedmm ledger show`."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for message in book.sent:
        payer = book.charges.get(message.charge)
        covered = "needs none" if payer is None else "yes" if payer.row.event.private else "no"
        fresh = {"what": message.what, "covered": covered, "messages": 0, "bytes": 0}
        entry = found.setdefault((message.what, covered), fresh)
        entry["messages"] += 1
        entry["bytes"] += message.bytes
    return list(found.values())


# --- what it means for one patient ------------------------------------------------------------------------------------

BELIEFS = (0.5, 0.1, 0.01, 0.001)
FALSE_ALARMS = (0.001, 0.01, 0.05, 0.1)


def odds(epsilon: float, delta: float, profile: Sequence[dict[str, float]] = ()) -> dict[str, Any]:
    """What an observer can gain at most about one patient.

    beliefs: what was thought possible before, and where it can move at most, up and down (odds times or over e^epsilon).
    power: at most this share of patients found, if this share of the others is taken for patients too: the least of
    e^epsilon x + delta and 1 - e^-epsilon (1 - x - delta) over all pairs that hold (Kairouz, Oh, Viswanath 2015, thm 2.1).
    """
    pairs = [(epsilon, delta), *((pair["epsilon"], pair["delta"]) for pair in profile)]
    return {
        "epsilon": epsilon,
        "delta": delta,
        "factor": math.exp(min(epsilon, 700.0)),
        "beliefs": [{"before": p, "at_most": moved(p, epsilon), "at_least": moved(p, -epsilon)} for p in BELIEFS],
        "power": [{"false_alarm": x, "found_at_most": most_found(x, pairs)} for x in FALSE_ALARMS],
    }


def moved(belief: float, epsilon: float) -> float:
    """A belief whose odds are multiplied with e^epsilon, without overflow. belief: in (0, 1)."""
    return 1 / (1 + (1 - belief) / belief * math.exp(min(700.0, max(-700.0, -epsilon))))


def most_found(false_alarm: float, pairs: Iterable[tuple[float, float]]) -> float:
    """The largest true positive rate at this false positive rate that every (epsilon, delta) pair allows."""
    bound = 1.0
    for epsilon, delta in pairs:
        grown = math.exp(min(epsilon, 700.0)) * false_alarm + delta
        bound = min(bound, grown, 1 - math.exp(-min(epsilon, 700.0)) * (1 - false_alarm - delta))
    return bound
