"""A hospital with a real ledger, and a run folder whose records say what that ledger stated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fedmm.config import SiteConfig, installed_version, load_site
from fedmm.privacy import roster
from fedmm.privacy.audit import Guesses, fdp_bound, one_run_bound
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import Event, PrivacyPlan, Rate
from tests.report.run_folder import arrive, config, record, write_run

SIGMA = 4.0
ROUNDS = 3


def make_hospital(folder: Path, *, name: str = "aachen", epsilon: float = 6.0, **privacy: Any) -> Path:
    folder.mkdir(parents=True)
    rules = {"epsilon": epsilon, "delta": 1e-4, "public_patients": 100, **privacy}
    policy = {"hospital": {"name": name}, "labels": {"findings": ["abnormal", "effusion"]}, "privacy": rules}
    (folder / "site.toml").write_text(tomli_w.dumps(policy), encoding="utf-8")
    return folder


def site_of(hospital: Path) -> SiteConfig:
    return load_site(hospital)


def make_pair(folder: Path, *, name: str = "aachen", rotate: bool = False, crash: bool = True, **site: Any) -> Path:
    """folder/hospital and folder/run: a run before it that failed after one round, this one, and a charge that crashed."""
    hospital = make_hospital(folder / "hospital", name=name, **site)
    settings = config([name], rounds=ROUNDS)
    settings["plan"]["noise_multiplier"] = SIGMA
    plan = PrivacyPlan.from_flat(settings["plan"])
    lines = []
    with Ledger.open(hospital, site_of(hospital)) as ledger:
        roster.cover(hospital / "ledger.sqlite", [11, 22, 33], first=True)
        charge = ledger.reserve(Event("train", 5.0, Rate(0.25), 2), run="failed before", round=1)
        charge.settle()
        if crash:
            ledger.reserve(Event("train", 5.0, Rate(0.25), 2), run="failed before", round=2)  # and its process died
        for number in range(1, ROUNDS + 1):
            if rotate and number == 2:
                ledger.rotate()
            ledger.reserve(plan.round_event(number), run=settings["run"], round=number).settle()
            lines.append(_line(ledger, name, number))
    write_run(folder / "run", settings, lines)
    return hospital


def _line(ledger: Ledger, name: str, number: int) -> dict[str, Any]:
    line = record(number, [name], rounds=ROUNDS, scored=number == ROUNDS)
    spent, head = ledger.spent(), ledger.head()
    line["epsilon"][name] = {
        "spent": spent.epsilon,
        "ceiling": spent.ceiling,
        "delta": spent.delta,
        "unprotected": spent.not_private,
        "ledger_sequence": head.seq,
        "ledger_hash": head.hash,
        "ledger_signature": head.signature,
        "ledger_key": ledger.public_key(),
    }
    return arrive(line)


def interval(value: float, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half)}


COORDINATOR, PUBLIC = "the coordinator, from the hospital's updates", "the public, from the final model"
GUESSED = (
    ("dirac", COORDINATOR, 500, 100, 82),
    ("stranger", PUBLIC, 50, 10, 6),
    ("mislabelled", COORDINATOR, 37, 6, 3),
)


def audit(
    *, claimed: float = 2.1, guessed: Sequence[tuple[str, str, int, int, int]] = GUESSED, passed: bool = True
) -> dict[str, Any]:
    """What `fedmm audit` writes, its bounds those of its counts. guessed: canary, seen by, canaries, guesses, correct."""
    views = []
    for canary, seen_by, *counts in guessed:
        seen, each = Guesses(*counts), 0.05 / len(guessed)
        bound, other = (f(seen, delta=1e-4, significance=each) for f in (one_run_bound, fdp_bound))
        views.append(
            {"canary": canary, "seen_by": seen_by, **seen._asdict(), "lower_bound": bound, "fdp_lower_bound": other}
        )
    best = max(views, key=lambda view: float(view["lower_bound"]))
    return {
        **best, "claimed_epsilon": claimed, "delta": 1e-4, "significance": 0.05,
        "verdict": "consistent" if passed and best["lower_bound"] <= claimed else "broken",
        "settings": {"folder": "/secret/place"}, "hospital": "aachen", "real_patients": True,
        "fedmm": installed_version(), "date": "2026-11-28", "seconds": 9.0,
        "checks": [
            {"name": "sensitivity", "passed": passed, "measured": 1.0, "expected": "at most 1 C", "false_alarm": 0.0},
            {"name": "noise spread", "passed": True, "measured": 0.998, "expected": 1.0, "false_alarm": 1e-6},
        ],
        "views": views,
    }  # fmt: skip


def attack(run: str, hospital: str = "aachen", *, control: bool = True) -> dict[str, Any]:
    def parts(level: float) -> dict[str, Any]:
        return {
            "membership": [
                {"attack": name, "modality": modality, "members": 123, "non_members": 4567, "auc": interval(level + i / 50),
                 "tpr": {"0.01": interval(level / 20, 0.01), "0.001": interval(level / 150, 0.003)}}
                for i, (name, modality) in enumerate((("loss threshold", "all"), ("lira", "all"), ("lira", "image")))
            ],
            "relinkage": [
                {"from": "image", "to": "report", "candidates": 4711, "top1": interval(level / 8), "top5": interval(level / 3),
                 "chance_top1": 1 / 4711, "chance_top5": 5 / 4711}
            ],
            "inversion": [
                {"what": "image ssim", **interval(level / 4), "baseline": 0.11},
                {"what": "tokens recovered", **interval(level / 10), "baseline": 0.04},
            ],
        }  # fmt: skip

    settings = {"hospital": hospital, "run": run, "date": "2026-11-28", "private": True}
    return {**settings, **parts(0.52), "control": parts(0.81) if control else None}


def grouped() -> dict[str, Any]:
    """What `fedmm evaluate --format json` says of groups."""
    return {
        "studies": 613,
        "by_group": {
            "sex": {
                "f": {"patients": 301, "studies": 350, "mean_auroc": 0.81, "accuracy": 0.7},
                "m": {"patients": 299, "studies": 263, "mean_auroc": 0.79, "accuracy": 0.69},
                "unknown": {"patients": 4, "too_few": True},
            }
        },
        "intervals": {"level": 0.95, "draws": 10, "by_group": {"sex": {"f": [0.75, 0.86], "m": [0.73, 0.85]}}},
    }


def put(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
