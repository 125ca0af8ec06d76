"""`fedmm check`: every problem of a hospital folder, in one list. Training refuses a folder with the same list."""

from __future__ import annotations

import hashlib
import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedmm.config import SITE_FILE, SiteConfig, load_site
from fedmm.data.kept import stamp
from fedmm.data.manifest import MANIFESTS, FileProblem, Problem, Study, Table, read_table
from fedmm.errors import FedmmError
from fedmm.schema import MODALITY, InputSpec

Progress = Callable[[int, int], None]
MOST_STUDIES = 50_000  # in the tables that are remembered: some 100 MB  # guess

READERS: Mapping[str, Callable[[Path, InputSpec], np.ndarray]] = {
    name: import_module(f"fedmm.data.{modality.module}").read for name, modality in MODALITY.items()
}


@dataclass(frozen=True)
class Check:
    """What was found. studies, patients: valid rows of the manifest, and whose they are."""

    studies: int
    patients: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        keys = ("row", "column", "code", "message", "fix")
        return {
            "ok": self.ok,
            "studies": self.studies,
            "patients": self.patients,
            "problems": [{key: getattr(problem, key) for key in keys} for problem in self.problems],
        }


def check_hospital(hospital: Path, spec: InputSpec | None = None, *, progress: Progress | None = None) -> Check:
    """Read the policy, the manifest and every file. Raises nothing for anything in the folder.

    spec: how files become tensors; what is wrong with a file does not depend on it.
    progress: called with rows done and rows in all.
    """
    _, table = read_folder(hospital)
    problems, files = list(table.problems), files_of(table)
    for done, (row, paths) in enumerate(files, start=1):
        problems += decode(row, paths, spec or InputSpec())[1]
        if progress:
            progress(done, len(files))
    return summarise(table.studies, problems)


def summarise(studies: list[Study], problems: list[Problem]) -> Check:
    """Problems in the order of the file; those of the whole folder first."""
    ordered = sorted(problems, key=lambda problem: -1 if problem.row is None else problem.row)
    return Check(len(studies), len({study.patient_id for study in studies}), tuple(ordered))


def read_folder(hospital: Path) -> tuple[SiteConfig | None, Table]:
    """The policy, None if unusable, and the manifest; the problems of both are in the table. To read, not to change.

    What was right the last time and has not changed since, nor a file that it names, is not read again.
    """
    folder = hospital.absolute()
    own = tuple(folder / name for name in (*MANIFESTS, SITE_FILE))
    known, before = _known.pop(folder, None), _stamps(own)
    if known is not None and known.stamps == _sha256(before + _stamps(known.files)):
        _known[folder] = known  # as the last one
        return known.site, known.table
    site, table = _read_folder(hospital)
    if site is not None and not table.problems:
        files = tuple(path for study in table.studies for path in study.paths.values())
        _known[folder] = _Known(site, table, files, _sha256(before + _stamps(files)))
        with _dropping:
            while len(_known) > 1 and sum(len(held.table.studies) for held in list(_known.values())) > MOST_STUDIES:
                del _known[next(iter(_known))]
    return site, table


class _Known(NamedTuple):
    """files: that the table names.  stamps: of manifest, policy and files."""

    site: SiteConfig
    table: Table
    files: tuple[Path, ...]
    stamps: bytes


_known: dict[Path, _Known] = {}  # the least recently read first
_dropping = threading.Lock()


def _stamps(files: Iterable[Path]) -> str:
    return "".join(map(stamp, files))


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _read_folder(hospital: Path) -> tuple[SiteConfig | None, Table]:
    site, problems = None, []
    try:
        site = _site(hospital)
    except FileProblem as problem:
        problems.append(problem.at(None, SITE_FILE))
    table = read_table(hospital, site.labels if site else None)
    return site, replace(table, problems=problems + table.problems)


def files_of(table: Table) -> list[tuple[int, Mapping[str, Path]]]:
    """Rows with the files that they name, also of rows that are wrong in another cell, so that one list has it all."""
    return [(study.row, study.paths) for study in table.studies] + table.spare


def decode(row: int, paths: Mapping[str, Path], spec: InputSpec) -> tuple[dict[str, np.ndarray], list[Problem]]:
    """Arrays of one row by modality, without those that could not be read."""
    arrays, problems = {}, []
    for name, path in paths.items():
        try:
            arrays[name] = READERS[name](path, spec)
        except FileProblem as problem:
            problems.append(problem.at(row, name))
    return arrays, problems


def _site(hospital: Path) -> SiteConfig:
    path = hospital / SITE_FILE
    try:
        special = not stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        special = False  # load_site says what is wrong
    if special:  # reading a FIFO would wait for ever
        raise FileProblem("bad_policy", f"{SITE_FILE} is not a regular file", "write it as deploy/site.example.toml")
    try:
        return load_site(hospital)
    except FedmmError as error:
        raise FileProblem("bad_policy", error.what, error.fix) from None
    except Exception as error:  # whatever a hostile file brings tomllib to: deep nesting is a RecursionError
        message = f"{SITE_FILE} cannot be read ({type(error).__name__})"
        raise FileProblem("bad_policy", message, "compare with deploy/site.example.toml") from None
