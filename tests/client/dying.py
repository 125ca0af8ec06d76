"""Clients that die where a test wants it: forked from one process that has imported everything, so that each costs little.

{"ask": {...}}     a child answers one ask; its process number is written back
{"wait": pid}      how it ended, as `subprocess.Popen.returncode`
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
POINTS = ("before reserve", "after reserve", "in training", "after outbox", "after settle", "after sent")


class Clients:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, hospital: Path, **given: Any) -> int:
        """given: point, where it dies; go, a file that it waits for in its training; env; what `asked` takes."""
        return self._say({"ask": {"hospital": str(hospital), **given}})

    def wait(self, pid: int) -> int:
        return self._say({"wait": pid})

    def _say(self, line: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def clients() -> Iterator[Clients]:
    command = [sys.executable, "-m", "tests.client.dying"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Clients(process)
        if process.stdin:
            process.stdin.close()


def asked(hospital: Path, *, kind: str = "train", run: str = "run1", round: int = 1, **settings: object) -> Any:
    """The reply of the app with noise that repeats, in this process."""
    from flwr.app import Message, MessageType

    from fedmm.federation.local import LocalGrid
    from fedmm.federation.messages import array_record, encode
    from tests.client.test_client import evaluate_ask, train_ask, weights

    body = train_ask(round=round, **settings) if kind == "train" else evaluate_ask(round=round)
    content = encode(body.model_copy(update={"run": run}), arrays=array_record(weights()))
    grid = LocalGrid("tests.fixed_noise:app", [{"site": str(hospital)}])
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(content, node, getattr(MessageType, kind.upper()))])
    return reply


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def prepare_to_die(point: str) -> None:
    from client.outbox import Outbox
    from fedmm.privacy.charge import Charge
    from fedmm.privacy.engine import PrivateEngine
    from fedmm.privacy.ledger import Ledger

    def after(owner: Any, name: str) -> None:
        honest = getattr(owner, name)

        def then_die(*given: Any, **more: Any) -> None:
            honest(*given, **more)
            die()

        setattr(owner, name, then_die)

    if point == "before reserve":
        Ledger.reserve = die  # type: ignore[method-assign,assignment]
    elif point == "in training":
        PrivateEngine.step = die  # type: ignore[method-assign]
    elif point:
        owner, name = {
            "after reserve": (Ledger, "reserve"), "after outbox": (Outbox, "put"), "after settle": (Charge, "settle"),
            "after sent": (Ledger, "record_sent"),
        }[point]  # fmt: skip
        after(owner, name)


def wait_in_training(hospital: Path, go: Path) -> None:
    """Its training says that it began, waits for the file, and says that it ended: who trains at once can be read."""
    import client.app

    honest = client.app.train

    def told(*given: Any, **more: Any) -> None:
        with (hospital / "journal").open("a", encoding="utf-8") as journal:
            journal.write(f"begin {os.getpid()}\n")
            journal.flush()
            end = time.monotonic() + 60
            while not go.exists() and time.monotonic() < end:
                time.sleep(0.02)
            honest(*given, **more)
            journal.write(f"end {os.getpid()}\n")

    client.app.train = told


def live(hospital: str, *, point: str = "", go: str = "", **given: Any) -> None:
    prepare_to_die(point)
    if go:
        wait_in_training(Path(hospital), Path(go))
    reply = asked(Path(hospital), **given)
    os._exit(0 if reply.has_content() else 1)


def serve() -> None:
    import torch

    import tests.client.test_client
    import tests.fixed_noise  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        said = json.loads(line)
        if "wait" in said:
            _, status = os.waitpid(said["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        elif (pid := os.fork()) == 0:
            try:
                live(**said["ask"])
            finally:
                os._exit(2)
        else:
            print(pid, flush=True)


if __name__ == "__main__":
    serve()
