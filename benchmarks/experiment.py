"""Federated runs through the real apps, one after the other on fresh ledgers, several at a time: what the accuracy figures share.

Each worker process has hospital folders of its own. Their ledgers are thrown away between runs: the patients are invented,
or research data whose policy allows runs without privacy; for real patients that would be the one thing never to do.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Settings = Mapping[str, Any]
Prepare = Callable[[Path], None]  # fills an empty folder with hospital folders

# Features that nobody trained, one linear layer on each: a run of 60 rounds takes half a minute on one core.
FAST: Settings = {
    "model.image": "hog",
    "model.audio": "mfcc",
    "training.clipping": "ghost",
    "federation.evaluate_every": 0,
    "privacy.evaluation_share": 0.0,  # scores are computed here, on invented or public patients
}
OPEN: Settings = {"privacy.enabled": False}


@dataclass(frozen=True)
class Job:
    """name: of the figure.  settings: beside the defaults.  repeat: which of several runs.

    change: made to the hospital folders for this run alone (their manifests; the files stay).
    """

    name: str
    settings: Settings
    repeat: int = 0
    change: Callable[[Path], None] | None = None


def run_all(
    jobs: Sequence[Job], prepare: Prepare, measure: Callable[[Path, list[Path]], Any]
) -> Iterator[tuple[Job, Any]]:
    """Each job's run folder and hospitals, measured, as they are finished; progress with what is left on stderr.

    measure: of a finished run folder and the hospital folders; must be importable by a new process.
    """
    import sys

    workers = min(len(os.sched_getaffinity(0)), len(jobs)) or 1
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(prepare,)) as pool:
        waiting = {pool.submit(_one, job, measure): job for job in jobs}
        for done, future in enumerate(as_completed(waiting), start=1):
            left = (time.monotonic() - began) / done * (len(jobs) - done)
            print(f"  {done}/{len(jobs)} runs, {left / 60:.0f} min left", file=sys.stderr, flush=True)
            yield waiting[future], future.result()


_place: list[Path] = []


def _start(prepare: Prepare) -> None:
    import atexit

    import torch

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fedmm-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _place[:] = [folder]
    (folder / "hospitals").mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(folder / "hospitals")


def _one(job: Job, measure: Callable[[Path, list[Path]], Any]) -> Any:
    from fedmm.cli import simulate_here
    from fedmm.config import RunConfig, find_hospitals

    folder = _place[0]
    hospitals, out = find_hospitals(folder / "hospitals"), folder / "run"
    forget_ledgers(hospitals)
    shutil.rmtree(out, ignore_errors=True)
    for hospital in hospitals:
        original = hospital / "manifest.original"
        if not original.exists():
            shutil.copy(hospital / "manifest.csv", original)
        shutil.copy(original, hospital / "manifest.csv")
        if job.change:
            job.change(hospital)
    places = {"data.hospitals": str(folder / "hospitals"), "federation.out": str(out)}
    seed = {"federation.seed": job.repeat + 1}
    with contextlib.redirect_stdout(io.StringIO()):
        simulate_here(RunConfig.from_flat({**FAST, **seed, **job.settings, **places}), workers=0)
        return measure(out, hospitals)


def forget_ledgers(hospitals: Iterable[Path]) -> None:
    """Only for invented or public patients: from here on nothing is known to have left."""
    for hospital in hospitals:
        for file in hospital.glob("ledger.*"):
            file.unlink()


def hide(hospital: Path, *, share: float = 0.0, only: str = "", seed: int = 0) -> None:
    """Empty each cell of a modality with probability `share`, but never a study's last; `only`: all cells of the others
    instead.

    A study that has nothing left stays, as it would in a hospital.
    """
    import csv

    import numpy as np

    from fedmm.schema import MODALITIES

    rng = np.random.default_rng([seed, *hospital.name.encode()])
    with (hospital / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        here = [name for name in MODALITIES if row[name]]
        gone = [name for name in here if rng.random() < share]
        if len(gone) == len(here):
            gone = gone[1:]
        if only:
            gone = [name for name in MODALITIES if name != only]
        row.update(dict.fromkeys(gone, ""))
    with (hospital / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def predictions(run: Path, hospitals: Sequence[Path], *, split: str = "test") -> list[Any]:
    """`Predictions` of a run's model for each hospital."""
    import torch

    from fedmm.data.dataset import load_hospital
    from fedmm.models.store import load_model
    from fedmm.training.loop import Workbench, predict

    model = load_model(run)
    bench = Workbench(model.spec, torch.device("cpu"))
    bench.load(model.trained())
    data = (load_hospital(hospital, model.spec.inputs, parts=bench.fixed_parts()) for hospital in hospitals)
    return [predict(bench, each.cohort(split)) for each in data]
