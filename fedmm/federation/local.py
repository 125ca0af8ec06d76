"""The engine for one machine: Flower's `Grid`, served by this process or by a few worker processes.

Messages go through Flower's own wire format in both cases, so nothing is shared by reference that would not be shared
across sockets. A worker keeps the same hospitals for the whole run: what it has decoded and wrapped stays warm.
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
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmm.errors import UNEXPECTED_CODE

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
        """Replies in the order of arrival. After `timeout` seconds a worker that has not answered is stopped."""
        requests = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"local-{self._sent}"  # as Flower's own grids do
            requests.append((message, message_to_proto(message).SerializeToString()))
        if self._count:
            return self._in_workers(requests, timeout)
        if self._here is None:
            self._here = _Runtime(self._client, self._nodes)
        return [_parse(self._here.handle(data)) for _, data in requests]

    # --- processes ---

    def _in_workers(self, requests: list[tuple[Message, bytes]], timeout: float | None) -> list[Message]:
        queues: dict[int, list[tuple[Message, bytes]]] = {}
        for request in requests:
            queues.setdefault(list(self._nodes).index(request[0].metadata.dst_node_id) % self._count, []).append(
                request
            )
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        busy = {index: self._worker(index) for index in queues}
        for index, worker in busy.items():
            worker.ask(queues[index][0][1])
        while busy:
            left = None if end is None else max(0.0, end - time.monotonic())
            ready = wait([worker.connection for worker in busy.values()], left)
            if not ready:  # out of time: nobody trains on unseen
                for index in busy:
                    self._workers.pop(index).stop()
                break
            for index, worker in list(busy.items()):
                if worker.connection not in ready:
                    continue
                message, _ = queues[index].pop(0)
                try:
                    replies.append(_parse(worker.connection.recv_bytes()))
                except (EOFError, OSError):  # OSError: it died with our message unread
                    error = Error(UNEXPECTED_CODE, "the worker process died (out of memory?)")
                    replies.append(Message(error, reply_to=message))
                    self._workers.pop(index).stop()
                if not queues[index]:
                    del busy[index]
                    continue
                busy[index] = self._worker(index)
                busy[index].ask(queues[index][0][1])
        return replies

    def _worker(self, index: int) -> Worker:
        if index in self._workers and not self._workers[index].alive:  # died while it had nothing to do
            self._workers.pop(index).stop()
        if index not in self._workers:
            self._workers[index] = Worker(self._client, self._nodes, self._count)
        return self._workers[index]

    def close(self) -> None:
        """End all workers. Safe to call twice."""
        while self._workers:
            self._workers.popitem()[1].stop()

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Worker:
    """A process that keeps a ClientApp and its hospitals warm: one message at a time, answered through the pipe.

    connection: `recv_bytes` gives a reply as Flower's proto; EOFError or OSError if the process died.
    """

    def __init__(self, client: str | ClientApp, nodes: Mapping[int, NodeConfig], count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        self._process: BaseProcess = context.Process(
            target=_serve, args=(there, client, dict(nodes), threads), daemon=True, name="fedmm-worker"
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

    def ask(self, data: bytes) -> None:
        """If it is dead, receiving says so."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(data)

    def stop(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _in_main_thread() -> bool:
    """Only there may a signal handler be set."""
    return threading.current_thread() is threading.main_thread()


def _serve(connection: Connection, client: str | ClientApp, nodes: Mapping[int, NodeConfig], threads: int) -> None:
    """A worker's life: messages in, replies out, until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    runtime = _Runtime(client, nodes)
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            return
        connection.send_bytes(runtime.handle(data))


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

    def handle(self, data: bytes) -> bytes:
        """An exception that escapes the app is a reply too, without its text: that may hold a patient's value."""
        message = _parse(data)
        context = self._contexts[message.metadata.dst_node_id]
        try:
            answer: bytes = message_to_proto(self._app(message, context)).SerializeToString()
        except (Exception, SystemExit) as error:
            log.error("the ClientApp of node %d raised %s", context.node_id, type(error).__name__)
            failure = Error(UNEXPECTED_CODE, "UNEXPECTED: the hospital's app raised an exception")
            answer = message_to_proto(Message(failure, reply_to=message)).SerializeToString()
        return answer


def load_app(reference: str) -> ClientApp:
    """The ClientApp at "module:attribute"."""
    module, _, attribute = reference.partition(":")
    app: ClientApp = getattr(importlib.import_module(module), attribute)
    return app


def _parse(data: bytes) -> Message:
    return message_from_proto(ProtoMessage.FromString(data))
