"""Replies are added as they arrive: the same mean in any order, in the memory of one sum."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.federation.checks import Expected, Fit, check_fits
from fedmm.federation.fold import Mean
from fedmm.federation.messages import ARRAYS, array_record, encode, views
from fedmm.federation.robust import middle, ordered
from fedmm.federation.tiles import TILE, distance, tiles
from tests.federation.scripted import answer, fit_reply
from tests.federation.test_checks import ASKED
from tests.federation.test_rounds import Run, hospitals
from tests.federation.test_rounds import settings as run_settings

SAID = fit_reply("aachen")


def fit(number: int, values: np.ndarray, *, weight: float = 1.0) -> Fit:
    return Fit(f"h{number}", SAID, ArrayRecord({"w": Array(np.asarray(values, "f4"))}), weight, 1.0)


def added(rows: np.ndarray, weights: list[float] | None = None) -> Mean:
    fold = Mean({})
    for number, row in enumerate(rows):
        fold.add(fit(number, row, weight=weights[number] if weights else 1.0))
    return fold


def mean(fold: Mean) -> np.ndarray:
    (reply,) = fold.replies(array_record({"w": torch.zeros(1)}))
    return views(reply.content.array_records[ARRAYS])["w"]


# --- the same as all at once ------------------------------------------------------------------------------------------

numbers = st.floats(-1e6, 1e6, width=32)
rows = st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=1, max_size=9))


@settings(max_examples=60)
@given(rows, st.data())
def test_added_one_by_one_is_the_mean_of_all_at_once(values: list[list[float]], data: Any) -> None:
    some = np.array(values, "f4")
    weights = data.draw(st.lists(st.floats(1e-3, 1e6), min_size=len(some), max_size=len(some)))
    for counts in ([1.0] * len(some), weights):
        fold = added(some, counts)
        exact = [math.fsum(w * float(v) for w, v in zip(counts, column, strict=True)) for column in some.T]
        scale = max(abs(w * float(v)) for w, row in zip(counts, some, strict=True) for v in row) or 1.0
        np.testing.assert_allclose(fold._sum["w"], exact, rtol=0, atol=1e-12 * scale)
        np.testing.assert_allclose(mean(fold), np.array(exact) / sum(counts), rtol=1e-6, atol=1e-12 * scale)


def test_the_order_of_arrival_changes_no_bit_where_all_count_alike() -> None:
    some = np.random.default_rng(0).standard_normal((5, 2000)).astype("f4") * np.logspace(-3, 3, 2000, dtype="f4")
    first = mean(added(some))
    for order in itertools.permutations(range(5)):
        assert np.array_equal(mean(added(some[list(order)])), first)


@pytest.mark.parametrize("strategy", ["fedavgm", "scaffold", "geomedian"])
def test_a_run_ends_with_the_same_bits_whoever_answers_first(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for order in (1, -1):
        grid = hospitals()
        send = grid.send_and_receive
        monkeypatch.setattr(
            grid, "send_and_receive", lambda m, *, timeout, o=order, s=send: list(s(m, timeout=timeout))[::o]
        )
        ends.append(Run(grid, run_settings(strategy=strategy, clip_norm=0.5)).finish())
    assert [r.trained for r in ends[0].records] == [r.trained for r in ends[1].records]
    for part in ("weights", "strategy"):
        left, right = getattr(ends[0].saved[3], part), getattr(ends[1].saved[3], part)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_next_round_begins_with_nothing() -> None:
    fold, before = added(np.ones((2, 3))), array_record({"w": torch.zeros(3)})
    fold.replies(before)
    assert fold.replies(before) == []
    fold.add(fit(1, np.full(3, 5.0)))
    assert mean(fold).tolist() == [5.0] * 3


def test_nothing_added_is_nothing_to_aggregate() -> None:
    assert Mean({}).replies(array_record({"w": torch.zeros(1)})) == []


# --- memory -----------------------------------------------------------------------------------------------------------


def test_of_many_updates_only_the_sum_and_the_one_that_arrives_are_there() -> None:
    """Models of 8 tensors and 2 MB from 12 hospitals: 24 MB if they were kept."""
    size, names = 2**16, [f"w{i}" for i in range(8)]
    model, many = 4 * size * len(names), 12
    before = array_record({name: torch.zeros(size) for name in names})
    hospital = {node: f"h{node}" for node in range(2, 2 + many)}
    asked = replace(ASKED, keys={name: fit_reply(name).ledger_key for name in hospital.values()})
    peaks = []

    def arrive() -> Iterator[Message]:
        for node, name in hospital.items():
            arrays = array_record({n: torch.full((size,), float(node)) for n in names})
            reply = answer(node, encode(fit_reply(name, arrays=arrays), arrays=arrays, weight=1.0))
            del arrays
            tracemalloc.reset_peak()
            yield reply
            peaks.append(tracemalloc.get_traced_memory()[1])

    fold = Mean({})
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    heard = check_fits(arrive(), hospital, Expected(asked, before, 1e6), fold.add)
    tracemalloc.stop()
    assert heard.failures == []
    assert max(peaks) - start < 3.6 * model, "the sum in double, one update, tiles"
    (reply,) = fold.replies(before)
    assert (views(reply.content.array_records[ARRAYS])["w3"] == np.mean(list(hospital))).all()


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (TILE,), (3, TILE // 2 + 1)])
def test_tiles_are_all_of_an_array_and_what_is_written_to_them_is_in_it(shape: tuple[int, ...]) -> None:
    value, same = np.zeros(shape, "f4"), np.random.default_rng(1).standard_normal(shape)
    for into, of in tiles(value, np.asarray(same)):
        assert into.size <= TILE
        into[...] = of
    assert np.array_equal(value, np.asarray(same, "f4"))


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_orders_over_several_tiles_are_those_of_numpy(count: int) -> None:
    sent = list(np.random.default_rng(count).standard_normal((count, 2, TILE)).astype("f4"))
    np.testing.assert_allclose(middle(sent), np.median(sent, axis=0), rtol=1e-6)
    inner = np.sort(sent, axis=0)[1 : count - 1] if count > 2 else np.stack(sent)
    keep = slice(1, count - 1) if count > 2 else slice(0, count)
    np.testing.assert_allclose(ordered(sent, keep=keep), inner.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_a_distance_is_taken_in_double_over_all_tensors() -> None:
    left = {"a": np.full(3 * TILE, 1e4, "f4"), "b": np.float32(2.0)}
    right = {"a": np.full(3 * TILE, 1e4 + 2**-10, "f4"), "b": np.float32(5.0)}
    assert distance(left, right) == pytest.approx(math.sqrt(3 * TILE * 2**-20 + 9), rel=1e-12)
