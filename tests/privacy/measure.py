"""Checks that the honest code passes and broken variants fail: one set of functions for both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from fedmm.config import SiteConfig
from fedmm.data.dataset import Cohort, HospitalData
from fedmm.models.heads import study_loss
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.privacy import ghost, layers, parts
from fedmm.privacy.accounting import epsilon_pld
from fedmm.privacy.engine import PrivateEngine, wrap
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.noise import Noise
from fedmm.privacy.plan import Event, PrivacyPlan, Rate
from fedmm.schema import Batch, Labels
from fedmm.training.local import clip_groups
from fedmm.training.proof import hospital_of
from tests import tiny
from tests.fixed_noise import FixedNoise

C = 0.01  # small, so that every patient is clipped and the sensitivity shows
UP_TO_12 = tuple(range(1, 13))
FINDINGS_ONLY = Labels(findings=("effusion",))
CLASS_ONLY = Labels(class_name="severity", class_values=("none", "mild", "severe"))
TASKS = {"multi-task": tiny.LABELS, "binary": FINDINGS_ONLY, "class": CLASS_ONLY}
LIMIT = 1 + 1e-4  # of a sensitivity, in units of C: float32

Loss = Callable[[Tensor, Batch], Tensor]


def plan(*, noise: float = 1.0, max_grad_norm: float = C, unit: str = "patient", most: int = 12) -> PrivacyPlan:
    return PrivacyPlan(
        unit=unit,
        relation="add_or_remove_one",
        delta=1e-4,
        epsilon=8.0,
        sampling="poisson",
        max_grad_norm=max_grad_norm,
        max_studies=most,
        sampling_rate=Rate(1.0),
        steps_per_round=1,
        rounds=1,
        noise_multiplier=noise,
        evaluation_noise=0.0,
        private=True,
    )


def engine_on(
    model: nn.Module,
    *,
    noise: float = 1.0,
    max_grad_norm: float = C,
    clipping: str = "hooks",
    rule: str = "flat",
    groups: str = "all",
    kind: type[PrivateEngine] = PrivateEngine,
    chance: Noise | None = None,
) -> PrivateEngine:
    """The real engine around a model, noise from a fixed source: `clipped_sum` reads before any is added."""
    return kind(
        wrap(model.train(), clipping),
        torch.optim.SGD(model.parameters(), lr=1.0),
        plan=plan(noise=noise, max_grad_norm=max_grad_norm),
        batch_size=8,
        noise=chance or FixedNoise(0),
        clip_rule=rule,
        groups=clip_groups(model, groups),
    )


def engine_for(spec: ModelSpec, **how: Any) -> PrivateEngine:
    """how: as in `engine_on`."""
    return engine_on(build_model(spec, 3), **how)


def hospital(whole: Batch, labels: Labels = tiny.LABELS) -> HospitalData:
    return hospital_of(whole, labels, tiny.INPUTS)


def clipped_sum(engine: PrivateEngine, *batches: Batch, loss: Loss = study_loss) -> Tensor:
    """(parameters,) float64."""
    engine._clear()
    for batch in batches:
        engine.accumulate(batch, loss)
    return engine.clipped_sum().double()


def sensitivity(
    engine: PrivateEngine,
    patients: Cohort | Batch,
    *,
    loss: Loss = study_loss,
    limit: int = 7,
    cap: int | None = None,
) -> list[float]:
    """|| S(D) - S(D without i) || / C for each patient i, by the cohort's own draws and physical batches."""
    cohort = patients if isinstance(patients, Cohort) else hospital(patients).cohort("all")
    everyone = list(range(cohort.patients))

    def total(chosen: Sequence[int]) -> Tensor:
        rng = np.random.default_rng(5)
        return clipped_sum(engine, *cohort.physical(chosen, limit=limit, max_studies=cap, rng=rng), loss=loss)

    all_of_them = total(everyone)
    rests = (everyone[:i] + everyone[i + 1 :] for i in everyone)
    return [float((all_of_them - total(rest)).norm()) / engine.max_grad_norm for rest in rests]


def record_level(batch: Batch) -> Batch:
    """Each study as if it were a patient."""
    return replace(batch, patient_B=torch.arange(batch.studies), patients=batch.studies)


def noise_spread(releases: Sequence[dict[str, Tensor]], std: float, *, false_alarm: float = 1e-6) -> list[str]:
    """Tensors whose noise has another spread than `std`: two-sided chi-square, `false_alarm` for all tensors together."""
    names = list(releases[0])
    tail = false_alarm / len(names) / 2
    wrong = []
    for name in names:
        values = torch.cat([release[name].double().flatten() for release in releases])
        statistic = float((values / std).square().sum())
        low, high = stats.chi2.ppf(tail, values.numel()), stats.chi2.isf(tail, values.numel())
        if not low < statistic < high:
            wrong.append(f"{name}: {math.sqrt(statistic / values.numel()):.3f} of the planned spread")
    return wrong


def noise_of(engine: PrivateEngine, times: int) -> Iterator[dict[str, Tensor]]:
    """What the engine adds to an empty sum."""
    names = [name for name, _ in engine.model._module.named_parameters()]
    for _ in range(times):
        engine._clear()
        engine.optimizer.add_noise()
        yield {name: p.grad.clone() for name, p in zip(names, engine.optimizer.params, strict=True)}


def ledger_gap(folder: Path, site: SiteConfig, rounds: int, *, between: Callable[[], None] = lambda: None) -> float:
    """Epsilon that the ledger shows after some rounds, less that of their composition: 0 for an honest one.

    between: what happens to the ledger's folder from round to round.
    """
    event = Event("train", 2.0, Rate(0.5), 3)
    shown = 0.0
    for number in range(rounds):
        with Ledger.open(folder, site) as ledger:
            with ledger.reserve(event, run="r", round=number) as charge:
                charge.start()
                charge.settle()
            shown = ledger.spent().epsilon
        between()
    return shown - epsilon_pld([event] * rounds, site.privacy.delta)


# Ways in which book-keeping may treat a layer; small ones take the first, so that tests have to force the others.
FORMS = ("as chosen", "held twice", "dots", "groups of a convolution", "large maps")


def force(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Every layer that can takes this form, whatever its size."""
    if form != "as chosen":
        monkeypatch.setattr(ghost, "POOLED", 0)
        monkeypatch.setattr(layers, "FEW", 0)
        monkeypatch.setattr(ghost, "PASSES", 10**9 if form == "dots" else 0)
        monkeypatch.setattr(ghost, "NARROW", 10**9 if form == "groups of a convolution" else 0)
    if form == "large maps":
        monkeypatch.setattr(layers, "UNFOLDED", 0)
        monkeypatch.setattr(layers, "IN_CACHE", 200)
    if form == "held twice":
        monkeypatch.setattr(parts, "HELD", 1)
        monkeypatch.setattr(ghost.Book, "_fits", lambda *_: False)
        monkeypatch.setattr(ghost.Book, "_dots", lambda *_, **__: False)
