"""Statistical tests of noise and sampling: does what was drawn have the law that the accountant counts with?

Each test states its false alarm: the probability that honest code fails it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedmm.errors import ConfigError

# K releases, W values of a release, T steps, N patients
FALSE_ALARM = 1e-6  # of each test: of 100,000 audits of honest code about one fails a test by chance
ENOUGH = 256  # values of a weight from which on it is compared with others
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Check(NamedTuple):
    """One question with a yes or no. false_alarm: probability that honest code is failed; 0 where nothing is drawn."""

    name: str
    passed: bool
    measured: str
    expected: str
    false_alarm: float = 0.0


Released = Mapping[str, Floats]  # by name of a weight, (K, W) what was released beside nothing


def noise_spread(released: Released, std: float, *, steps: int = 1) -> Check:
    """Two-sided chi-square test of each weight's standard deviation: one that was forgotten is hidden by no other.

    steps: of a release; independent noise adds up to std x sqrt(steps), noise that is used again to more.
    """
    tail = FALSE_ALARM / len(released) / 2
    found: dict[str, tuple[float, float, float]] = {}
    for name, noise_KW in released.items():
        values = noise_KW.ravel() / (std * math.sqrt(steps))
        low, high = (
            math.sqrt(at / values.size) for at in (stats.chi2.ppf(tail, values.size), stats.chi2.isf(tail, values.size))
        )
        found[name] = (math.sqrt(float(np.square(values).mean())), low, high)
    wrong = [name for name, (spread, low, high) in found.items() if not low < spread < high]
    farthest = max(found, key=lambda name: abs(math.log(max(found[name][0], 1e-9))))
    spread, low, high = found[wrong[0] if wrong else farthest]
    return Check(
        "spread of the noise" + (f" of {steps} steps" if steps > 1 else ""),
        not wrong,
        f"{spread:.4f} of the planned spread at {wrong[0] if wrong else farthest}"
        + (f"; {len(wrong)} weights wrong" if wrong else ""),
        f"{low:.4f} to {high:.4f} there; {len(released)} weights, {sum(v.size for v in released.values()):,} values",
        FALSE_ALARM,
    )


def noise_shape(released: Released, std: float) -> Check:
    """Kolmogorov-Smirnov against the Gaussian: right spread and wrong tails would still be wrong."""
    values = np.concatenate([noise_KW.ravel() for noise_KW in released.values()]) / std
    found = stats.kstest(values, "norm")
    return Check(
        "shape of the noise",
        bool(found.pvalue > FALSE_ALARM),
        f"distance {found.statistic:.4f} from the Gaussian",
        f"at most {stats.kstwo.isf(FALSE_ALARM, values.size):.4f}",
        FALSE_ALARM,
    )


def noise_fresh(released: Released) -> Check:
    """Is all noise its own? Correlations between releases, of a release with itself one place on, between two weights.

    A seed that is set anew gives two releases the same noise: correlation 1.
    """
    whole_KW = np.concatenate(list(released.values()), axis=1)
    pairs = [(whole_KW[i], whole_KW[j]) for i in range(len(whole_KW)) for j in range(i)]
    pairs += [(row[:-1], row[1:]) for row in whole_KW]
    large = [noise_KW[0] for noise_KW in released.values() if noise_KW.shape[1] >= ENOUGH]
    pairs += [(a[: len(b)], b[: len(a)]) for i, a in enumerate(large) for b in large[:i]]
    with np.errstate(invalid="ignore", divide="ignore"):  # no noise at all: NaN, which counts as 1
        found = [abs(np.nan_to_num(np.corrcoef(a, b)[0, 1], nan=1.0)) * math.sqrt(len(a)) for a, b in pairs]
    limit = float(stats.norm.isf(FALSE_ALARM / len(pairs) / 2))
    return Check(
        "independence of the noise",
        bool(max(found) <= limit),
        f"largest correlation {max(found):.2f} standard errors",
        f"at most {limit:.2f}, {len(pairs)} pairs",
        FALSE_ALARM,
    )


def sampler(taken_TN: Bools, rate: float) -> list[Check]:
    """Independent Bernoulli(rate) for each patient and step? taken_TN: who took part.  rate: in (0, 1).

    Mean, variance between steps (N q (1 - q)), each patient's own share, and pairs: a patient with the next one in the
    same step, and with itself in the next step. Raises: ConfigError for rate 1, where there is nothing to test.
    """
    if not 0 < rate < 1:
        raise ConfigError(f"a sampler of rate {rate:g} cannot be tested", fix="a rate between 0 and 1")
    steps, patients = taken_TN.shape
    draws = steps * patients
    total = int(taken_TN.sum())
    mean = Check(
        "sampling rate",
        bool(stats.binomtest(total, draws, rate).pvalue > FALSE_ALARM),
        f"{total / draws:.5f}",
        f"{rate:g}, within {stats.norm.isf(FALSE_ALARM / 2) * math.sqrt(rate * (1 - rate) / draws):.5f}",
        FALSE_ALARM,
    )
    centred_TN = (taken_TN - rate) / math.sqrt(rate * (1 - rate))
    kurtosis = (1 - 3 * rate * (1 - rate)) / (rate * (1 - rate))  # fourth moment of a centred_TN
    size_T = taken_TN.sum(1)
    variance = float(np.square(size_T - patients * rate).mean())
    planned = patients * rate * (1 - rate)
    # of the mean over T of the square of a sum over N: (kurtosis - 3) / N + 2
    spread = planned * math.sqrt(((kurtosis - 3) / patients + 2) / steps)
    wide = stats.norm.isf(FALSE_ALARM / 2) * 1.25 * spread  # the square of a sum has a longer tail than a Gaussian
    own_N = np.square(centred_TN.sum(0)).mean() / steps
    own_wide = stats.norm.isf(FALSE_ALARM / 2) * 1.25 * math.sqrt(((kurtosis - 3) / steps + 2) / patients)
    near = max(abs((centred_TN[:, :-1] * centred_TN[:, 1:]).mean()), abs((centred_TN[:-1] * centred_TN[1:]).mean()))
    near_wide = stats.norm.isf(FALSE_ALARM / 4) / math.sqrt((steps - 1) * (patients - 1))
    return [
        mean,
        Check(
            "sizes of the samples vary as N q (1 - q)",
            bool(abs(variance - planned) <= wide),
            f"variance {variance:.2f}",
            f"{planned:.2f}, within {wide:.2f}",
            FALSE_ALARM,
        ),
        Check(
            "each patient is drawn as often",
            bool(abs(own_N - 1) <= own_wide),
            f"{own_N:.3f} of the variance of independent draws",
            f"1, within {own_wide:.3f}",
            FALSE_ALARM,
        ),
        Check(
            "draws are independent", bool(near <= near_wide), f"correlation {near:.4f}", f"{near_wide:.4f}", FALSE_ALARM
        ),
    ]


def same_epsilon(shown: float, recomputed: float, *, tolerance: float = 1e-6) -> Check:
    """Does the ledger show what its own events cost?"""
    return Check(
        "ledger replayed",
        abs(shown - recomputed) <= tolerance,
        f"{recomputed:.6f} from its events",
        f"{shown:.6f} as it shows, within {tolerance:g}",
    )


def accountants_agree(pld: float, prv: float | None, rdp: float) -> Check:
    """PLD is the number of record; PRV and RDP are looser and independent. prv: None where it is left out (epsilon above 50)."""
    in_order = pld <= (rdp if prv is None else prv) + 1e-3 and (prv is None or prv <= rdp + 0.02)
    return Check(
        "three accountants",
        in_order,
        f"PLD {pld:.4f}, PRV {'left out' if prv is None else f'{prv:.4f}'}, RDP {rdp:.4f}",
        "PLD <= PRV <= RDP + 0.02",
    )


def as_planned(charged: Mapping[int, Sequence[object]], planned: Mapping[int, Sequence[object]]) -> Check:
    """By round what the ledger was charged (kind, noise, rate, steps), and what the run's plan says it costs."""
    wrong = sorted(number for number, event in charged.items() if list(event) != list(planned[number]))
    return Check(
        "charged is what was planned",
        not wrong,
        f"{len(wrong)} rounds differ" + (f", the first is {wrong[0]}" if wrong else ""),
        "noise, rate and steps of every round as in the plan",
    )


def same_steps(taken: Sequence[int], charged: Sequence[int]) -> Check:
    """Steps of each round: those that were taken, and those that the ledger was charged."""
    return Check(
        "steps taken are steps charged",
        list(taken) == list(charged),
        f"{sum(taken)} steps in {len(taken)} rounds",
        f"{sum(charged)} steps in {len(charged)} rounds of the ledger",
    )
