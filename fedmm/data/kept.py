"""What the fixed part of an encoder made of a hospital's files, kept beside them: later runs open no file of that modality.

HOSPITAL/.fedmm/<modality>-<key>.safetensors, for its owner's eyes only. The key covers the files (name, size, times), the
form of the input, all that the fixed part depends on and the version of fedmm: nothing stale is read. It is made of patients' data
and never leaves; deleting these files costs time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedmm.config import installed_version

FORMAT = 1  # another one whenever a reader or a fixed part computes something else within a version of fedmm
FOLDER = ".fedmm"
HOUR = 3600.0
MOST = 4  # files of one modality, the latest used; guess: a few models in turn


@dataclass(frozen=True)
class FixedPart:
    """identity: hash of all that `compute` depends on.  compute: (S, ...) of a modality -> (S, ...) float32, row by row."""

    identity: str
    compute: Callable[[torch.Tensor], torch.Tensor]


def stamp(file: Path) -> str:
    """Changes when the file does, by size and times; ctime too: a copy that keeps the old file's time is another file."""
    try:
        info = os.stat(file)
    except OSError:  # not there, or gone since the manifest was read: reading it will say so
        return ""
    return f"{file}\0{info.st_size}\0{info.st_mtime_ns}\0{info.st_ctime_ns}\n"


def kept_at(hospital: Path, name: str, part: FixedPart, files_S: Iterable[Path | None]) -> Path:
    """Where the result for these files (one a study, None where absent) is kept, whether it is there or not."""
    maker = hashlib.sha256(f"{FORMAT} {installed_version()} {part.identity}".encode()).hexdigest()
    files = hashlib.sha256()
    for file in files_S:
        files.update((stamp(file) if file else "-\n").encode())
    return hospital / FOLDER / f"{name}-{maker[:20]}-{files.hexdigest()[:40]}.safetensors"


def read_kept(path: Path, studies: int) -> torch.Tensor | None:
    """(S, ...), None if there is nothing usable: it is made again then."""
    try:
        value = load_file(path)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    if value.dtype != torch.float32 or value.dim() < 2 or len(value) != studies or not bool(value.isfinite().all()):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the latest used
    return value


def write_kept(path: Path, value: torch.Tensor) -> None:
    """Whole or not at all. A folder that cannot be written costs time at the next start, nothing else."""
    with contextlib.suppress(OSError, SafetensorError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".part")  # mode 0600
        os.close(descriptor)
        try:
            save_file({"features": value.contiguous()}, name)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
        _drop_old(path)


def _drop_old(path: Path) -> None:
    """What the same part made of the files as they were before, what was not used lately, what a killed process left."""
    modality, maker, _ = path.name.split("-")
    for file in path.parent.glob(f"{modality}-{maker}-*.safetensors"):
        if file != path:  # patients may have been withdrawn since
            file.unlink(missing_ok=True)
    others = sorted(path.parent.glob(f"{modality}-*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    for file in others[:-MOST]:
        file.unlink(missing_ok=True)
    for file in path.parent.glob("*.part"):
        if file.stat().st_mtime < time.time() - HOUR:
            file.unlink(missing_ok=True)
