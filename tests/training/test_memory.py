"""Out of memory: a batch is split by patients, and the result is that of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fedmm.config import TrainingConfig
from fedmm.errors import DeadlinePassed
from fedmm.privacy.engine import CLIPPING, PrivateEngine
from fedmm.schema import Batch
from fedmm.training import loop, memory
from fedmm.training.loop import Workbench, predict, train
from fedmm.training.memory import halves, in_parts, is_out_of_memory
from tests import tiny
from tests.fixed_noise import FixedNoise
from tests.privacy.measure import LIMIT, UP_TO_12, C, engine_for, hospital, plan

FULL = (
    MemoryError(),
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
)


def test_what_is_want_of_memory_and_what_is_not() -> None:
    assert all(is_out_of_memory(error) for error in FULL)
    assert not any(is_out_of_memory(error) for error in (RuntimeError("shapes"), ValueError("DefaultCPUAllocator")))


def test_halves_have_all_studies_of_their_patients_and_nobody_is_lost() -> None:
    whole = tiny.batch((1, 5, 12, 2, 3))
    one, two = halves(whole)
    assert (one.patients, two.patients) == (2, 3)
    assert torch.equal(torch.cat([one.patient_B, two.patient_B + 2]), whole.patient_B)
    for name, value in whole.inputs.items():
        assert torch.equal(torch.cat([one.inputs[name], two.inputs[name]]), value)
    for name in ("seen_BM", "finding_BF", "class_B", "further_BK", "day_B", "key_B"):
        joined = torch.cat([getattr(one, name), getattr(two, name)])
        assert joined.numpy().tobytes() == getattr(whole, name).numpy().tobytes()


def test_one_patient_who_does_not_fit_is_a_failure_and_so_is_any_other_error() -> None:
    def full(batch: Batch) -> None:
        raise MemoryError

    def broken(batch: Batch) -> None:
        seen.append(batch.patients)
        raise RuntimeError("shapes")

    seen: list[int] = []
    with pytest.raises(MemoryError):
        in_parts(tiny.batch((3, 1)), full, lambda: lambda: None)
    with pytest.raises(RuntimeError):
        in_parts(tiny.batch((3, 1)), broken, lambda: lambda: None)
    assert seen == [2]


@pytest.fixture(params=FULL, ids=lambda error: type(error).__name__)
def small(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Memory for two patients at once: what is wrapped with it does its work, then fails for a batch of more."""

    def wrap(honest: Any) -> Any:
        def work(*given: Any, **more: Any) -> Any:
            made = honest(*given, **more)
            batch = next(value for value in (*given, *more.values()) if isinstance(value, Batch))
            if batch.patients > 2:
                raise request.param
            return made

        return work

    return wrap


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("where", ["accumulate", "add"])
def test_a_split_batch_adds_the_same_sum_and_nobody_twice(
    monkeypatch: pytest.MonkeyPatch, small: Any, clipping: str, where: str
) -> None:
    """The failure comes after the patients were added: what is not undone would count them twice."""
    whole, engine = tiny.batch(UP_TO_12), engine_for(tiny.spec(), clipping=clipping)

    def clipped(batch: Batch) -> torch.Tensor:
        engine._clear()
        loop._accumulate(engine, batch, lambda part: part, objective=loop.Objective(tiny.LABELS), alone=False)
        return engine.clipped_sum()

    expected = clipped(whole)
    owner = engine.clipper if where == "add" else engine
    monkeypatch.setattr(owner, where, small(getattr(owner, where)))
    split = clipped(whole)
    assert torch.allclose(split, expected, atol=1e-6 * C)
    moved = [
        float((split - clipped(tiny.pick(whole, [p for p in range(12) if p != left]))).norm()) / C for left in range(12)
    ]
    assert 0.999 < max(moved) <= LIMIT


@pytest.mark.parametrize("private", [True, False])
def test_a_training_that_had_to_split_ends_with_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, small: Any, *, private: bool
) -> None:
    asked = plan() if private else plan_open()

    benches = [Workbench(tiny.spec(), torch.device("cpu")) for _ in range(2)]

    def trained() -> dict[str, torch.Tensor]:
        bench = benches.pop()
        bench.load({n: v * 0 + 0.05 for n, v in bench.weights().items()})
        cohort = hospital(tiny.batch(UP_TO_12)).cohort("all")
        train(bench, cohort, asked, config=TrainingConfig(learning_rate=0.1), noise=FixedNoise(3))
        return bench.weights()

    expected = trained()
    if private:
        monkeypatch.setattr(PrivateEngine, "accumulate", small(PrivateEngine.accumulate))
    else:
        honest = torch.autograd.backward
        counted: list[int] = []

        def backward(*given: Any) -> None:
            honest(*given)
            counted.append(1)
            if len(counted) < 4:
                raise MemoryError

        monkeypatch.setattr(torch.autograd, "backward", backward)
    split = trained()
    assert any(not torch.equal(expected[n], split[n] * 0 + 0.05) for n in expected)
    for name, value in expected.items():
        assert torch.allclose(split[name], value, atol=1e-6)


def plan_open() -> Any:
    from dataclasses import replace

    return replace(plan(), private=False, noise_multiplier=0.0)


def test_a_prediction_that_had_to_split_is_the_same(monkeypatch: pytest.MonkeyPatch, small: Any) -> None:
    bench, cohort = Workbench(tiny.spec(), torch.device("cpu")), hospital(tiny.batch(UP_TO_12)).cohort("all")
    expected = predict(bench, cohort)
    monkeypatch.setattr(loop, "_probabilities", small(loop._probabilities))
    split = predict(bench, cohort)
    assert np.allclose(split.probability_BO, expected.probability_BO, atol=1e-6)
    assert np.array_equal(split.patient_B, expected.patient_B)
    assert {name: len(value) for name, value in split.subset.items()} == {
        name: len(value) for name, value in expected.subset.items()
    }


def test_memory_of_the_gpu_is_given_back_before_the_halves_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory.torch.cuda, "empty_cache", lambda: emptied.append(True))

    def full(batch: Batch) -> int:
        if batch.patients > 1:
            raise MemoryError
        return batch.studies

    assert in_parts(tiny.batch((3, 1)), full, lambda: lambda: None) == [3, 1]
    assert emptied == [True]


@pytest.mark.parametrize("private", [True, False])
def test_a_check_ends_a_training_between_its_batches(*, private: bool) -> None:
    def checks() -> Iterator[None]:
        yield from (None, None)
        raise DeadlinePassed("late")

    bench, cohort = Workbench(tiny.spec(), torch.device("cpu")), hospital(tiny.batch(UP_TO_12)).cohort("all")
    asked = plan() if private else plan_open()
    for work in (
        lambda check: train(
            bench, cohort, asked, config=TrainingConfig(physical_studies=1), noise=FixedNoise(0), check=check
        ),
        lambda check: predict(bench, cohort, limit=1, check=check),
    ):
        ticks = checks()
        with pytest.raises(DeadlinePassed):
            work(lambda ticks=ticks: next(ticks))
