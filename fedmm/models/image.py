"""Image encoders: (B, 1, H, W) -> (B, D)."""

from __future__ import annotations

from torch import Tensor, nn

from fedmm.models.encoder import Encoder, encoders
from fedmm.schema import InputSpec

# B studies, H W pixels, D width of the embedding


@encoders["image"].register("cnn")
class ImageCNN(Encoder):
    """Four small convolutions; the last map keeps a 4 x 4 grid, because in a chest image the place matters.

    GroupNorm only: batch statistics would mix patients. Convolutions see contiguous NCHW input, as Opacus needs.
    """

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        channels = (8, 16, 16)
        layers: list[nn.Module] = [nn.AvgPool2d(2)] if spec.image_size >= 64 else []
        size = spec.image_size // 2 if layers else spec.image_size
        before = 1
        for after in channels:
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
            before, size = after, (size + 1) // 2
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(min(4, size)))
        self.project = nn.Linear(before * min(4, size) ** 2, width)

    def forward(self, image_B1HW: Tensor) -> Tensor:
        out: Tensor = self.project(self.convolutions(image_B1HW).flatten(1))
        return out
