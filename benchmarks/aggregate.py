"""A round's updates at the coordinator: 100 of 11 M weights, added one by one as they arrive. Memory, and time beside a copy.

Memory is what a fresh process holds at most beyond what it held at the start (VmHWM of Linux, set back before), in models of
float32. An update is made, untimed, and let go by what adds it, so it counts as the one that arrives; what the coordinator holds
anyway, the round's weights, is made before. Time is of `Mean.add`, and in turn with it of copying the same bytes into memory that
is there already. `check` is all that is done with an update before it is added: types, sizes, finite values, digest, length.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedmm.config import ROBUST, FederationConfig, RunConfig
from fedmm.federation.aggregation import Aggregator
from fedmm.federation.checks import Fit
from fedmm.federation.fold import Mean
from fedmm.federation.local import LocalGrid
from fedmm.federation.messages import ARRAYS, METRICS, WEIGHT, FitReply, TrainAsk, digest_of, look_at, views
from fedmm.federation.strategies import make_strategy
from fedmm.federation.tiles import distance
from fedmm.training.checkpoint import Checkpoint

SHAPES = {f"layer.{i:02d}.weight": (512, 1024) for i in range(21)}
WEIGHTS = sum(rows * columns for rows, columns in SHAPES.values())  # 11,010,048
MODEL = 4 * WEIGHTS
FEW = 10  # updates that are all held: Flower's own mean, and the rules that compare them


def measure(*, quick: bool) -> dict[str, float]:
    many = 20 if quick else 100
    found: dict[str, float] = {"updates": many, "weights": WEIGHTS}
    found |= _apart(_streamed_memory, many) | _apart(_streamed_time, many) | _apart(_checked_time, 5)
    for name in ("fedavg", "fedavgm", "fedadam"):
        found |= _apart(_whole_round, name, many // 10)
    found |= _apart(_flowers_own, FEW)
    for name in ROBUST if not quick else ("fedmedian", "geomedian"):
        found |= _apart(_rule, name, FEW)
    return found


# --- each in a process of its own -------------------------------------------------------------------------------------


def _streamed_memory(many: int) -> dict[str, float]:
    fold, peak = Mean({}), _Peak()
    for number in range(many):
        fold.add(fit(number))
    added = peak.models()
    fold.replies(ArrayRecord())
    return {"streamed_peak_models": added, "streamed_peak_models_with_the_mean_made": peak.models()}


def _streamed_time(many: int) -> dict[str, float]:
    there = {name: np.zeros(shape, "float32") for name, shape in SHAPES.items()}
    found: dict[str, list[float]] = {}
    folds = {"uniform": (Mean({}), 1.0), "weighted": (Mean({}), 1.7)}

    def copy(arrays: ArrayRecord) -> None:
        for name, value in views(arrays).items():
            np.copyto(there[name], value)

    for number in range(many):
        one = fit(number)
        for name, (fold, weight) in folds.items():
            timed(found, name, partial(fold.add, replace(one, weight=weight)))
            timed(found, "copy", partial(copy, one.arrays))
    uniform, weighted, copied = (
        found["uniform"][1:],
        found["weighted"][1:],
        found["copy"][2:],
    )  # the first ones make the sum
    return {
        **with_spread("streamed_ms_per_update", uniform),
        **with_spread("streamed_by_weight_ms_per_update", weighted),
        **with_spread("copy_ms_per_update", copied),
        "streamed_ratio_to_copy": statistics.median(uniform) / statistics.median(copied),
        "streamed_ratio_to_copy_of_the_fastest": min(uniform) / min(copied),
        "streamed_by_weight_ratio_to_copy": statistics.median(weighted) / statistics.median(copied),
    }


def _checked_time(many: int) -> dict[str, float]:
    before = views(update(many))
    found: dict[str, list[float]] = {}
    for number in range(many):
        arrays = update(number)
        timed(found, "look_at", partial(look_at, RecordDict({ARRAYS: arrays}), SHAPES))
        timed(found, "digest", partial(digest_of, arrays))
        timed(found, "length", partial(distance, before, views(arrays)))
    return {f"check_{name}_ms_per_update": statistics.median(times) for name, times in found.items()}


def _whole_round(strategy: str, many: int) -> dict[str, float]:
    """Aggregator's part of a round: the strategy's own step included."""
    config = RunConfig.from_flat({"federation.strategy": strategy})
    aggregator = Aggregator(make_strategy(config.federation), config, declared={}, start=_start())
    aggregator.questions(
        1, TrainAsk.model_construct(), LocalGrid("", [{}]), {}
    )  # the strategy keeps the round's weights
    peak = _Peak()
    for number in range(many):
        aggregator.add(fit(number))
    aggregator.finish(1)
    return {f"round_with_{strategy}_peak_models": peak.models()}


def _flowers_own(many: int) -> dict[str, float]:
    peak, found = _Peak(), dict[str, list[float]]()
    replies = [reply(number) for number in range(many)]
    timed(found, "all", partial(FedAvg().aggregate_train, 1, replies))
    return {f"flower_{many}_updates_peak_models": peak.models(), "flower_ms_per_update": found["all"][0] / many}


def _rule(name: str, many: int) -> dict[str, float]:
    rule = make_strategy(FederationConfig.model_validate({"strategy": name, "byzantine": 1}))
    replies, found = [reply(number) for number in range(many)], dict[str, list[float]]()
    peak = _Peak()
    timed(found, "all", partial(rule.aggregate_train, 1, replies))
    return {f"{name}_{many}_updates_s": found["all"][0] / 1e3, f"{name}_peak_models_beside_them": peak.models()}


# --- what they share --------------------------------------------------------------------------------------------------


def update(number: int) -> ArrayRecord:
    """Made in memory that is there already, so that only what is made counts."""
    rng, arrays = np.random.default_rng(number), {}
    for name, shape in SHAPES.items():
        rng.standard_normal(out=_ROOM, dtype="float32")
        arrays[name] = Array("float32", shape, "numpy.ndarray", b"".join((_HEADER, memoryview(_ROOM).cast("B"))))
    return ArrayRecord(arrays)


_ROOM = np.empty(512 * 1024, "float32")
_HEADER = Array(np.zeros((512, 1024), "float32")).data[:128]


def fit(number: int) -> Fit:
    said = {name: "0" for name, field in FitReply.model_fields.items() if field.annotation is str} | {"nonce": "0" * 32}
    numbers = dict.fromkeys(("round", "epsilon", "unprotected", "ledger_sequence"), 0)
    statement = FitReply.model_construct(**said, **numbers, ceiling=1.0, delta=0.1, private=True)
    return Fit(f"hospital {number}", statement, update(number), 1.0, 1.0)


def reply(number: int) -> Message:
    content = RecordDict({ARRAYS: update(number), METRICS: MetricRecord({WEIGHT: 1.0})})
    return Message(content, 0, MessageType.TRAIN)


def _start() -> Checkpoint:
    import torch

    return Checkpoint(0, {name: torch.zeros(shape) for name, shape in SHAPES.items()}, {}, {})


class _Peak:
    """The most memory from now on, beyond what there is now."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is no room for what comes
        Path("/proc/self/clear_refs").write_text("5")
        self._start = _status("VmRSS")

    def models(self) -> float:
        return (_status("VmHWM") - self._start) / MODEL


def _status(name: str) -> int:
    """Bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def timed(found: dict[str, list[float]], name: str, work: Callable[[], Any]) -> None:
    began = time.perf_counter()
    work()
    found.setdefault(name, []).append(1e3 * (time.perf_counter() - began))


def with_spread(name: str, times: list[float]) -> dict[str, float]:
    return {name: statistics.median(times), f"{name}_spread": max(times) - min(times)}


def _apart(work: Callable[..., Mapping[str, float]], *given: Any) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1, initializer=_ready) as pool:
        return dict(pool.apply(work, given))


def _ready() -> None:
    """Imports, one thread, and what Flower wants to know of a process before it makes a message."""
    import torch

    torch.set_num_threads(1)
    np.random.default_rng(0).standard_normal(out=_ROOM, dtype="float32")
    LocalGrid("", [{}])
