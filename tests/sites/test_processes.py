"""A supervisor keeps its programs running, alone, and leaves nobody behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedmm.errors import ConfigError
from fedmm.sites import processes
from fedmm.sites.processes import Program, Supervisor, running_pid, stop

SLEEPER = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]
SUPERVISE = """
import sys; from pathlib import Path
from fedmm.sites.processes import Program, Supervisor
with Supervisor(Path(sys.argv[1]), [Program("one", {one}), Program("two", {one})]) as running:
    running.start(); print("up", flush=True); running.until_stopped()
"""


def until(true: Callable[[], bool]) -> None:
    for _ in range(400):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("waited 20 s in vain")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path / "state"


@pytest.fixture
def started(state: Path) -> Iterator[subprocess.Popen[str]]:
    """A supervisor of two programs, in a process of its own; whatever is left of it is ended after the test."""
    code = SUPERVISE.format(one=SLEEPER)
    with subprocess.Popen([sys.executable, "-c", code, str(state)], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "up\n"
        yield started
        started.kill()


def pids(state: Path) -> list[int]:
    return [int(one["pid"]) for one in (processes.processes(state) or {}).values()]


def test_what_ends_is_started_again_and_what_is_stopped_is_gone(state: Path, started: subprocess.Popen[str]) -> None:
    first, second = pids(state)
    until(lambda: (state / "logs/one.log").read_text() == "here\n")
    os.kill(first, signal.SIGKILL)
    until(lambda: pids(state)[0] not in (0, first))
    assert pids(state)[1] == second
    assert (processes.processes(state) or {})["one"]["restarts"] == 1
    left = pids(state)
    until(lambda: (state / "logs/one.log").read_text().count("here") == 2)
    assert (state / "logs/one.log").stat().st_mode & 0o777 == 0o600
    assert stop(state)
    assert started.wait(30) == 0
    assert not [pid for pid in left if alive(pid)]
    assert processes.processes(state) is None
    assert not stop(state)


def test_two_supervisors_do_not_share_a_state_folder(state: Path, started: subprocess.Popen[str]) -> None:
    assert running_pid(state) == started.pid
    with pytest.raises(ConfigError, match="runs already"), Supervisor(state, []):
        pass
    assert stop(state)
    started.wait(30)


def test_a_supervisor_that_is_killed_leaves_no_program_and_no_lock(state: Path, started: subprocess.Popen[str]) -> None:
    left = pids(state)
    started.kill()
    started.wait(30)
    until(lambda: not [pid for pid in left if alive(pid)])
    assert running_pid(state) is None


def test_a_program_that_does_not_end_when_asked_is_ended(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.0)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(600)"
    )
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with Supervisor(state, [Program("stubborn", [sys.executable, "-c", stubborn])]) as running:
        running.start()
        (pid,) = pids(state)
        until(lambda: (state / "logs/stubborn.log").read_text() == "x\n")
    assert not alive(pid)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_program_that_fails_at_once_is_tried_again_ever_less_often(state: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    pauses = []
    with Supervisor(state, [Program("failing", [sys.executable, "-c", "raise SystemExit(3)"])]) as running:
        running.start()
        one = running._running["failing"]
        for _ in range(6):
            assert one._process is not None
            one._process.wait()
            assert one.look()
            pauses.append(one._pause)
            one._again = time.monotonic() - 1
            assert one.look()
    assert pauses == [2.0, 4.0, 8.0, 15.0, 15.0, 15.0]
    for number, handler in before.items():
        signal.signal(number, handler)
