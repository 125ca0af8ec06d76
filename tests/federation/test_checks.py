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
from flwr.common.serde import recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.errors import REFUSALS, UNEXPECTED_CODE, MessageInvalid
from fedmm.federation.checks import MAX_WEIGHT, Arrival, Asked, Expected, Failure, Scored, check_scores
from fedmm.federation.messages import (
    ARRAYS,
    EXACT,
    FRAME,
    HISTOGRAM,
    METRICS,
    UPDATE,
    WEIGHT,
    WITHHELD,
    array_record,
    decode_weights,
    digest_of,
    encode,
    views,
)
from fedmm.training.histograms import cells
from tests.federation.scripted import (
    LABELS,
    NONCE,
    RUN,
    SHAPES,
    answer,
    checked,
    fit_content,
    fit_reply,
    hello,
    key_in_words,
    key_of,
    noisy_histogram,
    on_the_wire,
    rewritten,
    score_reply,
    weights,
)

SECRET = "Anna Example"
NAMES = {2: "chur", 3: "basel", 4: "aachen"}
OFFENDER, OTHERS = 3, ["aachen", "chur"]
LENGTH, NOISE = cells(LABELS), 2.0  # of a score histogram


def fit(node: int, *, weight: float | None = 1.0, **changes: Any) -> Message:
    return answer(node, fit_content(NAMES.get(node, "stranger"), weight=weight, **changes))


ASKED = Asked(RUN, 1, NONCE, {name: key_in_words(name) for name in NAMES.values()})


def expected(*, max_weight: float = MAX_WEIGHT, max_norm: float = 1e3) -> Expected:
    return Expected(ASKED, array_record(weights()), max_norm, max_weight)


def check(*replies: Message) -> tuple[list[str], list[Failure]]:
    fits, heard = checked(replies, NAMES, expected())
    assert len(heard.arrived) == len(replies)
    return list(fits), heard.failures


def with_arrays(**changes: Array | None) -> Message:
    """The offender's reply with tensors changed, added (another name) or removed (None), and signed as they are."""
    arrays = {k.replace("__", "."): v for k, v in changes.items()}
    kept = {**array_record(weights()), **arrays}
    sent = ArrayRecord({name: array for name, array in kept.items() if array is not None})
    return answer(OFFENDER, encode(fit_reply("basel", arrays=sent), arrays=sent, weight=1.0))


def with_metrics(record: MetricRecord | ConfigRecord | None) -> Message:
    content = fit_content("basel", weight=None)
    if record is not None:
        content[METRICS] = record
    return answer(OFFENDER, content)


def with_frame(**changes: Any) -> Message:
    return answer(OFFENDER, rewritten(fit_content("basel"), **changes))


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
    "a signature of nothing": lambda: fit(OFFENDER, ledger_signature="00" * 64),
    "no signature": lambda: fit(OFFENDER, ledger_signature=""),
    "a signature that is no number": lambda: fit(OFFENDER, ledger_signature=SECRET),
    "a signature in capitals": lambda: fit(OFFENDER, ledger_signature=fit_reply("basel").ledger_signature.upper()),
    "the signature of another head": lambda: with_frame(ledger_hash="cd" * 32),
    "a head that is no number": lambda: with_frame(ledger_hash=SECRET),
    "a signature over the head alone": lambda: fit(
        OFFENDER, ledger_signature=key_of("basel").sign(bytes.fromhex("ab" * 32)).hex()
    ),
    "another hospital's key": lambda: fit(OFFENDER, ledger_key=key_in_words("aachen")),
    "an epsilon that was not signed": lambda: with_frame(epsilon=0.25),
    "the statement of another round": lambda: with_frame(
        statement_signature=fit_reply("basel", round=2).statement_signature
    ),
    "a statement that is not signed": lambda: fit(OFFENDER, statement_signature=""),
    "a key that is none": lambda: fit(OFFENDER, ledger_key="ff"),
    "a key that is no number": lambda: fit(OFFENDER, ledger_key=SECRET),
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
    size = recorddict_to_proto(reply.content).ByteSize()
    fits, heard = checked([reply, fit(3), fit(4)], NAMES, expected())
    assert fits["chur"].weight == 7.0
    found = decode_weights(RecordDict({ARRAYS: fits["chur"].arrays}), SHAPES)
    assert all(torch.equal(found[name], value) for name, value in weights().items())
    assert heard.arrived[-1] == Arrival("chur", UPDATE, size), "counted as it came"


def moved(length: float) -> Message:
    """The offender's reply, `length` away from what was sent, all in one number."""
    now = array_record(weights() | {"scale": weights()["scale"] + length})
    return answer(OFFENDER, encode(fit_reply("basel", arrays=now), arrays=now, weight=1.0))


@pytest.mark.parametrize(("length", "usable"), [(0.0, True), (-5.0, True), (5.0, True), (5.01, False), (-1e30, False)])
def test_an_update_may_be_as_long_as_was_agreed_and_no_longer(length: float, *, usable: bool) -> None:
    fits, heard = checked([fit(2), moved(length), fit(4)], NAMES, expected(max_norm=5.0))
    assert ("basel" in fits) is usable
    assert [f.kind for f in heard.failures] == ([] if usable else ["invalid"])
    assert all("max_update_norm = 5" in f.reason for f in heard.failures)


def test_the_norm_is_that_of_all_tensors_together() -> None:
    now = array_record({name: value + 1.0 for name, value in weights().items()})  # 67 numbers: the norm is 8.19
    for bound, usable in ((8.1, False), (8.2, True)):
        reply = answer(OFFENDER, encode(fit_reply("basel", arrays=now), arrays=now, weight=1.0))
        assert bool(checked([reply], {3: "basel"}, expected(max_norm=bound))[0]) is usable


@pytest.mark.parametrize(("weight", "usable"), [(1.0, True), (0.5, True), (1.0001, False), (MAX_WEIGHT, False)])
def test_nobody_counts_more_where_all_count_the_same(weight: float, *, usable: bool) -> None:
    fits, heard = checked([fit(3, weight=weight)], {3: "basel"}, expected(max_weight=1.0))
    assert bool(fits) is usable
    assert [f.kind for f in heard.failures] == ([] if usable else ["invalid"])


def test_everything_that_arrives_is_written_down_with_its_kind_and_its_size() -> None:
    replies = [
        fit(2),
        fit(2),
        answer(3, Error(1001, "BUDGET_EXHAUSTED: é")),
        answer(4, Error(5)),
        answer(9, RecordDict()),
        with_arrays(scale=None),
    ]
    sizes = [0 if m.has_error() else recorddict_to_proto(m.content).ByteSize() for m in replies]
    _, heard = checked(replies, NAMES, expected())
    assert heard.arrived == [
        Arrival("aachen", "refusal 5", 0),
        Arrival("basel", "refusal 1001", 20),  # bytes, not letters
        Arrival("basel", "unusable", sizes[5]),
        Arrival("chur", "unusable", sizes[1]),
        Arrival("chur", UPDATE, sizes[0]),
        Arrival("node 9", "unusable", sizes[4]),
    ]


@pytest.mark.parametrize("weight", [1e-9, 1.0, MAX_WEIGHT])
def test_a_weight_in_range_is_accepted(weight: float) -> None:
    assert check(fit(2, weight=weight), fit(3), fit(4)) == (["aachen", "basel", "chur"], [])


def test_a_second_reply_does_not_replace_the_first() -> None:
    second = answer(3, fit_content("basel", seed="another"))
    fits, heard = checked([fit(3), second], {3: "basel"}, expected())
    assert torch.equal(torch.from_numpy(views(fits["basel"].arrays)["scale"].copy()), weights()["scale"])
    assert [(f.hospital, f.kind) for f in heard.failures] == [("basel", "invalid")]
    assert [(a.hospital, a.what) for a in heard.arrived] == [("basel", "unusable"), ("basel", UPDATE)]


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
whole = st.integers(-(2**63), 2**63 - 1)  # larger ones do not cross the wire
numbers = whole | st.floats() | st.lists(whole, max_size=3) | st.lists(st.floats(), max_size=3)
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
    fits, heard = checked([fit(2), hostile, fit(4)], NAMES, expected())
    good = set(fits)
    assert good >= set(OTHERS)
    assert good | {failure.hospital for failure in heard.failures} == set(NAMES.values())
    assert len(heard.arrived) == 3
    for passed in fits.values():
        assert 0 < passed.weight <= MAX_WEIGHT
        decode_weights(RecordDict({ARRAYS: passed.arrays}), SHAPES)
    scored = check_evaluation(score(2), hostile, score(4))
    assert set(scored.scores) >= set(OTHERS)
    json.dumps(scored.scores, allow_nan=False)


@given(st.integers(-(2**31), 2**31 - 1), st.text(), st.sampled_from(sorted(NAMES)))
def test_no_error_reply_ends_the_round(code: int, reason: str, node: int) -> None:
    _, failures = check(*(fit(n) for n in NAMES if n != node), answer(node, Error(code, reason)))
    assert [(f.hospital, f.code) for f in failures] == [(NAMES[node], code)]


# --- scores -----------------------------------------------------------------------------------------------------------


def score(node: int, **changes: Any) -> Message:
    said = {"scores": {"mean_auroc": 0.5 + node / 100}, **changes}
    return answer(node, encode(score_reply(NAMES.get(node, "stranger"), **said)), "evaluate")


def check_evaluation(*replies: Message) -> Scored:
    return check_scores(replies, NAMES, ASKED, length=LENGTH, noise_multiplier=NOISE)


def test_scores_withheld_scores_and_refusals_are_told_apart() -> None:
    found = check_evaluation(score(2), score(3, scores=None), answer(4, Error(1001, "BUDGET_EXHAUSTED: x"), "evaluate"))
    assert found.scores == {"chur": {"mean_auroc": 0.52}}
    assert found.withheld == ["basel"]
    assert found.heard.failures == [Failure("aachen", "refused", 1001, "BUDGET_EXHAUSTED: x")]


def histogram(node: int, *, values: tuple[float, ...] | None = None, **changes: Any) -> Message:
    name = NAMES[node]
    made = noisy_histogram(name) if values is None else values
    return score(node, **{"scores": None, "histogram": made, "noise_multiplier": NOISE, **changes})


def with_histogram(values: object) -> Message:
    content = encode(score_reply("basel", noise_multiplier=NOISE, release=signed_for(values)))
    return answer(OFFENDER, rewritten(content, histogram=values), "evaluate")


def test_exact_scores_histograms_and_withheld_ones_are_told_apart_and_each_has_its_statement() -> None:
    found = check_evaluation(score(2), histogram(3, epsilon=0.75), score(4, scores=None))
    assert list(found.scores) == ["chur"]
    assert found.histograms == {"basel": noisy_histogram("basel")}
    assert found.withheld == ["aachen"]
    assert {name: said.epsilon for name, said in found.statements.items()} == {
        "chur": 0.5,
        "basel": 0.75,
        "aachen": 0.5,
    }
    assert [(a.hospital, a.what) for a in found.heard.arrived] == [
        ("aachen", WITHHELD),
        ("basel", HISTOGRAM),
        ("chur", EXACT),
    ]


def test_a_histogram_of_any_finite_values_is_accepted() -> None:
    values = (-1e300, *[0.0] * (LENGTH - 2), 1e300)
    assert check_evaluation(histogram(3, values=values)).histograms == {"basel": values}


def test_where_no_histogram_was_asked_for_one_without_noise_is_refused() -> None:
    found = check_scores([histogram(3, noise_multiplier=0.0)], {3: "basel"}, ASKED, length=LENGTH, noise_multiplier=0.0)
    assert found.histograms == {}
    assert [f.kind for f in found.heard.failures] == ["invalid"]


HOSTILE_SCORES: dict[str, Callable[[], Message]] = {
    "a histogram that is too short": lambda: histogram(OFFENDER, values=noisy_histogram("basel")[:-1]),
    "a histogram that is too long": lambda: histogram(OFFENDER, values=(*noisy_histogram("basel"), 1.0)),
    "an empty histogram": lambda: histogram(OFFENDER, values=()),
    "a histogram with less noise": lambda: histogram(OFFENDER, noise_multiplier=NOISE / 2),
    "a histogram without noise": lambda: histogram(OFFENDER, noise_multiplier=0.0),
    "NaN in a histogram": lambda: with_histogram([math.nan] * LENGTH),
    "infinity in a histogram": lambda: with_histogram([math.inf] * LENGTH),
    "text in a histogram": lambda: with_histogram([SECRET] * LENGTH),
    "a histogram of lists": lambda: with_histogram([[1.0]] * LENGTH),
    "a forged statement": lambda: score(OFFENDER, ledger_signature="00" * 64),
    "another hospital's key": lambda: score(OFFENDER, ledger_key=key_in_words("aachen")),
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
    content = encode(score_reply("basel", release=signed_for(scores)))
    return answer(OFFENDER, rewritten(content, scores=scores), "evaluate")


def signed_for(release: Any) -> str:
    """Its digest where it has one: what is wrong is then the content, not the signature."""
    try:
        return digest_of(release)
    except ValueError:
        return ""


@pytest.mark.parametrize("name", HOSTILE_SCORES)
def test_a_hostile_score_is_left_out_and_the_others_stay(name: str) -> None:
    found = check_evaluation(score(2), on_the_wire(HOSTILE_SCORES[name]()), score(4))
    assert list(found.scores) == OTHERS
    assert set(found.statements) == set(OTHERS)
    assert found.histograms == {}
    assert [(f.hospital, f.kind) for f in found.heard.failures] == [("basel", "invalid")]
    assert ("basel", "unusable") in [(a.hospital, a.what) for a in found.heard.arrived]


def test_a_stranger_has_no_scores_whatever_it_calls_itself() -> None:
    for name in ("unknown", "aachen", "node 9"):
        found = check_evaluation(score(2), score(3), score(4), score(9, hospital=name, scores={"mean_auroc": 1.0}))
        assert found.scores["aachen"] == {"mean_auroc": 0.54}
        assert list(found.scores) == ["aachen", "basel", "chur"]
        assert [f.hospital for f in found.heard.failures] == ["node 9"]


def test_a_second_score_does_not_replace_the_first() -> None:
    found = check_evaluation(score(2), score(3), score(4), score(3, scores=None), score(2, scores={"mean_auroc": 1.0}))
    assert found.scores["chur"] == {"mean_auroc": 0.52}
    assert found.withheld == []
    assert [f.hospital for f in found.heard.failures] == ["basel", "chur"]


def test_a_hospital_that_sends_no_score_is_said_to_be_silent() -> None:
    assert [(f.hospital, f.kind) for f in check_evaluation(score(2), score(4)).heard.failures] == [("basel", "silent")]
