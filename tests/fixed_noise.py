"""Noise that repeats, for tests alone: nothing in fedmm, client or server can reach it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from client.app import build
from fedmm.seeds import seed_for


class FixedNoise:
    """Same seed, same draws. `scale` 0 switches the noise off and keeps the sampling."""

    def __init__(self, seed: int, *, scale: float = 1.0) -> None:
        self._rng = np.random.default_rng(seed)
        self._scale = scale

    def gaussian(self, shape: Sequence[int], std: float) -> torch.Tensor:
        return torch.from_numpy(self._rng.standard_normal(math.prod(shape)) * std * self._scale).view(tuple(shape))

    def sample(self, count: int, rate: float) -> list[int]:
        return [int(i) for i in np.flatnonzero(self._rng.random(count) < rate)]

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(self._rng.integers(2**63))


def fixed_noise(hospital: str, number: int) -> FixedNoise:
    return FixedNoise(seed_for(0, "test-noise", hospital=hospital, round=number))


app = build(fixed_noise)
