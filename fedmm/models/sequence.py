"""Encoders that also tell what stands when: beside (B, D) the steps that it is the mean of, each with a time."""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedmm.models.encoder import Encoder
from fedmm.models.transformer import masked_mean, shares

# B studies, V windows, L steps (of a window, of a sequence), W width of a step, D width, G groups of steps


class Sequence(NamedTuple):
    """Steps of one modality in order.

    z_BLD: each step's embedding; finite, without meaning where nothing is.  share_BL: what a step counts in the mean of its
    study, 0 where nothing is.  time_BL: 0 … 1, position between the beginning and the last step that holds something;
    absolute stamps may take its place where files have them.
    """

    z_BLD: Tensor
    share_BL: Tensor
    time_BL: Tensor

    @property
    def mask_BL(self) -> Tensor:
        """Bool: steps that hold something."""
        return self.share_BL > 0

    def mean(self) -> Tensor:
        """(B, D), zeros for a study without steps."""
        return torch.einsum("bld,bl->bd", self.z_BLD, self.share_BL)

    def where(self, seen_B: Tensor) -> Sequence:
        """Without any step where the modality is absent."""
        return self._replace(share_BL=self.share_BL * seen_B.unsqueeze(1))

    def coarse(self, most: int) -> Sequence:
        """At most `most` steps: neighbours are averaged. The mean stays what it is."""
        studies, steps, width = self.z_BLD.shape
        size = -(-steps // most)
        if size <= 1:
            return self
        fill = [0, -steps % size]
        share_BGL = nn.functional.pad(self.share_BL, fill).reshape(studies, -1, size)
        z_BGLD = nn.functional.pad(self.z_BLD, [0, 0, *fill]).reshape(studies, -1, size, width)
        time_BGL = nn.functional.pad(self.time_BL, fill).reshape(studies, -1, size)
        share_BG = share_BGL.sum(2)
        part_BGL = share_BGL / share_BG.clamp(min=1e-12).unsqueeze(2)
        return Sequence(torch.einsum("bgld,bgl->bgd", z_BGLD, part_BGL), share_BG, (time_BGL * part_BGL).sum(2))


class SequenceEncoder(Encoder, abc.ABC):
    """An encoder whose result is a mean over steps. `sequence(value).mean()` is what `forward` gives, but for rounding and
    for a study that holds nothing (there `forward` gives the bias). Call one of them in a pass, not both."""

    project: nn.Linear  # W to D

    @abc.abstractmethod
    def steps(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """(B, V, L, W), and bool (B, V, L): the steps that hold something, windows in order of time."""

    def forward(self, value: Tensor) -> Tensor:
        out: Tensor = self.project(masked_mean(*self.steps(value)))
        return out

    def sequence(self, value: Tensor) -> Sequence:
        """Every step in the embedding's own space."""
        x_BVLW, mask_BVL = self.steps(value)
        share_BVL, share_BV = shares(mask_BVL)
        share_BL = (share_BVL * share_BV.unsqueeze(2)).flatten(1).to(x_BVLW.dtype)
        return Sequence(self.project(x_BVLW).flatten(1, 2), share_BL, relative_time(mask_BVL.flatten(1)))


def relative_time(mask_BL: Tensor) -> Tensor:
    """(B, L) middle of each step, 0 … 1 from the beginning to the end of the last step that holds something."""
    end_L = torch.arange(1, mask_BL.shape[1] + 1, device=mask_BL.device)
    last_B1 = (mask_BL * end_L).amax(1, keepdim=True).clamp(min=1)
    return ((end_L - 0.5) / last_B1).clamp(max=1.0)
