"""Report encoders that read in order: (B, T) hashed token ids, 0 is padding -> (B, D).

A long report is cut into windows that are read beside one another and averaged, so cost is linear in T. Columns after the
batch's longest report are dropped: they hold padding only, which changes no result.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmm.models.encoder import encoders
from fedmm.models.recurrent import GRU, LSTM, Bidirectional, Cell
from fedmm.models.sequence import SequenceEncoder
from fedmm.models.transformer import WindowTransformer, cut_windows
from fedmm.schema import InputSpec

# B studies, T tokens, V windows, L steps of a window, E width of a token, W width of a step, D width of the embedding

# guess, all: small, because a gradient per study is held for each weight, and noise is added to each
TOKEN = 16  # E; also keeps the table below MAX_WEIGHTS at 2**20 buckets
STRIDE = 4  # tokens that are one step of a recurrent encoder: about two words with their pairs
STEPS = 64  # of a recurrent window: 256 tokens, the default report
HIDDEN = 32  # of each direction
WINDOW = 64  # tokens of a Transformer's window
INNER, HEADS, DEPTH = 32, 4, 2


def used(report_BT: Tensor) -> Tensor:
    """Without the columns after the longest report; one column is always left."""
    columns = (report_BT > 0).any(0).nonzero()
    return report_BT[:, : int(columns[-1]) + 1 if len(columns) else 1].contiguous()


class Tokens(nn.Module):
    """(B, T) ids to (B, T, E); zeros for padding, whose row of the table is thus never trained."""

    def __init__(self, buckets: int) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets, TOKEN)

    def forward(self, report_BT: Tensor) -> Tensor:
        out: Tensor = self.table(report_BT) * (report_BT > 0).unsqueeze(-1)
        return out


class RecurrentReport(SequenceEncoder, abc.ABC):
    """Both directions over steps of STRIDE tokens; mean of the states over the steps that hold a token.

    Of a step's tokens the sum is taken, and the sum weighted from -1 (first) to 1 (last): a word means the same wherever in
    a step it falls, and the order within a step is not lost.
    """

    cell: ClassVar[Cell]

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        self.tokens = Tokens(spec.report_buckets)
        self.recurrent = Bidirectional(self.cell, 2 * TOKEN, HIDDEN)
        self.project = nn.Linear(2 * HIDDEN, width)

    def steps(self, report_BT: Tensor) -> tuple[Tensor, Tensor]:
        report_BT = used(report_BT)
        report_BT = nn.functional.pad(report_BT, [0, -report_BT.shape[1] % STRIDE])
        steps = report_BT.shape[1] // STRIDE
        token_BTSE = self.tokens(report_BT).reshape(len(report_BT), steps, STRIDE, TOKEN)
        slope_S1 = torch.linspace(-1, 1, STRIDE, dtype=token_BTSE.dtype, device=token_BTSE.device).unsqueeze(1)
        x_BTX = torch.cat([token_BTSE.sum(2), (token_BTSE * slope_S1).sum(2)], dim=2)
        mask_BT = (report_BT > 0).reshape(len(report_BT), steps, STRIDE).any(2)
        mask_BVL = cut_windows(mask_BT, STEPS)
        return self.recurrent(cut_windows(x_BTX, STEPS), mask_BVL), mask_BVL


@encoders["report"].register("lstm")
class LSTMReport(RecurrentReport):
    """Bidirectional LSTM over steps of four tokens, windows of 256 tokens; mean over steps and windows."""

    cell = LSTM

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        bias_2GH = self.recurrent.enter.bias.data.view(2, LSTM.gates, HIDDEN)
        bias_2GH[:, 1] = 1.0  # remembers at first: Jozefowicz et al. 2015


@encoders["report"].register("gru")
class GRUReport(RecurrentReport):
    """Bidirectional GRU over steps of four tokens, windows of 256 tokens; mean over steps and windows."""

    cell = GRU


@encoders["report"].register("transformer")
class TransformerReport(SequenceEncoder):
    """Two Transformer blocks over windows of 64 tokens; mean over the tokens and windows that are there."""

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        self.tokens = Tokens(spec.report_buckets)
        self.enter = nn.Linear(TOKEN, INNER)
        self.attention = WindowTransformer(INNER, heads=HEADS, depth=DEPTH, length=WINDOW)
        self.norm = nn.LayerNorm(INNER)
        self.project = nn.Linear(INNER, width)

    def steps(self, report_BT: Tensor) -> tuple[Tensor, Tensor]:
        report_BVL = cut_windows(used(report_BT), WINDOW)
        mask_BVL = report_BVL > 0
        return self.norm(self.attention(self.enter(self.tokens(report_BVL)), mask_BVL)), mask_BVL
