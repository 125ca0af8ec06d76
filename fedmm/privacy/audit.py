"""From guesses about canaries to a lower bound on epsilon: the measured side of what the accountant claims.

m canaries are each in the training data with probability 1/2, independently. Whoever sees what left guesses about r of
them, and v guesses are right. If the mechanism were (epsilon, delta)-DP, that many right ones would be unlikely; the
largest epsilon at which they still are (probability at most `significance`) is the bound.

Guesses are fixed in advance: r is chosen before anything is looked at, r/2 highest scores are "in", r/2 lowest "out".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from fedmm.errors import ConfigError

# M canaries
SIGNIFICANCE = 0.05
LARGEST = 60.0  # epsilon at which bisection ends: exp of it is still a number, and no audit of 10^6 canaries gets there
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Guesses(NamedTuple):
    """canaries m, of which `guesses` r were guessed and `correct` v right."""

    canaries: int
    guesses: int
    correct: int


def guess(score_M: Floats, in_M: Bools, guesses: int) -> Guesses:
    """The `guesses`/2 canaries of highest score are guessed to be in, as many of the lowest to be out.

    score_M: higher for a canary that is in, worked out without knowing in_M.  guesses: even, at most M; fixed beforehand.
    Ties are broken by position, which is independent of who is in.
    Raises: ConfigError for another number of guesses; ValueError for scores that are not numbers.
    """
    if not 2 <= guesses <= len(score_M) or guesses % 2:
        raise ConfigError(
            f"{guesses} guesses about {len(score_M)} canaries",
            why="half of them are guessed in and half out",
            fix="an even number, of at most the canaries",
        )
    if not np.isfinite(score_M).all():
        raise ValueError("a canary's score is not a number")
    order_M = np.argsort(score_M, kind="stable")
    correct = in_M[order_M[-guesses // 2 :]].sum() + (~in_M[order_M[: guesses // 2]]).sum()
    return Guesses(len(score_M), guesses, int(correct))


def one_run_bound(seen: Guesses, *, delta: float, significance: float = SIGNIFICANCE) -> float:
    """Lower bound on epsilon at `delta`, true with probability 1 - significance whatever the mechanism; 0 for none.

    Source: Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run", Theorem 5.2.
    """
    _check(seen, delta, significance)
    return _largest(lambda epsilon: significance - _p_value(seen, epsilon, delta))


def _p_value(seen: Guesses, epsilon: float, delta: float) -> float:
    """Of at least `correct` right guesses under (epsilon, delta)-DP."""
    m, r, v = seen
    right = special.expit(epsilon)  # e^eps / (1 + e^eps)
    p = float(stats.binom.sf(v - 1, r, right))
    if delta == 0 or v == 0:
        return p
    at_least_V = stats.binom.sf(np.arange(v - 1, -1, -1) - 1, r, right)  # P[Bin >= v - i] for i = 1 … v
    alpha = float(((at_least_V - p) / np.arange(1, v + 1)).max())
    return min(1.0, p + 2 * m * delta * alpha)


def fdp_bound(seen: Guesses, *, delta: float, significance: float = SIGNIFICANCE) -> float:
    """As `one_run_bound`, larger, and true only of mechanisms whose trade-off curve is a Gaussian's (mu-GDP).

    A run of many subsampled steps is close to one and no more than close: to be reported as its own kind, beside the bound
    that supposes nothing. Reported at `delta` for the smallest mu that the guesses do not contradict.
    Source: Mahloujifar, Melis, Chaudhuri 2024, "Auditing f-Differential Privacy in One Run", Algorithm 2 for pairs.
    """
    _check(seen, delta, significance)
    if delta == 0:
        raise ConfigError("the f-DP bound needs delta above 0", why="no Gaussian mechanism has delta 0")
    if not 2 * seen.correct - seen.guesses > 0:
        return 0.0

    def contradicted(mu: float) -> float:
        """Above 0 if a mu-GDP mechanism gives this many right guesses with probability below `significance`."""
        share = significance / seen.canaries
        right, wrong = share * seen.correct, share * (seen.guesses - seen.correct)
        for i in range(seen.correct - 1, -1, -1):
            below = max(wrong, float(special.ndtr(special.ndtri(min(right, 1.0)) - mu)))
            right += i / (seen.guesses - i) * (below - wrong)
            wrong = below
        return right + wrong - seen.guesses / seen.canaries

    mu = _largest(contradicted)
    return gaussian_epsilon(mu, delta) if mu else 0.0


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at `delta` of a mu-GDP mechanism. Source: Dong, Roth, Su 2022, Corollary 2.13 (Balle and Wang 2018)."""

    def excess(epsilon: float) -> float:
        low = special.log_ndtr(-epsilon / mu - mu / 2)
        return float(special.ndtr(-epsilon / mu + mu / 2) - np.exp(epsilon + low) - delta)

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(optimize.brentq(excess, 0.0, high, xtol=1e-9))


def clopper_pearson(successes: int, trials: int, *, significance: float = SIGNIFICANCE) -> tuple[float, float]:
    """Two-sided exact interval of a probability. (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    half = significance / 2
    low = float(stats.beta.ppf(half, successes, trials - successes + 1)) if successes else 0.0
    high = float(stats.beta.isf(half, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def rates_bound(
    true_in: int, all_in: int, false_in: int, all_out: int, *, delta: float, significance: float = SIGNIFICANCE
) -> float:
    """log((TPR - delta) / FPR) with Clopper-Pearson bounds of both rates, a Bonferroni half of `significance` each.

    For guesses that are independent, as of one canary over many runs (Nasr et al. 2021). Canaries of one run share its
    noise and each other, so there it is a heuristic and never the verdict.
    """
    low, _ = clopper_pearson(true_in, all_in, significance=significance)
    _, high = clopper_pearson(false_in, all_out, significance=significance)
    return max(0.0, math.log((low - delta) / high)) if low > delta else 0.0


def _largest(objective: Callable[[float], float]) -> float:
    """The largest value at which a falling function is above 0; 0 if there is none."""
    if objective(0.0) <= 0:
        return 0.0
    if objective(LARGEST) > 0:
        return LARGEST
    return float(optimize.brentq(objective, 0.0, LARGEST, xtol=1e-7))


def _check(seen: Guesses, delta: float, significance: float) -> None:
    if not 0 <= seen.correct <= seen.guesses <= seen.canaries or not 0 <= delta < 1 or not 0 < significance < 1:
        raise ConfigError(
            f"no bound from {seen.correct} right of {seen.guesses} guesses about {seen.canaries} canaries, "
            f"delta {delta:g}, significance {significance:g}"
        )
