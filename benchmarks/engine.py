"""The same federated job on several engines: 16 hospitals, 10 rounds, one local epoch; seconds and memory side by side.

Each engine runs in a new process (benchmarks/engine_run.py says what each one is), in turn where repeated. Memory is the sum
of PSS over the process and its children, looked at four times a second: pages that processes share count once.

tiny  fixed image and audio features, one linear layer on each: what is left is the engine
tri   the default model on image, report and audio: training dominates

NVFlare and pfl-research take part in the plain jobs when `make bench-peers` has made them an environment of their own.
NVFlare with two threads starts a process for every hospital in every round, so that it gets a job of its own, of few rounds,
beside a bare loop of as many; `…_reckoned_s` is what all rounds would take: start-up and so many of that length.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
MIB = 2**20
LOOK_SECONDS = 0.25
DISTINCT = 4  # hospitals that are made; the others are copies of them under other names
EPOCH = {"training.sampling_rate": 0.2, "training.local_steps": 5}  # five steps of a fifth of the patients
MODELS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"model.image": "hog", "model.audio": "mfcc", "model.width": 16, "data.report_buckets": 256},
    "tri": {},
}
ENGINES = ("bare", "here", "workers", "ray")
PEERS = ("pfl", "nvflare")
SLOW_PEER, FEW = "nvflare2", 3  # rounds
PEERS_PYTHON = ROOT / ".bench-peers/bin/python"


@dataclass(frozen=True)
class Measured:
    """seconds: of the whole process.  rounds: of each.  peak: bytes.  loss: of a plain job's final model.

    after: by number of rounds that are finished, the most bytes of the largest worker, or of the process if there is none.
    """

    seconds: float
    rounds: list[float]
    peak: float
    loss: float
    after: Mapping[int, float]

    @property
    def later(self) -> float:
        """Seconds of a round without the first (data are read) and the last (scores)."""
        return statistics.median(self.rounds[1:-1])


def measure(*, quick: bool) -> dict[str, float]:
    """By model, `plain` or `dp`, and engine: `…_s` whole run, `…_start_s` all but its rounds' usual time, `…_round_s`,
    `…_mb`; `…_ratio` against the bare loop: medians, and between lowest and highest of the repeats `…_spread`."""
    hospitals, patients, rounds, repeats = (4, 20, 4, 1) if quick else (16, 100, 10, 3)
    jobs = [("tiny", False), ("tri", True)] if quick else list(itertools.product(MODELS, (False, True)))
    found: dict[str, float] = {}
    peers = PEERS if PEERS_PYTHON.exists() else ()
    if not peers:
        print("NVFlare, pfl-research: not installed: make bench-peers", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        source = make_hospitals(Path(folder) / "hospitals", count=hospitals, patients=patients)
        for model, private in jobs:
            settings = job(model, private=private, patients=patients, rounds=rounds)
            engines = ENGINES if private else (*ENGINES, *peers)
            found |= compare(f"{model}_{'dp' if private else 'plain'}", engines, settings, source, repeats)
        if peers and not quick:
            settings, name = job("tiny", private=False, patients=patients, rounds=FEW), f"tiny_plain_{FEW}_rounds"
            found |= compare(name, ("bare", SLOW_PEER), settings, source, repeats=1)
            slow = f"{name}_{SLOW_PEER}"
            found[f"{slow}_reckoned_s"] = found[f"{slow}_start_s"] + rounds * found[f"{slow}_round_s"]
    return found


def compare(
    name: str, engines: Sequence[str], settings: Mapping[str, Any], source: Path, repeats: int
) -> dict[str, float]:
    """`figures` of the engines, which take turns."""
    runs: dict[str, list[Measured]] = {engine: [] for engine in engines}
    for _ in range(repeats):
        for engine in engines:
            runs[engine].append(run(engine, settings, source))
    return figures(name, runs)


def job(model: str, *, private: bool, patients: int, rounds: int) -> dict[str, Any]:
    """Run settings. patients: of a hospital, 80 % of whom are trained on."""
    return {
        **MODELS[model],
        **EPOCH,
        "training.batch_size": max(1, round(patients * 0.8 * EPOCH["training.sampling_rate"])),
        "training.learning_rate": 0.05,
        "federation.rounds": rounds,
        "federation.strategy": "fedavg",
        "federation.average": 0.0,  # the last round's weights are the model, as in the bare loop
        "federation.evaluate_every": 0,
        "privacy.enabled": private,
        "privacy.evaluation_share": 0.0,
    }


def make_hospitals(folder: Path, *, count: int, patients: int) -> Path:
    from fedmm.config import load_site
    from fedmm.data.synthetic import synthesize

    made = synthesize(folder, count=min(count, DISTINCT), patients=patients, seed=7)
    for number in range(len(made), count):
        source, name = made[number % len(made)], f"hospital_{number + 1:03}"
        shutil.copytree(source, folder / name)
        policy = folder / name / "site.toml"
        own = load_site(source).hospital.name
        policy.write_text(policy.read_text(encoding="utf-8").replace(f'"{own}"', f'"{name}"', 1), encoding="utf-8")
    return folder


def run(engine: str, settings: Mapping[str, Any], source: Path) -> Measured:
    """On a copy of the hospitals, whose ledgers are empty. Raises: SystemExit with what the engine said if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        hospitals, out = shutil.copytree(source, Path(folder) / "hospitals"), Path(folder) / "run"
        file = Path(folder) / "job.json"
        file.write_text(json.dumps({**settings, "data.hospitals": str(hospitals), "federation.out": str(out)}))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0",
                       "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # fmt: skip
        python = PEERS_PYTHON if engine in (*PEERS, SLOW_PEER) else sys.executable
        command = [str(python), "-m", "benchmarks.engine_run", engine, str(file)]
        with (Path(folder) / "log").open("w+b") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, env=environment)
            assert process.stdout is not None
            with process.stdout, Watched(process.pid, out / "run.jsonl") as watched:
                said = process.stdout.read()
            if process.wait():
                log.seek(0)
                raise SystemExit(f"{engine} failed:\n{log.read().decode(errors='replace')[-3000:]}")
        found, loss = json.loads(said.splitlines()[-1]), 0.0
        if not settings["privacy.enabled"]:
            command = [sys.executable, *command[1:3], "loss", str(file)]
            loss = json.loads(subprocess.check_output(command, cwd=ROOT, env=environment))["loss"]
    return Measured(found["seconds"], found["rounds"], watched.peak, loss, watched.after)


class Watched:
    """A context manager that looks at the memory of a process and its children. Linux: PSS of /proc/PID/smaps_rollup.

    peak: most bytes of all together.  after: by rounds that a run's log has, the most bytes of the largest child, of the
    process itself if it has none.
    """

    def __init__(self, pid: int, log: Path) -> None:
        self._root, self._log = psutil.Process(pid), log
        self.peak, self.after = 0.0, dict[int, float]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            sizes = list(self._sizes())
            if sizes:
                self.peak = max(self.peak, sum(sizes))
                rounds = self._log.read_bytes().count(b"\n") if self._log.exists() else 0
                self.after[rounds] = max(self.after.get(rounds, 0.0), max(sizes[1:] or sizes))

    def _sizes(self) -> Iterator[float]:
        """The process itself first."""
        with contextlib.suppress(psutil.Error):
            for process in [self._root, *self._root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error, OSError):
                    yield float(process.memory_full_info().pss)


def figures(name: str, runs: Mapping[str, Sequence[Measured]]) -> dict[str, float]:
    losses = {engine: measured[0].loss for engine, measured in runs.items()}
    if not all(abs(loss - losses["bare"]) <= 1e-3 * max(1.0, losses["bare"]) for loss in losses.values()):
        raise SystemExit(f"{name}: the engines did not train the same: {losses}")
    found: dict[str, float] = {}
    for engine, measured in runs.items():
        of = f"{name}_{engine}"
        found[f"{of}_s"] = statistics.median(m.seconds for m in measured)
        found[f"{of}_start_s"] = statistics.median(m.seconds - m.later * len(m.rounds) for m in measured)
        found[f"{of}_round_s"] = statistics.median(m.later for m in measured)
        found[f"{of}_mb"] = statistics.median(m.peak for m in measured) / MIB
        for what, value in (("whole", lambda m: m.seconds), ("round", lambda m: m.later), ("memory", lambda m: m.peak)):
            ratios = [value(m) / value(b) for m, b in zip(measured, runs["bare"], strict=True)]
            found[f"{of}_{what}_ratio"] = statistics.median(ratios)
            found[f"{of}_{what}_ratio_spread"] = max(ratios) - min(ratios)
    return found
