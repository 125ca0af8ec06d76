"""The rounds of a run, around any Flower strategy. Read this file first.

introduce, agree (members.py):  who is there, what do they predict, how much noise do their ledgers need; agree on a plan
each round:                     ask ─ collect ─ check ─ add (gather.py) ─ aggregate ─ checkpoint ─ evaluate ─ record
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedmm.config import RunConfig
from fedmm.federation.aggregation import Aggregator, tensors
from fedmm.federation.checks import Asked, Scored, check_scores
from fedmm.federation.gather import Course, gather
from fedmm.federation.members import Members
from fedmm.federation.messages import EvaluateAsk, Statement, encode, fresh_nonce, size_bytes
from fedmm.federation.watch import NOBODY, Watch, as_they_come
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.plan import PrivacyPlan
from fedmm.training import histograms
from fedmm.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class RoundRecord:
    """One line of run.jsonl.

    epsilon: by hospital what its ledger says: spent, ceiling, delta, unprotected (releases that no epsilon covers), its
    head (ledger_sequence, ledger_hash, ledger_signature, ledger_key), nonce and release of the answer that it came with, and
    statement_signature over all of it.
    arrived: every message that left a hospital.  evaluated: whether scores were asked for.  scores: by hospital.
    pooled: of the noisy ones together, None if there are none.  withheld: hospitals whose policy keeps scores at home.
    """

    round: int
    rounds: int
    private: bool
    trained: list[str]
    failures: list[dict[str, Any]]
    epsilon: dict[str, dict[str, Any]]
    arrived: list[dict[str, Any]]
    bytes_up: int
    bytes_down: int
    seconds: float
    evaluated: bool = False
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    pooled: dict[str, Any] | None = None
    withheld: list[str] = field(default_factory=list)


def run_rounds(
    grid: Grid,
    strategy: Strategy,
    *,
    run: str,
    config: RunConfig,
    spec: ModelSpec,
    plan: PrivacyPlan,
    members: Members,
    start: Checkpoint,
    save: Callable[[Checkpoint], None],
    unfinished: RoundRecord | None = None,
    watch: Watch = NOBODY,
) -> Iterator[RoundRecord]:
    """The rounds after `start`, one record each. `save` gets the state after each round, before its record exists.

    unfinished: record of the round of `start`, if it was interrupted after the checkpoint: it comes first, evaluated.
    watch: is told what happens; changes nothing.
    Raises: RunFailed if fewer than `federation.min_hospitals` usable replies are left.
    """
    course = Course(grid, members, run, config, spec, plan, watch)
    declared = {hello.hospital: hello.modalities for hello in members.hello.values()}
    weights = Aggregator(strategy, config, declared=declared, start=start)
    if unfinished is not None:
        yield _evaluated(course, weights.model, unfinished)
    for number in range(start.round + 1, config.federation.rounds + 1):
        began = time.monotonic()
        # 1 ask, 2 collect, check and add each reply as it comes
        watch.phase("ask", round=number)
        got = gather(course, weights, number)
        # 3 aggregate
        watch.phase("aggregate")
        weights.finish(number)
        # 4 checkpoint, with the record so far: a crash in the evaluation must not lose what was trained and charged
        record = RoundRecord(
            round=number,
            rounds=config.federation.rounds,
            private=plan.private,
            trained=list(got.used),
            failures=[asdict(failure) for failure in got.failures],
            epsilon={hospital: _epsilon(said) for hospital, said in got.used.items()},
            arrived=[asdict(arrival) for arrival in got.arrived],
            bytes_up=sum(arrival.bytes for arrival in got.arrived),
            bytes_down=got.bytes_down,
            seconds=time.monotonic() - began,
        )
        notes = {"run": run, "record": asdict(record)}
        save(Checkpoint(number, tensors(weights.arrays), weights.state(), notes))
        # 5 evaluate
        record = _evaluated(course, weights.model, record)
        # 6 record
        yield replace(record, seconds=time.monotonic() - began)


def _evaluated(course: Course, arrays: ArrayRecord, record: RoundRecord) -> RoundRecord:
    """The record, with scores if this round is one of those that are evaluated."""
    config, members, watch = course.config, course.members, course.watch
    every, last = config.federation.evaluate_every, record.round == config.federation.rounds
    if not last and not (every and record.round % every == 0):
        return record
    names = members.who_score(course.plan, last=last)
    asked = Asked(course.run, record.round, fresh_nonce(), members.keys)
    ask = EvaluateAsk(
        run=course.run,
        round=record.round,
        nonce=asked.nonce,
        settings=config.flat(),
        spec=course.spec,
        plan=course.plan.to_flat(),
    )
    content = encode(ask, arrays=arrays)
    questions = [Message(content, node, MessageType.EVALUATE) for node in sorted(names)]
    watch.asked(names.values(), bytes=sum(size_bytes(message) for message in questions[:1]) * len(questions))
    watch.phase("evaluate")
    replies = course.grid.send_and_receive(questions, timeout=config.federation.round_timeout) if questions else []
    length, noise = histograms.cells(course.spec.labels), course.plan.evaluation_noise
    came = as_they_come(replies, names, watch)
    scored = check_scores(came, names, asked, length=length, noise_multiplier=noise)
    watch.heard(scored.heard)
    return _scored(record, scored, course)


def _scored(record: RoundRecord, scored: Scored, course: Course) -> RoundRecord:
    """The record with what an evaluation brought; scores of noisy histograms are computed here, post-processing."""
    members, labels, plan = course.members, course.spec.labels, course.plan
    std = histograms.noise_std(labels, plan.evaluation_noise)
    noisy = {name: histograms.noisy_score(h, labels, noise_std=std) for name, h in scored.histograms.items()}
    pooled = None
    if scored.histograms:
        total = [sum(cell) for cell in zip(*scored.histograms.values(), strict=True)]
        pooled = histograms.noisy_score(total, labels, noise_std=std * math.sqrt(len(scored.histograms)))
    home = {hello.hospital for hello in members.hello.values() if hello.metrics == "no"}
    return replace(
        record,
        evaluated=True,
        epsilon={**record.epsilon, **{name: _epsilon(said) for name, said in sorted(scored.statements.items())}},
        scores=dict(sorted({**scored.scores, **noisy}.items())),
        pooled=pooled,
        withheld=sorted(home | set(scored.withheld)),
        failures=record.failures + [asdict(failure) for failure in scored.heard.failures],
        arrived=record.arrived + [asdict(arrival) for arrival in scored.heard.arrived],
        bytes_up=record.bytes_up + sum(arrival.bytes for arrival in scored.heard.arrived),
    )


def _epsilon(reply: Statement) -> dict[str, Any]:
    return {
        "spent": reply.epsilon,
        "ceiling": reply.ceiling,
        "delta": reply.delta,
        "unprotected": reply.unprotected,
        "ledger_sequence": reply.ledger_sequence,
        "ledger_hash": reply.ledger_hash,
        "ledger_signature": reply.ledger_signature,
        "statement_signature": reply.statement_signature,
        "ledger_key": reply.ledger_key,
        "nonce": reply.nonce,
        "release": reply.release,
    }
