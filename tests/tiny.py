"""Small models and batches that many tests share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedmm.config import ModelConfig
from fedmm.models.multimodal import ModelSpec
from fedmm.schema import MODALITIES, MODALITY, Batch, InputSpec, Labels

INPUTS = InputSpec(image_size=16, report_tokens=8, report_buckets=64, audio_mels=8, audio_seconds=0.4)
LABELS = Labels(findings=("effusion", "icu"), class_name="severity", class_values=("none", "mild", "severe"))


FURTHER = Labels(
    ordinal_name="stage", ordinal_levels=("I", "II", "III", "IV"), value_name="risk", value_range=(10.0, 30.0),
    time_name="time", event_name="event", time_edges=(30.0, 90.0, 365.0),
)  # fmt: skip
EVERY = Labels(**{**LABELS.model_dump(), **FURTHER.model_dump(exclude_defaults=True)})  # every kind of labels


ALIGNABLE = {"aligned": {"report": "gru", "audio": "recurrent"}}  # encoders that a fusion needs beside the default ones


def spec(fusion: str = "concat", labels: Labels = LABELS, inputs: InputSpec = INPUTS) -> ModelSpec:
    return ModelSpec(inputs=inputs, model=leaves(fusion=fusion), labels=labels)


def leaves(width: int = 4, **given: str) -> ModelConfig:
    """A config of these leaves, with encoders that the fusion can use."""
    return ModelConfig(width=width, **{**ALIGNABLE.get(given.get("fusion", ""), {}), **given})


def days(count: int, seed: int) -> np.ndarray:
    """Days of studies in no order: the same twice, years apart, unknown. A stream of their own."""
    return np.random.default_rng([seed, 1]).choice(np.array([0, 1, 1, 40, 700, np.nan], dtype=np.float32), count)


def further(count: int, seed: int, labels: Labels) -> np.ndarray:
    """(count, K) levels, values in and out of their range, times within and beyond the edges, missing ones. A stream of
    their own."""
    rng = np.random.default_rng([seed, 2])
    low, high = labels.value_range
    drawn = {
        labels.ordinal_name: rng.integers(0, max(len(labels.ordinal_levels), 1), count),
        labels.value_name: rng.uniform(low - 0.2 * (high - low), high + 0.2 * (high - low), count),
        labels.time_name: rng.uniform(0, 1.3, count) * max(labels.time_edges, default=1),
        labels.event_name: rng.integers(0, 2, count),
    }
    table_BK = np.zeros((count, len(labels.further)), dtype=np.float32)
    for k, name in enumerate(labels.further):
        table_BK[:, k] = drawn[name]
    table_BK[rng.random(table_BK.shape) < 0.3] = np.nan
    return table_BK


def batch(studies_P: Sequence[int], *, seed: int = 0, labels: Labels = LABELS, inputs: InputSpec = INPUTS) -> Batch:
    """Random studies, studies_P[i] of patient i, with missing modalities (also all) and missing labels (also all)."""
    rng = np.random.default_rng(seed)
    count = sum(studies_P)
    seen_BM = rng.random((count, len(MODALITIES))) < 0.6
    values = {
        name: torch.from_numpy(
            rng.integers(0, inputs.report_buckets, (count, *shape))
            if MODALITY[name].whole
            else rng.standard_normal((count, *shape)).astype(np.float32)
        )
        for name, shape in inputs.shapes.items()
    }
    finding_BF = rng.integers(0, 2, (count, len(labels.findings))).astype(np.float32)
    finding_BF[rng.random(finding_BF.shape) < 0.3] = np.nan
    classes = max(len(labels.class_values), 1)
    class_B = rng.integers(-1, classes, count) if labels.class_name else np.full(count, -1)
    return Batch(
        inputs=values,
        seen_BM=torch.from_numpy(seen_BM),
        finding_BF=torch.from_numpy(finding_BF),
        class_B=torch.from_numpy(class_B),
        patient_B=torch.repeat_interleave(
            torch.arange(len(studies_P)), torch.tensor(list(studies_P), dtype=torch.int64)
        ),
        patients=len(studies_P),
        further_BK=torch.from_numpy(further(count, seed, labels)),
        day_B=torch.from_numpy(days(count, seed)),
        key_B=torch.repeat_interleave(torch.arange(len(studies_P)), torch.tensor(list(studies_P), dtype=torch.int64)),
    )


def pick(whole: Batch, patients: Sequence[int]) -> Batch:
    """The studies of some patients, renumbered."""
    rows = torch.cat(
        [(whole.patient_B == p).nonzero().flatten() for p in patients] or [torch.zeros(0, dtype=torch.int64)]
    )
    number = {p: i for i, p in enumerate(patients)}
    renumbered = torch.tensor([number[int(p)] for p in whole.patient_B[rows]], dtype=torch.int64)
    return Batch(
        inputs={name: value[rows] for name, value in whole.inputs.items()},
        seen_BM=whole.seen_BM[rows],
        finding_BF=whole.finding_BF[rows],
        class_B=whole.class_B[rows],
        patient_B=renumbered,
        patients=len(patients),
        further_BK=whole.further_BK[rows],
        day_B=whole.day_B[rows],
        key_B=whole.key_B[rows],
    )
