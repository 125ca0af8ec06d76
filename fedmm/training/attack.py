"""All attacks on one finished model at one hospital, and the same on a model that is open to them: the positive control.

An attack that finds nothing proves something only where the same attack, on a model of the same make that was trained without
privacy until it knew its patients by heart, finds them. Everything here is exact statistics of patients: it stays at the hospital.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmm.config import RunConfig
from fedmm.data.dataset import HospitalData, load_hospital
from fedmm.models.multimodal import MultimodalModel
from fedmm.privacy.plan import PrivacyPlan, make_plan
from fedmm.training.inversion import attack_updates
from fedmm.training.loop import Workbench, choose_device
from fedmm.training.membership import attack_membership
from fedmm.training.relink import attack_links
from fedmm.training.shadows import CONTROL_SHADOWS, Recipe, Start, Told, as_the_run, by_heart, start_of

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Target:
    """model: finished.  config, plan: of its run."""

    model: MultimodalModel
    config: RunConfig
    plan: PrivacyPlan


def target_of(model: MultimodalModel, content: Mapping[str, Any]) -> Target:
    """content: config.json of the run that made the model, or of a hospital's own model. Raises: ConfigError, PlanInvalid."""
    config = RunConfig.from_flat(content["settings"])
    plan = content.get("plan") or content.get("personal", {}).get("plan")
    return Target(model, config, PrivacyPlan.from_flat(plan) if plan else make_plan(config))


def read_patients(hospital: Path, target: Target) -> HospitalData:
    """The hospital's files as the model reads them. Raises: HospitalInvalid."""
    bench = Workbench(target.model.spec, torch.device("cpu"))
    return load_hospital(hospital, target.model.spec.inputs, parts=bench.fixed_parts())


def attack(
    target: Target, data: HospitalData, *, shadows: int, image_steps: int, control: bool, tell: Tell
) -> dict[str, Any]:
    """{"membership", "relinkage", "inversion", "control"}, as `fedmm attack --format json` shows them.

    shadows: an even number, 0: no lira.  image_steps: of each image's reconstruction.  control: whether to train one and attack
    it too.  tell: what, how much of it is done, and of how much. Changes neither the model nor a file of the hospital; no
    ledger is charged, because nothing leaves.
    """
    # 1 what the run began with, and a bench for all that is trained and asked here
    spec, config = target.model.spec, target.config
    start = start_of(config, spec)
    bench = Workbench(spec, torch.device(choose_device("auto")))
    room = _Room(bench, start, data, config, image_steps, tell)
    half = len(data.key_P) // 2  # patients of a shadow
    # 2 the run's model
    trained = {name: value.detach().clone() for name, value in target.model.trained().items()}
    recipe = as_the_run(config, start, patients=half)
    found = {"start_known": start.same, **_all_three(room, trained, recipe=recipe, plan=target.plan, shadows=shadows)}
    if not control:
        return {**found, "control": None}
    # 3 the same without privacy and learnt by heart, on the same training patients; it lives in this function alone
    cohort = data.cohort("train")
    tell("control model", 0, 1)
    by_heart(config, start, patients=cohort.patients).make(bench, cohort)
    tell("control model", 1, 1)
    recipe, less = by_heart(config, start, patients=half), min(shadows, CONTROL_SHADOWS)
    plan = make_plan(config.replace(**{"privacy.enabled": False, "privacy.noise_last": 1.0}))
    beside = _all_three(room, bench.weights(), recipe=recipe, plan=plan, shadows=less, who=" of the control")
    return {**found, "control": beside}


@dataclass(frozen=True)
class _Room:
    """What stays the same from one model to the next."""

    bench: Workbench
    start: Start
    data: HospitalData
    config: RunConfig
    image_steps: int
    tell: Tell


def _all_three(
    room: _Room, weights: Mapping[str, Tensor], *, recipe: Recipe, plan: PrivacyPlan, shadows: int, who: str = ""
) -> dict[str, Any]:
    """recipe: of the shadow models.  plan: of the updates; they begin at the run's start, whatever the weights."""

    def told(what: str) -> Told:
        return lambda done, total: room.tell(what + who, done, total)

    bench, data = room.bench, room.data
    shadowed = told("shadow models")
    return {
        "shadows": shadows,
        "membership": attack_membership(bench, weights, data, recipe=recipe, shadows=shadows, progress=shadowed),
        "relinkage": attack_links(bench, weights, data),
        "inversion": attack_updates(
            bench.model.spec,
            room.start.weights,
            data,
            config=room.config,
            plan=plan,
            progress=told("images from updates"),
            steps=room.image_steps,
        ),
    }
