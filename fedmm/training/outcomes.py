"""Scores of the further labels: a level, a value, a time to an event. numpy and scipy, as metrics.py.

A number that is not defined (nobody there, no spread) is None. Exact: for people who may read these patients' data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from fedmm.models.heads import kinds
from fedmm.schema import Labels

# B studies, O outputs, K columns of Labels.further, L levels above the least, T intervals of time

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def score_further(probability_BO: Floats, further_BK: Floats, labels: Labels) -> dict[str, Any]:
    """By kind ("ordinal", "regression", "survival"; those that there are) its scores, with the label and its known studies.

    probability_BO: as heads.probabilities.  further_BK: as in Batch, NaN is missing.
    """
    truth = dict(zip(labels.further, np.asarray(further_BK, dtype=np.float64).T, strict=True))
    said = {kind: probability_BO[:, columns] for kind, columns in kinds(labels).items()}
    found: dict[str, Any] = {}
    if "ordinal" in said:
        known_B = ~np.isnan(truth[labels.ordinal_name])
        level_B = truth[labels.ordinal_name][known_B].astype(np.int64)
        found["ordinal"] = {"label": labels.ordinal_name, **_ordinal(said["ordinal"][known_B], level_B)}
    if "regression" in said:
        known_B = ~np.isnan(truth[labels.value_name])
        value_B = truth[labels.value_name][known_B]
        found["regression"] = {"label": labels.value_name, **_value(said["regression"][known_B, 0], value_B)}
    if "survival" in said:
        time_B, event_B = truth[labels.time_name], truth[labels.event_name]
        known_B = ~(np.isnan(time_B) | np.isnan(event_B))
        scores = _survival(said["survival"][known_B], time_B[known_B], event_B[known_B] > 0.5, labels.time_edges)
        found["survival"] = {"label": labels.time_name, **scores}
    return found


def _ordinal(at_least_BL: Floats, level_B: NDArray[np.int64]) -> dict[str, Any]:
    """The answer is the median level: how many P(level >= k) are above one half. Kappa: Cohen 1968, weights (i - j)^2."""
    guess_B = (at_least_BL > 0.5).sum(1)
    off_B = np.abs(guess_B - level_B)
    levels = np.arange(at_least_BL.shape[1] + 1)
    guessed_L, true_L = (np.bincount(found_B, minlength=len(levels)) for found_B in (guess_B, level_B))
    by_chance = float(guessed_L @ np.subtract.outer(levels, levels) ** 2 @ true_L) / max(len(level_B), 1) ** 2
    return {
        "studies": len(level_B),
        "accuracy": _mean(off_B == 0),
        "mean_absolute_error": _mean(off_B),
        "quadratic_weighted_kappa": 1 - float((off_B**2).mean()) / by_chance if by_chance else None,
    }


def _value(guess_B: Floats, value_B: Floats) -> dict[str, Any]:
    error_B = guess_B - value_B
    spread = float(value_B.var()) if len(value_B) else 0.0
    squared = _mean(error_B**2)
    return {
        "studies": len(value_B),
        "mean_absolute_error": _mean(np.abs(error_B)),
        "root_mean_squared_error": None if squared is None else squared**0.5,
        "r2": None if squared is None or spread == 0 else 1 - squared / spread,
        "spearman": _correlation(rankdata(guess_B), rankdata(value_B)),
    }


def _correlation(one_B: Floats, other_B: Floats) -> float | None:
    """Pearson's."""
    if len(one_B) < 2 or one_B.std() == 0 or other_B.std() == 0:
        return None
    return float(((one_B - one_B.mean()) * (other_B - other_B.mean())).mean() / (one_B.std() * other_B.std()))


def _survival(gone_BT: Floats, time_B: Floats, event_B: Bools, edges: tuple[float, ...]) -> dict[str, Any]:
    """gone_BT: P(T <= edge).

    concordance ranks studies by the mean of gone_BT over the time up to the last edge: one less the share of it that is
    expected to be lived. brier: at each edge, of the studies whose state there is known; who was lost from sight before is
    left out, which is right if being lost says nothing about the risk. integrated_brier: their mean over time.
    """
    length_T = np.diff([0.0, *edges])
    brier = [_brier(gone_BT[:, t], time_B, event_B, edge) for t, edge in enumerate(edges)]
    known_T = np.array([value is not None for value in brier], dtype=bool)
    known = [value for value in brier if value is not None]
    return {
        "studies": len(time_B),
        "events": int(event_B.sum()),
        "concordance": concordance(gone_BT @ length_T, time_B, event_B),
        "brier": {f"{edge:g}": value for edge, value in zip(edges, brier, strict=True)},
        "integrated_brier": float(np.average(known, weights=length_T[known_T])) if known else None,
    }


def _brier(gone_B: Floats, time_B: Floats, event_B: Bools, edge: float) -> float | None:
    yes_B = event_B & (time_B <= edge)
    known_B = yes_B | (time_B >= edge)
    return _mean((gone_B[known_B] - yes_B[known_B]) ** 2)


def concordance(risk_B: Floats, time_B: Floats, event_B: Bools) -> float | None:
    """Of all pairs of which one is known to have had its event first, the share in which it had the higher risk; ties half.

    A study that was still observed at the very time of another's event lived longer. None without such a pair.
    Source: Harrell 1982.
    """
    right, pairs = 0.0, 0
    for i in np.flatnonzero(event_B):
        later_B = (time_B > time_B[i]) | ((time_B == time_B[i]) & ~event_B)
        right += float((risk_B[i] > risk_B[later_B]).sum() + 0.5 * (risk_B[i] == risk_B[later_B]).sum())
        pairs += int(later_B.sum())
    return right / pairs if pairs else None


def _mean(values_B: NDArray[Any]) -> float | None:
    return float(values_B.mean()) if len(values_B) else None
