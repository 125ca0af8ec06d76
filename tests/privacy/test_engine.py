"""The private step: what it refuses, who cannot hurt, what the noise and the divisor must be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedmm.config import ModelConfig
from fedmm.errors import PlanInvalid
from fedmm.models.heads import study_loss
from fedmm.models.multimodal import ModelSpec, MultimodalModel, build_model
from fedmm.privacy.engine import CLIPPING, PrivateEngine, wrap
from fedmm.privacy.noise import SystemNoise
from fedmm.privacy.plan import PrivacyPlan
from fedmm.schema import InputSpec
from tests import tiny
from tests.fixed_noise import FixedNoise
from tests.privacy.measure import clipped_sum, engine_for, noise_of, noise_spread, plan

STUDIES = (1, 5, 2, 3, 4, 1, 12)
both_ways = pytest.mark.parametrize("clipping", CLIPPING)


def test_a_plan_whose_noise_underflows_takes_no_step() -> None:
    engine = engine_for(tiny.spec(), noise=0.4, max_grad_norm=5e-324)
    with pytest.raises(PlanInvalid, match="not a positive number"):
        engine.step()


def test_a_batch_normalised_model_is_refused() -> None:
    model = build_model(tiny.spec())
    model.norms["image"] = nn.BatchNorm1d(4)
    with pytest.raises(PlanInvalid, match="cannot be bounded"):
        wrap(model)


@both_ways
@pytest.mark.parametrize("broken", [lambda loss_S: loss_S.unsqueeze(1), Tensor.mean], ids=["(S, 1)", "reduced"])
def test_a_loss_that_is_not_one_number_per_study_is_refused(broken: Callable[[Tensor], Tensor], clipping: str) -> None:
    with pytest.raises(PlanInvalid, match="shape"):
        engine_for(tiny.spec(), clipping=clipping).accumulate(
            tiny.batch((2, 1)), lambda logits, batch: broken(study_loss(logits, batch))
        )


@both_ways
def test_a_clip_changed_during_training_is_refused(clipping: str) -> None:
    engine = engine_for(tiny.spec(), clipping=clipping)
    engine.optimizer.max_grad_norm = 10.0
    with pytest.raises(PlanInvalid, match="clipping norm"):
        engine.step()


@pytest.mark.parametrize("first", CLIPPING)
@pytest.mark.parametrize("second", CLIPPING)
def test_a_model_is_wrapped_once(first: str, second: str) -> None:
    model = build_model(tiny.spec()).train()
    wrapped = wrap(model, first)
    for again in (model, wrapped):
        with pytest.raises(PlanInvalid) as caught:
            wrap(again, second)
        assert "wrapped already" in caught.value.why


def test_an_unknown_way_of_clipping_and_a_model_that_is_not_wrapped_are_refused() -> None:
    model = build_model(tiny.spec()).train()
    with pytest.raises(PlanInvalid, match="unknown"):
        wrap(model, "fast")
    with pytest.raises(PlanInvalid, match=r"wrap\(\)"):
        PrivateEngine(
            model, torch.optim.SGD(model.parameters(), lr=1.0), plan=plan(), batch_size=8, noise=FixedNoise(0)
        )


def test_the_text_that_leaves_names_no_number_of_studies() -> None:
    with pytest.raises(PlanInvalid) as caught:
        engine_for(tiny.spec()).accumulate(tiny.batch((17,)), lambda logits, batch: logits)
    assert "17" not in caught.value.public_text


@pytest.mark.parametrize("noise", [0.0])
def test_no_noise_is_not_a_private_engine(noise: float) -> None:
    model = build_model(tiny.spec())
    open_plan = PrivacyPlan(**{**vars(plan()), "noise_multiplier": noise, "private": False})
    with pytest.raises(PlanInvalid, match="positive noise"):
        PrivateEngine(
            wrap(model), torch.optim.SGD(model.parameters(), lr=1.0), plan=open_plan, batch_size=8, noise=FixedNoise(0)
        )


# --- records that should not be able to hurt ----------------------------------------------------------------------------


@both_ways
def test_a_patient_with_nan_pixels_contributes_nothing_and_the_others_everything(clipping: str) -> None:
    engine, whole = engine_for(tiny.spec(), clipping=clipping), tiny.batch((1, 2, 1))
    whole.seen_BM[0, 0] = True
    clean = clipped_sum(engine, tiny.pick(whole, [1, 2]))
    whole.inputs["image"][0] = math.nan
    torch.testing.assert_close(clipped_sum(engine, whole), clean, rtol=1e-5, atol=1e-9)
    assert engine.optimizer.zeroed == 1


@both_ways
def test_a_patient_without_any_label_contributes_nothing(clipping: str) -> None:
    engine, whole = engine_for(tiny.spec(), clipping=clipping), tiny.batch((1, 2))
    whole.finding_BF[0], whole.class_B[0] = math.nan, -1
    torch.testing.assert_close(
        clipped_sum(engine, whole), clipped_sum(engine, tiny.pick(whole, [1])), rtol=1e-5, atol=1e-9
    )


# --- the step -------------------------------------------------------------------------------------------------------------


def weights(engine: PrivateEngine) -> Tensor:
    return torch.cat([p.detach().flatten() for p in engine.optimizer.params]).clone()


def test_an_empty_sample_is_a_step_of_noise_only_with_the_planned_spread() -> None:
    """400 steps of noise N(0, (2 x 0.5 / 8)^2) on some 2,000 weights; two-sided bound at 5 sigma: false alarm 6e-7."""
    engine = engine_for(tiny.spec(), noise=2.0, max_grad_norm=0.5)
    engine.optimizer.noise = SystemNoise()
    before = weights(engine)
    steps = 400
    for _ in range(steps):
        engine.step()
    moved = weights(engine) - before
    expected = 2.0 * 0.5 / 8 * math.sqrt(steps)
    n = moved.numel()
    assert abs(float(moved.double().std()) / expected - 1) < 5 / math.sqrt(2 * n)
    assert abs(float(moved.double().mean())) < 5 * expected / math.sqrt(n)


@both_ways
def test_the_divisor_is_the_public_batch_size_whoever_was_sampled(clipping: str) -> None:
    whole = tiny.batch(STUDIES)
    for patients in ([0], [0, 1, 2, 3]):
        engine = engine_for(tiny.spec(), clipping=clipping)
        engine.optimizer.noise = FixedNoise(0, scale=0.0)
        before, part = weights(engine), tiny.pick(whole, patients)
        total = clipped_sum(engine, part)
        engine.step()
        torch.testing.assert_close((before - weights(engine)).double(), total / 8, rtol=1e-4, atol=1e-7)


@both_ways
def test_a_second_step_does_not_remember_the_first(clipping: str) -> None:
    engine, whole = engine_for(tiny.spec(), clipping=clipping), tiny.batch((1, 2, 1))
    engine.optimizer.noise = FixedNoise(0, scale=0.0)
    clipped_sum(engine, whole)
    engine.step()
    assert float(engine.clipped_sum().norm()) == 0
    before = weights(engine)
    engine.step()
    torch.testing.assert_close(weights(engine), before)


def test_every_tensor_gets_noise_of_the_planned_spread() -> None:
    """Chi-square for each tensor over 100 steps: false alarm 1e-6 for all of them together."""
    engine = engine_for(tiny.spec(), noise=1.5, max_grad_norm=0.5, chance=SystemNoise())
    assert noise_spread(list(noise_of(engine, 100)), 1.5 * 0.5) == []


def test_every_weight_of_the_model_is_trained_and_none_is_a_buffer() -> None:
    model = MultimodalModel(ModelSpec(inputs=InputSpec(), model=ModelConfig(), labels=tiny.LABELS))
    assert not list(model.buffers())
    assert all(parameter.requires_grad for parameter in model.parameters())
