"""Answers of another ask, another hospital, another key or another size: what a peer cannot pass off as its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedmm.errors import MessageInvalid, RunFailed
from fedmm.federation import messages
from fedmm.federation.checks import Failure, Scored, check_scores
from fedmm.federation.members import introduce
from fedmm.federation.messages import (
    ARRAYS,
    CORRECTION,
    FRAME,
    HEADER_BYTES,
    METRICS,
    STATEMENT_JSON,
    WEIGHT,
    PlanAsk,
    array_record,
    digest_of,
    encode,
)
from fedmm.federation.rounds import Members
from tests.federation.scripted import (
    LABELS,
    NONCE,
    SHAPES,
    answer,
    checked,
    fit_content,
    fit_reply,
    hello,
    key_in_words,
    noisy_histogram,
    resigned,
    rewritten,
    score_reply,
    weights,
)
from tests.federation.test_checks import ASKED, LENGTH, NAMES, NOISE, OTHERS, SECRET, check, expected, fit
from tests.federation.test_rounds import Run, WatchedGrid, hospitals, introduced, settings

OTHER_NONCE = "f0" * 16
OTHER = array_record(weights("other"))


def left_out(reply: Message) -> str:
    """The reason for which basel's reply is left out of a round that goes on."""
    found, failures = check(fit(2), reply, fit(4))
    assert found == OTHERS
    ((hospital, kind, reason),) = [(f.hospital, f.kind, f.reason) for f in failures]
    assert (hospital, kind) == ("basel", "invalid")
    assert SECRET not in reason
    return reason


# --- whose answer it is, and to what ----------------------------------------------------------------------------------


def with_other_weights() -> RecordDict:
    content = fit_content("basel")
    content[ARRAYS] = OTHER
    return content


def lent() -> RecordDict:
    """Another hospital's whole answer, true and signed."""
    return fit_content("aachen")


def lent_weights() -> RecordDict:
    """Another hospital's statement, with the name changed: its signature no longer holds."""
    return rewritten(fit_content("aachen"), hospital="basel")


def lent_key() -> RecordDict:
    """Another hospital signs for this one."""
    said = resigned(fit_reply("aachen"), "aachen", hospital="basel")
    return encode(said, arrays=array_record(weights()), weight=1.0)


def own_new_key() -> RecordDict:
    """The key of the introduction was rotated, or a stranger sits where the hospital was."""
    said = resigned(fit_reply("another"), "another", hospital="basel")
    return encode(said, arrays=array_record(weights()), weight=1.0)


TAKEN: dict[str, tuple[Callable[[], RecordDict], str]] = {
    "an answer to another ask": (lambda: fit_content("basel", nonce=OTHER_NONCE), "another ask"),
    "the nonce changed in a true statement": (
        lambda: rewritten(fit_content("basel", nonce=OTHER_NONCE), nonce=NONCE), "not signed",
    ),
    "no nonce": (lambda: rewritten(fit_content("basel"), nonce=""), "breaks its schema"),
    "other weights under a true statement": (with_other_weights, "signed for"),
    "a digest of nothing": (lambda: fit_content("basel", release=""), "signed for"),
    "the digest changed in a true statement": (
        lambda: rewritten(with_other_weights(), release=digest_of(OTHER)), "not signed",
    ),
    "another hospital's answer": (lent, "another hospital"),
    "another hospital's statement": (lent_weights, "another key"),
    "another hospital's signature": (lent_key, "another key"),
    "a new key": (own_new_key, "resume the run"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_an_answer_that_was_replayed_swapped_or_lent_is_left_out_and_the_round_goes_on(name: str) -> None:
    make, why = TAKEN[name]
    assert why in left_out(answer(3, make()))


def test_the_honest_answer_of_that_table_is_taken() -> None:
    assert check(fit(2), answer(3, fit_content("basel")), fit(4)) == (["aachen", "basel", "chur"], [])


MADE: dict[str, dict[str, Any]] = {
    "scores": {"scores": {"mean_auroc": 0.5}},
    "histogram": {"histogram": noisy_histogram("basel"), "noise_multiplier": NOISE},
    "withheld": {},
}
CHANGED: dict[str, Any] = {"scores": {"mean_auroc": 0.9}, "histogram": [0.5] * LENGTH}


def scored(content: RecordDict) -> Scored:
    return check_scores([answer(3, content)], {3: "basel"}, ASKED, length=LENGTH, noise_multiplier=NOISE)


@pytest.mark.parametrize("kind", MADE)
def test_scores_that_were_swapped_replayed_or_taken_out_are_left_out(kind: str) -> None:
    def honest() -> RecordDict:
        return encode(score_reply("basel", **MADE[kind]))

    hostile = [rewritten(honest(), **{name: other}) for name, other in CHANGED.items()]
    hostile += [rewritten(honest(), **{kind: None})] if kind in CHANGED else []
    hostile += [encode(score_reply("basel", nonce=OTHER_NONCE, **MADE[kind]))]
    for content in hostile:
        found = scored(content)
        assert (found.scores, found.histograms, found.withheld, found.statements) == ({}, {}, [], {})
        assert [f.kind for f in found.heard.failures] == ["invalid"]
    assert set(scored(honest()).statements) == {"basel"}


def test_a_run_goes_on_without_a_hospital_whose_key_changed_and_names_it() -> None:
    grid = hospitals(basel={"train 2": "rotated"})
    run = Run(grid, settings()).finish()
    assert [record.trained for record in run.records] == [
        ["aachen", "basel", "chur"],
        OTHERS,
        ["aachen", "basel", "chur"],
    ]
    ((hospital, reason),) = [(f["hospital"], f["reason"]) for f in run.records[1].failures]
    assert hospital == "basel"
    assert "resume the run" in reason


def test_after_a_new_introduction_the_new_key_is_the_one_that_counts() -> None:
    again = replace(ASKED, keys={**ASKED.keys, "basel": key_in_words("another")})
    fits, heard = checked([answer(3, own_new_key())], {3: "basel"}, replace(expected(), asked=again))
    assert list(fits) == ["basel"]
    assert heard.failures == []


def test_every_round_asks_with_a_nonce_of_its_own_and_records_what_was_signed() -> None:
    run = Run(hospitals(), settings(rounds=3)).finish()
    said = [{facts["nonce"] for facts in record.epsilon.values()} for record in run.records]
    assert all(len(nonces) == 1 for nonces in said)
    assert len(set.union(*said)) == 3
    assert all(len(facts["release"]) == 64 for record in run.records for facts in record.epsilon.values())


# --- keys at the introduction -----------------------------------------------------------------------------------------


def test_of_two_hospitals_with_one_key_the_second_is_left_out_and_told_what_to_do() -> None:
    grid = WatchedGrid([{"name": "aachen"}, {"name": "basel", "key": "aachen"}, {"name": "chur"}])
    members = introduced(grid, at_least=2)
    assert members.names == {2: "aachen", 4: "chur"}
    assert members.keys == {name: key_in_words(name) for name in ("aachen", "chur")}
    (failure,) = members.failures
    assert (failure.hospital, failure.kind) == ("node 3", "invalid")
    assert "basel introduces itself with the key of aachen" in failure.reason
    with pytest.raises(RunFailed):
        introduced(grid, at_least=3)


@pytest.mark.parametrize("lie", [{"signer": "basel"}, {"nonce": OTHER_NONCE}], ids=str)
def test_nobody_takes_the_place_of_another_by_naming_its_key_and_a_recorded_introduction_is_none(
    lie: dict[str, str],
) -> None:
    """The liar comes first, so that a twin who was believed would throw the other one out."""
    grid = WatchedGrid([{"name": "basel", "key": "aachen", **lie}, {"name": "aachen"}, {"name": "chur"}])
    members = introduced(grid, at_least=2)
    assert members.names == {3: "aachen", 4: "chur"}
    assert [failure.kind for failure in members.failures] == ["invalid"]


def test_one_with_other_labels_than_the_run_is_left_out_alone() -> None:
    grid = WatchedGrid([{"name": "aachen", "labels": "other"}, {"name": "basel"}, {"name": "chur"}])
    ask, kits = PlanAsk(plan={}, rounds=3), {2: "aachen", 3: "basel", 4: "chur"}
    members = introduce(grid, ask, at_least=2, wait=5.0, kits=lambda: kits, labels=LABELS)
    assert (members.names, members.labels) == ({3: "basel", 4: "chur"}, LABELS)
    ((hospital, kind, reason),) = [(f.hospital, f.kind, f.reason) for f in members.failures]
    assert (hospital, kind) == ("aachen", "invalid")
    assert "federation.json" in reason


@pytest.mark.parametrize(
    "changes", [{"ledger_key": ""}, {"ledger_key": "0" * 63}, {"ledger_key": "G" * 64}, {"refusal_code": 1001}], ids=str
)
def test_an_introduction_has_a_key_or_a_refusal(changes: dict[str, Any]) -> None:
    with pytest.raises(MessageInvalid):
        messages.decode(rewritten(encode(hello("north")), **changes), messages.Hello)


def test_members_know_by_whose_key_answers_must_be_signed() -> None:
    assert Members({2: hello("aachen")}, ()).keys == {"aachen": key_in_words("aachen")}


# --- sizes before bodies ----------------------------------------------------------------------------------------------


def with_record(name: str, record: Any) -> RecordDict:
    content = fit_content("basel")
    content[name] = record
    return content


def padded(spaces: int) -> RecordDict:
    """The weights with a longer header, signed for."""
    arrays = array_record(weights())
    data = arrays["scale"].data
    length = int.from_bytes(data[8:10], "little")
    data = (
        data[:8] + (length + spaces).to_bytes(2, "little") + data[10 : 9 + length] + b" " * spaces + data[9 + length :]
    )
    sent = ArrayRecord({**arrays, "scale": Array(dtype="float32", shape=(), stype="numpy.ndarray", data=data)})
    return encode(fit_reply("basel", arrays=sent), arrays=sent, weight=1.0)


def with_frame_part(**parts: Any) -> RecordDict:
    content = fit_content("basel")
    content[FRAME] = ConfigRecord({**content.config_records[FRAME], **parts})
    return content


OVERSIZE: dict[str, Callable[[], RecordDict]] = {
    "a record that nobody asked for": lambda: with_record("more", ConfigRecord({"note": SECRET})),
    "arrays that nobody asked for": lambda: with_record("more", ArrayRecord({"w": Array(np.ones(3))})),
    "a correction": lambda: with_record(CORRECTION, array_record(weights())),
    "numbers that nobody asked for": lambda: with_record("more", MetricRecord({"loss": 1.0})),
    "a metric beside the weight": lambda: with_record(METRICS, MetricRecord({WEIGHT: 1.0, "loss": 1.0})),
    "a part of the frame that nobody asked for": lambda: with_frame_part(note=SECRET),
    "a body that is too long": lambda: with_frame_part(
        body=str(fit_content("basel").config_records[FRAME]["body"]) + " " * STATEMENT_JSON
    ),
    "a header that is too long": lambda: padded(HEADER_BYTES),
    "a thousand tensors more": lambda: with_record(
        ARRAYS, ArrayRecord({**array_record(weights()), **{f"t{i}": Array(np.ones(1, "f4")) for i in range(1000)}})
    ),
}


@pytest.mark.parametrize("name", OVERSIZE)
def test_what_is_larger_than_was_asked_for_is_left_out(name: str) -> None:
    assert left_out(answer(3, OVERSIZE[name]()))


def test_a_header_that_is_a_little_longer_is_no_reason() -> None:
    assert check(fit(2), answer(3, padded(64)), fit(4))[1] == []


def test_no_tensor_is_decoded_before_the_size_of_the_last_one_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    last = sorted(SHAPES)[-1]
    arrays = array_record(weights())
    sent = ArrayRecord({**arrays, last: Array(np.zeros(10**6, "f4"))})
    asked, honest = expected(), messages.view
    ours = {id(array) for array in asked.before.values()}
    monkeypatch.setattr(
        messages, "view", lambda array, name: honest(array, name) if id(array) in ours else pytest.fail("decoded")
    )
    left_out_reply = answer(3, encode(fit_reply("basel", arrays=sent), arrays=sent, weight=1.0))
    _, heard = checked([left_out_reply], {3: "basel"}, asked)
    assert [f.kind for f in heard.failures] == ["invalid"]


def test_no_json_is_parsed_before_its_length_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages.FitReply, "model_validate_json", lambda *_, **__: pytest.fail("parsed"))
    assert left_out_of_one(OVERSIZE["a body that is too long"]()).kind == "invalid"
    assert left_out_of_one(OVERSIZE["a record that nobody asked for"]()).kind == "invalid"


def left_out_of_one(content: RecordDict) -> Failure:
    (failure,) = checked([answer(3, content)], {3: "basel"}, expected())[1].failures
    return failure


def test_scores_with_a_record_beside_them_are_left_out() -> None:
    content = encode(score_reply("basel", scores={"mean_auroc": 0.5}))
    content["more"] = array_record({"w": torch.ones(3)})
    found = scored(content)
    assert (found.scores, [f.kind for f in found.heard.failures]) == ({}, ["invalid"])


def test_the_longest_statement_that_the_schema_allows_fits() -> None:
    """Escaped as JSON may be: the limit refuses no honest answer."""
    fields = messages.Statement.model_fields
    most = {
        name: max((rule.max_length for rule in fields[name].metadata if hasattr(rule, "max_length")), default=64)
        for name in fields
    }
    assert 2 * 6 * sum(most.values()) > STATEMENT_JSON > 6 * sum(most.values())
    assert set(NAMES.values()) == set(ASKED.keys)
