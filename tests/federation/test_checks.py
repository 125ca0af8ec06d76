"""One hostile reply costs that hospital its turn and nobody else's."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.errors import REFUSALS, UNEXPECTED_CODE, MessageInvalid
from fedmm.federation.checks import MAX_WEIGHT, Failure, Scored, check_fits, check_scores
from fedmm.federation.messages import ARRAYS, FRAME, METRICS, WEIGHT, ScoreReply, decode_weights, encode
from tests.federation.scripted import RUN, SHAPES, answer, fit_reply, hello, on_the_wire, rewritten, weights

SECRET = "Anna Example"
NAMES = {2: "chur", 3: "basel", 4: "aachen"}
OFFENDER, OTHERS = 3, ["aachen", "chur"]


def fit(node: int, *, weight: float | None = 1.0, **changes: Any) -> Message:
    return answer(node, encode(fit_reply(NAMES.get(node, "stranger"), **changes), weights=weights(), weight=weight))


def check(*replies: Message) -> tuple[list[str], list[Failure]]:
    fits, failures = check_fits(replies, NAMES, run=RUN, round_number=1, shapes=SHAPES)
    return [fit.hospital for fit in fits], failures


def with_arrays(**changes: Array | None) -> Message:
    """The offender's reply with tensors changed, added (another name) or removed (None)."""
    content = encode(fit_reply("basel"), weights=weights(), weight=1.0)
    arrays = {k.replace("__", "."): v for k, v in changes.items()}
    kept = {**content.array_records[ARRAYS], **arrays}
    content[ARRAYS] = ArrayRecord({name: array for name, array in kept.items() if array is not None})
    return answer(OFFENDER, content)


def with_metrics(record: MetricRecord | ConfigRecord | None) -> Message:
    content = encode(fit_reply("basel"), weights=weights())
    if record is not None:
        content[METRICS] = record
    return answer(OFFENDER, content)


def with_frame(**changes: Any) -> Message:
    return answer(OFFENDER, rewritten(encode(fit_reply("basel"), weights=weights(), weight=1.0), **changes))


def npy(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


def lying(data: bytes, shape: tuple[int, ...] = (2, 3)) -> Array:
    return Array(dtype="float32", shape=shape, stype="numpy.ndarray", data=data)


HOSTILE: dict[str, Callable[[], Message]] = {
    "another run": lambda: fit(OFFENDER, run="run-0"),
    "an earlier round": lambda: fit(OFFENDER, round=0),
    "a later round": lambda: fit(OFFENDER, round=2),
    "another hospital's name": lambda: fit(OFFENDER, hospital="aachen"),
    "an unknown hospital's name": lambda: fit(OFFENDER, hospital="zug"),
    "another kind of message": lambda: answer(OFFENDER, encode(hello("basel"))),
    "nothing in it": lambda: answer(OFFENDER, RecordDict()),
    "an unknown key": lambda: with_frame(note=SECRET),
    "NaN as epsilon": lambda: with_frame(epsilon=math.nan),
    "a negative epsilon": lambda: with_frame(epsilon=-1.0),
    "a ceiling of 0": lambda: with_frame(ceiling=0.0),
    "no weight in the average": lambda: fit(OFFENDER, weight=None),
    "weight NaN": lambda: fit(OFFENDER, weight=math.nan),
    "weight infinity": lambda: fit(OFFENDER, weight=math.inf),
    "weight 0": lambda: fit(OFFENDER, weight=0.0),
    "weight -1": lambda: fit(OFFENDER, weight=-1.0),
    "weight 1e12": lambda: fit(OFFENDER, weight=1e12),
    "weight of 64 bits": lambda: with_metrics(MetricRecord({WEIGHT: 2**63 - 1})),
    "weight as text": lambda: with_metrics(ConfigRecord({WEIGHT: "1"})),
    "weight as list": lambda: with_metrics(MetricRecord({WEIGHT: [1.0]})),
    "weight under another name": lambda: with_metrics(MetricRecord({"examples": 1.0})),
    "a tensor more": lambda: with_arrays(extra=Array(np.ones(1, "f4"))),
    "a tensor fewer": lambda: with_arrays(scale=None),
    "a tensor of another shape": lambda: with_arrays(head__3__weight=Array(np.ones((3, 2), "f4"))),
    "a tensor to broadcast": lambda: with_arrays(head__3__weight=Array(np.ones((1, 3), "f4"))),
    "a tensor of doubles": lambda: with_arrays(head__3__weight=Array(np.ones((2, 3), "f8"))),
    "a tensor of integers": lambda: with_arrays(head__3__weight=Array(np.ones((2, 3), "i4"))),
    "NaN in a tensor": lambda: with_arrays(scale=Array(np.array(np.nan, "f4"))),
    "infinity in a tensor": lambda: with_arrays(scale=Array(np.array(-np.inf, "f4"))),
    "a pickle in a tensor": lambda: with_arrays(head__3__weight=lying(npy(np.full((2, 3), None)))),
    "a cut tensor": lambda: with_arrays(head__3__weight=lying(npy(np.ones((2, 3), "f4"))[:-3])),
    "a tensor of noise": lambda: with_arrays(head__3__weight=lying(b"PK\x03\x04" * 38)),
    "a tensor that lies about its shape": lambda: with_arrays(head__3__weight=lying(npy(np.ones((6, 1), "f4")))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_is_left_out_and_the_round_goes_on(name: str) -> None:
    hospitals, failures = check(fit(2), on_the_wire(HOSTILE[name]()), fit(4))
    assert hospitals == OTHERS
    (failure,) = failures
    assert (failure.hospital, failure.kind, failure.code) == ("basel", "invalid", MessageInvalid.code)
    assert failure.reason
    assert SECRET not in failure.reason


def test_the_table_is_hostile_only_where_it_says_so() -> None:
    hospitals, failures = check(fit(2), with_arrays(), with_metrics(None), fit(4))
    assert hospitals == ["aachen", "basel", "chur"]
    assert [f.reason for f in failures] == ["a second reply in the same round"]


def test_all_hostile_replies_together_leave_nothing_to_average() -> None:
    hospitals, failures = check(*(make() for make in HOSTILE.values()))
    assert hospitals == []
    assert len(failures) == len(HOSTILE) + len(OTHERS)  # those did not answer


def test_replies_come_out_by_name_whatever_the_order_of_arrival() -> None:
    for order in ((2, 3, 4), (4, 3, 2), (3, 4, 2)):
        hospitals, failures = check(*(fit(node) for node in order))
        assert hospitals == ["aachen", "basel", "chur"]
        assert failures == []


def test_only_checked_weights_reach_the_strategy() -> None:
    reply = fit(2, weight=7.0)
    reply.content["more"] = ArrayRecord({"w": Array(np.ones(3))})
    reply.content["numbers"] = MetricRecord({"loss": 1.0})
    reply.content[METRICS]["loss"] = math.nan  # type: ignore[index]
    size = sum(len(array.data) for array in reply.content.array_records[ARRAYS].values())
    fits, _ = check_fits([reply, fit(3), fit(4)], NAMES, run=RUN, round_number=1, shapes=SHAPES)
    content = fits[-1].message.content
    assert set(content) == {ARRAYS, METRICS}
    assert dict(content.metric_records[METRICS]) == {WEIGHT: 7.0}
    found = decode_weights(content, SHAPES)
    assert all(torch.equal(found[name], value) for name, value in weights().items())
    assert fits[-1].size > size


@pytest.mark.parametrize("weight", [1e-9, 1.0, MAX_WEIGHT])
def test_a_weight_in_range_is_accepted(weight: float) -> None:
    assert check(fit(2, weight=weight), fit(3), fit(4)) == (["aachen", "basel", "chur"], [])


def test_a_second_reply_does_not_replace_the_first() -> None:
    second = answer(3, encode(fit_reply("basel"), weights=weights("another"), weight=1.0))
    fits, failures = check_fits([fit(3), second], {3: "basel"}, run=RUN, round_number=1, shapes=SHAPES)
    assert torch.equal(decode_weights(fits[0].message.content, SHAPES)["scale"], weights()["scale"])
    assert [(f.hospital, f.kind) for f in failures] == [("basel", "invalid")]


def test_a_reply_after_a_refusal_does_not_count() -> None:
    hospitals, failures = check(fit(2), answer(3, Error(1001, "BUDGET_EXHAUSTED: x")), fit(3), fit(4))
    assert hospitals == OTHERS
    assert [f.kind for f in failures] == ["refused", "invalid"]


def test_a_node_that_was_not_asked_is_left_out_even_with_a_good_name() -> None:
    hospitals, failures = check(fit(2), fit(3), fit(4), fit(9, hospital="aachen"), answer(8, Error(1001, SECRET)))
    assert hospitals == ["aachen", "basel", "chur"]
    assert [(f.hospital, f.kind) for f in failures] == [("node 8", "invalid"), ("node 9", "invalid")]
    assert SECRET not in str(failures)


@pytest.mark.parametrize("code", sorted(REFUSALS))
def test_a_refusal_keeps_its_code_and_its_safe_text(code: int) -> None:
    hospitals, failures = check(fit(2), on_the_wire(answer(3, Error(code, "NAME: because"))), fit(4))
    assert hospitals == OTHERS
    assert failures == [Failure("basel", "refused", code, "NAME: because")]


def test_an_unforeseen_failure_keeps_its_correlation_id() -> None:
    _, failures = check(fit(2), answer(3, Error(UNEXPECTED_CODE, "UNEXPECTED: correlation id 1f")), fit(4))
    assert failures == [Failure("basel", "failed", UNEXPECTED_CODE, "UNEXPECTED: correlation id 1f")]


@pytest.mark.parametrize("code", [0, 2, 5, 1000, 1050, 9999, -1])
def test_the_text_of_an_unknown_code_is_not_kept(code: int) -> None:
    hospitals, failures = check(fit(2), on_the_wire(answer(3, Error(code, f"Traceback: {SECRET}"))), fit(4))
    assert hospitals == OTHERS
    assert [(f.hospital, f.kind, f.code) for f in failures] == [("basel", "failed", code)]
    assert SECRET not in failures[0].reason


def test_a_refusals_text_stays_on_its_line_and_short() -> None:
    text = "NAME: x\nround 9/9 | all fine\r\x1b[2J\u202e" + "y" * 5000
    _, failures = check(fit(2), answer(3, Error(1001, text)), fit(4))
    assert failures[0].reason.isprintable()
    assert len(failures[0].reason) <= 300


def test_an_error_without_a_text_is_a_failure_too() -> None:
    assert check(fit(2), answer(3, Error(1001)), fit(4))[1] == [Failure("basel", "refused", 1001, "")]


def test_a_message_with_neither_content_nor_error_is_left_out() -> None:
    reply = fit(3)
    reply.__dict__["_content"] = None
    hospitals, failures = check(fit(2), reply, fit(4))
    assert hospitals == OTHERS
    assert [(f.hospital, f.kind) for f in failures] == [("basel", "invalid")]


def test_silence_is_said() -> None:
    hospitals, failures = check(fit(2), fit(4))
    assert hospitals == OTHERS
    assert [(f.hospital, f.kind, f.code) for f in failures] == [("basel", "silent", 0)]
    assert [f.hospital for f in check()[1]] == ["aachen", "basel", "chur"]


# --- anything at all --------------------------------------------------------------------------------------------------

text = st.text(max_size=20) | st.sampled_from([FRAME, ARRAYS, METRICS, WEIGHT, "config", "version", "kind", "body"])
numbers = st.integers() | st.floats() | st.lists(st.integers(), max_size=3) | st.lists(st.floats(), max_size=3)
values = numbers | st.booleans() | text | st.binary(max_size=20) | st.sampled_from(["FitReply", "ScoreReply", 1])
arrays = st.builds(
    Array,
    dtype=st.sampled_from(["float32", "float64", "bfloat16", "object", ""]),
    shape=st.lists(st.integers(-3, 10), max_size=3).map(tuple) | st.sampled_from(sorted(SHAPES.values())),
    stype=st.sampled_from(["numpy.ndarray", "", "pickle"]),
    data=st.binary(max_size=200),
)
records = st.one_of(
    st.dictionaries(text, values, max_size=5).map(ConfigRecord),
    st.dictionaries(text, numbers, max_size=5).map(MetricRecord),
    st.dictionaries(text | st.sampled_from(sorted(SHAPES)), arrays, max_size=5).map(ArrayRecord),
)
anything = st.dictionaries(text, records, max_size=4)


@settings(max_examples=300)
@given(anything, st.sampled_from([(), (FRAME,), (FRAME, ARRAYS), (FRAME, ARRAYS, METRICS)]))
def test_no_content_of_a_reply_ends_the_round(content: dict[str, Any], good_parts: tuple[str, ...]) -> None:
    """good_parts: what stays of a good reply, so that later checks are reached as well."""
    hostile = fit(OFFENDER)
    hostile.content = RecordDict({**content, **{name: hostile.content[name] for name in good_parts}})
    fits, failures = check_fits([fit(2), hostile, fit(4)], NAMES, run=RUN, round_number=1, shapes=SHAPES)
    good = {fit.hospital for fit in fits}
    assert good >= set(OTHERS)
    assert good | {failure.hospital for failure in failures} == set(NAMES.values())
    for passed in fits:
        assert 0 < float(passed.message.content.metric_records[METRICS][WEIGHT]) <= MAX_WEIGHT  # type: ignore[arg-type]
        decode_weights(passed.message.content, SHAPES)
    scored = check_scores([score(2), hostile, score(4)], NAMES, run=RUN, round_number=1)
    assert set(scored.scores) >= set(OTHERS)
    json.dumps(scored.scores, allow_nan=False)


@given(st.integers(-(2**31), 2**31 - 1), st.text(), st.sampled_from(sorted(NAMES)))
def test_no_error_reply_ends_the_round(code: int, reason: str, node: int) -> None:
    _, failures = check(*(fit(n) for n in NAMES if n != node), answer(node, Error(code, reason)))
    assert [(f.hospital, f.code) for f in failures] == [(NAMES[node], code)]


# --- scores -----------------------------------------------------------------------------------------------------------


def score(node: int, **changes: Any) -> Message:
    content: dict[str, Any] = {
        "hospital": NAMES.get(node, "stranger"),
        "run": RUN,
        "round": 1,
        "scores": {"mean_auroc": 0.5 + node / 100},
    }
    return answer(node, encode(ScoreReply(**{**content, **changes})), "evaluate")


def check_evaluation(*replies: Message) -> Scored:
    return check_scores(replies, NAMES, run=RUN, round_number=1)


def test_scores_withheld_scores_and_refusals_are_told_apart() -> None:
    found = check_evaluation(score(2), score(3, scores=None), answer(4, Error(1001, "BUDGET_EXHAUSTED: x"), "evaluate"))
    assert found.scores == {"chur": {"mean_auroc": 0.52}}
    assert found.withheld == ["basel"]
    assert found.failures == [Failure("aachen", "refused", 1001, "BUDGET_EXHAUSTED: x")]


HOSTILE_SCORES: dict[str, Callable[[], Message]] = {
    "another run": lambda: score(OFFENDER, run="run-0"),
    "another round": lambda: score(OFFENDER, round=2),
    "another hospital's name": lambda: score(OFFENDER, hospital="aachen"),
    "another kind of message": lambda: fit(OFFENDER),
    "nothing in it": lambda: answer(OFFENDER, RecordDict(), "evaluate"),
    "a list": lambda: with_scores([1]),
    "text as area": lambda: with_scores({"mean_auroc": "high"}),
    "NaN": lambda: with_scores({"accuracy": math.nan}),
}


def with_scores(scores: object) -> Message:
    content = encode(ScoreReply(hospital="basel", run=RUN, round=1, scores=None))
    return answer(OFFENDER, rewritten(content, scores=scores), "evaluate")


@pytest.mark.parametrize("name", HOSTILE_SCORES)
def test_a_hostile_score_is_left_out_and_the_others_stay(name: str) -> None:
    found = check_evaluation(score(2), on_the_wire(HOSTILE_SCORES[name]()), score(4))
    assert list(found.scores) == OTHERS
    assert [(f.hospital, f.kind) for f in found.failures] == [("basel", "invalid")]


def test_a_stranger_has_no_scores_whatever_it_calls_itself() -> None:
    for name in ("unknown", "aachen", "node 9"):
        found = check_evaluation(score(2), score(3), score(4), score(9, hospital=name, scores={"mean_auroc": 1.0}))
        assert found.scores["aachen"] == {"mean_auroc": 0.54}
        assert list(found.scores) == ["aachen", "basel", "chur"]
        assert [f.hospital for f in found.failures] == ["node 9"]


def test_a_second_score_does_not_replace_the_first() -> None:
    found = check_evaluation(score(2), score(3), score(4), score(3, scores=None), score(2, scores={"mean_auroc": 1.0}))
    assert found.scores["chur"] == {"mean_auroc": 0.52}
    assert found.withheld == []
    assert [f.hospital for f in found.failures] == ["basel", "chur"]


def test_a_hospital_that_sends_no_score_is_said_to_be_silent() -> None:
    assert [(f.hospital, f.kind) for f in check_evaluation(score(2), score(4)).failures] == [("basel", "silent")]
