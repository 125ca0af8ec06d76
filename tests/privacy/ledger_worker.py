"""Run as a process of its own by faults.py: a process that forks others, which use a ledger until they are killed.

It says on stdout what it was told before each next durable step: "ask OPERATION" before, "reserved 7" after. Whatever was
said and is not on disk afterwards was forgotten.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fedmm.config import SiteConfig
from fedmm.errors import BudgetExhausted
from fedmm.privacy import accounting, roster, vault
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import Event, Rate

EVENT = Event("train", 2.0, Rate(0.1), 4)
HOWS = ("step", "instruction", "torn", "outside")
OPERATIONS = ("round", "round", "void", "rotate", "reopen", "split")
OTHERS = range(1000, 1003)  # patients of the ledger that "split" begins


def site(epsilon: float = 8.0, *, name: str = "north", **privacy: Any) -> SiteConfig:
    rules = {"epsilon": epsilon, "delta": 1e-5, "public_patients": 100, **privacy}
    return SiteConfig.model_validate(
        {"hospital": {"name": name}, "labels": {"findings": ["effusion"]}, "privacy": rules}
    )


class Kill(NamedTuple):
    """How and when a process dies: `at` steps, instructions, bytes or microseconds after operation `operation` began.

    step: SIGKILL before or after a file is made, half written, synced, renamed, removed, or as an SQL statement begins.
    instruction: SIGKILL between two instructions of SQLite's virtual machine, so inside a statement.
    torn: the kernel ends the process (SIGXFSZ) inside the write that passes this many bytes: the middle of a COMMIT.
    outside: SIGKILL from another process, wherever this one is.
    """

    how: str
    operation: int
    at: int


def story(seed: int) -> list[str]:
    """What the process does; the end is the same for all, so that no kill comes too late."""
    rng = random.Random(seed)
    return ["make", "round", *(rng.choice(OPERATIONS) for _ in range(6)), *["round"] * 6]


def fate(seed: int) -> Kill:
    rng = random.Random(-seed)
    how, operation = HOWS[seed % len(HOWS)], rng.randrange(8)
    most = {"step": 40 if operation == 0 else 18, "instruction": 500, "torn": 9000, "outside": 20_000}[how]
    return Kill(how, operation, rng.randrange(1, most))


# --- dying ------------------------------------------------------------------------------------------------------------


class Countdown:
    """Kills this process at the n-th call after `begin`."""

    def __init__(self) -> None:
        self.left = 0

    def __call__(self, *_: Any) -> int:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **keys: Any) -> Any:
            self()
            result = function(*args, **keys)
            self()
            return result

        return called


class TornFile:
    """A file whose content arrives in two halves, with a durable step between them."""

    def __init__(self, file: Any, die: Countdown) -> None:
        self._file, self._die = file, die

    def write(self, content: bytes) -> None:
        for half in (content[: len(content) // 2], content[len(content) // 2 :]):
            self._file.write(half)
            self._file.flush()
            self._die()

    def __enter__(self) -> TornFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def arm(kill: Kill) -> Countdown:
    """Countdown over durable steps or instructions; not started."""
    die = Countdown()
    if kill.how == "step":
        for name in ("fsync", "rename", "replace", "unlink"):
            setattr(os, name, die.around(getattr(os, name)))
        fdopen = os.fdopen
        os.fdopen = lambda *args, **keys: TornFile(fdopen(*args, **keys), die)  # type: ignore[assignment]
    connect = sqlite3.connect

    def watched(name: str, **keys: Any) -> sqlite3.Connection:
        db = connect(name, **keys)
        if name != ":memory:":
            db.set_trace_callback(die if kill.how == "step" else None)
            db.set_progress_handler(die if kill.how == "instruction" else None, 1)
        return db

    sqlite3.connect = watched
    return die


def limit_files(folder: Path, at: int) -> None:
    """The kernel ends this process in the write that passes `at` bytes of what the log, the database or a new file has."""
    sizes = [path.stat().st_size for name in ("ledger.sqlite-wal", "ledger.sqlite") if (path := folder / name).exists()]
    base = [*sizes, 0][at % (len(sizes) + 1)]
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (base + at if base else at % 400, resource.RLIM_INFINITY))


# --- what it does until then ------------------------------------------------------------------------------------------


def say(*words: object) -> None:
    print(*words, flush=True)


class Work:
    """The operations of a story, each in the order of client/app.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.rounds = folder, folder / "ledger.sqlite", 0

    def make(self) -> None:
        self.ledger = Ledger.open(self.folder, site())
        say("made")

    def reopen(self) -> None:
        self.ledger.close()
        self.ledger = Ledger.open(self.folder, site())

    def round(self) -> None:
        self.rounds += 1
        charge = self.ledger.reserve(EVENT, run="kill", round=self.rounds)
        say("reserved", charge.seq)
        keys = [10 * self.rounds + number for number in range(3)]
        say("ask cover", *keys)
        roster.cover(self.path, keys, first=not roster.path_of(self.path).exists())
        say("covered", *keys)
        charge.start()
        say("ask settle")
        digest = f"{self.rounds:064x}"
        charge.settle(sha256=digest)
        say("settled", charge.seq, digest)
        say("ask send")
        self.ledger.record_sent("update", run="kill", round=self.rounds, size=10, sha256=digest, charge=charge.seq)
        say("sent", digest)

    def void(self) -> None:
        self.rounds += 1
        charge = self.ledger.reserve(EVENT, run="kill", round=self.rounds)
        say("reserved", charge.seq)
        say("ask giveback", charge.seq)
        charge.void()
        say("voided", charge.seq)

    def rotate(self) -> None:
        say("rotated", self.ledger.rotate())

    def split(self) -> None:
        other = self.folder / "other"
        other.mkdir(exist_ok=True)
        roster.split(self.path, other / "ledger.sqlite", list(OTHERS))
        say("split")
        with Ledger.open(other, site(name="south"), split_off=True) as new:
            self.ledger.record_split("south", new.public_key())
        say("wrote split")


def live(folder: Path, seed: int, kill: Kill) -> None:
    """Tell the story, until killed."""
    die, work = arm(kill), Work(folder)
    for number, operation in enumerate(story(seed)):
        if number == kill.operation:
            if kill.how == "torn":
                limit_files(folder, kill.at)
            elif kill.how != "outside":
                die.left = kill.at
            say("fate")
        say("ask", operation)
        getattr(work, operation)()
        head = work.ledger.head()
        say("head", *head)
    say("end")


# --- the process that forks -------------------------------------------------------------------------------------------


def serve() -> None:
    """Each line on stdin is [folder, seed, kill]; the answer is [how the child ended, what it said]."""
    accounting.exceeds((accounting.Term(2.0, 0.1, 4),), 1e-5, ceiling=1.0)  # imports, once for all children
    vault.code_version()
    for line in sys.stdin:
        folder, seed, kill = json.loads(line)
        said_by_child, said = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(said, 1)
            code = 1
            try:
                live(Path(folder), seed, Kill(*kill))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(said)
        text = listen(said_by_child, pid, Kill(*kill))
        _, status = os.waitpid(pid, 0)
        say(json.dumps([os.waitstatus_to_exitcode(status), text]))


def listen(pipe: int, pid: int, kill: Kill) -> str:
    """All that a child says; kills it from outside if that is its fate."""
    heard, deadline, waiting = b"", None, kill.how == "outside"
    while True:
        if waiting and deadline is None and b"fate\n" in heard:
            deadline = time.monotonic() + kill.at / 1e6
        if waiting and deadline and not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            os.kill(pid, signal.SIGKILL)  # the pipe is open, so it has not ended, and is ours to wait for
            waiting = False
        part = os.read(pipe, 65536)
        if not part:
            os.close(pipe)
            return heard.decode()
        heard += part


def race(folder: Path, attempts: int, ceiling: float) -> None:
    """Print how many reservations this process got."""
    accounting._pld.cache_clear()
    won = 0
    with Ledger.open(folder, site(ceiling)) as ledger:
        for number in range(attempts):
            try:
                ledger.reserve(EVENT, run=f"race{os.getpid()}", round=number, plan_digest=f"{os.getpid()} {number}")
                won += 1
            except BudgetExhausted:
                continue
    say(won)


def cover(folder: Path, first: int) -> None:
    """Note ten patients, one at a time, in a list that another process is writing too."""
    for key in range(first, first + 10):
        roster.cover(folder / "ledger.sqlite", [key], first=False)


def rotate(folder: Path, times: int) -> None:
    """When told to."""
    with Ledger.open(folder, site()) as ledger:
        say("ready")
        sys.stdin.readline()
        for _ in range(times):
            ledger.rotate()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    elif sys.argv[1] == "cover":
        cover(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1] == "rotate":
        rotate(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        race(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
