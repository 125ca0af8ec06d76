"""The privacy report's third block: epsilon by round, by run and in total, what is left, and when it will be refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmm.report import page, privacy_plots
from fedmm.report.words import day, up

Document = Mapping[str, Any]
OPEN_TABLE = 12  # guess: a longer table is folded up on the screen; on paper all are open
MOST_LINES = 60  # guess: lines of a table that somebody reads on paper; the JSON has them all


def epsilon(document: Document) -> str:
    title = "3. What was spent, and what is left"
    return page.section(title, _from_ledger(document) if document["ledger"] else _from_statements(document))


def _from_ledger(document: Document) -> str:
    ledger = document["ledger"]
    spent, ceiling, delta = ledger["epsilon"], ledger["ceiling"], ledger["delta"]
    cards = page.cards(
        [
            (
                "Epsilon spent in all",
                up(spent),
                f"of {ceiling:g}, at delta {delta:g}; every run, crash and tuning included",
            ),
            ("Epsilon left", f"{ledger['left']:.2f}", _left(ledger["forecast"])),
            ("Charges", f"{ledger['releases']:,}", _charges(ledger)),
        ]
    )
    alt = f"Epsilon left after each charge: {ledger['left']:.2f} of {ceiling:g} now"
    caption = "The budget of this hospital since its ledger began. Dashed: if all further rounds were like the last one. Dotted: "
    caption += "where a run begins. Nothing refills it: the ceiling holds for ever, over all runs."
    return (
        cards
        + page.figure(privacy_plots.burn_down(ledger, alt=alt), caption)
        + page.heading("By run, failed ones and tuning included")
        + _runs(document)
        + page.heading("By round")
        + _rounds(document)
        + _denied(ledger)
    )


def _left(forecast: Mapping[str, Any] | None) -> str:
    if forecast is None:
        return "nothing was trained yet"
    if forecast["refused_at_round"] is None:
        return f"more than {forecast['rounds_left']:,} rounds like the last one fit"
    text = f"{forecast['rounds_left']:,} more rounds like the last one fit: the ledger would refuse round "
    return f"{text}{forecast['refused_at_round']:,} of run {forecast['run']}, if it went on"


def _charges(ledger: Mapping[str, Any]) -> str:
    return (
        f"with noise; {ledger['reserved']} never settled (a crash: they count all the same), {ledger['resumed']} gone on with, "
        f"{ledger['voided']} given back before the first step; {len(ledger['refusals'])} refused, which costs nothing"
    )


def _runs(document: Document) -> str:
    ledger, here = document["ledger"], document["run"]["name"]
    after = {at["run"]: at["epsilon"] for at in ledger["curve"]}
    rows = [
        (
            str(i),
            f"{run['run'] or '–'}{' (this one)' if run['run'] == here else ''}",
            ", ".join(run["kinds"]),
            day(run["since"]),
            f"{run['releases']:,}",
            f"{run['reserved']:,}",
            f"{run['steps']:,}",
            f"{run['unprotected']:,}",
            f"{run['epsilon_alone']:.6f}",
            f"{after[run['run']]:.6f}" if run["run"] in after and run["releases"] else "–",
        )
        for i, run in enumerate(ledger["runs"], start=1)
    ]
    head = [
        "",
        "run",
        "kinds",
        "since",
        "charges",
        "crashed",
        "steps",
        "without epsilon",
        "epsilon of it alone",
        "in all after it",
    ]
    note = f"At delta {ledger['delta']:g} each. Epsilons do not add up exactly: composition costs less than their sum."
    return page.table(head, rows[:MOST_LINES], left=4) + _cut(rows) + page.note(note)


def _rounds(document: Document) -> str:
    """Along the ledger, computed again from its rows; and of this run, as the ledger stated it at the time."""
    ledger, here = document["ledger"], document["run"]["name"]
    rows = [(at["charge"], at["run"] or "–", at["round"], f"{at['epsilon']:.6f}", at["seq"]) for at in ledger["curve"]]
    head = ["charge", "run", "round", "epsilon, everything before included", "ledger row"]
    table = page.table(head, rows[-MOST_LINES:], left=2)
    some = "" if len(rows) == ledger["releases"] else f"{len(rows)} of {ledger['releases']:,} charges are shown. "
    stated = [(s["round"], f"{s['epsilon']:.6f}") for s in document["run"]["statements"].get(document["hospital"], [])]
    return (
        (table if len(rows) <= OPEN_TABLE else page.details("Epsilon along the ledger, by charge", table))
        + page.note(f"{some}Delta is {ledger['delta']:g} in each line.")
        + page.details(
            f"Epsilon after each round of {here}, as the ledger stated it in its answers",
            page.table(["round", "epsilon, everything before included"], stated),
        )
    )


def _denied(ledger: Mapping[str, Any]) -> str:
    if not (refusals := ledger["refusals"]):
        return page.note("The ledger never refused a charge so far.")
    rows = [(r["seq"], r["run"] or "while planning", r["round"] or "–", day(r["at"])) for r in refusals]
    table = page.table(["ledger row", "run", "round", "when"], rows[-MOST_LINES:], left=0)
    return page.details(f"{len(rows)} refused charges", table + _cut(rows))


def _from_statements(document: Document) -> str:
    rows = [
        (
            entry["hospital"],
            up(entry["epsilon_stated"], 6),
            f"{entry['epsilon']:.6f}",
            f"{entry['ceiling']:g}",
            f"{max(0.0, entry['ceiling'] - entry['epsilon_stated']):.6f}",
            f"{entry['delta']:g}",
            entry["unprotected"],
            len(entry["events"]),
        )
        for entry in document["accounting"]
    ]
    head = [
        "hospital",
        "epsilon in all, as stated",
        "this run alone",
        "ceiling",
        "left",
        "delta",
        "without epsilon",
        "charges seen",
    ]
    series = document["run"]["statements"]
    numbers = sorted({said["round"] for listed in series.values() for said in listed})
    by_round = {name: {said["round"]: said["epsilon"] for said in listed} for name, listed in series.items()}
    shown = [(n, *(f"{by[n]:.6f}" if n in by else "–" for by in by_round.values())) for n in numbers]
    text = (
        "“In all” is what each hospital's own ledger stated in its last answer, signed by it: all runs, crashes and tuning. “This "
        "run alone” is computed here from the plan and the answers that arrived; a charge whose answer was lost is not in it. A "
        "patient of several hospitals is covered by the sum. The burn-down needs the ledger and is in each hospital's report."
    )
    return (
        page.table(head, rows)
        + page.note(text)
        + page.details("Epsilon by round, as stated", page.table(["round", *by_round], shown))
    )


def _cut(rows: Sequence[Any]) -> str:
    more = len(rows) - MOST_LINES
    return page.note(f"{more} more are in the JSON.") if more > 0 else ""
