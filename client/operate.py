"""What `fedmm site` does: the hospital's SuperNode and executor kept running, outbound connections only."""

from __future__ import annotations

import json
import secrets
from contextlib import suppress
from typing import Any

from fedmm.config import load_site
from fedmm.errors import ConfigError, FedmmError
from fedmm.privacy import vault
from fedmm.privacy.ledger import Ledger
from fedmm.sites.kit import SECRET, Kit
from fedmm.sites.metrics import SITE_STATUS, hospital_registry, metrics
from fedmm.sites.processes import Program, Supervisor, processes, python, stop
from fedmm.sites.tls import ask_health


def up(kit: Kit, *, executor: str = "client.executor") -> None:
    """In the foreground until stopped. executor: only tests name another one.

    Raises: ConfigError if it runs already, PolicyRefused if site.toml is missing or wrong.
    """
    site = load_site(kit.hospital)
    if site.hospital.name != kit.name:
        raise ConfigError(
            f"site.toml says this is {site.hospital.name}, the kit says {kit.name}",
            fix="use the kit of this hospital, or correct hospital.name in site.toml",
        )
    if site.labels != kit.federation.labels:
        raise ConfigError(
            "[labels] in site.toml are not those of the federation", fix="make them as in the kit's federation.json"
        )
    state = kit.make_state()
    with Supervisor(state, programs(kit, executor)) as running, metrics(kit, hospital_registry(kit.hospital)):
        secret = state / SECRET  # between these two processes, new at each start
        secret.unlink(missing_ok=True)
        vault.write_private(secret, secrets.token_hex(32).encode())
        running.start()
        try:
            ask_health(kit)
        except (
            FedmmError
        ) as error:  # it may come up later; a certificate that is refused will not, and that is said here
            print(f"warning: {error}", flush=True)
        address = kit.federation.coordinator
        print(
            f"site       {kit.name} up: connects to {address.host}:{address.port}, listens on loopback only", flush=True
        )
        running.until_stopped()


def programs(kit: Kit, executor: str) -> list[Program]:
    """In the order in which they start."""
    folder = str(kit.folder.absolute())
    return [Program("supernode", python("client.supernode", folder)), Program("executor", python(executor, folder))]


def status(kit: Kit) -> dict[str, Any]:
    """What runs here, what the hospital works on, and its budget. Raises: Refusal if policy or ledger cannot be read."""
    work: dict[str, Any] | None = None
    with suppress(OSError, ValueError):
        work = json.loads((kit.hospital / SITE_STATUS).read_text(encoding="utf-8"))
    budget = None
    site = load_site(kit.hospital)
    if (kit.hospital / site.ledger.path).exists():
        with Ledger.open(kit.hospital, site, create=False) as ledger:
            spent = ledger.spent()
        budget = {"epsilon": spent.epsilon, "ceiling": spent.ceiling, "delta": spent.delta, "reserved": spent.reserved}
    return {"hospital": kit.name, "processes": processes(kit.state), "work": work, "budget": budget}


def down(kit: Kit) -> bool:
    """False if nothing was running. A training that is going on stops at its next step; its charge stays and is used again."""
    return stop(kit.state)
