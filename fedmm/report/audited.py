"""`audit.json` of `fedmm audit`, believed as far as its own counts carry it: bounds and verdict are computed again from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmm.errors import ConfigError
from fedmm.privacy.audit import SIGNIFICANCE, Guesses, fdp_bound, one_run_bound
from fedmm.privacy.chain import canonical
from fedmm.report import values
from fedmm.report.values import MOST, TWO_DIGITS, down, listed, maybe, number, shown, text, whole

AUDIT_FILE = "audit.json"
MADE_UP = ("dirac", "stranger", "one modality")  # canaries whose number says nothing of the hospital: it was typed
COUNTS, BOUNDS = ("canaries", "guesses", "correct"), ("lower_bound", "fdp_lower_bound")
ONE_DIGIT = 0.1  # of a bound on patients: it follows from counts, and with two digits they would follow from it
MOST_CANARIES = 10**5  # more than any audit has; what a file may make us compute
SAME = 1e-5  # of a bound: bisection ends at 1e-7
CONSISTENT, BROKEN = "consistent", "broken"


def read_audit(path: Path) -> dict[str, Any]:
    """What `fedmm audit` found. path: its folder, or the file.

    verdict: "consistent" only if every check passed and no bound passes the claim.  Counts are null for canaries that are
    relabelled patients: how many there are hangs on how many patients there are.  Bounds are rounded down.
    Raises: ConfigError if it is not there or damaged, or if its numbers do not follow from its counts.
    """
    raw = values.load(path / AUDIT_FILE if path.is_dir() else path)

    def read() -> dict[str, Any]:
        if not all(
            1 <= len(raw[part]) <= MOST for part in ("checks", "views")
        ):  # one more could be the one that failed
            raise ValueError("no check, no view, or too many to read")
        checks, views = [_check(each) for each in listed(raw["checks"])], _views(raw)
        claimed, best = number(raw["claimed_epsilon"]), views[0]
        passed = all(check["passed"] for check in checks) and best["lower_bound"] <= claimed
        verdict = CONSISTENT if passed else BROKEN
        if wrong := _wrong(raw, views, verdict):
            raise ConfigError(f"{path} does not add up", why=wrong, fix="measure it again with: fedmm audit")
        told = [_told(view) for view in views]
        return {
            **{key: text(raw[key]) for key in ("hospital", "fedmm", "date")},
            "real_patients": raw["real_patients"] is not False,
            "settings_sha256": hashlib.sha256(canonical(dict(raw["settings"])).encode()).hexdigest(),
            "claimed_epsilon": claimed,
            "delta": number(raw["delta"]),
            "significance": SIGNIFICANCE,
            "verdict": verdict,
            **told[0],
            "lower_bound": max(view["lower_bound"] for view in told),
            "fdp_lower_bound": max(view["fdp_lower_bound"] for view in told),
            "checks": checks,
            "views": told,
        }

    return values.reading(path, read)


def _check(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": text(raw["name"]),
        "passed": raw["passed"] is True,
        "measured": shown(raw.get("measured")),
        "expected": shown(raw.get("expected")),
        "false_alarm": maybe(raw.get("false_alarm")),
    }


def _views(raw: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """Each onlooker and kind of canary, its bounds as stated and as they follow from the counts; the highest bound first."""
    if number(raw["significance"]) != SIGNIFICANCE:
        raise ValueError("an audit of another kind")
    delta, each = number(raw["delta"]), SIGNIFICANCE / len(raw["views"])  # Bonferroni, as client/audit.py shares it
    views = []
    for view in listed(raw["views"]):
        seen = Guesses(*(whole(view[key], most=MOST_CANARIES) for key in COUNTS))
        views.append(
            {
                "canary": text(view["canary"]),
                "seen_by": text(view["seen_by"]),
                **seen._asdict(),
                "stated": {key: number(view[key]) for key in BOUNDS},
                "lower_bound": one_run_bound(seen, delta=delta, significance=each),
                "fdp_lower_bound": fdp_bound(seen, delta=delta, significance=each),
            }
        )
    return sorted(views, key=lambda view: float(view["lower_bound"]), reverse=True)


def _wrong(raw: Mapping[str, Any], views: Sequence[Mapping[str, Any]], verdict: str) -> str:
    """What of the file does not follow from its checks and counts; empty if all of it does."""
    for view in views:
        if not all(_same(view["stated"][key], view[key]) for key in BOUNDS):
            return f"the bound of {view['canary']}, {view['seen_by']}, is not that of its counts"
    best = views[0]
    if any(raw[key] != best[key] for key in ("canary", "seen_by", *COUNTS)) or not _same(
        raw["lower_bound"], best["lower_bound"]
    ):
        return "its lower bound is not the highest one of its views"
    return "" if raw["verdict"] == verdict else f"its verdict is not the one of its checks and bounds, {verdict}"


def _same(stated: Any, found: float) -> bool:
    return abs(number(stated) - found) <= SAME


def _told(view: Mapping[str, Any]) -> dict[str, Any]:
    """A view as the report has it."""
    made_up = view["canary"] in MADE_UP
    return {
        "canary": view["canary"],
        "seen_by": view["seen_by"],
        **{key: view[key] if made_up else None for key in COUNTS},
        **{key: down(view[key], step=TWO_DIGITS if made_up else ONE_DIGIT) for key in BOUNDS},
    }
