"""Updates in fewer bytes: what comes out at the other end, what a hostile sender can do, what goes with what."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmm.config import ROBUST, FederationConfig
from fedmm.errors import ConfigError, MessageInvalid
from fedmm.federation.checks import Fit
from fedmm.federation.fold import Mean
from fedmm.federation.messages import ARRAYS, array_record, encode, views
from fedmm.federation.tiles import TILE
from fedmm.federation.wire import CODES, FRACTION, INDEX, ROW, SCALES, check_wire, coded, in_line, received
from fedmm.training.local import still_parts
from tests.federation.scripted import answer, checked, fit_reply, weights
from tests.federation.test_checks import ASKED, expected

SHORT = ("fp16", "int8", "topk")
FAR = 1e30


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sent(change: np.ndarray, wire: str, *, bound: float = FAR, seed: int = 0) -> RecordDict:
    return RecordDict({ARRAYS: coded(change, wire, bound=bound, rng=chance(seed))[0]})


def other_end(content: RecordDict, count: int, wire: str) -> np.ndarray:
    """The change as the coordinator decodes it, of one tensor that was zero."""
    before = array_record({"w": torch.zeros(count)})
    return views(received(content, before, views(before), (), wire))["w"]


finite = st.floats(-(2.0**60), 2.0**60, width=32)
changes = st.integers(1, 2 * ROW).flatmap(lambda n: arrays(np.float32, n, elements=finite))


# --- round trips ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(changes)
def test_no_value_is_further_off_than_its_rows_largest_one_and_the_coding_allow(change: np.ndarray) -> None:
    largest = np.repeat(np.maximum.reduceat(np.abs(change), np.arange(0, change.size, ROW)), ROW)[: change.size]
    for wire, part in (("fp16", 2.0**-11), ("int8", 1 / 127)):
        off = np.abs(other_end(sent(change, wire), change.size, wire).astype("f8") - change)
        assert (off <= largest * part * (1 + 1e-4) + 1e-37).all(), wire


@settings(max_examples=25, deadline=None)
@given(changes)
def test_what_crosses_and_what_is_left_out_are_the_change_together(change: np.ndarray) -> None:
    for wire in SHORT:
        record, left = coded(change, wire, bound=FAR, rng=chance())
        out = other_end(RecordDict({ARRAYS: record}), change.size, wire)
        np.testing.assert_array_equal(left, change - out)


@settings(max_examples=25, deadline=None)
@given(changes)
def test_the_largest_hundredth_crosses_and_nothing_else(change: np.ndarray) -> None:
    out = other_end(sent(change, "topk"), change.size, "topk")
    count = -(-change.size // FRACTION)
    assert np.count_nonzero(out) <= count
    threshold = np.sort(np.abs(change))[-count]
    for place in np.flatnonzero(np.abs(change) > threshold):
        assert out[place] == pytest.approx(change[place], rel=2**-10, abs=float(np.abs(change).max()) * 2**-24)


@settings(max_examples=25, deadline=None)
@given(changes, st.floats(1e-3, 1e6))
def test_what_comes_out_is_no_longer_than_was_agreed(change: np.ndarray, bound: float) -> None:
    for wire in SHORT:
        out = other_end(sent(change, wire, bound=bound), change.size, wire).astype("f8")
        assert np.linalg.norm(out) <= bound * (1 + 1e-6), wire


def test_eight_bits_are_right_on_average() -> None:
    """600 roundings of 3,000 values: each mean lies within 5.5 of its standard errors; of 3,000 such means one does not with
    probability 1.1e-4."""
    change, times = chance(1).standard_normal(3000).astype("f4"), 600
    total = np.zeros(change.size)
    for seed in range(times):
        total += other_end(sent(change, "int8", seed=seed), change.size, "int8")
    scale = np.repeat(np.maximum.reduceat(np.abs(change), np.arange(0, change.size, ROW)) / 127, ROW)[: change.size]
    above = change / scale - np.floor(change / scale)
    error = scale * np.sqrt(above * (1 - above) / times)
    assert (np.abs(total / times - change) <= 5.5 * error + 2e-6 * scale).all()
    biased = np.floor(change / scale) * scale
    assert not (np.abs(biased - change) <= 5.5 * error + 2e-6 * scale).all(), "what the test would find"


def test_one_large_value_coarsens_its_own_row_alone() -> None:
    change = np.full(3 * ROW, 1e-3, "f4")
    change[ROW] = 1e3
    out = other_end(sent(change, "int8"), change.size, "int8")
    assert np.abs(out[:ROW] - 1e-3).max() < 1e-5
    assert np.abs(out[2 * ROW :] - 1e-3).max() < 1e-5


@pytest.mark.parametrize("wire", SHORT)
def test_tensors_of_every_shape_and_place_come_back_to_their_own(wire: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"b": (TILE // 2 + 7, 2), "a": (3,), "c": (), "d": (0, 4), "e": (ROW + 1,)}
    before = {name: torch.from_numpy(np.asarray(chance(3).standard_normal(s), "f4")) for name, s in shapes.items()}
    after = {name: value + float(ord(name)) for name, value in before.items()}
    start = array_record(before)
    change = in_line(views(array_record(after)), views(start), ())
    record = received(sent(change, wire), start, views(start), (), wire)
    assert list(record) == sorted(shapes)
    for name, value in views(record).items():
        assert value.shape == shapes[name]
        moved = value - before[name].numpy()
        if wire == "topk":
            assert set(np.round(moved).reshape(-1)) <= {0.0, float(ord(name))}
        else:
            np.testing.assert_allclose(moved, ord(name), rtol=0.01)


def test_the_parts_of_an_undeclared_modality_do_not_cross_and_stay_as_they_were() -> None:
    start = array_record({"encoders.audio.w": torch.full((500,), 3.0), "head.w": torch.zeros(700)})
    still = still_parts(("image", "report"))
    change = in_line(
        views(array_record({"encoders.audio.w": torch.zeros(500), "head.w": torch.ones(700)})), views(start), still
    )
    content = sent(change, "int8")
    assert content.array_records[ARRAYS][CODES].shape == (700,)
    record = received(content, start, views(start), still, "int8")
    assert record["encoders.audio.w"].data is start["encoders.audio.w"].data
    np.testing.assert_allclose(views(record)["head.w"], 1.0, rtol=0.01)
    with pytest.raises(MessageInvalid):
        received(content, start, views(start), (), "int8")


# --- hostile senders --------------------------------------------------------------------------------------------------

COUNT = 5000


def tampered(wire: str, **changes: np.ndarray | Array | None) -> RecordDict:
    record = dict(sent(chance().standard_normal(COUNT).astype("f4"), wire).array_records[ARRAYS])
    for name, value in changes.items():
        record.pop(name, None)
        if value is not None:
            record[name] = value if isinstance(value, Array) else Array(np.asarray(value))
    return RecordDict({ARRAYS: ArrayRecord(record)})


PLACES = np.arange(50, dtype="i4")
HUGE = Array(dtype="int8", shape=(2**40,), stype="numpy.ndarray", data=b"\x93NUMPY\x01\x00" + b" " * 200)
HOSTILE = {
    "no codes": ("int8", {CODES: None}),
    "no scales": ("int8", {SCALES: None}),
    "a tensor more": ("int8", {"more": np.zeros(3, "f4")}),
    "places that were not asked for": ("int8", {INDEX: PLACES}),
    "codes of another type": ("int8", {CODES: np.zeros(COUNT, "f2")}),
    "fewer codes": ("int8", {CODES: np.zeros(COUNT - 1, "i1")}),
    "codes in rows": ("int8", {CODES: np.zeros((COUNT, 1), "i1")}),
    "codes that claim a terabyte": ("int8", {CODES: HUGE}),
    "fewer scales": ("int8", {SCALES: np.ones(1, "f4")}),
    "scales NaN": ("int8", {SCALES: np.full(5, np.nan, "f4")}),
    "scales infinite": ("fp16", {SCALES: np.full(5, np.inf, "f4")}),
    "scales that overflow": ("int8", {SCALES: np.full(5, 3e38, "f4")}),
    "codes NaN": ("fp16", {CODES: np.full(COUNT, np.nan, "f2")}),
    "places below": ("topk", {INDEX: PLACES - 1}),
    "places beyond": ("topk", {INDEX: PLACES + COUNT - 49}),
    "a place twice": ("topk", {INDEX: np.maximum(PLACES, 1)}),
    "places backwards": ("topk", {INDEX: PLACES[::-1].copy()}),
    "places that wrap": ("topk", {INDEX: np.where(PLACES == 30, -(2**31), PLACES).astype("i4")}),
    "more places": ("topk", {INDEX: np.arange(51, dtype="i4")}),
    "places as floats": ("topk", {INDEX: PLACES.astype("f4")}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_honest_hospital_sends_is_refused_before_anything_of_the_models_size_is_made(name: str) -> None:
    wire, changes = HOSTILE[name]
    content = tampered(wire, **changes)
    tracemalloc.start()
    with pytest.raises(MessageInvalid):
        other_end(content, COUNT, wire)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**18
    other_end(tampered(wire), COUNT, wire)  # what it was made of is fine


@pytest.mark.parametrize("asked", ["fp32", *SHORT])
@pytest.mark.parametrize("wire", ["fp32", *SHORT])
def test_an_update_counts_only_in_the_coding_that_was_asked_for(wire: str, asked: str) -> None:
    before = array_record(weights())
    change = in_line({n: v + np.float32(0.01) for n, v in views(before).items()}, views(before), ())
    arrays = before if wire == "fp32" else coded(change, wire, bound=FAR, rng=chance())[0]
    reply = answer(2, encode(fit_reply("chur", arrays=arrays), arrays=arrays, weight=1.0))
    want = expected()
    want = type(want)(ASKED, want.before, want.max_norm, wire=asked)
    fits, heard = checked([reply], {2: "chur"}, want)
    assert bool(fits) is (wire == asked)
    assert [f.kind for f in heard.failures] == ([] if wire == asked else ["invalid"])


def test_the_bound_on_an_update_holds_for_what_is_decoded() -> None:
    before = array_record(weights())
    change = np.zeros(in_line(views(before), views(before), ()).size, "f4")
    change[5] = 6.0
    arrays = coded(change, "int8", bound=FAR, rng=chance())[0]
    reply = answer(2, encode(fit_reply("chur", arrays=arrays), arrays=arrays, weight=1.0))
    fits, heard = checked([reply], {2: "chur"}, type(expected())(ASKED, before, 5.0, wire="int8"))
    assert fits == {}
    assert "max_update_norm = 5" in heard.failures[0].reason


# --- what goes with what ----------------------------------------------------------------------------------------------


def test_codings_that_a_strategy_cannot_take_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"scaffold does not work with federation\.wire = int8"):
        check_wire(FederationConfig(strategy="scaffold", wire="int8"))
    for name in ROBUST:
        with pytest.raises(ConfigError, match=f"{name} does not work with federation.wire = topk"):
            check_wire(FederationConfig.model_validate({"strategy": name, "wire": "topk"}))
        check_wire(FederationConfig.model_validate({"strategy": name, "wire": "int8"}))
    check_wire(FederationConfig(strategy="scaffold"))
    check_wire(FederationConfig(strategy="fedadam", wire="topk"))


def test_with_what_is_left_out_carried_over_the_largest_hundredths_add_up_to_all_of_it() -> None:
    """200 rounds of the same change: without it 99 of 100 values would never cross."""
    change, rounds = chance(2).uniform(0.5, 1.0, 1000).astype("f4"), 200
    left, total, forgetful = np.zeros_like(change), np.zeros(1000), np.zeros(1000)
    for _ in range(rounds):
        record, left = coded(change + left, "topk", bound=FAR, rng=chance())
        total += other_end(RecordDict({ARRAYS: record}), 1000, "topk")
        forgetful += other_end(sent(change, "topk"), 1000, "topk")
    np.testing.assert_allclose(total + left, rounds * change, rtol=1e-4)
    assert np.abs(total / rounds / change - 1).max() < 0.9
    assert (forgetful == 0).mean() > 0.98


def test_a_mean_of_rounded_updates_is_closer_than_one_of_them() -> None:
    before = array_record({"w": torch.zeros(4000)})
    change = chance(4).standard_normal(4000).astype("f4")
    fold, off = Mean({}), []
    for number in range(16):
        record = received(sent(change, "int8", seed=number), before, views(before), (), "int8")
        off.append(np.linalg.norm(views(record)["w"] - change))
        fold.add(Fit(f"h{number}", fit_reply("chur"), record, 1.0, 1.0))
    (mean,) = fold.replies(before)
    found = views(mean.content.array_records[ARRAYS])["w"]
    assert np.linalg.norm(found - change) < 0.4 * min(off)
