"""Image encoders that learn one linear layer: features known before any data was seen, (B, 1, H, W) -> (B, D).

What is not learnt costs no privacy and no noise: at small epsilon on small data, a linear layer on such features beats
convolutional networks trained from random weights (Tramer and Boneh 2021). Filters are buffers that no state dict holds
(everything in one is averaged and released), and no number in them comes from patients.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor, nn

from fedmm.models.encoder import FixedEncoder, encoders
from fedmm.schema import InputSpec

# B studies, S side of an image, X features, D width of the embedding
# N side of a padded image, n of a coarser one; J scales, L orientations, G cells a side, U maps

LARGEST = 128  # pixels; larger images are averaged down: finer texture is the scanner's more than the patient's (guess)
PORTION = 2**19  # values of the widest intermediate at a time: stays in the cache (measured)


class FixedFeatures(FixedEncoder):
    """Features without weights, then `project`."""

    project: nn.Linear
    values: int  # of one study's widest intermediate

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        self.shrink = math.ceil(spec.image_size / LARGEST)
        self.size = spec.image_size // self.shrink  # S

    @abc.abstractmethod
    def describe(self, image_BSS: Tensor) -> Tensor:
        """(B, X), each row from its own image alone, of about unit size."""

    def features(self, image_B1HW: Tensor) -> Tensor:
        """(B, X), contiguous. A few studies at a time: memory does not grow with the batch."""
        if len(image_B1HW) == 0:  # an FFT of nothing is an error
            return image_B1HW.new_zeros(0, self.project.in_features)
        image_BSS = nn.functional.avg_pool2d(image_B1HW, self.shrink).squeeze(1)
        most = max(1, PORTION // self.values)
        return torch.cat([self.describe(part) for part in torch.split(image_BSS, most)])

    def finish(self, features_BX: Tensor) -> Tensor:
        out: Tensor = self.project(features_BX)
        return out


# --- wavelet scattering -------------------------------------------------------------------------------------------------

ORIENTATIONS = 8  # L, over half a turn
SMALL = 64  # pixels; below, two scales instead of three
CELLS = 4  # G: in a chest image the place matters, as in the small cnn
XI, SIGMA, SLANT = (
    3 * math.pi / 4,
    0.8,
    4 / ORIENTATIONS,
)  # frequency, spread, roundness of the finest wavelet: Kymatio's
FAINT = 1e-6  # variance below which a scale counts as blank


@encoders["image"].register("scattering")
class Scattering(FixedFeatures):
    """Wavelet scattering of order 2: ||x * ψ₁| * ψ₂| averaged over a 4 x 4 grid; stable to shifts and small deformations.

    Order 0 is the mean, order 1 how much of each scale and direction, order 2 how that varies: 1 + JL + J(J-1)/2 L²
    numbers a cell (81 for J = 2, 217 for J = 3). Each scale (or pair of scales) of one image is then brought to mean 0
    and variance 1 over its directions and cells: without it the coarse scales drown the fine ones.
    Sources: Mallat 2012; Bruna and Mallat 2013; under privacy with such a normalisation: Tramer and Boneh 2021.
    """

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        self.scales = 2 if self.size < SMALL else 3  # J
        step = 2**self.scales
        self.border = step
        self.side = math.ceil((self.size + 2 * step) / step) * step  # N
        self.values = 2 * ORIENTATIONS**2 * (self.side // 2) ** 2
        for j in range(self.scales):
            self.register_buffer(f"window{j}", windows(self, j), persistent=False)
            for resolution in range(max(j, 1)):
                bank_Lnn = morlet_bank(self.side >> resolution, j - resolution)
                # once for the real and once for the imaginary part of what it multiplies
                self.register_buffer(f"bank{j}at{resolution}", torch.stack([bank_Lnn] * 2, dim=-1), persistent=False)
        pairs = self.scales * (self.scales - 1) // 2
        paths = 1 + self.scales * ORIENTATIONS + pairs * ORIENTATIONS**2
        self.project = nn.Linear(paths * CELLS**2, width)

    def describe(self, image_BSS: Tensor) -> Tensor:
        after = self.side - self.size - self.border
        x_B1NN = nn.functional.pad(image_BSS.unsqueeze(1), (self.border, after, self.border, after), mode="reflect")
        groups = [self._cells(x_B1NN, 0)]
        spectrum_B1NN = torch.fft.fft2(x_B1NN)
        for j in range(self.scales):
            u_BLnn = self._wavelets(spectrum_B1NN, j, 0).squeeze(1)
            groups.append(self._cells(u_BLnn, j))
            if j + 1 < self.scales:
                spectrum_BLnn = torch.fft.fft2(u_BLnn)
                for coarser in range(j + 1, self.scales):
                    groups.append(self._cells(self._wavelets(spectrum_BLnn, coarser, j).flatten(1, 2), coarser))
        return torch.cat([nn.functional.layer_norm(g, g.shape[1:], eps=FAINT).flatten(1) for g in groups], dim=1)

    def _wavelets(self, spectrum_BUnn: Tensor, j: int, resolution: int) -> Tensor:
        """(B, U, L, m, m) modulus of scale j's responses, kept at every 2^j-th pixel of the image.

        Keeping every k-th pixel is adding up k x k parts of the spectrum, so no response is ever computed in full.
        """
        bank_Lnn2 = self.get_buffer(f"bank{j}at{resolution}")
        k = 1 << (j - resolution)
        m = spectrum_BUnn.shape[-1] // k
        spectrum_BUnn2 = torch.view_as_real(spectrum_BUnn).unsqueeze(2)
        folded = torch.zeros((), dtype=spectrum_BUnn2.dtype, device=spectrum_BUnn2.device)
        for row in range(0, k * m, m):
            for column in range(0, k * m, m):
                part = (..., slice(row, row + m), slice(column, column + m), slice(None))
                folded = torch.addcmul(folded, spectrum_BUnn2[part], bank_Lnn2[part], value=1 / k**2)
        u_BULmm: Tensor = torch.fft.ifft2(torch.view_as_complex(folded)).abs()
        return u_BULmm

    def _cells(self, u_BUnn: Tensor, resolution: int) -> Tensor:
        """(B, U, G, G) weighted means: the low-pass filter φ and the grid are separable, so two small products."""
        window_Gn = self.get_buffer(f"window{resolution}")
        return ((u_BUnn @ window_Gn.T).transpose(2, 3) @ window_Gn.T).transpose(2, 3)


def morlet_bank(side: int, scale: int) -> Tensor:
    """(L, side, side) real spectra of Morlet wavelets at 2^scale pixels, over the circle of `side` pixels, mean 0.

    A plane wave under a Gaussian, less as much of the Gaussian as takes its mean away. Spectra are Gaussians as well,
    added up over aliases because pixels are a sampling.
    """
    turn = 2 * math.pi
    omega = torch.fft.fftfreq(side, dtype=torch.float64) * turn
    alias = torch.arange(-1, 2, dtype=torch.float64) * turn  # beyond, less than 1e-6 is left
    y, x = torch.meshgrid((omega + alias[:, None]).flatten(), (omega + alias[:, None]).flatten(), indexing="ij")
    spread, xi = SIGMA * 2**scale, XI / 2**scale
    out = []
    for orientation in range(ORIENTATIONS):
        angle = math.pi * orientation / ORIENTATIONS
        along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
        both = []
        for centre in (xi, 0.0):
            gauss = torch.exp(-0.5 * spread**2 * ((along - centre) ** 2 + (across / SLANT) ** 2))
            both.append(gauss.reshape(3, side, 3, side).sum((0, 2)))
        wave, blob = both
        out.append(wave - wave[0, 0] / blob[0, 0] * blob)
    return torch.stack(out).float()


def windows(encoder: Scattering, resolution: int) -> Tensor:
    """(G, n) weight of each 2^resolution-th pixel in each cell: the cell's box, blurred by φ; rows add up to 1."""
    place_n = torch.arange(encoder.side >> resolution, dtype=torch.float64) * 2**resolution - encoder.border
    # Pixel i reaches from i - 1/2 to i + 1/2. The device is said: where transformers was the first to build something on the meta
    # device, torch forgets that linspace belongs there (test_a_model_is_counted_although_transformers_was_here_first).
    edge = torch.linspace(0, encoder.size, CELLS + 1, dtype=torch.float64, device=place_n.device) - 0.5
    blur = SIGMA * 2 ** (encoder.scales - 1) * math.sqrt(2)
    inside = torch.erf((place_n - edge[:-1, None]) / blur) - torch.erf((place_n - edge[1:, None]) / blur)
    return (inside / inside.sum(1, keepdim=True)).float()


# --- histogram of oriented gradients ------------------------------------------------------------------------------------

BINS = 9  # over half a turn: a rib's edge is the same from both sides
HOG_CELLS, LEAST_CELL = 8, 4  # cells a side, of 4 pixels at least: 8 x 8 pixels in an image of 64
CLIP = 0.2  # Dalal and Triggs' L2-Hys
FLAT = 1e-2  # length below which a block counts as flat: images have standard deviation 1 (guess)


@encoders["image"].register("hog")
class HOG(FixedFeatures):
    """Histogram of oriented gradients: which way edges run in each cell, each block of 2 x 2 cells at length 1.

    Bin k is about gradients at k · 20° to the horizontal (0: a vertical edge); a gradient between two bins counts in both.
    Source: Dalal and Triggs 2005, without their interpolation between cells.
    """

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        self.cell = max(LEAST_CELL, math.ceil(self.size / HOG_CELLS))
        self.side = math.ceil(self.size / self.cell)
        self.values = BINS * self.size**2
        self.register_buffer("bins", torch.arange(BINS, dtype=torch.float32).view(BINS, 1, 1), persistent=False)
        self.project = nn.Linear(4 * BINS * (self.side - 1) ** 2, width)

    def describe(self, image_BSS: Tensor) -> Tensor:
        cell_BKGG = self.histograms(image_BSS)
        corners = [cell_BKGG[:, :, y : self.side - 1 + y, x : self.side - 1 + x] for y in (0, 1) for x in (0, 1)]
        block_BXGG = torch.cat(corners, dim=1)
        block_BXGG = (block_BXGG / _length(block_BXGG)).clamp(max=CLIP)
        return (block_BXGG / _length(block_BXGG)).flatten(1)

    def histograms(self, image_BSS: Tensor) -> Tensor:
        """(B, 9, G, G) mean strength of the gradients of each direction in each cell."""
        framed = nn.functional.pad(image_BSS.unsqueeze(1), (1, 1, 1, 1), mode="replicate")
        dx_B1SS = framed[..., 1:-1, 2:] - framed[..., 1:-1, :-2]
        dy_B1SS = framed[..., 2:, 1:-1] - framed[..., :-2, 1:-1]
        flat = (dx_B1SS == 0) & (dy_B1SS == 0)
        safe_B1SS = torch.where(flat, torch.ones_like(dx_B1SS), dx_B1SS)  # no direction has no derivative either
        strength_B1SS = torch.where(flat, torch.zeros_like(dx_B1SS), torch.hypot(safe_B1SS, dy_B1SS))
        place_B1SS = torch.atan2(dy_B1SS, safe_B1SS) * (BINS / math.pi)
        distance_BKSS = (place_B1SS - self.get_buffer("bins") + BINS / 2).remainder(BINS) - BINS / 2
        vote_BKSS = (1 - distance_BKSS.abs()).clamp(min=0) * strength_B1SS
        border = self.side * self.cell - self.size
        return nn.functional.avg_pool2d(nn.functional.pad(vote_BKSS, (0, border, 0, border)), self.cell)


def _length(block_BXGG: Tensor) -> Tensor:
    """(B, 1, G, G), FLAT at least."""
    return (block_BXGG.square().sum(1, keepdim=True) + FLAT**2).sqrt()
