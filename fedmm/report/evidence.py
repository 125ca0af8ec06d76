"""What was measured and not proved: the audit, the attacks, and what privacy costs in accuracy; read with care, as JSON.

Counts of patients are left out on the way: of members, candidates and held-back patients only shares and intervals stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedmm.errors import ConfigError
from fedmm.report.reading import Estimate, Run, Score, load_run

AUDIT_FILE = "audit.json"
LONGEST = 200  # characters of a text that came from a file
MOST = 200  # lines of a list that came from a file
Read = TypeVar("Read")


def read_audit(path: Path) -> dict[str, Any]:
    """What `fedmm audit` found. path: its folder, or the file. Raises: ConfigError if it is not there or damaged."""
    raw = _load(path / AUDIT_FILE if path.is_dir() else path)

    def read() -> dict[str, Any]:
        return {
            **{key: _number(raw[key]) for key in ("lower_bound", "claimed_epsilon", "delta", "significance")},
            **{key: _whole(raw[key]) for key in ("canaries", "guesses", "correct")},
            "fdp_lower_bound": _maybe(raw.get("fdp_lower_bound")),
            "verdict": "consistent" if raw["verdict"] == "consistent" else "broken",
            "checks": [
                {
                    "name": _text(check["name"]),
                    "passed": check["passed"] is True,
                    "measured": _shown(check.get("measured")),
                    "expected": _shown(check.get("expected")),
                    "false_alarm": _maybe(check.get("false_alarm")),
                }
                for check in _list(raw.get("checks"))
            ],
            "views": [
                {
                    "canary": _text(view["canary"]),
                    "seen_by": _text(view["seen_by"]),
                    **{key: _whole(view[key]) for key in ("canaries", "guesses", "correct")},
                    "lower_bound": _number(view["lower_bound"]),
                    "fdp_lower_bound": _maybe(view.get("fdp_lower_bound")),
                }
                for view in _list(raw.get("views"))
            ],
            "date": _text(raw.get("date", "")),
            "fedmm": _text(raw.get("fedmm", "")),
        }

    return _read(path, read)


def read_attacks(run: Path, hospital: str) -> dict[str, Any] | None:
    """What `fedmm attack` found at a hospital; None if nothing was measured. Raises: ConfigError for a damaged file."""
    path = run / f"attack-{hospital}.json"
    if not path.exists():
        return None
    raw = _load(path)
    if raw.get("hospital") != hospital:
        raise ConfigError(f"{path.name} is about another hospital", fix="measure it again with: fedmm attack")

    def read() -> dict[str, Any]:
        control = raw.get("control")
        return {
            "run": _text(raw.get("run", "")),
            "date": _text(raw.get("date", "")),
            "private": raw.get("private") is True,
            **_attacks(raw),
            "control": _attacks(control) if control else None,
        }

    return _read(path, read)


def _attacks(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "membership": [
            {
                "attack": _text(each["attack"]),
                "modality": _text(each["modality"]),
                "auc": _interval(each["auc"]),
                "tpr": [
                    {"false_alarm": _number(float(rate)), **_interval(found)}
                    for rate, found in sorted(each["tpr"].items(), key=lambda item: float(item[0]))
                ],
            }
            for each in _list(raw.get("membership"))
        ],
        "relinkage": [
            {
                "from": _text(each["from"]),
                "to": _text(each["to"]),
                **{key: _interval(each[key]) for key in ("top1", "top5")},
                # one digit: chance is one over the number of candidates, and that is a number of patients
                **{key: float(f"{_number(each[key]):.0e}") for key in ("chance_top1", "chance_top5")},
            }
            for each in _list(raw.get("relinkage"))
        ],
        "inversion": [
            {"what": _text(each["what"]), **_interval(each), "baseline": _maybe(each.get("baseline"))}
            for each in _list(raw.get("inversion"))
        ],
    }


# --- accuracy ---------------------------------------------------------------------------------------------------------


def utility(run: Run, folder: Path, *, compare: Path | None = None) -> dict[str, Any]:
    """Scores of the run by hospital and by subset of modalities; by group where RUN/evaluate*.json has them; against
    the scores of an open run where one is given. Raises: ConfigError for a damaged file, or a run that was private.
    """
    other = load_run(compare) if compare else None
    if other is not None and other.private:
        raise ConfigError(f"{other.name} was trained with privacy", fix="--compare takes a run without")
    return {
        "round": run.scored[-1].number if run.scored else run.noisy.number if run.noisy else None,
        "hospitals": _scores(run),
        "withheld": run.withheld,
        "compared_with": None if other is None else {"run": other.name, "hospitals": _scores(other)},
        "groups": [group for name in run.hospitals for group in _groups(folder, name)],
    }


def _scores(run: Run) -> list[dict[str, Any]]:
    exact = [{"hospital": name, "kind": "exact", **_exact(score)} for name, score in run.final.items()]
    noisy: list[dict[str, Any]] = [
        {
            "hospital": name,
            "kind": "noisy",
            "mean_auroc": _estimate(score.mean_auroc),
            "accuracy": _estimate(score.accuracy),
            "majority": None,
            "subsets": [],
        }
        for name, score in (run.noisy.noisy if run.noisy else {}).items()
    ]
    return [*exact, *noisy]


def _exact(score: Score) -> dict[str, Any]:
    return {
        "mean_auroc": _point(score.overall.mean_auroc),
        "accuracy": _point(score.overall.accuracy),
        "majority": score.majority,
        "subsets": [
            {"given": name, "mean_auroc": part.mean_auroc, "accuracy": part.accuracy}
            for name, (_, part) in score.subsets.items()
        ],
    }


def _groups(folder: Path, hospital: str) -> list[dict[str, Any]]:
    """Scores by sex, age and so on, of a file that `fedmm evaluate --format json` wrote and somebody put here."""
    path = folder / f"evaluate-{hospital}.json"
    if not path.exists():
        return []
    raw = _load(path)

    def read() -> list[dict[str, Any]]:
        sure = raw.get("intervals", {}).get("by_group", {})
        found = []
        for kind, values in raw.get("by_group", {}).items():
            for value, part in values.items():
                ends = sure.get(kind, {}).get(value) or [None, None]
                known = not part.get("too_few")
                found.append(
                    {
                        "hospital": hospital,
                        "kind": _text(kind),
                        "group": _text(value),
                        "mean_auroc": {
                            "value": _maybe(part.get("mean_auroc")) if known else None,
                            "low": _maybe(ends[0]) if known else None,
                            "high": _maybe(ends[1]) if known else None,
                        },
                        "accuracy": _maybe(part.get("accuracy")) if known else None,
                    }
                )
        return found[:MOST]

    return _read(path, read)


def _point(value: float | None) -> dict[str, float | None]:
    return {"value": value, "low": None, "high": None}


def _estimate(e: Estimate) -> dict[str, float | None]:
    return {"value": e.value, "low": e.low, "high": e.high}


# --- any JSON in, plain values out ------------------------------------------------------------------------------------


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("no object")
        return raw
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read", why=type(error).__name__, fix="check the path") from None


def _read(path: Path, read: Callable[[], Read]) -> Read:
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        raise ConfigError(
            f"{path} is damaged or of another version of fedmm", why=type(error).__name__, fix="measure it again"
        ) from None


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("not a finite number")
    return float(value)


def _maybe(value: Any) -> float | None:
    return None if value is None else _number(value)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError("not a count")
    return value


def _text(value: Any) -> str:
    return str(value)[:LONGEST]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if type(value) is float else _text("" if value is None else value)


def _list(value: Any) -> Sequence[Mapping[str, Any]]:
    listed: Iterable[Mapping[str, Any]] = value or []
    return list(listed)[:MOST]


def _interval(raw: Mapping[str, Any]) -> dict[str, float | None]:
    value, low, high = _number(raw["value"]), _maybe(raw.get("low")), _maybe(raw.get("high"))
    if low is not None and high is not None and not low <= value <= high:
        raise ValueError("a value lies outside of its interval")
    return {"value": value, "low": low, "high": high}
