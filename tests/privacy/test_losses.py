"""Privacy losses against dp-accounting, whose numbers they must be, and against themselves in another order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

from fedmm.privacy import accounting, losses
from fedmm.privacy.accounting import Term, pld_of
from fedmm.privacy.losses import Kind, Losses, composed, deltas

GRID, DELTA = accounting.GRID, 1e-5
MANY = tuple(Term(4.0 + 0.1 * number, 0.02, 3 + number) for number in range(2 * losses.BLOCK + 3))


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    for kept in (accounting._pld, accounting._one_step, losses._span, losses._product, losses._power):
        kept.cache_clear()


def by_dp_accounting(history: tuple[Term, ...]) -> float:
    """One kind of step after the other, as it composes them itself."""
    one, *rest = (
        privacy_loss_distribution.from_gaussian_mechanism(
            term.noise_multiplier,
            value_discretization_interval=GRID,
            sampling_prob=term.sampling_rate,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        ).self_compose(term.steps)
        for term in history
    )
    for other in rest:
        one = one.compose(other)
    return float(one.get_epsilon_for_delta(DELTA))


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize(
    ("noise", "rate"), [(1.0, 0.01), (0.5, 0.3), (10.0, 0.08), (20.0, 1.0), (0.3, 1e-5), (1000.0, 1e-3), (0.05, 0.5)]
)
def test_one_step_gives_away_what_dp_accounting_says(noise: float, rate: float, *, removed: bool) -> None:
    which = AdjacencyType.REMOVE if removed else AdjacencyType.ADD
    theirs = GaussianPrivacyLoss(noise, sampling_prob=rate, adjacency_type=which)
    bounds = theirs.connect_dots_bounds()
    loss_L = np.linspace(bounds.epsilon_lower, bounds.epsilon_upper, 502)[1:-1]
    difference_L = deltas(noise, rate, loss_L, removed=removed) - theirs.get_delta_for_epsilon(loss_L)
    assert np.abs(difference_L).max() < 1e-15


@pytest.mark.parametrize(
    "history",
    [
        (Term(3.0, 0.05, 1),),
        (Term(2.0, 0.02, 3000),),
        (Term(12.0, 1.0, 30), Term(4.0, 0.05, 40)),
        (Term(1000.0, 0.001, 5), Term(6.0, 0.1, 1)),
        MANY,
    ],
    ids=["one step", "many steps", "everybody", "next to nothing", "many kinds"],
)
def test_the_composition_is_dp_accountings(history: tuple[Term, ...]) -> None:
    assert pld_of(history, DELTA) == pytest.approx(by_dp_accounting(history), abs=1e-7)


@pytest.mark.parametrize("changed", [0, losses.BLOCK, len(MANY) - 1])
def test_a_step_more_costs_the_same_whatever_was_asked_before(changed: int) -> None:
    """What is kept of one history must never answer for another."""
    more = (*MANY[:changed], MANY[changed]._replace(steps=MANY[changed].steps + 1), *MANY[changed + 1 :])
    before = pld_of(MANY, DELTA)
    kept = pld_of(more, DELTA)
    forget()
    assert kept == pld_of(more, DELTA) > before


def test_a_step_more_transforms_one_kind_only() -> None:
    pld_of(MANY, DELTA)
    before = losses._power.cache_info().misses
    pld_of((*MANY[:-1], MANY[-1]._replace(steps=MANY[-1].steps + 1)), DELTA)
    assert losses._power.cache_info().misses - before == 2, "a patient more, a patient less"


def coin(_: Kind, *, p: float) -> Losses:
    return Losses(-1, np.array([1 - p, 0.0, p]), 0.0)


@pytest.mark.parametrize("count", [1, 2, 7, 5000])
def test_losses_that_can_be_counted_are_those_of_a_binomial(count: int) -> None:
    from scipy import stats

    p = 0.55
    found = composed([(Kind(1.0, 1.0, True, 1.0), count)], partial(coin, p=p))
    heads = (found.first + np.arange(len(found.p_L)) + count) / 2
    assert np.abs(found.p_L - np.where(heads % 1 == 0, stats.binom.pmf(heads, count, p), 0)).max() < 1e-13
    assert 1 - 1e-11 < found.p_L.sum() < 1 + 1e-11
    assert found.infinity == losses.TAIL, "what was cut off counts as unbounded"
    assert len(found.p_L) <= 2 * count + 1
