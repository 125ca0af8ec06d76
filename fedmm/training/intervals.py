"""How far the scores would move with other patients of the same kind: bootstrap by patient.

Patients are drawn with replacement, each with all studies; a study then has a weight (how often its patient was drawn),
and no study is copied. The draws have a fixed public seed: the same predictions give the same intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedmm.schema import Labels
from fedmm.seeds import stream
from fedmm.training.metrics import FEWEST, Predictions, right, truth
from fedmm.training.rates import Flags, Floats

# B studies, O outputs, D draws, N negative and P positive studies of an output

LEVEL = 0.95
SEED = 0  # public
CELLS = 2**20  # weights in memory at once: 8 MB

Key = tuple[str, ...]


class View(NamedTuple):
    """What is scored: probability_BO, and truth_BO with NaN where it is not known or the study is not in the view."""

    probability_BO: Floats
    truth_BO: Floats


def intervals(
    p: Predictions, labels: Labels, *, draws: int, groups: Mapping[str, Mapping[str, Flags]] | None = None
) -> dict[str, Any]:
    """95 % percentile intervals [low, high] of accuracy, of each AUROC, and of each subset's and group's mean AUROC.

    draws: > 0.  groups: by kind and value, which studies.
    None: the score itself is not defined, it is of fewer than FEWEST patients (to draw again from so few says little), or
    half of the draws have one class only. They tell of the choice of patients alone: not of another scanner, not of the
    training. Too short for scores near 0 and 1, down to nothing for a perfect one.
    Source: Efron and Tibshirani 1993; whole clusters are drawn, Davison and Hinkley 1997, section 3.8.
    """
    groups, truth_BO = groups or {}, truth(p, labels)
    views: dict[Key, View] = {("whole",): View(p.probability_BO, truth_BO)}
    views |= {("subset", name): View(made, _only(truth_BO, p.having(name))) for name, made in p.subset.items()}
    views |= {
        ("group", kind, value): View(p.probability_BO, _only(truth_BO, rows_B))
        for kind, values in groups.items()
        for value, rows_B in values.items()
    }
    hit_B, known_B = right(p.probability_BO, truth_BO, labels)
    found: dict[Key, list[Floats]] = {key: [] for key in (("accuracy",), *views)}
    for weight_DB in drawn(p, draws):
        found["accuracy",].append(_ratio(weight_DB @ hit_B, weight_DB @ known_B))
        for key, view in views.items():
            found[key].append(areas(view, weight_DB))
    whole_DO = np.concatenate(found["whole",])
    mean = {key: _interval(_mean(np.concatenate(found[key])), p, ~np.isnan(v.truth_BO)) for key, v in views.items()}
    return {
        "draws": draws,
        "level": LEVEL,
        "accuracy": _interval(np.concatenate(found["accuracy",]), p, known_B[:, None] > 0),
        "mean_auroc": mean["whole",],
        "auroc": {
            name: _interval(whole_DO[:, o], p, ~np.isnan(truth_BO[:, o : o + 1]))
            for o, name in enumerate(labels.outputs[: truth_BO.shape[1]])
        },
        "by_subset": {name: mean["subset", name] for name in p.subset},
        "by_group": {kind: {value: mean["group", kind, value] for value in values} for kind, values in groups.items()},
    }


def drawn(p: Predictions, draws: int) -> Iterator[Floats]:
    """(some D, B) how often each study's patient was drawn, until there are `draws`. The same whatever fits in memory."""
    if not p.patients:
        yield np.zeros((draws, 0))
        return
    rng, most = stream(SEED, "bootstrap"), max(1, CELLS // max(1, len(p.patient_B)))
    for done in range(0, draws, most):
        size = min(most, draws - done)
        count_DP = rng.multinomial(p.patients, np.full(p.patients, 1 / p.patients), size=size)
        yield count_DP[:, p.patient_B].astype(np.float64)


def areas(view: View, weight_DB: Floats) -> Floats:
    """(D, O) AUROC of each output if each study counted `weight_DB` times; NaN with one class only.

    For each positive study the weight of the negative ones below it, ties half: `rates.auroc` for weights of 1.
    """
    area_DO = np.full((len(weight_DB), view.truth_BO.shape[1]), np.nan)
    for o, (score_B, truth_B) in enumerate(zip(view.probability_BO.T, view.truth_BO.T, strict=False)):
        yes_P, no_N = np.flatnonzero(truth_B > 0.5), np.flatnonzero(truth_B < 0.5)  # NaN is neither
        no_N = no_N[np.argsort(score_B[no_N], kind="stable")]
        yes_DP = weight_DB[:, yes_P]
        below_DN = np.pad(weight_DB[:, no_N].cumsum(1), ((0, 0), (1, 0)))
        first_P, last_P = (np.searchsorted(score_B[no_N], score_B[yes_P], side=side) for side in ("left", "right"))
        won_D = (yes_DP * (below_DN[:, first_P] + below_DN[:, last_P])).sum(1) / 2
        area_DO[:, o] = _ratio(won_D, yes_DP.sum(1) * below_DN[:, -1])
    return area_DO


def _only(truth_BO: Floats, rows_B: Flags) -> Floats:
    return np.where(rows_B[:, None], truth_BO, np.nan)


def _ratio(part_D: Floats, whole_D: Floats) -> Floats:
    """NaN where there is nothing to divide by."""
    ratio_D: Floats = np.divide(part_D, whole_D, out=np.full(len(part_D), np.nan), where=whole_D > 0)
    return ratio_D


def _mean(area_DO: Floats) -> Floats:
    """(D,) over the outputs that are defined in the draw."""
    return _ratio(np.nan_to_num(area_DO, nan=0.0).sum(1), (~np.isnan(area_DO)).sum(1).astype(np.float64))


def _interval(value_D: Floats, p: Predictions, known_BX: Flags) -> list[float] | None:
    """known_BX: which truths it is computed from."""
    defined_D = value_D[~np.isnan(value_D)]
    if 2 * len(defined_D) <= len(value_D) or p.patients_of(np.asarray(known_BX.any(1))) < FEWEST:
        return None
    low, high = np.quantile(defined_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]
