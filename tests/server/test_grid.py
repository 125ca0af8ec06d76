"""Flower's Grid across sockets: replies one by one, packed on the wire, and lost ones known."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict

from fedmm.federation.packing import PACKED, pack
from server import grid as module
from server.grid import LOST, LinkGrid


class HttpGrid:
    """A SuperLink of two nodes. later: what a pull brings, one item a pull; a string is a node that signs on again."""

    def __init__(self) -> None:
        self.asked: list[Message] = []
        self.signed_on = {2: "yesterday", 3: "yesterday"}
        self.later: list[Message | int] = []

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(node_id=n, last_activated_at=t, name=f"hospital-{n}") for n, t in self.signed_on.items()
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            self.asked.append(message)
            names.append(f"m{message.metadata.dst_node_id}")
        return names

    def pull_messages(self, names: list[str]) -> list[Message]:
        if not self.later:
            return []
        found = self.later.pop(0)
        if isinstance(found, int):
            self.signed_on[found] = "just now"
            return []
        return [found]


def content() -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({"a": Array(np.ones(3, np.float32))}), "fedmm": ConfigRecord({"x": 1})})


def questions() -> list[Message]:
    return [Message(content(), node, MessageType.TRAIN) for node in (2, 3)]


def reply(node: int, said: RecordDict | Error) -> Message:
    message = Message(said, reply_to=Message(RecordDict(), node, MessageType.TRAIN))
    message.metadata.__dict__["_reply_to_message_id"] = f"m{node}"
    return message


@pytest.fixture
def http(monkeypatch: pytest.MonkeyPatch) -> HttpGrid:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    return HttpGrid()


def test_messages_leave_packed_and_replies_come_unpacked_one_by_one(http: HttpGrid) -> None:
    http.later = [reply(3, pack(content())), reply(2, pack(content()))]
    replies = LinkGrid(http).send_and_receive(questions(), timeout=60)
    assert [PACKED in message.content for message in http.asked] == [True, True]
    assert [message.metadata.ttl for message in http.asked] == [60, 60]
    first = next(iter(replies))
    assert len(http.later) == 1, "the second has not been asked for when the first is here"
    assert (first.metadata.src_node_id, set(first.content)) == (3, {"arrays", "fedmm"})
    assert [r.metadata.src_node_id for r in replies] == [2]


def test_a_hospital_whose_supernode_signed_on_again_counts_as_not_reached(http: HttpGrid) -> None:
    http.later = [2, reply(3, pack(content()))]
    replies = list(LinkGrid(http).send_and_receive(questions(), timeout=60))
    assert sorted((r.metadata.src_node_id, r.has_error()) for r in replies) == [(2, True), (3, False)]
    assert [r.error.code for r in replies if r.has_error()] == [LOST]


def test_a_reply_that_was_sent_before_its_supernode_died_still_counts(http: HttpGrid) -> None:
    http.later = [reply(2, pack(content())), 2, reply(3, pack(content()))]
    assert not any(r.has_error() for r in LinkGrid(http).send_and_receive(questions(), timeout=60))


def test_after_the_time_nobody_is_waited_for(http: HttpGrid) -> None:
    http.later = [reply(2, Error(1001, "BUDGET_EXHAUSTED"))]
    replies = list(LinkGrid(http).send_and_receive(questions(), timeout=0.05))
    assert [(r.metadata.src_node_id, r.error.code) for r in replies] == [(2, 1001)]
    assert list(LinkGrid(http).send_and_receive([], timeout=None)) == []


def test_a_packed_reply_that_lies_stays_packed_for_the_checks_to_refuse(http: HttpGrid) -> None:
    lying = pack(content())
    lying[PACKED] = ConfigRecord({"index": "[[]]"})
    http.later = [reply(2, lying), reply(3, pack(content()))]
    first, _ = LinkGrid(http).send_and_receive(questions(), timeout=60)
    assert PACKED in first.content


def test_each_node_is_known_by_the_name_that_it_was_registered_for(http: HttpGrid) -> None:
    assert LinkGrid(http).names() == {2: "hospital-2", 3: "hospital-3"}
