"""Run as a process of its own by test_ledger.py: use a ledger until killed, or race for reservations."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from fedmm.config import SiteConfig
from fedmm.errors import BudgetExhausted
from fedmm.privacy import accounting, vault
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import Event

EVENT = Event("train", 2.0, 0.1, 4)


def site(epsilon: float = 8.0, **privacy: Any) -> SiteConfig:
    rules = {"epsilon": epsilon, "delta": 1e-5, "public_patients": 100, **privacy}
    return SiteConfig.model_validate(
        {"hospital": {"name": "north"}, "labels": {"findings": ["effusion"]}, "privacy": rules}
    )


class DieAt:
    """Kills this process with SIGKILL at the n-th durable step: file made, synced, renamed, SQL statement begun."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_and_after(self, function: Any) -> Any:
        def called(*args: Any, **keys: Any) -> Any:
            self()
            result = function(*args, **keys)
            self()
            return result

        return called


def use_until_killed(folder: Path, step: int) -> None:
    """Reserve, say so, settle, say so; each word is out before the next durable step."""
    die = DieAt(step)
    for name in ("fsync", "rename"):
        setattr(os, name, die.before_and_after(getattr(os, name)))
    connect = vault._connect

    def traced(path: Path) -> Any:
        db = connect(path)
        db.set_trace_callback(die)
        return db

    vault._connect = traced
    with Ledger.open(folder, site()) as ledger:
        for number in range(4):
            charge = ledger.reserve(EVENT, run="crash", round=number)
            print(f"reserved {charge.seq}", flush=True)
            charge.start()
            print(f"released {charge.seq}", flush=True)
            charge.settle()
            print(f"settled {charge.seq}", flush=True)
    print("end", flush=True)


def race(folder: Path, attempts: int, ceiling: float) -> None:
    """Print how many reservations this process got."""
    accounting._pld.cache_clear()
    won = 0
    with Ledger.open(folder, site(ceiling)) as ledger:
        for number in range(attempts):
            try:
                ledger.reserve(EVENT, run=f"race{os.getpid()}", round=number)
                won += 1
            except BudgetExhausted:
                continue
    print(won, flush=True)


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    if sys.argv[1] == "crash":
        use_until_killed(folder, int(sys.argv[3]))
    else:
        race(folder, int(sys.argv[3]), float(sys.argv[4]))
