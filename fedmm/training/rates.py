"""Scores of one yes/no answer, and how well probabilities keep their word: arrays in, numbers out.

A number that is not defined (nobody is positive, say) is None.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

# B studies, all with a known truth

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
CALIBRATION_BINS = 10


def auroc(score_B: Floats, truth_B: Flags) -> float | None:
    """Probability that a positive study scores higher than a negative one, ties half. None with one class only.

    Source: Mann and Whitney 1947; equal to the area under the ROC curve.
    """
    positive, negative = int(truth_B.sum()), int((~truth_B).sum())
    if positive == 0 or negative == 0:
        return None
    rank_sum = float(rankdata(score_B)[truth_B].sum())
    return (rank_sum - positive * (positive + 1) / 2) / (positive * negative)


def auprc(score_B: Floats, truth_B: Flags) -> float | None:
    """Average precision: mean over the positive studies of the precision at their score. None with one class only.

    Chance is the share of positive studies, not 0.5. Without interpolation, which is too kind (Davis and Goadrich 2006).
    """
    positive = int(truth_B.sum())
    if positive in (0, len(truth_B)):
        return None
    order_B = np.argsort(-score_B, kind="stable")
    last_B = np.append(np.diff(score_B[order_B]) != 0, True)  # one threshold for all studies of the same score
    found = truth_B[order_B].cumsum()[last_B]
    precision = found / (np.flatnonzero(last_B) + 1)
    return float((np.diff(found, prepend=0) * precision).sum() / positive)


def rates(probability_B: Floats, said_B: Flags, truth_B: Flags) -> dict[str, float | int | None]:
    """All scores of one yes/no answer. said_B: the answer that the probability led to.

    ppv, npv: how often a yes and a no is right, at the share of positive studies here.
    """
    yes, no = int(truth_B.sum()), int((~truth_B).sum())
    found, rejected = int((said_B & truth_B).sum()), int((~said_B & ~truth_B).sum())
    sensitivity, specificity = _share(found, yes), _share(rejected, no)
    return {
        "studies": yes + no,
        "positive": yes,
        "auroc": auroc(probability_B, truth_B),
        "auprc": auprc(probability_B, truth_B),
        "accuracy": _share(found + rejected, yes + no),
        "balanced_accuracy": None if sensitivity is None or specificity is None else (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": _share(found, int(said_B.sum())),
        "npv": _share(rejected, int((~said_B).sum())),
        "f1": _share(2 * found, yes + int(said_B.sum())),
        "brier": float(((probability_B - truth_B) ** 2).mean()) if yes + no else None,
        "ece": reliability(probability_B, truth_B)["expected_calibration_error"],
    }


def reliability(probability_B: Floats, truth_B: Floats | Flags) -> dict[str, Any]:
    """For each bin of predicted probability its mean, the observed rate and the count; and the mean gap over studies.

    Source: Naeini et al. 2015, expected calibration error with bins of equal width.
    """
    index = (probability_B * CALIBRATION_BINS).astype(np.int64).clip(max=CALIBRATION_BINS - 1)
    count = np.bincount(index, minlength=CALIBRATION_BINS)
    predicted = np.bincount(index, probability_B, CALIBRATION_BINS) / count.clip(min=1)
    observed = np.bincount(index, truth_B, CALIBRATION_BINS) / count.clip(min=1)
    error = float((np.abs(predicted - observed) * count).sum() / count.sum()) if count.sum() else None
    return {
        "predicted": predicted.tolist(),
        "observed": observed.tolist(),
        "count": count.tolist(),
        "expected_calibration_error": error,
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are defined."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
