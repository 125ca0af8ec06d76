"""Checks on replies before anything is aggregated: hospital by hospital, the round goes on without an offender.

Flower's FedAvg ends the run on one reply with other keys, and averages NaN, negative and 1e12 weights (../shared/flower.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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

Shapes = Mapping[str, tuple[int, ...]]
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
    """The typed failure in an error reply; None if there is content. Unknown codes keep no text: it could be anything.

    The text of a known code is kept on one line: it goes to terminals and logs.
    """
    if not message.has_error():
        if message.has_content():
            return None
        return Failure(hospital, "invalid", MessageInvalid.code, "a reply without content")
    code = message.error.code
    reason = "".join(c if c.isprintable() else " " for c in (message.error.reason or "")[:300])
    if code in REFUSALS:
        return Failure(hospital, "refused", code, reason)
    if code == UNEXPECTED_CODE:
        return Failure(hospital, "failed", code, reason)
    return Failure(hospital, "failed", code, "the hospital's app failed or is out of reach; see the log there")


def collect(replies: Iterable[Message], names: Mapping[int, str], use: Callable[[Message, str], None]) -> list[Failure]:
    """Give `use` the first reply of each node that was asked, if it has content. Never raises for a reply's content.

    names: by id the nodes that were asked.  use: gets a message and the hospital's name; may raise MessageInvalid.
    Returns all that was not used, silence included, in order of the hospital's name.
    """
    heard: set[int] = set()
    failures: list[Failure] = []
    for message in replies:
        node = message.metadata.src_node_id
        hospital = names.get(node, f"node {node}")
        try:
            if node not in names:
                raise MessageInvalid("a reply from a node that was not asked")
            if node in heard:
                raise MessageInvalid("a second reply in the same round")
            heard.add(node)
            failure = failure_of(message, hospital)
            if failure is None:
                use(message, hospital)
        except MessageInvalid as error:
            failure = Failure(hospital, "invalid", error.code, error.what)
        if failure is not None:
            failures.append(failure)
    failures += [Failure(names[node], "silent", 0, "no answer in time") for node in set(names) - heard]
    return sorted(failures, key=lambda failure: failure.hospital)


def check_fits(
    replies: Iterable[Message],
    names: Mapping[int, str],
    *,
    run: str,
    round_number: int,
    shapes: Shapes,
    max_weight: float = MAX_WEIGHT,
) -> tuple[list[Fit], list[Failure]]:
    """Sort replies into usable ones, in order of the hospital's name, and failures. Never raises for a reply's content.

    names: node id to the hospital's name, from its Hello.  shapes: the model's tensors.
    max_weight: 1 where all hospitals count the same, or one could claim the average for itself.
    """
    fits: list[Fit] = []

    def use(message: Message, hospital: str) -> None:
        fit = _fit(message, hospital, run=run, round_number=round_number, shapes=shapes, max_weight=max_weight)
        fits.append(fit)

    failures = collect(replies, names, use)
    return sorted(fits, key=lambda fit: fit.hospital), failures


def _fit(message: Message, hospital: str, *, run: str, round_number: int, shapes: Shapes, max_weight: float) -> Fit:
    reply = decode(message.content, FitReply)
    if (reply.hospital, reply.run, reply.round) != (hospital, run, round_number):
        raise MessageInvalid("the reply names another hospital, run or round")
    metrics = message.content.metric_records.get(METRICS)
    weight = metrics.get(WEIGHT) if metrics is not None else None
    if not isinstance(weight, int | float) or not 0 < weight <= max_weight:  # false for NaN
        raise MessageInvalid("the reply's weight in the average is not a number in range")
    weights = decode_weights(message.content, shapes)
    size = size_bytes(message)
    message.content = RecordDict({ARRAYS: array_record(weights), METRICS: MetricRecord({WEIGHT: float(weight)})})
    return Fit(hospital, reply, message, size)


@dataclass(frozen=True)
class Scored:
    """scores: by hospital.  withheld: hospitals that keep theirs at home.  failures: the rest."""

    scores: dict[str, dict[str, object]]
    withheld: list[str]
    failures: list[Failure]


def check_scores(replies: Iterable[Message], names: Mapping[int, str], *, run: str, round_number: int) -> Scored:
    """Sort the replies to an evaluation, in order of the hospital's name. Never raises for a reply's content."""
    scores: dict[str, dict[str, object]] = {}
    withheld: list[str] = []

    def use(message: Message, hospital: str) -> None:
        reply = decode(message.content, ScoreReply)
        if (reply.hospital, reply.run, reply.round) != (hospital, run, round_number):
            raise MessageInvalid("the reply names another hospital, run or round")
        if reply.scores is None:
            withheld.append(hospital)
        else:
            scores[hospital] = reply.scores

    failures = collect(replies, names, use)
    return Scored(dict(sorted(scores.items())), sorted(withheld), failures)
