"""A few programs kept running together: started in order, started again when they end, stopped in reverse.

    with Supervisor(state, programs) as running:   # ConfigError if they run already
        running.until_stopped(tick)                 # in the foreground, until SIGTERM, SIGINT or `stop(state)`

For `fedmm coordinator up` and `fedmm site up`. A service manager (systemd, a container) keeps the supervisor itself running.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from fedmm.errors import ConfigError, FedmmError, RunFailed

LOCK, PROCESSES, LOGS = "up.lock", "processes.json", "logs"
MAX_LOG = 10 * 2**20  # bytes of one program's log before it is moved aside; one old one is kept
FIRST_PAUSE, LONGEST_PAUSE, STEADY = (
    1.0,
    15.0,
    60.0,
)  # seconds before a restart, doubling; a life that forgives the past
STOP_SECONDS = 25.0  # guess: for a client to end its step and for Flower to sign off
TICK = 0.5
PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Each is a measured hole of Flower's defaults (../shared/flower.md), closed in every program that is started here.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Program:
    """command: a program's name (looked for beside this Python first) or path, and its arguments."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this Python."""
    return [sys.executable, "-m", module, *arguments]


def exits(main: Callable[[], None]) -> None:
    """Run a program of ours. Its errors are one message, which lands in its log, and an exit code; never a traceback."""
    try:
        main()
    except FedmmError as error:
        print(f"fedmm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a port that is taken, a full disk
        print(f"fedmm: {error.strerror or type(error).__name__}", file=sys.stderr)
        sys.exit(RunFailed.exit_code)


class Supervisor:
    def __init__(self, state: Path, programs: Sequence[Program]) -> None:
        self._state, self._programs = state, programs
        self._running: dict[str, _Running] = {}
        self._lock: IO[str] | None = None
        self._stopping = False

    def __enter__(self) -> Supervisor:
        self._lock = _take_lock(self._state / LOCK)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked_to_stop)
        (self._state / LOGS).mkdir(mode=0o700, exist_ok=True)
        for program in self._programs:
            self._running[program.name] = _Running(program, self._state)
        return self

    def start(self, *names: str) -> None:
        """Start these now, or all that are not running yet. Safe to call again."""
        for name in names or self._running:
            self._running[name].start()
        self._write()

    def until_stopped(self, tick: Callable[[], None] = lambda: None) -> None:
        """tick: called about twice a second between two looks at the programs."""
        while not self._stopping:
            if any([running.look() for running in self._running.values()]):
                self._write()
            tick()
            time.sleep(TICK)

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    @property
    def stopping(self) -> bool:
        return self._stopping

    def __exit__(self, *_: object) -> None:
        end = time.monotonic() + STOP_SECONDS
        for running in reversed(self._running.values()):
            running.stop(end)
        (self._state / PROCESSES).unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()

    def _write(self) -> None:
        said = {name: running.said() for name, running in self._running.items()}
        beside = self._state / (PROCESSES + ".new")
        beside.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._state / PROCESSES)


class _Running:
    """One program's lives."""

    def __init__(self, program: Program, state: Path) -> None:
        self._program, self._log = program, state / LOGS / f"{program.name}.log"
        self._environment = {**os.environ, **QUIET, "FLWR_HOME": str(state / "flwr"), **program.environment}
        here = str(Path(sys.executable).parent)
        self._environment["PATH"] = here + os.pathsep + self._environment.get("PATH", "")
        self._process: subprocess.Popen[bytes] | None = None
        self._began, self._again, self._pause, self._restarts = 0.0, 0.0, FIRST_PAUSE, 0

    def start(self) -> None:
        if self._process is not None:
            return
        if self._log.exists() and self._log.stat().st_size > MAX_LOG:
            self._log.replace(self._log.with_name(self._log.name + ".1"))
        program = shutil.which(self._program.command[0], path=self._environment["PATH"]) or self._program.command[0]
        with self._log.open("ab") as log:
            os.chmod(self._log, 0o600)
            self._process = subprocess.Popen(
                [program, *self._program.command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which stops them in order
                preexec_fn=_die_with_parent,  # a supervisor that is killed leaves nobody behind
            )
        self._began = time.monotonic()

    def look(self) -> bool:
        """Start again what has ended, after a pause that doubles. True if something changed."""
        now = time.monotonic()
        if self._process is None:
            if not self._again or now < self._again:
                return False
            self._again = 0.0
            self._restarts += 1
            self.start()
            return True
        if self._process.poll() is None:
            return False
        self._pause = FIRST_PAUSE if now - self._began > STEADY else min(self._pause * 2, LONGEST_PAUSE)
        self._process, self._again = None, now + self._pause
        return True

    def stop(self, end: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def said(self) -> dict[str, int | str]:
        pid = self._process.pid if self._process is not None else 0
        return {"pid": pid, "restarts": self._restarts, "log": str(self._log)}


def _die_with_parent() -> None:
    """In the child, before its program: SIGTERM when the parent dies. Linux only; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.umask(0o077)


def _take_lock(path: Path) -> IO[str]:
    """Raises: ConfigError if another supervisor has it."""
    lock = path.open("a+", encoding="ascii")
    os.chmod(path, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ConfigError(
            f"{path.parent} is in use: it runs already", fix="stop it first, or look at its status"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def processes(state: Path) -> dict[str, dict[str, int | str]] | None:
    """What runs under a supervisor of this state folder, by name; None if none is running."""
    if running_pid(state) is None:
        return None
    try:
        found: dict[str, dict[str, int | str]] = json.loads((state / PROCESSES).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


def running_pid(state: Path) -> int | None:
    """Of the supervisor, None if there is none: whether the lock is held says so, not the number in it."""
    try:
        with (state / LOCK).open("r+", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return int(lock.read() or 0) or None
    except (OSError, ValueError):
        pass
    return None


def stop(state: Path, *, seconds: float = STOP_SECONDS + 10) -> bool:
    """End the supervisor of this state folder. False if none was running. Raises: RunFailed if it does not end."""
    pid = running_pid(state)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + seconds
    while running_pid(state) is not None:
        if time.monotonic() > end:
            raise RunFailed(f"process {pid} does not end", fix=f"look at {state / LOGS}; kill -9 {pid} loses no charge")
        time.sleep(0.1)
    return True
