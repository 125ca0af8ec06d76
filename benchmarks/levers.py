"""What buys accuracy under privacy: 2 synthetic hospitals of 2,000 patients, the best configuration and each lever taken away."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiment import OPEN, Job, run_all
from benchmarks.missing import area

HOSPITALS, PATIENTS = 2, 2000
BEST = {
    "model.audio": "cnn",
    "training.batch_size": 1000,
    "training.physical_studies": 256,
    "privacy.delta": 4e-5,
}
WITHOUT = {  # lever: the setting that takes it away
    "fixed image features": {"model.image": "cnn"},
}
EPSILONS = (8.0, 3.0)
REPEATS = 2


def measure(*, quick: bool) -> dict[str, Any]:
    """Mean held-back AUROC with its interval by patient (of the first run), and of each repeat."""
    levels = {"open": OPEN} | {f"epsilon {e:g}": {"privacy.epsilon": e} for e in EPSILONS}
    repeats = range(1 if quick else REPEATS)
    jobs = [Job(f"{level}: best", {**BEST, **s}, r) for level, s in levels.items() for r in repeats]
    if not quick:
        for lever, setting in WITHOUT.items():
            jobs += [Job(f"epsilon 3: without {lever}", {**BEST, **levels["epsilon 3"], **setting}, r) for r in repeats]
    found: dict[str, Any] = {}
    for job, (value, low, high) in sorted(run_all(jobs, made, area), key=lambda pair: (pair[0].name, pair[0].repeat)):
        figure = found.setdefault(job.name, {"score": value, "interval": [low, high], "runs": []})
        figure["runs"].append(value)
    return found


def made(folder: Path) -> None:
    from fedmm.data.synthetic import synthesize

    synthesize(folder, count=HOSPITALS, patients=PATIENTS, seed=11)


def shown(scores: Sequence[float]) -> str:
    return ", ".join(f"{score:.3f}" for score in scores)
