"""A private step against the same model's plain step, through the engine that hospitals train with.

plain   forward, backward, SGD step of the mean over patients            noise   what drawing and adding the noise takes of it
ghost   `training.clipping = ghost`: book-keeping, one backward pass      hooks   Opacus' own gradients per study

Patients of one to five studies. The ways take turns, so that whatever else the machine does meets all of them; one thread.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from fedmm.config import ModelConfig
from fedmm.models.heads import Objective
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.engine import PrivateEngine, wrap
from fedmm.privacy.noise import SystemNoise, add_on_grid
from fedmm.privacy.plan import PrivacyPlan, Rate
from fedmm.schema import Batch, InputSpec, Labels, fixed
from fedmm.training.loop import Workbench, made_up

LABELS = Labels(findings=("a", "b", "c"), class_name="severity", class_values=("none", "mild", "severe"))
STUDIES = (1, 2, 3, 4, 5)  # of patients, in turn: 2.9 a patient
CASES: Mapping[str, tuple[dict[str, Any], int]] = {  # leaves, patients of a step
    "small_concat": ({}, 32),
    "small_crossattention": ({"fusion": "cross_attention"}, 32),
    "cached_concat": ({"image": "hog", "audio": "mfcc"}, 128),
    "cached_crossattention": ({"image": "hog", "audio": "mfcc", "fusion": "cross_attention"}, 128),
    "wide_concat": ({"image": "hog", "audio": "mfcc", "width": 512}, 128),
    "resnet18": ({"image": "resnet18"}, 8),
}
PLAN = PrivacyPlan(
    unit="patient", relation="add_or_remove_one", delta=1e-5, epsilon=8.0, sampling="poisson", max_grad_norm=0.4,
    max_studies=5, sampling_rate=Rate(1.0), steps_per_round=1, rounds=1, noise_multiplier=1.0, evaluation_noise=0.0,
    private=True,
)  # fmt: skip


def measure(*, quick: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    cases = list(CASES)[: 4 if quick else None]
    for case in cases:
        found |= compare(case, repeats=7 if quick else 21)
        if not quick:
            plain = _memory(case, "plain")
            found |= {f"{case}_{way}_memory_to_plain": _memory(case, way) / plain for way in ("ghost", "hooks")}
    return found


def compare(case: str, *, repeats: int) -> dict[str, float]:
    """Medians, ratios to the plain step of the same turn and their quartiles."""
    torch.set_num_threads(1)
    ways = {way: step_of(case, way) for way in ("plain", "ghost", "hooks", "noise")}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 2):
        for way, step in ways.items():
            began = time.perf_counter()
            step()
            if turn >= 2:  # the first ones allocate
                seconds[way].append(time.perf_counter() - began)
    found = {f"{case}_plain_ms": 1000 * statistics.median(seconds["plain"])}
    for way in ("ghost", "hooks", "noise"):
        ratios = [a / b for a, b in zip(seconds[way], seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found |= {f"{case}_{way}_to_plain": middle, f"{case}_{way}_to_plain_spread": high - low}
    return found


def step_of(case: str, way: str) -> Callable[[], None]:
    """One step of this way on a model and patients of its own."""
    leaves, patients = CASES[case]
    spec = ModelSpec(inputs=InputSpec(), model=ModelConfig(**leaves), labels=LABELS)
    bench = Workbench(spec, torch.device("cpu"))
    batch = _ready(bench, made_up(spec, [STUDIES[i % len(STUDIES)] for i in range(patients)], 1))
    objective, model = Objective(LABELS), bench.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if way == "plain":
        studies_P = torch.bincount(batch.patient_B, minlength=batch.patients).float()

        def plain() -> None:
            optimizer.zero_grad()
            loss_B = objective(model(batch.inputs, batch.seen_BM, batch.timeline), batch)
            torch.autograd.backward((loss_B / studies_P[batch.patient_B]).sum() / batch.patients)
            optimizer.step()

        return plain
    if way == "noise":
        noise, std = SystemNoise(), PLAN.noise_multiplier * PLAN.max_grad_norm
        trained = [p for p in model.parameters() if p.requires_grad]

        def draw() -> None:
            for p in trained:
                add_on_grid(p.detach(), noise.gaussian(p.shape, std), std)

        return draw
    engine = PrivateEngine(
        wrap(model, way), optimizer, plan=PLAN, batch_size=batch.patients, noise=SystemNoise(), groups=()
    )

    def private() -> None:
        engine.accumulate(batch, objective)
        engine.step()

    return private


def _ready(bench: Workbench, batch: Batch) -> Batch:
    """With what fixed encoders make of files in their place, as a hospital keeps it."""
    inputs = dict(batch.inputs)
    for name, part in bench.fixed_parts().items():
        inputs[fixed(name)] = part.compute(inputs.pop(name)).float()
    return replace(batch, inputs=inputs)


def _memory(case: str, way: str) -> float:
    """Peak resident MiB of a process that takes three steps, less that of one that only builds the model."""
    command = [sys.executable, "-m", "benchmarks.dp_step", case, way]
    base, peak = (float(subprocess.run([*command, n], capture_output=True, check=True).stdout) for n in ("0", "3"))
    return peak - base


def _peak(case: str, way: str, steps: int) -> float:
    torch.set_num_threads(1)
    step = step_of(case, way)
    for _ in range(steps):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(_peak(sys.argv[1], sys.argv[2], int(sys.argv[3])))
