"""Peak memory of a private run against one without privacy, and whether it grows over 100 rounds. As benchmarks/engine.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.engine import MIB, job, make_hospitals, run

EARLY = 5  # rounds after which everything is warm


def measure(*, quick: bool) -> dict[str, float]:
    """`plain_mb`: peak of a run in one process.  `dp_mb`, `dp_two_workers_mb`: of a private one, all its processes together;
    `…_ratio` for each process that trains, against the plain one.  `after_…_mb`: of the largest worker.
    """
    hospitals, patients, rounds = (4, 20, 20) if quick else (16, 100, 100)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = make_hospitals(Path(folder) / "hospitals", count=hospitals, patients=patients)
        few = 4 if quick else 10
        plain, dp = (job("tri", private=private, patients=patients, rounds=few) for private in (False, True))
        found["plain_mb"] = run("here", plain, source).peak / MIB
        for name, engine, processes in (("dp", "here", 1), ("dp_two_workers", "workers", 2)):
            found[f"{name}_mb"] = run(engine, dp, source).peak / MIB
            found[f"{name}_ratio"] = found[f"{name}_mb"] / processes / found["plain_mb"]
        after = run("workers", {**dp, "federation.rounds": rounds}, source).after
        for number in (EARLY, rounds - 1):  # the report is made after the last one
            found[f"after_{number}_rounds_mb"] = after[number] / MIB
        found["growth_ratio"] = after[rounds - 1] / after[EARLY]
    return found
