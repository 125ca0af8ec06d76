"""Ten hospitals of which one in ten drops out of each round, over many rounds in one process group: nothing hangs, every round is
recorded, every charge is right, memory and descriptors stay as they are."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import server.app
from fedmm.config import RunConfig, find_hospitals
from fedmm.data.synthetic import synthesize
from fedmm.federation.local import LocalGrid
from fedmm.report.record import read_rounds
from fedmm.seeds import stream
from tests.e2e.sites import settings
from tests.faults import stage
from tests.faults.books import charges, check_books, run_id

HOSPITALS, WORKERS, SEED = 10, 5, 11
DROPS = 0.1  # of a hospital in a round
# what happens to it: an error, the death of its process, silence as it trains, an answer that comes too late. The last two cost
# the whole time that a round waits.
HOW = {
    "train-begin fail": 0.5,
    "train-paid fail": 0.2,
    "train-step die": 0.2,
    "train-step hold": 0.05,
    "train-sent hold": 0.05,
}
LONGEST = 20.0  # seconds that a round waits
GIVEN = settings(
    model__width=4,
    training__local_steps=1,
    training__sampling_rate=1.0,  # accounting in milliseconds
    privacy__epsilon=4.0,
    federation__min_hospitals=3,
    federation__connect_seconds=600.0,  # also for introductions: five processes import torch
    federation__round_timeout=LONGEST,
)


@dataclass
class Life:
    """What was measured after each round. memory: bytes of the group, as if all workers were there.  files: descriptors of the
    coordinator, and of the worker that has most."""

    grid: LocalGrid
    hospitals: list[Path]
    dropped: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)
    files: list[tuple[int, int]] = field(default_factory=list)

    def order(self, number: int) -> None:
        """Who drops out of this round, and how."""
        for hospital in self.hospitals:
            stage.let_go(hospital)
            chance = stream(SEED, "drop", hospital=hospital.name, round=number)
            if chance.random() < DROPS:
                how = list(HOW)[int(chance.choice(len(HOW), p=list(HOW.values())))]
                stage.order(hospital, *how.split())
                self.dropped[how] += 1

    def measure(self) -> None:
        here = psutil.Process()
        workers = [psutil.Process(worker._process.pid) for worker in self.grid._workers.values() if worker.alive]
        if workers:
            self.memory.append(
                here.memory_info().rss + WORKERS * statistics.median(w.memory_info().rss for w in workers)
            )
            self.files.append((here.num_fds(), max(w.num_fds() for w in workers)))


def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, rounds: int) -> Life:
    """A run of so many rounds; what must hold of any is checked here."""
    synthesize(tmp_path / "hospitals", count=HOSPITALS, patients=6, seed=3)
    hospitals = find_hospitals(tmp_path / "hospitals")
    with LocalGrid("tests.faults.staged:app", [{"site": str(h)} for h in hospitals], workers=WORKERS) as grid:
        life = Life(grid, hospitals)
        honest = server.app.append_round

        def told(folder: Path, record: Any) -> None:
            honest(folder, record)
            life.measure()
            life.order(record.round + 1)

        monkeypatch.setattr(server.app, "append_round", told)
        given = {**GIVEN, "federation.rounds": rounds}
        given |= {"data.hospitals": str(tmp_path / "hospitals"), "federation.out": str(tmp_path / "run")}
        life.order(1)
        run = server.app.coordinate(grid, RunConfig.from_flat(given))
    check_books(run, hospitals)
    records = read_rounds(run)
    assert len(records) == rounds
    named = [(record["round"], failure["hospital"]) for record in records for failure in record["failures"]]
    assert len(set(named)) >= life.dropped.total() - life.dropped["train-sent hold"] > 0
    for hospital in hospitals:
        paid = dict(charges(hospital, run_id(run)))
        assert all(paid[r["round"]] == "settled" for r in records if hospital.name in r["trained"])
    return life


def test_a_run_of_15_rounds_outlives_its_drop_outs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.faults.test_endurance.HOW", {"train-begin fail": 0.6, "train-paid fail": 0.4})
    life = live(tmp_path, monkeypatch, rounds=15)
    assert life.dropped.total() > 5


@pytest.mark.slow
def test_a_run_of_100_rounds_outlives_its_drop_outs_and_grows_in_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = live(tmp_path, monkeypatch, rounds=100)
    assert set(life.dropped) == set(HOW)
    early, late = (statistics.median(life.memory[window]) for window in (slice(20, 40), slice(80, 100)))
    print(f"dropped {dict(life.dropped)}; memory {early / 2**20:.0f} MiB, then {late / 2**20:.0f}")
    assert late < 1.05 * early
    for which in (0, 1):
        before, after = (max(files[which] for files in life.files[w]) for w in (slice(20, 40), slice(80, 100)))
        assert after <= before, f"{before} descriptors, then {after}"
