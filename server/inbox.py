"""A reply as it comes out of the SuperLink: piece by piece, waited for by nobody, and of nobody but the hospital that was asked.

The SuperLink hands a reply out once, whether its pieces are there or not; it knows who sent it, and to which message. Flower's
HttpGrid then takes all replies together, waits up to two hours for a piece, and takes sender and message from bytes that the
sender wrote: one hospital could end a round for everybody, or speak for another. So what has come of a reply is kept here until
the rest is there, and what one hospital's bytes bring about is that hospital's alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedmm.errors import MessageInvalid
from fedmm.federation.messages import size_bytes

MORE = 2**26  # guess: bytes that a reply may be longer than its ask; weights come back as long as they went


class CutShort(Exception):
    """The SuperLink has given up on pieces of a reply: its sender was ended while it sent."""


@dataclass
class _Arriving:
    """A reply that was handed out. id, sender: as the SuperLink knows them.  missing: ids of pieces, the next one last.

    room: bytes that may still come.
    """

    id: str
    sender: int
    missing: list[str]
    room: int
    pieces: dict[str, bytes] = field(default_factory=dict)


class Inbox:
    """grid: Flower's HttpGrid."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid
        self._arriving: dict[str, _Arriving] = {}

    def look(self, name: str, asked: Message, *, until: float) -> Message | None:
        """The reply to `asked`, packed as it came; None while it, or a piece of it, is not here.

        name: the SuperLink's of `asked`.  until: by time.monotonic(); then it is another hospital's turn.
        Raises: MessageInvalid if it cannot be read, is too long, or speaks for another hospital or message; CutShort; what
        Flower raises if the SuperLink does not answer or the run was stopped.
        """
        try:
            return self._look(name, asked, until)
        except httpx.HTTPError:
            raise
        except Exception as error:  # hostile bytes raise whatever they like
            self._arriving.pop(name, None)
            if isinstance(error, CutShort | MessageInvalid):
                raise
            raise MessageInvalid(f"its reply cannot be read ({type(error).__name__})") from None

    def _look(self, name: str, asked: Message, until: float) -> Message | None:
        if name not in self._arriving and not self._take(name, asked):
            return None
        reply = self._arriving[name]
        if not self._complete(reply, asked.metadata.run_id, until):
            return None
        del self._arriving[name]
        self._grid._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._grid.node, run_id=asked.metadata.run_id, message_object_id=reply.id
            )
        )
        return _opened(reply, name, asked)

    def _take(self, name: str, asked: Message) -> bool:
        """Is a reply there? From now on it is only here."""
        found = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=[name]))
        for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            if head.metadata.reply_to_message_id == name:
                missing = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
                room = size_bytes(asked) + MORE
                self._arriving[name] = _Arriving(head.metadata.message_id, head.metadata.src_node_id, missing, room)
        return name in self._arriving

    def _complete(self, reply: _Arriving, run_id: int, until: float) -> bool:
        """Fetch the pieces that are there. Are these all? Raises: CutShort, MessageInvalid."""
        while reply.missing and time.monotonic() < until:
            found = self._grid._runtime_client.PullObject(
                PullObjectRequest(node=self._grid.node, run_id=run_id, object_id=reply.missing[-1])
            )
            if not found.object_found:
                raise CutShort
            if not found.object_available:
                return False
            reply.room -= len(found.object_content)
            if reply.room < 0:
                raise MessageInvalid("its reply is longer than any that was asked for")
            reply.pieces[reply.missing.pop()] = found.object_content
        return not reply.missing


def _opened(reply: _Arriving, name: str, asked: Message) -> Message:
    """Raises: MessageInvalid, or anything at all if it cannot be read."""
    message = inflate_object_from_contents(reply.id, reply.pieces)
    if not isinstance(message, Message):
        raise MessageInvalid("its reply is no message")
    said, meant = message.metadata, (reply.sender, name, asked.metadata.message_type)
    if reply.sender != SUPERLINK_NODE_ID and meant != (said.src_node_id, said.reply_to_message_id, said.message_type):
        raise MessageInvalid("its reply names another hospital, message or kind of message")
    said.__dict__["_message_id"] = reply.id
    return message
