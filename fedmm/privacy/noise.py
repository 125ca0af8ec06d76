"""Where privacy's chance comes from: ChaCha20 keyed by the operating system, never a seed that anyone could repeat.

Three properties, each with a reason:
- **Cryptographic.** Opacus' secure mode needs torchcsprng, which has no current build; torch's Mersenne twister can be
  rebuilt from 624 outputs. ChaCha20 with a fresh 256-bit key from the operating system cannot.
- **Double precision, then a grid.** Floating-point Gaussians have gaps that reveal the summand (Mironov 2012). The noisy
  sum is formed in double and rounded to a grid of about sigma / 2^20, so the low bits that carry the gaps never leave.
- **Sampling is secret too.** Amplification by sampling counts on nobody knowing who took part, so Poisson draws come
  from the same source.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from fedmm.errors import PlanInvalid
from fedmm.privacy.plan import Rate

PORTION = 2**16  # values of noise at a time: 512 KB in double  # measured
GRID_BITS = 20  # grid of sigma / 2^20 .. sigma / 2^19: the noise is unchanged to 1e-6 of its spread, float32 holds it


class Noise(Protocol):
    """What training asks of chance. Tests pass a fixed one; no setting, message or environment variable can."""

    def gaussian(self, shape: Sequence[int], std: float) -> Tensor:
        """Independent N(0, std^2), float64, on the CPU."""
        ...

    def sample(self, count: int, rate: Rate) -> list[int]:
        """Poisson sampling: each of 0 … count-1 with probability `rate`, independently.

        rate: the plan's own, which the ledger charges; one number in one place.
        """
        ...

    def generator(self) -> np.random.Generator:
        """A generator for choices that must not be guessed: which studies of a patient above the cap."""
        ...


class SystemNoise:
    """ChaCha20 keyed by `os.urandom` at construction. One per process and task; never stored, never sent."""

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.ChaCha20(os.urandom(32), os.urandom(16)), mode=None).encryptor()
        self._zeros, self._bytes = b"", bytearray()  # kept: a new page costs more than what is written on it

    def __reduce__(self) -> tuple[type[SystemNoise], tuple[()]]:
        return SystemNoise, ()  # a copy in another process gets its own key, or two would draw the same noise

    def _draw(self, count: int) -> Tensor:
        """(count,) whole numbers from -2^52 to 2^52 - 1, as float64."""
        if len(self._zeros) < 8 * count:
            self._zeros, self._bytes = bytes(8 * count), bytearray(8 * count)
        self._stream.update_into(memoryview(self._zeros)[: 8 * count], self._bytes)
        return (torch.frombuffer(self._bytes, dtype=torch.int64, count=count) >> 11).double()

    def _uniform(self, count: int) -> Tensor:
        """(count,) in (0, 1], 53 random bits each."""
        return self._draw(count).add_(2.0**52 + 1).mul_(2.0**-53) if count else torch.zeros(0, dtype=torch.float64)

    def gaussian(self, shape: Sequence[int], std: float) -> Tensor:
        """Box-Muller on 53-bit uniforms: reaches 8.5 standard deviations, beyond which lies 2e-17 of the mass.

        (The inverse of the distribution function is as fast, but beyond 6.7 standard deviations its values lie further apart
        than the grid, and 25 million weights get there.)
        """
        count = math.prod(shape)
        half = (count + 1) // 2
        drawn = self._draw(2 * half) if count else torch.zeros(0, dtype=torch.float64)
        radius, angle = drawn[:half], drawn[half:]
        radius.add_(2.0**52 + 1).mul_(2.0**-53).log_().mul_(-2.0).sqrt_().mul_(std)
        sine = torch.sin(angle.mul_(math.pi * 2.0**-52))
        angle.cos_().mul_(radius)
        radius.mul_(sine)
        return drawn[:count].view(tuple(shape))

    def sample(self, count: int, rate: Rate) -> list[int]:
        """Raises: PlanInvalid for a rate that is not the plan's type, so that no other number can find its way here."""
        if not isinstance(rate, Rate):
            raise PlanInvalid(
                f"the sampler takes a Rate, not {type(rate).__name__}",
                why="a rate worked out from a loader or from private numbers is not the one that the ledger charges",
                fix="pass plan.sampling_rate",
            )
        return [int(i) for i in np.flatnonzero(self._uniform(count).numpy() <= rate)]

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(int.from_bytes(os.urandom(32), "big"))


def with_noise(total: Tensor, noise: Noise, std: float) -> Tensor:
    """`total` + N(0, std^2) on the grid; drawn and added a portion at a time, while it is in the processor's cache."""
    out = torch.empty_like(total)
    flat, noisy = total.flatten(), out.view(-1)
    for start in range(0, len(flat), PORTION):
        part = flat[start : start + PORTION]
        noisy[start : start + PORTION] = _on_grid(part, noise.gaussian(part.shape, std), std)
    return out


def add_on_grid(total: Tensor, noise: Tensor, std: float) -> Tensor:
    """`total + noise` in double, rounded to the grid that belongs to `std`; float32 out, on total's device.

    std: > 0. Rounding is post-processing: it can only hide.
    """
    return _on_grid(total, noise, std).to(total.dtype)


def _on_grid(total: Tensor, noise: Tensor, std: float) -> Tensor:
    """float64, on total's device."""
    grid = 2.0 ** (math.floor(math.log2(std)) - GRID_BITS)
    return torch.add(noise.to(total.device), total).div_(grid).round_().mul_(grid)
