"""Checks on replies before anything is aggregated: hospital by hospital, the round goes on without an offender.

Flower's FedAvg ends the run on one reply with other keys, and averages NaN, negative and 1e12 weights (../shared/flower.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedmm.errors import REFUSALS, UNEXPECTED_CODE, MessageInvalid
from fedmm.federation.messages import (
    ARRAYS,
    BODY_JSON,
    EXACT,
    FRAME,
    HISTOGRAM,
    METRICS,
    NUMBER_JSON,
    STATEMENT_JSON,
    UPDATE,
    WEIGHT,
    WITHHELD,
    FitReply,
    ScoreReply,
    Statement,
    check_digest,
    check_records,
    decode,
    records_of,
    size_bytes,
    views,
)
from fedmm.federation.tiles import Values, distance
from fedmm.federation.wire import received
from fedmm.privacy.chain import is_signed, public_from_hex, statement_is_signed
from fedmm.training.local import Still

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
    """A reply that passed. arrays: its weights, all of them, decoded.  weight: in the average.  length: of its update, L2."""

    hospital: str
    reply: FitReply
    arrays: ArrayRecord
    weight: float
    length: float


def failure_of(message: Message, hospital: str) -> Failure | None:
    """The typed failure in an error reply; None if there is content. Unknown codes keep no text: it could be anything.

    The text of a known code is kept on one line: it goes to terminals and logs.
    """
    if not message.has_error():
        if message.has_content() and message.content:
            return None
        return Failure(hospital, "invalid", MessageInvalid.code, "a reply that is empty or cannot be read")
    return declined(hospital, message.error.code, message.error.reason or "")


def declined(hospital: str, code: int, text: str) -> Failure:
    """The typed failure of a hospital that said no. Unknown codes keep no text: it could be anything."""
    if code in REFUSALS:
        return Failure(hospital, "refused", code, one_line(text))
    if code == UNEXPECTED_CODE:
        return Failure(hospital, "failed", code, one_line(text))
    return Failure(hospital, "failed", code, "the hospital's app failed or is out of reach; see the log there")


def one_line(text: str) -> str:
    """What a peer wrote, fit for terminals and logs."""
    return "".join(c if c.isprintable() else " " for c in text[:300])


@dataclass(frozen=True)
class Arrival:
    """What came from a hospital, whatever was then done with it. what: its kind.  bytes: of its content."""

    hospital: str
    what: str
    bytes: int


@dataclass(frozen=True)
class Heard:
    """failures: all that was not used, silence included, in order of the hospital's name.  arrived: everything."""

    failures: list[Failure]
    arrived: list[Arrival]


def collect(replies: Iterable[Message], names: Mapping[int, str], use: Callable[[Message, str], str]) -> Heard:
    """Give `use` the first reply of each node that was asked, if it has content. Never raises for a reply's content.

    names: by id the nodes that were asked.  use: gets a message and the hospital's name, returns what it was; may raise
    MessageInvalid.
    """
    heard: set[int] = set()
    failures: list[Failure] = []
    arrived: list[Arrival] = []
    for message in replies:
        node = message.metadata.src_node_id
        hospital, what, size = names.get(node, f"node {node}"), "unusable", size_bytes(message)
        try:
            if node not in names:
                raise MessageInvalid("a reply from a node that was not asked")
            if node in heard:
                raise MessageInvalid("a second reply in the same round")
            heard.add(node)
            failure = failure_of(message, hospital)
            if failure is None:
                what = use(message, hospital)
            elif message.has_error():
                what = f"refusal {message.error.code}"
        except MessageInvalid as error:
            failure = Failure(hospital, "invalid", error.code, error.what)
        arrived.append(Arrival(hospital, what, size))
        if failure is not None:
            failures.append(failure)
    failures += [Failure(names[node], "silent", 0, "no answer in time") for node in set(names) - heard]
    arrived.sort(key=lambda arrival: (arrival.hospital, arrival.what))
    return Heard(sorted(failures, key=lambda failure: failure.hospital), arrived)


@dataclass(frozen=True)
class Asked:
    """What was asked of all hospitals. keys: by hospital its ledger's public key, as it introduced itself, hexadecimal."""

    run: str
    round: int
    nonce: str
    keys: Mapping[str, str]


@dataclass(frozen=True)
class Expected:
    """What a usable update of this round looks like.

    before: the weights that were sent.  max_norm: longest change of them.  max_weight: 1 where all hospitals count the
    same, or one could claim the average for itself.  wire: how updates are coded.  still: by hospital what it does not train.
    """

    asked: Asked
    before: ArrayRecord
    max_norm: float
    max_weight: float = MAX_WEIGHT
    wire: str = "fp32"
    still: Mapping[str, Still] = field(default_factory=dict)


def check_fits(
    replies: Iterable[Message], names: Mapping[int, str], expected: Expected, take: Callable[[Fit], None]
) -> Heard:
    """Give `take` each usable reply as it comes. Never raises for a reply's content.

    names: node id to the hospital's name, from its Hello.
    What came is taken out of its message, so that whoever holds the messages does not hold the weights: they are `take`'s.
    """
    before = views(expected.before)

    def use(message: Message, hospital: str) -> str:
        content, message.content = message.content, RecordDict()
        take(_fit(content, hospital, expected, before))
        return UPDATE

    return collect(replies, names, use)


def _fit(content: RecordDict, hospital: str, expected: Expected, before: Values) -> Fit:
    check_records(content, FRAME, ARRAYS, METRICS)
    reply = decode(content, FitReply, most=STATEMENT_JSON)
    _check_statement(reply, hospital, expected.asked)
    metrics = records_of(content, MetricRecord).get(METRICS, MetricRecord())
    weight = metrics.get(WEIGHT) if set(metrics) == {WEIGHT} else None
    if not isinstance(weight, int | float) or not 0 < weight <= expected.max_weight:  # false for NaN
        raise MessageInvalid("the reply's weight in the average is not a number in range")
    arrays = received(content, expected.before, before, expected.still.get(hospital, ()), expected.wire)
    check_digest(records_of(content, ArrayRecord)[ARRAYS], reply)
    length = distance(before, views(arrays))
    if not length <= expected.max_norm * (1 + 1e-3):  # false for NaN
        raise MessageInvalid(f"the update is longer than training.max_update_norm = {expected.max_norm:g}")
    return Fit(hospital, reply, arrays, float(weight), length)


def _check_statement(reply: Statement, hospital: str, asked: Asked) -> None:
    if (reply.hospital, reply.run, reply.round) != (hospital, asked.run, asked.round):
        raise MessageInvalid("the reply names another hospital, run or round")
    if reply.nonce != asked.nonce:
        raise MessageInvalid("the reply answers another ask than this one")
    if reply.ledger_key != asked.keys.get(hospital):
        raise MessageInvalid(
            "the reply is signed by another key than this hospital introduced itself with; "
            "if it has rotated its key, resume the run: it then introduces itself anew"
        )
    signed = statement_is_signed(reply.facts(), reply.statement_signature, reply.ledger_key) and is_signed(
        reply.ledger_hash, reply.ledger_signature, public_from_hex(reply.ledger_key)
    )
    if not signed:
        raise MessageInvalid("the statement about the ledger is not signed by its key")


@dataclass(frozen=True)
class Scored:
    """scores: exact ones by hospital.  histograms: noisy ones by hospital.  withheld: hospitals that keep theirs home.

    statements: of all three.
    """

    scores: dict[str, dict[str, Any]]
    histograms: dict[str, tuple[float, ...]]
    withheld: list[str]
    statements: dict[str, Statement]
    heard: Heard


def check_scores(
    replies: Iterable[Message], names: Mapping[int, str], asked: Asked, *, length: int, noise_multiplier: float
) -> Scored:
    """Sort the replies to an evaluation, in order of the hospital's name. Never raises for a reply's content.

    length: of a histogram.  noise_multiplier: that the plan gives it.
    """
    scores: dict[str, dict[str, Any]] = {}
    histograms: dict[str, tuple[float, ...]] = {}
    withheld: list[str] = []
    statements: dict[str, Statement] = {}

    def use(message: Message, hospital: str) -> str:
        check_records(message.content, FRAME)
        most = STATEMENT_JSON + max(BODY_JSON, NUMBER_JSON * length)
        reply = decode(message.content, ScoreReply, most=most)
        _check_statement(reply, hospital, asked)
        _check_scores(reply, length=length, noise_multiplier=noise_multiplier)
        statements[hospital] = reply
        if reply.scores is not None:
            scores[hospital] = reply.scores
            return EXACT
        if reply.histogram is not None:
            histograms[hospital] = reply.histogram
            return HISTOGRAM
        withheld.append(hospital)
        return WITHHELD

    heard = collect(replies, names, use)
    return Scored(dict(sorted(scores.items())), dict(sorted(histograms.items())), sorted(withheld), statements, heard)


def _check_scores(reply: ScoreReply, *, length: int, noise_multiplier: float) -> None:
    if reply.scores is not None and reply.histogram is not None:
        raise MessageInvalid("exact scores and a noisy histogram in one answer")
    if reply.histogram is not None:
        wanted = noise_multiplier > 0  # or one without noise would pass as charged
        if not wanted or len(reply.histogram) != length or reply.noise_multiplier != noise_multiplier:
            raise MessageInvalid("the score histogram has another length or noise than was asked for")
    check_digest(reply.scores if reply.scores is not None else reply.histogram, reply)
