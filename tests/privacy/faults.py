"""What a ledger must survive, as functions that tests and benchmarks/privacy.py share: kill -9, and a race.

A kill is drawn from its seed: what the process does, when it dies and how (tests/privacy/ledger_worker.py). What it said
before is compared with what is on disk afterwards.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedmm.errors import HospitalInvalid, LedgerUnusable, PolicyRefused
from fedmm.privacy import chain, roster, vault
from fedmm.privacy.chain import Head
from fedmm.privacy.ledger import Ledger
from tests.privacy.ledger_worker import EVENT, OTHERS, Kill, fate, site

ROOT = Path(__file__).parents[2]
WORKER = [sys.executable, "-m", "tests.privacy.ledger_worker"]
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)


@dataclass
class Aftermath:
    """What one kill left. under: charges, settlements, messages, patients or keys that were promised and are gone.

    over: charges that are spent though nobody was told so.  kills: 0 if the process ended before its fate.
    """

    kills: int = 0
    under: int = 0
    over: int = 0
    problems: list[str] = field(default_factory=list)


@contextmanager
def forking() -> Iterator[subprocess.Popen[str]]:
    """The process whose children are killed. It has imported everything: a kill costs 50 ms."""  # measured
    process = subprocess.Popen(
        [*WORKER, "serve"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with process:
        yield process
        if process.stdin:
            process.stdin.close()


def kill_one(worker: subprocess.Popen[str], folder: Path, seed: int, *, kill: Kill | None = None) -> Aftermath:
    """Let a process live in an empty folder until its fate, then look at what it left."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps([str(folder), seed, kill or fate(seed)]) + "\n")
    worker.stdin.flush()
    status, text = json.loads(worker.stdout.readline())
    said = [line.split() for line in text.split("\n")[:-1]]  # the last line may be cut
    result = Aftermath(kills=int(status in KILLED))
    if status not in (0, *KILLED):
        result.problems.append(f"ended with {status} after {said[-1:]}")
        return result
    try:
        examine(folder, said, result)
    except (LedgerUnusable, PolicyRefused, HospitalInvalid) as error:
        result.problems.append(f"{error.what}: {error.why}")
    return result


def kill_many(seeds: Iterable[int]) -> Aftermath:
    """All together; over: the largest over-count of one."""
    total = Aftermath()
    with forking() as worker:
        for seed in seeds:
            with tempfile.TemporaryDirectory(prefix="fedmm-kill-") as folder:
                one = kill_one(worker, Path(folder), seed)
            total.kills += one.kills
            total.under += one.under
            total.over = max(total.over, one.over)
            total.problems += [f"seed {seed} {fate(seed)}: {problem}" for problem in one.problems]
    return total


def words(said: list[list[str]], first: str) -> list[list[str]]:
    return [line[1:] for line in said if line[0] == first]


def examine(folder: Path, said: list[list[str]], result: Aftermath) -> None:
    """The next start: everything that was promised is there, and work goes on. Adds to `result`."""
    asked = words(said, "ask")
    heads = [Head(int(seq), hash, signature) for seq, hash, signature in words(said, "head")]
    with Ledger.open(folder, site(), create=not words(said, "made")) as ledger:
        ledger.verify(against=heads)
        states = {str(event["seq"]): event["state"] for event in ledger.events()}
        given_back = {seq for verb, *rest in asked if verb == "giveback" for seq in rest}
        must = {seq for (seq,) in words(said, "reserved")} - given_back
        spent = {seq for seq, state in states.items() if state != "voided"}
        result.under += len(must - spent)
        result.over = len(spent - must)
        made = {str(charge.row.seq): charge.made.get("sha256") for charge in ledger._book.charges.values()}
        result.under += sum(states[seq] != "settled" or made[seq] != sha for seq, sha in words(said, "settled"))
        result.under += sum(states[seq] != "voided" for (seq,) in words(said, "voided"))
        left = [message.sha256 for message in ledger.sent()]
        result.under += sum(left.count(sha) != 1 for (sha,) in words(said, "sent"))
        if len(left) > len(words(said, "sent")) + 1:
            result.problems.append(f"{len(left)} messages left, {words(said, 'sent')} were told")
        look_at_keys(folder, ledger, said, result)
        look_at_patients(folder, said, result)
        go_on(folder, ledger, made_sha="ff" * 32)


def look_at_keys(folder: Path, ledger: Ledger, said: list[list[str]], result: Aftermath) -> None:
    """Exactly one key on disk signs the next row, and it is the one of the last rotation, or of the one under way."""
    files = [file for file in folder.glob("ledger.key*") if file.stat().st_size]
    found = []
    for file in files:
        try:
            found.append(chain.public_hex(chain.key_from_pem(file.read_bytes()).public_key()))
        except ValueError:
            assert file.suffix == ".new"  # half written: nobody's key
    if found.count(ledger.public_key()) != 1:
        result.problems.append(f"{found.count(ledger.public_key())} usable keys in {len(files)} files")
    told = words(said, "rotated")
    rotations = [row for row in vault.rows(ledger._db, after=0) if row.type == "rotate"]
    if not len(told) <= len(rotations) <= len(told) + 1:
        result.problems.append(f"{len(rotations)} rotations, {len(told)} were told")
    result.under += sum(row.facts["public_key"] != public for row, (public,) in zip(rotations, told, strict=False))


def look_at_patients(folder: Path, said: list[list[str]], result: Aftermath) -> None:
    """Nobody who was covered is lost, and after a split each side refuses the other's."""
    path, other = folder / "ledger.sqlite", folder / "other" / "ledger.sqlite"
    known = roster._read(roster.path_of(path))
    covered = [int(key) for keys in words(said, "covered") for key in keys]
    if known is None:
        result.under += len(covered)
        return
    result.under += len(known.salted(covered) - known.ids)
    if ["split"] not in words(said, "ask") or not known.complete or not known.ids:
        return
    if ["split"] not in said:  # cut short: doing it again finishes it
        other.parent.mkdir(exist_ok=True)
        roster.split(path, other, list(OTHERS))
    for ledger, keys in ((path, list(OTHERS)), (other, covered[:1])):
        if keys and not refuses_to_cover(ledger, keys):
            result.problems.append("a patient is under two ledgers")


def refuses_to_cover(ledger: Path, keys: list[int]) -> bool:
    try:
        roster.cover(ledger, keys, first=False)
    except HospitalInvalid:
        return True
    return False


def go_on(folder: Path, ledger: Ledger, *, made_sha: str) -> None:
    """A whole round more, a rotation, and another start. Raises: LedgerUnusable if any of it is not possible."""
    before = ledger.spent().releases
    charge = ledger.reserve(EVENT, run="after", round=0)
    listed = roster.path_of(folder / "ledger.sqlite").exists()
    roster.cover(folder / "ledger.sqlite", [7], first=not listed)
    charge.settle(sha256=made_sha)
    ledger.record_sent("update", run="after", round=0, size=1, sha256=made_sha, charge=charge.seq)
    ledger.rotate()
    head = ledger.head()
    with Ledger.open(folder, site(), create=False) as again:
        again.verify(against=[head])
        assert again.spent().releases == before + 1


# --- races ------------------------------------------------------------------------------------------------------------


def race(folder: Path, *, processes: int, attempts: int, ceiling: float) -> int:
    """How many reservations they got together. Checks that it is exactly what fits."""
    with Ledger.open(folder, site(ceiling)) as ledger:
        fits = ledger.forecast(EVENT)
    command = [*WORKER, "race", str(folder), str(attempts), str(ceiling)]
    racers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    won = sum(int(racer.communicate(timeout=600)[0]) for racer in racers)
    with Ledger.open(folder, site(ceiling)) as ledger:
        ledger.verify()
        spent = ledger.spent()
    assert won == spent.releases
    assert (spent.releases + spent.refusals, spent.epsilon <= ceiling) == (processes * attempts, True)
    assert won == min(fits, processes * attempts)
    return won


def copy(filled: Path, to: Path) -> Path:
    """The ledger's two files."""
    for name in ("ledger.sqlite", "ledger.key"):
        shutil.copy2(filled / name, to / name)
    return to
