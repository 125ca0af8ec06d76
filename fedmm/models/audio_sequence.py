"""Audio encoders over MFCC and log-mel patches: (B, N, R) log-mel spectrogram -> (B, D).

Frames in which every band is at the floor are silence or padding (`fedmm.data.audio` maps the floor to FLOOR): they count
for nothing. A long recording is cut into windows of about 2.5 s at the default rate and hop, which are averaged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedmm.models.encoder import FixedEncoder, encoders
from fedmm.models.recurrent import GRU, Bidirectional
from fedmm.models.sequence import SequenceEncoder
from fedmm.models.transformer import WindowTransformer, cut_windows
from fedmm.schema import InputSpec

# B studies, N mel bands, R frames, K cepstral coefficients, V windows, L steps of a window, D width of the embedding

FLOOR = -2.0  # of the log-mel scale
FRAMES = 128  # of a window
STRIDE = 4  # frames that are one step of a recurrent or Transformer encoder, side by side
COEFFICIENTS = 20  # at most one for each band
HIDDEN = 32  # of each direction; guess, as are the next
INNER, HEADS, DEPTH = 32, 4, 2


def sounding(audio_BNR: Tensor) -> Tensor:
    """(B, R) bool: frames in which a band is above the floor."""
    return audio_BNR.amax(1) > FLOOR + 1e-3


def mfcc(audio_BNR: Tensor) -> Tensor:
    """(B, R, K) mel-frequency cepstral coefficients: DCT-II of the log-mel bands, liftered. Public constants alone.

    Divided by sqrt(N), so that the first is the bands' mean whatever their number.
    Source: Davis and Mermelstein 1980; lifter 1 + 11 sin(pi k / 22) as in HTK.
    """
    bands = audio_BNR.shape[1]
    count = min(COEFFICIENTS, bands)
    k_K = torch.arange(count, dtype=audio_BNR.dtype, device=audio_BNR.device)
    n_N = torch.arange(bands, dtype=audio_BNR.dtype, device=audio_BNR.device)
    dct_NK = torch.cos(math.pi / bands * (n_N.unsqueeze(1) + 0.5) * k_K) / bands
    return audio_BNR.transpose(1, 2) @ (dct_NK * (1 + 11 * torch.sin(math.pi * k_K / 22)))


def side_by_side(frames_BRX: Tensor, mask_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Steps of STRIDE frames, in windows: (B, V, L, STRIDE x X), zeros where silent; mask (B, V, L), any frame sounds."""
    frames_BRX = torch.where(mask_BR.unsqueeze(-1), frames_BRX, torch.zeros_like(frames_BRX))
    missing = -mask_BR.shape[1] % STRIDE
    frames_BRX = nn.functional.pad(frames_BRX, [0, 0, 0, missing])
    studies, frames, values = frames_BRX.shape
    x_BTX = frames_BRX.reshape(studies, frames // STRIDE, STRIDE * values)
    mask_BT = nn.functional.pad(mask_BR, [0, missing]).reshape(studies, frames // STRIDE, STRIDE).any(2)
    return cut_windows(x_BTX, FRAMES // STRIDE), cut_windows(mask_BT, FRAMES // STRIDE)


@encoders["audio"].register("mfcc")
class MFCCStatistics(FixedEncoder):
    """Mean, deviation, minimum and maximum over time of MFCC and of their deltas, then one linear layer.

    The statistics are brought to mean 0 and spread 1 within each study, so that a lively or long recording clips no sooner;
    no statistic of any other study is used.
    """

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        self.project = nn.Linear(8 * min(COEFFICIENTS, spec.audio_mels), width)

    def features(self, audio_BNR: Tensor) -> Tensor:
        """(B, X) statistics."""
        mask_BR = sounding(audio_BNR)
        cepstra_BRK = mfcc(audio_BNR)
        delta_BRK = nn.functional.pad((cepstra_BRK[:, 2:] - cepstra_BRK[:, :-2]) / 2, [0, 0, 1, 1])
        # a difference with silence would be that of the padding
        inner_BR = nn.functional.pad(mask_BR[:, 2:] & mask_BR[:, 1:-1] & mask_BR[:, :-2], [1, 1])
        parts = [_statistics(cepstra_BRK, mask_BR), _statistics(delta_BRK, inner_BR)]
        return torch.cat([nn.functional.layer_norm(part, part.shape[1:]) for part in parts], dim=1)

    def finish(self, summary_BX: Tensor) -> Tensor:
        out: Tensor = self.project(summary_BX)
        return out


def _statistics(x_BRK: Tensor, mask_BR: Tensor) -> Tensor:
    """(B, 4 K) mean, deviation, minimum, maximum of each window, averaged over the windows with sound; zeros if none."""
    x_BVLK, mask_BVL = cut_windows(x_BRK, FRAMES), cut_windows(mask_BR, FRAMES)
    here_BVL1, count_BV1 = mask_BVL.unsqueeze(-1), mask_BVL.sum(2).clamp(min=1).unsqueeze(-1)
    mean_BVK = (x_BVLK * here_BVL1).sum(2) / count_BV1
    variance_BVK = ((x_BVLK - mean_BVK.unsqueeze(2)).square() * here_BVL1).sum(2) / count_BV1
    low_BVK = x_BVLK.masked_fill(~here_BVL1, math.inf).amin(2)
    high_BVK = x_BVLK.masked_fill(~here_BVL1, -math.inf).amax(2)
    each_BVX = torch.cat([mean_BVK, (variance_BVK + 1e-8).sqrt(), low_BVK, high_BVK], dim=2)
    used_BV = mask_BVL.any(2)
    each_BVX = torch.where(used_BV.unsqueeze(-1), each_BVX, torch.zeros_like(each_BVX))
    return each_BVX.sum(1) / used_BV.sum(1, keepdim=True).clamp(min=1)


@encoders["audio"].register("recurrent")
class RecurrentAudio(SequenceEncoder):
    """Bidirectional GRU over MFCC, steps of four frames, windows of 128 frames; mean over steps and windows that sound."""

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        self.recurrent = Bidirectional(GRU, STRIDE * min(COEFFICIENTS, spec.audio_mels), HIDDEN)
        self.project = nn.Linear(2 * HIDDEN, width)

    def steps(self, audio_BNR: Tensor) -> tuple[Tensor, Tensor]:
        x_BVLX, mask_BVL = side_by_side(mfcc(audio_BNR), sounding(audio_BNR))
        return self.recurrent(x_BVLX, mask_BVL), mask_BVL


@encoders["audio"].register("transformer")
class TransformerAudio(SequenceEncoder):
    """Two Transformer blocks over patches of all bands by four frames, windows of 128 frames; mean over what sounds.

    Source: Gong et al. 2021 (AST), with patches over the whole height, as pitch and time are not alike in a small model.
    """

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        self.enter = nn.Linear(STRIDE * spec.audio_mels, INNER)
        self.attention = WindowTransformer(INNER, heads=HEADS, depth=DEPTH, length=FRAMES // STRIDE)
        self.norm = nn.LayerNorm(INNER)
        self.project = nn.Linear(INNER, width)

    def steps(self, audio_BNR: Tensor) -> tuple[Tensor, Tensor]:
        x_BVLX, mask_BVL = side_by_side(audio_BNR.transpose(1, 2), sounding(audio_BNR))
        return self.norm(self.attention(self.enter(x_BVLX), mask_BVL)), mask_BVL
