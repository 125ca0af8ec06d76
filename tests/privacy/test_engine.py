"""The private step: sensitivity first, then what the noise and the divisor must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedmm.config import ModelConfig, RunConfig
from fedmm.data.dataset import load_hospital
from fedmm.data.synthetic import synthesize
from fedmm.errors import PlanInvalid
from fedmm.models.fusion import fusions
from fedmm.models.heads import study_loss
from fedmm.models.multimodal import ModelSpec, MultimodalModel, build_model
from fedmm.privacy.engine import PatientOptimizer, PrivateEngine, wrap
from fedmm.privacy.noise import SystemNoise
from fedmm.privacy.plan import PrivacyPlan
from fedmm.schema import Batch, InputSpec, Labels
from tests import tiny
from tests.fixed_noise import FixedNoise

C = 0.01  # small, so that every patient is clipped and the sensitivity shows
STUDIES = (1, 5, 2, 3, 4, 1, 12)
FINDINGS_ONLY = Labels(findings=("effusion",))
CLASS_ONLY = Labels(class_name="severity", class_values=("none", "mild", "severe"))


def plan(*, noise: float = 1.0, max_grad_norm: float = C) -> PrivacyPlan:
    return PrivacyPlan(
        unit="patient",
        relation="add_or_remove_one",
        delta=1e-4,
        epsilon=8.0,
        max_grad_norm=max_grad_norm,
        sampling_rate=1.0,
        steps_per_round=1,
        rounds=1,
        noise_multiplier=noise,
        private=True,
    )


def engine_for(spec: ModelSpec, *, noise: float = 1.0, max_grad_norm: float = C) -> PrivateEngine:
    model = build_model(spec, 3).train()
    return PrivateEngine(
        wrap(model),
        torch.optim.SGD(model.parameters(), lr=1.0),
        plan=plan(noise=noise, max_grad_norm=max_grad_norm),
        batch_size=8,
        noise=FixedNoise(0),
    )


def clipped_sum(engine: PrivateEngine, *batches: Batch, loss: Callable[[Tensor, Batch], Tensor] = study_loss) -> Tensor:
    engine._clear()
    for batch in batches:
        engine.accumulate(batch, loss)
    return engine.clipped_sum().double()


def sensitivity(
    engine: PrivateEngine, whole: Batch, *, loss: Callable[[Tensor, Batch], Tensor] = study_loss
) -> list[float]:
    """|| S(D) - S(D without i) || / C for each patient i."""
    everyone = list(range(whole.patients))
    total = clipped_sum(engine, whole, loss=loss)
    rests = [tiny.pick(whole, everyone[:i] + everyone[i + 1 :]) for i in everyone]
    return [float((total - clipped_sum(engine, rest, loss=loss)).norm()) / engine.max_grad_norm for rest in rests]


@pytest.mark.parametrize("fusion", fusions.names())
@pytest.mark.parametrize("labels", [tiny.LABELS, FINDINGS_ONLY, CLASS_ONLY], ids=["multi-task", "binary", "class"])
def test_one_patient_of_1_to_12_studies_moves_the_sum_by_at_most_c(fusion: str, labels: Labels) -> None:
    engine = engine_for(tiny.spec(fusion, labels))
    moved = sensitivity(engine, tiny.batch(STUDIES, labels=labels))
    assert max(moved) <= 1 + 1e-4
    assert max(moved) >= 1 - 1e-4, "nobody was clipped: the test shows nothing"


def test_the_shipped_model_loader_and_loss_have_sensitivity_1_c(tmp_path: Path) -> None:
    config = RunConfig()
    (hospital,) = synthesize(tmp_path, count=1, patients=16, seed=5, missing=0.5)
    data = load_hospital(hospital, config.data.inputs)
    cohort = data.cohort("all")
    (whole,) = cohort.physical(range(cohort.patients), limit=10_000)
    studies = torch.bincount(whole.patient_B)
    assert set(studies.tolist()) >= {1, 5}
    assert not whole.seen_BM.all(0).any(), "every modality is missing somewhere"
    labels = Labels(
        findings=("effusion", "consolidation", "cardiomegaly"),
        class_name="severity",
        class_values=("none", "mild", "severe"),
    )
    engine = engine_for(ModelSpec(inputs=config.data.inputs, model=config.model, labels=labels))
    everyone = list(range(cohort.patients))
    total = clipped_sum(engine, whole)
    moved = []
    for i in everyone:
        rest = everyone[:i] + everyone[i + 1 :]
        moved.append(float((total - clipped_sum(engine, *cohort.physical(rest, limit=7))).norm()) / C)
    assert max(moved) == pytest.approx(1.0, abs=1e-4)


def test_physical_batches_do_not_change_the_sum() -> None:
    engine, whole = engine_for(tiny.spec()), tiny.batch(STUDIES)
    parts = [tiny.pick(whole, [0, 1]), tiny.pick(whole, []), tiny.pick(whole, [2]), tiny.pick(whole, [3, 4, 5, 6])]
    torch.testing.assert_close(clipped_sum(engine, *parts), clipped_sum(engine, whole), rtol=1e-5, atol=1e-8)


def test_the_sum_equals_gradients_taken_patient_by_patient_without_opacus() -> None:
    whole, spec = tiny.batch(STUDIES), tiny.spec()
    ours = clipped_sum(engine_for(spec, max_grad_norm=1.0), whole)
    model = build_model(spec, 3).double()
    expected = torch.zeros_like(ours)
    for i in range(whole.patients):
        one = tiny.pick(whole, [i])
        inputs = {n: v.double() if v.is_floating_point() else v for n, v in one.inputs.items()}
        loss = study_loss(
            model(inputs, one.seen_BM), Batch(**{**vars(one), "finding_BF": one.finding_BF.double()})
        ).mean()
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.flatten() for g in grads])
        expected += flat * min(1.0, 1.0 / float(flat.norm().clamp(min=1e-12)))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bound", [1e-6, 0.4])
@pytest.mark.parametrize("size", [1e20, 1e25, 1e29, 1e37])
def test_crafted_weights_do_not_stretch_the_sensitivity(bound: float, size: float) -> None:
    """A coordinator's weights made the clip factor a denormal, which was rounded up: 1.98 C."""
    engine, whole = engine_for(tiny.spec(), max_grad_norm=bound), tiny.batch(STUDIES)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.zero_()
        dict(engine.model.named_parameters())["_module.fusion.join.bias"].fill_(size)
        dict(engine.model.named_parameters())["_module.head.output.weight"].fill_(1 / size)
    assert max(sensitivity(engine, whole)) <= 1 + 1e-4


def test_a_plan_whose_noise_underflows_takes_no_step() -> None:
    engine = engine_for(tiny.spec(), noise=0.4, max_grad_norm=5e-324)
    with pytest.raises(PlanInvalid, match="not a positive number"):
        engine.step()


# --- broken on purpose: the sensitivity test must see each of these -----------------------------------------------------


class RecordLevel(PatientOptimizer):
    """Clips each study instead of each patient."""

    def clip_and_accumulate(self) -> None:
        self.patient_S, self.patients = torch.arange(len(self.patient_S)), len(self.patient_S)
        super().clip_and_accumulate()


def test_the_sensitivity_test_catches_clipping_by_record() -> None:
    engine = engine_for(tiny.spec())
    engine.optimizer.__class__ = RecordLevel
    assert max(sensitivity(engine, tiny.batch(STUDIES))) > 2


def test_the_sensitivity_test_catches_a_mean_over_the_valid_labels_of_the_batch() -> None:
    def batch_mean(logits_BO: Tensor, batch: Batch) -> Tensor:
        known = (~batch.finding_BF.isnan()).sum() + (batch.class_B >= 0).sum()
        return study_loss(logits_BO, batch) * 100 / known.clamp(min=1)

    # The first patient has many labels: without them everybody else's gradient grows. Equal labels make them add up.
    whole = tiny.batch((12, *[1] * 30))
    whole.finding_BF[~whole.finding_BF.isnan()], whole.class_B[whole.class_B >= 0] = 1, 0
    rest = tiny.pick(whole, range(1, whole.patients))
    engine = engine_for(tiny.spec(), max_grad_norm=2.0)
    moved = {
        loss: float((clipped_sum(engine, whole, loss=loss) - clipped_sum(engine, rest, loss=loss)).norm()) / 2.0
        for loss in (study_loss, batch_mean)
    }
    assert moved[study_loss] <= 1 + 1e-4
    assert moved[batch_mean] > 1.1


def test_a_batch_normalised_model_is_refused() -> None:
    model = build_model(tiny.spec())
    model.norms["image"] = nn.BatchNorm1d(4)
    with pytest.raises(PlanInvalid, match="cannot be bounded"):
        wrap(model)


@pytest.mark.parametrize("broken", [lambda loss_S: loss_S.unsqueeze(1), Tensor.mean], ids=["(S, 1)", "reduced"])
def test_a_loss_that_is_not_one_number_per_study_is_refused(broken: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(PlanInvalid, match="shape"):
        engine_for(tiny.spec()).accumulate(tiny.batch((2, 1)), lambda logits, batch: broken(study_loss(logits, batch)))


def test_a_clip_changed_during_training_is_refused() -> None:
    engine = engine_for(tiny.spec())
    engine.optimizer.max_grad_norm = 10.0
    with pytest.raises(PlanInvalid, match="clipping norm"):
        engine.step()


@pytest.mark.parametrize("noise", [0.0])
def test_no_noise_is_not_a_private_engine(noise: float) -> None:
    model = build_model(tiny.spec())
    open_plan = PrivacyPlan(**{**vars(plan()), "noise_multiplier": noise, "private": False})
    with pytest.raises(PlanInvalid, match="positive noise"):
        PrivateEngine(
            wrap(model), torch.optim.SGD(model.parameters(), lr=1.0), plan=open_plan, batch_size=8, noise=FixedNoise(0)
        )


# --- records that should not be able to hurt ----------------------------------------------------------------------------


def test_a_patient_with_nan_pixels_contributes_nothing_and_the_others_everything() -> None:
    engine, whole = engine_for(tiny.spec()), tiny.batch((1, 2, 1))
    whole.seen_BM[0, 0] = True
    clean = clipped_sum(engine, tiny.pick(whole, [1, 2]))
    whole.inputs["image"][0] = math.nan
    torch.testing.assert_close(clipped_sum(engine, whole), clean, rtol=1e-5, atol=1e-9)
    assert engine.optimizer.zeroed == 1


def test_a_patient_without_any_label_contributes_nothing() -> None:
    engine, whole = engine_for(tiny.spec()), tiny.batch((1, 2))
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


def test_every_tensor_gets_noise_of_the_planned_spread() -> None:
    """Each tensor's noise over 300 steps, chi-square at 5 sigma: false alarm about 1e-5 for the whole test."""
    engine = engine_for(tiny.spec(), noise=1.5, max_grad_norm=1.0)
    engine.optimizer.noise = SystemNoise()
    draws: list[list[Tensor]] = [[] for _ in engine.optimizer.params]
    for _ in range(300):
        engine.optimizer.add_noise()
        for kept, parameter in zip(draws, engine.optimizer.params, strict=True):
            kept.append(parameter.grad.flatten().double().clone())
    for kept in draws:
        values = torch.cat(kept)
        assert abs(float(values.var()) / 1.5**2 - 1) < 5 * math.sqrt(2 / values.numel())


def test_the_divisor_is_the_public_batch_size_whoever_was_sampled() -> None:
    whole = tiny.batch(STUDIES)
    for patients in ([0], [0, 1, 2, 3]):
        engine = engine_for(tiny.spec())
        engine.optimizer.noise = FixedNoise(0, scale=0.0)
        before, part = weights(engine), tiny.pick(whole, patients)
        total = clipped_sum(engine, part)
        engine.step()
        torch.testing.assert_close((before - weights(engine)).double(), total / 8, rtol=1e-4, atol=1e-7)


def test_a_second_step_does_not_remember_the_first() -> None:
    engine, whole = engine_for(tiny.spec()), tiny.batch((1, 2, 1))
    engine.optimizer.noise = FixedNoise(0, scale=0.0)
    clipped_sum(engine, whole)
    engine.step()
    assert float(engine.clipped_sum().norm()) == 0
    before = weights(engine)
    engine.step()
    torch.testing.assert_close(weights(engine), before)


def test_every_weight_of_the_model_is_trained_and_none_is_a_buffer() -> None:
    model = MultimodalModel(ModelSpec(inputs=InputSpec(), model=ModelConfig(), labels=tiny.LABELS))
    assert not list(model.buffers())
    assert all(parameter.requires_grad for parameter in model.parameters())
