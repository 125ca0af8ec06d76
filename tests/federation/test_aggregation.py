"""From replies to the next weights: averages over rounds, parts that some do not train, and going on bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MessageType

from fedmm.federation.aggregation import final_weights, tensors
from fedmm.federation.checks import Fit
from fedmm.federation.fold import Mean
from fedmm.federation.messages import ARRAYS, CORRECTION, array_record
from fedmm.federation.rounds import run_rounds
from fedmm.federation.strategies import make_strategy
from fedmm.privacy.plan import make_plan
from fedmm.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedmm.training.local import Still, still_parts
from tests.federation.scripted import RUN, SPEC, fit_reply, weights
from tests.federation.test_rounds import Run, WatchedGrid, hospitals, settings

DECAY = 0.7


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- the running average ----------------------------------------------------------------------------------------------


def test_the_model_is_the_running_average_and_rounds_go_on_from_the_last_weights() -> None:
    plain, averaged = (Run(hospitals(), settings(rounds=4, average=decay)).finish() for decay in (0.0, DECAY))
    factors = [(1 - DECAY) * DECAY ** (4 - number) / (1 - DECAY**4) for number in range(1, 5)]
    assert sum(factors) == pytest.approx(1)
    found = final_weights(averaged.saved[4], DECAY)
    for name in plain.saved[4].weights:
        assert same(plain.saved[3].weights, averaged.saved[3].weights), "hospitals train on what they would have"
        expected = sum(f * plain.saved[n].weights[name].double() for n, f in enumerate(factors, start=1))
        torch.testing.assert_close(found[name], expected.float() if isinstance(expected, torch.Tensor) else None)
    assert found["scale"].dtype == torch.float32
    assert final_weights(plain.saved[4], 0.0) is plain.saved[4].weights


def test_after_one_round_the_average_is_that_round() -> None:
    run = Run(hospitals(), settings(rounds=1, average=DECAY)).finish()
    found = final_weights(run.saved[1], DECAY)
    for name, value in run.saved[1].weights.items():
        torch.testing.assert_close(found[name], value)


def test_what_is_evaluated_is_the_average() -> None:
    plain, averaged = (
        Run(hospitals(), settings(rounds=3, average=decay, evaluate_every=1)).finish() for decay in (0.0, DECAY)
    )
    for number in (2, 3):
        found = averaged.records[number - 1].scores["aachen"]["total"]
        expected = sum(float(value.sum()) for value in final_weights(averaged.saved[number], DECAY).values())
        assert found == pytest.approx(expected, rel=1e-5)
        assert abs(found - plain.records[number - 1].scores["aachen"]["total"]) > 1e-3


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam", "scaffold"])
def test_a_run_that_was_interrupted_ends_as_an_unbroken_one(strategy: str, tmp_path: Path) -> None:
    config = settings(rounds=5, strategy=strategy, average=DECAY, evaluate_every=2)
    script = {"basel": {"train 3": "refuse"}}
    whole = Run(hospitals(**script), config).finish()
    first = Run(hospitals(**script), config)
    first.step()
    first.step()
    save_checkpoint(tmp_path, first.saved[2])
    rest = Run(hospitals(**script), config, start=load_checkpoint(tmp_path)).finish()
    assert same(rest.saved[5].weights, whole.saved[5].weights)
    assert same(rest.saved[5].strategy, whole.saved[5].strategy)
    assert same(final_weights(rest.saved[5], DECAY), final_weights(whole.saved[5], DECAY))
    assert rest.records[-1].scores == whole.records[-1].scores


# --- corrections cross ------------------------------------------------------------------------------------------------


class Opened(WatchedGrid):
    """Keeps what hospitals are asked to train with."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        messages = list(messages)
        if messages and messages[0].metadata.message_type == MessageType.TRAIN:
            self.questions = messages
        return super().send_and_receive(messages, timeout=timeout)


def questions(strategy: str, rounds: int) -> list[Message]:
    grid = Opened([{"name": name} for name in ("aachen", "basel", "chur")])
    run = Run(grid, settings(rounds=rounds, strategy=strategy, evaluate_every=0))
    for _ in range(rounds - 1):
        run.step()
    run.step()
    assert len(grid.questions) == 3
    return grid.questions


def test_each_hospital_is_sent_its_own_correction_from_the_second_round_on() -> None:
    assert all(CORRECTION not in message.content for message in questions("scaffold", 1))
    assert all(CORRECTION not in message.content for message in questions("fedavg", 2))
    second = questions("scaffold", 2)
    sent = [tensors(message.content.array_records[CORRECTION]) for message in second]
    assert not same(sent[0], sent[1])
    total = torch.cat([torch.stack([each[name] for each in sent]).sum(0).flatten() for name in sent[0]])
    assert float(total.abs().max()) < 1e-4, "together they add nothing"
    arrays = [tensors(message.content.array_records[ARRAYS]) for message in second]
    assert same(arrays[0], arrays[1])


# --- parts that some do not train -------------------------------------------------------------------------------------

AUDIO, HEAD = "encoders.audio.w", "head.w"
STILL = still_parts(("image", "report"))


def fit(name: str, values: dict[str, float], *, weight: float = 1.0) -> Fit:
    arrays = array_record({key: torch.full((2,), value) for key, value in values.items()})
    return Fit(name, fit_reply(name), arrays, weight, 1.0)


def mean(before: dict[str, torch.Tensor], still: dict[str, Still], *fits: Fit) -> dict[str, torch.Tensor]:
    """What fedavg makes of these replies."""
    fold = Mean(still)
    for each in fits:
        fold.add(each)
    arrays, _ = make_strategy(settings().federation).aggregate_train(1, fold.replies(array_record(before)))
    assert arrays is not None
    return tensors(arrays)


def test_a_part_is_the_mean_of_those_who_declare_it() -> None:
    found = mean(
        {AUDIO: torch.zeros(2), HEAD: torch.zeros(2)},
        {"aachen": (), "basel": STILL, "chur": ()},
        fit("aachen", {AUDIO: 1.0, HEAD: 1.0}, weight=3.0),
        fit("basel", {AUDIO: 0.0, HEAD: 2.0}),
        fit("chur", {AUDIO: 5.0, HEAD: 3.0}),
    )
    assert found[AUDIO].tolist() == [2.0, 2.0], "as if basel did not exist"
    torch.testing.assert_close(found[HEAD], torch.full((2,), (3 + 2 + 3) / 5))


def test_a_part_that_nobody_declares_stays_as_it_was_whatever_comes_back() -> None:
    before = {AUDIO: torch.full((2,), 7.0), HEAD: torch.zeros(2)}
    fits = [fit("aachen", {AUDIO: 1.0, HEAD: 1.0}), fit("basel", {AUDIO: 2.0, HEAD: 1.0})]
    assert mean(before, {"aachen": STILL, "basel": STILL}, *fits)[AUDIO].tolist() == [7.0, 7.0]


def test_rounds_begin_where_the_checkpoint_says() -> None:
    """No round, no average: a run that has not begun is evaluated as it stands."""
    start = Checkpoint(0, weights("other"), {}, {})
    assert final_weights(start, DECAY) is start.weights
    config = settings(rounds=1, average=DECAY)
    members = Run(hospitals(), config).members
    begun = run_rounds(
        hospitals(), make_strategy(config.federation), run=RUN, config=config, spec=SPEC, plan=make_plan(config),
        members=members, start=start, save=lambda _: None,
    )  # fmt: skip
    assert next(begun).round == 1
