"""What `fedmm coordinator` and `fedmm runs` do: SuperLink, executor and proxy kept running; runs started and gone on with."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmm.config import RunConfig
from fedmm.errors import ConfigError, RunFailed
from fedmm.report.record import CONFIG_FILE, MODEL_FILE, read_config, read_rounds
from fedmm.report.status import STATUS_FILE, status_json
from fedmm.sites.kit import CA, SECRET, SERVER_CERT, SERVER_KEY, Kit, open_kit
from fedmm.sites.metrics import coordinator_registry, metrics
from fedmm.sites.processes import Program, Supervisor, processes, python, stop
from server.grid import KIT_VARIABLE
from server.link import DATABASE, FlowerRun, Link, purge

START_SECONDS = 60.0  # guess: Flower's imports on a busy machine
STOP_RUN_SECONDS = 8.0  # guess: four looks of a hospital whether the run goes on
PURGE_SECONDS = 5.0
AWAY_SECONDS = 120.0  # guess: of a SuperLink that is being started again


def up(kit: Kit) -> None:
    """In the foreground until stopped. Raises: ConfigError if it runs already, RunFailed if the SuperLink does not start."""
    state = kit.make_state()
    kit.runs.mkdir(parents=True, exist_ok=True)
    with Supervisor(state, programs(kit)) as running, Link(kit) as link, metrics(kit, coordinator_registry(kit.runs)):
        running.start("superlink")
        link.wait(START_SECONDS)
        for name in link.admit():
            print(f"admitted   {name}", flush=True)
        running.start()
        address = kit.federation.coordinator
        print(f"coordinator {kit.federation.name} up: hospitals connect to {address.host}:{address.port}", flush=True)
        running.until_stopped(_Keeper(kit, link).look)


def programs(kit: Kit) -> list[Program]:
    """In the order in which they start. The SuperLink is on loopback; only the proxy listens to the world."""
    link, secret = kit.config.ports.link, str(kit.file(SECRET))
    superlink = [
        "flower-superlink",
        *("--host", "127.0.0.1", "--port", str(link), "--database", str(kit.state / DATABASE)),
        *("--ssl-ca-certfile", str(kit.file(CA))),
        *("--ssl-certfile", str(kit.file(SERVER_CERT)), "--ssl-keyfile", str(kit.file(SERVER_KEY))),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--isolation", "process", "--superexec-auth-secret-file", secret),
    ]
    superexec = [
        "flower-superexec",
        *("--root-certificates", str(kit.file(CA)), "--runtime-api-address", f"127.0.0.1:{link}"),
        *("--superexec-auth-secret-file", secret),
    ]
    here = {KIT_VARIABLE: str(kit.folder.absolute()), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"}
    return [
        Program("superlink", superlink),
        Program("superexec", superexec, here),
        Program("proxy", python("server.proxy", str(kit.folder.absolute()))),
    ]


@dataclass
class _Keeper:
    """Now and then: who was admitted or withdrawn by a new federation.json; weights of finished runs out of the database."""

    kit: Kit
    link: Link
    _purged: set[int] = field(default_factory=set)
    _next: float = 0.0

    def _admit(self) -> None:
        """A description that is half copied, or older, changes nothing."""
        with suppress(ConfigError):
            newer = open_kit(self.kit.folder, role="coordinator")
            if newer.federation.serial > self.kit.federation.serial:
                with Link(newer) as link:
                    new = link.admit()
                for name in new:
                    print(f"admitted   {name}", flush=True)
                self.kit = newer

    def look(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PURGE_SECONDS
        try:
            self._admit()
            runs = self.link.runs()
            over = {run.id for run in runs if run.over}
            if over - self._purged and len(over) == len(runs):
                for number in over - self._purged:
                    for _ in self.link.logs(number):
                        pass
                purge(self.kit.state / DATABASE)
                self._purged |= over
        except (RunFailed, sqlite3.Error):  # the SuperLink is being started again, or is writing: next time
            return


def down(kit: Kit) -> bool:
    """Stop runs first, so that hospitals stop at their next step, then the rest. False if nothing was running."""
    if processes(kit.state) is None:
        return False
    try:
        with Link(kit) as link:
            going = [run for run in link.runs() if not run.over]
            for run in going:
                link.stop(run.id)
        if going:
            time.sleep(STOP_RUN_SECONDS)
    except RunFailed:
        pass  # it does not answer: the supervisor ends it all the same
    return stop(kit.state)


def status(kit: Kit) -> dict[str, Any]:
    """What runs here, who is connected, what the newest run does (fedmm.report.status)."""
    connected: list[dict[str, Any]] | None = None
    try:
        with Link(kit) as link:
            now = time.time()
            connected = [
                {
                    "name": node.name,
                    "connected": node.status == "online" and node.online_until > now,
                    "id": str(node.id),
                }
                for node in sorted(link.nodes(), key=lambda node: node.name)
            ]
    except RunFailed:
        pass  # no SuperLink: said as None
    newest = max(kit.runs.glob(f"*/{STATUS_FILE}"), key=lambda path: path.stat().st_mtime, default=None)
    return {
        "federation": kit.federation.name,
        "processes": processes(kit.state),
        "hospitals": connected,
        "run": None if newest is None else {"folder": str(newest.parent), **status_json(newest.parent)},
    }


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OurRun:
    """A run folder and how far it is. state: going, done, stopped (can go on)."""

    name: str
    folder: Path
    state: str
    round: int
    rounds: int
    started: str


def runs(kit: Kit) -> list[OurRun]:
    """The oldest first."""
    going: set[str] = set()
    try:
        with Link(kit) as link:
            going = {run.folder for run in link.runs() if not run.over}
    except RunFailed:
        pass  # no SuperLink, nothing is going on
    found = []
    for folder in sorted(path.parent for path in kit.runs.glob(f"*/{CONFIG_FILE}")):
        content, rounds = read_config(folder), read_rounds(folder)
        done = (folder / MODEL_FILE).exists()
        state = "done" if done else "going" if str(folder) in going else "stopped"
        last = rounds[-1]["round"] if rounds else 0
        total = int(content["settings"]["federation.rounds"])
        found.append(OurRun(folder.name, folder, state, last, total, str(content.get("started", ""))))
    return sorted(found, key=lambda run: run.started)


def find_run(kit: Kit, name: str) -> OurRun:
    """Raises: ConfigError."""
    run = next((run for run in runs(kit) if run.name == name), None)
    if run is None:
        raise ConfigError(f"there is no run {name} in {kit.runs}", fix=f"fedmm runs list {kit.folder}")
    return run


def start(kit: Kit, settings: Mapping[str, Any], *, name: str = "") -> tuple[int, Path]:
    """Start a run. Returns Flower's number and the run folder. Raises: ConfigError, RunFailed."""
    name = name or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise ConfigError(f"{name!r} cannot be a run's name", fix="use letters, digits, - and _")
    folder = kit.runs / name
    if folder.exists() and any(file.name != STATUS_FILE for file in folder.iterdir()):  # else it died before it began
        raise ConfigError(f"there is a run {name} already", fix=f"go on with it: fedmm runs resume {kit.folder} {name}")
    if "federation.out" in settings:
        raise ConfigError("--set federation.out is given by the command itself", fix="use --name")
    config = RunConfig.from_flat({**settings, "federation.out": str(folder)})
    return _launch(kit, config), folder


def resume(kit: Kit, name: str) -> tuple[int, Path]:
    """Go on with a run that stopped. Raises: ConfigError, RunFailed."""
    run = find_run(kit, name)
    if run.state != "stopped":
        raise ConfigError(f"the run {name} is {run.state}", fix="only a stopped run can go on")
    settings = read_config(run.folder)["settings"]
    return _launch(kit, RunConfig.from_flat({**settings, "federation.out": str(run.folder)})), run.folder


def _launch(kit: Kit, config: RunConfig) -> int:
    members = [member for member in kit.federation.hospitals if not member.revoked]
    if config.federation.min_hospitals > len(members):
        raise ConfigError(
            f"federation.min_hospitals is {config.federation.min_hospitals}, "
            f"but {kit.federation.name} has {len(members)} hospitals",
            fix="lower federation.min_hospitals, or provision more hospitals",
        )
    with Link(kit) as link:
        going = [run for run in link.runs() if not run.over]
        if any(run.folder == config.federation.out for run in going):
            raise ConfigError(f"{config.federation.out} is going on already", fix="wait for it, or stop it first")
        try:
            return link.start(config.flat())
        except RunFailed:  # a busy SuperLink may have started it and answered too late
            begun = [run.id for run in link.runs() if not run.over and run.folder == config.federation.out]
            if not begun:
                raise
            return begun[-1]


def follow(kit: Kit, number: int, *, say: Callable[[str], None]) -> FlowerRun:
    """Show what the ServerApp says until the run is over. A SuperLink that is away for a while is waited for.

    Raises: RunFailed if it stays away.
    """
    after, last_seen = 0.0, time.monotonic()
    while True:
        try:
            with Link(kit) as link:
                for said, when in link.logs(number, after=after):
                    after, last_seen = when, time.monotonic()
                    say(said)
                run = next((run for run in link.runs() if run.id == number), None)
            if run is None:
                raise RunFailed(f"the SuperLink knows no run {number}")
            if run.over:
                return run
        except RunFailed:
            if time.monotonic() - last_seen > AWAY_SECONDS:
                raise
        time.sleep(1.0)


def stop_run(kit: Kit, name: str) -> None:
    """Raises: ConfigError if it is not going on."""
    with Link(kit) as link:
        going = [run for run in link.runs() if not run.over and Path(run.folder).name == name]
        if not going:
            raise ConfigError(f"no run {name} is going on", fix=f"fedmm runs list {kit.folder}")
        for run in going:
            link.stop(run.id)
