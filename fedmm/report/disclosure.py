"""The privacy report as a document: everything that the page shows, as JSON, from run folder, ledger and policy alone.

Two kinds: of one hospital, from its own ledger, to be signed with its key (`of_hospital`); and of the coordinator, from
what the ledgers said in their answers, unsigned (`of_run`). No patient, no path. The number of patients is not stated, but for
the public lower bound of site.toml; audit, attacks and scores, where they are in it, narrow it down.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedmm.config import SiteConfig, installed_version, load_site
from fedmm.errors import ConfigError
from fedmm.privacy import accounting, chain, roster
from fedmm.privacy.chain import Head
from fedmm.privacy.crosscheck import prv_of
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import Event, PrivacyPlan
from fedmm.report import audited, evidence, spending
from fedmm.report.deployment import CONFORMS_TO, registry
from fedmm.report.reading import HISTOGRAM, UPDATE, Run, Statement, load_run

FORMAT, VERSION = "fedmm privacy report", 1
VALID_DAYS = 365
LEDGER, STATEMENTS = "everything this ledger ever charged", "this run alone, from the coordinator's records"


@dataclass(frozen=True)
class Sources:
    """What a report is made of besides ledgers. folder: of the run.  now: when it is made.  days: how long it holds."""

    folder: Path
    audit: Path | None = None
    compare: Path | None = None
    days: int = VALID_DAYS
    now: datetime | None = None


def of_hospital(sources: Sources, hospital: Path) -> dict[str, Any]:
    """The document of one hospital, made where its ledger is.

    Raises: ConfigError if it took no part in the run or a file is damaged; LedgerUnusable or LedgerTampered if the ledger
    is not intact or is not the one that trained; PolicyRefused without a site.toml.
    """
    run, site = load_run(sources.folder), load_site(hospital)
    name = site.hospital.name
    if name not in run.hospitals:
        raise ConfigError(f"{name} took no part in {sources.folder}", fix="give a run that it was in")
    with Ledger.open(hospital, site, create=False) as ledger:
        ledger.verify(against=_heads(run, name))
        rows = spending.read_rows(hospital, site)
    book = spending.book_of(rows)
    rules = site.privacy
    spent = spending.spending(rows, book, delta=rules.delta, ceiling=rules.epsilon)
    paid = spending.events(book, protected=True)
    bare = spending.events(book, protected=False)
    nonce = secrets.token_bytes(16)
    entry = {
        "hospital": name,
        "scope": LEDGER,
        "delta": rules.delta,
        "ceiling": rules.epsilon,
        "epsilon": spent["epsilon"],
        "epsilon_rdp": spent["epsilon_rdp"],
        "epsilon_prv": prv_of(book.history, rules.delta),
        "unprotected": len(bare),
        "events": paid,
    }
    return _document(
        sources,
        run,
        hospital=name,
        accounting=[entry],
        policy=_policy(site),
        ledger={
            **spent,
            "unprotected": bare,
            "rows": [list(row) for row in rows],
            "fingerprint": {
                "nonce": nonce.hex(),
                "commitment": roster.commitment(hospital / site.ledger.path, nonce),
            },
        },
        odds=spending.odds(spent["epsilon"], rules.delta, spent["profile"]),
        attacks=evidence.read_attacks(sources.folder, name),
    )


def of_run(sources: Sources) -> dict[str, Any]:
    """The document that the coordinator can make: what each ledger stated, and what this run's plan costs. Unsigned."""
    run = load_run(sources.folder)
    entries = [_stated(run, name, said) for name, said in run.statements.items()]
    worst = max(run.statements.values(), key=lambda said: said.spent, default=None)
    attacks = {name: found for name in run.hospitals if (found := evidence.read_attacks(sources.folder, name))}
    return _document(
        sources,
        run,
        hospital=None,
        accounting=entries or [_nothing(run)],
        policy=None,
        ledger=None,
        odds=spending.odds(worst.spent, worst.delta) if worst else spending.odds(0.0, run.plan.delta),
        attacks=None,
        attacks_by_hospital=attacks,
    )


def _document(sources: Sources, run: Run, **parts: Any) -> dict[str, Any]:
    now = (sources.now or datetime.now(UTC)).replace(microsecond=0)
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "made": {
            "at": now.isoformat(),
            "by": f"fedmm {installed_version()}",
            "expires": (now + timedelta(days=sources.days)).date().isoformat(),
            "drawn_with": drawn_with(),
        },
        "conforms_to": list(CONFORMS_TO),
        "run": _run(run),
        "plan": run.plan.to_flat(),
        "audit": audited.read_audit(sources.audit) if sources.audit else None,
        "utility": evidence.utility(run, sources.folder, compare=sources.compare),
        "attacks_by_hospital": {},
        **parts,
    }
    return {**document, "registry": registry(document)}


def drawn_with() -> str:
    """Whose figures the page has: another version may draw the same numbers in other strokes."""
    import matplotlib

    return f"fedmm {installed_version()}, matplotlib {matplotlib.__version__}"


def _run(run: Run) -> dict[str, Any]:
    labels = run.labels
    return {
        "name": run.name,
        "started": run.started,
        "private": run.private,
        "hospitals": list(run.hospitals),
        "rounds_done": len(run.rounds),
        "rounds_planned": run.plan.rounds,
        "predicts": [*labels.findings, *([labels.class_name] if labels.class_name else [])],
        "trained": {name: sum(name in r.trained for r in run.rounds) for name in run.hospitals},
        "missed": [{"round": m.round, "hospital": m.hospital, "kind": m.kind, "code": m.code} for m in run.missed],
        "settings": {
            key: value
            for key, value in run.settings.items()
            if key.startswith(("privacy.", "training.clip", "federation.weights", "federation.strategy"))
        },
        "statements": {name: [_said(s) for s in _series(run, name)] for name in run.statements},
        "arrived": _arrived(run),
    }


def _series(run: Run, name: str) -> list[Statement]:
    return [r.statements[name] for r in run.rounds if name in r.statements]


def _said(said: Statement) -> dict[str, Any]:
    return {
        "round": said.round,
        "epsilon": said.spent,
        "ceiling": said.ceiling,
        "delta": said.delta,
        "unprotected": said.unprotected,
        "head": {"sequence": said.sequence, "hash": said.hash},
        "public_key": said.key,
    }


def _arrived(run: Run) -> list[dict[str, Any]]:
    """What reached the coordinator: messages and bytes by hospital and kind."""
    found: dict[tuple[str, str], list[int]] = {}
    for message in run.arrived:
        found.setdefault((message.hospital, message.what), []).append(message.bytes)
    return [{"hospital": h, "what": w, "messages": len(b), "bytes": sum(b)} for (h, w), b in found.items()]


def _heads(run: Run, name: str) -> list[Head]:
    return [Head(said.sequence, said.hash, said.signature) for said in _series(run, name)]


def _policy(site: SiteConfig) -> dict[str, Any]:
    """What site.toml decides about privacy; not where things lie."""
    return {
        "privacy": site.privacy.model_dump(mode="json"),
        "release": site.release.model_dump(mode="json"),
        "runs": {"kinds": list(site.runs.kinds), "min_patients": site.runs.min_patients},
    }


# --- the coordinator's side -------------------------------------------------------------------------------------------


def _stated(run: Run, name: str, said: Statement) -> dict[str, Any]:
    """What a hospital's rounds in this run cost by plan; its whole ledger is in what it stated."""
    paid = _paid(run, name)
    history = accounting.merge(Event.from_dict({k: e[k] for k in Event.__dataclass_fields__}) for e in paid)
    return {
        "hospital": name,
        "scope": STATEMENTS,
        "delta": said.delta,
        "ceiling": said.ceiling,
        "epsilon": accounting.pld_of(history, said.delta),
        "epsilon_rdp": accounting.rdp_of(history, said.delta),
        "epsilon_prv": prv_of(history, said.delta),
        "epsilon_stated": said.spent,
        "unprotected": said.unprotected,
        "events": paid,
    }


def _paid(run: Run, name: str) -> list[dict[str, Any]]:
    """Events of this run whose releases reached the coordinator. A charge whose answer was lost is not among them."""
    found = []
    for r in run.rounds:
        kinds = [a.what for a in r.arrived if a.hospital == name]
        events: Sequence[Event | None] = [
            run.plan.round_event(r.number) if run.private and UPDATE in kinds else None,
            run.plan.evaluation_event() if HISTOGRAM in kinds else None,
        ]
        found += [{**event.to_dict(), "run": run.name, "round": r.number} for event in events if event]
    return found


def _nothing(run: Run) -> dict[str, Any]:
    """No hospital has stated anything: nothing was spent as far as anybody here knows."""
    plan: PrivacyPlan = run.plan
    return {
        "hospital": "none yet",
        "scope": STATEMENTS,
        "delta": plan.delta,
        "ceiling": plan.epsilon,
        **dict.fromkeys(("epsilon", "epsilon_rdp", "epsilon_prv", "epsilon_stated"), 0.0),
        "unprotected": 0,
        "events": [],
    }


def digest_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of the document's canonical JSON, hexadecimal: what is signed, and what the page shows."""
    import hashlib

    return hashlib.sha256(chain.canonical(document).encode()).hexdigest()
