"""A federation of real processes on loopback: provisioned, started, watched, killed at, and stopped whatever happens."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from fedmm.config import RunConfig, load_site
from fedmm.data.synthetic import synthesize
from fedmm.errors import RunFailed
from fedmm.report.record import read_rounds
from fedmm.sites.description import read_description
from fedmm.sites.kit import Kit, open_kit
from fedmm.sites.processes import processes, stop
from fedmm.sites.provision import open_office
from server.link import Link

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "data.image_size": 16,
    "data.report_tokens": 32,
    "data.report_buckets": 64,
    "data.audio_seconds": 0.5,
    "model.width": 8,
    "training.local_steps": 2,
    "training.sampling_rate": 0.5,
    "training.device": "cpu",
    "federation.evaluate_every": 0,
    "federation.seed": 1,
}
UP = """
import sys; from pathlib import Path
from fedmm.sites.kit import open_kit
kit = open_kit(Path(sys.argv[1]))
if kit.is_coordinator:
    from server.operate import up; up(kit)
else:
    from client.operate import up; up(kit, executor=sys.argv[2])
"""
PATIENCE = 180.0  # seconds, on a busy machine; nothing waits for less than it needs


def until(true: Callable[[], Any], *, what: str, seconds: float = PATIENCE) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds:.0f} s")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Sites:
    """A context manager: leaving it stops every process that was started. hospitals: names, all with the same labels.

    executor: the module that runs a hospital's app.
    """

    folder: Path
    hospitals: Sequence[str]
    patients: int = 12
    executor: str = "tests.e2e.fixed_executor"
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Sites:
        made = synthesize(self.folder / "made", count=len(self.hospitals), patients=self.patients, seed=3)
        for name, path in zip(self.hospitals, made, strict=True):
            text = (path / "site.toml").read_text().replace(f'name = "{path.name}"', f'name = "{name}"')
            # one thread, as the simulation that is compared with: two may add up in another order
            (path / "site.toml").write_text(text + "\n[limits]\nthreads = 1\n")
            path.rename(self.folder / "made" / name)
        self._provision()
        return self

    def _provision(self) -> None:
        public, link, *rest = free_ports(2 + 2 * len(self.hospitals) + 1)
        labels = load_site(self.folder / "made" / self.hospitals[0]).labels
        values = ", ".join(f'"{value}"' for value in labels.class_values)
        findings = ", ".join(f'"{finding}"' for finding in labels.findings)
        (self.folder / "federation.toml").write_text(
            f'[federation]\nname = "rehearsal"\n[coordinator]\nhost = "localhost"\nport = {public}\n'
            f'[labels]\nfindings = [{findings}]\nclass_name = "{labels.class_name}"\nclass_values = [{values}]\n'
            + "".join(f'[[hospitals]]\nname = "{name}"\n' for name in self.hospitals)
        )
        with open_office(self.folder / "kits", read_description(self.folder / "federation.toml")) as office:
            office.provision()
        self._ports("coordinator", f'listen = "127.0.0.1"\nlink = {link}\nmetrics = {rest.pop()}\n')
        for name in self.hospitals:
            self._ports(name, f"node = {rest.pop()}\nmetrics = {rest.pop()}\n")
            shutil.rmtree(self.folder / "kits" / name / "hospital")
            shutil.copytree(self.folder / "made" / name, self.folder / "kits" / name / "hospital")

    def _ports(self, name: str, text: str) -> None:
        path = self.folder / "kits" / name / "kit.toml"
        path.write_text(path.read_text().partition("[ports]")[0] + f"\n[ports]\n{text}")

    def kit(self, name: str = "coordinator") -> Kit:
        return open_kit(self.folder / "kits" / name)

    # --- processes ---

    def up(self, *names: str) -> None:
        """Start these in processes of their own; the coordinator and all hospitals if none is named."""
        for name in names or ("coordinator", *self.hospitals):
            with (self.folder / f"{name}.txt").open("ab") as said:
                self.started[name] = subprocess.Popen(
                    [sys.executable, "-c", UP, str(self.folder / "kits" / name), self.executor],
                    cwd=self.folder,
                    env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def pid(self, name: str, program: str) -> int:
        """0 while it is being started again."""
        found = processes(self.kit(name).state) or {}
        return int(found.get(program, {}).get("pid", 0))

    def kill(self, name: str, program: str) -> None:
        """kill -9, and wait until its supervisor has started it again."""
        pid = until(lambda: self.pid(name, program), what=f"{program} of {name} runs")
        os.kill(pid, signal.SIGKILL)
        until(lambda: self.pid(name, program) not in (0, pid), what=f"{program} of {name} runs again")

    def fedmm(self, *arguments: object, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "fedmm.cli", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
        )
        assert expect is None or done.returncode == expect, done.stdout + done.stderr + self.logs()
        return done

    def logs(self) -> str:
        """The end of every log, for whoever reads a failed test."""
        found = sorted(self.folder.glob("kits/*/state/logs/*.log*")) + sorted(self.folder.glob("*.txt"))
        return "".join(f"\n== {path}\n" + path.read_text(errors="replace")[-1500:] for path in found)

    def connected(self) -> set[str]:
        try:
            with Link(self.kit()) as link:
                return {node.name for node in link.nodes() if node.status == "online"}
        except RunFailed:
            return set()

    def rounds(self, run: str) -> int:
        """How many are recorded."""
        return len(read_rounds(self.kit().runs / run))

    def close(self) -> None:
        for name in list(self.started):
            stop(self.kit(name).state)
            try:
                self.started.pop(name).wait(60)
            except subprocess.TimeoutExpired:
                continue

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for process in self.started.values():
            process.terminate()
        for process in self.started.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def settings(**more: object) -> dict[str, object]:
    """The tiny ones; `federation__rounds=3` changes or adds one."""
    return {**TINY, **{key.replace("__", "."): value for key, value in more.items()}}


def flags(settings: Mapping[str, object]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def simulated(sites: Sites, given: Mapping[str, object]) -> Path:
    """The run folder of `fedmm simulate` over copies of the same hospitals, with the same noise."""
    from fedmm.cli import simulate_here

    folder = sites.folder / "simulated"
    shutil.copytree(sites.folder / "made", folder / "hospitals")
    config = RunConfig.from_flat(
        {**given, "data.hospitals": str(folder / "hospitals"), "federation.out": str(folder / "run")}
    )
    simulate_here(config, workers=0, client="tests.fixed_noise:app")
    return folder / "run"
