"""The rounds of a run, around any Flower strategy. Read this file first.

introduce:  who is there, what do they predict
each round: ask ─ collect ─ check ─ aggregate ─ checkpoint ─ evaluate ─ record
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedmm.config import RunConfig
from fedmm.errors import MessageInvalid, RunFailed
from fedmm.federation.checks import MAX_WEIGHT, Failure, Fit, Scored, check_fits, check_scores, collect
from fedmm.federation.messages import (
    EvaluateAsk,
    Hello,
    TrainAsk,
    array_record,
    config_record,
    decode,
    encode,
    size_bytes,
)
from fedmm.federation.strategies import restore_strategy, strategy_state
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.plan import PrivacyPlan
from fedmm.schema import Labels
from fedmm.training.checkpoint import Checkpoint

POLL_SECONDS = 0.2  # guess: how often to ask Flower whether a hospital has connected


@dataclass(frozen=True)
class Members:
    """Hospitals of a run by node id, and those that could not take part from the start."""

    hello: Mapping[int, Hello]
    failures: tuple[Failure, ...]

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


@dataclass(frozen=True)
class RoundRecord:
    """One line of run.jsonl.

    epsilon: by hospital what its ledger says: spent, ceiling, delta, unprotected (releases that no epsilon covers),
    ledger_sequence, ledger_hash.  evaluated: whether scores were asked for.  scores: by hospital; withheld: hospitals
    whose policy keeps scores at home.
    """

    round: int
    rounds: int
    private: bool
    trained: list[str]
    failures: list[dict[str, Any]]
    epsilon: dict[str, dict[str, Any]]
    bytes_up: int
    bytes_down: int
    seconds: float
    evaluated: bool = False
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    withheld: list[str] = field(default_factory=list)


def introduce(grid: Grid, *, at_least: int, wait: float) -> Members:
    """Wait until `at_least` nodes are there, ask each one who it is. Raises: RunFailed if too few say so in time."""
    end = time.monotonic() + wait
    while len(nodes := sorted(grid.get_node_ids())) < at_least:
        if time.monotonic() > end:
            raise RunFailed(
                f"{len(nodes)} of at least {at_least} hospitals connected within {wait:.0f} s",
                fix="start the missing hospitals, or lower federation.min_hospitals",
            )
        time.sleep(POLL_SECONDS)
    questions = [_message(RecordDict(), MessageType.QUERY, node) for node in nodes]
    found: dict[int, Hello] = {}

    def use(reply: Message, _: str) -> None:
        hello = decode(reply.content, Hello)
        if any(hello.hospital == other.hospital for other in found.values()):
            raise MessageInvalid(f"two hospitals call themselves {hello.hospital}")
        found[reply.metadata.src_node_id] = hello

    # by node id, so that not the order of arrival decides which of two namesakes stays
    replies = sorted(grid.send_and_receive(questions, timeout=wait), key=lambda reply: reply.metadata.src_node_id)
    failures = collect(replies, {node: f"node {node}" for node in nodes}, use)
    if len(found) < at_least:
        raise RunFailed(f"only {len(found)} of at least {at_least} hospitals can take part", why=_list(failures))
    return Members(found, tuple(failures))


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
) -> Iterator[RoundRecord]:
    """The rounds after `start`, one record each. `save` gets the state after each round, before its record exists.

    Raises: RunFailed if fewer than `federation.min_hospitals` usable replies are left.
    """
    settings, rounds = config.flat(), config.federation.rounds
    arrays = array_record(start.weights)
    shapes = {name: tuple(value.shape) for name, value in start.weights.items()}
    if start.round:
        restore_strategy(strategy, start.strategy, arrays)
    for number in range(start.round + 1, rounds + 1):
        began = time.monotonic()
        # 1 ask
        _check_connected(grid, members, number, at_least=config.federation.min_hospitals)
        ask = TrainAsk(run=run, round=number, settings=settings, spec=spec, plan=plan.to_flat())
        questions = [
            message
            for message in strategy.configure_train(number, arrays, config_record(ask), grid)
            if message.metadata.dst_node_id in members.names
        ]
        # 2 collect
        replies = grid.send_and_receive(questions, timeout=config.federation.round_timeout)
        # 3 check
        cap = 1.0 if config.federation.weights == "uniform" else MAX_WEIGHT
        fits, failures = check_fits(replies, members.names, run=run, round_number=number, shapes=shapes, max_weight=cap)
        if len(fits) < config.federation.min_hospitals:
            raise RunFailed(
                f"round {number}: {len(fits)} usable replies, "
                f"federation.min_hospitals is {config.federation.min_hospitals}",
                why=_list(failures),
            )
        # 4 aggregate
        arrays = _aggregate(strategy, number, fits)
        # 5 checkpoint, with the record so far: a crash in the evaluation must not lose what was trained and charged
        record = RoundRecord(
            round=number,
            rounds=rounds,
            private=plan.private,
            trained=[fit.hospital for fit in fits],
            failures=[asdict(failure) for failure in failures],
            epsilon={fit.hospital: _epsilon(fit) for fit in fits},
            bytes_up=sum(fit.size for fit in fits),
            bytes_down=sum(size_bytes(message) for message in questions),
            seconds=time.monotonic() - began,
        )
        notes = {"run": run, "record": asdict(record)}
        save(Checkpoint(number, _tensors(arrays), strategy_state(strategy), notes))
        # 6 evaluate
        every = config.federation.evaluate_every
        if number == rounds or (every and number % every == 0):
            scored = _evaluate(grid, members, arrays, EvaluateAsk(run=run, round=number, settings=settings, spec=spec))
            record = replace(
                record,
                evaluated=True,
                scores=scored.scores,
                withheld=scored.withheld,
                failures=record.failures + [asdict(failure) for failure in scored.failures],
                seconds=time.monotonic() - began,
            )
        # 7 record
        yield record


def _check_connected(grid: Grid, members: Members, number: int, *, at_least: int) -> None:
    """Before anybody is charged for a round that cannot count; Flower's strategies would wait for ever for a first node.

    Raises: RunFailed that names who is gone.
    """
    connected = set(grid.get_node_ids())
    gone = sorted(name for node, name in members.names.items() if node not in connected)
    if len(members.names) - len(gone) < at_least:
        raise RunFailed(
            f"round {number}: {len(members.names) - len(gone)} hospitals are connected, "
            f"federation.min_hospitals is {at_least}",
            why=f"not connected: {', '.join(gone)}",
        )


def _aggregate(strategy: Strategy, number: int, fits: list[Fit]) -> ArrayRecord:
    arrays, _ = strategy.aggregate_train(number, [fit.message for fit in fits])
    if arrays is None:
        raise RunFailed(f"round {number}: the strategy gave no weights")
    weights = _tensors(arrays)
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise RunFailed(
            f"round {number}: the aggregated weights are not finite",
            fix="lower training.learning_rate or federation.server_learning_rate",
        )
    return array_record(weights)


def _evaluate(grid: Grid, members: Members, arrays: ArrayRecord, ask: EvaluateAsk) -> Scored:
    content = encode(ask, weights=_tensors(arrays))
    questions = [_message(content, MessageType.EVALUATE, node) for node in sorted(members.names)]
    replies = grid.send_and_receive(questions, timeout=float(ask.settings["federation.round_timeout"]))
    return check_scores(replies, members.names, run=ask.run, round_number=ask.round)


def _tensors(arrays: ArrayRecord) -> dict[str, torch.Tensor]:
    """float32: a strategy may compute in double (FedAdam and FedYogi do), hospitals and checkpoints do not."""
    return {name: torch.from_numpy(array.numpy().astype("float32")) for name, array in arrays.items()}


def _epsilon(fit: Fit) -> dict[str, Any]:
    reply = fit.reply
    return {
        "spent": reply.epsilon,
        "ceiling": reply.ceiling,
        "delta": reply.delta,
        "unprotected": reply.unprotected,
        "ledger_sequence": reply.ledger_sequence,
        "ledger_hash": reply.ledger_hash,
    }


def _message(content: Any, kind: str, node: int) -> Message:
    return Message(content=content, message_type=kind, dst_node_id=node)


def _list(failures: list[Failure]) -> str:
    return "; ".join(f"{f.hospital}: {f.reason}" for f in failures) or "no hospital answered"
