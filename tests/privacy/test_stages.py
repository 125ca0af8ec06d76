"""Noise that changes over the rounds: one plan says which round has which, and what is added is what is charged."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import MessageType
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from client.app import Hospital
from client.gate import sealed
from fedmm.config import RunConfig
from fedmm.errors import PlanInvalid, PolicyRefused
from fedmm.federation.messages import array_record, encode
from fedmm.privacy.accounting import calibrate, epsilon_pld, merge
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.noise import SystemNoise
from fedmm.privacy.plan import STAGES, Event, PrivacyPlan, make_plan
from fedmm.privacy.policy import check_plan, check_settings
from tests.client.test_client import PLAN, train_ask, weights
from tests.client.test_gate import ask_app
from tests.e2e.conftest import write_hospital
from tests.privacy.ledger_worker import site
from tests.privacy.test_plan import FLAT


def plan(**changed: Any) -> PrivacyPlan:
    return PrivacyPlan.from_flat({**FLAT, **changed})


def config(**changed: Any) -> RunConfig:
    return RunConfig().replace(**{key.replace("__", "."): value for key, value in changed.items()})


# --- the plan -------------------------------------------------------------------------------------------------------------


def test_with_the_same_noise_in_all_rounds_a_plan_is_what_it_was() -> None:
    """Bit by bit: keys, digest, events, and the history that a ledger makes of them."""
    same = plan()
    assert same.to_flat() == FLAT == plan(noise_last=1).to_flat()
    text = json.dumps(FLAT, sort_keys=True, separators=(",", ":"))
    assert same.digest() == plan(noise_last=1.0).digest() == hashlib.sha256(text.encode()).hexdigest()
    assert (
        same.digest() == "b584ab0026929960801eac8a0b2daa3677d8a9a7a7c929817808c8cb40f23c56"
    )  # by the code before noise_last
    event = Event("train", 1.3, 0.25, 2)
    assert {same.round_event(number) for number in range(1, 31)} == {event}
    assert merge([same.round_event(number) for number in range(1, 31)]) == merge([event] * 30) == merge(same.rest())
    assert same.of_round(7) == same
    assert (same.later(), plan(noise_last=0.5).later()) == ("", ", in 4 stages to 0.5 times that")
    asked = config(privacy__epsilon=3, federation__rounds=10)
    assert make_plan(asked).noise_multiplier == calibrate(epsilon=3.0, delta=1e-4, sampling_rate=1.0, steps=10)


@settings(deadline=None, max_examples=30)
@given(rounds=st.integers(STAGES, 300), ratio=st.floats(0.25, 4), after=st.integers(0, 300))
def test_four_stages_of_nearly_equal_length_lead_from_the_first_noise_to_the_last(
    rounds: int, ratio: float, after: int
) -> None:
    asked = plan(rounds=rounds, noise_last=ratio)
    noises = [asked.round_event(number).noise_multiplier for number in range(1, rounds + 1)]
    assert noises == [asked.of_round(number).round_event(1).noise_multiplier for number in range(1, rounds + 1)]
    assert (noises[0], noises[-1]) == (1.3, 1.3 * ratio)
    stages = [(number - 1) * STAGES // rounds for number in range(1, rounds + 1)]
    assert noises == pytest.approx([1.3 * ratio ** (stage / 3) for stage in stages], rel=1e-12)
    lengths = [stages.count(stage) for stage in range(STAGES)]
    assert max(lengths) - min(lengths) <= 1
    assert len(merge(asked.rest())) == len(set(noises)) <= STAGES
    left = min(after, rounds)
    one_by_one = [asked.round_event(number) for number in range(left + 1, rounds + 1)]
    assert merge(asked.rest(after=left)) == merge(one_by_one)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 2.0, 4.0])
def test_all_rounds_together_cost_the_epsilon_of_the_run(ratio: float) -> None:
    made = make_plan(config(privacy__epsilon=3, federation__rounds=10, privacy__noise_last=ratio))
    events = [made.round_event(number) for number in range(1, 11)]
    assert [events.count(event) for event in dict.fromkeys(events)] == [3, 2, 3, 2]
    assert 2.999 < epsilon_pld(events, made.delta) <= 3
    assert events[-1].noise_multiplier / events[0].noise_multiplier == pytest.approx(ratio)
    assert epsilon_pld(merge_order(events), made.delta) == pytest.approx(epsilon_pld(events, made.delta), abs=1e-6)


def merge_order(events: Sequence[Event]) -> list[Event]:
    """Another order: composition does not depend on it."""
    return sorted(events, key=lambda event: event.noise_multiplier)


def test_scores_and_changing_noise_share_one_epsilon() -> None:
    asked = config(privacy__epsilon=3, federation__rounds=8, privacy__noise_last=0.5)
    made = make_plan(asked, noisy_scores=True)
    scores = made.evaluation_event()
    assert scores is not None
    assert 2.999 < epsilon_pld([*made.rest(), scores], made.delta) <= 3


def test_a_plan_has_the_rounds_that_it_has() -> None:
    asked = plan(noise_last=2.0)
    for number in (0, -1, 31, 10**9):
        for call in (asked.round_event, asked.of_round, asked.noise_in, plan().round_event):
            with pytest.raises(PlanInvalid, match="rounds 1 to 30"):
                call(number)
    with pytest.raises(PlanInvalid, match="has 30 rounds, not 31"):
        asked.rest(after=-1)
    assert asked.rest(after=30) == []


def test_noise_cannot_change_over_fewer_rounds_than_stages() -> None:
    for rounds in (1, 3):
        with pytest.raises(PlanInvalid, match="4 rounds or more"):
            plan(rounds=rounds, noise_last=2.0)
        assert plan(rounds=rounds).noise_in(rounds) == 1.3


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0, "2", None, True])
def test_a_ratio_from_a_peer_must_be_a_positive_number(value: Any) -> None:
    with pytest.raises(PlanInvalid):
        plan(noise_last=value)


def test_a_changing_plan_survives_a_message_and_has_a_digest_of_its_own() -> None:
    asked = plan(noise_last=0.5)
    assert PrivacyPlan.from_flat(asked.to_flat()) == asked
    assert asked.to_flat() == {**FLAT, "noise_last": 0.5}
    assert len({asked.digest(), plan().digest(), plan(noise_last=2.0).digest()}) == 3


def test_a_plan_for_records_charges_each_round_for_all_records() -> None:
    asked = plan(unit="record", noise_last=2.0, max_studies=2)
    assert asked.round_event(30).noise_multiplier == 1.3 * 2.0 / 2
    assert merge(asked.rest()) == merge([asked.round_event(number) for number in range(1, 31)])


# --- policy, accounting, ledger ---------------------------------------------------------------------------------------------


def test_the_least_noise_of_a_hospital_holds_for_the_stage_with_the_least() -> None:
    strict = site(min_noise_multiplier=1.0)
    check_plan(plan(noise_last=1 / 1.3), strict)
    check_plan(plan(noise_last=4.0), strict)
    with pytest.raises(PolicyRefused, match=r"noise_multiplier 0\.65"):
        check_plan(plan(noise_last=0.5), strict)
    with pytest.raises(PolicyRefused, match=r"noise_multiplier 0\.9"):
        check_plan(plan(noise_multiplier=0.9, noise_last=4.0), strict)


def test_a_plan_whose_noise_changes_otherwise_than_the_settings_say_is_refused() -> None:
    asked = config(federation__rounds=10)
    same = make_plan(asked)
    changing, wanted = replace(same, noise_last=2.0), asked.replace(**{"privacy.noise_last": 2.0})
    check_settings(same, asked)
    check_settings(changing, wanted)
    for planned, said in ((changing, asked), (same, wanted)):
        with pytest.raises(PlanInvalid, match="noise_last"):
            check_settings(planned, said)


@pytest.mark.parametrize(
    ("epsilon", "rate", "ratio"),
    [
        (0.5, 1.0, 0.25),
        (8.0, 1.0, 4.0),
        pytest.param(3.0, 0.1, 0.5, marks=pytest.mark.slow),
        pytest.param(20.0, 0.1, 0.25, marks=pytest.mark.slow),
    ],
)
def test_noise_calibrated_in_stages_keeps_the_epsilon_and_wastes_nothing(
    epsilon: float, rate: float, ratio: float
) -> None:
    steps = {ratio ** (k / 3): 5 for k in range(STAGES)}
    noise = calibrate(epsilon=epsilon, delta=1e-5, sampling_rate=rate, steps=steps)

    def cost(noise: float) -> float:
        return epsilon_pld([Event("train", noise * times, rate, count) for times, count in steps.items()], 1e-5)

    assert cost(noise) <= epsilon < cost(noise * (1 - 1e-4))


@pytest.mark.parametrize("wrong", [{}, {0.0: 5}, {1.0: 0}, {math.nan: 5}, {1.0: 5, -1.0: 5}])
def test_impossible_stages_are_refused(wrong: dict[float, int]) -> None:
    with pytest.raises(ValueError, match="steps must be"):
        calibrate(epsilon=1.0, delta=1e-5, sampling_rate=0.1, steps=wrong)


@pytest.mark.parametrize("ratio", [0.4, 3.0])
@pytest.mark.parametrize("unit", ["patient", "record"])
def test_the_least_noise_for_what_remains_counts_each_round_that_remains(
    tmp_path: Path, unit: str, ratio: float
) -> None:
    """Of 10 rounds the last 6: of the second stage one round, of the third three, of the last two."""
    asked = plan(unit=unit, noise_last=ratio, rounds=10, noise_multiplier=0.6, max_studies=2, sampling_rate=1.0)
    with Ledger.open(tmp_path, site(epsilon=2.0)) as ledger:
        least = ledger.least_noise(asked, rounds=6)
        assert least > asked.noise_multiplier
        enough = PrivacyPlan.from_flat(asked.to_flat() | {"noise_multiplier": least})
        for number in range(5, 11):
            ledger.reserve(enough.round_event(number), run="run", round=number).settle()
        assert 1.99 < ledger.epsilon() <= 2.0
        with pytest.raises(PlanInvalid, match="10 rounds, not 11"):
            ledger.least_noise(asked, rounds=11)
    less = PrivacyPlan.from_flat(asked.to_flat() | {"noise_multiplier": least * (1 - 1e-3)})
    assert epsilon_pld(less.rest(after=4), 1e-5) > 2.0


def test_accounting_of_a_long_run_has_four_terms() -> None:
    asked = plan(rounds=10_000, noise_last=2.0)
    assert len(merge([asked.round_event(number) for number in range(1, 10_001)])) == STAGES


# --- a coordinator that chooses the round -----------------------------------------------------------------------------------


@pytest.fixture
def _inside_flower() -> None:
    """Flower asks in whose name a message is made."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 1


class Watched(SystemNoise):
    """Notes how much noise is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stds: set[float] = set()

    def gaussian(self, shape: Sequence[int], std: float) -> torch.Tensor:
        self.stds.add(std)
        return super().gaussian(shape, std)


@pytest.mark.usefixtures("_inside_flower")
def test_whatever_round_is_asked_for_the_charge_is_the_noise_that_was_added(tmp_path: Path) -> None:
    """The last round first, one round twice, then the first, each of a run of its own: each costs what its own noise costs."""
    hospital = write_hospital(tmp_path / "north")
    asked = PrivacyPlan.from_flat(PLAN.to_flat() | {"rounds": 8, "noise_last": 2.0, "noise_multiplier": 3.0})
    used: list[float] = []
    for run, number in zip("abcd", (8, 3, 3, 1), strict=True):
        noise = Watched()
        ask = train_ask(asked, round=number, privacy__noise_last=2.0).model_copy(update={"run": run})
        content = encode(ask, arrays=array_record(weights()))
        reply = ask_app(sealed(Hospital(lambda *_, noise=noise: noise)), hospital, content, MessageType.TRAIN)
        assert reply.has_content()
        (std,) = noise.stds
        used.append(std / asked.max_grad_norm)
    assert used == [asked.noise_in(number) for number in (8, 3, 3, 1)] == [6.0, *[3.0 * 2 ** (1 / 3)] * 2, 3.0]
    with Ledger.open(hospital, site(), create=False) as ledger:
        charged = [(event["noise_multiplier"], event["round"]) for event in ledger.events()]
    assert charged == list(zip(used, (8, 3, 3, 1), strict=True))


@pytest.mark.usefixtures("_inside_flower")
def test_a_round_that_the_plan_does_not_have_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    hospital = write_hospital(tmp_path / "north")
    content = encode(train_ask(round=PLAN.rounds + 1), arrays=array_record(weights()))
    reply = ask_app(sealed(Hospital(lambda *_: SystemNoise())), hospital, content, MessageType.TRAIN)
    assert (reply.error.code, "rounds 1 to 2" in reply.error.reason) == (1003, True)
    with Ledger.open(hospital, site(), create=False) as ledger:
        assert ledger.events() == []
