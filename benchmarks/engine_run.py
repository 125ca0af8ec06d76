"""One federated job on one engine, in a process of its own: python -m benchmarks.engine_run ENGINE JOB.json

bare     a loop without a federation: folders read, noise calibrated, one live model, weights loaded into it, trained and averaged
here     fedmm in one process                    workers  fedmm in two worker processes
ray      the same two apps in Flower's simulation on Ray, two actors
pfl      pfl-research in one process (engine_pfl.py)
nvflare  NVFlare's simulator, a thread for each hospital; nvflare2: two threads (engine_nvflare.py)

All train with `fedmm.training.loop.train` on the same model, data and plan. Of a plain job the sampling repeats
(tests/fixed_noise.py), so that all must end with the same loss. Prints JSON: seconds of the whole and of each round; leaves
weights.safetensors beside JOB.json, of which ENGINE `loss` gives the mean loss on all training studies.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from torch import Tensor

    from fedmm.config import RunConfig
    from fedmm.data.dataset import Cohort
    from fedmm.models.multimodal import ModelSpec
    from fedmm.privacy.noise import Noise
    from fedmm.privacy.plan import PrivacyPlan
    from fedmm.training.loop import Workbench

BEGAN = time.monotonic()
FIXED = "tests.fixed_noise:app"


@dataclass(frozen=True)
class Done:
    """rounds: seconds of each one.  weights: of the final model."""

    rounds: list[float]
    weights: Mapping[str, Tensor]


class Bare:
    """What an engine that is not ours is given: the job's model, data and plan, and one hospital's round."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from fedmm.config import RunConfig, find_hospitals, load_site
        from fedmm.models.heads import Objective
        from fedmm.models.multimodal import ModelSpec, build_model
        from fedmm.privacy.plan import make_plan
        from fedmm.training.loop import workbench

        self.config: RunConfig = RunConfig.from_flat(settings)
        self.plan: PrivacyPlan = make_plan(self.config)
        self.folders = find_hospitals(Path(self.config.data.hospitals))
        labels = load_site(self.folders[0]).labels
        self.spec: ModelSpec = ModelSpec(inputs=self.config.data.inputs, model=self.config.model, labels=labels)
        model, training = build_model(self.spec, self.config.federation.seed), self.config.training
        self.start = {name: value.detach().clone() for name, value in model.trained().items()}
        self.objective = Objective.from_config(training, labels)
        make = (self.spec, "cpu", self.plan.private)
        self.bench: Workbench = workbench(*make, clipping=training.clipping, objective=self.objective)

    def cohort(self, number: int) -> Cohort:
        from fedmm.data.dataset import load_hospital

        return load_hospital(self.folders[number], self.spec.inputs, parts=self.bench.fixed_parts()).cohort("train")

    def round(self, number: int, round: int, weights: Mapping[str, Tensor], cohort: Cohort) -> dict[str, Tensor]:
        self.bench.load(weights)
        self.train(number, round, cohort)
        return self.bench.weights()

    def train(self, number: int, round: int, cohort: Cohort) -> None:
        """From the weights that the bench has, in place."""
        from fedmm.training.loop import train

        train(
            self.bench, cohort, self.plan.of_round(round), config=self.config.training, noise=self.noise(number, round)
        )

    def noise(self, number: int, round: int) -> Noise:
        from client.app import system_noise
        from fedmm.config import load_site
        from tests.fixed_noise import fixed_noise

        name = load_site(self.folders[number]).hospital.name
        return system_noise(name, round) if self.plan.private else fixed_noise(name, round)

    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """Mean over all training studies."""
        import torch

        self.bench.load(weights)
        model, total, studies = self.bench.model.eval(), 0.0, 0
        with torch.no_grad():
            for number in range(len(self.folders)):
                cohort = self.cohort(number)
                batch = cohort.batch(range(cohort.patients))
                total += float(self.objective(model(batch.inputs, batch.seen_BM, batch.timeline), batch).sum())
                studies += batch.studies
        return total / studies


def bare(settings: Mapping[str, Any]) -> Done:
    import torch

    torch.set_num_threads(1)
    job = Bare(settings)
    weights, rounds = job.start, []
    cohorts: list[Cohort] = []
    for number in range(1, job.config.federation.rounds + 1):
        began = time.monotonic()
        cohorts = cohorts or [job.cohort(i) for i in range(len(job.folders))]
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        for i, cohort in enumerate(cohorts):
            for name, value in job.round(i, number, weights, cohort).items():
                total[name] += value
        weights = {name: value / len(cohorts) for name, value in total.items()}
        rounds.append(time.monotonic() - began)
    return Done(rounds, weights)


def ours(settings: Mapping[str, Any], start: Callable[[RunConfig, str], None]) -> Done:
    """fedmm itself: all of a run, from introductions to the report."""
    from fedmm.cli import CLIENT
    from fedmm.config import RunConfig

    config = RunConfig.from_flat(settings)
    start(config, CLIENT if config.privacy.enabled else FIXED)
    return finished(config)


def finished(config: RunConfig) -> Done:
    from fedmm.report.record import MODEL_FILE, read_rounds

    folder = Path(config.federation.out)
    rounds = [float(record["seconds"]) for record in read_rounds(folder)]
    return Done(rounds, load_file(folder / MODEL_FILE))


def here(config: RunConfig, client: str) -> None:
    import torch

    from fedmm.cli import simulate_here

    torch.set_num_threads(1)
    simulate_here(config, workers=0, client=client)


def workers(config: RunConfig, client: str) -> None:
    from fedmm.cli import simulate_here

    simulate_here(config, workers=2, client=client)


def ray(config: RunConfig, client: str) -> None:
    from fedmm.cli import simulate_on_ray

    simulate_on_ray(config, client=client)


def main() -> int:
    engine, file = sys.argv[1], Path(sys.argv[2])
    settings, weights = json.loads(file.read_text()), file.with_name("weights.safetensors")
    said: dict[str, Any]
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines and their processes print goes to the log
    if engine == "loss":
        said = {"loss": Bare(settings).loss(load_file(weights))}
    else:
        done = run(engine, settings)
        said = {"rounds": done.rounds, "seconds": time.monotonic() - BEGAN}
        save_file(dict(done.weights), weights)
    print(json.dumps(said), file=answer, flush=True)
    os._exit(0)  # engines leave threads behind that would take seconds to end; the run is over


def run(engine: str, settings: Mapping[str, Any]) -> Done:
    if engine == "bare":
        return bare(settings)
    if engine == "pfl":
        from benchmarks.engine_pfl import pfl

        return pfl(settings)
    if engine in ("nvflare", "nvflare2"):
        from benchmarks.engine_nvflare import nvflare

        return nvflare(settings, threads=2 if engine == "nvflare2" else None)
    return ours(settings, {"here": here, "workers": workers, "ray": ray}[engine])


if __name__ == "__main__":
    sys.exit(main())
