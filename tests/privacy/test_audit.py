"""The audit's bounds: golden numbers, what any guesses give, and what they say of mechanisms whose epsilon is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmm.errors import ConfigError
from fedmm.privacy.accounting import Term, pld_of
from fedmm.privacy.audit import (
    Guesses,
    clopper_pearson,
    fdp_bound,
    gaussian_epsilon,
    guess,
    one_run_bound,
    rates_bound,
)

# ../shared/privacy.md, "Auditing: numbers to test the lower bound against": m, r, v, delta, one-run, f-DP
GOLDEN = [
    (100, 100, 90, 0.0, 1.6308, None),
    (1000, 100, 95, 1e-5, 2.1652, 3.3233),
    (1000, 500, 400, 1e-5, 1.1980, 2.0768),
    (5000, 500, 500, 1e-5, 4.9778, 7.9807),
]
CEILINGS = [(100, 3.49), (1000, 5.81), (5000, 7.42)]


@pytest.mark.parametrize(("m", "r", "v", "delta", "one_run", "fdp"), GOLDEN)
def test_the_golden_table_is_reproduced(
    m: int, r: int, v: int, delta: float, one_run: float, fdp: float | None
) -> None:
    assert one_run_bound(Guesses(m, r, v), delta=delta) == pytest.approx(one_run, abs=1e-3)
    if fdp is not None:
        assert fdp_bound(Guesses(m, r, v), delta=delta) == pytest.approx(fdp, abs=1e-3)


@pytest.mark.parametrize(("r", "ceiling"), CEILINGS)
def test_the_ceilings_with_all_guesses_right_are_reproduced(r: int, ceiling: float) -> None:
    assert one_run_bound(Guesses(r, r, r), delta=0.0) == pytest.approx(ceiling, abs=5e-3)


counts = st.integers(2, 400).flatmap(
    lambda m: st.integers(1, m).flatmap(lambda r: st.tuples(st.just(m), st.just(r), st.integers(0, r)))
)


@given(counts, st.sampled_from([1e-8, 1e-5, 1e-3]))
def test_more_right_guesses_never_give_a_lower_bound_and_more_delta_never_a_higher_one(
    seen: tuple[int, int, int], delta: float
) -> None:
    m, r, v = seen
    bound = one_run_bound(Guesses(m, r, v), delta=delta)
    assert 0 <= bound <= one_run_bound(Guesses(m, r, r), delta=delta) + 1e-6
    assert bound <= one_run_bound(Guesses(m, r, v), delta=0.0) + 1e-6
    if v <= r / 2:
        assert bound == fdp_bound(Guesses(m, r, v), delta=delta) == 0.0


@given(counts)
def test_the_bound_of_gaussian_mechanisms_is_finite_and_not_below_zero(seen: tuple[int, int, int]) -> None:
    assert 0 <= fdp_bound(Guesses(*seen), delta=1e-5) < math.inf


def test_the_epsilon_of_a_gaussian_mechanism_is_the_accountants() -> None:
    for mu in (0.1, 0.5, 1.0, 2.0):
        exact = pld_of((Term(1 / mu, 1.0, 1),), 1e-5)
        assert gaussian_epsilon(mu, 1e-5) == pytest.approx(exact, abs=2e-4)


@pytest.mark.parametrize("mu", [0.4, 1.0])
def test_the_bounds_stay_below_the_epsilon_of_a_mechanism_that_is_known(mu: float) -> None:
    """400 runs of independent Gaussian canaries. Each bound may be above epsilon in 5 % of the runs: more than 40 of 400 has
    probability 3e-5 (binomial)."""
    rng, delta = np.random.default_rng(5), 1e-4
    true, above, seen_fdp = gaussian_epsilon(mu, delta), {"one": 0, "fdp": 0}, []
    for _ in range(400):
        in_M = rng.integers(0, 2, 200).astype(bool)
        found = guess(rng.normal(size=200) + mu * in_M, in_M, 40)
        fdp = fdp_bound(found, delta=delta)
        above["one"] += one_run_bound(found, delta=delta) > true
        above["fdp"] += fdp > true
        seen_fdp.append(fdp)
    assert max(above.values()) <= 40
    assert np.mean(seen_fdp) > 0.02  # and they say something


def test_guesses_are_the_extremes_and_ties_do_not_look_at_the_answer() -> None:
    in_M = np.array([True, True, False, False, True, False])
    assert guess(np.array([5.0, 4.0, 0.0, 1.0, 2.0, 3.0]), in_M, 4) == (6, 4, 4)
    assert guess(np.zeros(6), in_M, 2) == (6, 2, 0)  # in: the last, who is out; out: the first, who is in


@pytest.mark.parametrize("guesses", [0, 1, 3, 8])
def test_a_number_of_guesses_that_cannot_be_halved_is_refused(guesses: int) -> None:
    with pytest.raises(ConfigError, match="guesses"):
        guess(np.zeros(6), np.zeros(6, dtype=bool), guesses)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        guess(np.array([np.nan, 1.0]), np.zeros(2, dtype=bool), 2)


def test_impossible_counts_are_refused() -> None:
    for wrong in (Guesses(10, 20, 5), Guesses(10, 5, 6), Guesses(10, 5, -1)):
        with pytest.raises(ConfigError, match="no bound"):
            one_run_bound(wrong, delta=0.0)
    with pytest.raises(ConfigError, match="delta"):
        fdp_bound(Guesses(10, 5, 4), delta=0.0)


def test_exact_intervals_of_a_rate_are_those_of_the_tables() -> None:
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 0.3085), abs=1e-4)
    assert clopper_pearson(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert clopper_pearson(10, 10) == pytest.approx((0.6915, 1.0), abs=1e-4)
    assert clopper_pearson(0, 0) == (0.0, 1.0)


def test_rates_of_independent_guesses_give_a_bound_only_where_they_differ() -> None:
    assert rates_bound(50, 100, 50, 100, delta=1e-5) == 0.0
    assert 2.0 < rates_bound(100, 100, 0, 100, delta=1e-5) < math.log(100)
