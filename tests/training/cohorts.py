"""Made-up predictions that tests of scores share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedmm.schema import MODALITIES, SUBSETS, Labels
from fedmm.training.metrics import WHOLE, Predictions

LABELS = Labels(findings=("a", "b"), class_name="c", class_values=("x", "y", "z"))


def predictions(studies_P: Sequence[int], *, seed: int = 0, labels: Labels = LABELS, skill: float = 0) -> Predictions:
    """studies_P[i] random studies of patient i, labels and modalities missing; probabilities that know `skill` of the truth."""
    rng = np.random.default_rng(seed)
    count, classes = sum(studies_P), len(labels.class_values)
    finding_BF = rng.integers(0, 2, (count, len(labels.findings))).astype(float)
    class_B = rng.integers(0, classes, count) if classes else np.full(count, -1)
    truth_BO = np.concatenate([finding_BF, np.eye(classes)[class_B] if classes else np.zeros((count, 0))], axis=1)
    finding_BF[rng.random(finding_BF.shape) < 0.3] = np.nan
    class_B[rng.random(count) < 0.2] = -1

    def said() -> np.ndarray:
        return skill * truth_BO + (1 - skill) * rng.random(truth_BO.shape)

    whole_BO = said()
    return Predictions(
        probability_BO=whole_BO,
        finding_BF=finding_BF,
        class_B=class_B,
        further_BK=np.full((count, len(labels.further)), np.nan),
        seen_BM=rng.random((count, len(MODALITIES))) < 0.7,
        subset={name: whole_BO if name == WHOLE else said() for name in SUBSETS},
        patient_B=np.repeat(np.arange(len(studies_P)), studies_P),
        patients=len(studies_P),
    )


def only(p: Predictions, rows_B: np.ndarray) -> Predictions:
    """The same, had the other studies never been; patients are numbered anew."""
    kept, patient_B = np.unique(p.patient_B[rows_B], return_inverse=True)
    return replace(
        p,
        probability_BO=p.probability_BO[rows_B],
        finding_BF=p.finding_BF[rows_B],
        class_B=p.class_B[rows_B],
        further_BK=p.further_BK[rows_B],
        seen_BM=p.seen_BM[rows_B],
        subset={name: made_BO[rows_B] for name, made_BO in p.subset.items()},
        patient_B=patient_B,
        patients=len(kept),
        groups={kind: tuple(np.array(value_B)[rows_B]) for kind, value_B in p.groups.items()},
    )
