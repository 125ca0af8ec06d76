"""A hospital's table of studies, manifest.csv or manifest.parquet with one row a study, and everything wrong with it.

Columns: those of COLUMNS, of which a modality's may be left out; the labels of site.toml; if they are there, `sex`, `age`
and `day`; anything that begins with META_PREFIX, which is not read.
The list of problems is printed and pasted into tickets: it names rows, columns and kinds of value, never a value.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, TypeVar

import pyarrow
import pyarrow.parquet

from fedmm.data import cells as read
from fedmm.data.cells import kind_of
from fedmm.schema import MODALITIES, SPLITS, Labels

T = TypeVar("T")
KEYS = ("patient_id", "study_id", "split")
COLUMNS = ("patient_id", "study_id", *MODALITIES, "split")
GROUPS = ("sex", "age")  # optional columns; age becomes a band
DAY = "day"  # optional column
FIXED = (*COLUMNS, *GROUPS, DAY)  # no label may have one of these names
META_PREFIX = "meta_"
MANIFESTS = ("manifest.csv", "manifest.parquet")
MAX_FILE_BYTES = 512 * 2**20  # of an image or a recording
MAX_REPORT_BYTES = 2**20
MAX_MANIFEST_BYTES = 256 * 2**20  # guess: a million studies need about 100 MB
MAX_COLUMNS = 1000


@dataclass(frozen=True)
class Problem:
    """One thing to mend. row: line in the manifest, the header is line 1; None is the whole file or folder."""

    row: int | None
    column: str
    code: str
    message: str
    fix: str

    def __str__(self) -> str:
        where = f"row {self.row}, {self.column}" if self.row is not None else self.column
        return f"{where}: {self.code}: {self.message}; fix: {self.fix}"


class FileProblem(Exception):
    """A file that cannot be used. Raised by the readers; holds neither the file's name nor anything from inside it."""

    def __init__(self, code: str, message: str, fix: str) -> None:
        super().__init__(f"{code}: {message}; fix: {fix}")
        self.code, self.message, self.fix = code, message, fix

    def at(self, row: int | None, column: str) -> Problem:
        return Problem(row, column, self.code, self.message, self.fix)


@dataclass(frozen=True)
class Study:
    """One valid row. paths: present modalities only, absolute.  findings: 1.0, 0.0 or None, in the order of the labels.

    label_class: index into class_values or None.  split: train or test.  further: in the order of `Labels.further`.
    day: of the study, on a calendar of the patient's own.  groups: by name in GROUPS.
    """

    row: int
    patient_id: str = field(repr=False)
    study_id: str = field(repr=False)
    paths: Mapping[str, Path] = field(repr=False)
    findings: tuple[float | None, ...] = field(repr=False)
    label_class: int | None = field(repr=False)
    split: str
    further: tuple[float | None, ...] = field(default=(), repr=False)
    day: float | None = field(default=None, repr=False)
    groups: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Table:
    """A manifest as read. studies: valid rows.  spare: row and paths of rows that are wrong in another cell."""

    studies: list[Study]
    problems: list[Problem]
    spare: list[tuple[int, Mapping[str, Path]]]


def open_file(path: Path, *, limit: int = MAX_FILE_BYTES) -> BinaryIO:
    """Open a regular file of at most `limit` bytes for reading; a FIFO or device is refused without waiting for it.

    Raises: FileProblem missing_file, not_a_file, unreadable_file, absurd_size.
    """
    try:
        # O_NONBLOCK: a FIFO without a writer would otherwise wait for ever. It changes nothing for regular files.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise FileProblem("missing_file", "there is no such file", "restore the file or empty the cell") from None
    except (OSError, ValueError) as error:
        raise FileProblem(
            "unreadable_file", f"the file cannot be opened ({type(error).__name__})", "check its name and permissions"
        ) from None
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        raise FileProblem("not_a_file", "this is a folder, pipe or device", "name a regular file")
    if info.st_size > limit:
        os.close(descriptor)
        raise FileProblem(
            "absurd_size", f"the file is larger than {limit / 2**20:g} MB", "is this the right file? export it smaller"
        )
    return os.fdopen(descriptor, "rb")


def find_manifest(hospital: Path) -> Path:
    """The one manifest of a folder. Raises: FileProblem no_folder, no_manifest, two_manifests."""
    if not hospital.is_dir():
        raise FileProblem("no_folder", "there is no such hospital folder", "check the path")
    found = [hospital / name for name in MANIFESTS if os.path.lexists(hospital / name)]
    if not found:
        raise FileProblem("no_manifest", "no manifest.csv or manifest.parquet", "write manifest.csv, one row a study")
    if len(found) == 2:
        raise FileProblem("two_manifests", "manifest.csv and manifest.parquet are both here", "keep the right one")
    return found[0]


def read_manifest(hospital: Path, labels: Labels) -> tuple[list[Study], list[Problem]]:
    """All valid rows, and everything wrong with the table and with its paths. As read_table."""
    table = read_table(hospital, labels)
    return table.studies, table.problems


def read_table(hospital: Path, labels: Labels | None) -> Table:
    """The manifest of a folder; the files it names are looked at, not opened.

    labels: which columns are labels; None (no usable site.toml) leaves label and unknown columns unchecked.
    Guarantee: raises nothing for anything in the folder.
    """
    try:
        path = find_manifest(hospital)
    except FileProblem as problem:
        return Table([], [problem.at(None, "manifest")], [])
    try:
        header, lines = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
        problems = _header_problems(header, labels, path.name)
        readable = all(problem.code in ("unknown_column", "missing_column") for problem in problems)
        if not readable or set(KEYS) - set(header):
            return Table([], problems, [])  # the cells below would be misread
        rows = _Rows(hospital, labels, header)
        rows.read(lines, path.name)
        return Table(rows.studies, problems + rows.problems, rows.spare)
    except FileProblem as problem:
        return Table([], [problem.at(None, path.name)], [])


# --- tables -----------------------------------------------------------------------------------------------------------

# Line, and its cells or what is wrong with it.
Row = tuple[int, list[str] | FileProblem]


def _read_csv(path: Path) -> tuple[list[str], Iterator[Row]]:
    with open_file(path, limit=MAX_MANIFEST_BYTES) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FileProblem("not_text", "the manifest is not UTF-8 text", "save it as CSV, UTF-8") from None
    if "\0" in text:
        raise FileProblem("not_text", "the manifest holds NUL bytes", "save it as CSV, UTF-8")
    lines = _csv_lines(text)
    _, header = next(lines, (1, []))
    if isinstance(header, FileProblem):
        raise header
    if not header:
        raise FileProblem("no_studies", "the manifest is empty", "write a header and one row per study")
    return [_clean(name) for name in header], lines


def _csv_lines(text: str) -> Iterator[Row]:
    """Rows with the line they start on; blank lines are skipped; after a line that cannot be parsed it stops."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            # One of: a cell over csv's 128 KiB, a quote that never closes, text after a closing quote.
            fix = "quote cells that hold commas, close every quote, keep cells under 100 kB"
            yield start, FileProblem("bad_csv", "the line is not valid CSV; the rest was not read", fix)
            return
        if cells:
            yield start, cells


def _read_parquet(path: Path) -> tuple[list[str], Iterator[Row]]:
    with open_file(path, limit=MAX_MANIFEST_BYTES) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            groups = [table.metadata.row_group(index) for index in range(table.metadata.num_row_groups)]
            unpacked = sum(group.total_byte_size for group in groups)
            names = list(table.schema_arrow.names)
            wanted = [name for name in names if not _clean(name).startswith(META_PREFIX)]
            if unpacked > 4 * MAX_MANIFEST_BYTES or len(names) > MAX_COLUMNS:
                raise FileProblem("absurd_size", "the manifest unpacks to too much", "one row per study, few columns")
            content = table.read(columns=wanted, use_threads=False) if len(set(names)) == len(names) else None
        except FileProblem:
            raise
        except Exception:  # pyarrow raises a dozen kinds for bytes that are not Parquet; none may end a run
            raise FileProblem("not_parquet", "the manifest is not readable as Parquet", "write it again") from None
    header = [_clean(name) for name in names]
    if content is None:
        return header, iter(())
    present = {_clean(name): content.column(name) for name in wanted}
    return header, _parquet_lines(header, present, content.num_rows)


def _parquet_lines(header: Sequence[str], present: Mapping[str, Any], count: int) -> Iterator[Row]:
    values = {name: _cells(column, name) for name, column in present.items()}
    for index in range(count):
        yield index + 2, [values[name][index] if name in values else "" for name in header]


def _cells(column: Any, name: str) -> list[str]:
    kinds = pyarrow.types
    kind = column.type.value_type if kinds.is_dictionary(column.type) else column.type
    texts, numbers = (kinds.is_string, kinds.is_large_string), (kinds.is_integer, kinds.is_floating, kinds.is_boolean)
    if not any(test(kind) for test in (*texts, *numbers, kinds.is_null)):
        label = name if name in FIXED else "a column"
        raise FileProblem("bad_column_type", f"{label} is not text, a number or yes/no", "store it as text")
    try:
        return [_cell(value) for value in column.to_pylist()]
    except (UnicodeDecodeError, pyarrow.ArrowException):
        raise FileProblem("not_text", "a column holds text that is not UTF-8", "write the table again") from None


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool | float) and value == value // 1:  # true is 1; whole floats (nullable integers) lose ".0"
        return str(int(value))
    return str(value)


def _clean(cell: str) -> str:
    """Without surrounding blanks and in one Unicode form: `P1 ` and `P1` must be one patient, or the unit is split."""
    return unicodedata.normalize("NFC", cell).strip()


# --- the header -------------------------------------------------------------------------------------------------------


def _header_problems(header: Sequence[str], labels: Labels | None, file: str) -> list[Problem]:
    if not set(KEYS) & set(header):
        # Without one known name this may be the first patient's row: say nothing of what is in it.
        separators = [name for name, sign in (("semicolons", ";"), ("tabs", "\t")) if len(header[0].split(sign)) >= 3]
        why = f"cells seem to be separated by {separators[0]}" if separators else "no known column in the first line"
        return [Problem(None, file, "no_header", why, f"first line with commas: {','.join(COLUMNS)} and the labels")]
    problems = []
    for name in (*KEYS, *(labels.columns if labels else ())):
        if name not in header:
            kind = "required" if name in KEYS else "a label of site.toml"
            problems.append(Problem(None, name, "missing_column", f"this column is {kind}", "add it to the manifest"))
    for name in labels.columns if labels else ():
        if name in FIXED:
            message = "a label has the name of a fixed column"
            problems.append(Problem(None, name, "reserved_label", message, "rename it in site.toml"))
    for position, name in enumerate(header, start=1):
        shown = name if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name) else f"column {position}"
        if name in header[: position - 1]:
            problems.append(Problem(None, shown, "duplicate_column", "this column is there twice", "remove one"))
        elif labels and name not in (*FIXED, *labels.columns) and not name.startswith(META_PREFIX):
            fix = f"remove it, name it as a label in site.toml, or start its name with {META_PREFIX}"
            problems.append(Problem(None, shown, "unknown_column", "neither a fixed column nor a label", fix))
    if len(header) > MAX_COLUMNS:
        problems = [Problem(None, file, "absurd_size", f"more than {MAX_COLUMNS} columns", "keep the known columns")]
    return problems


# --- the rows ---------------------------------------------------------------------------------------------------------


class _Rows:
    """Reads rows one after the other and remembers what must be unique."""

    def __init__(self, hospital: Path, labels: Labels | None, header: Sequence[str]) -> None:
        self.root, self.labels, self.header = hospital.resolve(), labels, header
        self.folders: dict[str, Path | None] = {}
        self.studies: list[Study] = []
        self.problems: list[Problem] = []
        self.spare: list[tuple[int, Mapping[str, Path]]] = []
        self.first_row_of_study: dict[str, int] = {}
        self.split_of_patient: dict[str, str] = {}

    def read(self, rows: Iterator[Row], file: str) -> None:
        empty = True
        for line, cells in rows:
            empty = False
            if isinstance(cells, FileProblem):
                self.problems.append(cells.at(line, file))
            elif len(cells) != len(self.header):
                message = f"{len(cells)} cells where the header has {len(self.header)}"
                fix = "one cell per column; quote cells that hold a comma"
                self.problems.append(Problem(line, file, "ragged_row", message, fix))
            else:
                self.row(line, {name: _clean(cell) for name, cell in zip(self.header, cells, strict=True)})
        if empty:
            self.problems.append(Problem(None, file, "no_studies", "a header and no rows", "write one row per study"))

    def row(self, line: int, cells: Mapping[str, str]) -> None:
        before = len(self.problems)
        self.identity(line, cells)
        paths = {name: path for name in MODALITIES if (path := self.path(line, name, cells.get(name, "")))}
        labels = self.labels_of(line, cells)
        day = self.cell(line, DAY, partial(read.number, cells.get(DAY, "")), code="bad_day")
        groups = {"sex": read.sex(cells.get("sex", "")), "age": read.age_band(cells.get("age", ""))}
        if len(self.problems) == before:
            patient, study, split = (cells[name] for name in KEYS)
            self.studies.append(Study(line, patient, study, paths, split=split, day=day, groups=groups, **labels))
        elif paths:
            self.spare.append((line, paths))

    def add(self, line: int, column: str, code: str, message: str, fix: str) -> None:
        self.problems.append(Problem(line, column, code, message, fix))

    def identity(self, line: int, cells: Mapping[str, str]) -> None:
        patient, study, split = (cells[name] for name in KEYS)
        for name in KEYS[:2]:
            if not cells[name]:
                self.add(line, name, "missing_id", "the cell is empty", "each row needs a patient and a study")
        if split not in SPLITS:
            fix = f"write {' or '.join(SPLITS)}"
            self.add(line, "split", "bad_split", f"{kind_of(split)} where a split belongs", fix)
        elif patient and self.split_of_patient.setdefault(patient, split) != split:
            fix = "give all studies of a patient the same split"
            self.add(line, "split", "patient_in_two_splits", "an earlier row of this patient has the other split", fix)
        if study and (first := self.first_row_of_study.setdefault(study, line)) != line:
            self.add(line, "study_id", "duplicate_study", f"row {first} has the same study", "keep one row per study")

    def path(self, line: int, name: str, cell: str) -> Path | None:
        if not cell:
            return None
        try:
            return _inside(self.root, cell, self.folders)
        except FileProblem as problem:
            self.problems.append(problem.at(line, name))
            return None

    def cell(self, line: int, name: str, reader: Callable[[], T], *, code: str = "bad_label") -> T | None:
        """What a reader of `cells` makes of a cell; None, and a problem, if nothing."""
        try:
            return reader()
        except read.BadCell as bad:
            self.add(line, name, code, bad.message, bad.fix)
            return None

    def labels_of(self, line: int, cells: Mapping[str, str]) -> dict[str, Any]:
        labels = self.labels or Labels()
        name, values = labels.class_name, labels.class_values
        label_class = partial(read.one_of, cells.get(name, ""), values, "class")
        return {
            "findings": tuple(self.cell(line, f, partial(read.flag, cells.get(f, ""))) for f in labels.findings),
            "label_class": self.cell(line, name, label_class) if name else None,
            "further": tuple(self.cell(line, f, partial(read.further, f, cells, labels)) for f in labels.further),
        }


def _inside(root: Path, cell: str, folders: dict[str, Path | None]) -> Path:
    """The regular file that a cell names, which must be in the folder after all links are followed.

    folders: by what stands before the last slash of a cell, where that leads, None if out of the folder: followed once for all
    of its files, since following links costs more than all else of a row.
    """
    if cell.startswith("/") or "\\" in cell or ":" in cell or ".." in cell:
        windows = PureWindowsPath(cell)  # a drive or a backslash path is wrong on every system, so a folder can move
        if PurePosixPath(cell).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
            raise _leaves()
    before, _, name = cell.rpartition("/")
    try:
        if before not in folders:
            there = (root / before).resolve()
            folders[before] = there if there.is_relative_to(root) else None
        folder = folders[before]
        path = (folder or root / before) / name
        mode = path.lstat().st_mode if folder and name not in ("", ".") else stat.S_IFLNK
        if stat.S_ISLNK(mode):
            path = path.resolve()
            if not path.is_relative_to(root):
                raise _leaves()
            mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileProblem("missing_file", "there is no such file", "restore the file or empty the cell") from None
    except (OSError, ValueError, RuntimeError):  # too long a name, a loop of links, a NUL, no permission
        raise FileProblem("bad_path", "the cell is not a usable file name", "name a file inside the folder") from None
    if not stat.S_ISREG(mode):
        raise FileProblem("not_a_file", "this is a folder, pipe or device", "name a regular file")
    return path


def _leaves() -> FileProblem:
    return FileProblem("path_leaves_folder", "the path leads out of the hospital folder", "use a path inside it")
