"""Scores of a model on a cohort: one dictionary, the same for `fedmm evaluate`, the run folder and the report.

numpy and scipy instead of torchmetrics: its import takes longer (2.4 s, measured) than all evaluations of a run.
What `score` gives may leave a hospital under a research policy. What only its own people see is added in home.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmm.schema import MODALITIES, SUBSETS, Labels
from fedmm.training.rates import Flags, Floats, mean, rates, reliability

# B studies, F findings, C classes, O outputs (the first F + C are findings and classes), M modalities, K further labels

ONE_ANSWER = 0.98  # share of studies with the same answer that is "everybody": guess
MIXED = 0.05  # by how much less often the most frequent truth must occur for that to be wrong: guess
FLAT = 0.01  # probabilities of 98 % of all studies within so little do not tell them apart: guess
FEWEST = 10  # studies or patients below which nothing is said: guess
WHOLE = "+".join(MODALITIES)  # the subset that hides nothing


@dataclass(frozen=True)
class Predictions:
    """What a model said about a cohort, with the truth. Stays inside the hospital.

    probability_BO; finding_BF (NaN missing); class_B (-1 missing); further_BK (as in Batch); seen_BM.
    subset: by name in SUBSETS, probability_BO of the same studies given only what they have of these modalities; {} if
    not asked.  patient_B: 0 … patients-1, whose study it is.  groups: "sex", "hospital" and so on to a value for each
    study, "" where it is not known.
    """

    probability_BO: Floats
    finding_BF: Floats
    class_B: NDArray[np.int64]
    further_BK: Floats
    seen_BM: Flags
    subset: Mapping[str, Floats]
    patient_B: NDArray[np.int64]
    patients: int
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def having(self, subset: str) -> Flags:
        """(B,) which studies have all of its modalities."""
        return np.asarray(self.seen_BM[:, [MODALITIES.index(name) for name in SUBSETS[subset]]].all(1))

    def patients_of(self, rows_B: Flags) -> int:
        """How many patients these studies are of."""
        return len(np.unique(self.patient_B[rows_B]))


def join(parts: Sequence[Predictions], names: Sequence[str] = ()) -> Predictions:
    """Predictions of several hospitals, one after the other; for a person who may see them all.

    names: of the hospitals, who become the group "hospital" if there are several.
    """
    first = np.cumsum([0, *(p.patients for p in parts)])
    kinds = dict.fromkeys(kind for p in parts for kind in p.groups)
    groups = {kind: sum((p.groups.get(kind, ("",) * len(p.class_B)) for p in parts), ()) for kind in kinds}
    if len(names) > 1:
        groups["hospital"] = sum(((name,) * len(p.class_B) for name, p in zip(names, parts, strict=True)), ())
    return Predictions(
        probability_BO=np.concatenate([p.probability_BO for p in parts]),
        finding_BF=np.concatenate([p.finding_BF for p in parts]),
        class_B=np.concatenate([p.class_B for p in parts]),
        further_BK=np.concatenate([p.further_BK for p in parts]),
        seen_BM=np.concatenate([p.seen_BM for p in parts]),
        subset={name: np.concatenate([p.subset[name] for p in parts]) for name in parts[0].subset},
        patient_B=np.concatenate([p.patient_B + shift for p, shift in zip(parts, first, strict=False)]),
        patients=sum(p.patients for p in parts),
        groups=groups,
    )


def score(predictions: Predictions, labels: Labels) -> dict[str, Any]:
    """The dictionary of `fedmm evaluate --format json`, but for intervals and groups. Not defined (one class only): None.

    accuracy, balanced_accuracy, sensitivity, specificity and f1_macro: of the class where there is one (the most probable
    value), else over all findings at 0.5; all but accuracy are means over the values or findings.  majority: accuracy of
    always answering the most frequent value here.  mean_auroc, mean_auprc, brier: over the outputs that have one.
    by_modality.only and by_subset: of the studies that have these modalities, given nothing else.
    """
    p = predictions
    every_B = np.ones(len(p.class_B), dtype=bool)
    result: dict[str, Any] = {"studies": len(p.class_B), "patients": p.patients}
    result.update(summary(p, labels, p.probability_BO, every_B))
    result["outputs"] = by_output(p, labels, p.probability_BO, every_B)
    result["majority"] = _majority(p, labels)
    subsets = {name: (p.having(name), probability_BO) for name, probability_BO in p.subset.items()}
    result["by_subset"] = {
        name: {"studies": int(rows_B.sum()), "patients": p.patients_of(rows_B), **summary(p, labels, made_BO, rows_B)}
        for name, (rows_B, made_BO) in subsets.items()
    }
    result["by_modality"] = {
        name: {
            "studies": result["by_subset"][name]["studies"],
            "only": {k: v for k, v in result["by_subset"][name].items() if k not in ("studies", "patients")},
            **({"without": summary(p, labels, p.subset[rest], every_B)} if (rest := _but(name)) else {}),
        }
        for name in MODALITIES
        if name in p.subset
    }
    result["confusion"] = _confusion(p, labels)
    result["calibration"] = _calibration(p, labels)
    result["ece"] = result["calibration"]["expected_calibration_error"]
    result["collapsed"] = _collapsed(p, labels)
    if labels.further:
        from fedmm.training.outcomes import score_further

        result["further"] = score_further(p.probability_BO, p.further_BK, labels)
    return result


def truth(p: Predictions, labels: Labels) -> Floats:
    """(B, F + C) 0 or 1, NaN where it is missing; a class one against the rest."""
    if not labels.class_name:
        return p.finding_BF
    class_BC = np.eye(len(labels.class_values))[p.class_B.clip(min=0)]
    class_BC[p.class_B < 0] = np.nan
    return np.concatenate([p.finding_BF, class_BC], axis=1)


def said(probability_BO: Floats, labels: Labels) -> Flags:
    """(B, F + C) the answers: each finding at 0.5, of the class the most probable value alone."""
    findings, classes = len(labels.findings), len(labels.class_values)
    said_BO: Flags = probability_BO[:, : findings + classes] > 0.5
    if classes:
        best_B = probability_BO[:, findings : findings + classes].argmax(1)
        said_BO[:, findings:] = best_B[:, None] == np.arange(classes)
    return said_BO


def right(probability_BO: Floats, truth_BO: Floats, labels: Labels) -> tuple[Floats, Floats]:
    """(B,) right answers and (B,) known ones of each study: of the class where there is one, else of the findings."""
    said_BO, known_BO = said(probability_BO, labels), ~np.isnan(truth_BO)
    if labels.class_name:
        findings = len(labels.findings)
        hit_B = (said_BO & (truth_BO > 0.5))[:, findings:].any(1)
        return np.asarray(hit_B, dtype=np.float64), known_BO[:, findings].astype(np.float64)
    hit_BF = (said_BO == (truth_BO > 0.5)) & known_BO
    return np.asarray(hit_BF.sum(1), dtype=np.float64), np.asarray(known_BO.sum(1), dtype=np.float64)


def by_output(p: Predictions, labels: Labels, probability_BO: Floats, rows_B: Flags) -> dict[str, dict[str, Any]]:
    """`rates` of each finding and of each class one against the rest, over the given rows where the truth is known."""
    truth_BO, said_BO = truth(p, labels), said(probability_BO, labels)
    found = {}
    for o, name in enumerate(labels.outputs[: truth_BO.shape[1]]):
        known_B = rows_B & ~np.isnan(truth_BO[:, o])
        found[name] = rates(probability_BO[known_B, o], said_BO[known_B, o], truth_BO[known_B, o] > 0.5)
    return found


def summary(p: Predictions, labels: Labels, probability_BO: Floats, rows_B: Flags) -> dict[str, Any]:
    """The whole in a few numbers, over the given rows: see `score`."""
    outputs = by_output(p, labels, probability_BO, rows_B)
    asked = list(outputs.values())[len(labels.findings) if labels.class_name else 0 :]
    hit_B, known_B = right(probability_BO[rows_B], truth(p, labels)[rows_B], labels)
    areas = {name: output["auroc"] for name, output in outputs.items()}
    balanced = "sensitivity" if labels.class_name else "balanced_accuracy"  # of a class: its mean recall
    return {
        "accuracy": float(hit_B.sum() / known_B.sum()) if known_B.sum() else None,
        "balanced_accuracy": mean(output[balanced] for output in asked),
        "sensitivity": mean(output["sensitivity"] for output in asked),
        "specificity": mean(output["specificity"] for output in asked),
        "f1_macro": mean(output["f1"] for output in asked),
        "auroc": areas,
        "mean_auroc": mean(areas.values()),
        "mean_auprc": mean(output["auprc"] for output in outputs.values()),
        "brier": mean(output["brier"] for output in outputs.values()),
    }


def _but(modality: str) -> str:
    """Name of the subset with all other modalities."""
    return "+".join(name for name in MODALITIES if name != modality)


def _majority(p: Predictions, labels: Labels) -> float | None:
    if labels.class_name:
        known = p.class_B[p.class_B >= 0]
        return float(np.bincount(known).max() / len(known)) if len(known) else None
    known_BF = ~np.isnan(p.finding_BF)
    if not known_BF.any():
        return None
    most = sum(max((c := p.finding_BF[known_BF[:, f], f]).sum(), len(c) - c.sum()) for f in range(len(labels.findings)))
    return float(most / known_BF.sum())


# --- groups of outputs: each finding, the class -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Answers:
    """Of one finding or of the class, where the truth is known. probability_BV: of a finding of "yes" alone."""

    values: tuple[str, ...]
    probability_BV: Floats
    said_B: NDArray[np.int64]
    truth_B: NDArray[np.int64]


def _answers(p: Predictions, labels: Labels) -> dict[str, _Answers]:
    found: dict[str, _Answers] = {}
    findings, classes = len(labels.findings), len(labels.class_values)
    if labels.class_name:
        made_BC = p.probability_BO[p.class_B >= 0, findings : findings + classes]
        found[labels.class_name] = _Answers(labels.class_values, made_BC, made_BC.argmax(1), p.class_B[p.class_B >= 0])
    for f, name in enumerate(labels.findings):
        known_B = ~np.isnan(p.finding_BF[:, f])
        made_B1, truth_B = p.probability_BO[known_B, f : f + 1], p.finding_BF[known_B, f].astype(np.int64)
        found[name] = _Answers(("no", "yes"), made_B1, (made_B1[:, 0] > 0.5).astype(np.int64), truth_B)
    return found


def _confusion(p: Predictions, labels: Labels) -> dict[str, Any]:
    """Counts, rows are the truth: of the class and of each finding at 0.5."""
    tables = {}
    for name, a in _answers(p, labels).items():
        counts = np.zeros((len(a.values), len(a.values)), dtype=np.int64)
        np.add.at(counts, (a.truth_B, a.said_B), 1)
        tables[name] = {"values": list(a.values), "counts": counts.tolist()}
    return tables


def _collapsed(p: Predictions, labels: Labels) -> dict[str, Any]:
    return {name: _one_answer(a) for name, a in _answers(p, labels).items()}


def _one_answer(a: _Answers) -> dict[str, Any]:
    """Whether the model says the same of (nearly) everybody, though the truth differs; None with too few studies.

    Either one answer has all but 2 % of the studies and the most frequent truth clearly fewer, or the probabilities are
    all but equal. share: of the answer; most_frequent: share of the most frequent truth; spread: width of the middle 98 %
    of the probabilities, of the class the widest.
    """
    studies = len(a.truth_B)
    if studies < FEWEST:
        return {"collapsed": None}
    answers, truths = np.bincount(a.said_B), np.bincount(a.truth_B)
    share, most = float(answers.max() / studies), float(truths.max() / studies)
    low_V, high_V = np.quantile(a.probability_BV, [0.01, 0.99], axis=0)
    spread = float((high_V - low_V).max())
    same, flat = share >= ONE_ANSWER and share - most >= MIXED, spread < FLAT and most < 1
    return {
        "collapsed": bool(same or flat),
        "answer": a.values[int(answers.argmax())],
        "share": share,
        "most_frequent": most,
        "spread": spread,
    }


def _calibration(p: Predictions, labels: Labels) -> dict[str, Any]:
    """Reliability of all outputs together."""
    truth_BO = truth(p, labels)
    known_BO = ~np.isnan(truth_BO)
    return reliability(p.probability_BO[:, : truth_BO.shape[1]][known_BO], truth_BO[known_BO])
