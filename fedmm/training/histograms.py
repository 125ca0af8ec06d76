"""Evaluation that costs epsilon: a hospital's noisy histograms, and the scores that a server reads from them.

The histograms are all that leaves the hospital. Each patient adds at most 1 to each block, spread over the studies, so
whoever adds or removes a patient moves the vector by at most sqrt(blocks) in L2; one Gaussian on every cell hides that.
All that follows is post-processing.

Order of the cells: for each finding and each value of the class a block [truth no, truth yes] x [BINS bins of predicted
probability]; where there is a class one more block [wrong, right] of the most probable value. Levels, values and times have
no histograms: they add no cell and no noise, and their scores do not leave this way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedmm.privacy.noise import Noise, with_noise
from fedmm.schema import Labels
from fedmm.training.metrics import Predictions
from fedmm.training.rates import CALIBRATION_BINS, Floats

# B studies, O outputs, K bins, A candidates for the true value, R bins of the reliability curve

Ints = NDArray[np.int64]

# measured on 36 logit-normal score distributions: 10 bins lower the AUROC of rare findings by up to 0.27, 20 by 0.07, 30
# by 0.13 (scores that all fall into one bin) with 22 % more noise. A multiple of CALIBRATION_BINS, and even: see _bin.
BINS = 20
Z = 1.959964  # 95 %
HIDDEN = 3.0  # a total below so many standard deviations of its noise may be nobody: no value
LARGEST = 1e9  # a hospital's claim above this is cut: it would overflow, and no hospital has so many patients
CANDIDATE_A = np.linspace(-2.0, 3.0, 10_001)  # beyond 0 … 1: how far the data go, before the interval is cut
STEP = 5e-4


def counted(labels: Labels) -> tuple[str, ...]:
    """The outputs that have a histogram, which are the first of `labels.outputs`: findings and values of the class."""
    return labels.outputs[: len(labels.findings) + len(labels.class_values)]


def cells(labels: Labels) -> int:
    """Length of a histogram; 0 where there is neither a finding nor a class."""
    return 2 * BINS * len(counted(labels)) + (2 if labels.class_name else 0)


def noise_std(labels: Labels, noise_multiplier: float) -> float:
    """Standard deviation of the noise on every cell, in patients: the multiplier times the sensitivity sqrt(blocks)."""
    return noise_multiplier * math.sqrt(len(counted(labels)) + bool(labels.class_name))


# --- hospital ---------------------------------------------------------------------------------------------------------


def histogram(p: Predictions, labels: Labels, *, noise: Noise, noise_multiplier: float) -> list[float]:
    """Patients by truth and predicted probability, with noise; `cells(labels)` numbers in the order of the module.

    noise_multiplier: > 0, what the ledger charges.
    Guarantee: one Gaussian mechanism of sensitivity sqrt(blocks) under adding or removing a patient, whatever the
    patient's number of studies, missing labels and predictions, NaN included; as long as nobody's prediction depends on
    who else is there. In a shared batch float32 does, by 3e-7 (measured): enough to cross the edge of a bin.
    Raises: ValueError for a multiplier that is not positive and finite.
    """
    if not 0 < noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be above 0 and finite, not {noise_multiplier}")
    if not cells(labels):
        return []
    std = noise_std(labels, noise_multiplier)
    total = torch.from_numpy(_count(p, labels))
    return [float(value) for value in with_noise(total, noise, std)]


def _count(p: Predictions, labels: Labels) -> Floats:
    """(cells,) exact."""
    findings, outputs = len(labels.findings), len(counted(labels))
    blocks = []
    for o in range(outputs):
        yes_B = p.finding_BF[:, o] > 0.5 if o < findings else p.class_B == o - findings
        known_B = ~np.isnan(p.finding_BF[:, o]) if o < findings else p.class_B >= 0
        blocks.append(_spread(yes_B * BINS + _bin(p.probability_BO[:, o]), known_B, p, 2 * BINS))
    if labels.class_name:
        right_B = p.probability_BO[:, findings:outputs].argmax(1) == p.class_B
        blocks.append(_spread(right_B.astype(np.int64), p.class_B >= 0, p, 2))
    return np.concatenate(blocks)


def _spread(cell_B: Ints, known_B: NDArray[np.bool_], p: Predictions, count: int) -> Floats:
    """(count,): each patient adds 1, in equal parts over the studies whose label is known."""
    owner = p.patient_B[known_B]
    return np.bincount(cell_B[known_B], 1.0 / np.bincount(owner)[owner], count).astype(np.float64)


def _bin(probability_B: Floats) -> Ints:
    """Bins (lower, upper], so that exactly 0.5 counts as "no", as in metrics; NaN is in the first."""
    inside = np.nan_to_num(probability_B, nan=0.0).clip(0.0, 1.0)
    bin_B: Ints = np.ceil(inside * BINS).astype(np.int64).clip(1) - 1
    return bin_B


# --- server -----------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """value, None if hidden by the noise; its interval, not yet cut to 0 … 1; share of the variance that is noise."""

    value: float | None
    low: float
    high: float
    noise: float


def noisy_score(values: Sequence[float], labels: Labels, *, noise_std: float) -> dict[str, Any]:
    """Scores from one histogram, of one hospital or summed over several: JSON, each number in its range or None.

    noise_std: of each cell; of a sum the root of the sum of squares.
    None: hidden by the noise, or nobody there. Intervals are never None: 95 %, noise and finite number of patients
    together, [0, 1] where nothing is known. That of AUROC includes what bins hide, if scores in one bin rank no better
    than scores of different bins and no worse than chance.  patients: with a known label (mean over the findings).
    Raises: ValueError if there are not `cells(labels)` values. Any finite values are accepted.
    """
    value = np.clip(np.asarray(values, dtype=np.float64), -LARGEST, LARGEST)
    if value.shape != (cells(labels),):
        raise ValueError(f"a histogram of these labels has {cells(labels)} values, not {value.size}")
    std, outputs = min(noise_std, LARGEST), len(counted(labels))
    table_OTK = value[: 2 * BINS * outputs].reshape(outputs, 2, BINS)
    half = [_area(*table_TK, std=std, ties=True) for table_TK in table_OTK]
    apart = [_area(*table_TK, std=std, ties=False) for table_TK in table_OTK]
    areas = [_shown(h, a) for h, a in zip(half, apart, strict=True)]
    mean, mean_interval = _shown(_mean(half), _mean(apart))
    blocks, bins = (1, 1) if labels.class_name else (max(outputs, 1), BINS)
    right = value[-1] if labels.class_name else table_OTK[:, 1, BINS // 2 :].sum() + table_OTK[:, 0, : BINS // 2].sum()
    total = value[-2:].sum() if labels.class_name else table_OTK.sum()
    accuracy, accuracy_interval = _shown(_share(float(right), float(total), blocks=blocks, bins=bins, std=std))
    return {
        "noisy": True,
        "patients": max(0, round(float(total) / blocks)),
        "auroc": {name: area for name, (area, _) in zip(counted(labels), areas, strict=True)},
        "auroc_interval": {name: interval for name, (_, interval) in zip(counted(labels), areas, strict=True)},
        "mean_auroc": mean,
        "mean_auroc_interval": mean_interval,
        "accuracy": accuracy,
        "accuracy_interval": accuracy_interval,
        "calibration": _calibration(table_OTK, std),
    }


def _area(no_K: Floats, yes_K: Floats, *, std: float, ties: bool) -> Estimate:
    """Share of pairs in the right order; those in one bin count half, or with `ties` off not at all.

    Under candidate a the statistic yes (wins - a pairs) no has mean 0. Its variance: the noise, and the patients after
    Hanley and McNeil 1982 or DeLong 1988, the larger: one fails near 0 and 1, the other for unequal spreads.
    """
    one_KK, wins_KK = np.eye(BINS), np.tri(BINS, k=-1)
    wins_KK, pairs_KK = (wins_KK + one_KK / 2, one_KK * 0 + 1) if ties else (wins_KK, 1 - one_KK)
    a, yes, no = CANDIDATE_A, float(yes_K.sum()), float(no_K.sum())
    noise_A, delong_A = np.zeros_like(a), np.zeros_like(a)
    for own_K, won_K, met_K in (
        (yes_K, wins_KK @ no_K, pairs_KK @ no_K),
        (no_K, yes_K @ wins_KK, yes_K @ pairs_KK),
    ):
        for weight_K, sum_A in ((np.full(BINS, std**2), noise_A), (own_K.clip(0.0), delong_A)):
            sum_A += weight_K @ won_K**2 - 2 * a * (weight_K @ (won_K * met_K)) + a**2 * (weight_K @ met_K**2)
    q, pairs = a.clip(0.0, 1.0), float(yes_K @ pairs_KK @ no_K)
    first_A, second_A = q / (2 - q) - q**2, 2 * q**2 / (1 + q) - q**2
    hanley_A = max(pairs, 0.0) * (q * (1 - q) + max(yes - 1, 0.0) * first_A + max(no - 1, 0.0) * second_A)
    known = min(yes, no) > HIDDEN * std * math.sqrt(BINS) and pairs > 0
    return _invert(float(yes_K @ wins_KK @ no_K), pairs, noise_A, np.maximum(hanley_A, delong_A), known=known)


def _share(right: float, total: float, *, blocks: int, bins: int, std: float) -> Estimate:
    """right / total over blocks x 2 x bins cells, half of them right; one patient's blocks may all be right or wrong."""
    q, half = CANDIDATE_A.clip(0.0, 1.0), blocks * bins
    noise_A = half * std**2 * ((1 - CANDIDATE_A) ** 2 + CANDIDATE_A**2)
    known = total > HIDDEN * std * math.sqrt(2 * half)
    return _invert(right, total, noise_A, blocks * max(total, 0.0) * q * (1 - q), known=known)


def _invert(part: float, whole: float, noise_A: Floats, patients_A: Floats, *, known: bool) -> Estimate:
    """All candidates a for which part - a * whole is within Z standard deviations of 0: Fieller 1954, Wilson 1927.

    No division by a noisy total: where there is no information, all candidates stay.
    """
    kept = np.flatnonzero((part - CANDIDATE_A * whole) ** 2 <= Z**2 * (noise_A + patients_A))
    value = min(max(part / whole, 0.0), 1.0) if known else None
    if not len(kept):  # narrower than a step
        kept = np.array([np.abs(part - CANDIDATE_A * whole).argmin()])
    low = -math.inf if kept[0] == 0 else float(CANDIDATE_A[kept[0]]) - STEP
    high = math.inf if kept[-1] == len(CANDIDATE_A) - 1 else float(CANDIDATE_A[kept[-1]]) + STEP
    here = int(np.searchsorted(CANDIDATE_A, value or 0.0))
    noise, patients = max(float(noise_A[here]), 0.0), max(float(patients_A[here]), 0.0)
    return Estimate(value, low, high, noise / (noise + patients) if noise > 0 else 0.0)


def _mean(areas: Sequence[Estimate]) -> Estimate | None:
    """Of those with a value. The outputs' noise is independent; their patients are the same and may err together.

    Distances to the limits add up accordingly: Zou and Donner 2008.
    """
    known = [(area.value, area) for area in areas if area.value is not None]
    if not known:
        return None
    mean, reach = sum(value for value, _ in known) / len(known), []
    for far in ([(v - e.low, e.noise) for v, e in known], [(e.high - v, e.noise) for v, e in known]):
        apart = sum(d**2 * noise for d, noise in far if noise > 0)
        together = sum(d * math.sqrt(1 - noise) for d, noise in far if noise < 1)
        reach.append(math.sqrt(apart + together**2) / len(known))
    return Estimate(mean, mean - reach[0], mean + reach[1], 0.0)


def _shown(*estimates: Estimate | None) -> tuple[float | None, list[float]]:
    """The first's value, and the interval within 0 … 1 that holds all intervals and the value."""
    known = [e for e in estimates if e is not None]
    value = known[0].value if known else None
    inside = [value] if value is not None else []
    low = min([min(max(e.low, 0.0), 1.0) for e in known] + inside, default=0.0)
    high = max([min(max(e.high, 0.0), 1.0) for e in known] + inside, default=1.0)
    return value, [low, high]


def _calibration(table_OTK: Floats, std: float) -> dict[str, Any]:
    """Reliability of all outputs together. predicted: from the middles of the narrower bins.

    expected_calibration_error: the noise's part is taken off each squared gap; still too high by what is left of it.
    """
    outputs, fine = len(table_OTK), BINS // CALIBRATION_BINS
    no_RK, yes_RK = (table_OTK.sum(0)[t].reshape(CALIBRATION_BINS, fine) for t in (0, 1))
    middle_RK = ((np.arange(BINS) + 0.5) / BINS).reshape(CALIBRATION_BINS, fine)
    weight_RK = (no_RK + yes_RK).clip(0.0) + 1e-9  # nobody: the middle
    yes_R, count_R = yes_RK.sum(1), (no_RK + yes_RK).sum(1)
    rates = [
        _shown(_share(float(yes), float(count), blocks=outputs, bins=fine, std=std))
        for yes, count in zip(yes_R, count_R, strict=True)
    ]
    gap_R = yes_R - (middle_RK * (no_RK + yes_RK)).sum(1)
    hidden_R = std**2 * outputs * ((1 - middle_RK) ** 2 + middle_RK**2).sum(1)
    error, total = float(np.sqrt((gap_R**2 - hidden_R).clip(0.0)).sum()), float(count_R.sum())
    known = total > HIDDEN * std * math.sqrt(table_OTK.size)
    return {
        "predicted": ((middle_RK * weight_RK).sum(1) / weight_RK.sum(1)).tolist(),
        "observed": [rate for rate, _ in rates],
        "observed_interval": [interval for _, interval in rates],
        "count": [max(0, round(count)) for count in count_R.tolist()],
        "expected_calibration_error": min(error / total, 1.0) if known else None,
    }
