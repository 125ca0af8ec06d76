"""Epsilon: the published numbers, two other accountants, and the limits of what we merge and approximate."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedmm.errors import BudgetExhausted
from fedmm.privacy import accounting
from fedmm.privacy.accounting import Term, calibrate, epsilon_pld, epsilon_rdp, exceeds, merge, pld_of, room
from fedmm.privacy.crosscheck import prv_epsilon, rdp_epsilon
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import UNPROTECTED, Event, PrivacyPlan, Rate
from tests.privacy.ledger_worker import site

DELTA = 1e-5

# ../shared/privacy.md: events, RDP (by Opacus), PRV, PLD at delta 1e-5
GOLDEN = [
    ([(4, 0.01, 10000)], 1.03549, 0.95694, 0.94700),
    ([(1.1, 256 / 60000, 14062)], 2.59656, 2.39174, 2.38169),
    ([(10, 0.08192, 875)], 0.98771, 0.91283, 0.90277),
    ([(1, 0.032, 937)], 7.00098, 6.37423, 6.36387),
    ([(20, 1.0, 100)], 2.16572, 2.00321, 1.99309),
    ([(1, 0.02, 500), (1.5, 0.02, 500)], 3.48729, 3.12636, 3.11616),
]


def train(noise: float, rate: float, steps: int) -> Event:
    return Event("train", noise, rate, steps)


def third_party(events: list[Event], delta: float, accountant: Any) -> float:
    """Event by event, as somebody with the export and dp-accounting alone would do it."""
    for e in events:
        accountant.compose(
            dp_event.PoissonSampledDpEvent(e.sampling_rate, dp_event.GaussianDpEvent(e.noise_multiplier)), e.steps
        )
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(("terms", "rdp", "prv", "pld"), GOLDEN)
def test_published_numbers_to_four_digits(terms: list[Any], rdp: float, prv: float, pld: float) -> None:
    events = [train(*term) for term in terms]
    assert epsilon_pld(events, 1e-5) == pytest.approx(pld, abs=1e-4)
    assert prv_epsilon(events, 1e-5) == pytest.approx(prv, abs=1e-4)
    assert rdp_epsilon(events, 1e-5) == pytest.approx(rdp, abs=1e-4)
    # dp-accounting leaves out low orders where its series does not converge: 7.0035 for 7.0010 in the fourth line
    assert rdp - 1e-4 <= epsilon_rdp(events, 1e-5) <= rdp + 0.003


def test_calibration_as_published() -> None:
    noise = calibrate(epsilon=3, delta=1e-4, sampling_rate=1 / 32, steps=640)
    assert noise == pytest.approx(1.2208, abs=1e-4)


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(0.5, 1.0, 3), (1, 0.05, 50)])
def test_calibrated_noise_keeps_the_epsilon_and_wastes_nothing(epsilon: float, rate: float, steps: int) -> None:
    noise = calibrate(epsilon=epsilon, delta=1e-4, sampling_rate=rate, steps=steps)
    assert epsilon_pld([train(noise, rate, steps)], 1e-4) <= epsilon
    assert epsilon_pld([train(noise * (1 - 1e-3), rate, steps)], 1e-4) > epsilon


def test_our_pld_and_rdp_are_those_of_the_public_accountants() -> None:
    events = [train(1.3, 0.1, 7), train(2.0, 0.5, 3), train(1.3, 0.1, 2)]
    assert epsilon_pld(events, 1e-5) == pytest.approx(third_party(events, 1e-5, PLDAccountant()), abs=1e-9)
    assert epsilon_rdp(events, 1e-5) == pytest.approx(third_party(events, 1e-5, RdpAccountant()), rel=1e-12)


def test_merged_composition_equals_event_by_event() -> None:
    """Two runs taking turns, 10 rounds: the worst case for merging, as every event changes the term."""
    events = [train(1.5, 0.1, 3), train(3.0, 0.25, 2)] * 5
    assert abs(epsilon_pld(events, 1e-5) - third_party(events, 1e-5, PLDAccountant())) < 1e-8


def random_history(rng: np.random.Generator) -> list[Event]:
    return [
        train(float(rng.uniform(0.8, 6)), float(rng.choice([rng.uniform(0.005, 0.3), 1.0], p=[0.9, 0.1])), int(steps))
        for steps in rng.integers(1, 120, size=rng.integers(1, 4))
    ]


def by_all_three(seed: int) -> tuple[float, float, float]:
    """PLD, PRV and RDP of a random history; PRV, which says nothing above 50, counts as RDP there."""
    events = random_history(np.random.default_rng(seed))
    pld, prv, rdp = epsilon_pld(events, 1e-5), prv_epsilon(events, 1e-5), epsilon_rdp(events, 1e-5)
    accounting._last_composed.cache_clear()
    return pld, rdp if prv is None else prv, rdp


def in_order(pld: float, prv: float, rdp: float) -> bool:
    return pld <= prv <= rdp + 0.02


def check_order(seed: int) -> None:
    epsilons = by_all_three(seed)
    assert in_order(*epsilons), epsilons


@pytest.mark.parametrize("seed", range(10))
def test_pld_is_below_prv_is_below_rdp(seed: int) -> None:
    check_order(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_pld_is_below_prv_is_below_rdp_on_many(seed: int) -> None:
    check_order(1000 + seed)


def test_nothing_costs_nothing() -> None:
    assert epsilon_pld([], 1e-5) == epsilon_rdp([], 1e-5) == prv_epsilon([], 1e-5) == rdp_epsilon([], 1e-5) == 0.0


def test_every_event_adds() -> None:
    """The trap of a new accountant each round: the composition of twenty rounds is not that of one."""
    one, twenty = [train(1, 1 / 32, 32)], [train(1, 1 / 32, 32)] * 20
    assert epsilon_pld(twenty, 1e-5) > 2 * epsilon_pld(one, 1e-5)


@pytest.mark.parametrize("kind", UNPROTECTED)
def test_an_unprotected_event_has_no_epsilon(kind: str) -> None:
    with pytest.raises(ValueError, match="has no epsilon"):
        epsilon_pld([Event(kind, 0.0, 0.5, 1)], 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_outside_zero_and_one_is_refused(delta: float) -> None:
    for call in (epsilon_pld, epsilon_rdp):
        with pytest.raises(ValueError, match="delta"):
            call([train(1, 0.1, 1)], delta)
    with pytest.raises(ValueError, match="delta"):
        calibrate(epsilon=1, delta=delta, sampling_rate=0.1, steps=1)


@pytest.mark.parametrize(
    "wrong", [{"epsilon": value} for value in (math.nan, 0, -1, math.inf)] + [{"sampling_rate": 1.5}, {"steps": 0}]
)
def test_impossible_calibrations_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        calibrate(**{"epsilon": 1, "delta": 1e-5, "sampling_rate": 0.1, "steps": 10, **wrong})  # type: ignore[arg-type]


BEFORE = (Term(12.0, 1.0, 5), Term(20.0, 1.0, 1))


@pytest.mark.parametrize(("epsilon", "rate"), [(1.0, 1.0), (6.0, 1.0), pytest.param(2.0, 0.1, marks=pytest.mark.slow)])
def test_noise_calibrated_after_a_history_keeps_the_epsilon_of_both_and_wastes_nothing(
    epsilon: float, rate: float
) -> None:
    noise = calibrate(epsilon=epsilon, delta=1e-5, sampling_rate=rate, steps=20, before=BEFORE)
    assert pld_of((*BEFORE, Term(noise, rate, 20)), 1e-5) <= epsilon
    assert pld_of((*BEFORE, Term(noise * (1 - 1e-3), rate, 20)), 1e-5) > epsilon
    assert noise > calibrate(epsilon=epsilon, delta=1e-5, sampling_rate=rate, steps=20)


@pytest.mark.parametrize("slack", [0.0, -0.1])
def test_nothing_can_be_calibrated_when_all_is_spent(slack: float) -> None:
    spent = pld_of(BEFORE, 1e-5)
    with pytest.raises(ValueError, match="is spent"):
        calibrate(epsilon=spent + slack, delta=1e-5, sampling_rate=0.1, steps=1, before=BEFORE)


@pytest.mark.slow
def test_a_sliver_that_no_noise_fits_into_is_refused() -> None:
    with pytest.raises(ValueError, match="no noise multiplier"):
        calibrate(epsilon=pld_of(BEFORE, 1e-5) + 1e-9, delta=1e-5, sampling_rate=1.0, steps=10**6, before=BEFORE)


def test_a_grid_that_never_agrees_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_pld", lambda *_: 2.0)
    with pytest.raises(ValueError, match="no noise multiplier"):
        calibrate(epsilon=1.5, delta=1e-5, sampling_rate=1.0, steps=3)


def test_many_steps_of_little_cost_are_calibrated_by_the_number_of_record() -> None:
    """PLD's grid rounds up where RDP allows: the search must go on above what RDP found enough."""
    noise = calibrate(epsilon=0.05, delta=1e-5, sampling_rate=1e-4, steps=10**6)
    assert pld_of((Term(noise, 1e-4, 10**6),), 1e-5) <= 0.05


def test_an_epsilon_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match="no noise multiplier"):
        calibrate(epsilon=1e-7, delta=1e-5, sampling_rate=1.0, steps=10**6)


def test_a_budget_that_the_least_noise_keeps_gets_the_least_noise() -> None:
    assert calibrate(epsilon=5000, delta=1e-5, sampling_rate=0.5, steps=1) == accounting.MIN_NOISE


def test_absurd_histories_are_bounded_and_do_not_eat_the_memory() -> None:
    assert epsilon_pld([train(0.3, 1.0, 10**6)], 1e-5) > 1e6
    hundreds = [train(0.5, 1.0, 200)]
    assert 300 < epsilon_pld(hundreds, 1e-5) <= epsilon_rdp(hundreds, 1e-5)
    assert prv_epsilon(hundreds, 1e-5) is None


def test_the_coarse_grid_never_says_less_than_the_number_of_record() -> None:
    for term in (Term(1.2, 0.1, 50), Term(10.0, 0.01, 5000), Term(3.0, 1.0, 4)):
        assert accounting._pld((term,), 1e-5, accounting.COARSE_GRID) >= pld_of((term,), 1e-5)


def test_exceeds_is_decided_by_pld_where_rdp_would_refuse() -> None:
    history = (Term(1.5, 0.1, 60),)
    pld = pld_of(history, 1e-5)
    assert accounting.rdp_of(history, 1e-5) > pld + 0.1
    assert not exceeds(history, 1e-5, ceiling=pld + 1e-9)
    assert exceeds(history, 1e-5, ceiling=pld - 1e-9)


def test_room_is_exact() -> None:
    event, before = train(1.5, 0.1, 2), (Term(3.0, 0.2, 5), Term(1.5, 0.1, 4))
    fits = room(before, event, 1e-5, ceiling=2.0, most=1000)
    assert fits > 1
    assert pld_of((before[0], Term(1.5, 0.1, 4 + 2 * fits)), 1e-5) <= 2.0
    assert pld_of((before[0], Term(1.5, 0.1, 6 + 2 * fits)), 1e-5) > 2.0
    assert room(before, event, 1e-5, ceiling=0.01, most=1000) == 0
    assert room((), event, 1e-5, ceiling=50.0, most=3) == 3


def test_merge_adds_steps_in_order_of_first_appearance() -> None:
    assert merge([train(2, 0.1, 1), train(1, 0.1, 2), train(2, 0.1, 3)]) == (Term(2.0, 0.1, 4), Term(1.0, 0.1, 2))


def test_the_number_of_record_is_never_above_the_bound_that_accepted_the_charge() -> None:
    """A million steps of tiny cost: PLD's grid rounds up past RDP, by which the ledger accepted them."""
    events = [Event("train", 30.0, 1e-3, 10_000)] * 100
    assert epsilon_pld(events, 1e-5) <= epsilon_rdp(events, 1e-5)


def test_a_history_that_pld_cannot_take_still_has_an_epsilon() -> None:
    events = [Event("train", 0.768, 5e-324, 1), Event("train", 1.0, 0.1, 10)]
    assert 0 < epsilon_pld(events, 1e-5) <= epsilon_rdp(events, 1e-5) < 20


# --- how much noise fits into what a ledger has left --------------------------------------------------------------------


def plan(
    noise: float, *, rate: float = 0.1, steps: int = 2, unit: str = "patient", private: bool = True
) -> PrivacyPlan:
    return PrivacyPlan(
        unit=unit,
        relation="add_or_remove_one",
        delta=DELTA,
        epsilon=8.0,
        sampling="poisson",
        max_grad_norm=1.0,
        max_studies=3,
        sampling_rate=Rate(rate),
        steps_per_round=steps,
        rounds=10,
        noise_multiplier=noise if private else 0.0,
        evaluation_noise=0.0,
        private=private,
    )


def opened(folder: Path, ceiling: float, *spent: Event) -> Ledger:
    ledger = Ledger.open(folder, site(ceiling))
    for number, event in enumerate(spent):
        ledger.reserve(event, run="before", round=number).settle()
    return ledger


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, *range(2, 20)))])
def test_with_the_least_noise_all_rounds_fit_and_with_less_they_do_not(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    unit = ("patient", "record")[seed % 2]
    asked = plan(
        float(rng.uniform(0.5, 1.5)), rate=float(rng.uniform(0.02, 0.3)), steps=int(rng.integers(1, 5)), unit=unit
    )
    rounds, also = int(rng.integers(1, 8)), [Event("evaluate", 8.0, Rate(1.0), 1)][: seed % 3]
    with opened(tmp_path, 3.0, *[train(30.0, 1.0, int(rng.integers(1, 9)))] * (seed % 4)) as ledger:
        least = ledger.least_noise(asked, rounds=rounds, also=also)
        assert least >= asked.noise_multiplier
        for event in also:
            ledger.reserve(event, run="run", round=0).settle()
        enough = replace(asked, noise_multiplier=least)
        for number in range(rounds):
            ledger.reserve(enough.round_event(1), run="run", round=number).settle()
        assert ledger.epsilon() <= 3.0
        if least > asked.noise_multiplier:  # and nothing is wasted
            less = replace(asked, noise_multiplier=least * (1 - 1e-3)).round_event(1)
            events = [Event.from_dict({name: e[name] for name in less.to_dict()}) for e in ledger.events()][:-rounds]
            assert epsilon_pld([*events, *[less] * rounds], DELTA) > 3.0


def test_a_plan_that_fits_as_it_is_keeps_its_noise(tmp_path: Path) -> None:
    with opened(tmp_path, 8.0, train(30.0, 1.0, 5)) as ledger:
        assert ledger.least_noise(plan(9.0), rounds=10) == 9.0
        assert ledger.least_noise(plan(9.0), rounds=10, also=[Event("exact_scores", 0.0, Rate(1.0), 1)]) == 9.0
        assert ledger.least_noise(plan(0.5), rounds=0) == 0.5
        assert ledger.least_noise(plan(0.0, private=False), rounds=10) == 0.0


@pytest.mark.slow
def test_what_the_run_costs_besides_training_is_kept_free(tmp_path: Path) -> None:
    with opened(tmp_path, 2.0) as ledger:
        alone = ledger.least_noise(plan(0.6), rounds=5)
        assert ledger.least_noise(plan(0.6), rounds=5, also=[Event("evaluate", 5.0, Rate(1.0), 1)]) > alone > 0.6


def test_where_nothing_is_left_no_noise_is_enough(tmp_path: Path) -> None:
    spent = train(9.0, 1.0, 4)
    opened(tmp_path, 8.0, spent).close()
    with Ledger.open(tmp_path, site(epsilon_pld([spent], DELTA))) as ledger:  # the ceiling was lowered since
        for _ in range(2):
            with pytest.raises(BudgetExhausted, match="no noise makes room for 3 rounds") as caught:
                ledger.least_noise(plan(1.0), rounds=3)
        assert "fewer rounds" in caught.value.fix
        assert ledger.spent().refusals == 1, "the same question is one row"
        with pytest.raises(BudgetExhausted):
            ledger.least_noise(plan(1.0), rounds=1, also=[Event("evaluate", 9.0, Rate(1.0), 1)])


def test_rounds_that_are_charged_already_need_no_room(tmp_path: Path) -> None:
    """A run that goes on is asked for again, and every ledger may be full of it."""
    whole = replace(plan(9.0, rate=1.0, steps=1), rounds=4, noise_last=0.5)
    rest = [whole.round_event(number) for number in (3, 4)]
    assert whole.rest(after=2) == rest
    assert whole.rest(after=2, without=[1, 3]) == rest[1:]
    with opened(tmp_path, 8.0, *rest):
        pass
    with Ledger.open(tmp_path, site(epsilon_pld(rest, DELTA))) as ledger:
        assert ledger.least_noise(whole, rounds=2, paid=(3, 4)) == 9.0
        with pytest.raises(BudgetExhausted):
            ledger.least_noise(whole, rounds=2, paid=(3,))


def test_a_run_that_goes_on_keeps_one_composition_in_memory_and_not_one_a_round() -> None:
    accounting._last_composed.cache_clear()
    for rounds in range(1, 6):
        pld_of((Term(1.37, 0.25, rounds), Term(2.5, 0.5, 10)), 1e-5)
    kept = [accounting._last_composed(noise, rate, accounting.GRID) for noise, rate in ((1.37, 0.25), (2.5, 0.5))]
    assert [list(composed) for composed in kept] == [[5], [10]]
