"""A model to start from: trained without privacy on public data, and taken over by a run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmm.config import RunConfig
from fedmm.errors import ConfigError
from fedmm.models.multimodal import ModelSpec, MultimodalModel, build_model, check_leaves
from fedmm.models.store import CONFIG_FILE, WEIGHTS_FILE, load_model
from fedmm.pretrained_folder import digests
from fedmm.privacy.noise import SystemNoise
from fedmm.privacy.plan import PrivacyPlan, Rate, make_plan
from fedmm.schema import Batch, Labels
from fedmm.training.augment import check_augment
from fedmm.training.effect import check_effect
from fedmm.training.local import check_local
from fedmm.training.loop import Cohort, Workbench, check_unit, choose_device, train
from fedmm.training.watch import Check, nothing

ABOUT_LABELS = ("head.", "further.", "doubt.")  # parts whose size follows from what is predicted


@dataclass(frozen=True)
class Pooled:
    """Patients of several cohorts as one, numbered one cohort after the other."""

    cohorts: Sequence[Cohort]

    @property
    def patients(self) -> int:
        return sum(cohort.patients for cohort in self.cohorts)

    def physical(
        self,
        patients: Sequence[int],
        *,
        limit: int,
        max_studies: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Iterator[Batch]:
        first = 0
        for cohort in self.cohorts:
            own = [patient - first for patient in patients if first <= patient < first + cohort.patients]
            yield from cohort.physical(own, limit=limit, max_studies=max_studies, rng=rng)
            first += cohort.patients

    def records(self, most: int, rng: np.random.Generator) -> Pooled:
        return Pooled([cohort.records(most, rng) for cohort in self.cohorts])


def check_open(config: RunConfig) -> None:
    """Can a model be pretrained with these settings? What the coordinator asks of a run, asked of one without privacy.

    Raises: ConfigError, PlanInvalid.
    """
    check_leaves(config.model)
    check_local(config)
    if config.training.proximal:
        raise ConfigError(
            f"training.proximal = {config.training.proximal:g} does not go with pretrain",
            why="it pulls back to the weights of a round, and there are no rounds",
            fix="leave training.proximal out",
        )
    check_effect(config.replace(**{"privacy.enabled": False}))
    check_augment(config.training)  # names; once more when there is a model
    check_unit(config.model, config.privacy.unit)


def begin(config: RunConfig, labels: Labels) -> tuple[MultimodalModel, Workbench]:
    """The model to pretrain, with `federation.start_from`'s weights where that is named, and a bench that has them.

    Raises: ConfigError.
    """
    device = torch.device(choose_device(config.training.device))
    inputs, leaves = config.data.inputs, config.model
    spec = ModelSpec(inputs=inputs, model=leaves, labels=labels, pretrained=digests(leaves, config.data))
    model = build_model(spec, config.federation.seed)
    check_augment(config.training, model.fixed_parts())
    if config.federation.start_from:
        start_from(Path(config.federation.start_from).expanduser(), model)
    bench = Workbench(spec, device)
    bench.load(dict(model.trained()))
    return model, bench


def open_plan(config: RunConfig, *, patients: int, epochs: int) -> PrivacyPlan:
    """Without privacy: `training.batch_size` patients a step on average, each once an epoch. The data are public, so their
    number may show."""
    rate = Rate(min(1.0, config.training.batch_size / max(1, patients)))
    plan = make_plan(config.replace(**{"privacy.enabled": False, "privacy.unit": "patient"}))
    return replace(plan, sampling_rate=rate, steps_per_round=math.ceil(1 / rate), rounds=epochs)


def pretrain(
    bench: Workbench,
    cohort: Cohort,
    plan: PrivacyPlan,
    *,
    config: RunConfig,
    progress: Callable[[int, int], None],
    check: Check = nothing,
) -> None:
    """`plan.rounds` epochs on the bench's model, in place. plan: from `open_plan`.  progress: epochs done, and in all.
    check: as in `train`."""
    noise = SystemNoise()  # none is added: it draws who is in a step
    for epoch in range(plan.rounds):
        train(bench, cohort, plan, config=config.training, noise=noise, check=check)
        progress(epoch + 1, plan.rounds)


def start_from(folder: Path, model: MultimodalModel) -> dict[str, Any]:
    """Give `model` the weights of the model in `folder`; all but what belongs to the labels, where those differ.

    Returns what a run's config.json says about it: sha256 of the weights' file, and how they were made.
    Raises: ConfigError if there is no model, or it is built of other leaves or reads files otherwise.
    """
    other = load_model(folder)
    for what, mine, its in (
        ("data (how files become inputs)", model.spec.inputs, other.spec.inputs),
        ("model", model.spec.model, other.spec.model),
    ):
        differs = [name for name, value in mine.model_dump().items() if its.model_dump()[name] != value]
        if differs:
            raise ConfigError(
                f"{folder} cannot be started from: it has other settings of {what}: {', '.join(differs)}",
                why="its weights would mean something else",
                fix="give the run the settings of that model, or pretrain one with the run's",
            )
    own, weights = model.trained(), other.trained()
    if model.spec.labels != other.spec.labels:
        kept = {name: value for name, value in own.items() if name.startswith(ABOUT_LABELS)}
        weights = {name: value for name, value in weights.items() if not name.startswith(ABOUT_LABELS)} | kept
    try:
        model.load_trained(weights)
    except ValueError:
        raise ConfigError(f"{folder} cannot be started from: its weights have other names or sizes") from None
    about = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    return {"sha256": digest, "pretraining": about.get("pretraining")}
