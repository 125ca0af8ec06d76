"""Scores of a model on a cohort: one dictionary, the same for `fedmm evaluate`, the run folder and the report.

numpy and scipy instead of torchmetrics: its import takes longer (2.4 s, measured) than all evaluations of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from fedmm.schema import MODALITIES, Labels

# B studies, F findings, C classes, O = F + C outputs, M modalities

Floats = NDArray[np.float64]
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Predictions:
    """What a model said about a cohort, with the truth. Stays inside the hospital.

    probability_BO; finding_BF (NaN missing); class_B (-1 missing); seen_BM; alone and without: probability_BO of the same
    studies with one modality only, and with that modality removed.  patient_B: 0 … patients-1, whose study it is.
    """

    probability_BO: Floats
    finding_BF: Floats
    class_B: NDArray[np.int64]
    seen_BM: NDArray[np.bool_]
    alone: Mapping[str, Floats]
    without: Mapping[str, Floats]
    patient_B: NDArray[np.int64]
    patients: int


def join(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of several hospitals, one after the other; for a person who may see them all."""
    first = np.cumsum([0, *(p.patients for p in parts)])
    return Predictions(
        probability_BO=np.concatenate([p.probability_BO for p in parts]),
        finding_BF=np.concatenate([p.finding_BF for p in parts]),
        class_B=np.concatenate([p.class_B for p in parts]),
        seen_BM=np.concatenate([p.seen_BM for p in parts]),
        alone={m: np.concatenate([p.alone[m] for p in parts]) for m in parts[0].alone},
        without={m: np.concatenate([p.without[m] for p in parts]) for m in parts[0].without},
        patient_B=np.concatenate([p.patient_B + shift for p, shift in zip(parts, first, strict=False)]),
        patients=sum(p.patients for p in parts),
    )


def auroc(score_B: Floats, truth_B: NDArray[np.bool_]) -> float | None:
    """Probability that a positive study scores higher than a negative one, ties half. None with one class only.

    Source: Mann and Whitney 1947; equal to the area under the ROC curve.
    """
    positive, negative = int(truth_B.sum()), int((~truth_B).sum())
    if positive == 0 or negative == 0:
        return None
    rank_sum = float(rankdata(score_B)[truth_B].sum())
    return (rank_sum - positive * (positive + 1) / 2) / (positive * negative)


def score(predictions: Predictions, labels: Labels) -> dict[str, Any]:
    """The dictionary of `fedmm evaluate --format json`. A number that is not defined (one class only) is None.

    accuracy and f1_macro: of the class where there is one, else over all findings at 0.5. majority: accuracy of always
    answering the most frequent value here. mean_auroc: over the outputs that have one.
    """
    p = predictions
    result: dict[str, Any] = {"studies": len(p.probability_BO), "patients": p.patients}
    result.update(_summary(p.probability_BO, p, labels, np.ones(len(p.probability_BO), dtype=bool)))
    result["majority"] = _majority(p, labels)
    result["by_modality"] = {
        name: {
            "studies": int(p.seen_BM[:, m].sum()),
            "only": _summary(p.alone[name], p, labels, p.seen_BM[:, m]),
            "without": _summary(p.without[name], p, labels, np.ones(len(p.class_B), dtype=bool)),
        }
        for m, name in enumerate(MODALITIES)
    }
    result["confusion"] = _confusion(p, labels)
    result["calibration"] = _calibration(p, labels)
    return result


def _summary(probability_BO: Floats, p: Predictions, labels: Labels, rows: NDArray[np.bool_]) -> dict[str, Any]:
    """Accuracy, F1 and AUROC of the given rows."""
    probability_BO, finding_BF, class_B = probability_BO[rows], p.finding_BF[rows], p.class_B[rows]
    findings = len(labels.findings)
    areas: dict[str, float | None] = {}
    hits, f1 = [], []
    for f, name in enumerate(labels.findings):
        known = ~np.isnan(finding_BF[:, f])
        truth, guess = finding_BF[known, f] > 0.5, probability_BO[known, f]
        areas[name] = auroc(guess, truth)
        hits.append((guess > 0.5) == truth)
        f1.append(_f1(guess > 0.5, truth))
    if labels.class_name:
        known = class_B >= 0
        truth_C, guess_BC = class_B[known], probability_BO[known, findings:]
        best = guess_BC.argmax(1) if len(guess_BC) else np.zeros(0, dtype=np.int64)
        for c, value in enumerate(labels.class_values):
            areas[f"{labels.class_name}={value}"] = auroc(guess_BC[:, c], truth_C == c)
        hits = [best == truth_C]
        f1 = [_f1(best == c, truth_C == c) for c in range(len(labels.class_values))]
    every_hit = np.concatenate(hits) if hits else np.zeros(0)
    defined = [area for area in areas.values() if area is not None]
    scores = [value for value in f1 if value is not None]
    return {
        "accuracy": float(every_hit.mean()) if every_hit.size else None,
        "f1_macro": float(np.mean(scores)) if scores else None,
        "auroc": areas,
        "mean_auroc": float(np.mean(defined)) if defined else None,
    }


def _f1(guess: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float | None:
    """F1, None where the value appears neither in the truth nor among the guesses."""
    total = int(guess.sum() + truth.sum())
    return 2 * int((guess & truth).sum()) / total if total else None


def _majority(p: Predictions, labels: Labels) -> float | None:
    if labels.class_name:
        known = p.class_B[p.class_B >= 0]
        return float(np.bincount(known).max() / len(known)) if len(known) else None
    known_BF = ~np.isnan(p.finding_BF)
    if not known_BF.any():
        return None
    right = sum(
        max((c := p.finding_BF[known_BF[:, f], f]).sum(), len(c) - c.sum()) for f in range(len(labels.findings))
    )
    return float(right / known_BF.sum())


def _confusion(p: Predictions, labels: Labels) -> dict[str, Any]:
    """Counts, rows are the truth: of the class and of each finding at 0.5."""
    tables: dict[str, Any] = {}
    findings = len(labels.findings)
    if labels.class_name:
        known = p.class_B >= 0
        tables[labels.class_name] = _table(
            p.class_B[known], p.probability_BO[known, findings:].argmax(1), list(labels.class_values)
        )
    for f, name in enumerate(labels.findings):
        known = ~np.isnan(p.finding_BF[:, f])
        tables[name] = _table(
            p.finding_BF[known, f].astype(np.int64), (p.probability_BO[known, f] > 0.5).astype(np.int64), ["no", "yes"]
        )
    return tables


def _table(truth: NDArray[np.int64], guess: NDArray[np.int64], names: list[str]) -> dict[str, Any]:
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (truth, guess), 1)
    return {"values": names, "counts": counts.tolist()}


def _calibration(p: Predictions, labels: Labels) -> dict[str, Any]:
    """Reliability of all outputs together: for each bin of predicted probability its mean, observed rate and count."""
    truth_BO = p.finding_BF
    if labels.class_name:
        one_hot = np.eye(len(labels.class_values))[p.class_B.clip(min=0)]
        one_hot[p.class_B < 0] = np.nan
        truth_BO = np.concatenate([p.finding_BF, one_hot], axis=1)
    known = ~np.isnan(truth_BO)
    guess, truth = p.probability_BO[known], truth_BO[known]
    index = (guess * CALIBRATION_BINS).astype(np.int64).clip(max=CALIBRATION_BINS - 1)
    count = np.bincount(index, minlength=CALIBRATION_BINS)
    predicted = np.bincount(index, guess, CALIBRATION_BINS) / count.clip(min=1)
    observed = np.bincount(index, truth, CALIBRATION_BINS) / count.clip(min=1)
    error = float((np.abs(predicted - observed) * count).sum() / count.sum()) if count.sum() else None
    return {
        "predicted": predicted.tolist(),
        "observed": observed.tolist(),
        "count": count.tolist(),
        "expected_calibration_error": error,
    }
