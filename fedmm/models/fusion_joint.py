"""Fusions into one joint vector, without attention: additive, gated, low-rank, hierarchical, adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmm.models.fusion import Fusion, flat_with_flags, fusions, mean_of_seen
from fedmm.schema import MODALITIES

# B studies, M modalities, D width, R rank, G the pair and the others

RANK = 4  # Liu et al. 2018 find ranks from 4 on as good as the full tensor
FIRST = ("image", "report")  # of `hierarchical`: joined before the others


@fusions.register("additive")
class Additive(Fusion):
    """Joint space: the sum of W_m z_m. Linear on purpose: each modality pushes the logits by itself, an absent one by 0.

    It cannot say "image and report contradict each other"; `concat`, `low_rank` or attention can.
    Source: Baltrusaitis, Ahuja, Morency 2019, joint representations.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.join = nn.Linear(len(MODALITIES) * width, width)  # (W_1 | W_2 | W_3): the sum in one product

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
        out: Tensor = self.join(z_BMD.flatten(1))
        return out


@fusions.register("gated")
class Gated(Fusion):
    """Gated multimodal unit: sum of gate_m * tanh(W_m z_m), each gate from all that is there; an absent one's is shut.

    Source: Arevalo et al. 2017, the form for more than two modalities.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.hidden = nn.ModuleDict({name: nn.Linear(width, width) for name in MODALITIES})
        self.gate = nn.Linear(len(MODALITIES) * (width + 1), len(MODALITIES) * width)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
        h_BMD = torch.stack([self.hidden[name](z_BMD[:, m]) for m, name in enumerate(MODALITIES)], dim=1).tanh()
        gate_BMD = self.gate(flat_with_flags(z_BMD, seen_BM)).sigmoid().reshape_as(h_BMD)
        out: Tensor = (gate_BMD * h_BMD * seen_BM.unsqueeze(-1)).sum(1)
        return out


@fusions.register("low_rank")
class LowRank(Fusion):
    """Low-rank bilinear: the mean over R of the product over modalities of (V_mr z_m + b_mr). An absent factor is 1.

    b starts at 1, so that the product starts as a sum of all single, paired and threefold interactions.
    Source: Liu et al. 2018, low-rank multimodal fusion.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.factor = nn.ModuleDict({name: nn.Linear(width, RANK * width) for name in MODALITIES})
        for parameter in (p for name, p in self.factor.named_parameters() if name.endswith("bias")):
            nn.init.ones_(parameter)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
        product_BRD = z_BMD.new_ones(len(z_BMD), RANK, self.width)
        for m, name in enumerate(MODALITIES):
            factor_BRD = self.factor[name](z_BMD[:, m]).unflatten(1, (RANK, self.width))
            product_BRD = product_BRD * torch.where(seen_BM[:, m, None, None], factor_BRD, 1.0)
        return product_BRD.mean(1)


@fusions.register("hierarchical")
class Hierarchical(Fusion):
    """Image with report first, what both say then with the others: a hidden layer for the pair that most studies have.

    Source: Majumder et al. 2018, hierarchical fusion; a chest report is written from its image, a sound is not.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.pair = nn.Linear(len(FIRST) * (width + 1), width)
        self.all = nn.Linear((1 + len(MODALITIES) - len(FIRST)) * (width + 1), width)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
        pair = [MODALITIES.index(name) for name in FIRST]
        others = [m for m in range(len(MODALITIES)) if m not in pair]
        pair_BD = self.pair(flat_with_flags(z_BMD[:, pair], seen_BM[:, pair])).relu()
        z_BGD = torch.cat([pair_BD.unsqueeze(1), z_BMD[:, others]], dim=1)
        seen_BG = torch.cat([seen_BM[:, pair].any(1, keepdim=True), seen_BM[:, others]], dim=1)
        out: Tensor = self.all(flat_with_flags(z_BGD, seen_BG)).relu()
        return out


@fusions.register("adapters")
class Adapters(Fusion):
    """One trunk for all modalities behind a small adapter for each; the mean of what is there.

    Most weights see every study, whatever it has: the choice where one modality is rare.
    Source: Houlsby et al. 2019, adapters (residual bottleneck of a quarter of the width).
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        narrow = max(1, width // 4)
        self.down = nn.ModuleDict({name: nn.Linear(width, narrow) for name in MODALITIES})
        self.up = nn.ModuleDict({name: nn.Linear(narrow, width) for name in MODALITIES})
        self.trunk = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor:
        adapted = [
            z_BMD[:, m] + self.up[name](self.down[name](z_BMD[:, m]).relu()) for m, name in enumerate(MODALITIES)
        ]
        return mean_of_seen(self.trunk(torch.stack(adapted, dim=1)), seen_BM)
