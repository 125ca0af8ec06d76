"""The clip rules and the shares of the bound, whatever norms and groups come in."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmm.errors import PlanInvalid
from fedmm.models.heads import study_loss
from fedmm.models.multimodal import build_model
from fedmm.privacy import rehearsal
from fedmm.privacy.clip import GAMMA, LARGEST_NORM, RULES, Clip, clip_factors
from fedmm.privacy.engine import CLIPPING, Clipper, PrivateEngine, PrivateModel, clipper_for, wrap
from fedmm.privacy.rehearsal import rehearse
from fedmm.training.local import clip_groups
from tests import tiny
from tests.fixed_noise import FixedNoise
from tests.privacy.measure import LIMIT, UP_TO_12, engine_for, plan, sensitivity

ROUNDING = 1 + 1e-14  # a few units in the last place of a double
ODD = [0.0, 5e-324, 1e-310, 1e-30, 1e-12, 1.0, 9.99e29, 1e30, 1e37, 1e308, math.inf, math.nan]
both_ways = pytest.mark.parametrize("clipping", CLIPPING)


@given(
    norms=st.lists(st.sampled_from(ODD) | st.floats(0) | st.floats(1e-8, 1e8), min_size=1, max_size=5),
    bound=st.sampled_from([1e-6, 1e6]) | st.floats(1e-6, 1e6),
    rule=st.sampled_from(RULES),
)
def test_no_norm_comes_out_longer_than_the_bound(norms: list[float], bound: float, rule: str) -> None:
    """norms: of the shares of one patient, whose parts together stay within C."""
    norm_GP = torch.tensor(norms, dtype=torch.float64).unsqueeze(1)
    factor_GP, zeroed = clip_factors(norm_GP, bound, rule=rule)
    finite = all(norm < LARGEST_NORM for norm in norms)
    assert zeroed == (not finite)
    if not finite:
        assert not factor_GP.any()
        return
    tiniest = torch.finfo(torch.float32).tiny
    assert bool(((factor_GP >= tiniest) & (factor_GP <= 1 / GAMMA)).all()), "a normal number in float32"
    made_GP, slack = factor_GP * norm_GP, ROUNDING if rule == "flat" else 1.0
    assert float(made_GP.max()) <= bound / math.sqrt(len(norms)) * slack
    assert float(made_GP.norm()) <= bound * slack


@given(norm=st.floats(1e-12, 1e12), bound=st.floats(1e-6, 1e6))
def test_flat_leaves_what_is_short_as_it_is_and_auto_is_below_the_bound(norm: float, bound: float) -> None:
    norm_GP = torch.tensor([[norm]], dtype=torch.float64)
    flat, auto = (float(clip_factors(norm_GP, bound, rule=rule)[0]) for rule in RULES)
    assert flat == pytest.approx(min(1.0, bound / norm), rel=1e-12)
    assert flat == 1.0 or norm >= bound
    assert auto == pytest.approx(bound / (norm + GAMMA * bound), rel=1e-12)
    assert auto * norm < bound


def test_one_share_that_is_not_finite_leaves_the_whole_patient_out() -> None:
    norm_GP = torch.tensor([[1.0, 1.0, 1.0], [1.0, math.nan, math.inf]], dtype=torch.float64)
    for rule in RULES:
        factor_GP, zeroed = clip_factors(norm_GP, 1.0, rule=rule)
        assert zeroed == 2
        assert (factor_GP > 0).tolist() == [[True, False, False]] * 2


# --- groups ---------------------------------------------------------------------------------------------------------------


def test_every_weight_of_the_model_is_in_one_group_and_each_modality_has_its_own() -> None:
    model = build_model(tiny.spec())
    groups = clip_groups(model, "modality")
    assert sum(len(group) for group in groups) == len(list(model.parameters()))
    names = {id(weight): name for name, weight in model.named_parameters()}
    for modality, group in zip(("image", "report", "audio"), groups[:3], strict=True):
        assert {names[id(weight)].split(".")[1] for weight in group} == {modality}
    assert {names[id(weight)].split(".")[0] for weight in groups[3]} == {"fusion", "head"}
    assert clip_groups(model, "all") == []


def test_groups_that_are_no_partition_and_unknown_rules_are_refused() -> None:
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    for groups in ([[one]], [[one, two], [two]], [[]], [[one, one], [two]]):
        with pytest.raises(PlanInvalid, match="none or several"):
            Clip([one, two], groups=groups)
    with pytest.raises(PlanInvalid, match="rule is unknown"):
        Clip([one], rule="automatic")
    assert Clip([one], groups=[[one], [two]]).shares == 1, "a group that is not trained does not count"


def test_ghost_clipping_does_not_divide_a_layer() -> None:
    layer = nn.Linear(2, 2)
    clip = Clip(list(layer.parameters()), groups=[[layer.weight], [layer.bias]])
    with pytest.raises(PlanInvalid, match="one layer are clipped apart"):
        clipper_for(wrap(layer.train(), "ghost"), list(layer.parameters()), clip)


@both_ways
def test_the_sensitivity_test_catches_groups_that_each_have_the_whole_bound(
    monkeypatch: pytest.MonkeyPatch, clipping: str
) -> None:
    engine = engine_for(tiny.spec(), clipping=clipping, groups="modality")
    assert max(sensitivity(engine, tiny.batch(UP_TO_12), limit=20)) <= LIMIT
    monkeypatch.setattr(Clip, "factors", lambda clip, norm_GP, most: clip_factors(norm_GP, most * clip.shares**0.5))
    assert max(sensitivity(engine, tiny.batch(UP_TO_12), limit=20)) > 1.9  # the square root of four groups


@both_ways
def test_the_rehearsal_sees_a_clipper_that_does_not_follow_rule_or_groups(
    monkeypatch: pytest.MonkeyPatch, clipping: str
) -> None:
    private = wrap(build_model(tiny.spec()).train(), clipping)
    one, other = tiny.batch((1, 2, 1), seed=1), tiny.batch((1, 2, 1), seed=2)
    groups = clip_groups(private._module, "modality")
    rehearse(private, study_loss, one, other, groups=groups)

    def always_flat(model: PrivateModel, parameters: list[nn.Parameter], clip: Clip) -> Clipper:
        return clipper_for(model, parameters, Clip(parameters, groups=groups if clip.shares > 1 else ()))

    def always_all(model: PrivateModel, parameters: list[nn.Parameter], clip: Clip) -> Clipper:
        return clipper_for(model, parameters, Clip(parameters, rule=clip.rule))

    for broken, said in ((always_flat, "rule auto, 1 groups"), (always_all, "rule flat, 4 groups")):
        monkeypatch.setattr(rehearsal, "clipper_for", broken)
        with pytest.raises(PlanInvalid, match=said):
            rehearse(private, study_loss, one, other, groups=groups)


def test_the_engine_takes_the_plan_of_one_round() -> None:
    model = build_model(tiny.spec()).train()
    whole = replace(plan(), rounds=8, noise_last=2.0)
    optimizer, private = torch.optim.SGD(model.parameters(), lr=1.0), wrap(model)
    with pytest.raises(PlanInvalid, match="depends on the round"):
        PrivateEngine(private, optimizer, plan=whole, batch_size=8, noise=FixedNoise(0))
    for number, noise in ((1, 1.0), (8, 2.0)):
        engine = PrivateEngine(private, optimizer, plan=whole.of_round(number), batch_size=8, noise=FixedNoise(0))
        assert engine.optimizer.noise_multiplier == noise
