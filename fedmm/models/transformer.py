"""Blocks of a Transformer with exact gradients per study, and long sequences cut into windows.

Every layer with weights is a Linear, a LayerNorm or an Embedding that is called once in a pass with one row for each
study; attention itself has none. Opacus' own attention mixes studies or heads (../shared/privacy.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# B studies, V windows, L steps of a window, T = V x L steps, W width of a step, A heads, D width of the embedding

WIDER = 2  # hidden size of a block's perceptron, in widths: guess, 4 in the literature


class Block(nn.Module):
    """Pre-norm Transformer block, (B, T, W) -> (B, T, W); also (B, V, L, W), where each window attends to itself alone.

    width: W.  heads: a divisor of W.  Raises: ValueError if it is not.
    Source: Vaswani et al. 2017; normalised before each part as in Xiong et al. 2020.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, WIDER * width), nn.Linear(WIDER * width, width)

    def forward(self, x_BTW: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """mask_BT: bool, the steps that hold something; none: all. Steps that hold nothing are seen by nobody.

        Guarantee: finite for a row that holds nothing; what its steps and other masked ones then hold means nothing.
        """
        x_BTW = x_BTW + self.join(self._attend(self.query_key_value(self.before_attention(x_BTW)), mask_BT))
        out: Tensor = x_BTW + self.narrow(nn.functional.gelu(self.widen(self.before_mlp(x_BTW))))
        return out

    def _attend(self, joint: Tensor, mask: Tensor | None) -> Tensor:
        """(B, ..., T, 3 W) to (B, ..., T, W). No weights, so windows may stand beside studies."""
        steps, width = joint.shape[-2], joint.shape[-1] // 3
        rows = joint.shape[:-2].numel()
        query, key, value = joint.reshape(rows, steps, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if mask is not None:
            # Softmax over nothing would be NaN: where nothing is there, all is seen, and the caller's mask hides it.
            mask = (mask | ~mask.any(-1, keepdim=True)).reshape(rows, 1, 1, steps)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return seen.transpose(1, 2).reshape(*joint.shape[:-1], width)


class WindowTransformer(nn.Module):
    """Learnt positions and `depth` blocks within each window: (B, V, L, W), mask (B, V, L) -> (B, V, L, W).

    length: longest window.  Cost grows with the number of windows, not with its square.
    """

    def __init__(self, width: int, *, heads: int, depth: int, length: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(length, width)
        nn.init.trunc_normal_(self.positions.weight, std=0.3)  # guess: a third of a step's own size
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x_BVLW: Tensor, mask_BVL: Tensor) -> Tensor:
        # One row of ids for each study and contiguous: a shared row has no gradient per study.
        place_BVL = torch.arange(x_BVLW.shape[2], device=x_BVLW.device).expand(x_BVLW.shape[:3]).contiguous()
        x_BVLW = x_BVLW + self.positions(place_BVL)
        for block in self.blocks:
            x_BVLW = block(x_BVLW, mask_BVL)
        return x_BVLW


def cut_windows(value_BT: Tensor, length: int) -> Tensor:
    """(B, T, ...) to (B, V, L, ...), L = min(T, length): zeros (False) fill the last window."""
    studies, steps = value_BT.shape[:2]
    length = min(length, steps)
    windows = -(-steps // length)
    filled = nn.functional.pad(value_BT, [0, 0] * (value_BT.dim() - 2) + [0, windows * length - steps])
    return filled.reshape(studies, windows, length, *value_BT.shape[2:])


def masked_mean(x_BVLW: Tensor, mask_BVL: Tensor) -> Tensor:
    """Mean over the steps that hold something, then over the windows that have such: (B, W), zeros where none does."""
    share_BVL, share_BV = shares(mask_BVL)
    return torch.einsum("bvlw,bvl,bv->bw", x_BVLW, share_BVL.to(x_BVLW.dtype), share_BV.to(x_BVLW.dtype))


def shares(mask_BVL: Tensor) -> tuple[Tensor, Tensor]:
    """What a step counts in the mean of its window, and a window in that of its study; 0 where nothing is."""
    used_BV = mask_BVL.any(2)
    share_BVL = mask_BVL / mask_BVL.sum(2, keepdim=True).clamp(min=1)
    return share_BVL, used_BV / used_BV.sum(1, keepdim=True).clamp(min=1)
