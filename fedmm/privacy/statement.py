"""What a ledger says to people and programs: `fedmm ledger show` and `export`, and what left the building."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import UNPROTECTED


def export(ledger: Ledger) -> dict[str, Any]:
    """All that anybody needs to recompute epsilon: `events`, every one spent. unprotected: releases without epsilon.

    sent: every message that left, with the digest of its content.
    """
    spent = [event for event in ledger.events() if event["state"] != "voided"]
    return {
        "delta": ledger.spent().delta,
        "events": [event for event in spent if event["kind"] not in UNPROTECTED],
        "unprotected": [event for event in spent if event["kind"] in UNPROTECTED],
        "sent": [message._asdict() for message in ledger.sent()],
    }


def show(ledger: Ledger) -> dict[str, Any]:
    """The ledger in numbers, with all three accountants. by_run: charges.  sent: messages that left, by kind."""
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for event in (event for event in ledger.events() if event["state"] != "voided"):
        run, kind = str(event["run"]), str(event["kind"])
        entry = runs.setdefault((run, kind), {"run": run, "kind": kind, "releases": 0, "reserved": 0, "steps": 0})
        entry["releases"] += 1
        entry["reserved"] += event["state"] == "reserved"
        entry["steps"] += event["steps"]
    head = ledger.head()
    return {
        **asdict(ledger.spent(cross_check=True)),
        "head": {"sequence": head.seq, "hash": head.hash},
        "public_key": ledger.public_key(),
        "by_run": list(runs.values()),
        "sent": _by_kind(ledger),
    }


def _by_kind(ledger: Ledger) -> list[dict[str, Any]]:
    """covered: yes (epsilon pays), no (a research release), needs none (nothing of a patient in it)."""
    paid = {event["seq"]: "no" if event["kind"] in UNPROTECTED else "yes" for event in ledger.events()}
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for message in ledger.sent():
        covered = paid.get(message.charge, "needs none")
        fresh = {"what": message.what, "covered": covered, "messages": 0, "bytes": 0}
        entry = kinds.setdefault((message.what, covered), fresh)
        entry["messages"] += 1
        entry["bytes"] += message.bytes
    return list(kinds.values())
