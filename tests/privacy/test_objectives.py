"""Noise off, for every kind of labels, loss and way of sharing: one patient moves the sum by at most C; rehearsed before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedmm.config import ModelConfig, TrainingConfig
from fedmm.errors import PlanInvalid
from fedmm.models.heads import Objective, Output
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.privacy.engine import CLIPPING, wrap
from fedmm.privacy.rehearsal import rehearse
from fedmm.schema import Batch, Labels
from fedmm.training.loop import REHEARSAL, Nobody, Workbench, forget_workbenches, made_up, train, workbench
from tests import tiny
from tests.fixed_noise import FixedNoise
from tests.privacy.measure import LIMIT, C, clipped_sum, engine_for, engine_on, hospital, plan, sensitivity

FURTHER = tiny.FURTHER
KINDS = {
    "findings": Labels(findings=("effusion", "icu")),
    "class": Labels(class_name="severity", class_values=("none", "mild", "severe")),
    "ordinal": Labels(ordinal_name="stage", ordinal_levels=FURTHER.ordinal_levels),
    "regression": Labels(value_name="risk", value_range=FURTHER.value_range),
    "survival": Labels(time_name="time", event_name="event", time_edges=FURTHER.time_edges),
    "multitask": tiny.EVERY,
}
SETTINGS = {
    "cross_entropy": TrainingConfig(),
    "focal": TrainingConfig(loss="focal", focal_gamma=0.5),
    "smoothed": TrainingConfig(label_smoothing=0.2),
    "weighted": TrainingConfig(positive_weight=100.0),
    "all": TrainingConfig(loss="focal", label_smoothing=0.3, positive_weight=0.1),
}
STUDIES = (1, 5, 12, 2, 7)
both_ways = pytest.mark.parametrize("clipping", CLIPPING)
every_kind = pytest.mark.parametrize("kind", KINDS)
# What a setting does not touch is the same objective again: focal and weighted are of findings and class alone.
TOUCHED = {"regression": ["cross_entropy"], "survival": ["cross_entropy"], "ordinal": ["cross_entropy", "smoothed"]}
every_kind_and_loss = pytest.mark.parametrize(
    ("kind", "loss"), [(kind, loss) for kind in KINDS for loss in TOUCHED.get(kind, SETTINGS)]
)
both_shares = pytest.mark.parametrize("sharing", ["equal", "uncertainty"])


def spec_of(kind: str, sharing: str, fusion: str = "concat") -> ModelSpec:
    model = ModelConfig(width=4, fusion=fusion, task_weights=sharing)
    return ModelSpec(inputs=tiny.INPUTS, model=model, labels=KINDS[kind])


@both_ways
@every_kind_and_loss
@both_shares
def test_one_patient_moves_the_sum_by_at_most_c(clipping: str, kind: str, loss: str, sharing: str) -> None:
    labels = KINDS[kind]
    objective = Objective.from_config(SETTINGS[loss], labels)
    patients = hospital(tiny.batch(STUDIES, labels=labels), labels).cohort("all")
    engine = engine_for(spec_of(kind, sharing), clipping=clipping)
    moved = sensitivity(engine, patients, loss=objective, limit=14)
    assert max(moved) <= LIMIT
    assert max(moved) >= 1 - 1e-4, "nobody was clipped: the test shows nothing"


@both_shares
@pytest.mark.parametrize("fusion", ["mimo", "stacking"])
@both_ways
def test_views_and_doubt_together_keep_the_bound(clipping: str, fusion: str, sharing: str) -> None:
    objective = Objective(tiny.EVERY)
    patients = hospital(tiny.batch(STUDIES, labels=tiny.EVERY), tiny.EVERY).cohort("all")
    engine = engine_for(spec_of("multitask", sharing, fusion), clipping=clipping)
    assert 1 - 1e-4 <= max(sensitivity(engine, patients, loss=objective, limit=14)) <= LIMIT


@every_kind
@both_shares
def test_both_ways_of_clipping_give_the_same_sum(kind: str, sharing: str) -> None:
    whole = tiny.batch(STUDIES, labels=KINDS[kind])
    objective = Objective.from_config(SETTINGS["all"], KINDS[kind])
    sums = [
        clipped_sum(engine_for(spec_of(kind, sharing), clipping=c, max_grad_norm=1.0), whole, loss=objective)
        for c in CLIPPING
    ]
    assert sums[0].any()
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-5)


@both_ways
@pytest.mark.parametrize("doubt", [1e3, -1e3])
def test_doubts_that_a_coordinator_made_up_do_not_stretch_the_bound(clipping: str, doubt: float) -> None:
    model = build_model(spec_of("multitask", "uncertainty"), 3)
    with torch.no_grad():
        model.doubt.log_variance.weight.fill_(doubt)
    patients = hospital(tiny.batch(STUDIES, labels=tiny.EVERY), tiny.EVERY).cohort("all")
    engine = engine_on(model, clipping=clipping)
    assert 0 < max(sensitivity(engine, patients, loss=Objective(tiny.EVERY))) <= LIMIT


# --- rehearsal ----------------------------------------------------------------------------------------------------------


@both_ways
@every_kind
@both_shares
def test_every_kind_and_loss_passes_the_rehearsal(clipping: str, kind: str, sharing: str) -> None:
    spec = spec_of(kind, sharing)
    private = wrap(build_model(spec).train(), clipping)
    one, other = (made_up(spec, REHEARSAL, seed) for seed in (1, 2))
    for settings in SETTINGS.values():
        rehearse(private, Objective.from_config(settings, KINDS[kind]), one, other)


def weights_counted_in_the_batch(objective: Objective, output: Tensor | Output, batch: Batch) -> Tensor:
    """What people do for rare events."""
    share = batch.further_BK[:, -1].nansum() / (~batch.further_BK[:, -1].isnan()).sum().clamp(min=1)
    return Objective(objective.labels, positive_weight=1 + float(share))(output, batch) * (1 + share)


def cox_partial_likelihood(objective: Objective, output: Tensor, batch: Batch) -> Tensor:
    """Its risk sets are other patients: why survival is by hazards here."""
    time_B, event_B = batch.further_BK[:, 0].nan_to_num(), batch.further_BK[:, 1].nan_to_num()
    risk_BB = torch.where(time_B >= time_B.unsqueeze(1), output[:, 0], -1e9)
    return event_B * (risk_BB.logsumexp(1) - output[:, 0])


@both_ways
@pytest.mark.parametrize("broken", [weights_counted_in_the_batch, cox_partial_likelihood])
def test_a_loss_over_other_patients_is_refused_and_would_break_the_bound(
    monkeypatch: pytest.MonkeyPatch, clipping: str, broken: object
) -> None:
    spec = spec_of("survival", "equal")
    forget_workbenches()
    objective = Objective(spec.labels)
    honest = engine_for(spec, clipping=clipping)
    patients = hospital(tiny.batch(STUDIES, labels=spec.labels), spec.labels).cohort("all")
    with monkeypatch.context() as patch:
        if broken is cox_partial_likelihood:
            patch.setattr(Objective, "__call__", broken)
            assert max(sensitivity(honest, patients, loss=objective, limit=100)) > 1.01
            with pytest.raises(PlanInvalid, match="depends on"):
                workbench(spec, "cpu", True, clipping=clipping)
        else:
            one, other = (made_up(spec, REHEARSAL, seed) for seed in (1, 2))
            with pytest.raises(PlanInvalid, match="depends on"):
                rehearse(honest.model, lambda z, b: broken(objective, z, b), one, other)  # type: ignore[operator]
    forget_workbenches()


@both_ways
def test_private_training_takes_the_rehearsed_objective_and_no_other(clipping: str) -> None:
    spec, settings = spec_of("multitask", "uncertainty"), SETTINGS["all"]
    objective = Objective.from_config(settings, spec.labels)
    bench = workbench(spec, "cpu", True, clipping=clipping, objective=objective)
    assert bench is workbench(spec, "cpu", True, clipping=clipping, objective=objective)
    assert bench is not workbench(spec, "cpu", True, clipping=clipping)
    before = bench.weights()
    train(bench, Nobody(), plan(), config=settings, noise=FixedNoise(0))
    assert all(not torch.equal(before[name], value) for name, value in bench.weights().items()), "noise on every weight"
    with pytest.raises(PlanInvalid, match="rehearsed"):
        train(bench, Nobody(), plan(), config=TrainingConfig(), noise=FixedNoise(0))
    forget_workbenches()


def test_a_setting_of_the_loss_changes_what_private_and_plain_training_do() -> None:
    spec = spec_of("multitask", "equal")
    patients = hospital(tiny.batch((2, 3, 1), labels=spec.labels), spec.labels).cohort("all")
    for private in (True, False):
        quiet = plan(max_grad_norm=1e3, noise=1e-9)
        asked = quiet if private else replace(quiet, private=False, noise_multiplier=0.0)
        ends = []
        for settings in SETTINGS.values():
            settings = settings.model_copy(update={"modality_dropout": 0.0, "batch_size": 3})
            bench = Workbench(spec, torch.device("cpu"), objective=Objective.from_config(settings, spec.labels))
            bench.load(build_model(spec, 3).trained())
            train(bench, patients, asked, config=settings, noise=FixedNoise(0))
            ends.append(torch.cat([value.flatten() for value in bench.weights().values()]))
        for i, one in enumerate(ends):
            assert all(float((one - other).norm()) > 1e-4 for other in ends[:i])


def test_c_is_what_the_measure_says() -> None:
    assert engine_for(spec_of("class", "equal")).max_grad_norm == C
