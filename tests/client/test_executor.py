"""What runs a hospital's app: installed code alone, an answer whatever happens, and nobody trains for a run that is over."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from client import executor as module
from client import supernode
from client.executor import Executor
from fedmm.config import load_site
from fedmm.federation.bundle import bundle
from fedmm.federation.packing import PACKED, pack
from fedmm.federation.segments import detached
from fedmm.privacy.ledger import Ledger
from fedmm.sites.kit import SECRET, Kit, open_kit
from tests.sites.federation import fill_in, provision

Act = Callable[[Message, Path], Message | None]


class Worker:
    """Answers in a thread as `act` says; None: never."""

    act: Act
    made: list[Worker] = []  # noqa: RUF012  (the test's own, emptied by the fixture)

    def __init__(self, client: str, nodes: dict[int, Any]) -> None:
        self.connection, self._there = multiprocessing.Pipe()
        self.nodes, self.alive = nodes, True
        Worker.made.append(self)

    def ask(self, message: Message) -> None:
        threading.Thread(target=self._work, args=(detached(message),)).start()

    def answer(self) -> Message:
        return message_from_proto(ProtoMessage.FromString(self.connection.recv_bytes()))

    def _work(self, message: Message) -> None:
        try:
            reply = Worker.act(message, Path(module.os.environ[module.STOP_VARIABLE]))
        except EOFError:
            self._there.close()
            return
        if reply is not None:
            with suppress(OSError):  # it was ended meanwhile
                self._there.send_bytes(message_to_proto(reply).SerializeToString())

    def stop(self) -> None:
        self.alive = False
        self.connection.close()


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kit]:
    provision(tmp_path / "kits", port=9443)
    fill_in(tmp_path / "kits/north")
    kit = open_kit(tmp_path / "kits/north")
    (kit.make_state() / SECRET).write_text("secret")
    monkeypatch.setattr(module, "fleet_client", lambda kit: SimpleNamespace())
    monkeypatch.setattr(module, "run_is_over", lambda *_: False)
    monkeypatch.setattr(module, "Worker", Worker)
    monkeypatch.setenv(module.STOP_VARIABLE, "")
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    Worker.made = []
    yield kit
    for worker in Worker.made:
        worker.stop()


def content() -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({"a": Array(np.ones(3, np.float32))}), "fedmm": ConfigRecord({"x": 1})})


def asked(said: RecordDict | None = None, *, ttl: float = 60.0) -> Message:
    message = Message(pack(content()) if said is None else said, 7, MessageType.TRAIN, ttl=ttl)
    message.metadata.__dict__["_message_id"] = "m"
    return message


def reply(executor: Executor, message: Message, *, fab: bytes | None = None) -> Message:
    runtime: Any = SimpleNamespace(SendTaskHeartbeat=lambda request: None)
    return executor._reply(message, bundle() if fab is None else fab, runtime)


def said_no(text: str) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://localhost")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(400, text=text, request=request))


def rows(kit: Kit) -> list[str]:
    with Ledger.open(kit.hospital, load_site(kit.hospital)) as ledger:
        return [sent.what for sent in ledger.sent()]


def test_the_worker_gets_the_message_as_it_was_and_its_answer_leaves_packed(kit: Kit) -> None:
    seen = []

    def act(message: Message, stop: Path) -> Message:
        seen.append(set(message.content))
        return Message(content(), reply_to=message)

    Worker.act = staticmethod(act)  # type: ignore[assignment, method-assign]
    answer = reply(Executor(kit), asked())
    assert seen == [{"arrays", "fedmm"}]
    assert PACKED in answer.content
    assert Worker.made[0].nodes == {7: {"site": str(kit.hospital)}}


def test_a_run_that_brings_other_code_is_refused_and_the_worker_hears_nothing(kit: Kit) -> None:
    Worker.act = staticmethod(lambda message, stop: pytest.fail("it was asked"))  # type: ignore[assignment, method-assign]
    executor = Executor(kit)
    for _ in range(2):
        answer = reply(executor, asked(), fab=b"other")
        assert answer.error.code == 1002
        assert "not the fedmm that is installed" in (answer.error.reason or "")
    assert rows(kit) == ["refusal 1002"], "the same sentence is one row"
    assert Worker.made == []


def test_a_message_that_lies_about_its_arrays_is_refused(kit: Kit) -> None:
    lying = pack(content())
    lying[PACKED] = ConfigRecord({"index": "[[]]"})
    assert reply(Executor(kit), asked(lying)).error.code == 1006


def test_a_worker_that_never_answers_is_ended_and_the_next_message_gets_another(kit: Kit) -> None:
    Worker.act = staticmethod(lambda message, stop: None)  # type: ignore[assignment, method-assign]
    executor = Executor(kit)
    answer = reply(executor, asked(ttl=0.3))
    assert answer.error.code == 1010
    assert not Worker.made[0].alive
    Worker.act = staticmethod(lambda message, stop: Message(content(), reply_to=message))  # type: ignore[assignment, method-assign]
    assert reply(executor, asked()).has_content()
    assert len(Worker.made) == 2
    assert rows(kit) == ["refusal 1010"]


@pytest.mark.parametrize("what", [DecodeError("Anna Example"), KeyboardInterrupt()])
def test_whatever_happens_while_a_worker_works_its_answer_is_not_taken_for_that_to_the_next_message(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, what: BaseException
) -> None:
    def unreadable(*_: object) -> bool:
        raise what

    late = threading.Event()

    def slow(message: Message, stop: Path) -> Message:
        late.wait(10)
        return Message(content(), reply_to=message)

    monkeypatch.setattr(module, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(module, "run_is_over", unreadable)
    Worker.act = staticmethod(slow)  # type: ignore[assignment, method-assign]
    executor = Executor(kit)
    if isinstance(what, Exception):
        assert reply(executor, asked()).error.code == 1099
    else:
        with pytest.raises(KeyboardInterrupt):
            reply(executor, asked())
    assert not Worker.made[0].alive
    late.set()
    monkeypatch.setattr(module, "run_is_over", lambda *_: False)
    assert reply(executor, asked()).has_content()
    assert len(Worker.made) == 2


def test_an_answer_to_another_message_is_not_taken_and_its_worker_is_ended(kit: Kit) -> None:
    def out_of_step(message: Message, stop: Path) -> Message:
        message.metadata.__dict__["_message_id"] = "the one before"
        return Message(content(), reply_to=message)

    Worker.act = staticmethod(out_of_step)  # type: ignore[assignment, method-assign]
    answer = reply(Executor(kit), asked())
    assert answer.error.code == 1099
    assert not Worker.made[0].alive


@pytest.mark.parametrize(
    ("what", "found"),
    [
        (DecodeError("no protobuf"), "goes on"),
        (ValueError("Invalid protobuf response payload"), "goes on"),
        (httpx.ConnectError("away"), "goes on"),
        (said_no("[" * 100_000), "goes on"),
        (said_no("[]"), "goes on"),
        (said_no(json.dumps({"code": int(ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED), "detail": "over"})), "over"),
        (said_no(json.dumps({"code": int(ApiErrorCode.FLEET_GET_RUN_FAILED), "detail": "another"})), "goes on"),
    ],
    ids=range(7),
)
def test_a_run_is_over_when_the_coordinator_says_so_in_words_that_can_be_read(
    kit: Kit, what: Exception, found: str
) -> None:
    class Fleet:
        def GetRun(self, request: object) -> None:
            raise what

    assert supernode.run_is_over(Fleet(), kit, 1) is (found == "over")  # type: ignore[arg-type]


def test_a_worker_that_dies_is_said_so_without_a_word_of_why(kit: Kit) -> None:
    def die(message: Message, stop: Path) -> Message:
        raise EOFError

    Worker.act = staticmethod(die)  # type: ignore[assignment, method-assign]
    answer = reply(Executor(kit), asked())
    assert answer.error == Error(1099, answer.error.reason)
    assert answer.error.reason == "UNEXPECTED: the hospital could not answer, its worker died (out of memory?)"
    assert rows(kit) == ["refusal 1099"]


def test_whatever_goes_wrong_there_is_an_answer_and_no_text_of_the_error(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Executor, node: int) -> Worker:
        raise RuntimeError("Anna Example")

    monkeypatch.setattr(Executor, "_warm", broken)
    answer = reply(Executor(kit), asked())
    assert answer.error.code == 1099
    assert "Anna" not in (answer.error.reason or "")


def test_when_the_run_is_over_training_is_asked_to_stop_at_the_next_step(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(module, "run_is_over", lambda *_: True)

    def train(message: Message, stop: Path) -> Message:
        while not stop.exists():
            threading.Event().wait(0.01)
        return Message(Error(1011, "RUN_STOPPED"), reply_to=message)

    Worker.act = staticmethod(train)  # type: ignore[assignment, method-assign]
    executor = Executor(kit)
    assert reply(executor, asked()).error.code == 1011
    assert Worker.made[0].alive, "it stopped by itself and stays warm"
    assert not (kit.state / module.STOP_FILE).exists(), "the next run is not stopped"


def test_a_worker_that_does_not_stop_in_time_is_ended(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(module, "run_is_over", lambda *_: True)
    Worker.act = staticmethod(lambda message, stop: None)  # type: ignore[assignment, method-assign]
    assert reply(Executor(kit), asked()).error.code == 1010
    assert not Worker.made[0].alive
