"""The rounds of a run, around any Flower strategy. Read this file first.

introduce:  who is there, what do they predict, how much noise do their ledgers need; agree on a plan
each round: ask ─ collect ─ check ─ aggregate ─ checkpoint ─ evaluate ─ record
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedmm.config import RunConfig
from fedmm.errors import BudgetExhausted, MessageInvalid, RunFailed
from fedmm.federation.aggregation import Aggregator, tensors
from fedmm.federation.checks import (
    MAX_WEIGHT,
    Arrival,
    Expected,
    Failure,
    Scored,
    check_fits,
    check_scores,
    collect,
    declined,
)
from fedmm.federation.messages import (
    HELLO,
    EvaluateAsk,
    Hello,
    PlanAsk,
    Statement,
    TrainAsk,
    decode,
    encode,
    size_bytes,
)
from fedmm.federation.watch import NOBODY, Watch, as_they_come
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.plan import PrivacyPlan
from fedmm.schema import Labels
from fedmm.training import histograms
from fedmm.training.checkpoint import Checkpoint

MAX_RAISE = 4.0  # guess: a hospital that needs more noise than this many times the plan's is left out
POLL_SECONDS = 0.2  # guess: how often to ask Flower whether a hospital has connected


@dataclass(frozen=True)
class Members:
    """Hospitals of a run by node id, and those that could not take part from the start."""

    hello: Mapping[int, Hello]
    failures: tuple[Failure, ...]
    arrived: tuple[Arrival, ...] = ()

    @property
    def names(self) -> dict[int, str]:
        return {node: hello.hospital for node, hello in self.hello.items()}

    @property
    def labels(self) -> Labels:
        """The labels all agree on. Raises: RunFailed that names who differs."""
        hellos = sorted(self.hello.values(), key=lambda h: h.hospital)
        first = hellos[0]
        for other in hellos[1:]:
            if other.labels != first.labels:
                raise RunFailed(
                    f"{first.hospital} and {other.hospital} predict different labels",
                    why="one model is trained for all",
                    fix="make [labels] in every site.toml the same",
                )
        return first.labels

    def who_score(self, plan: PrivacyPlan, *, last: bool) -> dict[int, str]:
        """Nodes that are asked for scores: exact ones whenever the model is evaluated, noisy ones after the last round,
        where they are paid for once."""
        wanted = {"exact", "noisy"} if last and plan.evaluation_noise else {"exact"}
        return {node: hello.hospital for node, hello in self.hello.items() if hello.metrics in wanted}


@dataclass(frozen=True)
class RoundRecord:
    """One line of run.jsonl.

    epsilon: by hospital what its ledger says: spent, ceiling, delta, unprotected (releases that no epsilon covers), its
    head (ledger_sequence, ledger_hash, ledger_signature, ledger_key) and statement_signature over all of it.
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


def introduce(grid: Grid, ask: PlanAsk, *, at_least: int, wait: float) -> Members:
    """Wait until `at_least` nodes are there, ask each one who it is and whether it would take part in this plan.

    Raises: RunFailed if too few say so in time.
    """
    end = time.monotonic() + wait
    while len(nodes := sorted(grid.get_node_ids())) < at_least:
        if time.monotonic() > end:
            raise RunFailed(
                f"{len(nodes)} of at least {at_least} hospitals connected within {wait:.0f} s",
                fix="start the missing hospitals, or lower federation.min_hospitals",
            )
        time.sleep(POLL_SECONDS)
    questions = [_message(encode(ask), MessageType.QUERY, node) for node in nodes]
    found: dict[int, Hello] = {}

    def use(reply: Message, _: str) -> str:
        hello = decode(reply.content, Hello)
        if any(hello.hospital == other.hospital for other in found.values()):
            raise MessageInvalid(f"two hospitals call themselves {hello.hospital}")
        found[reply.metadata.src_node_id] = hello
        return f"refusal {hello.refusal_code}" if hello.refusal_code else HELLO

    # by node id, so that not the order of arrival decides which of two namesakes stays
    replies = sorted(grid.send_and_receive(questions, timeout=wait), key=lambda reply: reply.metadata.src_node_id)
    heard = collect(replies, {node: f"node {node}" for node in nodes}, use)
    names = {f"node {node}": hello.hospital for node, hello in found.items()}
    arrived = [replace(arrival, hospital=names.get(arrival.hospital, arrival.hospital)) for arrival in heard.arrived]
    refused = [declined(h.hospital, h.refusal_code, h.refusal) for h in found.values() if h.refusal_code]
    failures = sorted(heard.failures + refused, key=lambda failure: failure.hospital)
    stay = {node: hello for node, hello in found.items() if not hello.refusal_code}
    if len(stay) < at_least:
        raise RunFailed(f"only {len(stay)} of at least {at_least} hospitals can take part", why=_list(failures))
    return Members(stay, tuple(failures), tuple(arrived))


def agree(plan: PrivacyPlan, members: Members, *, at_least: int) -> tuple[PrivacyPlan, Members]:
    """The plan with the noise that all ledgers have room for, and the hospitals that can follow it.

    A hospital that has so little left that it would need more than MAX_RAISE times the plan's noise is left out: it would
    drown what the others have learnt. Raises: RunFailed if too few stay.
    """
    limit = plan.noise_multiplier * MAX_RAISE
    stay = {node: hello for node, hello in members.hello.items() if hello.least_noise <= limit}
    failures = [
        Failure(
            hello.hospital,
            "refused",
            BudgetExhausted.code,
            f"BUDGET_EXHAUSTED: its ledger has room for this run only with noise {hello.least_noise:.3g}; "
            f"the plan has {plan.noise_multiplier:.3g}",
        )
        for node, hello in members.hello.items()
        if node not in stay
    ]
    if len(stay) < at_least:
        raise RunFailed(
            f"only {len(stay)} of at least {at_least} hospitals have budget left for this run",
            why=_list(failures),
            fix="ask for fewer rounds or a smaller privacy.epsilon",
        )
    noise = max([plan.noise_multiplier, *(hello.least_noise for hello in stay.values())])
    return replace(plan, noise_multiplier=noise), replace(
        members, hello=stay, failures=(*members.failures, *sorted(failures, key=lambda f: f.hospital))
    )


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
    settings, rounds = config.flat(), config.federation.rounds
    declared = {hello.hospital: hello.modalities for hello in members.hello.values()}
    weights = Aggregator(strategy, config, declared=declared, start=start)
    if unfinished is not None:
        yield _evaluated(
            grid, members, weights.model, unfinished, run=run, config=config, spec=spec, plan=plan, watch=watch
        )
    for number in range(start.round + 1, rounds + 1):
        began = time.monotonic()
        # 1 ask
        watch.phase("ask", round=number)
        _check_connected(grid, members, number, at_least=config.federation.min_hospitals, watch=watch)
        ask = TrainAsk(run=run, round=number, settings=settings, spec=spec, plan=plan.to_flat())
        questions = weights.questions(number, ask, grid, members.names)
        bytes_down = sum(size_bytes(message) for message in questions)
        # 2 collect
        watch.asked(_asked(questions, members), bytes=bytes_down)
        watch.phase("collect")
        replies = grid.send_and_receive(questions, timeout=config.federation.round_timeout)
        # 3 check
        cap = 1.0 if config.federation.weights == "uniform" else MAX_WEIGHT
        expected = Expected(run, number, tensors(weights.arrays), config.training.max_update_norm, cap)
        came = as_they_come(replies, members.names, watch, then="check")
        fits, heard = check_fits(came, members.names, expected)
        watch.heard(heard)
        if len(fits) < config.federation.min_hospitals:
            raise RunFailed(
                f"round {number}: {len(fits)} usable replies, "
                f"federation.min_hospitals is {config.federation.min_hospitals}",
                why=_list(heard.failures),
            )
        # 4 aggregate
        watch.phase("aggregate")
        weights.take(number, fits)
        # 5 checkpoint, with the record so far: a crash in the evaluation must not lose what was trained and charged
        record = RoundRecord(
            round=number,
            rounds=rounds,
            private=plan.private,
            trained=[fit.hospital for fit in fits],
            failures=[asdict(failure) for failure in heard.failures],
            epsilon={fit.hospital: _epsilon(fit.reply) for fit in fits},
            arrived=[asdict(arrival) for arrival in heard.arrived],
            bytes_up=sum(arrival.bytes for arrival in heard.arrived),
            bytes_down=bytes_down,
            seconds=time.monotonic() - began,
        )
        notes = {"run": run, "record": asdict(record)}
        save(Checkpoint(number, tensors(weights.arrays), weights.state(), notes))
        # 6 evaluate
        record = _evaluated(
            grid, members, weights.model, record, run=run, config=config, spec=spec, plan=plan, watch=watch
        )
        # 7 record
        yield replace(record, seconds=time.monotonic() - began)


def _asked(questions: Iterable[Message], members: Members) -> list[str]:
    return [members.names[message.metadata.dst_node_id] for message in questions]


def _check_connected(grid: Grid, members: Members, number: int, *, at_least: int, watch: Watch) -> None:
    """Before anybody is charged for a round that cannot count; Flower's strategies would wait for ever for a first node.

    Raises: RunFailed that names who is gone.
    """
    connected = set(grid.get_node_ids())
    gone = sorted(name for node, name in members.names.items() if node not in connected)
    watch.gone(gone)
    if len(members.names) - len(gone) < at_least:
        raise RunFailed(
            f"round {number}: {len(members.names) - len(gone)} hospitals are connected, "
            f"federation.min_hospitals is {at_least}",
            why=f"not connected: {', '.join(gone)}",
        )


def _evaluated(
    grid: Grid,
    members: Members,
    arrays: ArrayRecord,
    record: RoundRecord,
    *,
    run: str,
    config: RunConfig,
    spec: ModelSpec,
    plan: PrivacyPlan,
    watch: Watch,
) -> RoundRecord:
    """The record, with scores if this round is one of those that are evaluated."""
    every, last = config.federation.evaluate_every, record.round == config.federation.rounds
    if not last and not (every and record.round % every == 0):
        return record
    asked = members.who_score(plan, last=last)
    ask = EvaluateAsk(run=run, round=record.round, settings=config.flat(), spec=spec, plan=plan.to_flat())
    content = encode(ask, arrays=arrays)
    questions = [_message(content, MessageType.EVALUATE, node) for node in sorted(asked)]
    watch.asked(asked.values(), bytes=sum(size_bytes(message) for message in questions[:1]) * len(questions))
    watch.phase("evaluate")
    replies = grid.send_and_receive(questions, timeout=config.federation.round_timeout) if questions else []
    length, noise = histograms.cells(spec.labels), plan.evaluation_noise
    came = as_they_come(replies, asked, watch)
    scored = check_scores(came, asked, run=run, round_number=record.round, length=length, noise_multiplier=noise)
    watch.heard(scored.heard)
    return _scored(record, scored, members, spec.labels, plan)


def _scored(record: RoundRecord, scored: Scored, members: Members, labels: Labels, plan: PrivacyPlan) -> RoundRecord:
    """The record with what an evaluation brought; scores of noisy histograms are computed here, post-processing."""
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
    }


def _message(content: Any, kind: str, node: int) -> Message:
    return Message(content=content, message_type=kind, dst_node_id=node)


def _list(failures: list[Failure]) -> str:
    return "; ".join(f"{f.hospital}: {f.reason}" for f in failures) or "no hospital answered"
