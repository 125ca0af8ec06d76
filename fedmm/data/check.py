"""`fedmm check`: every problem of a hospital folder, in one list. Training refuses a folder with the same list."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fedmm.config import SITE_FILE, SiteConfig, load_site
from fedmm.data.manifest import FileProblem, Problem, Study, Table, read_table
from fedmm.errors import FedmmError
from fedmm.schema import MODALITY, InputSpec

Progress = Callable[[int, int], None]

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
    """The policy, None if unusable, and the manifest; the problems of both are in the table."""
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
