"""What missing modalities cost: 4 synthetic hospitals of 200 patients, 0 to 50 % of the modalities hidden, open and private.

Fused models against models that were trained on one modality alone, all scored on the same held-back patients.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.experiment import OPEN, Job, hide, predictions, run_all

FUSIONS = ("concat", "weighted", "tokens", "mean_decision")
SHARES = (0.0, 0.1, 0.3, 0.5)
SINGLE_AT = 0.3  # where fused is compared with single
SETTINGS = {"model.audio": "cnn"}
EPSILON = 8.0


def measure(*, quick: bool) -> dict[str, Any]:
    """`open concat 30 %`: mean AUROC of the outputs; `… low`, `… high`: 95 % interval by patient."""
    shares = (0.0, SINGLE_AT) if quick else SHARES
    fusions = FUSIONS[:1] if quick else FUSIONS
    jobs = []
    for privacy, settings in (("open", OPEN), (f"epsilon {EPSILON:g}", {"privacy.epsilon": EPSILON})):
        for fusion in fusions:
            for share in shares:
                every = {**SETTINGS, **settings, "model.fusion": fusion}
                jobs.append(Job(f"{privacy} {fusion} {share:.0%}", every, change=partial(hide, share=share)))
        for name in ("image", "report", "audio"):
            only = partial(hide, only=name)  # nothing of it is missing: the single model at its best
            jobs.append(Job(f"{privacy} only {name}", {**SETTINGS, **settings}, change=only))
    found: dict[str, Any] = {}
    for job, (value, low, high) in run_all(jobs, made, area):
        found |= {job.name: value, f"{job.name} low": low, f"{job.name} high": high}
    return dict(sorted(found.items()))


def made(folder: Path) -> None:
    from fedmm.data.synthetic import synthesize

    synthesize(folder, count=4, patients=200, seed=7, missing=0.0)


def area(run: Path, hospitals: list[Path]) -> tuple[float, float, float]:
    """Mean AUROC over outputs on all held-back patients together, with its interval."""
    from fedmm.models.store import load_spec
    from fedmm.training.home import score_at_home
    from fedmm.training.metrics import join

    result = score_at_home(join(predictions(run, hospitals)), load_spec(run).labels, draws=1000)
    low, high = result["intervals"]["mean_auroc"]
    return result["mean_auroc"], low, high
