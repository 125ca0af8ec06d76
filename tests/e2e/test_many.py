"""Many hospitals on one machine: what a round leaves in memory does not grow with the rounds, and hardly with the hospitals."""

from __future__ import annotations

import ctypes
import gc
import os
import sqlite3
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import server.app
from fedmm.config import RunConfig
from fedmm.federation.local import LocalGrid
from fedmm.privacy.ledger import Ledger
from fedmm.training.loop import Workbench
from tests.e2e.conftest import HEADER, SETTINGS, policy

MIB = 2**20


def hospitals(folder: Path, count: int, patients: int = 4) -> list[Path]:
    """Reports alone, a word or two each."""
    made = []
    for number in range(count):
        hospital = folder / f"hospital_{number:03}"
        hospital.mkdir(parents=True)
        rows = []
        for patient in range(patients):
            (hospital / f"{patient}.txt").write_text(f"clear lungs {patient}", encoding="utf-8")
            split = "test" if patient == 0 else "train"
            rows.append(f"p{patient},s{patient},,{patient}.txt,,{patient % 2},0,none,{split}")
        (hospital / "manifest.csv").write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
        (hospital / "site.toml").write_text(policy(hospital.name), encoding="utf-8")
        made.append(hospital)
    return made


@dataclass
class Life:
    """After each round: MiB of this process alone, when the C library has given back what it holds; open files; and what
    numbers of live ledgers, databases and models there have been."""

    memory: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    alive: set[int] = field(default_factory=set)

    def look(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.memory.append(psutil.Process(os.getpid()).memory_full_info().uss / MIB)
        self.files.append(len(os.listdir("/proc/self/fd")))
        kinds = (Ledger, sqlite3.Connection, Workbench)
        self.alive.update(sum(type(o) is kind for o in gc.get_objects()) for kind in kinds)


def live(folder: Path, patch: pytest.MonkeyPatch, *, count: int, rounds: int) -> Life:
    made = hospitals(folder / "hospitals", count)
    life, honest = Life(), server.app.append_round

    def told(run: Path, record: Any) -> None:
        honest(run, record)
        life.look()

    patch.setattr(server.app, "append_round", told)
    settings = {**SETTINGS, "federation.rounds": rounds, "data.hospitals": str(folder / "hospitals")}
    config = RunConfig.from_flat({**settings, "federation.out": str(folder / "run")})
    with LocalGrid("client.app:app", [{"site": str(path)} for path in made]) as grid:
        server.app.coordinate(grid, config)
    return life


def test_after_a_round_one_model_is_alive_and_no_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = live(tmp_path, monkeypatch, count=6, rounds=3)
    assert max(life.alive) <= 4, "the workbenches that a process keeps, of whatever tests came before"
    assert life.files[2] <= life.files[1], life.files


@pytest.mark.slow  # minutes
def test_200_hospitals_stay_in_flat_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = live(tmp_path / "few", monkeypatch, count=10, rounds=10)
    many = live(tmp_path / "many", monkeypatch, count=200, rounds=10)
    for name, life in (("10", few), ("200", many)):
        print(f"{name} hospitals, MiB after each round: {[round(value) for value in life.memory]}; files {life.files}")
    assert statistics.median(many.memory[-3:]) < 1.05 * statistics.median(many.memory[2:5])
    assert many.memory[-1] < 1.3 * few.memory[-1]
    assert many.files[-1] <= many.files[2]
