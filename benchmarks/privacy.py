"""The ledger and the accounting: what a round pays for being able to prove."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fedmm.config import SiteConfig
from fedmm.errors import BudgetExhausted
from fedmm.privacy import accounting
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import Event

EVENT = Event("train", 4.0, 1.0, 1)
DELTA = 1e-5
TABLE = (  # ../shared/privacy.md: sigma, q, steps, PLD
    (((4.0, 0.01, 10000),), 0.94700),
    (((1.1, 256 / 60000, 14062),), 2.38169),
    (((10.0, 0.08192, 875),), 0.90277),
    (((1.0, 0.032, 937),), 6.36387),
    (((20.0, 1.0, 100),), 1.99309),
    (((1.0, 0.02, 500), (1.5, 0.02, 500)), 3.11616),
)


def site(epsilon: float = 1e6) -> SiteConfig:
    return SiteConfig.model_validate(
        {
            "hospital": {"name": "bench"},
            "labels": {"findings": ["x"]},
            "privacy": {"epsilon": epsilon, "delta": DELTA, "public_patients": 100},
        }
    )


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(*, quick: bool) -> dict[str, float]:
    rows = 1000 if quick else 10_000
    processes, each, room = (8, 20, 50) if quick else (50, 100, 2500)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {**table(), **ledger(folder / "rows", rows), **race(folder / "race", processes, each, room)}


def table() -> dict[str, float]:
    errors = []
    for history, expected in TABLE:
        events = [Event("train", sigma, q, steps) for sigma, q, steps in history]
        errors.append(abs(accounting.epsilon_pld(events, DELTA) - expected))
    return {"table_largest_error_epsilon": max(errors)}


def ledger(folder: Path, rows: int) -> dict[str, float]:
    folder.mkdir()
    took = []
    with Ledger.open(folder, site()) as book:
        for number in range((rows - 1) // 2):
            began = time.perf_counter()
            with book.reserve(EVENT, run="bench", round=number) as charge:
                charge.start()
                charge.settle()
            took.append(time.perf_counter() - began)
    accounting._pld.cache_clear()
    cold = timed(lambda: _epsilon(folder))
    with Ledger.open(folder, site()) as book:
        book.epsilon()
        warm = timed(book.epsilon)
        verify = timed(book.verify)
        seen = book.head().seq
    return {
        "ledger_rows": seen,
        "reserve_and_settle_ms_median": 1e3 * statistics.median(took),
        "reserve_and_settle_ms_spread": 1e3 * statistics.quantiles(took, n=10)[-1],
        "open_and_epsilon_cold_s": cold,
        "epsilon_warm_ms": 1e3 * warm,
        "verify_s": verify,
    }


def _epsilon(folder: Path) -> float:
    with Ledger.open(folder, site()) as book:
        return book.epsilon()


def race(folder: Path, processes: int, each: int, room: int) -> dict[str, float]:
    """Processes that race for a budget of exactly `room` rounds."""
    folder.mkdir()
    ceiling = accounting.epsilon_pld([Event("train", 40.0, 1.0, room)], DELTA) * (1 + 1e-9)
    with Ledger.open(folder, site(ceiling)):
        pass  # made once, before the race
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        began = time.perf_counter()
        won = pool.starmap(_reserve, [(folder, ceiling, each)] * processes, chunksize=1)
        seconds = time.perf_counter() - began
    return {
        "race_processes": processes,
        "race_reservations_each": each,
        "race_room": room,
        "race_won": sum(won),
        "race_s": seconds,
    }


def _reserve(folder: Path, ceiling: float, each: int) -> int:
    won = 0
    with Ledger.open(folder, site(ceiling)) as book:
        for number in range(each):
            try:
                book.reserve(Event("train", 40.0, 1.0, 1), run="race", round=number)
                won += 1
            except BudgetExhausted:
                pass
    return won
