"""The ledger and the accounting: what they survive. What they cost: accounting.py and ledger.py.

The faults are those of tests/privacy: one definition of a kill and of an edit for the tests and for the numbers.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path

from fedmm.config import SiteConfig
from fedmm.errors import BudgetExhausted
from fedmm.privacy import accounting
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import Event, Rate
from tests.privacy import faults
from tests.privacy.edits import cut_everywhere, edit_many, missed, snapshot, snapshots
from tests.privacy.test_accounting import by_all_three, in_order

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


def measure(*, quick: bool) -> dict[str, float]:
    processes, each, room = (8, 20, 50) if quick else (50, 100, 2500)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            **table(),
            **order(10 if quick else 200),
            **kills(40 if quick else 320),
            **edits(folder / "edits", 500 if quick else 10_000),
            **truncations(folder / "cut"),
            **race(folder / "race", processes, each, room),
        }


def table() -> dict[str, float]:
    errors = []
    for history, expected in TABLE:
        events = [Event("train", sigma, Rate(q), steps) for sigma, q, steps in history]
        errors.append(abs(accounting.epsilon_pld(events, DELTA) - expected))
    return {"table_largest_error_epsilon": max(errors)}


def order(histories: int) -> dict[str, float]:
    """PLD <= PRV <= RDP + 0.02 over random histories."""
    found = [by_all_three(1000 + seed) for seed in range(histories)]
    return {
        "order_histories": histories,
        "order_violations": sum(not in_order(*epsilons) for epsilons in found),
        "order_largest_pld_above_prv_epsilon": max(pld - prv for pld, prv, _ in found),
        "order_largest_prv_above_rdp_epsilon": max(prv - rdp for _, prv, rdp in found),
    }


def kills(processes: int) -> dict[str, float]:
    """kill -9 at drawn steps; a problem is anything that `verify`, the next start or the next round does not survive."""
    found = faults.kill_many(range(1000, 1000 + processes))
    return {
        "kills": found.kills,
        "kills_under_counts": found.under,
        "kills_largest_over_count_rounds": found.over,
        "kills_problems": len(found.problems),
    }


def edits(folder: Path, count: int) -> dict[str, float]:
    intact = snapshots(folder)
    (work := folder / "work").mkdir()
    verdicts = edit_many(intact, work, edits=count, seed=1000)
    return {
        "edits": verdicts.total(),
        "edits_missed": missed(verdicts),
        "edits_refused": verdicts["seen"],
        "edits_to_an_older_state_seen_against_a_kept_head": verdicts["cut"],
        "edits_that_left_every_row_as_it_was": verdicts["harmless"],
    }


def truncations(folder: Path) -> dict[str, float]:
    found = cut_everywhere(snapshot(folder, rotate=False), folder)
    return {"truncations": found.total(), "truncations_missed": found["missed"]}


def race(folder: Path, processes: int, each: int, room: int) -> dict[str, float]:
    """Processes that race for a budget of exactly `room` rounds."""
    folder.mkdir()
    ceiling = accounting.epsilon_pld([Event("train", 40.0, Rate(1.0), room)], DELTA) * (1 + 1e-9)
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
                book.reserve(Event("train", 40.0, Rate(1.0), 1), run="race", round=number)
                won += 1
            except BudgetExhausted:
                pass
    return won
