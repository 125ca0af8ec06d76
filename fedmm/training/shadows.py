"""Models trained as a run trained its own, on patients of one's choice: what an attack on membership compares with.

They are made in memory, at the hospital, from its own patients and without privacy; none is ever written or sent, so none
is a release and no ledger is charged. That holds for the positive control too: a site.toml that refuses runs without privacy
(`allow_not_private = false`) is about what leaves, and nothing of this leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmm.config import RunConfig, TrainingConfig
from fedmm.data.dataset import Cohort, HospitalData
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.privacy.noise import SystemNoise
from fedmm.privacy.plan import PrivacyPlan, Rate, make_plan
from fedmm.seeds import stream
from fedmm.training.loop import Workbench, train
from fedmm.training.pretrain import open_plan, start_from
from fedmm.training.rates import Flags

# K shadow models, P patients of the hospital

SHADOWS = 16  # K: guess, what two cores afford
CONTROL_SHADOWS = 8  # of the positive control, which needs more steps than a run: guess
STEP_PATIENTS = 64  # expected patients of a shadow's step: the same mean gradient at a fraction of a full batch's cost
EPOCHS, OVER_BATCH, OVER_RATE = (
    30,
    32,
    0.005,
)  # the control: guess
SEED = 0  # public: who is in which half

Told = Callable[[int, int], None]


class Start(NamedTuple):
    """weights: what round 1 sends.  same: whether they are known to be the run's own."""

    weights: Mapping[str, Tensor]
    same: bool


@dataclass(frozen=True)
class Recipe:
    """One training from `start`: `rounds` times `plan`, each change added with the coordinator's momentum."""

    start: Mapping[str, Tensor]
    training: TrainingConfig
    plan: PrivacyPlan
    rounds: int
    rate: float = 1.0
    momentum: float = 0.0

    def make(self, bench: Workbench, cohort: Cohort) -> None:
        """The trained weights are in the bench, which must be a plain one. Nobody's number decides how many steps there are."""
        now = {name: value.clone() for name, value in self.start.items()}
        speed = {name: torch.zeros_like(value) for name, value in now.items()}
        noise = SystemNoise()  # none is added: it draws who is in a step
        for _ in range(self.rounds):
            bench.load(now)
            train(bench, cohort, self.plan, config=self.training, noise=noise)
            if not self.momentum and self.rate == 1:
                now = bench.weights()
                continue
            for name, value in bench.weights().items():
                speed[name] = self.momentum * speed[name] + value - now[name]
                now[name] = now[name] + self.rate * speed[name]
        bench.load(now)


def start_of(config: RunConfig, spec: ModelSpec) -> Start:
    """What the run began with: its seed's weights, or the model of `federation.start_from` where that folder is here too."""
    model = build_model(spec, config.federation.seed)
    folder = Path(config.federation.start_from).expanduser()
    known = not config.federation.start_from or folder.is_dir()
    if config.federation.start_from and known:
        start_from(folder, model)
    return Start({name: value.detach().clone() for name, value in model.trained().items()}, known)


def as_the_run(config: RunConfig, start: Start, *, patients: int) -> Recipe:
    """The run's settings without privacy and without the other hospitals. patients: that a model is trained on.

    What differs, and may make the attack weaker than it could be: no clipping by patient, no noise, one hospital, smaller
    steps in large cohorts, and of the coordinator's rules only the mean with its momentum.
    """
    settings, wanted = config.training, config.federation
    plan = make_plan(config.replace(**{"privacy.enabled": False, "privacy.unit": "patient", "privacy.noise_last": 1.0}))
    plan = replace(plan, sampling_rate=Rate(min(plan.sampling_rate, STEP_PATIENTS / max(patients, 1), 1.0)))
    momentum = wanted.server_momentum if wanted.strategy == "fedavgm" else 0.0
    rate = wanted.server_learning_rate if wanted.strategy in ("fedavgm", "scaffold") else 1.0
    if momentum or rate != 1:
        return Recipe(start.weights, settings, plan, wanted.rounds, rate, momentum)
    steps = plan.steps_per_round * wanted.rounds
    if settings.optimizer == "sgd" and not settings.proximal:  # rounds change nothing then: one long one
        return Recipe(start.weights, settings, replace(plan, steps_per_round=steps, rounds=1), 1)
    return Recipe(start.weights, settings, plan, wanted.rounds)


def by_heart(config: RunConfig, start: Start, *, patients: int, epochs: int = EPOCHS) -> Recipe:
    """The positive control: the same model, trained until it knows its patients by heart, as nobody should."""
    over = config.replace(
        **{
            "training.batch_size": OVER_BATCH,
            "training.optimizer": "adam",
            "training.learning_rate": OVER_RATE,
            "training.modality_dropout": 0.0,
            "training.augment": "",
            "training.augment_copies": 1,
            "training.proximal": 0.0,
            "training.label_smoothing": 0.0,
        }
    )
    plan = open_plan(over, patients=patients, epochs=epochs)
    plan = replace(plan, steps_per_round=plan.steps_per_round * epochs, rounds=1)  # one optimiser from first to last
    return Recipe(start.weights, over.training, plan, 1)


def halves(count: int, patients: int) -> Flags:
    """(K, P) who is in which shadow: each patient in exactly half of them, drawn anew for each. count: even."""
    place_KP = stream(SEED, "shadow halves", count=count, patients=patients).random((count, patients)).argsort(axis=0)
    return np.asarray(place_KP.argsort(axis=0) < count // 2)


def some_of(data: HospitalData, chosen_P: Flags) -> Cohort:
    """The chosen patients of the hospital, whatever their split."""
    return Cohort(data, torch.from_numpy(chosen_P)[data.patient_S])
