"""Fusion: (B, M, D) embeddings and (B, M) presence -> (B, D). Any subset of modalities, also none."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from fedmm.registry import Registry
from fedmm.schema import MODALITIES

# B studies, M modalities, D width


class Fusion(nn.Module, abc.ABC):
    """Joins modalities. Guarantee: what stands in an absent slot changes nothing (the caller has put zeros there)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @abc.abstractmethod
    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor: ...


fusions: Registry[type[Fusion]] = Registry("fusion")


@fusions.register("concat")
class Concat(Fusion):
    """All embeddings side by side with the presence flags, one layer: it can learn what a missing modality means."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.join = nn.Linear(len(MODALITIES) * (width + 1), width)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
        out: Tensor = self.join(torch.cat([z_BMD.flatten(1), seen_BM.to(z_BMD.dtype)], dim=1)).relu()
        return out


@fusions.register("weighted")
class Weighted(Fusion):
    """Weighted mean of the present embeddings; the weight is learnt from the embedding itself."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.score = nn.Linear(width, 1)
        self.join = nn.Linear(width, width)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
        score_BM = self.score(z_BMD).squeeze(-1).masked_fill(~seen_BM, torch.finfo(z_BMD.dtype).min)
        weight_BM = score_BM.softmax(-1) * seen_BM  # nothing seen: weight 0, not NaN
        out: Tensor = self.join((weight_BM.unsqueeze(-1) * z_BMD).sum(1)).relu()
        return out
