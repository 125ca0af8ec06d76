"""A peer's message: what is good comes out as it went in, what is not is refused, and nothing else happens."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedmm.config import HospitalSection, RunConfig
from fedmm.errors import MessageInvalid
from fedmm.federation.messages import (
    ARRAYS,
    CORRECTION,
    DIGEST,
    FRAME,
    METRICS,
    NAME,
    NONCE,
    STRATEGY_CONFIG,
    VERSION,
    WEIGHT,
    EvaluateAsk,
    FitReply,
    Hello,
    PlanAsk,
    ScoreReply,
    TrainAsk,
    array_record,
    config_record,
    decode,
    decode_correction,
    decode_weights,
    digest_of,
    encode,
    size_bytes,
)
from fedmm.models.multimodal import build_model
from fedmm.schema import Frozen, Labels
from tests.federation.scripted import SPEC, fit_reply, hello, on_the_wire, rewritten, score_reply

SECRET = "Anna Example"

# --- frames -----------------------------------------------------------------------------------------------------------

number = st.floats(allow_nan=False, allow_infinity=False)
above_zero = st.floats(1e-9, 1e9)
count = st.integers(0, 2**53)
run = st.text(min_size=1, max_size=64)
nonce, digest = st.from_regex(NONCE, fullmatch=True), st.from_regex(DIGEST, fullmatch=True)
scalars = st.one_of(st.text(), st.integers(-(2**63), 2**63 - 1), number, st.booleans())
flat = st.dictionaries(st.text(), scalars, max_size=5)
hospital = st.from_regex(NAME, fullmatch=True)
labels = st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=3).map(lambda f: Labels(findings=tuple(f)))
json_value = st.recursive(
    st.one_of(st.none(), st.booleans(), count, number, st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=10,
)
scores = st.dictionaries(st.text().filter(lambda key: key != "mean_auroc"), json_value, max_size=4)
said: dict[str, st.SearchStrategy[Any]] = {
    "hospital": hospital,
    "run": run,
    "round": count,
    "nonce": nonce,
    "release": st.just("") | digest,
    "epsilon": st.floats(0, 1e9),
    "ceiling": above_zero,
    "delta": st.floats(1e-12, 0.5),
    "unprotected": count,
    "ledger_sequence": count,
    "ledger_hash": st.text(max_size=256),
    "ledger_signature": st.text(max_size=1024),
    "ledger_key": st.text(max_size=256),
}
bodies: st.SearchStrategy[Frozen] = st.one_of(
    st.builds(
        Hello,
        hospital=hospital,
        labels=labels,
        fedmm=st.text(max_size=64),
        ceiling=above_zero,
        delta=st.floats(1e-12, 0.5),
        metrics=st.sampled_from(["no", "noisy", "exact"]),
        least_noise=st.floats(0, 1e9),
        refusal_code=st.just(0),
        ledger_key=digest,
    ),
    st.builds(
        Hello,
        hospital=hospital,
        labels=labels,
        fedmm=st.text(max_size=64),
        ceiling=above_zero,
        delta=st.floats(1e-12, 0.5),
        metrics=st.just("no"),
        refusal_code=st.integers(1, 2**53),
        refusal=st.text(max_size=300),
    ),
    st.builds(PlanAsk, plan=flat, rounds=st.integers(0, 10_000)),
    st.builds(
        TrainAsk, run=run, round=st.integers(1, 10_000), nonce=nonce, settings=flat, spec=st.just(SPEC), plan=flat
    ),
    st.builds(
        EvaluateAsk, run=run, round=st.integers(0, 10_000), nonce=nonce, settings=flat, spec=st.just(SPEC), plan=flat
    ),
    st.builds(FitReply, private=st.booleans(), **said),
    st.builds(
        ScoreReply,
        scores=st.none() | scores,
        histogram=st.none() | st.lists(number, max_size=20).map(tuple),
        noise_multiplier=st.floats(0, 1e6),
        **said,
    ),
)


@given(bodies)
def test_every_body_comes_out_of_flowers_wire_format_as_it_went_in(body: Frozen) -> None:
    message = on_the_wire(Message(encode(body), 2, "train"))
    found = decode(message.content, type(body))  # type: ignore[type-var]
    assert found == body
    assert found.model_dump_json() == body.model_dump_json()  # 1 is not 1.0, and not true


def test_the_frame_is_found_where_flowers_strategies_put_it() -> None:
    ask = TrainAsk(run="r", round=3, nonce="0" * 32, settings=RunConfig().flat(), spec=SPEC, plan={})
    record = config_record(ask)
    record["server-round"] = 3  # strategies add this
    assert decode(RecordDict({STRATEGY_CONFIG: record}), TrainAsk) == ask


def test_the_run_settings_cross_with_their_types() -> None:
    config = RunConfig()
    ask = TrainAsk(run="r", round=1, nonce="0" * 32, settings=config.flat(), spec=SPEC, plan={})
    found = decode(on_the_wire(Message(encode(ask), 2, "train")).content, TrainAsk)
    assert RunConfig.from_flat(found.settings) == config
    assert [type(v) for v in found.settings.values()] == [type(v) for v in config.flat().values()]


def test_a_name_that_site_toml_allows_is_one_that_a_hello_allows() -> None:
    assert any(getattr(rule, "pattern", None) == NAME for rule in HospitalSection.model_fields["name"].metadata)


@pytest.mark.parametrize("name", ["", "a b", "a\nround 9/9", "\x1b[2J", "../x", "<b>", "ä", "a" * 65, ".hidden", "a\n"])
def test_a_name_that_could_disturb_a_terminal_a_file_or_a_page_is_refused(name: str) -> None:
    with pytest.raises(MessageInvalid):
        decode(rewritten(encode(hello("north")), hospital=name), Hello)


GOOD = json.loads(fit_reply("north").model_dump_json())
FRAMES: dict[str, Any] = {
    "no frame": RecordDict(),
    "empty frame": RecordDict({FRAME: ConfigRecord()}),
    "frame of metrics": RecordDict({FRAME: MetricRecord({"version": 1})}),
    "frame of arrays": RecordDict({FRAME: ArrayRecord()}),
    "newer version": {"version": VERSION + 1},
    "version as text": {"version": str(VERSION)},
    "version as list": {"version": [VERSION]},
    "other kind": {"kind": "ScoreReply"},
    "kind as list": {"kind": ["FitReply"]},
    "body as bytes": {"body": json.dumps(GOOD).encode()},
    "body as list": {"body": [json.dumps(GOOD)]},
    "body as number": {"body": 1},
    "no JSON": {"body": "{"},
    "nothing": {"body": ""},
    "null": {"body": "null"},
    "a list": {"body": "[]"},
    "deep nesting": {"body": "[" * 100_000},
    "half a surrogate escape": {"body": json.dumps(GOOD | {"run": "\ud800"})},
    "half a surrogate": {"body": json.dumps(GOOD).replace("run-1", "\ud800")},
    "extra key": {"body": json.dumps(GOOD | {"note": SECRET})},
    "missing key": {"body": json.dumps({k: v for k, v in GOOD.items() if k != "round"})},
    "NaN": {"body": json.dumps(GOOD | {"epsilon": math.nan})},
    "infinity": {"body": json.dumps(GOOD | {"epsilon": math.inf})},
    "infinity in digits": {"body": json.dumps(GOOD | {"epsilon": 0.123}).replace("0.123", "1e999")},
    "number of a million digits": {"body": json.dumps(GOOD | {"round": 12345}).replace("12345", "1" * 1_000_000)},
    "text for a number": {"body": json.dumps(GOOD | {"epsilon": SECRET})},
    "number for text": {"body": json.dumps(GOOD | {"hospital": 1})},
    "number for a truth": {"body": json.dumps(GOOD | {"private": 1})},
    "text that reads as a number": {"body": json.dumps(GOOD | {"epsilon": "0.5"})},
    "epsilon below 0": {"body": json.dumps(GOOD | {"epsilon": -1})},
    "ceiling of 0": {"body": json.dumps(GOOD | {"ceiling": 0})},
    "delta of 1": {"body": json.dumps(GOOD | {"delta": 1})},
    "hash of a megabyte": {"body": json.dumps(GOOD | {"ledger_hash": "a" * 2**20})},
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_breaks_the_form_is_refused_and_not_repeated(name: str) -> None:
    change = FRAMES[name]
    if isinstance(change, dict):
        good = {"version": VERSION, "kind": "FitReply", "body": json.dumps(GOOD)}
        change = RecordDict({FRAME: ConfigRecord(good | change)})
    with pytest.raises(MessageInvalid) as caught:
        decode(change, FitReply)
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # nor does a traceback repeat it


def test_the_good_frame_of_that_table_is_accepted() -> None:
    good = ConfigRecord({"version": VERSION, "kind": "FitReply", "body": json.dumps(GOOD)})
    assert decode(RecordDict({FRAME: good}), FitReply) == fit_reply("north")


@given(st.text() | st.binary() | st.floats() | st.lists(st.integers(-9, 9)))
def test_no_body_raises_anything_but_message_invalid(body: Any) -> None:
    with pytest.raises(MessageInvalid):
        decode(RecordDict({FRAME: ConfigRecord({"version": VERSION, "kind": "FitReply", "body": body})}), FitReply)


@pytest.mark.parametrize("area", ["high", -0.1, 1.5, [0.5], {"a": 1}])
def test_scores_whose_area_is_no_area_are_refused(area: object) -> None:
    content = encode(score_reply("north", scores={}))
    with pytest.raises(MessageInvalid):
        decode(rewritten(content, scores={"mean_auroc": area}), ScoreReply)


@pytest.mark.parametrize("hidden", [{"a": [1, {"b": math.nan}]}, {"calibration": math.inf}])
def test_a_number_in_scores_that_is_not_finite_is_refused_however_deep(hidden: dict[str, Any]) -> None:
    content = encode(score_reply("north", scores={}))
    with pytest.raises(MessageInvalid):
        decode(rewritten(content, scores=hidden), ScoreReply)


@pytest.mark.parametrize("area", [None, 0, 0.5, 1.0])
def test_scores_with_an_area_or_without_one_are_accepted(area: float | None) -> None:
    body = score_reply("north", scores={"mean_auroc": area})
    assert decode(encode(body), ScoreReply).scores == {"mean_auroc": area}


# --- weights ----------------------------------------------------------------------------------------------------------

SHAPE = (2, 3)
FINE = np.arange(6, dtype=np.float32).reshape(SHAPE)


def saved(value: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=allow_pickle)
    return buffer.getvalue()


def with_header(header: bytes, body: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def labelled(data: bytes, *, dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> RecordDict:
    return RecordDict({ARRAYS: ArrayRecord({"w": Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=data)})})


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(npst.arrays(np.float32, npst.array_shapes(min_dims=0, min_side=0, max_side=4), elements=finite))
def test_weights_arrive_bit_by_bit(value: np.ndarray) -> None:
    message = on_the_wire(
        Message(encode(hello("north"), arrays=array_record({"w": torch.from_numpy(value)})), 2, "train")
    )
    found = decode_weights(message.content, {"w": value.shape})["w"]
    assert found.dtype == torch.float32
    assert tuple(found.shape) == value.shape
    assert found.numpy().tobytes() == value.tobytes()


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(12.0)[::2],
        torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "strided", "channels last"],
)
def test_the_layout_in_memory_does_not_change_the_weights(value: torch.Tensor) -> None:
    found = decode_weights(encode(hello("north"), arrays=array_record({"w": value})), {"w": tuple(value.shape)})
    assert torch.equal(found["w"], value)
    assert found["w"].is_contiguous()


def test_a_whole_model_arrives_under_its_own_names() -> None:
    state = build_model(SPEC).state_dict()
    message = on_the_wire(Message(encode(hello("north"), arrays=array_record(state)), 2, "train"))
    found = decode_weights(message.content, {name: tuple(value.shape) for name, value in state.items()})
    assert set(found) == set(state)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_arrays_travel_in_the_order_of_their_names() -> None:
    assert list(array_record({"b": torch.ones(1), "a": torch.ones(1)})) == ["a", "b"]


def test_decoded_weights_can_be_written_without_changing_the_message() -> None:
    content = labelled(saved(FINE))
    decode_weights(content, {"w": SHAPE})["w"].zero_()
    assert decode_weights(content, {"w": SHAPE})["w"].numpy().tolist() == FINE.tolist()


def test_bfloat16_cannot_even_be_sent() -> None:
    with pytest.raises(TypeError):
        array_record({"w": torch.ones(2, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({ARRAYS: ArrayRecord()}),
        RecordDict({ARRAYS: MetricRecord({"w": 1.0})}),
        RecordDict({ARRAYS: ArrayRecord({"v": Array(FINE)})}),
        RecordDict({ARRAYS: ArrayRecord({"w": Array(FINE), "v": Array(FINE)})}),
        RecordDict({"other": ArrayRecord({"w": Array(FINE)})}),
    ],
    ids=["nothing", "empty", "metrics", "another name", "one more", "another record"],
)
def test_other_tensors_than_the_models_are_refused(content: RecordDict) -> None:
    with pytest.raises(MessageInvalid):
        decode_weights(content, {"w": SHAPE})


ARRAYS_TABLE: dict[str, RecordDict] = {
    "float64": labelled(saved(FINE.astype("f8")), dtype="float64"),
    "float64 said to be float32": labelled(saved(FINE[:, :1].astype("f8"))),
    "float16": labelled(saved(FINE.astype("f2")), dtype="float16"),
    "int32": labelled(saved(FINE.astype("i4")), dtype="int32"),
    "int32 said to be float32": labelled(saved(FINE.astype("i4"))),
    "big endian": labelled(saved(FINE.astype(">f4"))),
    "bfloat16": labelled(saved(FINE), dtype="bfloat16"),
    "no type": labelled(saved(FINE), dtype=""),
    "structured": labelled(saved(np.zeros(SHAPE, dtype=[("a", "f4")]))),
    "another shape": labelled(saved(FINE.T), shape=(3, 2)),
    "another shape than it says": labelled(saved(FINE.T)),
    "flat": labelled(saved(FINE.ravel())),
    "flat in its header alone": labelled(saved(FINE.ravel()), shape=SHAPE),
    "negative shape": labelled(saved(FINE), shape=(-2, -3)),
    "NaN": labelled(saved(np.full(SHAPE, np.nan, "f4"))),
    "infinity": labelled(saved(np.full(SHAPE, np.inf, "f4"))),
    "one infinity": labelled(saved(np.where(FINE == 3, -np.inf, FINE).astype("f4"))),
    "no bytes": labelled(b""),
    "magic only": labelled(saved(FINE)[:8]),
    "half a header": labelled(saved(FINE)[:64]),
    "one byte missing": labelled(saved(FINE)[:-1]),
    "one byte more": labelled(saved(FINE) + b"\0"),
    "only noise": labelled(bytes(range(152))),
    "npz": labelled(b"PK\x03\x04" + saved(FINE)[4:]),
    "version 2 of the format": labelled(b"\x93NUMPY\x02\x00" + saved(FINE)[8:]),
    "huge shape in the header": labelled(saved(FINE).replace(b"(2, 3), }         ", b"(1000000000, 999)}")),
    "header length beyond the data": labelled(saved(FINE)[:8] + b"\xff\xff" + saved(FINE)[10:]),
    "header length of zero": labelled(saved(FINE)[:8] + b"\0\0" + saved(FINE)[10:]),
    "code in the header": labelled(with_header(b"{'descr': __import__('os').abort(), }".ljust(118), FINE.tobytes())),
    "unfinished header": labelled(with_header(b"{'descr': '''".ljust(118), FINE.tobytes())),
    "text behind the header": labelled(saved(FINE).replace(b" \n", b"x\n")),
}


@pytest.mark.parametrize("name", ARRAYS_TABLE)
def test_an_array_that_is_not_the_models_is_refused(name: str) -> None:
    with pytest.raises(MessageInvalid):
        decode_weights(ARRAYS_TABLE[name], {"w": SHAPE})
    correction = RecordDict({CORRECTION: ARRAYS_TABLE[name].array_records[ARRAYS]})
    with pytest.raises(MessageInvalid):
        decode_correction(correction, {"w": SHAPE})


def test_a_correction_travels_beside_the_weights_and_may_be_absent() -> None:
    weights, shift = {"w": torch.from_numpy(FINE)}, {"w": torch.from_numpy(-FINE)}
    content = encode(hello("north"), arrays=array_record(weights), correction=array_record(shift))
    arrived = on_the_wire(Message(content, 1, "train")).content
    found = decode_correction(arrived, {"w": SHAPE})
    assert found is not None
    assert torch.equal(found["w"], shift["w"])
    assert torch.equal(decode_weights(arrived, {"w": SHAPE})["w"], weights["w"])
    assert decode_correction(encode(hello("north"), arrays=array_record(weights)), {"w": SHAPE}) is None


@pytest.mark.parametrize("declared", [(), ("smell",), ("audio", "image"), ("image", "image")], ids=str)
def test_modalities_that_nobody_knows_are_no_introduction(declared: tuple[str, ...]) -> None:
    with pytest.raises(MessageInvalid):
        decode(rewritten(encode(hello("north")), modalities=list(declared)), Hello)


def test_a_huge_declared_shape_costs_no_memory() -> None:
    huge = (1_000_000, 1_000_000)
    data = with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {huge}, }}".encode(), b"")
    with pytest.raises(MessageInvalid):
        decode_weights(labelled(data, shape=huge), {"w": SHAPE})
    with pytest.raises(MessageInvalid):
        decode_weights(labelled(data, shape=huge), {"w": huge})


def test_a_header_that_reaches_into_the_numbers_is_refused() -> None:
    data = saved(np.ones((10, 10), "f4"))
    data = data[:8] + b"\0\0" + data[10:410]
    with pytest.raises(MessageInvalid):
        decode_weights(labelled(data, shape=(10, 10)), {"w": (10, 10)})


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_in_an_array_is_never_opened(tmp_path: Path) -> None:
    value = np.empty(SHAPE, dtype=object)
    value[:] = Trap(tmp_path / "sprung")
    with pytest.raises(MessageInvalid):
        decode_weights(labelled(saved(value, allow_pickle=True)), {"w": SHAPE})
    assert list(tmp_path.iterdir()) == []


def only_refused_or_right(content: RecordDict) -> None:
    try:
        found = decode_weights(content, {"w": SHAPE})["w"]
    except MessageInvalid:
        return
    assert found.dtype == torch.float32
    assert tuple(found.shape) == SHAPE
    assert bool(torch.isfinite(found).all())


@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(0, 151), st.integers(0, 255)), max_size=4), st.integers(0, 152), st.binary())
def test_changed_bytes_are_refused_or_harmless(changes: list[tuple[int, int]], cut: int, more: bytes) -> None:
    data = bytearray(saved(FINE))
    for place, value in changes:
        data[place] = value
    only_refused_or_right(labelled(bytes(data)))
    only_refused_or_right(labelled(bytes(data[:cut])))
    only_refused_or_right(labelled(bytes(data[:cut]) + more + bytes(data[cut:])))


@given(st.binary(max_size=200) | st.text("{}()[]',:0123456789 descrfotan_shpTFuel<", max_size=200).map(str.encode))
def test_any_header_is_refused_or_harmless(header: bytes) -> None:
    only_refused_or_right(labelled(with_header(header, FINE.tobytes())))


@given(st.text(), st.lists(st.integers(-(2**31), 2**31 - 1)), st.text(), st.binary())
def test_any_label_is_refused_or_harmless(dtype: str, shape: list[int], stype: str, data: bytes) -> None:
    for kind in (stype, "numpy.ndarray"):
        array = Array(dtype=dtype, shape=tuple(shape), stype=kind, data=data)
        only_refused_or_right(RecordDict({ARRAYS: ArrayRecord({"w": array})}))


def test_another_serialisation_than_numpys_is_refused() -> None:
    array = Array(dtype="float32", shape=SHAPE, stype="torch.pickle", data=saved(FINE))
    with pytest.raises(MessageInvalid):
        decode_weights(RecordDict({ARRAYS: ArrayRecord({"w": array})}), {"w": SHAPE})


# --- what a message weighs --------------------------------------------------------------------------------------------


def test_the_weight_in_the_average_travels_as_flowers_strategies_expect_it() -> None:
    content = encode(fit_reply("north"), arrays=array_record({"w": torch.ones(2)}), weight=3)
    assert dict(content.metric_records[METRICS]) == {WEIGHT: 3.0}


def test_a_message_weighs_at_least_its_arrays_and_an_error_its_text() -> None:
    message = Message(encode(hello("north"), arrays=array_record({"w": torch.zeros(1000)})), 2, "train")
    assert 4000 < size_bytes(message) < 5000
    assert size_bytes(Message(RecordDict(), 2, "train")) == 0
    assert size_bytes(Message(Error(1001, "Müller"), reply_to=message)) == 7  # bytes, not letters
    assert size_bytes(Message(Error(1001), reply_to=message)) == 0


@given(
    arrays=st.dictionaries(
        st.text(max_size=200), st.integers(0, 40_000) | st.sampled_from([0, 1, 127, 128]), max_size=4
    ),
    shape=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
    key=st.text(max_size=9),
)
def test_a_message_weighs_what_protobuf_makes_of_it(arrays: dict[str, int], shape: list[int], key: str) -> None:
    made = {
        name: Array(dtype="float32", shape=tuple(shape), stype="numpy.ndarray", data=bytes(size))
        for name, size in arrays.items()
    }
    content = RecordDict({**encode(hello("north"), weight=1.0), key: ArrayRecord(made), "empty": ArrayRecord()})
    assert size_bytes(Message(content, 2, "train")) == recorddict_to_proto(content).ByteSize()


def test_what_a_peer_writes_beside_an_array_cannot_stop_the_counting() -> None:
    """protobuf would raise: for a number of more than 31 bits, for half a letter."""
    odd = Array(dtype="\ud800", shape=(2**70, -(2**70)), stype="x", data=b"1234")
    content = RecordDict({"\udfff": ArrayRecord({"\ud800": odd})})
    assert 4 < size_bytes(Message(content, 2, "train")) < 100


# --- what a charge pays for -------------------------------------------------------------------------------------------


def test_the_digest_of_weights_is_that_of_what_arrives() -> None:
    arrays = array_record({"a": torch.ones(2, 3), "b": torch.zeros(4)})
    arrived = on_the_wire(Message(encode(fit_reply("north"), arrays=arrays), 2, "train"))
    assert digest_of(arrived.content.array_records[ARRAYS]) == digest_of(arrays)
    assert len(digest_of(arrays)) == 64


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.ones(3, 2), "b": torch.zeros(4)},
        {"a": torch.ones(2, 3), "c": torch.zeros(4)},
        {"a": torch.ones(2, 3), "b": -torch.zeros(4)},
        {"a": torch.ones(2, 3)},
    ],
    ids=["shape", "name", "sign of zero", "one fewer"],
)
def test_other_weights_have_another_digest(other: dict[str, torch.Tensor]) -> None:
    assert digest_of(array_record(other)) != digest_of(array_record({"a": torch.ones(2, 3), "b": torch.zeros(4)}))


def test_the_digest_of_scores_does_not_hang_on_the_order_of_keys_and_refuses_nan() -> None:
    assert digest_of({"a": 1, "b": [0.5]}) == digest_of({"b": [0.5], "a": 1})
    assert digest_of((1.0, 2.0)) == digest_of([1.0, 2.0])
    assert digest_of((1.0, 2.0)) != digest_of((2.0, 1.0))
    with pytest.raises(ValueError, match="JSON"):
        digest_of((math.nan,))
