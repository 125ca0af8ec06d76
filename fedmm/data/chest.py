"""The real chest pack (or another pack in its format) becomes hospital folders, one for each node."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmm.config import SITE_FILE
from fedmm.data.manifest import FileProblem, open_file
from fedmm.errors import ConfigError

MARK_FILE = "import.json"
TEST_SHARE = 0.3
DELTA = 1e-4
# Column of the hospital's manifest, and where it comes from: the first source that is filled. report_path is never one:
# those reports are paired by label and give the answer away.
SOURCES: Mapping[str, tuple[str, ...]] = {
    "image": ("image_path",),
    "report": ("note_masked_path", "note_path"),
    "audio": ("dictation_path", "resp_audio_path"),
}
LABELS = ("abnormal", "icu", "finding3")
PATIENT = {"sex": "sex", "age": "age", "day": "day_offset"}  # column of the hospital's manifest: column of the pack
META = ("view",)
NEEDED = ("study_id", "patient_id", "split", "node", *LABELS, *(name for names in SOURCES.values() for name in names))
FIX_TARGET = "give a folder that can be written to; the import may be repeated"
FIX = "give the folder that holds the pack's manifest.csv, for example ../shared/data/chest"

SITE = """\
# Written by `fedmm import chest`. This is public research data: the policy lets runs without privacy use it and lets
# exact test scores leave. Never copy it to a hospital with patients of its own.

[hospital]
name = "{name}"

[labels]
findings = ["abnormal", "icu"]
class_name = "finding3"
class_values = ["covid19", "no_finding", "pneumonia"]

[privacy]
epsilon = 20.0
delta = {delta}
public_patients = {patients}
allow_not_private = true

[release]
counts = "declared"
metrics = "exact"
"""


@dataclass(frozen=True)
class _Copy:
    """One file of the pack and its place in the hospital folder."""

    source: Path
    target: str


def import_chest(pack: Path, hospitals: Path) -> list[Path]:
    """Write one hospital folder per node of the pack: manifest.csv, site.toml and copies of the files.

    Splits train and test of the pack are kept; of a node's `open` patients 30 %, chosen by a hash of patient_id, are
    test; any other split is held back: test. A patient with a held-back study is in test with all studies.
    Repeating it on the same pack changes nothing but restores what is missing; site.toml and ledger stay as they are.
    Returns the folders in order of name. Files are copied unchanged: DICOM headers stay.
    Raises: ConfigError if this is no such pack, a file is missing, or a target folder belongs to something else.
    """
    rows, mark = _read_pack(pack)
    nodes: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        nodes.setdefault(_folder_name(row["node"]), []).append(row)
    plans = {name: _plan(pack, studies) for name, studies in sorted(nodes.items())}
    for name in plans:  # all checks before anything is written
        _check_target(hospitals / name, mark)
    for name, (table, copies) in plans.items():
        try:
            _write(hospitals / name, nodes[name], table, copies, mark)
        except OSError as error:
            raise ConfigError(f"cannot write to {hospitals / name} ({type(error).__name__})", fix=FIX_TARGET) from None
    return [hospitals / name for name in plans]


def _read_pack(pack: Path) -> tuple[list[dict[str, str]], str]:
    """Rows of the pack's manifest and what identifies this pack."""
    try:
        with open_file(pack / "manifest.csv") as file:
            data = file.read()
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        rows = list(reader)
    except FileProblem as problem:
        raise ConfigError(f"no usable manifest.csv in {pack}: {problem.message}", fix=FIX) from None
    except (UnicodeDecodeError, csv.Error):
        raise ConfigError(f"manifest.csv in {pack} is not a UTF-8 table", fix=FIX) from None
    missing = [name for name in NEEDED if name not in (reader.fieldnames or [])]
    if missing:
        raise ConfigError(f"manifest.csv in {pack} has no column {', '.join(missing)}", fix=FIX)
    if not rows or any(None in row or None in row.values() for row in rows):
        raise ConfigError(f"manifest.csv in {pack} has no rows, or rows of another length than its header", fix=FIX)
    rows = [{name: cell.strip() for name, cell in row.items()} for row in rows]
    mark = {"written_by": "fedmm import chest", "pack_manifest_sha256": hashlib.sha256(data).hexdigest()}
    return rows, json.dumps(mark, indent=1) + "\n"


def _folder_name(node: str) -> str:
    name = node.strip().lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise ConfigError("a node of the pack has a name that cannot be a folder", fix="letters, digits, _ and -")
    return name


def _plan(pack: Path, studies: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, str]], list[_Copy]]:
    """The hospital's table and the files to copy. Raises: ConfigError."""
    test = _test_patients(studies)
    table, copies = [], []
    for row in studies:
        entry = {"patient_id": row["patient_id"], "study_id": row["study_id"]}
        for modality, columns in SOURCES.items():
            given = next((row[name] for name in columns if row[name]), "")
            entry[modality] = ""
            if given:
                copy = _Copy(_source(pack, given), f"{modality}/{_file_stem(row['study_id'])}{Path(given).suffix}")
                entry[modality] = copy.target
                copies.append(copy)
        entry |= {name: row[name] for name in LABELS}
        entry |= {
            name: row[given] if name == "sex" else _number(row[given])
            for name, given in PATIENT.items()
            if given in row
        }
        entry |= {f"meta_{name}": row[name] for name in META if name in row}
        entry["split"] = "test" if row["patient_id"] in test else "train"
        table.append(entry)
    if len({copy.target for copy in copies}) != len(copies):
        raise ConfigError("two rows of the pack have the same study_id", fix="one row per study")
    return table, copies


def _test_patients(studies: Sequence[Mapping[str, str]]) -> set[str]:
    """Patients with a held-back study, and of those that are open the 30 % of this node whose hash comes first."""
    splits: dict[str, set[str]] = {}
    for row in studies:
        splits.setdefault(row["patient_id"], set()).add(row["split"])
    held_back = {patient for patient, found in splits.items() if found - {"open", "train"}}
    # A share of each node, not a threshold on the hash: nodes of eight patients need both splits too.
    is_open = [patient for patient, found in splits.items() if found == {"open"}]
    is_open.sort(key=lambda patient: hashlib.sha256(f"fedmm chest 1:{patient}".encode()).hexdigest())
    return held_back | set(is_open[: round(len(is_open) * TEST_SHARE)])


def _number(cell: str) -> str:
    """The cell if it is a plain number; empty for everything else, which a manifest would refuse."""
    return cell if re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", cell) else ""


def _source(pack: Path, given: str) -> Path:
    root = pack.resolve()
    path = (root / given).resolve() if "\0" not in given else root
    if not path.is_relative_to(root) or not path.is_file():
        raise ConfigError(f"manifest.csv in {pack} names a file that is not in the pack", fix="complete the pack")
    return path


def _file_stem(study_id: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", study_id):
        raise ConfigError("a study_id of the pack cannot be a file name", fix="letters, digits, _ . and - only")
    return study_id


def _check_target(folder: Path, mark: str) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    known = folder / MARK_FILE
    if not known.is_file() or known.read_text(encoding="utf-8", errors="replace") != mark:
        raise ConfigError(
            f"{folder} exists and was not written by an import of this pack",
            why="its ledger counts what other patients have spent, and its files may be someone's data",
            fix="give another folder for the hospitals, or move this one away",
        )


def _write(
    folder: Path,
    studies: Sequence[Mapping[str, str]],
    table: Sequence[Mapping[str, str]],
    copies: Sequence[_Copy],
    mark: str,
) -> None:
    for modality in SOURCES:
        (folder / modality).mkdir(parents=True, exist_ok=True)
    # The mark is first, so that an import that was interrupted can be repeated; the manifest makes it a hospital.
    (folder / MARK_FILE).write_text(mark, encoding="utf-8")
    for copy in copies:
        shutil.copyfile(copy.source, folder / copy.target)
    if not (folder / SITE_FILE).exists():  # after the first time it is the hospital's own
        patients = _public_patients(len({row["patient_id"] for row in studies}))
        policy = SITE.format(name=folder.name, delta=DELTA, patients=patients)
        (folder / SITE_FILE).write_text(policy, encoding="utf-8")
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def _public_patients(patients: int) -> int:
    """A lower bound of the patients, in fives where there are five, that DELTA is small enough for."""
    largest = round(1 / (10 * DELTA)) - 5  # site.toml wants delta < 1 / (10 x public_patients)
    return min(patients // 5 * 5 or patients, largest)
