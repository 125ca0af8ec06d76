"""Chance with a name: every random choice that may be repeated has its own stream. Privacy noise never comes from here."""

from __future__ import annotations

import hashlib

import numpy as np


def seed_for(seed: int, name: str, **keys: int | str) -> int:
    """A 63-bit seed that depends on the run's seed, the purpose and the keys; equal on every machine."""
    text = "\x1f".join([str(seed), name, *(f"{key}={value}" for key, value in sorted(keys.items()))])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, name: str, **keys: int | str) -> np.random.Generator:
    """The generator for one purpose: `stream(seed, "augment", round=r)`."""
    return np.random.default_rng(seed_for(seed, name, **keys))
