"""The engine for one machine: Flower's `Grid`, served by this process or by a few worker processes.

Nothing that can be changed is shared by reference: a hospital in this process gets a message of its own (bytes of arrays
do not change), a worker reads arrays from memory that both have (segments.py). What all hospitals are sent is written
there once a round. A worker keeps the same hospitals for the whole run: what it has decoded and wrapped stays warm.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NamedTuple

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmm.errors import UNEXPECTED_CODE
from fedmm.federation.segments import Segment, detached, receive, send, share

log = logging.getLogger("fedmm.local")
SERVER_NODE, RUN, TASK = 1, 1, 1  # ids inside one process; a hospital's node id is 2 or higher
NodeConfig = Mapping[str, Any]


class LocalGrid(Grid):
    """Runs a ClientApp for each node. A context manager: leaving it ends the workers.

    client: where the ClientApp is, "module:attribute", as in [tool.flwr.app.components]; with workers 0 also itself.
    nodes: one node config for each hospital, for example {"site": "/data/hospital_1"}.
    workers: 0 runs everything in this process; otherwise the number of processes.
    """

    def __init__(self, client: str | ClientApp, nodes: Sequence[NodeConfig], *, workers: int = 0) -> None:
        self._client = client
        self._nodes = {SERVER_NODE + 1 + i: dict(config) for i, config in enumerate(nodes)}
        self._workers: dict[int, Worker] = {}
        self._count = min(workers, len(nodes))
        self._here: _Runtime | None = None
        self._shared: Segment | None = None
        self._asking: Generator[Message] | None = None
        self._replies: dict[str, Message] = {}
        self._sent = 0
        self._run = Run.create_empty(RUN)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, SERVER_NODE, TASK

    # --- Flower's interface ---

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Runs them to the end, so that `pull_messages` finds the replies."""
        messages = list(messages)
        for reply in self.send_and_receive(messages):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies one by one, in the order of arrival; none is kept. The first question leaves when the first reply is wanted.

        timeout: seconds from then on, after which a worker that has not answered is stopped; so is one that is at work when
        the caller wants no more replies (closes this, or asks anew): no late reply is taken for one to a later question.
        """
        if self._asking is not None:
            self._asking.close()
        questions = list(messages)
        for message in questions:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"local-{self._sent}"  # as Flower's own grids do
        self._asking = self._in_workers(questions, timeout) if self._count else self._in_turn(questions)
        return self._asking

    def _in_turn(self, questions: Iterable[Message]) -> Generator[Message]:
        if self._here is None:
            self._here = _Runtime(self._client, self._nodes)
        for message in questions:
            yield detached(self._here.handle(detached(message)))

    # --- processes ---

    def _in_workers(self, questions: Sequence[Message], timeout: float | None) -> Generator[Message]:
        queues: dict[int, deque[Message]] = {}
        for message in questions:
            place = message.metadata.dst_node_id - SERVER_NODE - 1
            queues.setdefault(place % self._count, deque()).append(message)
        end = None if timeout is None else time.monotonic() + timeout
        if self._shared is None:
            self._shared = Segment()
        share(questions, self._shared)
        busy: dict[int, Worker] = {}
        try:
            for index, queue in queues.items():
                busy[index] = self._ask(index, queue[0])
            while busy:
                left = None if end is None else max(0.0, end - time.monotonic())
                ready = wait([worker.connection for worker in busy.values()], left)
                if not ready:  # out of time
                    return
                for index, worker in list(busy.items()):
                    if worker.connection in ready:
                        reply = self._answer(index, queues[index].popleft())
                        del busy[index]
                        if queues[index]:
                            busy[index] = self._ask(index, queues[index][0])
                        yield reply
        finally:
            for index in busy:  # nobody trains on unseen
                self._workers.pop(index).stop()

    def _ask(self, index: int, message: Message) -> Worker:
        worker = self._worker(index)
        worker.ask(message)
        return worker

    def _answer(self, index: int, message: Message) -> Message:
        try:
            return self._workers[index].answer()
        except (EOFError, OSError):  # OSError: it died with our message unread
            self._workers.pop(index).stop()
            return Message(Error(UNEXPECTED_CODE, "the worker process died (out of memory?)"), reply_to=message)

    def _worker(self, index: int) -> Worker:
        if index in self._workers and not self._workers[index].alive:  # died while it had nothing to do
            self._workers.pop(index).stop()
        if index not in self._workers:
            self._workers[index] = Worker(
                self._client, self._nodes, count=self._count, index=index, shared=self._shared
            )
        return self._workers[index]

    def close(self) -> None:
        """End all workers. Safe to call twice."""
        if self._asking is not None:
            self._asking.close()
        while self._workers:
            self._workers.popitem()[1].stop()
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Worker:
    """A process that keeps a ClientApp and its hospitals warm: one message at a time, answered.

    count, index: how many there are, and which this one is: it has its share of the cores, and one of the GPUs.
    shared: what `share` puts messages' common arrays into.
    connection: something to read means that there is an answer, or that the process died.
    """

    def __init__(
        self,
        client: str | ClientApp,
        nodes: Mapping[int, NodeConfig],
        *,
        count: int = 1,
        index: int = 0,
        shared: Segment | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self._to, self._from, self._shared = Segment(), Segment(), shared
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        ends = _Ends(there, self._to, self._from, shared)
        self._process: BaseProcess = context.Process(
            target=_serve, args=(ends, client, dict(nodes), threads, index), daemon=True, name="fedmm-worker"
        )
        # A worker inherits the handler: Ctrl-C while it starts must not print its traceback.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if _in_main_thread() else None
        try:
            self._process.start()
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
        there.close()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def ask(self, message: Message) -> None:
        """If it is dead, `answer` says so."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send(message, self.connection, self._to, self._shared)

    def answer(self) -> Message:
        """Waits for it. Raises: EOFError or OSError if the process died."""
        return receive(self.connection, self._from)

    def stop(self) -> None:
        self.connection.close()
        for segment in (self._to, self._from):
            segment.close()
        self._process.terminate()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _in_main_thread() -> bool:
    """Only there may a signal handler be set."""
    return threading.current_thread() is threading.main_thread()


class _Ends(NamedTuple):
    """A worker's: where questions come from and answers go to."""

    connection: Connection
    questions: Segment
    answers: Segment
    shared: Segment | None


def _serve(ends: _Ends, client: str | ClientApp, nodes: Mapping[int, NodeConfig], threads: int, index: int) -> None:
    """A worker's life: messages in, replies out, until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    take_gpu(index)
    runtime = _Runtime(client, nodes)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = receive(ends.connection, ends.questions, ends.shared)
            send(runtime.handle(message), ends.connection, ends.answers)


def take_gpu(index: int) -> None:
    """Which one "cuda" means in this process from now on: workers go round those that are there."""
    import torch

    if (count := torch.cuda.device_count()) > 1:
        torch.cuda.set_device(index % count)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Runtime:
    """The ClientApp and one Context for each node, in the process that runs them."""

    def __init__(self, client: str | ClientApp, nodes: Mapping[int, NodeConfig]) -> None:
        self._app = load_app(client) if isinstance(client, str) else client
        self._contexts = {
            node: Context(run_id=RUN, node_id=node, node_config=dict(config), state=RecordDict(), run_config={})
            for node, config in nodes.items()
        }

    def handle(self, message: Message) -> Message:
        """An exception that escapes the app is a reply too, without its text: that may hold a patient's value."""
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._app(message, context)
            if not isinstance(reply, Message):
                raise TypeError("an app answers with a message")
            return reply
        except (Exception, SystemExit) as error:
            log.error("the ClientApp of node %d raised %s", context.node_id, type(error).__name__)
            return Message(
                Error(UNEXPECTED_CODE, "UNEXPECTED: the hospital's app raised an exception"), reply_to=message
            )


def load_app(reference: str) -> ClientApp:
    """The ClientApp at "module:attribute"."""
    module, _, attribute = reference.partition(":")
    app: ClientApp = getattr(importlib.import_module(module), attribute)
    return app
