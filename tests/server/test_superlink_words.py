"""What Flower's SuperLink says in its own name about a hospital that it was asked to reach."""

from __future__ import annotations

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode

from fedmm.federation.checks import collect
from server import grid as module
from server.grid import LOST, LinkGrid
from tests.federation.scripted import LABELS
from tests.server.paper import SuperLink, of_superlink

EXPIRED = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)


@pytest.mark.parametrize(("code", "kinds"), [(ErrorCode.NODE_UNAVAILABLE, [("failed", LOST)])] + [
    (code, [("silent", 0)]) for code in EXPIRED
])  # fmt: skip
def test_it_is_said_of_the_hospital_and_nobody_else_is_named(
    code: int, kinds: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    link = SuperLink([(2, lambda asked: of_superlink(asked, code))])
    replies = LinkGrid(link.grid(), labels=LABELS).send_and_receive(
        [Message(RecordDict(), 2, MessageType.TRAIN)], timeout=60
    )
    heard = collect(replies, {2: "north"}, lambda message, hospital: "update")
    assert [(f.hospital, f.kind, f.code) for f in heard.failures] == [("north", *kind) for kind in kinds]
