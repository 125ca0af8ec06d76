"""Updates in fewer bytes: what crosses, what coding takes, and what it costs in accuracy.

Bytes and milliseconds are of a change of 11 M weights, drawn as noise is: most of a private update is noise. The scores are of
private runs over two synthetic hospitals of 400 patients (epsilon 8), on all their held-back patients: what counts is how far the
codings lie from fp32 beside how far two runs of fp32 lie from one another.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from benchmarks.aggregate import SHAPES, WEIGHTS, timed, with_spread
from benchmarks.experiment import Job, run_all
from benchmarks.missing import area
from fedmm.federation.messages import ARRAYS, views
from fedmm.federation.wire import CODE, coded, received

SETTINGS = {"federation.rounds": 30, "privacy.epsilon": 8.0}
REPEATS = 3


def measure(*, quick: bool) -> dict[str, Any]:
    found: dict[str, Any] = dict(_coding(3 if quick else 9))
    repeats = 1 if quick else REPEATS
    jobs = [Job(w, {**SETTINGS, "federation.wire": w}, r) for w in ("fp32", *CODE) for r in range(repeats)]
    scores: dict[str, list[float]] = {}
    for job, (value, up) in run_all(jobs, made, scored):
        scores.setdefault(job.name, []).append(value)
        found[f"{job.name}_run_kb_up_per_update"] = up
    for name, values in scores.items():
        found |= with_spread(f"{name}_run_auroc", values)
    return dict(sorted(found.items()))


def _coding(turns: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    change = 1e-3 * rng.standard_normal(WEIGHTS, dtype="float32")
    before = ArrayRecord({name: Array(rng.standard_normal(shape, dtype="float32")) for name, shape in SHAPES.items()})
    sent = views(before)
    found = {"fp32_mb": sum(len(array.data) for array in before.values()) / 1e6}
    for wire in CODE:
        times: dict[str, list[float]] = {}
        record, left = coded(change, wire, bound=1e9, rng=rng)
        content = RecordDict({ARRAYS: record})
        for _ in range(turns):
            timed(times, "encode", lambda wire=wire: coded(change, wire, bound=1e9, rng=rng))
            timed(times, "decode", lambda wire=wire, content=content: received(content, before, sent, (), wire))
        found[f"{wire}_mb"] = sum(len(array.data) for array in record.values()) / 1e6
        found[f"{wire}_left_out_share"] = float(np.linalg.norm(left) / np.linalg.norm(change))
        for what, each in times.items():
            found |= with_spread(f"{wire}_{what}_ms", each)
    scale = float(np.abs(change).max()) / 127
    whole = np.floor(change / scale + rng.random(WEIGHTS, dtype="float32")) * scale
    found["int8_with_one_scale_left_out_share"] = float(np.linalg.norm(whole - change) / np.linalg.norm(change))
    return found


def made(folder: Path) -> None:
    from fedmm.data.synthetic import synthesize

    synthesize(folder, count=2, patients=400, seed=3)


def scored(run: Path, hospitals: list[Path]) -> tuple[float, float]:
    """Mean AUROC; mean kB of an update that came."""
    from fedmm.report.record import read_rounds

    sizes = [a["bytes"] for record in read_rounds(run) for a in record["arrived"] if a["what"] == "weights"]
    return area(run, hospitals)[0], statistics.mean(sizes) / 1e3
