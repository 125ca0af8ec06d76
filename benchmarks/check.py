"""python -m benchmarks.check [NAME ...] [--quick] [--store]: are we still as fast beside others as we were?

Compared are ratios alone: figures named `A_to_B` (ours A in units of B, both from one run, so that the machine falls out).
Less is better. What is stored in ratios.json is a value, its spread, when and at which commit it was taken; a ratio above
value x 1.15 + spread fails, and so does one that is no longer measured. --store writes those of the names that are given.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from benchmarks.run import NAMES

STORED = Path(__file__).with_name("ratios.json")
LOSS = 0.15  # beyond the spread
RATIO = re.compile(r"_to_[a-z]+$")


class Verdict(NamedTuple):
    """now: NaN when it is no longer measured."""

    what: str
    stored: float
    now: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.now <= self.limit  # NaN does not


def ratios(figures: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By name of a ratio, its value and spread (0 where it was taken once)."""
    return {
        name: {"value": float(value), "spread": float(figures.get(f"{name}_spread", 0.0))}
        for name, value in figures.items()
        if RATIO.search(name)
    }


def compare(stored: Mapping[str, Mapping[str, float]], now: Mapping[str, float]) -> list[Verdict]:
    """Each stored ratio against the one of the same name; a new one is no news."""
    found = ratios(now)
    return [
        Verdict(
            name,
            one["value"],
            found.get(name, {"value": float("nan")})["value"],
            one["value"] * (1 + LOSS) + one["spread"],
        )
        for name, one in stored.items()
    ]


def table(verdicts: list[Verdict]) -> str:
    width = max(len(verdict.what) for verdict in verdicts)
    lines = [f"{'ratio':<{width}}  stored     now   limit"]
    for verdict in verdicts:
        what, stored, now, limit = verdict
        lines.append(f"{what:<{width}}  {stored:6.3g}  {now:6.3g}  {limit:6.3g}{'' if verdict.holds else '  LOSS'}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; none: all with stored ratios")
    parser.add_argument("--quick", action="store_true", help="a minute's worth; has stored ratios of its own")
    parser.add_argument("--store", action="store_true", help="write down what is measured now")
    args = parser.parse_args()
    kept = json.loads(STORED.read_text()) if STORED.exists() else {}
    size = kept.setdefault("quick" if args.quick else "full", {})
    names = args.names or [name for name in NAMES if name in size]
    if unknown := set(names) - set(NAMES):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if not names:
        parser.error("no ratios are stored: a check that checks nothing is none; store some: --store NAME")
    if not args.store and (missing := [name for name in names if name not in size]):
        parser.error(f"no ratios are stored for {', '.join(missing)}; store them first: --store {' '.join(missing)}")
    verdicts: list[Verdict] = []
    for name in names:
        figures = importlib.import_module(f"benchmarks.{name}").measure(quick=args.quick)
        if args.store:
            size[name] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": _commit(), "ratios": ratios(figures)}
        else:
            verdicts += compare(size[name]["ratios"], figures)
    if args.store:
        STORED.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        return 0
    print(table(verdicts))
    return 0 if all(verdict.holds for verdict in verdicts) else 1


def _commit() -> str:
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=STORED.parent, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
