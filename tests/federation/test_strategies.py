"""What a strategy remembers can be put aside and taken up again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi, Strategy, strategy_utils

from fedmm.config import FederationConfig
from fedmm.federation.local import LocalGrid
from fedmm.federation.messages import ARRAYS, array_record, encode
from fedmm.federation.robust import GeometricMedian, Krum, Median, TrimmedMean
from fedmm.federation.strategies import make_strategy, restore_strategy, strategy_state
from fedmm.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tests.federation.scripted import fit_reply, on_the_wire, weights

KINDS = {
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedmedian": Median,
    "fedtrimmedavg": TrimmedMean,
    "krum": Krum,
    "multikrum": Krum,
    "geomedian": GeometricMedian,
}
HOSPITALS = {2: "aachen", 3: "basel", 4: "chur", 5: "davos", 6: "essen"}
ROUNDS = 5


def strategy(name: str, **changes: float) -> Strategy:
    settings = {"strategy": name, "server_learning_rate": 0.7, "server_momentum": 0.9, "byzantine": 1, **changes}
    return make_strategy(FederationConfig.model_validate(settings))


def one_round(active: Strategy, number: int, arrays: ArrayRecord) -> ArrayRecord:
    grid = LocalGrid("", [{}] * len(HOSPITALS))
    asked = {m.metadata.dst_node_id: m for m in active.configure_train(number, arrays, ConfigRecord(), grid)}
    assert set(asked) == set(HOSPITALS)
    replies = []
    for node, name in sorted(HOSPITALS.items()):
        got = asked[node].content.array_records[ARRAYS]
        step = weights(f"{name} {number}")
        now = {n: torch.from_numpy(got[n].numpy()) + 0.1 * step[n] for n in got}
        content = encode(fit_reply(name, round=number), arrays=array_record(now), weight=float(node))
        del content["fedmm"]
        replies.append(on_the_wire(Message(content, reply_to=asked[node])))
    result, _ = active.aggregate_train(number, replies)
    assert result is not None
    return array_record({n: torch.from_numpy(result[n].numpy().astype("float32")) for n in result})


def tensors(arrays: ArrayRecord) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}


def bits(arrays: ArrayRecord) -> dict[str, bytes]:
    return {name: array.numpy().tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("stop", range(1, ROUNDS))
def test_a_strategy_that_was_put_aside_goes_on_bit_by_bit(name: str, stop: int, tmp_path: Path) -> None:
    arrays, active = array_record(weights()), strategy(name)
    kept = None
    for number in range(1, ROUNDS + 1):
        arrays = one_round(active, number, arrays)
        if number == stop:
            save_checkpoint(tmp_path, Checkpoint(number, tensors(arrays), strategy_state(active), {}))
            kept = load_checkpoint(tmp_path)
    assert kept is not None
    again, resumed = array_record(kept.weights), strategy(name)
    restore_strategy(resumed, kept.strategy, again)
    for number in range(stop + 1, ROUNDS + 1):
        again = one_round(resumed, number, again)
    assert bits(again) == bits(arrays)
    left, right = strategy_state(active), strategy_state(resumed)
    assert set(left) == set(right)
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_a_strategy_with_a_memory_differs_when_it_is_not_restored(name: str) -> None:
    arrays, active = array_record(weights()), strategy(name)
    for number in (1, 2):
        arrays = one_round(active, number, arrays)
    assert strategy_state(active)
    forgetful = one_round(strategy(name), 3, arrays)
    assert bits(forgetful) != bits(one_round(active, 3, arrays))


def test_fedavg_remembers_nothing() -> None:
    active = strategy("fedavg")
    one_round(active, 1, array_record(weights()))
    assert strategy_state(active) == {}


@pytest.mark.parametrize("name", KINDS)
def test_a_fresh_strategy_has_no_state_and_takes_an_empty_one(name: str) -> None:
    active, plain = strategy(name), strategy(name)
    assert strategy_state(active) == {}
    start = array_record(weights())
    restore_strategy(active, {}, start)
    assert bits(one_round(active, 1, start)) == bits(one_round(plain, 1, start))


def test_the_state_is_a_copy_that_a_later_round_does_not_change() -> None:
    active, arrays = strategy("fedavgm"), array_record(weights())
    arrays = one_round(active, 1, arrays)
    state = strategy_state(active)
    before = {key: value.clone() for key, value in state.items()}
    one_round(active, 2, arrays)
    assert all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize("name", KINDS)
def test_each_name_gives_its_strategy(name: str) -> None:
    assert type(strategy(name)) is KINDS[name]


def test_fedavg_is_the_mean_by_weight() -> None:
    result = one_round(strategy("fedavg"), 1, array_record(weights()))
    start = weights()["head.10.weight"]
    steps = [node * weights(f"{name} 1")["head.10.weight"] for node, name in HOSPITALS.items()]
    expected = start + 0.1 * torch.stack(steps).sum(0) / sum(HOSPITALS)
    torch.testing.assert_close(torch.from_numpy(result["head.10.weight"].numpy()), expected)


def test_a_strategy_does_not_wait_for_a_hospital_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def waited(seconds: float) -> None:
        raise TimeoutError

    monkeypatch.setattr(strategy_utils, "sleep", waited)
    grid = LocalGrid("", [{}] * (len(HOSPITALS) - 1))
    asked = strategy("fedavgm").configure_train(1, array_record(weights()), ConfigRecord(), grid)
    assert len(list(asked)) == len(HOSPITALS) - 1
