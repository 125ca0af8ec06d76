"""Checks on replies before anything is aggregated: hospital by hospital, the round goes on without an offender.

Flower's FedAvg ends the run on one reply with other keys, and averages NaN, negative and 1e12 weights (../shared/flower.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Message, MetricRecord, RecordDict

from fedmm.errors import REFUSALS, UNEXPECTED_CODE, MessageInvalid
from fedmm.federation.messages import (
    ARRAYS,
    METRICS,
    WEIGHT,
    FitReply,
    ScoreReply,
    array_record,
    decode,
    decode_weights,
    size_bytes,
)

MAX_WEIGHT = 1e6  # guess: above any declared bound of patients


@dataclass(frozen=True)
class Failure:
    """A hospital that did not take part. kind: refused (its own decision), failed, invalid, silent."""

    hospital: str
    kind: str
    code: int
    reason: str


@dataclass(frozen=True)
class Fit:
    """A reply that passed. message: the reply with only the checked arrays and weight left in it, for the strategy."""

    hospital: str
    reply: FitReply
    message: Message
    size: int


def failure_of(message: Message, hospital: str) -> Failure | None:
    """The typed failure in an error reply; None if there is content. Unknown codes keep no text: it could be anything."""
    if not message.has_error():
        return None
    code, reason = message.error.code, message.error.reason or ""
    if code in REFUSALS:
        return Failure(hospital, "refused", code, reason[:300])
    if code == UNEXPECTED_CODE:
        return Failure(hospital, "failed", code, reason[:300])
    return Failure(hospital, "failed", code, "the hospital's app failed or is out of reach; see the log there")


def check_fits(
    replies: Iterable[Message],
    names: Mapping[int, str],
    *,
    run: str,
    round_number: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[list[Fit], list[Failure]]:
    """Sort replies into usable ones, in order of the hospital's name, and failures. Never raises for a reply's content.

    names: node id to the hospital's name, from its Hello.  shapes: the model's tensors.
    """
    fits: dict[int, Fit] = {}
    failures: list[Failure] = []
    for message in replies:
        node = message.metadata.src_node_id
        hospital = names.get(node, f"node {node}")
        failure = failure_of(message, hospital)
        if failure is None:
            try:
                if node not in names:
                    raise MessageInvalid("a reply from a node that was not asked")
                if node in fits:
                    raise MessageInvalid("a second reply in the same round")
                fits[node] = _fit(message, hospital, run=run, round_number=round_number, shapes=shapes)
            except MessageInvalid as error:
                failure = Failure(hospital, "invalid", error.code, error.what)
        if failure is not None:
            failures.append(failure)
    answered = set(fits) | {node for node, name in names.items() if any(f.hospital == name for f in failures)}
    for node in sorted(set(names) - answered):
        failures.append(Failure(names[node], "silent", 0, "no answer within the round's time"))
    return sorted(fits.values(), key=lambda fit: fit.hospital), sorted(failures, key=lambda f: f.hospital)


def _fit(
    message: Message, hospital: str, *, run: str, round_number: int, shapes: Mapping[str, tuple[int, ...]]
) -> Fit:
    reply = decode(message.content, FitReply)
    if (reply.hospital, reply.run, reply.round) != (hospital, run, round_number):
        raise MessageInvalid("the reply names another hospital, run or round")
    metrics = message.content.metric_records.get(METRICS)
    weight = metrics.get(WEIGHT) if metrics is not None else None
    if not isinstance(weight, int | float) or not (math.isfinite(weight) and 0 < weight <= MAX_WEIGHT):
        raise MessageInvalid("the reply's weight in the average is not a number in range")
    weights = decode_weights(message.content, shapes)
    size = size_bytes(message)
    message.content = RecordDict({ARRAYS: array_record(weights), METRICS: MetricRecord({WEIGHT: float(weight)})})
    return Fit(hospital, reply, message, size)


def check_scores(
    replies: Iterable[Message], names: Mapping[int, str], *, run: str, round_number: int
) -> tuple[dict[str, dict[str, object]], list[Failure]]:
    """Scores by hospital, of those that sent any, and failures."""
    scores: dict[str, dict[str, object]] = {}
    failures = []
    for message in replies:
        hospital = names.get(message.metadata.src_node_id, "unknown")
        failure = failure_of(message, hospital)
        if failure is None:
            try:
                reply = decode(message.content, ScoreReply)
                if (reply.hospital, reply.run, reply.round) != (hospital, run, round_number):
                    raise MessageInvalid("the reply names another hospital, run or round")
                if reply.scores is not None:
                    scores[hospital] = reply.scores
            except MessageInvalid as error:
                failure = Failure(hospital, "invalid", error.code, error.what)
        if failure is not None:
            failures.append(failure)
    return dict(sorted(scores.items())), failures
