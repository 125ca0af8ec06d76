"""What is kept of a round's replies until the strategy gets them: one sum, or, for rules that compare replies, all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedmm.federation.checks import Fit
from fedmm.federation.messages import ARRAYS, METRICS, WEIGHT, view, views
from fedmm.federation.robust import middle
from fedmm.federation.tiles import Values, tiles
from fedmm.training.local import Still

PIECE = 2**20  # values; 8 MB
NOBODY = 0  # a Message wants a node; strategies do not look at it


class Mean:
    """The mean by weight of what was added, each weight of the model over the hospitals that train it.

    still: by hospital what it does not train: there it has no say, and its values are left out.
    Memory: the sum, two models of float32, however many are added. An update is let go when `add` returns.
    Order: the sum is in double, divided once at the end. Of float32 values that count alike it is exact unless they lie further
    apart than a factor of 2^29 / n, so that the order of arrival changes nothing; where it is not exact, or weights differ, order
    changes the sum by 1e-16 of itself, which float32 shows only where it stands that close to the middle of two numbers.
    """

    def __init__(self, still: Mapping[str, Still]) -> None:
        self._still = still
        self._sum: dict[str, NDArray[np.float64]] = {}
        self._weight: dict[str, float] = {}

    def add(self, fit: Fit) -> None:
        values, still = views(fit.arrays), self._still.get(fit.hospital, ())
        if not self._sum:  # the round's first
            self._sum, self._weight = _zeros(values), dict.fromkeys(values, 0.0)
        for name, value in values.items():
            if not name.startswith(still):
                _add(self._sum[name], value, fit.weight)
                self._weight[name] += fit.weight

    def replies(self, before: ArrayRecord) -> list[Message]:
        """One, whose mean is itself. Ends the round: the sum is let go. before: for what nobody trained."""
        (total, self._sum), (weights, self._weight) = (self._sum, {}), (self._weight, {})
        arrays = {}
        for name, weight in weights.items():
            value = total.pop(name)
            arrays[name] = Array(np.asarray(value / weight, dtype="float32")) if weight else before[name]
        return [_reply(ArrayRecord(arrays), 1.0)] if arrays else []


class Everybody:
    """All replies, in the order of the hospitals' names.

    still: by hospital what it does not train: there it gets the middle value of those who do, so that any rule gives these
    parts what those alone would get. liars: so many may lie; where too few train a part for them to be outvoted, it stays.
    Memory: a model of float32 for each hospital.
    """

    def __init__(self, still: Mapping[str, Still], *, liars: int) -> None:
        self._still, self._liars = still, liars
        self._fits: list[Fit] = []

    def add(self, fit: Fit) -> None:
        self._fits.append(fit)

    def replies(self, before: ArrayRecord) -> list[Message]:
        """Ends the round. before: for what too few trained."""
        fits, self._fits = sorted(self._fits, key=lambda fit: fit.hospital), []
        fill_in(fits, before, self._still, liars=self._liars)
        return [_reply(fit.arrays, fit.weight) for fit in fits]


def fill_in(fits: Sequence[Fit], before: ArrayRecord, still: Mapping[str, Still], *, liars: int) -> None:
    """What a hospital does not train, it has no say in: its reply gets the middle value of those that do.

    Not their mean, which one of them could put anywhere. With too few to outvote liars, what was before. Changes `fits`.
    """
    for name in {n for parts in still.values() for n in before if n.startswith(parts)}:
        own = {fit.hospital: fit for fit in fits if not name.startswith(still.get(fit.hospital, ()))}
        enough = len(own) >= 2 * liars + 1
        filled = Array(middle([view(fit.arrays[name], name) for fit in own.values()])) if enough else before[name]
        for fit in fits:
            if fit.hospital not in own or not enough:
                fit.arrays[name] = filled


def _zeros(like: Values) -> dict[str, NDArray[np.float64]]:
    """In pieces of memory that are long enough for large pages, by a tenth faster than many short ones, and short enough to be
    let go one after the other.  # measured"""
    groups: list[list[str]] = [[]]
    for name in like:
        if sum(like[one].size for one in groups[-1]) >= PIECE:
            groups.append([])
        groups[-1].append(name)
    made: dict[str, NDArray[np.float64]] = {}
    for group in groups:
        ends = np.cumsum([like[name].size for name in group])
        parts = np.split(np.zeros(int(ends[-1])), ends[:-1])
        made |= {name: part.reshape(like[name].shape) for name, part in zip(group, parts, strict=True)}
    return made


def _add(total: NDArray[np.float64], value: NDArray[np.float32], weight: float) -> None:
    """In place: total += weight x value."""
    if weight == 1.0:
        np.add(
            total, value, out=total
        )  # numpy widens a few thousand values at a time; torch's add_ makes a copy of all
        return
    for some, of in tiles(total, value):
        some += np.multiply(of, weight, dtype="float64")


def _reply(arrays: ArrayRecord, weight: float) -> Message:
    content = RecordDict({ARRAYS: arrays, METRICS: MetricRecord({WEIGHT: weight})})
    return Message(content, NOBODY, MessageType.TRAIN)
