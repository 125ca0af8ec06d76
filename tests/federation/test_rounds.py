"""Rounds with hospitals that follow a script: who is left out, who is named, when it ends, and that it can go on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MessageType
from flwr.serverapp.strategy import strategy_utils

from fedmm.config import RunConfig
from fedmm.errors import UNEXPECTED_CODE, MessageInvalid, RunFailed
from fedmm.federation import rounds
from fedmm.federation.checks import Failure
from fedmm.federation.local import LocalGrid
from fedmm.federation.rounds import RoundRecord, introduce, run_rounds
from fedmm.federation.strategies import make_strategy
from fedmm.privacy.plan import make_plan
from fedmm.report.record import append_round, progress_line, read_rounds
from fedmm.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tests.federation.scripted import LABELS, REFUSAL, RUN, SHAPES, SPEC, weights

APP = "tests.federation.scripted:app"
NAMES = ("aachen", "basel", "chur")  # nodes 2, 3, 4


class WatchedGrid(LocalGrid):
    """Writes down who is asked what; loses what `deaf` nodes say; `present` limits who is connected."""

    def __init__(self, nodes: list[dict[str, str]]) -> None:
        super().__init__(APP, nodes)
        self.asked: list[tuple[str, int]] = []
        self.deaf: set[int] = set()
        self.present: set[int] | None = None

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if self.present is None or node in self.present]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        messages = list(messages)
        self.asked += [(m.metadata.message_type, m.metadata.dst_node_id) for m in messages]
        replies = super().send_and_receive(messages, timeout=timeout)
        return [reply for reply in replies if reply.metadata.src_node_id not in self.deaf]


def hospitals(**scripts: dict[str, str]) -> WatchedGrid:
    """Three hospitals; scripts: name to what it does when."""
    return WatchedGrid([{"name": name, "script": json.dumps(scripts.get(name, {}))} for name in NAMES])


def settings(**changes: Any) -> RunConfig:
    federation = {"rounds": 3, "min_hospitals": 2, "strategy": "fedavg", "evaluate_every": 0}
    flat = {f"federation.{key}": value for key, value in (federation | changes).items()}
    return RunConfig.from_flat({"privacy.enabled": False, **flat})


class Run:
    """A run that keeps what it saved and recorded, in the order in which that happened."""

    def __init__(self, grid: LocalGrid, config: RunConfig, *, start: Checkpoint | None = None) -> None:
        self.events: list[tuple[str, int]] = []
        self.saved: dict[int, Checkpoint] = {}
        self.records: list[RoundRecord] = []
        self.members = introduce(grid, at_least=config.federation.min_hospitals, wait=5.0)
        self._rounds = run_rounds(
            grid,
            make_strategy(config.federation),
            run=RUN,
            config=config,
            spec=SPEC,
            plan=make_plan(config),
            members=self.members,
            start=start or Checkpoint(0, weights(), {}, {}),
            save=self._save,
        )

    def _save(self, checkpoint: Checkpoint) -> None:
        self.events.append(("checkpoint", checkpoint.round))
        self.saved[checkpoint.round] = checkpoint

    def step(self) -> RoundRecord:
        record = next(self._rounds)
        self.events.append(("record", record.round))
        self.records.append(record)
        return record

    def finish(self) -> Run:
        for record in self._rounds:
            self.events.append(("record", record.round))
            self.records.append(record)
        return self


def total(checkpoint: Checkpoint) -> float:
    return sum(float(value.sum()) for value in checkpoint.weights.values())


# --- introductions ----------------------------------------------------------------------------------------------------


def test_hospitals_are_known_by_the_name_they_give() -> None:
    members = introduce(hospitals(), at_least=3, wait=5.0)
    assert members.names == {2: "aachen", 3: "basel", 4: "chur"}
    assert members.failures == ()
    assert members.labels == LABELS


@pytest.mark.parametrize(
    ("what", "kind", "code"),
    [("refuse", "refused", 1001), ("raise", "failed", UNEXPECTED_CODE), ("garbage", "invalid", MessageInvalid.code)],
)
def test_a_hospital_that_does_not_introduce_itself_is_written_down_and_never_asked(
    what: str, kind: str, code: int
) -> None:
    grid = hospitals(basel={"hello": what})
    run = Run(grid, settings()).finish()
    assert [(f.hospital, f.kind, f.code) for f in run.members.failures] == [("node 3", kind, code)]
    assert run.members.names == {2: "aachen", 4: "chur"}
    assert [node for kind, node in grid.asked if kind != MessageType.QUERY and node == 3] == []
    assert [record.trained for record in run.records] == [["aachen", "chur"]] * 3


def test_a_hospital_that_says_nothing_at_first_is_written_down_as_silent() -> None:
    grid = hospitals()
    grid.deaf = {4}
    members = introduce(grid, at_least=2, wait=5.0)
    assert [(f.hospital, f.kind) for f in members.failures] == [("node 4", "silent")]


@pytest.mark.parametrize("arrival", [1, -1], ids=["in order", "backwards"])
def test_of_two_hospitals_with_one_name_the_second_is_left_out(arrival: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = WatchedGrid([{"name": "aachen"}, {"name": "aachen"}, {"name": "chur"}])
    answers = grid.send_and_receive
    monkeypatch.setattr(grid, "send_and_receive", lambda m, *, timeout: list(answers(m, timeout=timeout))[::arrival])
    members = introduce(grid, at_least=2, wait=5.0)
    assert members.names == {2: "aachen", 4: "chur"}
    assert [(f.hospital, f.kind) for f in members.failures] == [("node 3", "invalid")]
    assert "aachen" in members.failures[0].reason


def test_hospitals_that_predict_different_labels_are_named() -> None:
    grid = WatchedGrid([{"name": "aachen"}, {"name": "basel"}, {"name": "chur", "labels": "other"}])
    with pytest.raises(RunFailed, match="aachen and chur predict different labels"):
        introduce(grid, at_least=3, wait=5.0).labels  # noqa: B018


def test_too_few_introductions_end_the_run_and_say_why() -> None:
    with pytest.raises(RunFailed) as caught:
        introduce(hospitals(aachen={"hello": "refuse"}, chur={"hello": "garbage"}), at_least=2, wait=5.0)
    assert "1 of at least 2" in caught.value.what
    assert REFUSAL in caught.value.why
    assert "node 2" in caught.value.why
    assert "node 4" in caught.value.why


def test_a_hospital_that_connects_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, waits = hospitals(), []
    grid.present = set()

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        assert grid.present is not None
        grid.present.add(2 + len(grid.present))

    monkeypatch.setattr(rounds.time, "sleep", sleep)
    assert introduce(grid, at_least=2, wait=60.0).names == {2: "aachen", 3: "basel"}
    assert len(waits) == 2


def test_waiting_for_hospitals_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, clock = hospitals(), [0.0]
    grid.present = {2}
    monkeypatch.setattr(rounds.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    with pytest.raises(RunFailed, match="1 of at least 2 hospitals connected within 60 s"):
        introduce(grid, at_least=2, wait=60.0)
    assert 60 <= clock[0] < 62
    assert grid.asked == []


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_a_quiet_run_records_each_round_once_and_changes_the_weights() -> None:
    run = Run(hospitals(), settings()).finish()
    assert [(r.round, r.rounds) for r in run.records] == [(1, 3), (2, 3), (3, 3)]
    for record in run.records:
        assert record.trained == list(NAMES)
        assert record.failures == []
        assert record.private is False
        assert record.epsilon["basel"]["spent"] == 0.25 * record.round
        assert record.epsilon["basel"]["ledger_sequence"] == 7
        assert record.bytes_up > 3 * sum(4 * torch.Size(shape).numel() for shape in SHAPES.values())
        assert record.bytes_down > 0
    assert len({total(run.saved[number]) for number in (1, 2, 3)}) == 3
    assert all(value.dtype == torch.float32 for value in run.saved[3].weights.values())


@pytest.mark.parametrize(
    ("what", "failure"),
    [
        ("refuse", Failure("basel", "refused", 1001, REFUSAL)),
        ("raise", Failure("basel", "failed", UNEXPECTED_CODE, "")),
        ("garbage", Failure("basel", "invalid", MessageInvalid.code, "")),
        ("nan", Failure("basel", "invalid", MessageInvalid.code, "")),
        ("double", Failure("basel", "invalid", MessageInvalid.code, "")),
    ],
)
def test_a_hospital_that_drops_out_of_round_two_is_named_and_the_others_train_on(what: str, failure: Failure) -> None:
    run = Run(hospitals(basel={"train 2": what}), settings()).finish()
    assert [record.trained for record in run.records] == [list(NAMES), ["aachen", "chur"], list(NAMES)]
    assert [len(record.failures) for record in run.records] == [0, 1, 0]
    (said,) = run.records[1].failures
    assert (said["hospital"], said["kind"], said["code"]) == (failure.hospital, failure.kind, failure.code)
    assert said["reason"].startswith(failure.reason)
    assert said["reason"]
    assert "basel" not in run.records[1].epsilon
    assert "Anna" not in str(run.records)


def test_a_round_counts_only_those_who_trained() -> None:
    alone = WatchedGrid([{"name": name} for name in NAMES])
    alone.deaf = {3}
    without = Run(alone, settings(rounds=1)).finish()
    refused = Run(hospitals(basel={"train 1": "refuse"}), settings(rounds=1)).finish()
    nan = Run(hospitals(basel={"train 1": "nan"}), settings(rounds=1)).finish()
    assert total(without.saved[1]) == total(refused.saved[1]) == total(nan.saved[1])
    assert total(without.saved[1]) != total(Run(hospitals(), settings(rounds=1)).finish().saved[1])


def test_a_hospital_that_does_not_answer_in_time_is_named() -> None:
    grid = hospitals()
    run = Run(grid, settings())
    grid.deaf = {4}
    record = run.step()
    assert [(f["hospital"], f["kind"]) for f in record.failures] == [("chur", "silent")]
    grid.deaf = set()
    assert run.step().trained == list(NAMES)


def test_too_few_usable_replies_end_the_run_and_name_who_and_why() -> None:
    run = Run(hospitals(aachen={"train 2": "refuse"}, chur={"train 2": "nan"}), settings())
    run.step()
    with pytest.raises(RunFailed) as caught:
        run.step()
    assert "round 2: 1 usable" in caught.value.what
    assert f"aachen: {REFUSAL}" in caught.value.why
    assert "chur: " in caught.value.why
    assert "basel" not in caught.value.why
    assert run.events == [("checkpoint", 1), ("record", 1)]


def test_a_checkpoint_is_saved_before_its_record_appears() -> None:
    run = Run(hospitals(), settings(rounds=2)).finish()
    assert run.events == [("checkpoint", 1), ("record", 1), ("checkpoint", 2), ("record", 2)]


def test_a_checkpoint_that_cannot_be_saved_ends_the_run_before_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(run: Run, checkpoint: Checkpoint) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Run, "_save", full)
    run = Run(hospitals(), settings())
    with pytest.raises(OSError, match="no space left"):
        run.step()
    assert run.records == []


def test_a_hospital_that_leaves_between_rounds_is_named_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy_utils, "sleep", lambda _: pytest.fail("waits for a hospital that has left"))
    grid = hospitals()
    run = Run(grid, settings(rounds=2))
    run.step()
    grid.present = {2, 4}
    record = run.step()
    assert record.trained == ["aachen", "chur"]
    assert [(f["hospital"], f["kind"]) for f in record.failures] == [("basel", "silent")]


@pytest.mark.parametrize("present", [{3}, set()])
def test_nobody_is_charged_for_a_round_that_cannot_count(present: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy_utils, "sleep", lambda _: pytest.fail("waits for a hospital that has left"))
    grid = hospitals()
    run = Run(grid, settings())
    run.step()
    grid.present, grid.asked = present, []
    with pytest.raises(RunFailed, match=f"round 2: {len(present)} hospitals are connected") as caught:
        run.step()
    assert "aachen" in caught.value.why
    assert "chur" in caught.value.why
    assert ("basel" in caught.value.why) is not bool(present)
    assert grid.asked == []


def test_a_node_that_joins_later_is_not_asked() -> None:
    grid = hospitals()
    grid.present = {2, 3}
    run = Run(grid, settings(rounds=2))
    grid.present = None
    run.finish()
    assert {node for _, node in grid.asked} == {2, 3}
    assert [record.trained for record in run.records] == [["aachen", "basel"]] * 2
    assert [record.failures for record in run.records] == [[], []]


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_weights_that_overflow_end_the_run_before_they_are_saved() -> None:
    config = settings(strategy="fedavgm", server_learning_rate=100.0)
    run = Run(hospitals(**{name: {"train 2": "huge"} for name in NAMES}), config)
    run.step()
    with pytest.raises(RunFailed, match="round 2: the aggregated weights are not finite"):
        run.step()
    assert run.events == [("checkpoint", 1), ("record", 1)]


def test_a_strategy_that_gives_nothing_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr.serverapp.strategy.FedAvg.aggregate_train", lambda *_: (None, None))
    with pytest.raises(RunFailed, match="gave no weights"):
        Run(hospitals(), settings()).step()


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "due"), [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])], ids=str
)
def test_evaluation_happens_when_it_is_due_and_after_the_last_round(every: int, due: list[int]) -> None:
    grid = hospitals()
    run = Run(grid, settings(rounds=5, evaluate_every=every)).finish()
    assert [r.round for r in run.records if r.evaluated] == due
    assert [r.round for r in run.records if set(r.scores) == set(NAMES)] == due
    assert len([1 for kind, _ in grid.asked if kind == MessageType.EVALUATE]) == len(due) * len(NAMES)


def test_hospitals_score_the_weights_of_the_checkpoint() -> None:
    run = Run(hospitals(), settings(evaluate_every=1)).finish()
    for record in run.records:
        seen = [scores["total"] for scores in record.scores.values()]
        assert seen == [pytest.approx(total(run.saved[record.round]))] * len(NAMES)


def test_withheld_refused_and_senseless_scores_are_told_apart() -> None:
    scripts = {
        "aachen": {"evaluate 1": "withhold"},
        "basel": {"evaluate 1": "refuse"},
        "chur": {"evaluate 1": "nonsense"},
    }
    record = Run(hospitals(**scripts), settings(rounds=1)).step()
    assert record.trained == list(NAMES)
    assert record.withheld == ["aachen"]
    assert record.scores == {}
    assert [(f["hospital"], f["kind"]) for f in record.failures] == [("basel", "refused"), ("chur", "invalid")]


def test_every_record_can_be_written_read_and_shown(tmp_path: Path) -> None:
    scripts = {"basel": {"train 1": "nan", "evaluate 1": "nonsense"}, "chur": {"evaluate 2": "refuse"}}
    run = Run(hospitals(**scripts), settings(rounds=2, evaluate_every=1)).finish()
    for record in run.records:
        append_round(tmp_path, record)
        json.dumps(vars(record), allow_nan=False)
        assert f"{len(record.trained)} of 3 hospitals" in progress_line(record, seconds_left=1.0)
    assert read_rounds(tmp_path) == [vars(record) for record in run.records]


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_with_the_same_bits(strategy: str, stop: int, tmp_path: Path) -> None:
    scripts = {"basel": {"train 2": "refuse", "train 4": "nan"}}
    config = settings(rounds=4, strategy=strategy, server_learning_rate=0.5, evaluate_every=2)
    whole = Run(hospitals(**scripts), config).finish()

    first = Run(hospitals(**scripts), config)
    for _ in range(stop):
        first.step()
    save_checkpoint(tmp_path, first.saved[stop])
    second = Run(hospitals(**scripts), config, start=load_checkpoint(tmp_path)).finish()

    assert [r.round for r in second.records] == list(range(stop + 1, 5))
    assert [r.trained for r in first.records + second.records] == [r.trained for r in whole.records]
    assert second.records[-1].scores == whole.records[-1].scores
    for part in ("weights", "strategy"):
        left, right = getattr(whole.saved[4], part), getattr(second.saved[4], part)
        assert set(left) == set(right)
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_finished_run_has_no_round_left() -> None:
    grid = hospitals()
    run = Run(grid, settings(), start=Checkpoint(3, weights(), {}, {})).finish()
    assert run.records == []
    assert {kind for kind, _ in grid.asked} == {MessageType.QUERY}
