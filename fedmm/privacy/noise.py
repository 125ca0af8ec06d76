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

    def __reduce__(self) -> tuple[type[SystemNoise], tuple[()]]:
        return SystemNoise, ()  # a copy in another process gets its own key, or two would draw the same noise

    def _uniform(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """(count,) in (0, 1], 53 random bits each."""
        bits = np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64) >> np.uint64(11)
        return (bits.astype(np.float64) + 1.0) * 2.0**-53

    def gaussian(self, shape: Sequence[int], std: float) -> Tensor:
        """Box-Muller on 53-bit uniforms: reaches 8.5 standard deviations, beyond which lies 2e-17 of the mass."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(self._uniform(half)))
        angle = (2.0 * np.pi) * self._uniform(half)
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        return torch.from_numpy(values * std).reshape(tuple(shape))

    def sample(self, count: int, rate: Rate) -> list[int]:
        """Raises: PlanInvalid for a rate that is not the plan's type, so that no other number can find its way here."""
        if not isinstance(rate, Rate):
            raise PlanInvalid(
                f"the sampler takes a Rate, not {type(rate).__name__}",
                why="a rate worked out from a loader or from private numbers is not the one that the ledger charges",
                fix="pass plan.sampling_rate",
            )
        return [int(i) for i in np.flatnonzero(self._uniform(count) <= rate)]

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(int.from_bytes(os.urandom(32), "big"))


def add_on_grid(total: Tensor, noise: Tensor, std: float) -> Tensor:
    """`total + noise` in double, rounded to the grid that belongs to `std`; float32 out, on total's device.

    std: > 0. Rounding is post-processing: it can only hide.
    """
    grid = 2.0 ** (math.floor(math.log2(std)) - GRID_BITS)
    noisy = total.double() + noise.to(total.device)
    return (torch.round(noisy / grid) * grid).to(total.dtype)
