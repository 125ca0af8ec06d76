"""Report encoders: (B, T) hashed token ids -> (B, D)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmm.models.encoder import Encoder, encoders
from fedmm.schema import InputSpec

# B studies, T tokens, V buckets of the tokeniser, D width of the embedding


@encoders["report"].register("ngrams")
class NgramBag(Encoder):
    """Bag of hashed words and word pairs, one linear layer. Word pairs carry negation ("no effusion").

    The bag has length 1 whatever the report's length, so a long report clips no sooner than a short one.
    """

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        self.buckets = spec.report_buckets
        self.project = nn.Linear(self.buckets, width)

    def forward(self, report_BT: Tensor) -> Tensor:
        present_BT = (report_BT > 0).to(self.project.weight.dtype)
        bag_BV = torch.zeros(report_BT.shape[0], self.buckets, dtype=present_BT.dtype, device=report_BT.device)
        bag_BV = bag_BV.scatter_add(1, report_BT, present_BT).clamp(max=1)
        out: Tensor = self.project(SCALE * nn.functional.normalize(bag_BV, dim=1))
        return out


SCALE = 4.0  # guess: makes the output of a fresh layer about as large as the image encoder's
