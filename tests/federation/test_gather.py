"""Who takes part under which name, and asking again: hospitals that are out of reach for a while lose no round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from flwr.app import Message, MessageType

from fedmm.errors import RunFailed
from fedmm.federation.members import introduce
from fedmm.federation.messages import PlanAsk
from tests.federation.test_rounds import Run, WatchedGrid, hospitals, settings

ASK = PlanAsk(plan={}, rounds=3)


def asked_to_train(grid: WatchedGrid) -> dict[int, int]:
    """How often each node was asked; in which order within a round is chance, Flower's."""
    return dict(sorted(Counter(node for kind, node in grid.asked if kind == MessageType.TRAIN).items()))


def lose(grid: WatchedGrid, monkeypatch: pytest.MonkeyPatch, answers: dict[int, int]) -> None:
    """answers: by node id how many of its next answers to training get lost."""
    send = grid.send_and_receive

    def some(messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        messages = list(messages)
        training = any(message.metadata.message_type == MessageType.TRAIN for message in messages)
        kept = []
        for reply in send(messages, timeout=timeout):
            node = reply.metadata.src_node_id
            if training and answers.get(node, 0):
                answers[node] -= 1
            else:
                kept.append(reply)
        return kept

    monkeypatch.setattr(grid, "send_and_receive", some)


def test_nobody_introduces_itself_under_a_name_that_its_kit_was_not_made_for() -> None:
    grid = hospitals()
    members = introduce(grid, ASK, at_least=1, wait=5.0, kits=lambda: {2: "aachen", 3: "chur", 4: "basel"})
    assert members.names == {2: "aachen"}
    assert [(f.hospital, f.kind) for f in members.failures] == [("basel", "invalid"), ("chur", "invalid")]
    assert members.failures[0].reason == "it calls itself chur, and its kit was made for basel"
    with pytest.raises(RunFailed, match="can take part") as failed:
        introduce(grid, ASK, at_least=1, wait=5.0, kits=dict)
    assert "made for nobody" in failed.value.why


def test_who_was_out_of_reach_is_asked_again_while_too_few_have_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = hospitals()
    run = Run(grid, settings(min_hospitals=3, rounds=1, retries=2))
    lose(grid, monkeypatch, {3: 2, 4: 1})
    record = run.step()
    assert record.trained == ["aachen", "basel", "chur"]
    assert asked_to_train(grid) == {2: 1, 3: 3, 4: 2}
    failed = [(f["hospital"], f["kind"]) for f in record.failures]
    assert failed == [("basel", "silent"), ("chur", "silent"), ("basel", "silent")]
    assert record.bytes_up == sum(arrival["bytes"] for arrival in record.arrived)


def test_the_same_weights_come_out_however_often_somebody_had_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, lossy = hospitals(), hospitals()
    config = settings(min_hospitals=3, rounds=2, retries=3)
    expected, run = Run(quiet, config).finish(), Run(lossy, config)
    lose(lossy, monkeypatch, {2: 3, 4: 1})
    run.finish()
    for number in (1, 2):
        for name, value in expected.saved[number].weights.items():
            assert value.equal(run.saved[number].weights[name]), name


def test_nobody_is_asked_again_once_enough_have_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = hospitals()
    run = Run(grid, settings(min_hospitals=2, rounds=1, retries=2))
    lose(grid, monkeypatch, {3: 1})
    assert run.step().trained == ["aachen", "chur"]
    assert asked_to_train(grid) == {2: 1, 3: 1, 4: 1}


def test_who_said_no_or_sent_nonsense_is_not_asked_again() -> None:
    grid = hospitals(basel={"train 1": "refuse"}, chur={"train 1": "nan"})
    run = Run(grid, settings(min_hospitals=2, rounds=1, retries=5))
    with pytest.raises(RunFailed, match="1 usable replies"):
        run.step()
    assert asked_to_train(grid) == {2: 1, 3: 1, 4: 1}


def test_after_the_last_attempt_the_run_ends_and_says_who_was_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = hospitals()
    run = Run(grid, settings(min_hospitals=3, rounds=1, retries=1))
    lose(grid, monkeypatch, {4: 9})
    with pytest.raises(RunFailed, match="2 usable replies") as failed:
        run.step()
    assert "chur: no answer in time" in failed.value.why
    assert asked_to_train(grid) == {2: 1, 3: 1, 4: 2}


def test_a_round_waits_for_those_it_needs_and_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = hospitals()
    run = Run(grid, settings(min_hospitals=2, rounds=1, connect_seconds=30))
    grid.present = {2}
    waited = []

    def come_back(seconds: float) -> None:
        waited.append(seconds)
        grid.present = {2, 4} if len(waited) == 3 else grid.present

    monkeypatch.setattr("fedmm.federation.gather.time.sleep", come_back)
    assert run.step().trained == ["aachen", "chur"]
    assert len(waited) == 3
    run = Run(hospitals(), settings(min_hospitals=2, rounds=1, connect_seconds=0))
    run._rounds.gi_frame.f_locals["grid"].present = {2}
    with pytest.raises(RunFailed, match="1 hospitals are connected") as failed:
        run.step()
    assert failed.value.why == "not connected: basel, chur"
