"""Before any statistics: does the training loop, as it runs, bound one patient, add the planned noise and sample as planned?

All of it goes through `loop.train` on made-up patients, with the run's own model, loss, clipping and plan. What is read is
the change of the weights, which is what leaves. Seconds, and the stronger test for each of them (../shared/privacy.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmm.config import ModelConfig, TrainingConfig
from fedmm.data.dataset import HospitalData
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.noise import Noise
from fedmm.privacy.plan import PrivacyPlan, Rate
from fedmm.privacy.trials import Check, noise_fresh, noise_shape, noise_spread, sampler
from fedmm.schema import Batch, InputSpec, Labels, fixed
from fedmm.training.loop import Cohort, Workbench, made_up, train

# W weights, K releases, T steps, N patients
STUDIES = (1, 2, 3, 4, 5, 1)  # of the made-up patients
TINY = 0.01  # C so small that every patient is clipped and the sensitivity shows
LIMIT = 1 + 1e-4  # of a sensitivity, in units of C: float32
LEAST = 0.5  # where everybody is clipped it comes out at 1.000 C, at sqrt(share of the groups) C without a modality
FAR = (
    1000.0  # the learning rate in units of the batch size: the change is long beside the weights, and float32 keeps it
)
RELEASES, VALUES = 4, 2**14  # of each weight
STEPS, PATIENTS = 400, 200  # of the sampler's test: 80,000 draws
# At rate 1 everybody is in, and at tiny rates the tests' tails are wrong; the same sampler is then tried at another one.
LOWEST, MOST, INSTEAD = 0.05, 1.0, 0.3
SMALL = InputSpec(image_size=16, report_tokens=8, report_buckets=64, audio_mels=8, audio_seconds=0.4)


class Silent:
    """No noise, everybody sampled. For made-up patients alone: nothing that a hospital runs can be given it."""

    def gaussian(self, shape: Sequence[int], std: float) -> Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float64)

    def sample(self, count: int, rate: Rate) -> list[int]:
        return list(range(count))

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(0)


class Noted:
    """Patients without studies, and who of them was asked for in each step. As loop.Cohort."""

    def __init__(self, patients: int) -> None:
        self.patients = patients
        self.taken: list[list[int]] = []

    def physical(
        self,
        patients: Sequence[int],
        *,
        limit: int,
        max_studies: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Iterator[Batch]:
        self.taken.append(list(patients))
        return iter(())

    def records(self, most: int, rng: np.random.Generator) -> Cohort:
        return self


def prove(bench: Workbench, plan: PrivacyPlan, config: TrainingConfig, *, noise: Callable[[], Noise]) -> list[Check]:
    """All checks of this file. bench: with private model, its weights are changed.  plan: of one round.  noise: as the
    hospital makes it for a round."""
    steady = config.model_copy(
        update={"optimizer": "sgd", "learning_rate": FAR * config.batch_size, "proximal": 0.0, "modality_dropout": 0.0}
    )
    released = _released(bench, plan, steady, noise, steps=1)
    std = plan.noise_multiplier * plan.max_grad_norm
    return [
        sensitivity(bench, plan, steady, max_grad_norm=TINY, least=LEAST),
        sensitivity(bench, plan, steady, max_grad_norm=plan.max_grad_norm),
        noise_spread(released, std),
        noise_spread(_released(bench, plan, steady, noise, steps=2), std, steps=2),
        noise_shape(released, std),
        noise_fresh(released),
        *sampling(bench.model.spec, plan, config, noise=noise()),
    ]


def sensitivity(
    bench: Workbench, plan: PrivacyPlan, config: TrainingConfig, *, max_grad_norm: float, least: float = 0.0
) -> Check:
    """max_i || S(D) - S(D without i) || / C over made-up patients of 1 to 5 studies, without noise.

    least: a smaller one proves nothing: no gradient reached C, or none reaches the weights at all.
    """
    plan = replace(plan, max_grad_norm=max_grad_norm, noise_multiplier=1e-3, sampling_rate=Rate(1.0), steps_per_round=1)
    data = _hospital(bench)
    start = bench.weights()

    def total(rows: Tensor) -> Tensor:
        return torch.cat(list(_change(bench, start, _cohort(data, rows), plan, config, Silent()).values()))

    everyone = torch.ones(len(data.patient_S), dtype=torch.bool)
    whole = total(everyone)
    moved = [float((whole - total(data.patient_S != i)).norm()) / max_grad_norm for i in range(len(STUDIES))]
    idle = (
        ""
        if max(moved) >= least
        else f", so no patient's gradient was longer than C = {max_grad_norm:g}: it proves nothing"
    )
    return Check(
        f"sensitivity without noise, C = {max_grad_norm:g}",
        least <= max(moved) <= LIMIT,
        f"{max(moved):.5f} C{idle}",
        f"{least:g} to 1.000 C" if least else "at most 1.000 C",
    )


def sampling(spec: ModelSpec, plan: PrivacyPlan, config: TrainingConfig, *, noise: Noise) -> list[Check]:
    """Who takes part, as the loop draws it, with a model so small that 400 steps take a second."""
    rate = plan.sampling_rate if LOWEST <= plan.sampling_rate < MOST else Rate(INSTEAD)
    bench = Workbench(ModelSpec(inputs=SMALL, model=ModelConfig(width=4), labels=spec.labels), torch.device("cpu"))
    cohort = Noted(PATIENTS)
    plan = replace(plan, sampling_rate=rate, steps_per_round=STEPS, unit="patient")
    plain = TrainingConfig(batch_size=config.batch_size, device="cpu")
    train(bench, cohort, plan, config=plain, noise=noise)
    taken_TN = np.zeros((len(cohort.taken), PATIENTS), dtype=bool)
    twice = 0
    for step, patients in enumerate(cohort.taken):
        twice += len(patients) - len(set(patients))
        taken_TN[step, patients] = True
    once = Check("nobody is in a step twice", twice == 0, f"{twice} times", "0 times")
    count = Check("steps of the plan", len(taken_TN) == STEPS, f"{len(taken_TN)} steps", f"{STEPS} steps")
    return [once, count, *(sampler(taken_TN, rate) if len(taken_TN) > 1 else [])]


def _released(
    bench: Workbench, plan: PrivacyPlan, config: TrainingConfig, noise: Callable[[], Noise], *, steps: int
) -> dict[str, NDArray[np.float64]]:
    """By name of a weight, (K, W) what leaves where nobody is in: noise alone. At most VALUES of each weight."""
    plan = replace(plan, steps_per_round=steps)
    found = [_change(bench, bench.weights(), Noted(0), plan, config, noise()) for _ in range(RELEASES)]
    every = {name: max(1, value.numel() // VALUES) for name, value in found[0].items()}
    return {name: np.stack([one[name][:: every[name]].numpy() for one in found]) for name in found[0]}


def _change(
    bench: Workbench,
    start: Mapping[str, Tensor],
    cohort: Cohort,
    plan: PrivacyPlan,
    config: TrainingConfig,
    noise: Noise,
) -> dict[str, Tensor]:
    """By name of a weight, flat, float64: the noisy sum, from the change of what is trained. The bench is as before afterwards."""
    bench.load(start)
    train(bench, cohort, plan, config=config, noise=noise)
    after = bench.weights()
    bench.load(start)
    scale = config.batch_size / config.learning_rate
    moved = [name for name, weight in bench.trained().items() if weight.requires_grad]
    return {name: (start[name].double() - after[name].double()).flatten() * scale for name in moved}


def _cohort(data: HospitalData, rows_S: Tensor) -> Cohort:
    """The patients of these studies."""
    return replace(data, train_S=rows_S).cohort("train")


def _hospital(bench: Workbench) -> HospitalData:
    """Made-up patients in memory; with what fixed encoders make of them in the place of files."""
    spec, fixed_parts = bench.model.spec, bench.fixed_parts()
    batch = made_up(spec, STUDIES, 3)
    inputs = {fixed(name) if name in fixed_parts else name: v for name, v in batch.inputs.items()}
    for name, part in fixed_parts.items():
        inputs[fixed(name)] = part.compute(batch.inputs[name]).float().cpu()
    return hospital_of(replace(batch, inputs=inputs), spec.labels, spec.inputs)


def hospital_of(batch: Batch, labels: Labels, spec: InputSpec) -> HospitalData:
    """A hospital in memory with these studies, all of them to train on: cohorts, draws and physical batches are the real ones."""
    return HospitalData(
        name="made up",
        labels=labels,
        spec=spec,
        inputs=batch.inputs,
        seen_SM=batch.seen_BM,
        finding_SF=batch.finding_BF,
        class_S=batch.class_B,
        patient_S=batch.patient_B,
        train_S=torch.ones(batch.studies, dtype=torch.bool),
        further_SK=batch.further_BK,
        day_S=batch.day_B,
        group_S={},
        key_P=tuple(range(1, 1 + batch.patients)),
    )
