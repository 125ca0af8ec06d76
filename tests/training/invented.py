"""A hospital in memory, of random patients, for tests of attacks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedmm.data.dataset import HospitalData
from fedmm.schema import MODALITIES, InputSpec
from tests import tiny


def hospital(
    studies_P: Sequence[int], *, train: int, seed: int = 0, seen: float = 1.0, inputs: InputSpec = tiny.INPUTS
) -> HospitalData:
    """studies_P[i] studies of patient i; the first `train` patients are the train split. Labels are random and all known.

    Nothing links a study to its labels, so a model that is right about one has seen it. Images are smooth.
    """
    batch, rng = tiny.batch(studies_P, seed=seed, inputs=inputs), np.random.default_rng([seed, 3])
    count, patients = batch.studies, len(studies_P)
    size = inputs.image_size
    coarse = torch.from_numpy(rng.standard_normal((count, 1, 4, 4)).astype(np.float32))
    image = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    image = (image - image.mean((2, 3), keepdim=True)) / image.std((2, 3), keepdim=True, correction=0)
    return HospitalData(
        name="invented",
        labels=tiny.LABELS,
        spec=inputs,
        inputs={**batch.inputs, "image": image},
        seen_SM=torch.from_numpy(rng.random((count, len(MODALITIES))) < seen),
        finding_SF=torch.from_numpy(rng.integers(0, 2, (count, 2)).astype(np.float32)),
        class_S=torch.from_numpy(rng.integers(0, 3, count)),
        patient_S=batch.patient_B,
        train_S=batch.patient_B < train,
        further_SK=torch.zeros(count, 0),
        day_S=batch.day_B,
        group_S={},
        key_P=tuple(range(patients)),
    )
