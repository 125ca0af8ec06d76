"""The ledger's two files: made once, opened with care, read row by row. SQLite and the file system stay in here."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmm.errors import LedgerUnusable
from fedmm.privacy import chain
from fedmm.privacy.chain import TYPES, Book, Row

APPLICATION_ID = 0x66656D6D  # "femm", in the file's header: another program's database is not taken for a ledger
PATIENTS = ".patients"  # suffix of the list of salted patients beside the ledger (fedmm.privacy.roster)
BUSY_SECONDS = 120.0  # fifty processes may queue for the write lock; each holds it for milliseconds
MOST_KEPT, BOOKS_KEPT = 2**24, 8  # bytes of a file that is remembered, some 35,000 rows; files
_KEPT: dict[Path, tuple[bytes, Book]] = {}
_KEEPING = threading.Lock()
SQL_TYPES = {int: "INTEGER", str: "TEXT", float: "REAL"}
COLUMNS = ", ".join(
    f"{name} {SQL_TYPES[kind]} NOT NULL" + (" PRIMARY KEY" if name == "seq" else "")
    for name, kind in zip(Row._fields, TYPES, strict=True)
)
SCHEMA = {
    "ledger": f"CREATE TABLE ledger ({COLUMNS}) STRICT",
    "no_update": "CREATE TRIGGER no_update BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'append only'); END",
    "no_delete": "CREATE TRIGGER no_delete BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'append only'); END",
}
INSERT = f"INSERT INTO ledger VALUES ({', '.join('?' * len(TYPES))})"
RESTORE = "the privacy officer restores ledger and key together from the latest backup"


@contextmanager
def as_refusal(path: Path) -> Iterator[None]:
    """Database and file errors become LedgerUnusable. The text that crosses names the kind of error only."""
    try:
        yield
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "sqlite_errorname", None) or getattr(error, "strerror", None) or type(error).__name__
        raise LedgerUnusable(
            f"the ledger cannot be used ({reason})",
            why="nothing may be trained unless the charge is on disk first",
            fix=f"check disk space, permissions and integrity of {path}; if it is damaged, {RESTORE}",
        ) from None


def unlock(path: Path, *, hospital: str, create: bool = True, split_off: bool = False) -> sqlite3.Connection:
    """The open database; made with its key if neither exists, unless `create` is False.

    Raises: LedgerUnusable if one is there without the other or others may read them; sqlite3.Error, OSError.
    """
    key_path = path.with_suffix(".key")
    if key_path == path:
        raise LedgerUnusable("ledger.path must not end in .key", fix="name it ledger.sqlite in site.toml")
    if not create and not path.exists() and not key_path.exists():
        raise LedgerUnusable(
            "there is no ledger here",
            why="this hospital has never trained, or ledger and key were removed together: then it would start from 0",
            fix=f"if it has trained before, {RESTORE}",
        )
    with alone_in(path.parent):
        if not path.exists() or not key_path.exists():
            _make(path, key_path, hospital=hospital, split_off=split_off)
        for file in (path, key_path):
            _check_mode(file)
        return _connect(path)


def _read_key(key_path: Path) -> Ed25519PrivateKey:
    try:
        return chain.key_from_pem(key_path.read_bytes())
    except (ValueError, TypeError):
        raise LedgerUnusable("the ledger's key cannot be read", fix=f"{RESTORE} ({key_path})") from None


def _beside(file: Path) -> Path:
    return file.with_name(file.name + ".new")


def key_of(path: Path, public: str) -> Ed25519PrivateKey:
    """The private key that belongs to `public`. A rotation that was cut short after its row is finished here.

    Raises: LedgerUnusable if the key beside the ledger is another one.
    """
    key_path = path.with_suffix(".key")
    key = _read_key(key_path)
    if chain.public_hex(key.public_key()) == public:
        return key
    with alone_in(path.parent):
        new_key = _beside(key_path)
        if chain.public_hex((key := _read_key(key_path)).public_key()) == public:
            return key  # another process finished it just now
        if new_key.exists() and chain.public_hex((key := _read_key(new_key)).public_key()) == public:
            os.rename(new_key, key_path)
            sync_folder(path.parent)
            return key
    raise LedgerUnusable("the key beside the ledger is not the ledger's", fix=RESTORE)


def write_next_key(path: Path) -> Ed25519PrivateKey:
    """A new key on disk, beside the one in use: `key_of` takes it once the ledger says so."""
    with alone_in(path.parent):
        new_key = _beside(path.with_suffix(".key"))
        new_key.unlink(missing_ok=True)
        key = Ed25519PrivateKey.generate()
        write_private(new_key, chain.key_to_pem(key))
        sync_folder(path.parent)
        return key


def check_owner(genesis: Mapping[str, Any], *, hospital: str) -> None:
    """Raises: LedgerUnusable if ledger and hospital do not belong together."""
    if genesis["hospital"] != hospital:
        raise LedgerUnusable(
            "the ledger belongs to another hospital",
            why="a ledger describes the patients of one hospital and cannot be lent",
            fix="correct hospital.name or ledger.path in site.toml",
        )


def rows(db: sqlite3.Connection, *, after: int) -> Iterator[Row]:
    """Rows in order of sequence. Raises: LedgerUnusable for a value of the wrong type; sqlite3.Error."""
    expected = after + 1
    try:
        for values in db.execute("SELECT * FROM ledger WHERE seq > ? ORDER BY seq", (after,)):
            if len(values) != len(TYPES) or any(type(v) is not t for v, t in zip(values, TYPES, strict=True)):
                raise chain.tampered(expected, "it has a value of the wrong type")
            yield Row(*values)
            expected = values[0] + 1
    except (sqlite3.DatabaseError, UnicodeDecodeError, OverflowError) as error:
        if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_IOERR", "SQLITE_FULL")):
            raise
        raise chain.tampered(expected, f"the database cannot read it ({type(error).__name__})") from None


def book_of(db: sqlite3.Connection, path: Path) -> Book:
    """What all rows say together, inside a transaction: chain, transitions and the last signature are checked.

    A process that has read the very same bytes before, every page of them, does not read the rows again.
    Raises: LedgerTampered; sqlite3.Error.
    """
    image = b""
    with suppress(sqlite3.Error):  # reading the rows says what is wrong
        (size,) = db.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchone()
        image = db.serialize() if size <= MOST_KEPT else b""
    known, book = _KEPT.get(path, (b"", Book()))
    if image and image == known:
        return book.copy()
    catch_up(book := Book(), db)
    if image:
        with _KEEPING:
            _KEPT.pop(path, None)
            _KEPT[path] = image, book.copy()
            if len(_KEPT) > BOOKS_KEPT:
                _KEPT.pop(next(iter(_KEPT)))
    return book


def catch_up(book: Book, db: sqlite3.Connection) -> None:
    """Read and check what others have added. The signature of the last row vouches for the new ones before it."""
    before = book.head.seq
    for row in rows(db, after=before):
        book.add(row)
    last = book.last
    if last is None:
        raise chain.tampered(1, "it is missing")
    if last.seq > before:
        last.check_signature(chain.public_from_hex(book.signer))


def check_file(db: sqlite3.Connection, path: Path, rows: Sequence[Row]) -> None:
    """Every byte of the file is what these rows leave behind: schema, pages, and the space between them.

    Appending is deterministic, so the rows are inserted again in memory and the images compared. That holds for one
    version of SQLite; a ledger that several versions wrote gets SQLite's own integrity check instead.
    Raises: LedgerUnusable; sqlite3.Error.
    """
    if dict(db.execute("SELECT name, sql FROM sqlite_master")) != SCHEMA:
        raise LedgerUnusable("the ledger's schema was changed", why="table or triggers differ", fix=RESTORE)
    found = [str(line) for (line,) in db.execute("PRAGMA integrity_check(1)")]
    if found != ["ok"]:
        raise LedgerUnusable("the ledger's file is damaged", why=found[0][:200], fix=RESTORE)
    image = db.serialize()
    if path.stat().st_size > len(image):
        raise LedgerUnusable("the ledger's file is longer than the ledger", fix=RESTORE)
    if {row.code.rpartition(" ")[2] for row in rows} == {sqlite3.sqlite_version}:
        expected = bytearray(_image(rows))
        expected[18:20] = b"\x02\x02"  # the file is in WAL mode, the copy in memory cannot be
        for counter in (24, 92):  # how often page 1 was written: twice the same number, and any number
            expected[counter : counter + 4] = image[24:28]
        major, minor, patch = sqlite3.sqlite_version_info
        expected[96:100] = (major * 1_000_000 + minor * 1000 + patch).to_bytes(4, "big")
        if image != bytes(expected):
            at = next((at for at, pair in enumerate(zip(image, expected, strict=False)) if pair[0] != pair[1]), -1)
            raise LedgerUnusable("the ledger's file was changed between its rows", why=f"at byte {at}", fix=RESTORE)


def _image(rows: Iterable[Row]) -> bytes:
    """The bytes of a database with these rows, appended one by one."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    for statement in SCHEMA.values():
        db.execute(statement)
    for row in rows:
        db.execute(INSERT, row)
    image = db.serialize()
    db.close()
    return image


def now() -> str:
    """The clock, for people who read the ledger. Nothing depends on it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@lru_cache(maxsize=1)
def code_version() -> str:
    """Version of fedmm, a hash of the privacy code that made the charge, version of SQLite."""
    try:
        number = version("fedmm")
    except PackageNotFoundError:
        number = "unknown"
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return f"{number}+{digest.hexdigest()[:12]} sqlite {sqlite3.sqlite_version}"


# --- making and opening -----------------------------------------------------------------------------------------------


def _make(path: Path, key_path: Path, *, hospital: str, split_off: bool) -> None:
    """Both files or neither: each is complete under another name first, and a kill in between is finished here."""
    new_path, new_key = _beside(path), _beside(key_path)
    if not path.exists():
        if path.with_suffix(PATIENTS).exists() and not split_off:
            raise LedgerUnusable(
                "the ledger is missing, its list of patients is there",
                why="a ledger that was deleted would forget what was spent",
                fix=f"{RESTORE} ({path})",
            )
        if key_path.exists():
            raise LedgerUnusable(
                "the ledger is missing, its key is there",
                why="a ledger that was deleted would forget what was spent",
                fix=f"{RESTORE} ({path}); only if nothing was ever released may the key be removed too",
            )
        for leftover in (new_path, new_key):
            leftover.unlink(missing_ok=True)
        key = Ed25519PrivateKey.generate()
        write_private(new_key, chain.key_to_pem(key))
        first = chain.genesis_row(key, hospital=hospital, code=code_version(), at=now())
        write_private(new_path, _image([first]))
        os.rename(new_path, path)
    if not new_key.exists():
        raise LedgerUnusable("the ledger's key is missing", why="no row can be signed", fix=f"{RESTORE} ({key_path})")
    os.rename(new_key, key_path)  # or the other half of a making that was cut short; check_owner compares the two
    sync_folder(path.parent)


def _connect(path: Path) -> sqlite3.Connection:
    # mode=rw: never make an empty ledger by accident. autocommit: transactions are opened by hand.
    uri = f"{path.resolve().as_uri()}?mode=rw"
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        if db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            raise LedgerUnusable(
                "the file at ledger.path is not a fedmm ledger", fix=f"correct ledger.path, or {RESTORE}"
            )
        if db.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise LedgerUnusable("the ledger's disk does not support write-ahead logging", fix="use a local disk")
        db.execute("PRAGMA synchronous = FULL")
        # after each commit into the file itself: a copy of the file alone, a backup say, holds what was spent
        db.execute("PRAGMA wal_autocheckpoint = 1")
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA cell_size_check = ON")
        if dict(db.execute("SELECT name, sql FROM sqlite_master")) != SCHEMA:
            raise LedgerUnusable("the ledger's schema is foreign or was changed", fix=RESTORE)
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time makes or opens a ledger in this folder; released by the system when a process dies."""
    if not folder.is_dir():
        raise LedgerUnusable("the ledger's folder does not exist", fix=f"make {folder}, or correct ledger.path")
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _check_mode(file: Path) -> None:
    mode = file.lstat().st_mode
    if not stat.S_ISREG(mode):
        raise LedgerUnusable("ledger or key is not a plain file", fix=f"look at {file}")
    if mode & 0o077:
        raise LedgerUnusable("ledger or key can be read by others", fix=f"chmod 600 {file}, and ask who had access")


def write_private(file: Path, content: bytes) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot sync a folder
        os.fsync(handle)
    os.close(handle)
