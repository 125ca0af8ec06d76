"""What `fedmm site` does: the hospital's SuperNode and executor kept running, outbound connections only."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from fedmm.config import load_site
from fedmm.errors import ConfigError
from fedmm.privacy import vault
from fedmm.sites.kit import SECRET, Kit
from fedmm.sites.processes import Program, Supervisor, python, stop


def up(kit: Kit, *, executor: str = "client.executor", tick: Callable[[], None] = lambda: None) -> None:
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
    with Supervisor(state, programs(kit, executor)) as running:
        secret = state / SECRET  # between these two processes, new at each start
        secret.unlink(missing_ok=True)
        vault.write_private(secret, secrets.token_hex(32).encode())
        running.start()
        address = kit.federation.coordinator
        print(
            f"site       {kit.name} up: connects to {address.host}:{address.port}, listens on loopback only", flush=True
        )
        running.until_stopped(tick)


def programs(kit: Kit, executor: str) -> list[Program]:
    """In the order in which they start."""
    folder = str(kit.folder.absolute())
    return [Program("supernode", python("client.supernode", folder)), Program("executor", python(executor, folder))]


def down(kit: Kit) -> bool:
    """False if nothing was running. A training that is going on stops at its next step; its charge stays and is used again."""
    return stop(kit.state)
