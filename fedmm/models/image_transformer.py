"""A small Vision Transformer, (B, 1, H, W) -> (B, D), from parts whose per-study gradients are exact.

What is learnt without an input (class token, positions) is an Embedding called with (B, T) indices: a bare parameter has
no gradient per study.
Source: Dosovitskiy et al. 2021, scaled down; from random weights it needs more studies than a convolution does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedmm.models.encoder import Encoder, encoders
from fedmm.models.transformer import Block
from fedmm.schema import InputSpec

# B studies, H W pixels, N patches, T = 1 + N tokens, E width of a token, D width of the embedding

DEPTH, INNER, HEADS = 4, 64, 4  # guess: small enough for hundreds of patients
FEW_PATCHES, MANY_PATCHES = 8, 14  # patches a side; 14 as ViT-B/16 at 224 pixels
LARGE = 128  # pixels; above, MANY_PATCHES
SPREAD = 0.02  # of fresh positions and class token, as in ViT


@encoders["image"].register("vit")
class VisionTransformer(Encoder):
    """Square patches, a class token, positions, four blocks; D from the class token.

    8 patches a side to 128 pixels and 14 above; an image that they do not divide gets a border of 0, which is its mean.
    """

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        most = FEW_PATCHES if spec.image_size <= LARGE else MANY_PATCHES
        self.pixels = math.ceil(spec.image_size / most)  # side of a patch
        self.side = math.ceil(spec.image_size / self.pixels)
        self.patch = nn.Linear(self.pixels**2, INNER)
        self.token = nn.Embedding(1, INNER)
        self.position = nn.Embedding(1 + self.side**2, INNER)
        self.blocks = nn.Sequential(*(Block(INNER, HEADS) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(INNER)
        self.project = nn.Linear(INNER, width)
        for table in (self.token, self.position):
            nn.init.trunc_normal_(table.weight, std=SPREAD)

    def patches(self, image_B1HW: Tensor) -> Tensor:
        """(B, N, pixels), contiguous: a convolution's map would reach the norms permuted."""
        border = self.side * self.pixels - self.spec.image_size
        image_B1HW = nn.functional.pad(image_B1HW, (0, border, 0, border))
        studies, side, pixels = len(image_B1HW), self.side, self.pixels
        grid = image_B1HW.reshape(studies, side, pixels, side, pixels).transpose(2, 3)
        return grid.reshape(studies, side**2, pixels**2)

    def forward(self, image_B1HW: Tensor) -> Tensor:
        studies, tokens, device = len(image_B1HW), 1 + self.side**2, image_B1HW.device
        token_B1E = self.token(torch.zeros(studies, 1, dtype=torch.int64, device=device))
        z_BTE = torch.cat([token_B1E, self.patch(self.patches(image_B1HW))], dim=1)
        place_BT = torch.arange(tokens, device=device).expand(studies, tokens).contiguous()
        z_BTE = self.blocks(z_BTE + self.position(place_BT))
        out: Tensor = self.project(self.norm(z_BTE[:, 0].contiguous()))
        return out
