"""Flower's Grid across sockets: replies one by one, packed on the wire, lost ones known, and hostile ones alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.run import RunNotRunningException

from fedmm.errors import MessageInvalid
from fedmm.federation.checks import collect
from fedmm.federation.packing import PACKED, pack
from server import grid as module
from server import inbox
from server.grid import LOST, LinkGrid
from tests.federation.scripted import LABELS
from tests.server.paper import Reply, SuperLink, reply_to, with_object


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    return SuperLink()


def content() -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({"a": Array(np.ones(3, np.float32))}), "fedmm": ConfigRecord({"x": 1})})


def questions() -> list[Message]:
    return [Message(content(), node, MessageType.TRAIN) for node in (2, 3)]


def says(node: int, said: RecordDict | Error | None = None, **names: Any) -> tuple[int, Callable[[Message], Reply]]:
    return node, lambda asked: reply_to(asked, pack(content()) if said is None else said, **names)


def replies(link: SuperLink, *, timeout: float = 60) -> list[Message]:
    return list(LinkGrid(link.grid(), labels=LABELS).send_and_receive(questions(), timeout=timeout))


def test_messages_leave_packed_and_replies_come_unpacked_one_by_one(link: SuperLink) -> None:
    link.later = [says(3), says(2)]
    found = LinkGrid(link.grid(), labels=LABELS).send_and_receive(questions(), timeout=60)
    assert [PACKED in message.content for message in link.asked.values()] == [True, True]
    assert [message.metadata.ttl for message in link.asked.values()] == [60, 60]
    first = next(iter(found))
    assert len(link.later) == 1, "the second has not been asked for when the first is here"
    assert (first.metadata.src_node_id, set(first.content)) == (3, {"arrays", "fedmm"})
    assert [r.metadata.src_node_id for r in found] == [2]


def test_while_one_reply_is_checked_the_next_is_not_here_and_its_time_stands_still(link: SuperLink) -> None:
    """Both are at the SuperLink: held here, they would be as many models as hospitals."""
    link.later = [says(2), says(3)]
    found = LinkGrid(link.grid(), labels=LABELS).send_and_receive(questions(), timeout=0.5)
    next(found)
    handed_out = len(link.handed_out)
    time.sleep(0.6)  # a check that takes longer than the whole wait
    assert [r.has_content() for r in found] == [True]
    assert (handed_out, len(link.handed_out)) == (1, 2)


def test_a_hospital_whose_supernode_signed_on_again_counts_as_not_reached(link: SuperLink) -> None:
    link.later = [2, says(3)]
    found = replies(link)
    assert sorted((r.metadata.src_node_id, r.has_error()) for r in found) == [(2, True), (3, False)]
    assert [r.error.code for r in found if r.has_error()] == [LOST]


def test_a_reply_that_was_sent_before_its_supernode_died_still_counts(link: SuperLink) -> None:
    link.later = [says(2), 2, says(3)]
    assert not any(r.has_error() for r in replies(link))


def test_after_the_time_nobody_is_waited_for(link: SuperLink) -> None:
    link.later = [says(2, Error(1001, "BUDGET_EXHAUSTED"))]
    assert [(r.metadata.src_node_id, r.error.code) for r in replies(link, timeout=0.05)] == [(2, 1001)]
    assert list(LinkGrid(link.grid(), labels=LABELS).send_and_receive([], timeout=None)) == []


def test_a_packed_reply_that_lies_stays_packed_for_the_checks_to_refuse(link: SuperLink) -> None:
    lying = pack(content())
    lying[PACKED] = ConfigRecord({"index": "[[]]"})
    link.later = [says(2, lying), says(3)]
    first, _ = replies(link)
    assert PACKED in first.content


def test_each_node_is_known_by_the_name_that_it_was_registered_for(link: SuperLink) -> None:
    assert LinkGrid(link.grid(), labels=LABELS).names() == {2: "hospital-2", 3: "hospital-3"}


# --- hostile bytes ----------------------------------------------------------------------------------------------------


def content_that_is_no_dictionary(asked: Message) -> Reply:
    reply = reply_to(asked, RecordDict())
    record = ConfigRecord({"a": 1})
    body = reply.pieces[reply.tree.object_id].partition(b"\x00")[2]
    message = with_object(asked, "Message", body)
    top = next(iter(message.pieces.values())).replace(b"Message  ", b"Message " + record.object_id.encode() + b" ")
    message.pieces = {message.tree.object_id: top, record.object_id: record.deflate()}
    message.tree.children.add(object_id=record.object_id)
    return message


HOSTILE: dict[str, Callable[[Message], Reply]] = {
    "a body that is garbage": lambda asked: with_object(asked, "Message", b"\xff\xff\xff"),
    "a body that is garbage, of another kind": lambda asked: with_object(asked, "ConfigRecord", b"\xff\xff\xff"),
    "a whole object of another kind": lambda asked: with_object(asked, "ConfigRecord", b""),
    "a content of another kind": content_that_is_no_dictionary,
    "JSON without end": lambda asked: with_object(asked, "RecordDict", b"[" * 100_000),
    "another hospital's name": lambda asked: reply_to(asked, pack(content()), src_node_id=3),
    "the SuperLink's name": lambda asked: reply_to(
        asked, Error(ErrorCode.NODE_UNAVAILABLE, ""), src_node_id=SUPERLINK_NODE_ID
    ),
    "another message": lambda asked: reply_to(asked, pack(content()), reply_to_message_id="another"),
    "another kind of message": lambda asked: reply_to(asked, pack(content()), message_type=MessageType.EVALUATE),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("first", [2, 3])
def test_what_cannot_be_read_or_speaks_for_another_is_invalid_of_its_sender_alone(
    link: SuperLink, name: str, first: int
) -> None:
    there = {2: (2, HOSTILE[name]), 3: says(3)}
    link.later = [there.pop(first), *there.values()]
    used = []
    heard = collect(
        replies(link), {2: "north", 3: "south"}, lambda message, hospital: used.append(hospital) or "update"
    )
    assert (used, len(link.handed_out)) == (["south"], 2)
    assert [(f.hospital, f.kind, f.code) for f in heard.failures] == [("north", "invalid", MessageInvalid.code)]


def test_a_reply_that_is_much_longer_than_its_ask_is_not_fetched_to_its_end(
    link: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "MORE", 2000)
    long = RecordDict({f"part {i}": ConfigRecord({"x": f"{i}" * 1000}) for i in range(9)})
    link.later = [says(2, long), says(3)]
    heard = collect(replies(link), {2: "north", 3: "south"}, lambda message, hospital: "update")
    assert [(f.hospital, f.kind) for f in heard.failures] == [("north", "invalid")]
    assert len(set(link.fetched) & set(link.handed_out[0].pieces)) < 6


def test_a_reply_that_lacks_a_piece_is_waited_for_while_the_others_come(link: SuperLink) -> None:
    held: list[Reply] = []

    def in_pieces(asked: Message) -> Reply:
        held.append(reply_to(asked, RecordDict({"other": ConfigRecord({"x": 2})})))
        link.absent = {held[0].tree.children[0].object_id}
        return held[0]

    link.later = [(2, in_pieces), says(3)]
    found = iter(LinkGrid(link.grid(), labels=LABELS).send_and_receive(questions(), timeout=60))
    assert next(found).metadata.src_node_id == 3
    assert len(link.confirmed) == 1
    link.absent.clear()
    (late,) = found
    assert (late.metadata.src_node_id, set(late.content)) == (2, {"other"})
    assert link.confirmed[1:] == [held[0].tree.object_id]
    assert link.fetched.count(held[0].tree.object_id) == 1, "what has come is not fetched again"


def test_a_reply_that_never_comes_whole_is_none_when_the_time_is_over(link: SuperLink) -> None:
    def never_whole(asked: Message) -> Reply:
        reply = reply_to(asked, pack(content()))
        link.absent = {reply.tree.object_id}
        return reply

    link.later = [(2, never_whole), says(3)]
    found = collect(replies(link, timeout=0.3), {2: "north", 3: "south"}, lambda message, hospital: "update")
    assert [(f.hospital, f.kind) for f in found.failures] == [("north", "silent")]
    assert [a.hospital for a in found.arrived] == ["south"]


def test_a_long_reply_leaves_the_others_their_turn(link: SuperLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURN_SECONDS", 0.0)
    link.later = [says(2)]
    assert replies(link, timeout=0.1) == [], "no piece is fetched in no time"
    assert link.fetched == []


def test_a_reply_whose_pieces_the_superlink_gave_up_counts_as_not_reached(link: SuperLink) -> None:
    def cut_short(asked: Message) -> Reply:
        reply = reply_to(asked, pack(content()))
        link.lost = {reply.tree.object_id}
        return reply

    link.later = [(2, cut_short), says(3)]
    found = replies(link)
    assert [(r.metadata.src_node_id, r.has_error() and r.error.code) for r in found] == [(2, LOST), (3, False)]


@pytest.mark.parametrize("what", [httpx.ConnectError("gone"), RunNotRunningException()])
def test_a_superlink_that_does_not_answer_and_a_stopped_run_are_no_hospitals_fault(
    link: SuperLink, what: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: SuperLink, request: Any) -> Any:
        raise what

    monkeypatch.setattr(SuperLink, "PullObject", fail)
    link.later = [says(2)]
    with pytest.raises(type(what)):
        replies(link)
