"""Arrays cross as one block and come out as they went in, whatever a peer makes of the index."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmm.errors import MessageInvalid
from fedmm.federation.messages import digest_of
from fedmm.federation.packing import BLOCK, INDEX, PACKED, pack, unpack

NAMES = st.text(min_size=1, max_size=12)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
ARRAYS = st.dictionaries(NAMES, hnp.arrays(np.float32, SHAPES), max_size=5)
TREES = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda part: st.lists(part, max_size=6))


def content(**records: dict[str, np.ndarray]) -> RecordDict:
    made = {name: ArrayRecord({n: Array(a) for n, a in arrays.items()}) for name, arrays in records.items()}
    return RecordDict({**made, "fedmm": ConfigRecord({"body": "x"}), "metrics": MetricRecord({"w": 1.0})})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(arrays=ARRAYS, more=ARRAYS)
def test_unpacking_gives_back_every_byte(arrays: dict[str, np.ndarray], more: dict[str, np.ndarray]) -> None:
    before = content(arrays=arrays, correction=more)
    packed = pack(before)
    assert [record for record in packed.array_records] == [BLOCK]
    after = unpack(packed)
    assert set(after) == {"fedmm", "metrics"} | {n for n, a in (("arrays", arrays), ("correction", more)) if a}
    for name in set(after) & {"arrays", "correction"}:
        assert digest_of(after.array_records[name]) == digest_of(before.array_records[name])
        assert list(after.array_records[name]) == list(before.array_records[name])
        for key, array in after.array_records[name].items():
            np.testing.assert_array_equal(array.numpy(), before.array_records[name][key].numpy())


def test_what_has_no_arrays_and_what_is_packed_already_stay_as_they_are() -> None:
    plain = RecordDict({"fedmm": ConfigRecord({"body": "x"})})
    assert pack(plain) is plain
    assert unpack(plain) is plain
    packed = pack(content(arrays={"a": np.ones(3, np.float32)}))
    assert pack(packed) is packed


def hostile(index: object, data: bytes = b"1234", *, text: str | None = None, block: str = BLOCK) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(data),), stype="numpy.ndarray", data=data)
    written = json.dumps(index) if text is None else text
    return RecordDict({PACKED: ConfigRecord({INDEX: written}), BLOCK: ArrayRecord({block: array})})


GOOD = ["arrays", "a", "float32", [1], "numpy.ndarray", 4]


@pytest.mark.parametrize(
    "index",
    [
        [],
        [[*GOOD[:5], 3]],
        [[*GOOD[:5], 5]],
        [[*GOOD[:5], -1]],
        [[*GOOD[:5], 4.0]],
        [[*GOOD[:5], True]],
        [[*GOOD[:3], [-1], *GOOD[4:]]],
        [[*GOOD[:3], "1", *GOOD[4:]]],
        [GOOD[:5]],
        [[*GOOD[:5], 2], [*GOOD[:5], 2]],
        [[PACKED, *GOOD[1:]]],
        {"arrays": 1},
        None,
        "x",
    ],
)
def test_an_index_that_does_not_fit_is_refused(index: object) -> None:
    with pytest.raises(MessageInvalid):
        unpack(hostile(index))


def test_a_block_that_is_missing_or_not_alone_is_refused() -> None:
    assert set(unpack(hostile([GOOD]))) == {"arrays"}
    with pytest.raises(MessageInvalid, match="without its block"):
        unpack(hostile([GOOD], block="other"))
    with pytest.raises(MessageInvalid, match="without its block"):
        unpack(RecordDict({PACKED: ConfigRecord({INDEX: "[]"})}))
    two = hostile([GOOD])
    two["arrays"] = ArrayRecord({})
    with pytest.raises(MessageInvalid):
        unpack(two)
    with pytest.raises(MessageInvalid, match="not valid"):
        unpack(hostile(None, text="[" * 100_000))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(max_size=60) | TREES.map(json.dumps))
def test_any_text_for_an_index_is_refused_or_understood(text: str) -> None:
    with contextlib.suppress(MessageInvalid):
        unpack(hostile(None, text=text))
