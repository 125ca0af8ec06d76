"""Replies of real sites, one by one: each when it is there, nothing lost, and an end to waiting."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, MessageType, RecordDict

from fedmm.federation.arriving import ArrivingGrid
from fedmm.federation.local import LocalGrid

APP = "tests.federation.scripted:app"


class Slow(LocalGrid):
    """Has one more reply each time it is asked; never that of `deaf` nodes."""

    deaf: tuple[int, ...] = ()
    pulls = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls += 1
        ready = [i for i in sorted(message_ids) if self._replies[i].metadata.src_node_id not in self.deaf]
        return super().pull_messages(ready[:1])


def questions(grid: ArrivingGrid) -> list[Message]:
    return [grid.create_message(RecordDict(), MessageType.QUERY, node, "1") for node in grid.get_node_ids()]


def slow(**changes: object) -> tuple[Slow, ArrivingGrid]:
    grid = Slow(APP, [{"name": name} for name in ("aachen", "basel", "chur")])
    vars(grid).update(changes)
    return grid, ArrivingGrid(grid, pull_seconds=0.001)


def test_each_reply_is_given_before_the_next_one_is_asked_for() -> None:
    grid, arriving = slow()
    pulls = [
        (reply.metadata.src_node_id, grid.pulls) for reply in arriving.send_and_receive(questions(arriving), timeout=60)
    ]
    assert pulls == [(2, 1), (3, 2), (4, 3)]


def test_questions_are_sent_before_anybody_waits() -> None:
    grid, arriving = slow()
    arriving.send_and_receive(questions(arriving), timeout=60)
    assert len(grid._replies) == 3


def test_waiting_ends_with_the_timeout_and_keeps_what_came() -> None:
    grid, arriving = slow(deaf=(3,))
    came = [reply.metadata.src_node_id for reply in arriving.send_and_receive(questions(arriving), timeout=0.2)]
    assert came == [2, 4]
    assert grid.pulls > 3


def test_what_is_there_already_is_given_without_any_time() -> None:
    _, arriving = slow()
    assert [r.metadata.src_node_id for r in arriving.send_and_receive(questions(arriving), timeout=0)] == [2]


def test_the_rest_of_the_grid_is_the_grid_itself() -> None:
    grid, arriving = slow()
    assert arriving.run is grid.run
    arriving.set_run(grid.run)
    (first, *_) = arriving.push_messages(questions(arriving))
    assert len(list(arriving.pull_messages([first]))) == 1
    assert list(arriving.send_and_receive([], timeout=None)) == []
