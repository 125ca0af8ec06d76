"""A grid across sites whose replies come one by one: who has answered is known while the others still train."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

PULL_SECONDS = 3.0  # as often as Flower's own grids ask their SuperLink


class ArrivingGrid(Grid):
    """Flower's grid with another `send_and_receive`: the same questions, replies and timeout, but given as they come.

    Flower's own collects all replies before it gives the first.
    """

    def __init__(self, grid: Grid, *, pull_seconds: float = PULL_SECONDS) -> None:
        self._grid, self._pull_seconds = grid, pull_seconds

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The questions are sent before this returns; waiting is for who takes the replies."""
        return self._replies(set(self._grid.push_messages(messages)), timeout)

    def _replies(self, waiting: set[str], timeout: float | None) -> Iterator[Message]:
        end = None if timeout is None else time.monotonic() + timeout
        while waiting:
            for reply in self._grid.pull_messages(set(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
            left = self._pull_seconds if end is None else min(self._pull_seconds, end - time.monotonic())
            if left <= 0:
                return
            if waiting:
                time.sleep(left)
