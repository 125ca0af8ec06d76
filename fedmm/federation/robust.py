"""Rules that f lying hospitals among n cannot bend at will, as Flower strategies.

    federation.strategy   n at least   the next weights are
    fedmedian             2 f + 1      of each weight the middle value (Yin et al. 2018)
    fedtrimmedavg         2 f + 1      of each weight the mean without the f smallest and f largest (Yin et al. 2018)
    krum                  2 f + 3      the reply that lies closest to its n - f - 2 nearest ones (Blanchard et al. 2017)
    multikrum             2 f + 3      the mean of the n - f - 2 best of these (El Mhamdi et al. 2018)
    geomedian             2 f + 1      the point of the least sum of distances (Pillutla et al. 2022)

Replies were checked before, so that all values are finite. All hospitals count alike: who lies would lie about its weight as
well. None of the rules remembers anything between rounds. All need every reply, where it lies in its message; beside them they
hold what comes out, once in float32 or double, and tiles of it.

Flower's median and trimmed mean are not used: of the longest tensor they hold every hospital's values twice more.
Flower's Krum is not used: it works out distances as |x|² + |y|² - 2xy in float32, in which updates that are small beside the
weights drown (a test shows it choosing a liar), and weighs the ones it has chosen by what they say of themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from fedmm.config import ROBUST, FederationConfig
from fedmm.errors import ConfigError
from fedmm.federation.messages import ARRAYS, records_of, views
from fedmm.federation.tiles import Values, distance, tiles

SMOOTHING = 1e-6  # nu of Pillutla et al. 2022, their default
MAX_STEPS, TOLERANCE = (
    100,
    1e-7,
)  # of Weiszfeld: a step this short beside the distances ends it; 10 to 40 steps  # measured


def check_rule(federation: FederationConfig) -> None:
    """Are there always enough hospitals for the rule? Raises: ConfigError with the numbers."""
    if federation.strategy not in ROBUST:
        return
    liars, (times, more) = federation.byzantine, ROBUST[federation.strategy]
    if not liars:
        raise ConfigError(
            f"federation.strategy = {federation.strategy} without a number of hospitals that may lie",
            why="how many hospitals it needs, and how many replies it leaves out, follows from that",
            fix=f"federation.byzantine = 1 and federation.min_hospitals = {times + more}, or another strategy",
        )
    if federation.min_hospitals < federation.needed:
        raise ConfigError(
            f"federation.strategy = {federation.strategy} with federation.byzantine = {liars} needs {federation.needed} "
            f"hospitals in every round; federation.min_hospitals is {federation.min_hospitals}",
            why=f"it withstands f liars only among n >= {times} f + {more}",
            fix=f"federation.min_hospitals = {federation.needed}, or fewer liars",
        )


class Rule(FedAvg):
    """A strategy whose next weights are `found` in all replies' weights. byzantine: f."""

    def __init__(self, *, byzantine: int = 0, **common: Any) -> None:
        super().__init__(**common)
        self._byzantine = byzantine

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        sent = [views(records_of(reply.content, ArrayRecord)[ARRAYS]) for reply in replies]
        found = self.found(sent) if sent else None
        if found is None:
            return None, None
        return ArrayRecord({name: Array(np.asarray(value, dtype="float32")) for name, value in found.items()}), None

    def found(self, sent: Sequence[Values]) -> Values | None:
        """None: there are too few. sent: one at least."""
        raise NotImplementedError


class Median(Rule):
    def found(self, sent: Sequence[Values]) -> Values | None:
        return {name: middle([one[name] for one in sent]) for name in sent[0]}


class TrimmedMean(Rule):
    """Leaves out exactly f values at each end, however many hospitals answered."""

    def found(self, sent: Sequence[Values]) -> Values | None:
        end = len(sent) - self._byzantine
        if end <= self._byzantine:
            return None
        return {n: ordered([one[n] for one in sent], keep=slice(self._byzantine, end)) for n in sent[0]}


class Krum(Rule):
    """many: the mean of the n - f - 2 best, else the best alone. Ties go to who comes first by name."""

    def __init__(self, *, many: bool, **common: Any) -> None:
        super().__init__(**common)
        self._many = many

    def found(self, sent: Sequence[Values]) -> Values | None:
        close = len(sent) - self._byzantine - 2
        if close < 1:
            return None
        best = by_closeness(sent, close)[: close if self._many else 1]
        return plain_mean([sent[i] for i in sorted(best)])


class GeometricMedian(Rule):
    """By the smoothed Weiszfeld algorithm, from the middle values on: a far liar does not even delay it."""

    def found(self, sent: Sequence[Values]) -> Values | None:
        return geometric_median(sent)


def middle(sent: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Of each value the median. sent: one at least, of one shape."""
    half = (len(sent) - 1) // 2
    return ordered(sent, keep=slice(half, len(sent) - half))


def ordered(sent: Sequence[NDArray[Any]], *, keep: slice) -> NDArray[Any]:
    """Of each value the mean of those that are in `keep` when all hospitals' are put in order, in double, as float32."""
    out = np.empty(sent[0].shape, "float32")
    for into, *some in tiles(out, *sent):
        into[...] = np.sort(np.stack(some), axis=0)[keep].mean(axis=0, dtype="float64")
    return out


def by_closeness(sent: Sequence[Values], close: int) -> list[int]:
    """Indices by the sum of squared distances to the `close` nearest others, the smallest first."""
    count = len(sent)
    squares = np.zeros((count, count))
    for i in range(count):
        for j in range(i):
            squares[i, j] = squares[j, i] = distance(sent[i], sent[j]) ** 2
    scores = [np.sort(np.delete(squares[i], i))[:close].sum() for i in range(count)]
    return [int(i) for i in np.argsort(scores, kind="stable")]


def geometric_median(sent: Sequence[Values]) -> Values:
    """The point whose distances to all of `sent` have the smallest sum, within TOLERANCE, in double. Never NaN for finite
    values."""
    point = {name: middle([one[name] for one in sent]).astype("float64") for name in sent[0]}
    lengths = [distance(point, one) for one in sent]
    for _ in range(MAX_STEPS):
        step, after = _towards(point, sent, [1 / max(SMOOTHING, length) for length in lengths])
        if step <= TOLERANCE * max(SMOOTHING, float(np.median(lengths))):
            break
        lengths = after
    return point


def _towards(point: Values, sent: Sequence[Values], weights: Sequence[float]) -> tuple[float, list[float]]:
    """Makes `point` the weighted mean of `sent`. Returns how far that was, and its distances to them."""
    moved, apart = 0.0, np.zeros(len(sent))
    for name, value in point.items():
        for here, *some in tiles(value, *(one[name] for one in sent)):
            mean = _mean(some, weights)
            moved += float(np.square(mean - here).sum())
            here[...] = mean
            apart += [float(np.square(mean - other).sum()) for other in some]
    return math.sqrt(moved), [math.sqrt(square) for square in apart]


def plain_mean(sent: Sequence[Values]) -> Values:
    """Worked out in double, as float32."""
    found: dict[str, NDArray[Any]] = {}
    for name, value in sent[0].items():
        found[name] = np.empty(value.shape, "float32")
        for into, *some in tiles(found[name], *(one[name] for one in sent)):
            into[...] = _mean(some, [1.0] * len(some))
    return found


def _mean(some: Sequence[NDArray[Any]], weights: Sequence[float]) -> NDArray[np.float64]:
    total, share = np.zeros(some[0].shape), sum(weights)
    for one, weight in zip(some, weights, strict=True):
        total += np.multiply(one, weight / share, dtype="float64")
    return total
