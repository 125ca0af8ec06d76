"""Fusions by attention between modalities, from linear layers alone: exact gradients per study in both ways of clipping."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedmm.models.fusion import Fusion, fusions, mean_of_seen
from fedmm.models.transformer import Block
from fedmm.schema import MODALITIES

# B studies, M modalities, T tokens, D width, A attention heads, K D / A

HEADS = 4  # guess; fewer where the width does not divide
BLOCKS = 2  # of `tokens`: guess; two steps let one modality answer what another one asked


class Attention(nn.Module):
    """Attention over a few tokens, each layer called once. A token that may look at nobody gets 0, never NaN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = math.gcd(width, HEADS)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, z_BTD: Tensor, allowed_BTT: Tensor, bias_BATT: Tensor | None = None) -> Tensor:
        """(B, T, D). allowed_BTT: bool, may token t look at token u.  bias_BATT: added to the scores; none: 0."""
        query, key, value = (
            layer(z_BTD).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        allowed_B1TT = allowed_BTT.unsqueeze(1)
        score_BATT = (query @ key.transpose(2, 3)) / math.sqrt(query.shape[-1])
        score_BATT = score_BATT if bias_BATT is None else score_BATT + bias_BATT
        score_BATT = score_BATT.masked_fill(~allowed_B1TT, torch.finfo(score_BATT.dtype).min)
        weight_BATT = score_BATT.softmax(-1) * allowed_B1TT
        out: Tensor = self.output((weight_BATT @ value).transpose(1, 2).flatten(2))
        return out


def learnt(table: nn.Embedding, z_BMD: Tensor) -> Tensor:
    """(B, rows, D) every row of a table, for each study: a weight with a gradient per study, which no nn.Parameter has."""
    ids_R = torch.arange(table.num_embeddings, device=z_BMD.device)
    rows_BRD: Tensor = table(ids_R.repeat(len(z_BMD), 1))
    return rows_BRD


@fusions.register("cross_attention")
class CrossAttention(Fusion):
    """Each present modality asks the other present ones, then a hidden layer; the mean of the present.

    Source: Tsai et al. 2019, cross-modal attention, with one set of weights for all pairs and a learnt mark of who speaks.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.kind = nn.Embedding(len(MODALITIES), width)
        self.ask = Attention(width)
        self.before, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
        others_MM = ~torch.eye(len(MODALITIES), dtype=torch.bool, device=seen_BM.device)
        z_BMD = z_BMD + learnt(self.kind, z_BMD)
        z_BMD = z_BMD + self.ask(z_BMD, seen_BM.unsqueeze(1) & others_MM)
        z_BMD = z_BMD + self.narrow(nn.functional.gelu(self.wide(self.before(z_BMD))))
        return mean_of_seen(self.norm(z_BMD), seen_BM)


@fusions.register("tokens")
class Tokens(Fusion):
    """Small Transformer over a class token and one token per modality; a learnt token stands for what is missing.

    Source: Dosovitskiy et al. 2021 (class token); Ma et al. 2022 (Transformers and missing modalities).
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.table = nn.Embedding(1 + 2 * len(MODALITIES), width)  # class; who speaks; what is missing
        self.blocks = nn.ModuleList(Block(width, math.gcd(width, HEADS)) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(width)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
        count = len(MODALITIES)
        class_B1D, kind_BMD, missing_BMD = torch.split(learnt(self.table, z_BMD), [1, count, count], dim=1)
        tokens_BMD = torch.where(seen_BM.unsqueeze(-1), z_BMD + kind_BMD, missing_BMD)
        z_BTD = torch.cat([class_B1D, tokens_BMD], dim=1)
        for block in self.blocks:
            z_BTD = block(z_BTD)
        out: Tensor = self.norm(z_BTD[:, 0])
        return out
