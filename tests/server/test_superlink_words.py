"""What Flower's SuperLink says in its own name about a hospital that it was asked to reach."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from fedmm.federation.checks import collect
from server import grid as module
from server.grid import LOST, LinkGrid

EXPIRED = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)


class HttpGrid:
    """One node that was asked, and what the SuperLink then says of it."""

    def __init__(self, code: int) -> None:
        self.said = Message(Error(code, "of Flower"), reply_to=Message(RecordDict(), 2, MessageType.TRAIN))
        self.said.metadata.__dict__.update(_src_node_id=SUPERLINK_NODE_ID, _reply_to_message_id="m2")

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=2, last_activated_at="yesterday")]

    def push_messages(self, messages: list[Message]) -> list[str]:
        return [f"m{message.metadata.dst_node_id}" for message in messages]

    def pull_messages(self, names: list[str]) -> list[Message]:
        return [self.said]


@pytest.mark.parametrize(("code", "kinds"), [(ErrorCode.NODE_UNAVAILABLE, [("failed", LOST)])] + [
    (code, [("silent", 0)]) for code in EXPIRED
])  # fmt: skip
def test_it_is_said_of_the_hospital_and_nobody_else_is_named(
    code: int, kinds: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    replies = LinkGrid(HttpGrid(code)).send_and_receive([Message(RecordDict(), 2, MessageType.TRAIN)], timeout=60)
    heard = collect(replies, {2: "north"}, lambda message, hospital: "update")
    assert [(f.hospital, f.kind, f.code) for f in heard.failures] == [("north", *kind) for kind in kinds]
