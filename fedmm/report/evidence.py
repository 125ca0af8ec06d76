"""What was measured on patients and not proved: the attacks, and what privacy costs in accuracy; read with care, as JSON.

Counts of patients are left out on the way, and every share of real patients is rounded (fedmm.report.values): what stays
narrows the number of patients down and does not give it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmm.errors import ConfigError
from fedmm.report import values
from fedmm.report.reading import Estimate, Run, Score, load_run
from fedmm.report.values import MOST, TWO_DIGITS, listed, maybe, measured, number, text, two_digits


def read_attacks(run: Path, hospital: str) -> dict[str, Any] | None:
    """What `fedmm attack` found at a hospital; None if nothing was measured. Raises: ConfigError for a damaged file."""
    path = run / f"attack-{hospital}.json"
    if not path.exists():
        return None
    raw = values.load(path)
    if raw.get("hospital") != hospital:
        raise ConfigError(f"{path.name} is about another hospital", fix="measure it again with: fedmm attack")

    def read() -> dict[str, Any]:
        control = raw.get("control")
        return {
            "run": text(raw.get("run", "")),
            "date": text(raw.get("date", "")),
            "private": raw.get("private") is True,
            **_attacks(raw),
            "control": _attacks(control) if control else None,
        }

    return values.reading(path, read)


def _attacks(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "membership": [
            {
                "attack": text(each["attack"]),
                "modality": text(each["modality"]),
                "auc": measured(each["auc"], step=TWO_DIGITS),
                "tpr": [
                    {"false_alarm": number(float(rate)), **measured(found)}
                    for rate, found in sorted(each["tpr"].items(), key=lambda item: float(item[0]))
                ],
            }
            for each in listed(raw.get("membership"))
        ],
        "relinkage": [
            {
                "from": text(each["from"]),
                "to": text(each["to"]),
                **{key: measured(each[key]) for key in ("top1", "top5")},
                **{key: _chance(each[key]) for key in ("chance_top1", "chance_top5")},
            }
            for each in listed(raw.get("relinkage"))
        ],
        "inversion": [_inverted(each) for each in listed(raw.get("inversion"))],
    }


def _chance(raw: Any) -> float | None:
    """Rounded up: it is one (or five) over the number of candidates, and that is a number of patients."""
    chance = maybe(raw)
    return None if chance is None else values.up125(chance)


def _inverted(each: Mapping[str, Any]) -> dict[str, Any]:
    """not_applicable: why this cannot be asked of the model, "" where it was."""
    what = text(each["what"])
    if "not_applicable" in each:
        nothing = {"value": None, "low": None, "high": None, "reason": "", "baseline": None}
        return {"what": what, "not_applicable": text(each["not_applicable"]), **nothing}
    guess = maybe(each.get("baseline"))  # of a few patients, always as many: their number says nothing
    baseline = None if guess is None else float(f"{guess:.3g}")
    return {"what": what, "not_applicable": "", **measured(each, step=TWO_DIGITS), "baseline": baseline}


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
        "majority": two_digits(score.majority),
        "subsets": [
            {"given": name, "mean_auroc": two_digits(part.mean_auroc), "accuracy": two_digits(part.accuracy)}
            for name, (_, part) in score.subsets.items()
        ],
    }


def _groups(folder: Path, hospital: str) -> list[dict[str, Any]]:
    """Scores by sex, age and so on, of a file that `fedmm evaluate --format json` wrote and somebody put here."""
    path = folder / f"evaluate-{hospital}.json"
    if not path.exists():
        return []
    raw = values.load(path)

    def read() -> list[dict[str, Any]]:
        sure = raw.get("intervals", {}).get("by_group", {})
        found = []
        for kind, parts in raw.get("by_group", {}).items():
            for value, part in parts.items():
                ends = sure.get(kind, {}).get(value) or [None, None]
                known = not part.get("too_few")
                area = (maybe(part.get("mean_auroc")), maybe(ends[0]), maybe(ends[1]))
                found.append(
                    {
                        "hospital": hospital,
                        "kind": text(kind),
                        "group": text(value),
                        "mean_auroc": values.rounded(*(area if known else (None,) * 3), step=TWO_DIGITS),
                        "accuracy": two_digits(maybe(part.get("accuracy"))) if known else None,
                    }
                )
        return found[:MOST]

    return values.reading(path, read)


def _point(value: float | None) -> dict[str, float | None]:
    return {"value": two_digits(value), "low": None, "high": None}


def _estimate(e: Estimate) -> dict[str, float | None]:
    return {"value": e.value, "low": e.low, "high": e.high}
