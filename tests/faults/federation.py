"""One federation of three hospitals as real processes, kept up through many faults: runs, strikes, recovery."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from safetensors.torch import load_file

import server.operate
from fedmm.errors import FedmmError
from fedmm.report.record import read_rounds
from fedmm.report.status import Status, read_status
from server.link import FlowerRun, Link
from tests.e2e.sites import Sites, settings, until
from tests.faults import stage
from tests.faults.books import all_settled, check_books

NAMES = ("north", "middle", "south")
STRUCK = "north"  # the hospital that faults happen to
ROUNDS = 2
# epsilon: forty runs of it fit under the ceiling of 20, so that no ledger has a say in the noise
GIVEN = settings(
    privacy__epsilon=0.25,
    federation__rounds=ROUNDS,
    federation__min_hospitals=3,
    federation__retries=8,
    federation__connect_seconds=300.0,  # also for introductions: a fresh worker imports torch
    federation__round_timeout=300.0,
)
PROGRAMS = {
    "coordinator": ("serverapp", "superlink", "superexec", "proxy", "coordinator"),
    "hospital": ("supernode", "executor", "worker", "site"),
}
ENDS = 400.0  # seconds until a run that was hit is over; Flower notices a dead ServerApp or executor after 60


@dataclass
class Faulty:
    """sites: up and connected.  number: of the case, for names of runs."""

    sites: Sites
    number: int = 0
    expected: dict[str, bytes] = field(default_factory=dict)

    # --- runs ---

    def begin(self, given: Mapping[str, object] = GIVEN) -> str:
        """Start a run; its name."""
        self.number += 1
        name = f"case{self.number}"
        server.operate.start(self.sites.kit(), {k: str(v) for k, v in given.items()}, name=name)
        return name

    def run(self, name: str) -> Path:
        return self.sites.kit().runs / name

    def status(self, name: str) -> Status | None:
        with contextlib.suppress(FedmmError):
            return read_status(self.run(name))
        return None

    def starts(self, name: str) -> list[FlowerRun]:
        """Flower's runs of this folder, the oldest first; empty while the SuperLink is away."""
        with contextlib.suppress(FedmmError), Link(self.sites.kit()) as link:
            return [run for run in link.runs() if run.folder == str(self.run(name))]
        return []

    def over(self, name: str, *, seconds: float = ENDS) -> FlowerRun:
        """How its latest start ended."""

        def look() -> FlowerRun | None:
            time.sleep(1.0)  # each look is a TLS handshake and a database query of the SuperLink that is being tested
            found = self.starts(name)
            return found[-1] if found and found[-1].over else None

        try:
            over: FlowerRun = until(look, what=f"{name} is over", seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.starts(name)}\n{self.status(name)}{self.sites.logs()}") from None
        return over

    def resume(self, name: str) -> None:
        """As a person does: stop what Flower still takes for going on, then go on; or begin again what never began."""
        with contextlib.suppress(FedmmError):
            server.operate.stop_run(self.sites.kit(), name)
        self.over(name, seconds=60)
        if (self.run(name) / "config.json").exists():
            server.operate.resume(self.sites.kit(), name)
        else:
            server.operate.start(self.sites.kit(), {k: str(v) for k, v in GIVEN.items()}, name=name)

    # --- processes ---

    def pid(self, program: str) -> int:
        """Of a program of the coordinator or of the struck hospital; 0 if it does not run now."""
        if program in ("coordinator", "site"):
            return self.sites.started["coordinator" if program == "coordinator" else STRUCK].pid
        if program == "serverapp":
            found = [one.pid for one in self.processes("coordinator") if "flwr-serverapp" in " ".join(command(one))]
            return found[0] if found else 0
        if program == "worker":
            executor = self.sites.pid(STRUCK, "executor")
            found = [c.pid for c in children(executor) if "spawn_main" in " ".join(command(c))]
            return found[0] if found else 0
        return self.sites.pid("coordinator" if program in PROGRAMS["coordinator"] else STRUCK, program)

    def kill(self, program: str) -> None:
        """kill -9. A supervisor is then started again by hand, as systemd does; the others by their supervisor."""
        pid = until(lambda: self.pid(program), what=f"{program} runs")
        os.kill(pid, signal.SIGKILL)
        if program in ("coordinator", "site"):
            name = "coordinator" if program == "coordinator" else STRUCK
            self.sites.started[name].wait(30)
            self.restart(name)

    def restart(self, name: str) -> None:
        """Once the programs of its last life have gone: they are told to, by the system."""
        until(lambda: not self.programs_of(name), what=f"the programs of {name} end", seconds=60)
        self.sites.up(name)
        if name == "coordinator":
            until(self.is_up, what="the SuperLink is up again")

    def is_up(self) -> bool:
        time.sleep(0.5)
        with contextlib.suppress(FedmmError), Link(self.sites.kit()) as link:
            return bool(link.nodes())
        return False

    def programs_of(self, name: str) -> list[psutil.Process]:
        """What a supervisor starts itself; a ServerApp is the superexec's child."""
        return [one for one in self.processes(name) if "flwr-serverapp" not in " ".join(command(one))]

    def processes(self, name: str) -> list[psutil.Process]:
        """All that run with this kit's environment, whoever their parent is by now."""
        home = str(self.sites.kit(name).state / "flwr")
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if one.environ().get("FLWR_HOME") == home and one.status() != psutil.STATUS_ZOMBIE:
                    found.append(one)
        return found

    def connected(self) -> None:
        until(lambda: self.sites.connected() == set(NAMES), what=f"all connect: {self.sites.connected()}")

    # --- moments ---

    @property
    def hospitals(self) -> list[Path]:
        return [self.sites.kit(name).hospital for name in NAMES]

    @property
    def struck(self) -> Path:
        return self.sites.kit(STRUCK).hospital

    def held(self, place: str) -> None:
        """Wait until the struck hospital is at this place, as it was ordered."""
        until(lambda: stage.came(self.struck, place), what=f"{STRUCK} is at {place}")

    def comes_to(self, name: str, place: str, *, resumes: int = 2) -> int:
        """Wait until the struck hospital is held at this place, going on with a run that ends before. Returns how often."""

        def look() -> str | None:
            time.sleep(0.5)
            if stage.came(self.struck, place):
                return "held"
            found = self.starts(name)
            return "over" if found and found[-1].over else None

        for number in range(resumes + 1):
            if until(look, what=f"{STRUCK} is at {place}, or {name} is over", seconds=ENDS) == "held":
                return number
            self.connected()
            self.resume(name)
        raise AssertionError(f"{name} ended {resumes + 1} times before {place}: {self.status(name)}{self.sites.logs()}")

    def calm(self) -> None:
        """Between two cases: nothing is held, everybody is connected, nothing runs."""
        for hospital in self.hospitals:
            stage.let_go(hospital)
        self.connected()

    # --- what must be true ---

    def completes(self, name: str, *, resumes: int = 2) -> int:
        """The run ends, gone on with at most so often; then the books are right and the weights those of a run that
        nothing happened to. Returns how often it was gone on with."""
        for number in range(resumes + 1):
            if number:
                self.connected()
                self.resume(name)
            if self.over(name).status == "finished:completed":
                break
        assert self.over(name).status == "finished:completed", f"{self.status(name)}{self.sites.logs()}"
        check_books(self.run(name), self.hospitals)
        all_settled(self.run(name), self.hospitals, rounds=ROUNDS)
        assert [sorted(record["trained"]) for record in read_rounds(self.run(name))] == [sorted(NAMES)] * ROUNDS
        got = load_file(self.run(name) / "model.safetensors")
        assert {key: value.numpy().tobytes() for key, value in got.items()} == self.expected
        return number


def command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return list(process.cmdline())
    return []


def children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return list(psutil.Process(pid).children())
    return []
