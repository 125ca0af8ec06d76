"""Was this patient in the training set? Asked of a finished model, at the hospital, where the answer is known.

Two attacks, each on the model as it is and given one modality alone:

    loss threshold   members have a lower loss (Yeom et al. 2018); needs nothing but the patient's record
    lira             is the confidence rather that of models that saw this patient, or of models that did not? Online, one
                     Gaussian each, variances pooled over patients (Carlini et al. 2022, "Membership Inference Attacks From
                     First Principles"); needs shadow models

Members are patients of the train split, non-members those of the test split of the same hospital: the same distribution,
because a split is drawn by patient. The unit is the patient: a patient's score is the mean over his or her studies.
The results are exact statistics of patients. Nothing here is for a release.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from fedmm.data.dataset import HospitalData
from fedmm.models.heads import Objective, answer
from fedmm.schema import MODALITIES, Batch
from fedmm.seeds import stream
from fedmm.training.intervals import LEVEL, SEED, View, areas
from fedmm.training.loop import PREDICT_STUDIES, Workbench
from fedmm.training.metrics import FEWEST
from fedmm.training.rates import Flags, Floats
from fedmm.training.shadows import Recipe, Told, halves, some_of

# B studies of a batch, S of the hospital, P patients, K shadow models, D draws of the bootstrap

ALL = "all"
VIEWS = {ALL: MODALITIES} | {name: (name,) for name in MODALITIES}
ALARMS = (0.1, 0.01, 0.001)  # false positive rates at which the true one is asked for
DRAWS = 1000
LEAST_LOSS = 1e-12  # a loss below is rounding; its logit is 27.6

Score = dict[str, float | str | None]


class Confidence(NamedTuple):
    """By view, (P,): loss, the mean over the patient's studies; logit, the mean of their log(p / (1 - p)) with
    p = exp(-loss). NaN: no study with a known label and this modality."""

    loss: dict[str, Floats]
    logit: dict[str, Floats]


def confidence(bench: Workbench, data: HospitalData) -> Confidence:
    """Of every patient of the hospital, by what the model says of the truth: cross entropy, whatever loss the run lowered."""
    objective, cohort = Objective(data.labels), data.cohort("all")
    parts = [
        _losses(bench, batch.to(bench.device), objective)
        for batch in cohort.physical(range(cohort.patients), limit=PREDICT_STUDIES)
    ]
    patient_S = _in_order(data, cohort.patients)
    loss, logit = {}, {}
    for view in VIEWS:
        loss_S = np.concatenate([part[view] for part in parts])
        known_S = ~np.isnan(loss_S)
        logit_S = -np.log(np.expm1(np.clip(loss_S, LEAST_LOSS, 500.0)))
        loss[view] = _mean_by(patient_S[known_S], loss_S[known_S], cohort.patients)
        logit[view] = _mean_by(patient_S[known_S], logit_S[known_S], cohort.patients)
    return Confidence(loss, logit)


def _losses(bench: Workbench, batch: Batch, objective: Objective) -> dict[str, Floats]:
    """By view, (B,): NaN where there is no label or the modality is missing."""
    model, found = bench.model.eval(), {}
    known_B = (~batch.finding_BF.isnan()).any(1) | (batch.class_B >= 0) | (~batch.further_BK.isnan()).any(1)
    with torch.no_grad():
        made = model.encode(batch.inputs, batch.seen_BM)
        for view, names in VIEWS.items():
            kept_M = torch.tensor([name in names for name in MODALITIES], device=bench.device)
            seen_BM = batch.seen_BM & kept_M
            loss_B = objective(answer(model.fuse(made, seen_BM, batch.timeline)), batch).double()
            found[view] = torch.where(known_B & seen_BM.any(1), loss_B, torch.nan).cpu().numpy()
    return found


def _in_order(data: HospitalData, patients: int) -> np.ndarray:
    """(S,) whose study it is, in the order in which a cohort of everybody gives them: patient by patient."""
    return np.repeat(np.arange(patients), np.bincount(data.patient_S.numpy(), minlength=patients))


def _mean_by(patient_S: np.ndarray, value_S: Floats, patients: int) -> Floats:
    count_P = np.bincount(patient_S, minlength=patients)
    sum_P = np.bincount(patient_S, value_S, minlength=patients)
    return np.asarray(np.divide(sum_P, count_P, out=np.full(patients, np.nan), where=count_P > 0))


def members(data: HospitalData) -> Flags:
    """(P,) who is in the train split."""
    member_P = np.zeros(int(data.patient_S.max()) + 1 if len(data.patient_S) else 0, dtype=bool)
    member_P[data.patient_S[data.train_S].numpy()] = True
    return member_P


# --- the attacks --------------------------------------------------------------------------------------------------------


def attack_membership(
    bench: Workbench,
    target: Mapping[str, Tensor],
    data: HospitalData,
    *,
    recipe: Recipe,
    shadows: int,
    progress: Told,
) -> list[dict[str, Any]]:
    """Both attacks on the weights `target`, for each view: `judged`, with "attack" and "modality".

    unseen, beside lira: AUC of what shadow models say that never saw the patient. It knows nothing of membership: how far it
    is from 0.5 is how much easier one split happens to be, and that much of the loss threshold's AUC is not leakage.

    bench: a plain one of the model; ends with other weights.  recipe: how the shadow models are trained.  shadows: K, even;
    0: the loss threshold alone.  progress: shadow models done, and in all.
    """
    bench.load(target)
    seen, member_P = confidence(bench, data), members(data)
    found = [_entry("loss threshold", view, -loss_P, member_P) for view, loss_P in seen.loss.items()]
    if not shadows:
        return found
    inside_KP, others = halves(shadows, len(member_P)), []
    for k, inside_P in enumerate(inside_KP):
        recipe.make(bench, some_of(data, inside_P))
        others.append(confidence(bench, data).logit)
        progress(k + 1, shadows)
    for view, logit_P in seen.logit.items():
        shadow_KP = np.stack([other[view] for other in others])
        ratio_P = likelihood_ratio(logit_P, shadow_KP, inside_KP)
        unseen_P = np.where(inside_KP, 0.0, shadow_KP).sum(0) / (~inside_KP).sum(0)
        found.append({**_entry("lira", view, ratio_P, member_P), "unseen": judged(unseen_P, member_P)["auc"]})
    return found


def _entry(attack: str, view: str, score_P: Floats, member_P: Flags) -> dict[str, Any]:
    return {"attack": attack, "modality": view, **judged(score_P, member_P)}


def likelihood_ratio(logit_P: Floats, shadow_KP: Floats, inside_KP: Flags) -> Floats:
    """(P,) log N(x; in) - log N(x; out), x the target's logit and in, out what shadow models with and without the patient gave.

    inside_KP: each patient in at least one shadow and out of at least one.
    A patient's own spread cannot be told from a few shadows: it is pooled over patients (Carlini et al. 2022, section VI-B).
    The target is first moved so that patients on average lie midway between in and out: it was trained on more patients or
    with noise, and is more or less sure of everybody. That uses nobody's membership.
    """
    mean, spread = {}, {}
    for name, rows_KP in (("in", inside_KP), ("out", ~inside_KP)):
        count_P = rows_KP.sum(0)
        mean[name] = np.where(rows_KP, shadow_KP, 0.0).sum(0) / count_P
        apart_KP = np.where(rows_KP, shadow_KP - mean[name], 0.0)
        free = max(1, int(((count_P - 1) * ~np.isnan(logit_P)).sum()))
        spread[name] = max(np.sqrt(np.nansum(apart_KP**2) / free), 1e-6)
    known_P = ~np.isnan(logit_P)
    if not known_P.any():
        return logit_P
    moved_P = logit_P - np.mean((logit_P - (mean["in"] + mean["out"]) / 2)[known_P])
    fit = {name: ((moved_P - mean[name]) / spread[name]) ** 2 / 2 + np.log(spread[name]) for name in mean}
    return np.asarray(fit["out"] - fit["in"])


# --- how well -----------------------------------------------------------------------------------------------------------


def judged(score_P: Floats, member_P: Flags) -> dict[str, Any]:
    """{"members", "non_members", "auc", "tpr"} of a score that is higher for members; NaN: the patient is left out.

    auc: chance is 0.5; interval by bootstrap over patients.  tpr: by false positive rate, `true_positives`.
    Both intervals are for other patients of the same kind, with this target and these shadow models.
    """
    known_P = ~np.isnan(score_P)
    score_P, member_P = score_P[known_P], member_P[known_P]
    yes, no = int(member_P.sum()), int((~member_P).sum())
    auc: Score = {"value": None, "low": None, "high": None, "reason": f"fewer than {FEWEST} patients of a side"}
    if min(yes, no) >= FEWEST:
        auc = _area(score_P, member_P)
    return {
        "members": yes,
        "non_members": no,
        "auc": auc,
        "tpr": {f"{rate:g}": true_positives(score_P[member_P], score_P[~member_P], rate=rate) for rate in ALARMS},
    }


def _area(score_P: Floats, member_P: Flags) -> Score:
    rng, weights = stream(SEED, "membership bootstrap"), np.ones((DRAWS + 1, len(member_P)))
    for side_P in (member_P, ~member_P):
        count = int(side_P.sum())
        weights[1:, side_P] = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS)
    area_D = areas(View(score_P[:, None], member_P[:, None].astype(np.float64)), weights)[:, 0]
    low, high = np.quantile(area_D[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(area_D[0]), "low": float(low), "high": float(high)}


def true_positives(member_N: Floats, other_N: Floats, *, rate: float) -> Score:
    """Share of members above the lowest threshold that at most `rate` of the non-members pass, with a Clopper-Pearson interval.

    The threshold is taken from the same non-members; what that adds to the uncertainty is not in the interval. value None,
    with a reason: there are fewer than 1 / rate non-members, and no threshold can be said to have this rate.
    """
    least = int(np.ceil(round(1 / rate, 6)))
    if len(other_N) < least or not len(member_N):
        why = f"{rate:.1%} of {len(other_N)} non-members is less than one: it takes {least}"
        return {"value": None, "low": None, "high": None, "reason": why if len(other_N) < least else "no members"}
    allowed = int(np.floor(rate * len(other_N) + 1e-9))
    threshold = np.sort(other_N)[::-1][allowed] if allowed < len(other_N) else -np.inf
    hits = int((member_N > threshold).sum())
    low, high = clopper_pearson(hits, len(member_N))
    return {"value": hits / len(member_N), "low": low, "high": high}


def clopper_pearson(hits: int, tries: int) -> tuple[float, float]:
    """95 % interval of a share; never too short. tries: > 0. Source: Clopper and Pearson 1934."""
    tail = (1 - LEVEL) / 2
    low = float(beta.ppf(tail, hits, tries - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, tries - hits)) if hits < tries else 1.0
    return low, high


def strongest(found: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The entry with the highest AUC that is known: what a reader wants to see first."""
    known: Sequence[Mapping[str, Any]] = [entry for entry in found if entry["auc"]["value"] is not None]
    return max(known, key=lambda entry: entry["auc"]["value"], default=None)
