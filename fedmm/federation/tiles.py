"""Arrays as long as a model, a piece at a time: what is worked out on the way stays in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE = 2**16  # values; 2^15 to 2^17 are alike, shorter and longer ones slower  # measured

Values = Mapping[str, NDArray[Any]]


def tiles(*arrays: NDArray[Any]) -> Iterator[tuple[NDArray[Any], ...]]:
    """The same TILE values of each array, in turn: views. arrays: of one size, each in C order."""
    flat = [array.reshape(-1) for array in arrays]
    for at in range(0, flat[0].size, TILE):
        yield tuple(one[at : at + TILE] for one in flat)


def finite(value: NDArray[Any]) -> bool:
    return all(np.isfinite(tile).all() for (tile,) in tiles(value))


def distance(left: Values, right: Values) -> float:
    """L2, over all weights together, in double: of the differences, so that what is small beside the weights counts."""
    total = 0.0
    for name, value in left.items():
        for one, other in tiles(value, right[name]):
            apart = np.subtract(one, other, dtype="float64")
            total += float(np.dot(apart, apart))
    return math.sqrt(total)
