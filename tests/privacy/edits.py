"""Ten thousand ways to change a ledger's files without its key, shared by tests and benchmarks/privacy.py.

`judge` says what opening and verifying make of an edit: "seen"; "cut", an older state that is authentic in every byte, which
only a head kept elsewhere gives away, and did; "harmless", the same rows and other bytes around them; or "missed".
"""

from __future__ import annotations

import random
import sqlite3
import string
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmm.errors import BudgetExhausted, LedgerUnusable
from fedmm.privacy import chain, vault
from fedmm.privacy.chain import Head, Row
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import Event, Rate
from tests.privacy.ledger_worker import EVENT, site

FILES = ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm")
PAGE = 4096
FRAME = 24 + PAGE  # of the write-ahead log, after 32 bytes of header


class Snapshot(NamedTuple):
    """An intact ledger. files: name to bytes, the key among them.  head: of its last row."""

    files: dict[str, bytes]
    rows: tuple[Row, ...]
    head: Head

    def write(self, folder: Path) -> None:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        for name, content in self.files.items():
            put(folder / name, content)


def put(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    file.chmod(0o600)


def fill(ledger: Ledger, releases: int = 6, *, rotate: bool = True) -> None:
    """Every kind of row: settled, voided, left open, refused, sent, rotated, split."""
    for number in range(releases):
        charge = ledger.reserve(EVENT, run="first", round=number, plan_digest="ab" * 32)
        if number % 3 == 0:
            charge.settle(sha256=f"{number:064x}")
            ledger.record_sent("update", run="first", round=number, size=9, sha256=f"{number:064x}", charge=charge.seq)
        elif number % 3 == 1:
            charge.void()
        if rotate and number == releases // 2:
            ledger.rotate()
    try:
        ledger.reserve(Event("train", 0.5, Rate(1.0), 50), run="greedy", round=0)
    except BudgetExhausted:
        ledger.record_sent("refusal 1001", run="greedy", round=0, size=3, sha256="cd" * 32)
    ledger.record_split("south", ledger.public_key())


def snapshot(folder: Path, *, log: bool = False, rotate: bool = True) -> Snapshot:
    """A filled ledger, made in an empty folder. log: with half of its rows in the write-ahead log only."""
    folder.mkdir(parents=True, exist_ok=True)
    with Ledger.open(folder, site(epsilon=5.0)) as ledger:
        fill(ledger, rotate=rotate)
        if log:
            ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            ledger._db.execute("PRAGMA wal_autocheckpoint = 0")  # as where a reader keeps the log from being taken over
            fill(ledger, rotate=rotate)
        rows, head = tuple(vault.rows(ledger._db, after=0)), ledger.head()
        open_files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
    closed = {"ledger.sqlite": (folder / "ledger.sqlite").read_bytes()}
    key = {"ledger.key": (folder / "ledger.key").read_bytes()}
    return Snapshot((open_files if log else closed) | key, rows, head)


def snapshots(folder: Path) -> list[Snapshot]:
    return [
        snapshot(folder / f"{log}-{rotate}", log=log, rotate=rotate)
        for log in (False, True)
        for rotate in (False, True)
    ]


def judge(folder: Path, intact: Snapshot) -> str:
    try:
        with Ledger.open(folder, site(epsilon=5.0)) as ledger:
            ledger.verify()
            rows = tuple(vault.rows(ledger._db, after=0))
            if rows == intact.rows:
                ledger.verify(against=[intact.head])
                return "harmless"
            if rows != intact.rows[: len(rows)]:
                return "missed"
            try:
                ledger.verify(against=[intact.head])
            except LedgerUnusable:
                return "cut"
            return "missed"
    except LedgerUnusable:
        return "seen"


def edit_many(intact_ones: list[Snapshot], folder: Path, *, edits: int, seed: int) -> Counter[str]:
    """How often each verdict fell, over `edits` edits that changed at least one byte; "missed KIND" by kind."""
    rng, verdicts = random.Random(seed), Counter[str]()
    while verdicts.total() < edits:
        intact, kind = rng.choice(intact_ones), rng.choice(EDITS)
        intact.write(folder)
        kind(folder, intact, rng)
        if all((folder / name).exists() and (folder / name).read_bytes() == old for name, old in intact.files.items()):
            continue
        verdict = judge(folder, intact)
        verdicts[verdict if verdict != "missed" else f"missed {kind.__name__}"] += 1
    return verdicts


def missed(verdicts: Counter[str]) -> int:
    return sum(count for verdict, count in verdicts.items() if verdict.startswith("missed"))


def cut_everywhere(intact: Snapshot, folder: Path) -> Counter[str]:
    """The ledger cut after each of its rows: "seen" or "missed" against each head that was known later."""
    heads, verdicts = [Head(row.seq, row.hash, row.signature) for row in intact.rows], Counter[str]()
    for left in range(1, len(intact.rows)):
        intact.write(folder)
        write_rows(folder, intact, intact.rows[:left])
        with Ledger.open(folder, site(epsilon=5.0)) as ledger:
            ledger.verify(against=heads[:left])  # nothing that was known then is missing
            for head in heads[left:]:
                try:
                    ledger.verify(against=[head])
                    verdicts["missed"] += 1
                except LedgerUnusable:
                    verdicts["seen"] += 1
    return verdicts


def write_rows(folder: Path, intact: Snapshot, rows: Sequence[Row]) -> None:
    """The file that these rows alone would be, authentic in every byte."""
    image = bytearray(vault._image(rows))
    image[18:20] = b"\x02\x02"  # WAL mode and version, as the real one has them
    image[96:100] = intact.files["ledger.sqlite"][96:100]
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    put(folder / "ledger.sqlite", bytes(image))


# --- bytes ------------------------------------------------------------------------------------------------------------


def some_file(folder: Path, rng: random.Random) -> tuple[Path, bytearray]:
    files = [folder / name for name in FILES if (folder / name).exists() and (folder / name).stat().st_size]
    file = rng.choice(files)
    return file, bytearray(file.read_bytes())


def flip_bytes(folder: Path, intact: Snapshot, rng: random.Random) -> None:
    file, content = some_file(folder, rng)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    file.write_bytes(content)


def flip_header(folder: Path, intact: Snapshot, rng: random.Random) -> None:
    file, content = some_file(folder, rng)
    content[rng.randrange(112)] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def overwrite_range(folder: Path, intact: Snapshot, rng: random.Random) -> None:
    file, content = some_file(folder, rng)
    size = rng.randrange(1, 600)
    at, other = rng.randrange(len(content)), rng.randrange(len(content))
    content[at : at + size] = rng.choice([bytes(size), rng.randbytes(size), content[other : other + size]])
    file.write_bytes(content)


def swap_pages(folder: Path, intact: Snapshot, rng: random.Random) -> None:
    file, content = some_file(folder, rng)
    start, size = (32, FRAME) if file.name.endswith("-wal") else (0, PAGE)
    one, two = (start + size * rng.randrange(max(1, (len(content) - start) // size)) for _ in range(2))
    content[one : one + size], content[two : two + size] = content[two : two + size], content[one : one + size]
    file.write_bytes(content)


def change_length(folder: Path, intact: Snapshot, rng: random.Random) -> None:
    file, content = some_file(folder, rng)
    cut = rng.choice([rng.randrange(len(content)), rng.randrange(len(content)) // PAGE * PAGE])
    file.write_bytes(rng.choice([content[:cut], content + rng.randbytes(rng.choice([1, 100, PAGE]))]))


def drop_log(folder: Path, intact: Snapshot, rng: random.Random) -> None:
    """Without the log the rows in it are gone; cut in the middle, those from there on."""
    log = folder / "ledger.sqlite-wal"
    if log.exists() and rng.random() < 0.2:
        log.unlink()
    elif log.exists():
        content = log.read_bytes()
        log.write_bytes(content[: 32 + FRAME * rng.randrange((len(content) - 32) // FRAME)])


# --- SQL --------------------------------------------------------------------------------------------------------------


def through_sql(work: Callable[[sqlite3.Connection, Snapshot, random.Random], None]) -> Callable[..., None]:
    """The edit by somebody who drops the triggers and puts them back; sometimes left in the write-ahead log."""

    def edit(folder: Path, intact: Snapshot, rng: random.Random) -> None:
        db = sqlite3.connect(folder / "ledger.sqlite", isolation_level=None)
        db.execute("PRAGMA synchronous = OFF")
        for name in ("no_update", "no_delete"):
            db.execute(f"DROP TRIGGER {name}")
        with suppress(sqlite3.Error, OverflowError):  # the table is STRICT: some values do not go in
            work(db, intact, rng)
        for name in ("no_update", "no_delete"):
            db.execute(vault.SCHEMA[name])
        kept = {name: (folder / name).read_bytes() for name in FILES} if rng.random() < 0.3 else {}
        if not kept and rng.random() < 0.3:
            db.execute("VACUUM")
        db.close()
        for name, content in kept.items():
            put(folder / name, content)

    edit.__name__ = work.__name__
    return edit


def other_value(old: Any, rng: random.Random) -> Any:
    if isinstance(old, str):
        text = "".join(rng.choices(string.hexdigits + "é\x00 ", k=rng.randrange(4)))
        return rng.choice([text, old + text, old.upper(), old[::-1], old[:-1], old.encode() + b"\xff", ""])
    return rng.choice([0, -1, 1, old + 1, old - 1, old * 2, old / 2, -old, 2**40, 1e-9, 1e308, str(old), None])


@through_sql
def update_cell(db: sqlite3.Connection, intact: Snapshot, rng: random.Random) -> None:
    row, column = rng.choice(intact.rows), rng.choice(Row._fields)
    value = other_value(getattr(row, column), rng)
    if isinstance(value, bytes):
        db.execute(f"UPDATE ledger SET {column} = CAST(? AS TEXT) WHERE seq = ?", (value, row.seq))
    else:
        db.execute(f"UPDATE ledger SET {column} = ? WHERE seq = ?", (value, row.seq))


@through_sql
def delete_rows(db: sqlite3.Connection, intact: Snapshot, rng: random.Random) -> None:
    first = rng.choice(intact.rows).seq
    db.execute("DELETE FROM ledger WHERE seq BETWEEN ? AND ?", (first, first + rng.choice([0, 0, 2, 1000])))
    if rng.random() < 0.3:
        db.execute("UPDATE ledger SET seq = seq - 1 WHERE seq > ?", (first,))


@through_sql
def swap_rows(db: sqlite3.Connection, intact: Snapshot, rng: random.Random) -> None:
    one, two = (rng.choice(intact.rows).seq for _ in range(2))
    for old, new in ((one, -1), (two, one), (-1, two)):
        db.execute("UPDATE ledger SET seq = ? WHERE seq = ?", (new, old))


@through_sql
def replay_row(db: sqlite3.Connection, intact: Snapshot, rng: random.Random) -> None:
    seq = rng.choice([len(intact.rows) + 1, 0, -5, 2**40])
    db.execute(vault.INSERT, rng.choice(intact.rows)._replace(seq=seq))


@through_sql
def change_schema(db: sqlite3.Connection, intact: Snapshot, rng: random.Random) -> None:
    statements = (
        "CREATE TRIGGER forget AFTER INSERT ON ledger BEGIN DELETE FROM ledger WHERE seq = new.seq; END",
        "CREATE INDEX by_run ON ledger (run)",
        "CREATE TABLE other (id)",
        "ALTER TABLE ledger ADD COLUMN more INTEGER",
        "ALTER TABLE ledger RENAME COLUMN note TO remark",
        "PRAGMA user_version = 7",
        "PRAGMA application_id = 7",
    )
    db.execute(rng.choice(statements))


# --- rows, written anew by somebody who knows the format and has no key ------------------------------------------------


def rewritten(work: Callable[[list[Row], Ed25519PrivateKey, random.Random], list[Row]]) -> Callable[..., None]:
    def edit(folder: Path, intact: Snapshot, rng: random.Random) -> None:
        rows = work(list(intact.rows), Ed25519PrivateKey.generate(), rng)
        write_rows(folder, intact, list({row.seq: row for row in rows}.values()))

    edit.__name__ = work.__name__
    return edit


def chained(rows: list[Row], start: int, thief: Ed25519PrivateKey | None) -> list[Row]:
    """Sequence, hashes and, with a key, signatures made right from `start` on."""
    done = rows[:start]
    for row in rows[start:]:
        row = row._replace(seq=len(done) + 1, prev_hash=done[-1].hash if done else chain.NO_HASH)
        done.append(row.signed(thief) if thief else row._replace(hash=row.digest()))
    return done


def maybe(thief: Ed25519PrivateKey, rng: random.Random) -> Ed25519PrivateKey | None:
    return thief if rng.random() < 0.5 else None


@rewritten
def cheaper(rows: list[Row], thief: Ed25519PrivateKey, rng: random.Random) -> list[Row]:
    at = rng.choice([i for i, row in enumerate(rows) if row.type == "reserve"])
    less = {"steps": 1, "noise_multiplier": 100.0, "sampling_rate": 1e-6, "kind": "not_private", "type": "refuse"}
    name = rng.choice(list(less))
    return chained([*rows[:at], rows[at]._replace(**{name: less[name]}), *rows[at + 1 :]], at, maybe(thief, rng))


@rewritten
def without_a_row(rows: list[Row], thief: Ed25519PrivateKey, rng: random.Random) -> list[Row]:
    at = rng.randrange(1, len(rows))
    return chained(rows[:at] + rows[at + rng.randrange(1, 4) :], at, maybe(thief, rng))


@rewritten
def in_another_order(rows: list[Row], thief: Ed25519PrivateKey, rng: random.Random) -> list[Row]:
    one, two = sorted(rng.sample(range(len(rows)), 2))
    rows[one], rows[two] = rows[two], rows[one]
    return chained(rows, one, maybe(thief, rng)) if rng.random() < 0.8 else rows


@rewritten
def with_a_row_again(rows: list[Row], thief: Ed25519PrivateKey, rng: random.Random) -> list[Row]:
    at = rng.randrange(1, len(rows) + 1)
    return chained([*rows[:at], rng.choice(rows), *rows[at:]], at, maybe(thief, rng))


@rewritten
def with_the_void_of_another(rows: list[Row], thief: Ed25519PrivateKey, rng: random.Random) -> list[Row]:
    """A signed row with its `ref` turned to another charge: what was spent is given back."""
    at = rng.choice([i for i, row in enumerate(rows) if row.ref])
    ref = rng.choice([row.seq for row in rows if row.type == "reserve"])
    changed = rows[at]._replace(ref=ref, type=rng.choice(["void", rows[at].type]))
    return chained([*rows[:at], changed, *rows[at + 1 :]], at, maybe(thief, rng))


@rewritten
def with_another_key(rows: list[Row], thief: Ed25519PrivateKey, rng: random.Random) -> list[Row]:
    if rng.random() < 0.5:
        return chained(rows, rng.randrange(1, len(rows)), thief)
    first = chain.genesis_row(thief, hospital="north", code=rows[0].code, at=rows[0].at)
    return chained([first, *rows[1:]], 1, thief)


@rewritten
def with_a_forged_rotation(rows: list[Row], thief: Ed25519PrivateKey, rng: random.Random) -> list[Row]:
    """The thief's key is named, by the thief, and signs what follows: a charge given back, or nothing."""
    at = rng.choice([len(rows), rng.randrange(1, len(rows))])
    note = chain.canonical({"public_key": chain.public_hex(thief.public_key())})
    signature = rng.choice([None, rows[at - 1].signature, rng.choice(rows).signature])
    rotate = next(row for row in rows if row.type == "split")._replace(type="rotate", note=note)
    opened = [row for row in rows[:at] if row.type == "reserve"]
    back = [row._replace(type="void", ref=row.seq) for row in opened[-1:]]
    done = chained([*rows[:at], rotate, *rng.choice([[], back, rows[at:]])], at, thief)
    return done if signature is None else [*done[:at], done[at]._replace(signature=signature), *done[at + 1 :]]


@rewritten
def with_a_forged_row(rows: list[Row], thief: Ed25519PrivateKey, rng: random.Random) -> list[Row]:
    template = rng.choice(rows[1:])._replace(
        type=rng.choice(["reserve", "settle", "void", "refuse", "sent", "split", "refund"]), ref=rng.randrange(20)
    )
    forged = chained([*rows, template], len(rows), thief)[-1]
    return [*rows, forged._replace(signature=rng.choice([forged.signature, rows[-1].signature, "", "00" * 64]))]


@rewritten
def an_older_state(rows: list[Row], thief: Ed25519PrivateKey, rng: random.Random) -> list[Row]:
    return rows[: rng.randrange(1, len(rows))]


EDITS: tuple[Callable[[Path, Snapshot, random.Random], None], ...] = (
    flip_bytes, flip_bytes, flip_header, overwrite_range, swap_pages, change_length, drop_log,
    update_cell, update_cell, delete_rows, swap_rows, replay_row, change_schema,
    cheaper, without_a_row, in_another_order, with_a_row_again, with_the_void_of_another, with_another_key, with_a_forged_rotation,
    with_a_forged_row, an_older_state,
)  # fmt: skip
