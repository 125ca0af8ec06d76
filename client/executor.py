"""What runs a hospital's ClientApp when its SuperNode has work: the code that is installed here, in one warm process.

    python -m client.executor KIT

Flower's executor starts, for every message, a process that unpacks and runs the code that came with the run. This one refuses
a run whose bundle is not the installed code, and answers from a worker that keeps torch and the decoded hospital warm. While
the worker works it watches: past the ask's time to live the worker is ended and the coordinator told (or the SuperNode would
be blocked across runs while it looks online); when the run is over, training stops at the next step.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import httpx
from flwr.app import Error, Message
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from client.refusal import refused
from client.supernode import fleet_client, last_node_id, run_is_over
from fedmm.errors import UNEXPECTED_CODE, DeadlinePassed, PolicyRefused, Refusal
from fedmm.federation.bundle import bundle_hash
from fedmm.federation.local import Worker
from fedmm.federation.pace import Pace, hurry
from fedmm.federation.packing import pack, unpack
from fedmm.sites.kit import SECRET, Kit, open_kit
from fedmm.sites.logs import json_logs
from fedmm.sites.processes import LOGS, exits

log = logging.getLogger("fedmm.executor")
CLIENT = "client.app:app"
STOP_VARIABLE, STOP_FILE = "FEDMM_STOP_FILE", "stop"  # the worker looks for this file between two steps
POLL_SECONDS = 0.2  # guess: between two looks for work, on loopback
HEARTBEAT_SECONDS = 10.0  # Flower gives a task up after 60
WATCH_SECONDS = 2.0  # guess: between two questions whether the run goes on
GRACE_SECONDS = 20.0  # guess: for one step, after which a worker that does not stop is ended


class WorkerDied(Exception):
    """While it was answering."""


class Executor:
    """Takes tasks of one SuperNode, one at a time, until `stop`."""

    def __init__(self, kit: Kit, *, client: str = CLIENT) -> None:
        self._kit, self._client = kit, client
        self._address = f"127.0.0.1:{kit.config.ports.node}"
        self._secret = (kit.state / SECRET).read_bytes().strip()
        self._fleet = fleet_client(kit)
        self._worker: Worker | None = None
        self._node = 0
        self._stop_file = kit.make_state() / STOP_FILE
        self._stopped = False
        os.environ[STOP_VARIABLE] = str(self._stop_file)

    def stop(self, *_: int | FrameType | None) -> None:
        """No more tasks; the one at work stops at its next step."""
        self._stopped = True
        self._stop_file.touch()

    def serve(self) -> None:
        self._stop_file.unlink(missing_ok=True)
        auth = SuperExecAuthHttpInterceptor(
            master_secret=self._secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
        )
        ask = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP], agentapp_fab_hashes=[])
        self._warm(last_node_id(self._kit))
        pace = Pace(POLL_SECONDS)
        with self._runtime(auth) as runtime:
            while not self._stopped:
                try:
                    found = runtime.AcquireTask(ask)
                    if found.HasField("task") and found.token:
                        self._task(found.token)
                        pace.happened()
                        continue
                except (
                    httpx.HTTPError,
                    RuntimeError,
                    ValueError,
                ) as error:  # the SuperNode is being started, or was killed
                    log.warning("no task taken: %s", type(error).__name__)
                    time.sleep(1.0)
                pace.wait()
        if self._worker is not None:
            self._worker.stop()

    def _runtime(self, *interceptors: SuperExecAuthHttpInterceptor | RuntimeTokenHttpInterceptor) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            self._address,
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *interceptors],
        )

    def _task(self, token: str) -> None:
        """One message, from the SuperNode and back to it."""
        with self._runtime(RuntimeTokenHttpInterceptor(token)) as runtime:
            message, context, _, fab = pull_task_input(runtime)
            reply = self._reply(message, fab.content, runtime)
            push_message(runtime, reply, context)
            push_task_output(client=runtime, context=context, sub_status=SubStatus.COMPLETED, details="")

    def _reply(self, message: Message, fab: bytes, runtime: RuntimeHttpClient) -> Message:
        """Whatever happens there is one: without it the SuperNode would take nothing else any more."""
        try:
            check_bundle(fab)
            message.content = unpack(message.content)
            reply = self._answer(message, runtime)
            if reply.has_content():
                reply.content = pack(reply.content)
            return reply
        except Refusal as refusal:
            log.warning("refused: %s", refusal)
            error, said = Error(refusal.code, refusal.public_text), refusal.public_text
        except Exception as unforeseen:
            log.exception("no answer could be made")
            why = "its worker died (out of memory?)" if isinstance(unforeseen, WorkerDied) else "see its log"
            error = Error(UNEXPECTED_CODE, f"UNEXPECTED: the hospital could not answer, {why}")
            said = "UNEXPECTED"
        return refused(message, error, folder=self._kit.hospital, said=said)

    def _answer(self, message: Message, runtime: RuntimeHttpClient) -> Message:
        """The worker's reply. Raises: DeadlinePassed; WorkerDied."""
        worker = self._warm(message.metadata.dst_node_id)
        worker.ask(message)
        began = time.monotonic()
        end, beat, look = began + message.metadata.ttl, began + HEARTBEAT_SECONDS, began + WATCH_SECONDS
        try:
            while not worker.connection.poll(min(0.5, POLL_SECONDS)):
                now = time.monotonic()
                if now > end:
                    raise DeadlinePassed("the time for this answer is over", fix="a longer federation.round_timeout")
                if now > beat:
                    beat = now + HEARTBEAT_SECONDS
                    _heartbeat(runtime)
                if now > look and not self._stop_file.exists():
                    look = now + WATCH_SECONDS
                    if run_is_over(self._fleet, self._kit, message.metadata.run_id):
                        log.warning("the run is over: stopping at the next step")
                        self._stop_file.touch()
                if self._stop_file.exists():
                    end = min(end, now + GRACE_SECONDS)
            reply = worker.answer()
            if reply.metadata.reply_to_message_id != message.metadata.message_id:
                raise RuntimeError("the worker answers another message than it was asked")
            return reply
        except BaseException as unforeseen:
            self._end_worker()  # or its answer would be taken for that to the next message
            if isinstance(unforeseen, EOFError | OSError):
                raise WorkerDied from None
            raise
        finally:
            if not self._stopped:
                self._stop_file.unlink(missing_ok=True)

    def _warm(self, node: int) -> Worker:
        """A live worker that is this node of the federation."""
        if self._worker is None or not self._worker.alive or self._node != node:
            self._end_worker()
            self._worker, self._node = Worker(self._client, {node: {"site": str(self._kit.hospital)}}), node
        return self._worker

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


def check_bundle(fab: bytes) -> None:
    """Raises: PolicyRefused if the coordinator runs other code than this hospital."""
    if hashlib.sha256(fab).hexdigest() != bundle_hash():
        raise PolicyRefused(
            "the coordinator's bundle is not the fedmm that is installed at this hospital",
            why="a hospital runs what it installed, and nothing that a run brings along",
            fix="install the same version of fedmm at both ends; start runs with fedmm coordinator run",
        )


def _heartbeat(runtime: RuntimeHttpClient) -> None:
    try:
        runtime.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.HTTPError as error:  # the SuperNode was killed: the answer is kept for the one that follows it
        log.warning("the SuperNode does not answer (%s)", type(error).__name__)


def main(client: str = CLIENT) -> None:
    """client: only tests name another one; no message, setting or variable reaches it."""
    os.umask(0o077)
    kit = open_kit(Path(sys.argv[1]), role="hospital")
    hurry()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # or each look for work is a line: five a second
    with json_logs(kit.make_state() / LOGS, "executor"):
        executor = Executor(kit, client=client)
        signal.signal(signal.SIGTERM, executor.stop)
        signal.signal(signal.SIGINT, executor.stop)
        executor.serve()


if __name__ == "__main__":
    exits(main)
