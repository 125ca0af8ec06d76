"""One self-contained page about a run, for the clinician-researcher and the data protection officer.

RUN/config.json and RUN/run.jsonl in, RUN/report.html out: inline CSS and SVG, no script, nothing fetched, nothing but
what the run folder holds; the same folder gives the same bytes. Read this file first, then scores.py and budget.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from fedmm.errors import REFUSALS
from fedmm.report import budget, page, scores
from fedmm.report.reading import Missed, Run, load_run
from fedmm.report.record import REPORT_FILE, format_seconds

MOST_MISSED = 300  # guess: lines of the table of refusals that somebody reads
PLACES = ("data.hospitals", "federation.out")  # paths on the coordinator's disk say nothing about the training
KINDS = {
    "refused": "its own decision",
    "failed": "its app failed",
    "invalid": "its answer was not usable",
    "silent": "no answer in time",
}


def write_report(folder: Path) -> Path:
    """RUN/report.html from what the run folder holds so far. Raises: ConfigError if it is no run folder, or damaged."""
    run = load_run(folder)
    sections = (
        _header,
        _one_look,
        scores.scores,
        budget.epsilon,
        scores.modalities,
        scores.errors,
        _refusals,
        _training,
        _limits,
    )
    content = page.document(f"fedmm run {run.name}", (section(run) for section in sections))
    target, draft = folder / REPORT_FILE, folder / f".{REPORT_FILE}.{os.getpid()}"
    draft.write_text(content, encoding="utf-8")
    os.replace(draft, target)
    return target


def _header(run: Run) -> str:
    labels, done, planned = run.labels, len(run.rounds), run.plan.rounds
    predicts = [f"{labels.class_name} ({', '.join(labels.class_values)})"] if labels.class_name else []
    predicts += [f"the findings {', '.join(labels.findings)}"] if labels.findings else []
    state = "" if done >= planned else " – unfinished: all below is the state so far"
    facts = [
        ("Run", f"{run.name}, started {run.started}"),
        ("Predicts", " and ".join(predicts)),
        ("Hospitals", f"{len(run.hospitals)}: {', '.join(run.hospitals)}"),
        ("Rounds", f"{done} of {planned}{state}"),
    ]
    if origin := str(run.settings.get("federation.start_from", "")):
        facts.append(("Started from", f"{Path(origin).name}, a model that this run's epsilon does not cover"))
    return f"<header><h1>Federated training report</h1>{budget.promise(run)}{page.facts(facts)}</header>"


def _one_look(run: Run) -> str:
    refused = sorted({m.hospital for m in run.missed if m.kind == "refused"})
    other = sorted({m.hospital for m in run.missed if m.kind != "refused"})
    seconds, rounds = sum(r.seconds for r in run.rounds), len(run.rounds)
    up, down = sum(r.bytes_up for r in run.rounds), sum(r.bytes_down for r in run.rounds)
    each = max(1, rounds)
    cards = [
        *scores.cards(run),
        ("Highest epsilon spent", *budget.highest_epsilon(run)),
        (
            "Hospitals that refused",
            str(len(refused)),
            _few(refused) + (f"; other failures at {_few(other)}" if other else ""),
        ),
        (
            "Sent per round",
            f"{up / each / 1e6:.2f} MB",
            f"from all hospitals together; {down / each / 1e6:.2f} MB to them",
        ),
        ("Duration", format_seconds(seconds), f"{format_seconds(seconds / each)} a round, {rounds} rounds"),
    ]
    return page.section("In one look", page.cards(cards))


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(page.short(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"


def _refusals(run: Run) -> str:
    title = "Refusals and failures"
    if not run.missed:
        text = "None: every hospital took part in every round so far." if run.rounds else "No round is done yet."
        return page.section(title, page.note(text))
    rows = _joined(run.missed)
    text = (
        "The run goes on without the hospital in that round; round 0 is before training, and such a hospital is not in "
    )
    text += "the run at all. A refusal is the hospital's right and costs it no epsilon."
    more = page.note(f"{len(rows) - MOST_MISSED} more are in run.jsonl.") if len(rows) > MOST_MISSED else ""
    shown = page.table(["round", "hospital", "kind", "code", "reason"], rows[:MOST_MISSED], left=5, kind="reasons")
    return page.section(title, page.note(text), shown, more)


def _joined(missed: Iterable[Missed]) -> list[tuple[str, ...]]:
    """Lines of the table; the same in one round after the other is one line."""
    spans: dict[Missed, list[list[int]]] = {}
    for m in missed:
        ranges = spans.setdefault(replace(m, round=0), [])
        if ranges and m.round <= ranges[-1][1] + 1:
            ranges[-1][1] = m.round
        else:
            ranges.append([m.round, m.round])
    lines = [(first, last, m) for m, ranges in spans.items() for first, last in ranges]
    rows: list[tuple[str, ...]] = []
    for first, last, m in sorted(lines, key=lambda line: (line[0], line[1], line[2].hospital)):
        when = str(first) if first == last else f"{first} – {last}"
        error = REFUSALS.get(m.code)
        kind = f"{m.kind}: {KINDS[m.kind]}" if m.kind in KINDS else m.kind
        rows.append((when, m.hospital, kind, f"{m.code} {error('').name}" if error else str(m.code), m.reason))
    return rows


def _training(run: Run) -> str:
    groups: dict[str, list[tuple[str, object]]] = {}
    for key, value in run.settings.items():
        if key not in PLACES:
            shown = str(value).lower() if isinstance(value, bool) else value
            groups.setdefault(key.partition(".")[0], []).append((key, shown))
    tables = "".join(page.table([], rows, left=2) for rows in groups.values())
    return page.section(
        "How it was trained",
        page.heading("Privacy plan") + budget.privacy_plan(run),
        page.heading("What left each hospital") + budget.releases(run),
        page.heading("Settings") + f"<div class=settings>{tables}</div>",
    )


def _limits(run: Run) -> str:
    exact = "This page holds exact counts of held-back patients: handle it as research data."
    items = [
        "Scores are on held-back patients of the same hospitals; another hospital, scanner or time may differ.",
        "Few held-back studies make wide margins: a difference of some hundredths may be chance.",
        "Epsilon is an upper bound per hospital, not a measured leak. For a patient seen in two hospitals they add up.",
        "Epsilon covers what left with noise. Exact scores, and earlier runs without privacy, are outside of it.",
        "Epsilon hides that a patient took part; what is true of patients in general can still be learnt.",
        *([exact] if run.final else []),
        "Not a medical device: not validated for diagnosis, not for clinical decisions.",
    ]
    made = "Made from config.json and run.jsonl of the run folder. This page loads nothing and runs no script."
    return page.section("What this does not show", page.bullets(items)) + f"<footer>{made}</footer>"
