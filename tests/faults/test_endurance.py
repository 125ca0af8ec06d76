"""Ten hospitals of which one in ten drops out of each round, over many rounds in one process group: nothing hangs, every round is
recorded, every charge is right, memory and descriptors stay as they are."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Message

import server.app
from fedmm.config import RunConfig, find_hospitals
from fedmm.data.synthetic import synthesize
from fedmm.federation.local import LocalGrid
from fedmm.report.record import read_rounds
from fedmm.seeds import stream
from tests.e2e.sites import settings
from tests.faults import stage
from tests.faults.books import charges, check_books, run_id

HOSPITALS, SEED = 10, 11
DROPS = 0.1  # of a hospital in a round
# What happens to it: an error, the death of its process, silence as it trains, an answer that comes too late.
HOW = {
    "train-begin fail": 0.5,
    "train-paid fail": 0.2,
    "train-step die": 0.2,
    "train-step hold": 0.05,
    "train-sent hold": 0.05,
}
ERRORS = {"train-begin fail": 0.6, "train-paid fail": 0.4}  # what costs no time
LONGEST = 8.0  # seconds that a round waits if somebody will be silent in it

GIVEN = settings(
    model__width=4,
    training__local_steps=1,
    training__sampling_rate=1.0,  # accounting in milliseconds
    privacy__epsilon=4.0,
    federation__min_hospitals=3,
    federation__connect_seconds=600.0,  # also for introductions: five processes import torch
)


class PatientGrid(LocalGrid):
    """Waits for everybody, however busy the machine, but at the first ask of a round in which somebody will be silent."""

    short = False

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        timeout, self.short = LONGEST if self.short else timeout, False
        return super().send_and_receive(messages, timeout=timeout)


@dataclass
class Life:
    """What was measured after each round.

    ordered: drop-outs by round and hospital.  memory: bytes of the group, as if all workers were there.  files: descriptors
    of the coordinator, and of the worker that has most.
    """

    grid: PatientGrid
    workers: int
    hospitals: list[Path]
    how: dict[str, float]
    ordered: dict[tuple[int, str], str] = field(default_factory=dict)
    memory: list[float] = field(default_factory=list)
    files: list[tuple[int, int]] = field(default_factory=list)

    def order(self, number: int) -> None:
        """Who drops out of this round, and how."""
        for hospital in self.hospitals:
            stage.let_go(hospital)
            chance = stream(SEED, "drop", hospital=hospital.name, round=number)
            if chance.random() < DROPS:
                how = list(self.how)[int(chance.choice(len(self.how), p=list(self.how.values())))]
                stage.order(hospital, *how.split())
                self.ordered[number, hospital.name] = how
                self.grid.short |= how.endswith("hold")

    def measure(self) -> None:
        here = psutil.Process()
        workers = [psutil.Process(worker._process.pid) for worker in self.grid._workers.values() if worker.alive]
        if workers:
            usual = statistics.median(worker.memory_info().rss for worker in workers)
            self.memory.append(here.memory_info().rss + self.workers * usual)
            self.files.append((here.num_fds(), max(worker.num_fds() for worker in workers)))


def live(
    folder: Path, patch: pytest.MonkeyPatch, *, rounds: int, workers: int = 5, how: dict[str, float] = HOW
) -> Life:
    """A run of so many rounds; what must hold of any is checked here."""
    synthesize(folder / "hospitals", count=HOSPITALS, patients=6, seed=3)
    hospitals = find_hospitals(folder / "hospitals")
    with PatientGrid("tests.faults.staged:app", [{"site": str(h)} for h in hospitals], workers=workers) as grid:
        life = Life(grid, workers, hospitals, how)
        honest = server.app.append_round

        def told(folder: Path, record: Any) -> None:
            honest(folder, record)
            life.measure()
            if record.round < rounds:
                life.order(record.round + 1)

        patch.setattr(server.app, "append_round", told)
        given = {**GIVEN, "federation.rounds": rounds, "data.hospitals": str(folder / "hospitals")}
        config = RunConfig.from_flat({**given, "federation.out": str(folder / "run")})
        life.order(1)
        run = server.app.coordinate(grid, config)
    check_books(run, hospitals)
    records = read_rounds(run)
    assert len(records) == rounds
    named = {(record["round"], failure["hospital"]) for record in records for failure in record["failures"]}
    assert life.ordered.keys() <= named
    for hospital in hospitals:
        paid = dict(charges(hospital, run_id(run)))
        assert all(paid[r["round"]] == "settled" for r in records if hospital.name in r["trained"])
    return life


@pytest.mark.slow  # half a minute: `make faults` has both lengths
def test_a_run_of_15_rounds_outlives_its_drop_outs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = live(tmp_path, monkeypatch, rounds=15, workers=2, how=ERRORS)
    assert len(life.ordered) > 5


@pytest.mark.slow
def test_a_run_of_100_rounds_outlives_its_drop_outs_and_grows_in_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = live(tmp_path, monkeypatch, rounds=100)
    assert set(life.ordered.values()) == set(HOW)
    early, late = (statistics.median(life.memory[window]) for window in (slice(20, 40), slice(80, 100)))
    print(f"{Counter(life.ordered.values())}; memory {early / 2**20:.0f} MiB, then {late / 2**20:.0f}")
    assert late < 1.05 * early
    for which in (0, 1):
        before, after = (max(files[which] for files in life.files[w]) for w in (slice(20, 40), slice(80, 100)))
        assert after <= before, f"{before} descriptors, then {after}"
