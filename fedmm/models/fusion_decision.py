"""Fusions that train more than their answer: at the decision level, one head per modality, multimodal autoencoder.

decision level    expert 0 sees nothing of the study (its head's bias is the base rate), expert m modality m alone;
                  answer = sum of weight_v x logits_v; each expert is trained where its modality is present
mimo              view 0 is the fused answer, view m modality m alone, trained where it is present
autoencoder       one view, and a penalty for what it reconstructs badly
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from fedmm.models.fusion import Fused, Fusion, flat_with_flags, fusions
from fedmm.schema import MODALITIES

# B studies, M modalities, D width, V = 1 + M views

RECONSTRUCTION = 0.1  # weight of the autoencoder's penalty beside the loss of the labels: guess


class Decision(Fusion, abc.ABC):
    """Each modality decides alone, the decisions are joined. An absent expert has weight 0 and is not trained.

    Robust and easy to explain (each expert's share can be shown), blind to what only two modalities together say.
    """

    views = 1 + len(MODALITIES)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Fused:
        z_BVD = torch.cat([torch.zeros_like(z_BMD[:, :1]), z_BMD], dim=1)
        there_BV = torch.cat([torch.ones_like(seen_BM[:, :1]), seen_BM], dim=1)
        weight_BV = self.weights(z_BVD, there_BV) * there_BV
        return Fused(z_BVD, weight_BV, trained_BV=there_BV, penalty_B=z_BMD.new_zeros(len(z_BMD)))

    @abc.abstractmethod
    def weights(self, z_BVD: Tensor, there_BV: Tensor) -> Tensor:
        """(B, V) of each expert's logits. there_BV: bool, expert 0 always is."""


def equal_shares(z_BVD: Tensor, there_BV: Tensor) -> Tensor:
    """(B, V): the same for each present modality; all to the base rate when there is none."""
    seen_BM = there_BV[:, 1:].to(z_BVD.dtype)
    count_B1 = seen_BM.sum(1, keepdim=True)
    return torch.cat([(count_B1 == 0).to(z_BVD.dtype), seen_BM / count_B1.clamp(min=1)], dim=1)


@fusions.register("mean_decision")
class MeanDecision(Decision):
    """Mean of the present experts' logits; nothing to learn beside the experts."""

    def weights(self, z_BVD: Tensor, there_BV: Tensor) -> Tensor:
        return equal_shares(z_BVD, there_BV)


@fusions.register("weighted_decision")
class WeightedDecision(Decision):
    """Weights that sum to 1 by a learnt confidence of each expert in its own embedding; the base rate takes part.

    Source: mixture of experts with one gate per expert (Jacobs et al. 1991), joined in logits.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.kind = nn.Linear(self.views, self.views, bias=False)
        self.score = nn.Linear(width, 1, bias=False)

    def weights(self, z_BVD: Tensor, there_BV: Tensor) -> Tensor:
        score_BV = self.score(z_BVD).squeeze(-1) + self.kind(there_BV.to(z_BVD.dtype))
        out: Tensor = score_BV.masked_fill(~there_BV, torch.finfo(z_BVD.dtype).min).softmax(-1)
        return out


@fusions.register("product_of_experts")
class ProductOfExperts(Decision):
    """p(y) times the product of p(y | m) / p(y) over the present modalities: in logits, base + sum of (expert - base).

    Right where modalities err independently given the label; over-confident where they share their errors.
    Source: Hinton 2002; with absent experts left out, Wu and Goodman 2018.
    """

    def weights(self, z_BVD: Tensor, there_BV: Tensor) -> Tensor:
        seen_BM = there_BV[:, 1:].to(z_BVD.dtype)
        return torch.cat([1 - seen_BM.sum(1, keepdim=True), seen_BM], dim=1)


@fusions.register("stacking")
class Stacking(Decision):
    """A linear model over the experts' logits whose coefficients depend on which modalities are there; starts as the mean.

    The coefficients may be negative or sum to more than 1, so it can undo shared errors and over-confidence.
    Source: Wolpert 1992; Sill et al. 2009 (feature-weighted linear stacking, here with presence as feature).
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.coefficient = nn.Linear(self.views, self.views)
        nn.init.zeros_(self.coefficient.weight)
        nn.init.zeros_(self.coefficient.bias)

    def weights(self, z_BVD: Tensor, there_BV: Tensor) -> Tensor:
        learnt_BV: Tensor = self.coefficient(there_BV.to(z_BVD.dtype))
        return equal_shares(z_BVD, there_BV) + learnt_BV


@fusions.register("mimo")
class Mimo(Fusion):
    """Multiple input, multiple output: a fused answer, and beside it a head per modality that keeps each encoder honest.

    The further heads are trained and not asked: against an easy modality that stops the others from learning.
    Source: Havasi et al. 2021 (one network, several outputs); Wang, Tran, Feiszli 2020 (a loss per modality and a fused one).
    """

    views = 1 + len(MODALITIES)

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.join = nn.Linear(len(MODALITIES) * (width + 1), width)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Fused:
        fused_BD = self.join(flat_with_flags(z_BMD, seen_BM)).relu()
        first_BV = torch.arange(self.views, device=z_BMD.device).expand(len(z_BMD), -1) == 0
        return Fused(
            z_BVD=torch.cat([fused_BD.unsqueeze(1), z_BMD], dim=1),
            weight_BV=first_BV.to(z_BMD.dtype),
            trained_BV=torch.cat([torch.zeros_like(seen_BM[:, :1]), seen_BM], dim=1),
            penalty_B=z_BMD.new_zeros(len(z_BMD)),
        )


@fusions.register("autoencoder")
class Autoencoder(Fusion):
    """Reconstructs the embedding of the absent from the present, then joins all: seen ones as they are, others as imagined.

    Trained by leave-one-out: each present modality is hidden once and reconstructed from the other present ones. Without
    chance, so that a study's penalty is one number, and per study: the mean squared error over its own hidden ones.
    Position 0 of the axis T sees everything, position 1 + m everything but modality m: one call of each layer.
    Source: Ngiam et al. 2011, bimodal deep autoencoder.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.encode = nn.Linear(len(MODALITIES) * (width + 1), 2 * width)
        self.decode = nn.Linear(2 * width, len(MODALITIES) * width)
        self.join = nn.Linear(len(MODALITIES) * (width + 1), width)

    def reconstruct(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
        """(B, 1 + M, M, D): all modalities as imagined from everything, and from everything but one."""
        kept_TM = ~torch.eye(len(MODALITIES) + 1, dtype=torch.bool, device=z_BMD.device)[:, 1:]
        kept_BTM = seen_BM.unsqueeze(1) & kept_TM
        shown_BTMD = torch.where(kept_BTM.unsqueeze(-1), z_BMD.unsqueeze(1), 0.0)
        made: Tensor = self.decode(self.encode(flat_with_flags(shown_BTMD, kept_BTM)).relu())
        return made.reshape(*made.shape[:2], len(MODALITIES), self.width)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Fused:
        made_BTMD = self.reconstruct(z_BMD, seen_BM)
        filled_BMD = torch.where(seen_BM.unsqueeze(-1), z_BMD, made_BTMD[:, 0])
        fused_BD = self.join(flat_with_flags(filled_BMD, seen_BM)).relu()
        hidden_BMD = made_BTMD[:, 1:].diagonal(dim1=1, dim2=2).transpose(1, 2)
        # the target stands still: encoders must not become easy to guess by saying nothing
        error_BM = (hidden_BMD - z_BMD.detach()).square().mean(-1)
        counts_BM = seen_BM & (seen_BM.sum(1, keepdim=True) > 1)  # from nothing, nothing is reconstructed
        error_B = (error_BM * counts_BM).sum(1) / counts_BM.sum(1).clamp(min=1)
        ones_B1 = torch.ones_like(seen_BM[:, :1])
        return Fused(fused_BD.unsqueeze(1), ones_B1.to(z_BMD.dtype), ~ones_B1, RECONSTRUCTION * error_B)
