"""A linear model on all patients in one place, without privacy: what the federated models are compared with.

Logistic regression on the same data-independent features (HOG, hashed n-grams, MFCC statistics) with presence flags. Its L2
penalty is chosen by leaving out fifths of the training patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedmm.config import ModelConfig
from fedmm.data.dataset import load_hospital
from fedmm.models.multimodal import ModelSpec
from fedmm.schema import MODALITIES, Batch, InputSpec, Labels, fixed
from fedmm.training.loop import Workbench

# N studies, X features, M modalities

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
FOLDS = 5


def batches(hospitals: Sequence[Path], labels: Labels) -> tuple[list[Batch], list[Batch]]:
    """Training and held-back studies of each hospital, with fixed features of images and recordings."""
    spec = ModelSpec(inputs=InputSpec(), model=ModelConfig(image="hog", audio="mfcc"), labels=labels)
    parts = Workbench(spec, torch.device("cpu")).fixed_parts()
    data = [load_hospital(hospital, spec.inputs, parts=parts) for hospital in hospitals]
    cut = [[d.cohort(split).batch(range(d.cohort(split).patients)) for d in data] for split in ("train", "test")]
    return cut[0], cut[1]


def features(batch: Batch, names: Sequence[str] = MODALITIES) -> Tensor:
    """(N, X) features of these modalities, zeros where absent, and who is there."""
    columns = []
    for m, name in enumerate(MODALITIES):
        if name in names:
            seen_N1 = batch.seen_BM[:, m : m + 1].float()
            value = _words(batch.inputs[name]) if name == "report" else batch.inputs[fixed(name)].flatten(1)
            columns += [value * seen_N1, seen_N1]
    return torch.cat(columns, dim=1)


def _words(report_NT: Tensor) -> Tensor:
    """(N, buckets) share of each hashed token, of length 1."""
    counts = torch.zeros(len(report_NT), InputSpec().report_buckets)
    counts.scatter_add_(1, report_NT, (report_NT > 0).float())
    return nn.functional.normalize(counts, dim=1)


def fit(x_NX: Tensor, class_N: Tensor, patient_N: Tensor, classes: int) -> nn.Module:
    """Softmax regression; its penalty is the one with the best accuracy on left-out training patients."""
    fold_N = torch.from_numpy(np.random.default_rng(0).permutation(int(patient_N.max()) + 1) % FOLDS)[patient_N]

    def left_out(penalty: float) -> float:
        hits = 0.0
        for fold in range(FOLDS):
            train_N = fold_N != fold
            model = _fit(x_NX[train_N], class_N[train_N], classes, penalty)
            with torch.no_grad():
                hits += float((model(x_NX[~train_N]).argmax(1) == class_N[~train_N]).sum())
        return hits

    return _fit(x_NX, class_N, classes, max(PENALTIES, key=left_out))


def _fit(x_NX: Tensor, class_N: Tensor, classes: int, penalty: float) -> nn.Module:
    mean_X, spread = x_NX.mean(0), x_NX.std() + 1e-6
    layer = nn.Linear(x_NX.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    scaled_NX = (x_NX - mean_X) / spread

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(scaled_NX), class_N) + penalty * layer.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():  # the scaling becomes part of the layer
        layer.weight /= spread
        layer.bias.copy_(layer.bias - layer.weight @ mean_X)
    return layer
