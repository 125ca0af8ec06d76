"""Our hand on Flower's SuperNode loop: each question is answered by its own reply, whatever came late."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supernode import start_client_internal

from client.supernode import _Surely, keep_in_step
from fedmm.federation.pace import Pace


class State:
    """The part of a SuperNode's memory that the loop uses."""

    def __init__(self) -> None:
        self.lock_msg_store = threading.RLock()
        self.msg_store: dict[str, Any] = {}

    def add(self, name: str, *, to: str) -> None:
        metadata = SimpleNamespace(message_id=name, reply_to_message_id=to, run_id=1, message_type="train", group_id="")
        with self.lock_msg_store:
            self.msg_store[name] = SimpleNamespace(message=SimpleNamespace(metadata=metadata), is_retrieved=False)

    def get_messages_legacy(self, *, is_reply: bool) -> list[Any]:
        with self.lock_msg_store:
            found = [one for one in self.msg_store.values() if not one.is_retrieved]
            for one in found:
                one.is_retrieved = True
        return [one.message for one in found]

    def get_message_processing_duration(self, *, message_id: str) -> float:
        return 0.0

    def delete_messages(self, *, message_ids: list[str]) -> None:
        for name in message_ids:
            self.msg_store.pop(name, None)


class Store:
    def get_object_tree(self, name: str) -> None:
        return None

    def delete(self, name: str) -> None:
        pass


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Flower's two halves of a turn, kept in step; what was sent. `question` is what the next pull finds."""
    state, sent = State(), []
    found = SimpleNamespace(state=state, sent=sent, question=None)

    def pull(*, state: State, receive: Any) -> int | None:
        return None if receive() is None else 1

    monkeypatch.setattr(start_client_internal, "_pull_and_store_message", pull)
    monkeypatch.setattr(start_client_internal, "_push_messages", start_client_internal._push_messages)
    keep_in_step(Pace(0.0))

    def receive() -> Any:
        name, found.question = found.question, None
        return name and (SimpleNamespace(metadata=SimpleNamespace(message_id=name)), None)

    def send(message: Any, tree: object, seconds: float) -> tuple[set[str], str]:
        sent.append(message.metadata.message_id)
        return set(), ""

    found.pull = lambda: start_client_internal._pull_and_store_message(state=state, receive=receive)  # type: ignore[call-arg]
    found.push = lambda: start_client_internal._push_messages(
        state=state,  # type: ignore[arg-type]
        object_store=Store(),  # type: ignore[arg-type]
        send=send,
        push_object=lambda *_: None,
    )
    return found


def test_a_reply_that_came_late_does_not_stand_for_the_next_one(loop: SimpleNamespace) -> None:
    loop.state.add("late", to="dropped")
    loop.question = "asked"
    assert loop.pull() == 1

    def answer() -> None:
        time.sleep(0.2)
        loop.state.add("answer", to="asked")

    working = threading.Thread(target=answer)
    working.start()
    loop.push()
    working.join()
    assert loop.sent == ["late", "answer"]


def test_a_late_reply_is_sent_although_nothing_is_asked(loop: SimpleNamespace) -> None:
    assert loop.pull() is None
    loop.state.add("late", to="dropped")
    assert loop.pull() is not None
    loop.push()
    assert loop.sent == ["late"]
    assert loop.pull() is None


def test_a_piece_whose_answer_was_lost_does_not_cost_the_whole_reply() -> None:
    """As a SuperLink does: it takes what it waits for in the session that is the last one, once."""
    lacks, got, sessions = {"a", "b", "c"}, [], iter("123456")
    now = [""]

    def send(message: str, tree: None, seconds: float) -> tuple[set[str], str]:
        now[0] = next(sessions)
        return set(lacks), now[0]

    broken = ["b", "c"]

    def push(run_id: int, session: str, piece: str, contents: bytes) -> None:
        if session != now[0] or piece not in lacks:
            raise ObjectPushError(piece, run_id, session)
        lacks.discard(piece)
        got.append(piece)
        if piece in broken:  # it is there, the answer is lost, Flower tries again
            broken.remove(piece)
            push(run_id, session, piece, contents)

    surely = _Surely(send, push)
    pieces, session = surely.send("reply", None, 0.0)
    for piece in sorted(pieces):
        surely.push_object(1, session, piece, b"")
    assert got == ["a", "b", "c"]


def test_a_piece_that_nobody_takes_is_an_error_after_a_few_tries() -> None:
    def push(run_id: int, session: str, piece: str, contents: bytes) -> None:
        raise ObjectPushError(piece, run_id, session)

    surely = _Surely(lambda *_: ({"a"}, "1"), push)
    surely.send("reply", None, 0.0)
    with pytest.raises(ObjectPushError):
        surely.push_object(1, "1", "a", b"")
