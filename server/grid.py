"""Flower's Grid across sockets, as the rounds want it: replies as they come, late ones not waited for, lost ones known.

Flower's own `send_and_receive` looks every 3 s and waits, for a message that a SuperNode took along when it was killed, until
the message expires. Here a hospital whose SuperNode signed on again since it was asked counts as not reached, and can be asked
again: what it was paid for it answers from its outbox, at no cost. What the SuperLink says of a hospital in its own name (it
went away; nobody answered in time) is said of that hospital. A reply that cannot be read, or speaks for another hospital, is
empty when it comes out here: no check accepts that, and the others' replies come as if nothing had been (server/inbox.py).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedmm.errors import MessageInvalid
from fedmm.federation.pace import Pace
from fedmm.federation.packing import pack, unpack
from fedmm.schema import Labels
from server.inbox import CutShort, Inbox

log = logging.getLogger("fedmm.server")
KIT_VARIABLE = "FEDMM_KIT"  # of a ServerApp that runs behind a SuperLink: the coordinator's kit
POLL_SECONDS = 0.25  # guess: on loopback, for each ten hospitals that are looked after: each costs a request
TURN_SECONDS = 5.0  # guess: of one hospital whose reply is long, before the others are looked after
LOST, LOST_REASON = 5, "its SuperNode was started anew"  # Flower's code of a node that is not there
GONE_REASON = "its SuperNode has gone"
CUT_REASON = "its reply was cut short"


class LinkGrid(Grid):
    """grid: Flower's HttpGrid.  labels: that the federation was described with, signed by its CA."""

    def __init__(self, grid: Any, *, labels: Labels) -> None:
        self._grid, self.labels = grid, labels

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        found: Run = self._grid.run
        return found

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        found: Iterable[int] = self._grid.get_node_ids()
        return found

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        found: Iterable[str] = self._grid.push_messages(messages)
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found: Iterable[Message] = self._grid.pull_messages(message_ids)
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they come, one here at a time. timeout: also the messages' time to live: the SuperLink drops an answer that
        comes later."""
        asked: dict[str, Message] = {}
        sessions = self._sessions()
        for message in messages:  # one by one: together they may pass what HTTP or memory allow
            across = Message(
                pack(message.content), message.metadata.dst_node_id, message.metadata.message_type, ttl=timeout
            )
            for name in self._grid.push_messages([across]):
                asked[name] = message
        return self._replies(asked, sessions, None if timeout is None else time.monotonic() + timeout)

    def _replies(self, asked: dict[str, Message], sessions: dict[int, str], end: float | None) -> Iterator[Message]:
        inbox, checked = Inbox(self._grid), 0.0
        pace = Pace(POLL_SECONDS * max(1.0, len(asked) / 10))
        while asked and (end is None or time.monotonic() < end + checked):
            now = self._sessions()
            for name, message in list(asked.items()):
                reply = _look(inbox, name, message, None if end is None else end + checked)
                if reply is None:
                    continue
                del asked[name]
                pace.happened()
                given = time.monotonic()
                yield from _meant(reply, message)
                checked += time.monotonic() - given  # what a check takes is not taken off the others' time
            for name, message in list(asked.items()):
                node = message.metadata.dst_node_id
                if now.get(node, "") != sessions.get(node, ""):
                    del asked[name]
                    yield Message(Error(LOST, LOST_REASON), reply_to=message)
            if asked:
                pace.wait()

    def names(self) -> dict[int, str]:
        """By node id the hospital that the coordinator registered it for."""
        return {node.node_id: node.name for node in self._grid.get_nodes()}

    def _sessions(self) -> dict[int, str]:
        """By node id when its SuperNode signed on."""
        return {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}


def _meant(reply: Message, asked: Message) -> Iterator[Message]:
    """The reply as the rounds want it; nothing if it only says that nobody answered in time."""
    if reply.has_error() and reply.metadata.src_node_id == SUPERLINK_NODE_ID:
        if reply.error.code == ErrorCode.NODE_UNAVAILABLE:
            yield Message(Error(LOST, GONE_REASON), reply_to=asked)
        return
    if reply.has_content():
        with contextlib.suppress(MessageInvalid):  # it stays packed, and no check accepts it
            reply.content = unpack(reply.content)
    yield reply


def _look(inbox: Inbox, name: str, message: Message, end: float | None) -> Message | None:
    """What can be said of one hospital's reply now; None: nothing yet."""
    now = time.monotonic()
    try:
        return inbox.look(name, message, until=now + TURN_SECONDS if end is None else min(now + TURN_SECONDS, end))
    except CutShort:
        return Message(Error(LOST, CUT_REASON), reply_to=message)
    except MessageInvalid as error:
        log.warning("node %d: %s", message.metadata.dst_node_id, error.what)
        return Message(RecordDict(), reply_to=message)
