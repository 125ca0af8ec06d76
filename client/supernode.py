"""A hospital's SuperNode: Flower's own, with the hospital's TLS identity, outbound connections only.

    python -m client.supernode KIT

Flower's SuperNode cannot show a client certificate, waits 3 s between two looks for work, and is refused after a kill until
its old session has expired (about 55 s). Here it shows the kit's certificate, looks more often, and ends its own old session
first. Everything else is flwr 1.41's `flower-supernode`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, DeactivateNodeRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedmm.errors import ConfigError
from fedmm.federation.pace import Pace, hurry
from fedmm.sites.kit import CA, NODE_KEY, SECRET, Kit, open_kit
from fedmm.sites.processes import exits
from fedmm.sites.tls import client_context

POLL_SECONDS = 0.5  # guess: how often to look for work at most; Flower's 3 s are a third of a small round
NODE_FILE = "node_id"  # in the state folder: whom to sign off after a kill


def fleet_client(kit: Kit) -> FleetHttpClient:
    """A client of the coordinator's Fleet API, with certificate and signed headers. Raises: ConfigError."""
    key = node_key(kit)
    return FleetHttpClient(
        f"https://{kit.federation.coordinator.host}:{kit.federation.coordinator.port}",
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
        verify=client_context(kit),
    )


def node_key(kit: Kit) -> ec.EllipticCurvePrivateKey:
    """Raises: ConfigError if node.key cannot be read."""
    try:
        key = load_ssh_private_key(kit.file(NODE_KEY).read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{kit.file(NODE_KEY)} cannot be read ({type(error).__name__})", fix="ask the coordinator for a new kit"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{kit.file(NODE_KEY)} is no EC key", fix="ask the coordinator for a new kit")
    return key


def run_is_over(client: FleetHttpClient, kit: Kit, run_id: int) -> bool:
    """Does the coordinator no longer wait for answers of this run? False when it cannot be reached: it may come back; and
    when it says something that cannot be read."""
    try:
        client.GetRun(GetRunRequest(node=Node(node_id=last_node_id(kit)), run_id=run_id))
    except httpx.HTTPStatusError as error:
        with contextlib.suppress(Exception):  # a peer's bytes
            said = FlowerError.from_json(error.response.text)
            return said is not None and said.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED
    except Exception:  # out of reach, or a peer's bytes
        return False
    return False


def last_node_id(kit: Kit) -> int:
    """0 before the first connection."""
    with contextlib.suppress(OSError, ValueError):
        return int((kit.state / NODE_FILE).read_text(encoding="ascii"))
    return 0


def main() -> None:
    os.umask(0o077)
    kit = open_kit(Path(sys.argv[1]), role="hospital")
    coordinator = kit.federation.coordinator
    _use(kit)
    sys.argv = [
        "flower-supernode",
        *("--superlink", f"{coordinator.host}:{coordinator.port}"),
        *("--root-certificates", str(kit.file(CA))),
        *("--auth-supernode-private-key", str(kit.file(NODE_KEY))),
        *("--host", "127.0.0.1", "--port", str(kit.config.ports.node)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(kit.state / SECRET)),
    ]
    flower_supernode()


def _use(kit: Kit) -> None:
    """Put this hospital's client and pace in the place of Flower's."""
    context = client_context(kit)

    class Client(FleetHttpClient):
        @classmethod
        def from_server_address(cls, server_address: str, *_: Any, interceptors: Any, **__: Any) -> Client:  # type: ignore[override]
            return cls(f"https://{server_address}", interceptors=interceptors, verify=context)

        def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:
            if old := last_node_id(kit):
                with contextlib.suppress(httpx.HTTPStatusError):  # it had signed off, or is another federation's
                    self.DeactivateNode(DeactivateNodeRequest(node_id=old))
            response = super().ActivateNode(request)
            (kit.make_state() / NODE_FILE).write_text(str(response.node_id), encoding="ascii")
            return response

    pace = Pace(POLL_SECONDS)

    class Time:
        """`time` for Flower's loop."""

        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

        @staticmethod
        def sleep(_: float) -> None:
            pace.wait()

    hurry()
    keep_in_step(pace)
    fleet_http_connection.FleetHttpClient = Client  # type: ignore[attr-defined]
    start_client_internal.time = Time()  # type: ignore[attr-defined, assignment]


def keep_in_step(pace: Pace) -> None:
    """Put in the place of Flower's: a reply that came late must not stand for the next one.

    Flower's loop takes a question, waits until *any* reply is there, sends it, and takes the next question. If the SuperLink dies
    while a question is being confirmed, the question is dropped but its answer comes all the same; from then on each answer
    would wait for the next question, across runs, while the SuperNode looks online. Here a late reply is sent as soon
    as nothing else is there, and a question is done when *its own* reply was taken up.
    """
    pull, push = start_client_internal._pull_and_store_message, start_client_internal._push_messages
    waiting: set[str] = set()  # of the question that was taken last

    def pull_in_step(*, state: Any, receive: Callable[[], Any], **given: Any) -> int | None:
        waiting.clear()

        def received() -> Any:
            if (found := receive()) is not None:
                pace.happened()
                waiting.add(found[0].metadata.message_id)
            return found

        if (run := pull(state=state, receive=received, **given)) is not None:
            return run
        waiting.clear()
        return LATE if late_replies(state) else None

    def push_in_step(*, state: Any, send: Any, push_object: Any, **given: Any) -> None:
        noting: Any = _Noting(state, waiting)
        surely = _Surely(send, push_object)
        push(state=noting, send=surely.send, push_object=surely.push_object, **given)
        while waiting:
            push(state=noting, send=surely.send, push_object=surely.push_object, **given)
        pace.happened()

    start_client_internal._pull_and_store_message = pull_in_step  # type: ignore[assignment]
    start_client_internal._push_messages = push_in_step  # type: ignore[assignment]


ASKED_ANEW = 3  # guess: times that a piece's connection may break
LATE = 0  # stands for a run's id in Flower's loop, which only asks whether there is one


def late_replies(state: Any) -> bool:
    """Is there a reply in a SuperNode's memory that was not taken up?"""
    with state.lock_msg_store:
        kept = list(state.msg_store.values())
    return any(not one.is_retrieved and one.message.metadata.reply_to_message_id for one in kept)


class _Surely:
    """Sends a reply's pieces although a connection breaks between them.

    Where the answer to a piece is lost on the way, Flower sends it again, the SuperLink says that it waits for no such piece
    (it has it), and Flower gives the whole reply up, which the SuperLink then keeps for ever in part. Here the SuperLink is
    asked what it still lacks.
    """

    def __init__(self, send: Any, push_object: Any) -> None:
        self._send, self._push = send, push_object
        self._reply: tuple[Any, ...] = ()
        self._session, self._lacks = "", set[str]()
        self._lock = threading.Lock()

    def send(self, *reply: Any) -> tuple[set[str], str]:
        self._reply = reply
        self._lacks, self._session = self._send(*reply)
        return self._lacks, self._session

    def push_object(self, run_id: int, session_id: str, object_id: str, contents: bytes) -> None:
        for _ in range(ASKED_ANEW):
            session = self._session
            try:
                self._push(run_id, session, object_id, contents)
                return
            except ObjectPushError:
                with self._lock:
                    if session == self._session:  # and not another piece's doing
                        self._lacks, self._session = self._send(*self._reply)
                if object_id not in self._lacks:
                    return
        self._push(run_id, self._session, object_id, contents)


class _Noting:
    """A SuperNode's state that notes which questions the replies that are taken up belong to."""

    def __init__(self, state: Any, waiting: set[str]) -> None:
        self._state, self._waiting = state, waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_messages_legacy(self, **given: Any) -> Any:
        found = self._state.get_messages_legacy(**given)
        self._waiting.difference_update(message.metadata.reply_to_message_id for message in found)
        return found


if __name__ == "__main__":
    exits(main)
