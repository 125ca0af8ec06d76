"""Broken on purpose: each variant is caught by the very check that the honest code passes (tests/privacy/measure.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedmm.errors import PlanInvalid
from fedmm.models.heads import study_loss
from fedmm.models.multimodal import build_model
from fedmm.privacy import engine as engines
from fedmm.privacy.clip import Clip, clip_factors
from fedmm.privacy.engine import CLIPPING, HooksClipper, PatientOptimizer, PrivateEngine
from fedmm.privacy.ghost import GhostClipper, add_to, parts_of
from fedmm.privacy.noise import SystemNoise
from fedmm.privacy.parts import Groups
from fedmm.privacy.rehearsal import rehearse
from fedmm.schema import Batch
from tests import tiny
from tests.privacy.ledger_worker import site
from tests.privacy.measure import (
    LIMIT,
    C,
    clipped_sum,
    engine_for,
    engine_on,
    ledger_gap,
    noise_of,
    noise_spread,
    record_level,
    sensitivity,
)

both_ways = pytest.mark.parametrize("clipping", CLIPPING)


# --- 1: ghost clipping with a loss of shape (S, 1) ----------------------------------------------------------------------


class TwoPasses(PrivateEngine):
    """Ghost clipping as Opacus does it: norms, then a second backward pass of factor x loss. Right for a loss (S,)."""

    def accumulate(self, batch: Batch, loss: object) -> None:
        if batch.studies == 0:
            return
        assert isinstance(self.clipper, GhostClipper)
        model, groups = self.clipper.model, Groups(batch.patient_B, batch.patients)
        total = self.losses(self.clipper.logits(batch), batch).sum()
        parts = parts_of(model, total, groups, self.clipper.clip)
        norm_P = torch.stack([part.squares() for part in parts]).sum(0).sqrt()
        factor_S = clip_factors(norm_P.unsqueeze(0), self.max_grad_norm)[0][0, batch.patient_B]
        with model.without_hooks():
            weighted = factor_S * self.losses(model(batch.inputs, batch.seen_BM), batch)
        for parameter, gradient in zip(
            self.optimizer.params, torch.autograd.grad(weighted.sum(), self.optimizer.params), strict=True
        ):
            add_to(parameter, gradient)

    def losses(self, logits_BO: Tensor, batch: Batch) -> Tensor:
        return study_loss(logits_BO, batch)


class TwoPassesOfColumns(TwoPasses):
    """(S,) x (S, 1) is (S, S): everybody is weighted by the sum of all factors."""

    def losses(self, logits_BO: Tensor, batch: Batch) -> Tensor:
        return study_loss(logits_BO, batch).unsqueeze(1)


def test_ghost_clipping_with_a_loss_of_shape_s_1_is_caught() -> None:
    patients = tiny.batch((1,) * 24)
    honest = [engine_for(tiny.spec(), clipping="ghost", kind=kind) for kind in (PrivateEngine, TwoPasses)]
    assert all(max(sensitivity(engine, patients, limit=100)) <= LIMIT for engine in honest)
    broken = engine_for(tiny.spec(), clipping="ghost", kind=TwoPassesOfColumns)
    assert max(sensitivity(broken, patients, limit=100)) > 10  # measured: 1746
    with pytest.raises(PlanInvalid, match="shape"):
        engine_for(tiny.spec(), clipping="ghost").accumulate(patients, lambda z, b: study_loss(z, b).unsqueeze(1))


# --- 2: a mean over the valid labels of the batch -----------------------------------------------------------------------


def batch_mean(logits_BO: Tensor, batch: Batch) -> Tensor:
    known = (~batch.finding_BF.isnan()).sum() + (batch.class_B >= 0).sum()
    return study_loss(logits_BO, batch) * 100 / known.clamp(min=1)


@both_ways
def test_the_sensitivity_test_catches_a_mean_over_the_valid_labels_of_the_batch(clipping: str) -> None:
    # The first patient has many labels: without them everybody else's gradient grows. Equal labels make them add up.
    whole = tiny.batch((12, *[1] * 30))
    whole.finding_BF[~whole.finding_BF.isnan()], whole.class_B[whole.class_B >= 0] = 1, 0
    engine = engine_for(tiny.spec(), max_grad_norm=2.0, clipping=clipping)
    assert max(sensitivity(engine, whole, limit=1000)) <= LIMIT
    assert max(sensitivity(engine, whole, limit=1000, loss=batch_mean)) > 1.1
    one, other = tiny.batch((1, 2, 1)), tiny.batch((1, 2, 1), seed=1)
    rehearse(engine.model, study_loss, one, other)
    with pytest.raises(PlanInvalid, match="depends on"):
        rehearse(engine.model, batch_mean, one, other)


# --- 3: clipping each study -----------------------------------------------------------------------------------------------


class RecordHooks(HooksClipper):
    def add(self, loss: Tensor, batch: Batch, max_norm: float) -> int:
        return super().add(loss, record_level(batch), max_norm)


class RecordGhost(GhostClipper):
    def add(self, loss: Tensor, batch: Batch, max_norm: float) -> int:
        return super().add(loss, record_level(batch), max_norm)


@both_ways
def test_the_sensitivity_test_catches_clipping_by_record(clipping: str) -> None:
    patients = tiny.batch((1, 5, 2, 3, 4, 1, 12))
    engine = engine_for(tiny.spec(), clipping=clipping)
    assert max(sensitivity(engine, patients)) <= LIMIT
    clip = Clip(engine.optimizer.params)
    ghost, hooks = RecordGhost(engine.model, clip), RecordHooks(engine.model, engine.optimizer.params, clip)
    engine.clipper = ghost if clipping == "ghost" else hooks
    assert max(sensitivity(engine, patients)) > 2


# --- 4: BatchNorm in train mode -------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    """The tiny model behind a BatchNorm without weights, which Opacus lets through."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.model = norm, build_model(tiny.spec(), 3)

    def forward(self, inputs: Mapping[str, Tensor], seen_BM: Tensor, timeline: object = None) -> Tensor:
        out: Tensor = self.model({**inputs, "image": self.norm(inputs["image"])}, seen_BM)
        return out


@both_ways
def test_batch_normalisation_in_train_mode_is_caught(monkeypatch: pytest.MonkeyPatch, clipping: str) -> None:
    patients = tiny.batch((3, *[1] * 20))
    patients.inputs["image"][:3] *= 30  # whose patient dominates the statistics
    patients.seen_BM[:] = True
    honest = engine_on(Normalised(nn.GroupNorm(1, 1, affine=False)), clipping=clipping)
    assert max(sensitivity(honest, patients, limit=1000)) <= LIMIT
    with pytest.raises(PlanInvalid, match="statistics of the batch"):
        engine_on(Normalised(nn.BatchNorm2d(1, affine=False)), clipping=clipping)
    monkeypatch.setattr(engines, "mixes", lambda module: False)
    broken = engine_on(Normalised(nn.BatchNorm2d(1, affine=False)), clipping=clipping)
    assert max(sensitivity(broken, patients, limit=1000)) > 1.1
    with pytest.raises(PlanInvalid, match="depends on"):
        rehearse(broken.model, study_loss, tiny.batch((1, 2, 1)), tiny.batch((1, 2, 1), seed=1))


# --- 5: a quarter of the noise ---------------------------------------------------------------------------------------------


class Quiet(PatientOptimizer):
    def add_noise(self) -> None:
        planned, self.noise_multiplier = self.noise_multiplier, self.noise_multiplier / 4
        super().add_noise()
        self.noise_multiplier = planned


def test_a_quarter_of_the_noise_is_caught_in_every_tensor() -> None:
    engine = engine_for(tiny.spec(), noise=2.0, chance=SystemNoise())
    assert noise_spread(list(noise_of(engine, 50)), 2.0 * C) == []
    engine.optimizer.__class__ = Quiet
    found = noise_spread(list(noise_of(engine, 50)), 2.0 * C)
    assert len(found) == len(engine.optimizer.params)


def test_noise_that_one_tensor_does_not_get_is_caught() -> None:
    engine = engine_for(tiny.spec(), noise=2.0, chance=SystemNoise())
    releases = list(noise_of(engine, 50))
    for release in releases:
        release["head.output.bias"].zero_()
    assert len(noise_spread(releases, 2.0 * C)) == 1


# --- 6: an accountant that starts anew each round ---------------------------------------------------------------------------


def test_a_ledger_that_forgets_is_caught(tmp_path: Path) -> None:
    honest, broken = tmp_path / "honest", tmp_path / "broken"
    for folder in (honest, broken):
        folder.mkdir()

    def forget() -> None:
        for file in broken.iterdir():
            file.unlink()

    assert ledger_gap(honest, site(epsilon=20.0), 20) == pytest.approx(0, abs=1e-9)
    assert ledger_gap(broken, site(epsilon=20.0), 20, between=forget) < -1


# --- all of them at once: what the honest sum is ----------------------------------------------------------------------------


def test_the_honest_ways_give_one_sum() -> None:
    patients = tiny.batch((1, 5, 2, 3))
    sums = [clipped_sum(engine_for(tiny.spec(), clipping=clipping), patients) for clipping in CLIPPING]
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-7)
