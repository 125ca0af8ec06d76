"""Fusion: (B, M, D) embeddings and (B, M) presence -> (B, D). Any subset of modalities, also none.

Most fusions give the head one vector. A fusion that trains more than its answer gives `Fused` instead (fusion_decision.py).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmm.registry import Registry
from fedmm.schema import MODALITIES

# B studies, M modalities, D width, V views


@dataclass(frozen=True)
class Fused:
    """Several views of a study; the model has a head for each, and its answer is their weighted sum of logits.

    z_BVD: what each head sees.  weight_BV: of each view's logits in the answer.  trained_BV: bool, which views are trained
    on the labels by themselves as well (the answer always is).  penalty_B: added to the study's loss.
    Each row depends on that study alone.
    """

    z_BVD: Tensor
    weight_BV: Tensor
    trained_BV: Tensor
    penalty_B: Tensor


class Fusion(nn.Module, abc.ABC):
    """Joins modalities. Guarantee: what stands in an absent slot changes nothing (the caller has put zeros there)."""

    views = 1  # V, heads that the model builds; with more than one, `forward` gives `Fused`
    over_time = (
        False  # whether `forward` takes a third argument, the `Timeline`: a study may look at the same patient's
    )
    sequences: tuple[str, ...] = ()  # modalities whose `Sequence`, by name, is the third argument (fusion_time.py)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @abc.abstractmethod
    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor | Fused:
        """(B, D), or `Fused`."""


fusions: Registry[type[Fusion]] = Registry("fusion")


def flat_with_flags(z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
    """(..., M (D + 1)) all embeddings side by side, then who is there."""
    return torch.cat([z_BMD.flatten(-2), seen_BM.to(z_BMD.dtype)], dim=-1)


def mean_of_seen(z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
    """(B, D); nothing seen: 0."""
    flag_BM1 = seen_BM.unsqueeze(-1).to(z_BMD.dtype)
    return (z_BMD * flag_BM1).sum(1) / flag_BM1.sum(1).clamp(min=1)


@fusions.register("concat")
class Concat(Fusion):
    """All embeddings side by side with the presence flags, one layer: it can learn what a missing modality means."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.join = nn.Linear(len(MODALITIES) * (width + 1), width)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
        out: Tensor = self.join(flat_with_flags(z_BMD, seen_BM)).relu()
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
