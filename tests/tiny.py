"""Small models and batches that many tests share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedmm.config import ModelConfig
from fedmm.models.multimodal import ModelSpec
from fedmm.schema import Batch, InputSpec, Labels

INPUTS = InputSpec(image_size=16, report_tokens=8, report_buckets=64, audio_mels=8, audio_seconds=0.4)
LABELS = Labels(findings=("effusion", "icu"), class_name="severity", class_values=("none", "mild", "severe"))


def spec(fusion: str = "concat", labels: Labels = LABELS, inputs: InputSpec = INPUTS) -> ModelSpec:
    return ModelSpec(inputs=inputs, model=ModelConfig(width=4, fusion=fusion), labels=labels)


def batch(studies_P: Sequence[int], *, seed: int = 0, labels: Labels = LABELS, inputs: InputSpec = INPUTS) -> Batch:
    """Random studies, studies_P[i] of patient i, with missing modalities (also all) and missing labels (also all)."""
    rng = np.random.default_rng(seed)
    count = sum(studies_P)
    seen_BM = rng.random((count, 3)) < 0.6
    image, report, audio = (inputs.shapes[name] for name in ("image", "report", "audio"))
    values = {
        "image": torch.from_numpy(rng.standard_normal((count, *image)).astype(np.float32)),
        "report": torch.from_numpy(rng.integers(0, inputs.report_buckets, (count, *report))),
        "audio": torch.from_numpy(rng.standard_normal((count, *audio)).astype(np.float32)),
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
        further_BK=torch.full((count, len(labels.further)), torch.nan),
        day_B=torch.full((count,), torch.nan),
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
    )
