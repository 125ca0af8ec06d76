"""Rules that f lying hospitals among n cannot bend at will, as Flower strategies.

    federation.strategy   n at least   the next weights are
    fedmedian             2 f + 1      of each weight the middle value (Yin et al. 2018); Flower's own
    fedtrimmedavg         2 f + 1      of each weight the mean without the f smallest and f largest (Yin et al. 2018); Flower's own
    krum                  2 f + 3      the reply that lies closest to its n - f - 2 nearest ones (Blanchard et al. 2017)
    multikrum             2 f + 3      the mean of the n - f - 2 best of these (El Mhamdi et al. 2018)
    geomedian             2 f + 1      the point of the least sum of distances (Pillutla et al. 2022)

Replies were checked before, so that all values are finite. All hospitals count alike: who lies would lie about its weight as
well. None of the rules remembers anything between rounds.

Flower's Krum is not used: it works out distances as |x|² + |y|² - 2xy in float32, in which updates that are small beside the
weights drown (a test shows it choosing a liar), and weighs the ones it has chosen by what they say of themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg, FedTrimmedAvg
from numpy.typing import NDArray

from fedmm.config import ROBUST, FederationConfig
from fedmm.errors import ConfigError
from fedmm.federation.messages import ARRAYS

SMOOTHING = 1e-6  # nu of Pillutla et al. 2022, their default
MAX_STEPS, TOLERANCE = (
    100,
    1e-7,
)  # of Weiszfeld: a step this short beside the distances ends it; 10 to 40 steps  # measured

Values = Mapping[str, NDArray[Any]]


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


class TrimmedMean(FedTrimmedAvg):
    """Flower's, leaving out exactly `byzantine` values at each end, however many hospitals answered."""

    def __init__(self, *, byzantine: int, **common: Any) -> None:
        super().__init__(**common)
        self._byzantine = byzantine

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        # It leaves out int(beta n); the quarter keeps rounding from making f - 1 of it (1 / 49 x 49 is below 1)
        self.beta = (self._byzantine + 0.25) / max(1, len(replies))
        return super().aggregate_train(server_round, replies)


class Krum(FedAvg):
    """many: the mean of the n - f - 2 best, else the best alone. Ties go to who comes first by name."""

    def __init__(self, *, byzantine: int, many: bool, **common: Any) -> None:
        super().__init__(**common)
        self._byzantine, self._many = byzantine, many

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        sent = _sent(replies)
        close = len(sent) - self._byzantine - 2
        if close < 1:
            return None, None
        best = by_closeness(sent, close)[: close if self._many else 1]
        return _record(weighted_mean([sent[i] for i in sorted(best)], [1.0] * len(best))), None


class GeometricMedian(FedAvg):
    """By the smoothed Weiszfeld algorithm, from the middle values on: a far liar does not even delay it."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        sent = _sent(replies)
        return (_record(geometric_median(sent)), None) if sent else (None, None)


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
    """The point whose distances to all of `sent` have the smallest sum, within TOLERANCE. Never NaN for finite values."""
    point: Values = {name: np.median([one[name] for one in sent], axis=0).astype("float64") for name in sent[0]}
    for _ in range(MAX_STEPS):
        lengths = [distance(point, one) for one in sent]
        after = weighted_mean(sent, [1 / max(SMOOTHING, length) for length in lengths])
        step, point = distance(after, point), after
        if step <= TOLERANCE * max(SMOOTHING, float(np.median(lengths))):
            break
    return point


def weighted_mean(sent: Sequence[Values], weights: Sequence[float]) -> Values:
    """In double. weights: above 0."""
    total = sum(weights)
    return {
        name: np.asarray(
            sum((one[name].astype("float64") * (w / total) for one, w in zip(sent, weights, strict=True)), 0.0)
        )
        for name in sent[0]
    }


def distance(left: Values, right: Values) -> float:
    """L2, over all weights together, in double: of the differences, so that what is small beside the weights counts."""
    return math.sqrt(sum(float(np.square(left[n].astype("float64") - right[n].astype("float64")).sum()) for n in left))


def _sent(replies: Iterable[Message]) -> list[Values]:
    return [{n: array.numpy() for n, array in reply.content.array_records[ARRAYS].items()} for reply in replies]


def _record(values: Values) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value, dtype="float32")) for name, value in values.items()})
