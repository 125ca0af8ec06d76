"""The coordinator's words with its own SuperLink, on loopback: who may connect, which runs there are, start and stop.

Flower's Control API has no login in its open edition: whoever reaches it runs code at every hospital. It is reached from this
machine alone; server/proxy.py keeps it from everybody else.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedmm.errors import RunFailed
from fedmm.federation.bundle import bundle, bundle_hash
from fedmm.sites.kit import CA, Kit

DATABASE = "superlink.db"  # in the state folder


@dataclass(frozen=True)
class Node:
    """A SuperNode that the SuperLink knows. online_until: seconds since 1970; 0 before it first connected.

    key: its public one, PEM.
    """

    id: int
    name: str
    status: str
    online_until: float
    key: bytes


@dataclass(frozen=True)
class FlowerRun:
    """One start of a ServerApp: a run of ours that was resumed has several. status: Flower's, as `finished:completed`."""

    id: int
    folder: str
    status: str
    details: str

    @property
    def over(self) -> bool:
        return self.status.startswith("finished")


class Link:
    """A context manager. Raises: RunFailed from any call if the SuperLink is not running or says no."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._client = ControlHttpClient.from_server_address(
            f"127.0.0.1:{kit.config.ports.link}",
            insecure=False,
            root_certificates=kit.file(CA).read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr")],
        )

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def _ask(self, call: Any, request: Any) -> Any:
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            raise RunFailed(
                f"the SuperLink said no ({error.response.status_code})", why=error.response.text[:300]
            ) from None
        except httpx.HTTPError as error:
            raise RunFailed(
                "the coordinator's SuperLink does not answer",
                why=type(error).__name__,
                fix=f"start it: fedmm coordinator up {self._kit.folder}",
            ) from None

    def wait(self, seconds: float) -> None:
        """Until it answers. Raises: RunFailed."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.nodes()
                return
            except RunFailed:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    # --- who may connect ---

    def nodes(self) -> list[Node]:
        found = self._ask(self._client.ListNodes, ListNodesRequest()).nodes_info
        known = [n for n in found if n.status != "unregistered"]
        return [Node(n.node_id, n.name, n.status, n.online_until, n.public_key) for n in known]

    def admit(self) -> list[str]:
        """Make the SuperLink's list of nodes that of federation.json, names and keys: a hospital whose key was renewed is
        another node from then on. Returns the names that are new, or have a new key."""
        keys = {
            member.name: public_key_to_bytes(load_ssh_public_key(member.node_key.encode()))  # type: ignore[arg-type]
            for member in self._kit.federation.hospitals
            if not member.revoked
        }
        there = self.nodes()
        for node in there:
            if keys.get(node.name) != node.key:
                self._ask(self._client.UnregisterNode, UnregisterNodeRequest(node_id=node.id))
        new = sorted(keys.keys() - {node.name for node in there if keys.get(node.name) == node.key})
        for name in new:
            self._ask(self._client.RegisterNode, RegisterNodeRequest(public_key=keys[name], name=name))
        return new

    # --- runs ---

    def start(self, settings: Mapping[str, Any]) -> int:
        """A ServerApp with these settings. Returns Flower's number of the run."""
        fab = Fab(hash_str=bundle_hash(), content=bundle())
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(settings)))
        return int(self._ask(self._client.StartRun, request).run_id)

    def runs(self) -> list[FlowerRun]:
        """The oldest first."""
        found = self._ask(self._client.ListRuns, ListRunsRequest()).run_dict
        return [
            FlowerRun(
                id=run.run_id,
                folder=run.override_config["federation.out"].string,
                status=":".join(filter(None, (run.status.status, run.status.sub_status))),
                details=run.status.details,
            )
            for run in sorted(found.values(), key=lambda run: run.pending_at)
        ]

    def stop(self, run: int) -> None:
        self._ask(self._client.StopRun, StopRunRequest(run_id=run))

    def logs(self, run: int, *, after: float = 0.0) -> Iterator[tuple[str, float]]:
        """What the ServerApp said and when, until the run is over; then Flower deletes the run's messages. Raises: RunFailed
        when the connection ends before that: ask again with `after`."""
        request = StreamLogsRequest(run_id=run, after_timestamp=after)
        try:
            for said in self._client.StreamLogs(request):
                yield said.log_output, said.latest_timestamp
        except (httpx.HTTPError, ValueError) as error:
            raise RunFailed("the coordinator's SuperLink does not answer", why=type(error).__name__) from None


def purge(database: Path) -> None:
    """Give the pages of deleted messages back: they hold weights. Flower deletes a run's rows, not their bytes.

    Raises: sqlite3.Error, for example while a run is writing.
    """
    with sqlite3.connect(database, timeout=5) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute("VACUUM")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
