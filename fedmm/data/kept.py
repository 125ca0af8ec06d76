"""Rows made of a hospital's files, kept beside them: no later epoch, process or run opens those files again.

A table is what one reader, or the fixed part of one encoder, made of a modality's files: a row of one shape for each file. The
key of a row covers the file (name, size, times); the name of a table covers its maker, the form of the input, the readers'
code and the versions of fedmm and of what it computes with: nothing stale is read. Rows lie in shards,
HOSPITAL/.fedmm/<modality>-<maker>-<serial>.safetensors, for their owner's eyes only: written whole or not at all and never
changed, so that a reader needs no lock and may map them. They are made of patients' data and never leave. Deleting them costs
time only, and so does whatever keeps them from being written.

N rows of a shard, S studies, B studies of a batch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import mmap
import os
import secrets
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors.numpy import save

from fedmm.config import SiteConfig, installed_version

FORMAT = 2  # another one whenever a fixed part computes something else within a version of fedmm
LIBRARIES = ("numpy", "pillow", "pydicom", "scipy", "soundfile", "torch", "torchaudio")  # what rows are computed with
FOLDER = ".fedmm"
SUFFIX, UNFINISHED, LOCK = ".safetensors", ".rows.part", "rows.lock"
KEY_FILE, KEY_BYTES, NONCE_BYTES = "cache.key", 32, 12
SHARD_BYTES = 128 * 2**20  # guess: a kill costs the work of one, and a hospital of 50 GB needs 400 descriptors
MAPPED_BYTES = 16 * 2**20  # guess: smaller shards are read into memory, since each mapping holds a descriptor
DTYPES: dict[str, np.dtype[Any]] = {
    n: np.dtype(t) for n, t in (("U8", "u1"), ("U32", "<u4"), ("F32", "<f4"), ("I64", "<i8"))
}


@dataclass(frozen=True)
class FixedPart:
    """identity: hash of all that `compute` depends on.  compute: (S, ...) of a modality -> (S, ...) float32, row by row."""

    identity: str
    compute: Callable[[torch.Tensor], torch.Tensor]


class Rows:
    """(S, ...) of a modality, a row where it lies on disk or in memory; indexing copies a batch of them.

    row_S: None where the modality is absent: zeros.  nothing: (0, ...), form of a batch of none.  held: bytes that are in
    memory and not mapped.
    """

    def __init__(self, row_S: Sequence[np.ndarray | None], nothing: np.ndarray, held: int) -> None:
        absent = np.zeros(nothing.shape[1:], nothing.dtype)
        self._row_S = [absent if row is None else row for row in row_S]
        self._nothing, self.held = nothing, held

    def __len__(self) -> int:
        return len(self._row_S)

    def __getitem__(self, index_B: torch.Tensor) -> torch.Tensor:
        """(B, ...), the caller's own. index_B: int64, numbers of studies."""
        rows = [self._row_S[study] for study in index_B.tolist()]
        return torch.from_numpy(np.stack(rows) if rows else self._nothing.copy())


def stamp(file: Path) -> str:
    """Changes when the file does, by size and times; ctime too: a copy that keeps the old file's time is another file."""
    try:
        info = os.stat(file)
    except OSError:  # not there, or gone since the manifest was read: reading it will say so
        return ""
    return f"{file}\0{info.st_size}\0{info.st_mtime_ns}\0{info.st_ctime_ns}\n"


def row_key(file: Path) -> bytes:
    """32 bytes; of a file that is not there, bytes that no row has."""
    known = stamp(file)
    return hashlib.sha256(known.encode()).digest() if known else secrets.token_bytes(32)


@lru_cache(maxsize=1)
def _code() -> str:
    """What rows are made with: versions, and the readers themselves, so that nobody has to remember to give them a number."""
    sources = hashlib.sha256(b"".join(source.read_bytes() for source in sorted(Path(__file__).parent.glob("*.py"))))
    return " ".join([str(FORMAT), installed_version(), *(version(name) for name in LIBRARIES), sources.hexdigest()])


def table_name(modality: str, maker: str) -> str:
    """maker: all that a row depends on beside its file and the code."""
    return f"{modality}-{hashlib.sha256(f'{_code()} {maker}'.encode()).hexdigest()[:20]}"


def _mapped(value: Any) -> bool:
    """Is it a view of a file that the system reads when it is needed, and may forget again?"""
    while isinstance(value, np.ndarray):
        value = value.base
    return isinstance(getattr(value, "obj", None), mmap.mmap)


# --- one shard ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """What can be said of a shard without its rows. No keys: damaged, or none of ours."""

    path: Path
    table: str
    size: int
    used: int  # ns
    keys: tuple[bytes, ...]
    sealed: bool


def _look(path: Path) -> Shard:
    """Reads keys, not rows. Raises: OSError if it is gone or cannot be opened."""
    keys, sealed = np.zeros((0, KEY_BYTES), np.uint8), False
    with path.open("rb") as file:
        info = os.fstat(file.fileno())
        with contextlib.suppress(Exception):  # whatever damaged bytes bring json and numpy to
            start, header = _header(file)
            begin, end = header["keys"]["data_offsets"]
            file.seek(start + begin)
            keys = np.frombuffer(file.read(end - begin), np.uint8).reshape(-1, KEY_BYTES)
            sealed = "sealed" in header
    table = path.name.rpartition("-")[0]
    return Shard(path, table, info.st_size, info.st_mtime_ns, tuple(key.tobytes() for key in keys), sealed)


def _header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Where the arrays of a safetensors file begin, and what they are. Raises: anything, if it is none."""
    length = int.from_bytes(file.read(8), "little")
    return 8 + length, json.loads(file.read(length))


def _array(content: Any, start: int, info: dict[str, Any]) -> np.ndarray:
    """A view, not to be written to. content: all bytes of the file, or a map of them. Raises: anything, as `_header`."""
    (begin, end), dtype = info["data_offsets"], DTYPES[info["dtype"]]
    count = (end - begin) // dtype.itemsize
    flat: np.ndarray = np.frombuffer(content, dtype, count, start + begin)
    return flat.reshape(info["shape"])


def _checksum(keys: bytes, rows_N: np.ndarray) -> int:
    """Against damage, not against people: those who can write here can write the hospital's files too."""
    return zlib.crc32(rows_N.data, zlib.crc32(f"{rows_N.dtype} {rows_N.shape}".encode(), zlib.crc32(keys)))


def _write_whole(path: Path, content: bytes) -> None:
    """For its owner alone; under another name until every byte is on disk. Raises: OSError."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=UNFINISHED)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a loss of power could leave the name and not the bytes
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


# --- all of a hospital --------------------------------------------------------------------------------------------------


class Kept:
    """The shards of a hospital, for the time of one load.

    Guarantee: raises nothing for what is in the folder, for a disk that is full or cannot be written, or for another process
    at work in it: what cannot be kept is held in memory, what cannot be read is made again.
    """

    def __init__(self, hospital: Path, site: SiteConfig, present: Collection[bytes]) -> None:
        """present: keys of all files that the manifest names; `tidy` removes every other row."""
        self._folder, self._present = hospital / FOLDER, frozenset(present)
        self._bound, self._encrypted = site.cache.gigabytes * 1e9, site.cache.encrypted
        self._key_file = (hospital / site.ledger.path).with_name(KEY_FILE)
        self._known: dict[Path, Shard] = {}
        self._damaged: set[Path] = set()
        self._in_use: set[Path] = set()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time makes rows; the next one finds them made. The system releases it when a process dies."""
        with contextlib.ExitStack() as after:
            with contextlib.suppress(OSError):
                self._folder.mkdir(mode=0o700, exist_ok=True)
                handle = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
                after.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def table(self, name: str) -> Table:
        """Its rows as they are on disk now; they are what was used last, so that others are dropped before them."""
        table = Table(self, name)
        for shard in self._shards():
            if shard.table == name and (rows_N := self._rows(shard)) is not None:
                self._in_use.add(shard.path)
                table.take(shard.keys, rows_N)
                with contextlib.suppress(OSError):
                    os.utime(shard.path)
        return table

    @property
    def tidy(self) -> bool:
        """Nothing is here that should not be, as far as it is known without reading all rows."""
        shards = self._shards()
        return not self._loose(shards) and sum(shard.size for shard in shards) <= self._bound

    def clean(self) -> None:
        """Under `alone`: takes apart what should not be here and small shards, and writes anew what of them may stay."""
        with contextlib.suppress(OSError):
            for file in self._folder.glob(f"*{UNFINISHED}"):  # of a process that was killed: whoever writes is alone
                file.unlink(missing_ok=True)
        shards = self._shards()
        loose = self._loose(shards)
        for name in {shard.table for shard in shards}:
            whole = [shard for shard in shards if shard.table == name and shard not in loose]
            small = [shard for shard in whole if shard.size < SHARD_BYTES / 2]
            apart = [shard for shard in loose if shard.table == name]
            apart += small if apart or len(small) > 1 else []
            staying = {key for shard in whole if shard not in apart for key in shard.keys}
            table = Table(self, name)
            for shard in apart:
                rows_N = self._rows(shard)
                self._remove(shard.path)
                for key, row in () if rows_N is None else zip(shard.keys, rows_N, strict=True):
                    if key in self._present and key not in staying:
                        table.add(key, row)
            table.flush()

    def release(self, table: Table) -> None:
        """Its shards may make room for others; its rows can be used on."""
        self._in_use -= {shard.path for shard in self._shards() if shard.table == table.name}

    def shrink(self) -> None:
        """Under `alone`, after all was made: no more than the bound, whoever uses it."""
        self._in_use.clear()
        self._room(0)

    def write(self, name: str, keys: Sequence[bytes], rows_N: np.ndarray) -> np.ndarray:
        """Under `alone`. The same rows, from the disk if they could be written there and can be mapped."""
        path = self._folder / f"{name}-{secrets.token_hex(8)}{SUFFIX}"
        try:
            content = self._content(name, b"".join(keys), rows_N)
            if not self._room(len(content)):
                return rows_N
            _write_whole(path, content)
        except OSError:
            return rows_N
        self._in_use.add(path)
        mapped_N = None if self._encrypted else self._rows(_look(path))
        return rows_N if mapped_N is None else mapped_N

    def _shards(self) -> list[Shard]:
        """The one that was used last comes last."""
        found = []
        with contextlib.suppress(OSError):
            for path in self._folder.glob(f"*-*-*{SUFFIX}"):
                with contextlib.suppress(OSError):
                    if path not in self._known:
                        self._known[path] = _look(path)
                    found.append(self._known[path])
        return sorted(found, key=lambda shard: shard.used)

    def _loose(self, shards: Sequence[Shard]) -> list[Shard]:
        """Shards with rows of files that are not here any more or that are here twice; damaged ones; open ones where they are
        to be sealed, and the other way round."""
        loose, seen = [], dict[str, set[bytes]]()
        for shard in sorted(shards, key=lambda shard: -shard.size):
            others = seen.setdefault(shard.table, set())
            wrong = shard.sealed != self._encrypted or shard.path in self._damaged or not shard.keys
            if wrong or not others.isdisjoint(shard.keys) or not self._present.issuperset(shard.keys):
                loose.append(shard)
            others.update(shard.keys)
        return loose

    def _rows(self, shard: Shard) -> np.ndarray | None:
        """(N, ...), not to be written to; None if they are damaged, were changed or cannot be opened."""
        try:
            with shard.path.open("rb") as file:
                start, header = _header(file)
                file.seek(0)
                content = (
                    file.read() if shard.size <= MAPPED_BYTES else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                )
            keys = b"".join(shard.keys)
            if shard.sealed:
                sealed = _array(content, start, header["sealed"]).tobytes()
                opened = AESGCM(self._key() or b"").decrypt(
                    sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], shard.table.encode() + keys
                )
                start, header = _header(io.BytesIO(opened))
                return _array(opened, start, header["rows"])
            rows_N = _array(content, start, header["rows"])
            if len(rows_N) == len(shard.keys) and _checksum(keys, rows_N) == _array(content, start, header["crc32"])[0]:
                return rows_N
        except (OSError, MemoryError):  # gone, or no descriptor or memory is left: that says nothing about its bytes
            return None
        except Exception:  # whatever damaged or changed bytes bring json, numpy and cryptography to
            pass
        self._damaged.add(shard.path)
        return None

    def _content(self, name: str, keys: bytes, rows_N: np.ndarray) -> bytes:
        """All bytes of a shard. Raises: OSError if the key cannot be kept."""
        key_N = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
        if not self._encrypted:
            return save({"keys": key_N, "rows": rows_N, "crc32": np.array([_checksum(keys, rows_N)], np.uint32)})
        if (secret := self._key()) is None:
            secret = AESGCM.generate_key(8 * KEY_BYTES)
            _write_whole(self._key_file, secret)
        nonce = os.urandom(NONCE_BYTES)
        sealed = nonce + AESGCM(secret).encrypt(nonce, save({"rows": rows_N}), name.encode() + keys)
        return save({"keys": key_N, "sealed": np.frombuffer(sealed, np.uint8)})

    def _key(self) -> bytes | None:
        """From beside the ledger; None if there is none, or if others can read it: then it protects nothing."""
        with contextlib.suppress(OSError):
            if not self._key_file.stat().st_mode & 0o077 and len(key := self._key_file.read_bytes()) == KEY_BYTES:
                return key
        return None

    def _room(self, size: int) -> bool:
        """Is there room for so many bytes within the bound? Shards that nobody used for longest make it."""
        shards = self._shards()
        total = size + sum(shard.size for shard in shards)
        for shard in shards:
            if total > self._bound and shard.path not in self._in_use:
                self._remove(shard.path)
                total -= shard.size
        return total <= self._bound

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        self._known.pop(path, None)


class Table:
    """Rows by key; new ones go to disk a shard at a time."""

    def __init__(self, kept: Kept, name: str) -> None:
        self._kept, self.name = kept, name
        self._row: dict[bytes, np.ndarray] = {}
        self._new: dict[bytes, np.ndarray] = {}
        self.held = 0  # bytes in memory

    def __contains__(self, key: bytes) -> bool:
        return key in self._row

    def __getitem__(self, key: bytes) -> np.ndarray:
        return self._row[key]

    def take(self, keys: Sequence[bytes], rows_N: np.ndarray) -> None:
        """rows_N: as they are, in memory or mapped."""
        self._row.update(zip(keys, rows_N, strict=True))
        self.held += 0 if _mapped(rows_N) else rows_N.nbytes

    def add(self, key: bytes, row: np.ndarray) -> None:
        """A row that was made now. Under `alone`."""
        if key not in self._row:
            self._row[key] = self._new[key] = row
            if len(self._new) * row.nbytes >= SHARD_BYTES:
                self.flush()

    def flush(self) -> None:
        """Under `alone`."""
        if self._new:
            keys, rows_N = list(self._new), np.stack(list(self._new.values()))
            self._new.clear()
            self.take(keys, self._kept.write(self.name, keys, rows_N))
