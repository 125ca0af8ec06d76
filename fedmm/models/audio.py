"""Audio encoders: (B, N, R) log-mel spectrogram -> (B, D)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmm.models.encoder import Encoder, encoders
from fedmm.schema import InputSpec

# B studies, N mel bands, R frames, D width of the embedding


@encoders["audio"].register("cnn")
class AudioCNN(Encoder):
    """Three convolutions over time and pitch, then mean and maximum over time for each band that is left."""

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        channels = (8, 16, 16)
        layers: list[nn.Module] = []
        before, bands = 1, spec.audio_mels
        for after in channels:
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
            before, bands = after, (bands + 1) // 2
        self.convolutions = nn.Sequential(*layers)
        self.project = nn.Linear(2 * before * bands, width)

    def forward(self, audio_BNR: Tensor) -> Tensor:
        map_BCNR = self.convolutions(audio_BNR.unsqueeze(1))
        summary_BX = torch.cat([map_BCNR.mean(-1), map_BCNR.amax(-1)], dim=1).flatten(1)
        out: Tensor = self.project(summary_BX)
        return out
