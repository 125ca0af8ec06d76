"""Rounds with hospitals that follow a script: who is left out, who is named, when it ends, and that it can go on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MessageType
from flwr.common.serde import message_to_proto
from flwr.serverapp.strategy import strategy_utils

from fedmm.config import RunConfig
from fedmm.errors import UNEXPECTED_CODE, MessageInvalid, RunFailed
from fedmm.federation import rounds
from fedmm.federation.checks import Failure
from fedmm.federation.local import LocalGrid
from fedmm.federation.members import MAX_RAISE, Members, agree, introduce
from fedmm.federation.messages import EXACT, HELLO, HISTOGRAM, UPDATE, WITHHELD, PlanAsk, array_record
from fedmm.federation.rounds import RoundRecord, run_rounds
from fedmm.federation.strategies import make_strategy
from fedmm.privacy.plan import PrivacyPlan, make_plan
from fedmm.report.record import append_round, progress_line, read_rounds
from fedmm.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedmm.training.histograms import noise_std, noisy_score
from tests.federation.scripted import (
    LABELS,
    REFUSAL,
    RUN,
    SHAPES,
    SPEC,
    fit_reply,
    hello,
    noisy_histogram,
    weights,
)

APP = "tests.federation.scripted:app"
NAMES = ("aachen", "basel", "chur")  # nodes 2, 3, 4


class WatchedGrid(LocalGrid):
    """Writes down who is asked what and how much comes back; loses what `deaf` nodes say; `present` limits who is connected."""

    def __init__(self, nodes: list[dict[str, str]]) -> None:
        super().__init__(APP, nodes)
        self.asked: list[tuple[str, int]] = []
        self.crossed: list[tuple[int, int]] = []  # of each reply the node, and its content's bytes on the wire
        self.deaf: set[int] = set()
        self.present: set[int] | None = None

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if self.present is None or node in self.present]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        messages = list(messages)
        self.asked += [(m.metadata.message_type, m.metadata.dst_node_id) for m in messages]
        replies = super().send_and_receive(messages, timeout=timeout)
        heard = [reply for reply in replies if reply.metadata.src_node_id not in self.deaf]
        self.crossed += [(reply.metadata.src_node_id, bytes_on_the_wire(reply)) for reply in heard]
        return heard


def bytes_on_the_wire(message: Message) -> int:
    """Counted from Flower's own protobuf of the whole message, not by our code."""
    proto = message_to_proto(message)
    return len(proto.error.reason.encode()) if message.has_error() else len(proto.content.SerializeToString())


def hospitals(**scripts: dict[str, str]) -> WatchedGrid:
    """Three hospitals; scripts: name to what it does when, and its `metrics` and `least_noise`."""
    nodes = []
    for name in NAMES:
        script = dict(scripts.get(name, {}))
        says = {key: script.pop(key) for key in ("metrics", "least_noise") if key in script}
        nodes.append({"name": name, "script": json.dumps(script), **says})
    return WatchedGrid(nodes)


def settings(**changes: Any) -> RunConfig:
    federation = {"rounds": 3, "min_hospitals": 2, "strategy": "fedavg", "evaluate_every": 0}
    flat = {f"federation.{key}": value for key, value in (federation | changes).items()}
    return RunConfig.from_flat({"privacy.enabled": False, **flat})


def private_plan(config: RunConfig, *, evaluation: float = 0.5) -> PrivacyPlan:
    """What privacy would make of it, without the seconds of a calibration."""
    return replace(make_plan(config), private=True, noise_multiplier=1.0, evaluation_noise=evaluation)


def introduced(grid: LocalGrid, *, at_least: int, wait: float = 5.0) -> Members:
    return introduce(grid, PlanAsk(plan={}, rounds=3), at_least=at_least, wait=wait)


class Run:
    """A run that keeps what it saved and recorded, in the order in which that happened."""

    def __init__(
        self, grid: LocalGrid, config: RunConfig, *, start: Checkpoint | None = None, plan: PrivacyPlan | None = None
    ) -> None:
        self.events: list[tuple[str, int]] = []
        self.saved: dict[int, Checkpoint] = {}
        self.records: list[RoundRecord] = []
        self.members = introduced(grid, at_least=config.federation.min_hospitals)
        self._rounds = run_rounds(
            grid,
            make_strategy(config.federation),
            run=RUN,
            config=config,
            spec=SPEC,
            plan=plan or make_plan(config),
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
    members = introduced(hospitals(), at_least=3)
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


def test_a_hospital_that_declines_is_known_by_its_name_and_never_asked() -> None:
    grid = hospitals(basel={"hello": "decline"})
    run = Run(grid, settings(rounds=1)).finish()
    assert run.members.failures == (Failure("basel", "refused", 1001, f"{REFUSAL}  [2J"),)
    assert [(a.hospital, a.what) for a in run.members.arrived] == [
        ("aachen", HELLO),
        ("basel", "refusal 1001"),
        ("chur", HELLO),
    ]
    assert 3 not in [node for kind, node in grid.asked if kind != MessageType.QUERY]
    with pytest.raises(RunFailed, match="only 2 of at least 3") as caught:
        introduced(hospitals(basel={"hello": "decline"}), at_least=3)
    assert f"basel: {REFUSAL}" in caught.value.why


def test_a_hospital_that_says_nothing_at_first_is_written_down_as_silent() -> None:
    grid = hospitals()
    grid.deaf = {4}
    members = introduced(grid, at_least=2)
    assert [(f.hospital, f.kind) for f in members.failures] == [("node 4", "silent")]


@pytest.mark.parametrize("arrival", [1, -1], ids=["in order", "backwards"])
def test_of_two_hospitals_with_one_name_the_second_is_left_out(arrival: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = WatchedGrid([{"name": "aachen"}, {"name": "aachen"}, {"name": "chur"}])
    answers = grid.send_and_receive
    monkeypatch.setattr(grid, "send_and_receive", lambda m, *, timeout: list(answers(m, timeout=timeout))[::arrival])
    members = introduced(grid, at_least=2)
    assert members.names == {2: "aachen", 4: "chur"}
    assert [(f.hospital, f.kind) for f in members.failures] == [("node 3", "invalid")]
    assert "aachen" in members.failures[0].reason


def test_hospitals_that_predict_different_labels_are_named() -> None:
    grid = WatchedGrid([{"name": "aachen"}, {"name": "basel"}, {"name": "chur", "labels": "other"}])
    with pytest.raises(RunFailed, match="aachen and chur predict different labels"):
        introduced(grid, at_least=3).labels  # noqa: B018


def test_too_few_introductions_end_the_run_and_say_why() -> None:
    with pytest.raises(RunFailed) as caught:
        introduced(hospitals(aachen={"hello": "refuse"}, chur={"hello": "garbage"}), at_least=2)
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
    assert introduced(grid, at_least=2, wait=60.0).names == {2: "aachen", 3: "basel"}
    assert len(waits) == 2


def test_waiting_for_hospitals_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, clock = hospitals(), [0.0]
    grid.present = {2}
    monkeypatch.setattr(rounds.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    with pytest.raises(RunFailed, match="1 of at least 2 hospitals connected within 60 s"):
        introduced(grid, at_least=2, wait=60.0)
    assert 60 <= clock[0] < 62
    assert grid.asked == []


# --- a plan that all ledgers have room for ------------------------------------------------------------------------------


def members(**least_noise: float) -> Members:
    return Members({i: hello(n, least_noise=least) for i, (n, least) in enumerate(least_noise.items(), start=2)}, ())


PLAN = private_plan(settings())  # its noise is 1


def test_the_plan_stays_where_all_ledgers_have_room_for_it() -> None:
    there = members(aachen=1.0, basel=1.0)
    assert agree(PLAN, there, at_least=2) == (PLAN, there)


def test_the_noise_is_raised_to_what_the_fullest_ledger_has_room_for() -> None:
    there = members(aachen=1.0, basel=2.5, chur=1.7)
    plan, stay = agree(PLAN, there, at_least=2)
    assert plan == replace(PLAN, noise_multiplier=2.5)
    assert stay == there


def test_a_hospital_that_would_drown_the_others_is_left_out_and_raises_nothing() -> None:
    there = members(aachen=1.0, basel=MAX_RAISE * 1.01, chur=1.5)
    plan, stay = agree(PLAN, replace(there, failures=(Failure("node 9", "silent", 0, ""),)), at_least=2)
    assert plan.noise_multiplier == 1.5
    assert stay.names == {2: "aachen", 4: "chur"}
    assert [(f.hospital, f.kind, f.code) for f in stay.failures] == [
        ("node 9", "silent", 0),
        ("basel", "refused", 1001),
    ]
    assert "noise 4.04; the plan has 1" in stay.failures[1].reason


def test_a_hospital_that_needs_just_as_much_as_is_allowed_stays() -> None:
    plan, stay = agree(PLAN, members(aachen=1.0, basel=MAX_RAISE), at_least=2)
    assert plan.noise_multiplier == MAX_RAISE
    assert len(stay.hello) == 2


def test_too_few_with_budget_left_end_the_run_and_are_named() -> None:
    with pytest.raises(RunFailed, match="only 1 of at least 2 hospitals have budget left") as caught:
        agree(PLAN, members(aachen=1.0, basel=9.0, chur=50.0), at_least=2)
    assert "basel: BUDGET_EXHAUSTED" in caught.value.why
    assert "chur: BUDGET_EXHAUSTED" in caught.value.why
    assert "aachen" not in caught.value.why


def test_a_run_without_privacy_agrees_on_no_noise_whatever_a_hospital_claims() -> None:
    plan, stay = agree(make_plan(settings()), members(aachen=0.0, basel=3.0), at_least=1)
    assert plan.noise_multiplier == 0
    assert stay.names == {2: "aachen"}
    assert [f.hospital for f in stay.failures] == ["basel"]


def test_what_hospitals_say_first_reaches_the_agreement() -> None:
    grid = hospitals(basel={"least_noise": "2.5"}, chur={"metrics": "no"})
    there = introduced(grid, at_least=3)
    assert agree(PLAN, there, at_least=3)[0].noise_multiplier == 2.5
    assert [there.hello[node].metrics for node in (2, 3, 4)] == ["exact", "exact", "no"]


def test_each_introduction_is_written_down_with_the_bytes_that_crossed() -> None:
    grid = hospitals(basel={"hello": "refuse"}, chur={"hello": "garbage"})
    there = introduced(grid, at_least=1)
    assert [(a.hospital, a.what, a.bytes) for a in there.arrived] == [
        ("aachen", HELLO, grid.crossed[0][1]),
        ("node 3", "refusal 1001", len(REFUSAL)),
        ("node 4", "unusable", grid.crossed[2][1]),
    ]


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_a_quiet_run_records_each_round_once_and_changes_the_weights() -> None:
    run = Run(hospitals(), settings()).finish()
    assert [(r.round, r.rounds) for r in run.records] == [(1, 3), (2, 3), (3, 3)]
    for record in run.records:
        assert record.trained == list(NAMES)
        assert record.failures == []
        assert record.private is False
        assert record.epsilon["basel"]["spent"] == 0.25 * record.round + (0.125 if record.evaluated else 0)
        assert record.epsilon["basel"]["ledger_sequence"] == 7
        assert record.epsilon["basel"]["ledger_signature"] == fit_reply("basel").ledger_signature
        assert record.epsilon["basel"]["ledger_key"] == fit_reply("basel").ledger_key
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
        ("huge", Failure("basel", "invalid", MessageInvalid.code, "the update is longer than")),
        ("forged", Failure("basel", "invalid", MessageInvalid.code, "the statement about the ledger is not signed")),
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


@pytest.mark.parametrize(("weights_of", "counts"), [("uniform", False), ("declared", True), ("noisy", True)])
def test_a_weight_above_one_counts_only_where_hospitals_count_differently(weights_of: str, *, counts: bool) -> None:
    record = Run(hospitals(basel={"train 1": "heavy"}), settings(rounds=1, weights=weights_of)).step()
    assert ("basel" in record.trained) is counts


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
    run = Run(grid, settings(connect_seconds=0))
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


def test_weights_that_overflow_end_the_run_before_they_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(hospitals(), settings())
    run.step()
    gone = array_record({name: value * math.inf for name, value in weights().items()})
    monkeypatch.setattr("flwr.serverapp.strategy.FedAvg.aggregate_train", lambda *_: (gone, None))
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


# --- scores that cost epsilon -----------------------------------------------------------------------------------------

NOISY = {"metrics": "noisy"}


def scoring(grid: WatchedGrid, *, evaluation: float = 0.5, **changes: Any) -> Run:
    config = settings(**{"evaluate_every": 1, **changes})
    return Run(grid, config, plan=private_plan(config, evaluation=evaluation)).finish()


def asked_for_scores(grid: WatchedGrid) -> list[int]:
    return [node for kind, node in grid.asked if kind == MessageType.EVALUATE]


def test_noisy_hospitals_are_asked_once_after_the_last_round_exact_ones_each_time_and_the_others_never() -> None:
    grid = hospitals(aachen=NOISY, basel={"metrics": "no"})
    run = scoring(grid)
    assert asked_for_scores(grid) == [4, 4, 2, 4]
    assert [sorted(record.scores) for record in run.records] == [["chur"], ["chur"], ["aachen", "chur"]]
    assert [record.withheld for record in run.records] == [["basel"]] * 3
    assert [record.failures for record in run.records] == [[], [], []]


def test_where_the_plan_has_no_noise_for_scores_noisy_hospitals_are_not_asked() -> None:
    grid = hospitals(aachen=NOISY)
    record = scoring(grid, evaluation=0.0).records[-1]
    assert set(asked_for_scores(grid)) == {3, 4}
    assert record.pooled is None
    assert sorted(record.scores) == ["basel", "chur"]


def test_where_all_keep_their_scores_nobody_is_asked_and_the_record_says_so() -> None:
    grid = hospitals(**{name: {"metrics": "no"} for name in NAMES})
    run = scoring(grid)
    assert asked_for_scores(grid) == []
    assert [(r.evaluated, r.scores, r.pooled, r.withheld) for r in run.records] == [(True, {}, None, list(NAMES))] * 3


def test_noisy_scores_and_those_of_all_histograms_together_are_in_the_last_record() -> None:
    record = scoring(hospitals(aachen=NOISY, basel=NOISY)).records[-1]
    std = noise_std(LABELS, 0.5)
    for name in ("aachen", "basel"):
        assert record.scores[name] == noisy_score(noisy_histogram(name), LABELS, noise_std=std)
    both = [a + b for a, b in zip(noisy_histogram("aachen"), noisy_histogram("basel"), strict=True)]
    assert record.pooled == noisy_score(both, LABELS, noise_std=std * math.sqrt(2))
    assert record.pooled is not None
    assert record.pooled["patients"] > 1.5 * record.scores["aachen"]["patients"]
    assert "noisy" not in record.scores["chur"]
    json.dumps(vars(record), allow_nan=False)


def test_the_ledgers_statement_of_a_round_includes_what_its_scores_cost() -> None:
    scripts = {"aachen": {**NOISY, "train 3": "refuse"}, "basel": {"metrics": "no"}, "chur": {"evaluate 2": "forged"}}
    spent = [{name: e["spent"] for name, e in r.epsilon.items()} for r in scoring(hospitals(**scripts)).records]
    assert spent == [
        {"aachen": 0.25, "basel": 0.25, "chur": 0.375},
        {"aachen": 0.5, "basel": 0.5, "chur": 0.5},  # a forged statement counts for nothing
        {"aachen": 0.875, "basel": 0.75, "chur": 0.875},  # trained or not
    ]


def test_a_refusal_and_silence_about_scores_leave_the_others_pool() -> None:
    grid = hospitals(aachen=NOISY, basel={**NOISY, "evaluate 3": "refuse"}, chur={**NOISY, "evaluate 3": "withhold"})
    record = scoring(grid).records[-1]
    assert record.pooled == record.scores["aachen"]
    assert record.withheld == ["chur"]
    assert [(f["hospital"], f["kind"]) for f in record.failures] == [("basel", "refused")]


# --- what left --------------------------------------------------------------------------------------------------------


def test_every_message_is_written_down_with_exactly_the_bytes_that_crossed() -> None:
    grid = hospitals(
        aachen={**NOISY, "train 2": "refuse"},
        basel={"train 1": "nan", "evaluate 2": "withhold"},
        chur={"train 3": "raise", "evaluate 3": "garbage"},
    )
    run = scoring(grid, min_hospitals=1)
    said = [(a.hospital, a.bytes) for a in run.members.arrived]
    said += [(a["hospital"], a["bytes"]) for record in run.records for a in record.arrived]
    assert sorted(said) == sorted((run.members.names[node], size) for node, size in grid.crossed)
    assert sum(record.bytes_up for record in run.records) == sum(size for _, size in grid.crossed[3:])
    kinds = [[(a["hospital"], a["what"]) for a in record.arrived] for record in run.records]
    scored = {("basel", EXACT), ("chur", EXACT)}
    assert [len(kind) for kind in kinds] == [5, 5, 6]
    assert set(kinds[0]) == {("aachen", UPDATE), ("basel", "unusable"), ("chur", UPDATE)} | scored
    assert set(kinds[1]) == {
        ("aachen", "refusal 1001"),
        ("basel", UPDATE),
        ("chur", UPDATE),
        ("basel", WITHHELD),
        ("chur", EXACT),
    }
    assert {("aachen", HISTOGRAM), ("chur", f"refusal {UNEXPECTED_CODE}"), ("chur", "unusable")} < set(kinds[2])


def test_what_is_not_heard_is_not_counted() -> None:
    grid = hospitals()
    run = Run(grid, settings())
    grid.deaf = {4}
    record = run.step()
    assert [a["hospital"] for a in record.arrived] == ["aachen", "basel"]
    assert record.bytes_up == sum(size for _, size in grid.crossed[3:])


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedmedian", "geomedian"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_with_the_same_bits(strategy: str, stop: int, tmp_path: Path) -> None:
    scripts = {"basel": {"train 2": "refuse", "train 4": "nan"}}
    config = settings(rounds=4, strategy=strategy, server_learning_rate=0.5, evaluate_every=2, clip_norm=0.5)
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


def test_an_evaluation_that_was_interrupted_comes_first_when_the_run_goes_on() -> None:
    """Noisy scores are asked for once, after the last round: they must not be lost to a restart there."""
    config = settings(rounds=2)
    plan = private_plan(config)
    whole = Run(hospitals(basel={"metrics": "noisy"}), config, plan=plan).finish()
    last = whole.records[-1]
    assert last.pooled is not None
    cut = replace(last, evaluated=False, scores={}, pooled=None, withheld=[])
    again = hospitals(basel={"metrics": "noisy"})
    records = list(
        run_rounds(
            again,
            make_strategy(config.federation),
            run=RUN,
            config=config,
            spec=SPEC,
            plan=plan,
            members=introduced(again, at_least=2),
            start=whole.saved[2],
            save=lambda _: None,
            unfinished=cut,
        )
    )
    assert [(record.round, record.evaluated) for record in records] == [(2, True)]
    assert records[0].pooled is not None
    assert set(records[0].scores) == set(last.scores)
