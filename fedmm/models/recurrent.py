"""LSTM and GRU in both directions with exact gradients per study, each layer called once in a pass.

A cell called at each step is "a layer used twice": Opacus' hooks fire at every step, which is slow, and ghost clipping
refuses it. Here the loop holds no layer. A first pass without gradients finds the states h; one call of the layer gives
y_t = W h_(t-1) for all steps at once; the second pass computes with the detached W and adds y_t - y_t.detach(), which is 0
and whose gradient is that of W h_(t-1) at this step. So value and gradients are those of the usual recurrence (a test
compares them with torch.nn.LSTM and GRU), and both ways of clipping see one ordinary Linear layer on (B, ..., H) inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# B studies, V windows, L steps, X inputs of a step, H hidden units, G = gates x H, K = B x V rows, 2 directions

State = tuple[Tensor, ...]


class Cell(NamedTuple):
    """One step. next: (from the input (2, K, G), from the state (2, K, G), state) to the next state; state[0] is h."""

    gates: int
    states: int
    next: Callable[[Tensor, Tensor, State], State]


def _lstm(x_2KG: Tensor, y_2KG: Tensor, state: State) -> State:
    enter, keep, new, leave = (x_2KG + y_2KG).chunk(4, dim=-1)
    memory = keep.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * memory.tanh(), memory


def _gru(x_2KG: Tensor, y_2KG: Tensor, state: State) -> State:
    hidden = state[0].shape[-1]
    reset, keep = (x_2KG[..., : 2 * hidden] + y_2KG[..., : 2 * hidden]).sigmoid().chunk(2, dim=-1)
    new = (x_2KG[..., 2 * hidden :] + reset * y_2KG[..., 2 * hidden :]).tanh()
    return (torch.lerp(new, state[0], keep),)


# Order of the gates as in torch.nn. Sources: Hochreiter and Schmidhuber 1997; Cho et al. 2014.
LSTM, GRU = Cell(4, 2, _lstm), Cell(3, 1, _gru)


class Bidirectional(nn.Module):
    """(B, V, L, X), mask (B, V, L) -> (B, V, L, 2 H): h forwards and backwards at each step; each window starts at 0.

    A masked step leaves the state as it is, so padding changes nothing, wherever it stands.
    """

    def __init__(self, cell: Cell, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell, self.hidden = cell, hidden
        self.enter = nn.Linear(inputs, 2 * cell.gates * hidden)
        self.recur = nn.ModuleList(nn.Linear(hidden, cell.gates * hidden, bias=False) for _ in range(2))

    def forward(self, x_BVLX: Tensor, mask_BVL: Tensor) -> Tensor:
        studies, windows, steps = mask_BVL.shape
        rows = studies * windows
        gates = self.enter(x_BVLX).reshape(rows, steps, 2, self.cell.gates * self.hidden)
        gates_L2KG = torch.stack([gates[:, :, 0], gates[:, :, 1].flip(1)], dim=0).permute(2, 0, 1, 3)
        mask_KL = mask_BVL.reshape(rows, steps)
        mask_L2K1 = torch.stack([mask_KL, mask_KL.flip(1)]).permute(2, 0, 1).unsqueeze(-1)
        extra_L2KG = None
        if torch.is_grad_enabled():
            with torch.no_grad():
                h_L2KH = self._run(gates_L2KG, mask_L2K1, None)
            before_L2KH = torch.cat([torch.zeros_like(h_L2KH[:1]), h_L2KH[:-1]])
            extra_L2KG = self._gradient_only(before_L2KH, (studies, windows, steps))
        h_L2KH = self._run(gates_L2KG, mask_L2K1, extra_L2KG)
        both = torch.stack([h_L2KH[:, 0], h_L2KH[:, 1].flip(0)], dim=2)  # (L, K, 2, H)
        return both.transpose(0, 1).reshape(studies, windows, steps, 2 * self.hidden)

    def _gradient_only(self, before_L2KH: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Zeros (L, 2, K, G) whose gradient is that of the recurrent layers' outputs."""
        parts = []
        for direction, layer in enumerate(self.recur):
            y_BVLG = layer(before_L2KH[:, direction].transpose(0, 1).reshape(*shape, self.hidden))
            parts.append((y_BVLG - y_BVLG.detach()).flatten(0, 1))
        return torch.stack(parts).permute(2, 0, 1, 3)

    def _run(self, gates_L2KG: Tensor, mask_L2K1: Tensor, extra_L2KG: Tensor | None) -> Tensor:
        """(L, 2, K, H): the states, without a gradient for the recurrent weights."""
        weight_2HG = torch.stack([layer.weight.detach().t() for layer in self.recur])  # type: ignore[operator]
        state: State = (gates_L2KG.new_zeros(2, gates_L2KG.shape[2], self.hidden),) * self.cell.states
        masks, out = mask_L2K1.unbind(0), []
        extras = [None] * len(masks) if extra_L2KG is None else extra_L2KG.unbind(0)
        for x_2KG, here_2K1, extra_2KG in zip(gates_L2KG.unbind(0), masks, extras, strict=True):
            y_2KG = torch.bmm(state[0], weight_2HG)
            if extra_2KG is not None:
                y_2KG = y_2KG + extra_2KG
            following = self.cell.next(x_2KG, y_2KG, state)
            state = tuple(torch.where(here_2K1, new, old) for new, old in zip(following, state, strict=True))
            out.append(state[0])
        return torch.stack(out)
