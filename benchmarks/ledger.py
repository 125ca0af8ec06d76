"""What a round pays for being able to prove: a ledger of 10,000 rows, filled, opened, asked and verified.

cold   a process that has not read this ledger        warm   the same bytes again, through a new Ledger object
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.privacy import site
from fedmm.privacy import accounting, vault
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import Event, Rate

EVENT = Event("train", 4.0, Rate(1.0), 1)
REPEATS = 7


def measure(*, quick: bool) -> dict[str, float]:
    rows = 1000 if quick else 10_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {**fill(folder, rows), **ask(folder)}


def fill(folder: Path, rows: int) -> dict[str, float]:
    """Three rows a round: reserve, settle, and what left."""
    paid, left = [], []
    with Ledger.open(folder, site()) as book:
        for number in range((rows - 1) // 3):
            began, digest = time.perf_counter(), f"{number:064x}"
            with book.reserve(EVENT, run="bench", round=number) as charge:
                charge.start()
                charge.settle(sha256=digest)
            paid.append(time.perf_counter() - began)
            book.record_sent("update", run="bench", round=number, size=1, sha256=digest, charge=charge.seq)
            left.append(time.perf_counter() - began)
        seen = book.head().seq
    return {
        "rows": seen,
        "reserve_and_settle_ms_median": 1e3 * statistics.median(paid),
        "reserve_and_settle_ms_spread": 1e3 * statistics.quantiles(paid, n=10)[-1],
        "reserve_settle_and_sent_ms_median": 1e3 * statistics.median(left),
        "reserve_settle_and_sent_ms_spread": 1e3 * statistics.quantiles(left, n=10)[-1],
    }


def ask(folder: Path) -> dict[str, float]:
    cold, warm = [], []
    for _ in range(REPEATS):
        vault._KEPT.clear()
        accounting._pld.cache_clear()
        cold.append(timed(lambda: _epsilon(folder)))
        warm.append(timed(lambda: _epsilon(folder)))
    with Ledger.open(folder, site()) as book:
        book.epsilon()
        again, verify = timed(book.epsilon), timed(book.verify)
    ratios = sorted(b / a for a, b in zip(cold, warm, strict=True))
    return {
        "open_and_epsilon_cold_ms": 1e3 * statistics.median(cold),
        "open_and_epsilon_warm_ms": 1e3 * statistics.median(warm),
        "open_and_epsilon_warm_ms_least": 1e3 * min(warm),
        "open_and_epsilon_warm_to_cold": statistics.median(ratios),
        "open_and_epsilon_warm_to_cold_spread": ratios[-2] - ratios[1],
        "epsilon_of_an_open_ledger_ms": 1e3 * again,
        "verify_s": verify,
    }


def _epsilon(folder: Path) -> float:
    with Ledger.open(folder, site()) as book:
        return book.epsilon()


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
