"""The plan: one value that couples sampling, noise and accounting, and that cannot be put together wrongly."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from fedmm.config import RunConfig
from fedmm.errors import PlanInvalid
from fedmm.privacy import plan as plan_module
from fedmm.privacy.accounting import epsilon_pld
from fedmm.privacy.plan import KINDS, UNPROTECTED, Event, PrivacyPlan, Rate, make_plan

FLAT = {
    "unit": "patient",
    "relation": "add_or_remove_one",
    "delta": 1e-5,
    "epsilon": 3.0,
    "sampling": "poisson",
    "max_grad_norm": 1.0,
    "max_studies": 5,
    "sampling_rate": 0.25,
    "steps_per_round": 2,
    "rounds": 30,
    "noise_multiplier": 1.3,
    "evaluation_noise": 0.0,
    "private": True,
}


def test_all_rounds_together_keep_the_epsilon_of_the_run() -> None:
    config = RunConfig().replace(**{"privacy.epsilon": 3, "federation.rounds": 10})
    plan = make_plan(config)
    assert 2.99 < epsilon_pld([plan.round_event(1)] * plan.rounds, plan.delta) <= 3
    assert plan.round_event(1) == Event(
        "train", plan.noise_multiplier, config.training.sampling_rate, config.training.local_steps
    )


def test_training_and_noisy_scores_together_keep_the_epsilon_of_the_run() -> None:
    config = RunConfig().replace(**{"privacy.epsilon": 3, "federation.rounds": 10, "privacy.evaluation_share": 0.2})
    plan, without = make_plan(config, noisy_scores=True), make_plan(config)
    scores = plan.evaluation_event()
    assert scores is not None
    assert 0.59 < epsilon_pld([scores], plan.delta) <= 0.6
    assert 2.99 < epsilon_pld([plan.round_event(1)] * plan.rounds + [scores], plan.delta) <= 3
    assert (without.evaluation_event(), without.noise_multiplier < plan.noise_multiplier) == (None, True)


def test_no_noisy_scores_are_planned_where_nobody_wants_them() -> None:
    for settings in ({"privacy.evaluation_share": 0}, {"privacy.enabled": False}):
        assert make_plan(RunConfig().replace(**settings), noisy_scores=True).evaluation_noise == 0


def test_scores_for_an_epsilon_that_no_noise_reaches_are_a_plan_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(**_: Any) -> float:
        raise ValueError("no noise multiplier is enough")

    monkeypatch.setattr(plan_module, "calibrate", impossible)
    with pytest.raises(PlanInvalid, match="test scores"):
        make_plan(RunConfig(), noisy_scores=True)


def test_a_rate_is_one_type_with_one_range() -> None:
    assert Rate(1) == Rate(1.0) == 1.0
    assert type(PrivacyPlan.from_flat(FLAT).sampling_rate) is type(Event("train", 1, 0.5, 1).sampling_rate) is Rate
    for wrong in (0, -0.1, 1.1, math.nan, math.inf, "0.5", None, True):
        with pytest.raises(PlanInvalid, match="sampling_rate"):
            Rate(wrong)


def test_a_plan_for_records_charges_a_patient_for_all_of_them() -> None:
    """The ledger protects patients: k records of one are k shifts of C, each with probability q."""
    flat = FLAT | {"unit": "record", "max_studies": 3, "sampling_rate": 0.5, "noise_multiplier": 3.0}
    event = PrivacyPlan.from_flat(flat).round_event(1)
    assert event == Event("train", 1.0, 1 - 0.5**3, 2)
    assert PrivacyPlan.from_flat(flat | {"max_studies": 1}).round_event(1) == Event("train", 3.0, 0.5, 2)
    assert PrivacyPlan.from_flat(flat | {"sampling_rate": 1.0}).round_event(1) == Event("train", 1.0, 1.0, 2)


@pytest.mark.parametrize(("records", "rate", "noise"), [(2, 0.1, 2.0), (5, 0.3, 6.0), (3, 0.01, 1.5), (4, 1.0, 5.0)])
def test_the_bound_for_a_patient_dominates_the_true_mixture(records: int, rate: float, noise: float) -> None:
    """Hockey-stick divergences of the mixture over the number of drawn records, by quadrature, both directions."""
    plan = PrivacyPlan.from_flat(
        FLAT | {"unit": "record", "max_studies": records, "sampling_rate": rate, "noise_multiplier": noise}
    )
    event = plan.round_event(1)
    x = np.linspace(-12 * noise, 12 * noise + records, 200_001)
    without = norm.pdf(x, 0, noise)
    true = sum(binom.pmf(j, records, rate) * norm.pdf(x, j, noise) for j in range(records + 1))
    q, width = event.sampling_rate, records
    bound = (1 - q) * without + q * norm.pdf(x, width, event.noise_multiplier * width)
    for epsilon in (0.01, 0.1, 0.5, 1.0, 2.0):
        for p_true, q_true, p_bound, q_bound in ((true, without, bound, without), (without, true, without, bound)):
            spent = np.trapezoid(np.maximum(p_true - np.exp(epsilon) * q_true, 0), x)
            charged = np.trapezoid(np.maximum(p_bound - np.exp(epsilon) * q_bound, 0), x)
            assert spent <= charged + 1e-9


def test_privacy_off_has_no_noise_and_says_so() -> None:
    plan = make_plan(RunConfig().replace(**{"privacy.enabled": False}))
    assert (plan.private, plan.noise_multiplier, plan.round_event(1).kind) == (False, 0.0, "not_private")


def test_an_impossible_budget_is_a_plan_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(**_: Any) -> float:
        raise ValueError("no noise multiplier is enough")

    monkeypatch.setattr(plan_module, "calibrate", impossible)
    with pytest.raises(PlanInvalid, match="cannot be kept"):
        make_plan(RunConfig())


def test_a_plan_survives_a_message() -> None:
    plan = PrivacyPlan.from_flat(FLAT)
    assert PrivacyPlan.from_flat(plan.to_flat()) == plan
    assert all(type(value) in (str, int, float, bool) for value in plan.to_flat().values())


def test_the_digest_depends_on_every_field() -> None:
    changed = {"delta": 1e-6, "epsilon": 2.0, "max_grad_norm": 2.0, "sampling_rate": 0.5, "unit": "record"}
    changed |= {"steps_per_round": 3, "rounds": 3, "noise_multiplier": 2.0, "evaluation_noise": 2.0, "max_studies": 4}
    plans = [PrivacyPlan.from_flat({**FLAT, key: value}) for key, value in changed.items()]
    digests = {plan.digest() for plan in [PrivacyPlan.from_flat(FLAT), *plans]}
    assert len(digests) == 11
    assert all(len(digest) == 64 for digest in digests)
    assert PrivacyPlan.from_flat({**FLAT, "max_grad_norm": 1}).digest() == PrivacyPlan.from_flat(FLAT).digest()


@pytest.mark.parametrize("name", ["delta", "epsilon", "max_grad_norm", "sampling_rate", "noise_multiplier"])
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -1.0, 0.0, "1", None, True, pytest.param(10**400, id="huge")]
)
def test_numbers_must_be_finite_and_positive(name: str, value: Any) -> None:
    with pytest.raises(PlanInvalid):
        PrivacyPlan.from_flat({**FLAT, name: value})


@pytest.mark.parametrize("name", ["steps_per_round", "rounds", "max_studies"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", 10**12, None])
def test_counts_must_be_whole_and_positive(name: str, value: Any) -> None:
    with pytest.raises(PlanInvalid):
        PrivacyPlan.from_flat({**FLAT, name: value})


@pytest.mark.parametrize(
    "wrong",
    [
        {"unit": "hospital"},
        {"relation": "replace_one"},
        {"delta": 1.0},
        {"sampling_rate": 1.01},
        {"sampling": "shuffled"},
        {"sampling": None},
        {"evaluation_noise": -1.0},
        {"evaluation_noise": math.nan},
        {"private": False, "noise_multiplier": 0.0, "evaluation_noise": 1.0},
        {"private": 1},
        {"private": False},  # noise without privacy is a contradiction
        {"private": True, "noise_multiplier": 0.0},
        {"unit": ["patient"]},
    ],
)
def test_contradictions_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanInvalid):
        PrivacyPlan.from_flat({**FLAT, **wrong})


@pytest.mark.parametrize("flat", [{}, {**FLAT, "more": 1}, {k: v for k, v in FLAT.items() if k != "delta"}, [], None])
def test_keys_must_be_exact(flat: Any) -> None:
    with pytest.raises(PlanInvalid, match="exactly the keys"):
        PrivacyPlan.from_flat(flat)


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PrivacyPlan.from_flat(FLAT).noise_multiplier = 0.1  # type: ignore[misc]


def test_an_event_survives_json_and_knows_what_it_is() -> None:
    event = Event("evaluate", 4, 1, 1)
    assert Event.from_dict(event.to_dict()) == event == Event("evaluate", 4.0, 1.0, 1)
    assert event.private
    assert not any(Event(kind, 0, 0.5, 3).private for kind in UNPROTECTED)
    with pytest.raises(PlanInvalid, match="kind"):
        Event("tune", 1.0, 0.5, 3)


@given(
    noise=st.floats() | st.integers(-3, 3),
    rate=st.floats(),
    steps=st.integers(-5, 5),
    kind=st.sampled_from(KINDS),
)
def test_whatever_comes_in_an_event_is_sound_or_refused(noise: float, rate: float, steps: int, kind: str) -> None:
    try:
        event = Event(kind, noise, rate, steps)
    except PlanInvalid:
        return
    assert 0 < event.sampling_rate <= 1
    assert event.steps >= 1
    assert (event.noise_multiplier > 0) == event.private
    assert math.isfinite(event.noise_multiplier)
