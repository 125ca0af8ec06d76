"""Privacy losses on a grid: what one step gives away, and the composition of thousands of steps of many kinds.

Composition adds losses, so it multiplies spectra: one Fourier transform for each kind of step, raised to the number of
its steps, and one back for all of them together, however many kinds there are. The product of eight kinds that no longer
change is kept: a step more costs one power, a few products and one way back. dp-accounting composes the kinds one after
the other; tests/privacy/test_accounting.py holds the two together.
Source: Koskela, Jälkö and Honkela 2020, "Computing Tight Differential Privacy Guarantees Using FFT".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import fft, special

# K kinds of steps, L points of the grid, O orders

TAIL = 1e-15  # probability that a composition may move to "no bound": dp-accounting's own
# Orders of Chernoff's bound, by point of the grid: an octave between two costs 6 % of the length at most.
ORDERS_O = np.concatenate([-(2.0 ** np.arange(-18, 4)), 2.0 ** np.arange(-18, 4)])
LEAST = 1e-250  # a smaller sum of exponentials may have lost terms to underflow: no bound
BLOCK = 8  # kinds whose product is kept


class Kind(NamedTuple):
    """Of steps. removed: a patient less, else one more.  grid: between two losses."""

    noise_multiplier: float
    sampling_rate: float
    removed: bool
    grid: float


class Losses(NamedTuple):
    """Probability p_L[i] of the loss (first + i) x grid; `infinity` is what no loss bounds."""

    first: int
    p_L: NDArray[np.float64]
    infinity: float


OneStep: TypeAlias = Callable[[Kind], Losses]


def deltas(noise: float, rate: float, loss_L: NDArray[np.float64], *, removed: bool) -> NDArray[np.float64]:
    """(L,) delta of one Poisson-subsampled Gaussian step of sensitivity 1 at each epsilon: its hockey-stick divergence.

    removed: of (1 - q) N(0, s²) + q N(1, s²) from N(0, s²); else the other way round.
    Equals dp-accounting's GaussianPrivacyLoss.get_delta_for_epsilon, which inverts the loss point by point in Python.
    Raises: FloatingPointError where float64 is too small.
    """
    log_out, log_in = (math.log1p(-rate) if rate < 1 else -math.inf), math.log(rate)
    sign = 1.0 if removed else -1.0
    seen_L = sign * loss_L > log_out  # elsewhere no outcome is as telling, or all are
    loss = loss_L[seen_L]
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        # where the loss is just this one: log((exp(loss) - 1 + q) / q) = (2 x - 1) / (2 s²)
        x = 0.5 + noise**2 * (sign * loss + np.log(-np.expm1(log_out - sign * loss)) - log_in)
        if removed:
            delta_L = -np.expm1(np.minimum(loss_L, 0.0))
            upper = (1 - rate) * special.ndtr(-x / noise) + rate * special.ndtr((1 - x) / noise)
            log_lower = special.log_ndtr(-x / noise)
        else:
            delta_L = np.zeros_like(loss_L)
            upper = special.ndtr(x / noise)
            of_one = log_in + special.log_ndtr((x - 1) / noise)
            log_lower = np.logaddexp(log_out + special.log_ndtr(x / noise), of_one)
        delta_L[seen_L] = upper - np.exp(loss + log_lower)
    return np.clip(delta_L, 0.0, 1.0)


def composed(history: Sequence[tuple[Kind, int]], one: OneStep) -> Losses:
    """The losses of all steps: kinds with their numbers, of which `one` gives a single step. The same for the same history.

    Guarantee: pessimistic as `one` is. What lies beyond the bounds, TAIL at most, wraps around and counts as infinity too.
    """
    span = _Span(0, 0, 0, 0.0, np.zeros(len(ORDERS_O)))
    for kind, count in history:
        span = span.plus(_span(kind, one), count)
    first, last = span.bounds()
    length = _length(max(last - first + 1, span.longest))
    total = np.ones(length // 2 + 1, dtype=np.complex128)
    whole = len(history) // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        total *= _product(tuple(history[at : at + BLOCK]), length, one)
    for kind, count in history[whole:]:
        total *= _power(kind, count, length, one)
    p_L = np.roll(fft.irfft(total, length), -first)[: last - first + 1]
    return Losses(span.first + first, p_L, TAIL - math.expm1(span.log_bounded))


class _Span(NamedTuple):
    """Where the losses of some steps lie.

    points: distance of the least and the largest.  longest: points of one step.  log_bounded: log(1 - infinity).
    log_mgf_O: log of E[exp(order x points above the least)], inf where it is not known.
    """

    first: int
    points: int
    longest: int
    log_bounded: float
    log_mgf_O: NDArray[np.float64]

    def plus(self, other: _Span, count: int) -> _Span:
        return _Span(
            self.first + count * other.first,
            self.points + count * other.points,
            max(self.longest, other.longest),
            self.log_bounded + count * other.log_bounded,
            self.log_mgf_O + count * other.log_mgf_O,
        )

    def bounds(self) -> tuple[int, int]:
        """First and last point, counted from the least; TAIL at most lies outside (Chernoff)."""
        bound_O = (self.log_mgf_O + math.log(2 / TAIL)) / ORDERS_O  # of an unknown order: -inf below, inf above
        lowest, highest = bound_O[ORDERS_O < 0].max(), bound_O[ORDERS_O > 0].min()
        return math.floor(max(0.0, lowest)), math.ceil(min(float(self.points), highest))


@lru_cache(maxsize=1024)  # small; the losses themselves are not
def _span(kind: Kind, one: OneStep) -> _Span:
    first, p_L, infinity = one(kind)
    at_L = np.arange(len(p_L), dtype=np.float64)
    log_mgf_O = np.full(len(ORDERS_O), math.inf)
    for number, order in enumerate(ORDERS_O):
        highest = max(0.0, order * at_L[-1])
        total = float(np.exp(order * at_L - highest) @ p_L)
        if total > LEAST:
            log_mgf_O[number] = math.log(total) + highest
    return _Span(first, len(p_L) - 1, len(p_L), math.log1p(-infinity), log_mgf_O)


@lru_cache(maxsize=32)  # a few megabytes each, as below
def _product(block: tuple[tuple[Kind, int], ...], length: int, one: OneStep) -> NDArray[np.complex128]:
    total = np.ones(length // 2 + 1, dtype=np.complex128)
    for kind, count in block:
        total *= _power(kind, count, length, one)
    return total


@lru_cache(maxsize=32)
def _power(kind: Kind, count: int, length: int, one: OneStep) -> NDArray[np.complex128]:
    spectrum: NDArray[np.complex128] = fft.rfft(one(kind).p_L, length)
    return spectrum**count


def _length(least: int) -> int:
    """Fast to transform, and the same for a few steps more, so that spectra can be kept: at most an eighth too long."""
    eighth = 1 << max(0, least.bit_length() - 4)
    return -(-least // eighth) * eighth
