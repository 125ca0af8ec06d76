"""Small hospitals with planted identifiers, the command in this process and in its own, and one finished run."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import soundfile
import torch
from PIL import Image

from fedmm.cli import main
from fedmm.report.record import read_rounds

# Everything that a test's outcome depends on is set here, so that a change of a default changes no outcome.
SETTINGS = {
    "data.image_size": 16,
    "data.report_tokens": 32,
    "data.report_buckets": 64,
    "data.audio_seconds": 0.5,
    "model.width": 8,
    "training.batch_size": 4,
    "training.sampling_rate": 0.5,
    "training.local_steps": 1,
    "training.learning_rate": 0.1,
    "training.device": "cpu",
    "privacy.enabled": "true",
    "privacy.epsilon": 4,
    "privacy.delta": 1e-4,
    "federation.rounds": 2,
    "federation.min_hospitals": 1,
    "federation.evaluate_every": 0,
    "federation.weights": "uniform",
    "federation.seed": 1,
}

# What must never leave a hospital: found nowhere else, so that finding it in a run folder or an output is a leak.
PATIENT, STUDY, FILE, WORD = "mrn7731", "acc5512", "zdrojewski", "qwyxtofibroma"
PERSON = "Overduin^Wilhelmina"
SECRETS = (PATIENT, STUDY, FILE, WORD, "Overduin", "Wilhelmina")

HEADER = "patient_id,study_id,image,report,audio,pneumonia,effusion,grade,split"
GRADES = ("none", "mild", "severe")


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """How a command ended. log: every log record, formatted, of every level."""

    code: int
    out: str
    err: str
    log: str = field(repr=False)

    @property
    def said(self) -> str:
        return self.out + self.err + self.log

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def fedmm(*arguments: object) -> Ran:
    """`fedmm ARGUMENTS` in this process."""
    out, err, log = io.StringIO(), io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(log)
    loggers = [logging.getLogger(), logging.getLogger("flwr")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    except SystemExit as left:  # argparse
        code = int(left.code or 0)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    return Ran(code, out.getvalue(), err.getvalue(), log.getvalue())


def set_flags(**changes: object) -> list[str]:
    """--set KEY=VALUE of the tiny settings; `privacy__epsilon=3` changes one."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def simulate(hospitals: Path, out: Path, **changes: object) -> Ran:
    return fedmm("simulate", hospitals, "--out", out, "--workers", 0, *set_flags(**changes))


@dataclass(frozen=True)
class Started:
    """A command in a process group of its own. mark: in the environment of each of its processes."""

    process: subprocess.Popen[bytes]
    mark: str
    said_file: Path

    @property
    def said(self) -> str:
        return self.said_file.read_text(encoding="utf-8")

    def alive(self) -> list[int]:
        """Processes of this command that have not ended, children and their children too; the dead wait for nobody."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # gone meanwhile, or not ours
                continue
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """start(*arguments): the command in a process of its own; whatever is left of it is killed after the test."""
    begun: list[Started] = []

    def run(*arguments: object) -> Started:
        mark = f"FEDMM_TEST_{uuid.uuid4().hex}"
        said = tmp_path / f"{mark}.txt"
        with said.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedmm.cli", *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=tmp_path,
                env={**os.environ, mark: "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        begun.append(Started(process, mark, said))
        return begun[-1]

    yield run
    for started in begun:
        for pid in started.alive():
            os.kill(pid, 9)
        started.process.wait()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two cores that others use too: threads that wait for each other cost ten times the work itself.  # measured"""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- hospitals --------------------------------------------------------------------------------------------------------


def policy(name: str, *, research: bool = True, **changes: str) -> str:
    """site.toml. changes: `epsilon="3.0"` replaces a value."""
    values = {
        "epsilon": "20.0",
        "delta": "1e-4",
        "public_patients": "5",
        "allow_not_private": str(research).lower(),
        "counts": '"declared"' if research else '"no"',
        "metrics": '"exact"' if research else '"no"',
    }
    unknown = set(changes) - set(values)
    assert not unknown, unknown
    values |= changes
    return f"""\
[hospital]
name = "{name}"
[labels]
findings = ["pneumonia", "effusion"]
class_name = "grade"
class_values = ["none", "mild", "severe"]
[privacy]
epsilon = {values["epsilon"]}
delta = {values["delta"]}
public_patients = {values["public_patients"]}
allow_not_private = {values["allow_not_private"]}
[release]
counts = {values["counts"]}
metrics = {values["metrics"]}
"""


def write_dicom(path: Path, pixels: np.ndarray) -> None:
    """pixels: (H, W) uint8."""
    data = pydicom.dataset.FileDataset(path, {}, file_meta=pydicom.dataset.FileMetaDataset(), preamble=b"\0" * 128)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.PatientName, data.PatientID = PERSON, PATIENT
    data.SamplesPerPixel, data.Rows, data.Columns = 1, *pixels.shape
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)


def write_study(folder: Path, stem: str, rng: np.random.Generator, *, image: str, audio: str) -> None:
    pixels = rng.integers(0, 256, (24, 20), dtype=np.uint8)
    if image == "dcm":
        write_dicom(folder / f"{stem}.dcm", pixels)
    else:
        Image.fromarray(pixels).save(folder / f"{stem}.{image}")
    (folder / f"{stem}.txt").write_text(f"No {WORD}. Heart is normal. {rng.integers(100)} words.", encoding="utf-8")
    soundfile.write(folder / f"{stem}.{audio}", 0.3 * rng.standard_normal(4000).clip(-3, 3), 8000)


def write_hospital(folder: Path, *, patients: int = 6, train: int | None = None, **changes: str) -> Path:
    """One of each file format; two of three patients train unless `train` says how many; the first has two studies."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(patients)
    train = -(-2 * patients // 3) if train is None else train
    rows = []
    for p in range(patients):
        for s in range(2 if p == 0 else 1):
            stem, image, audio = f"{FILE}-{p}-{s}", ("png", "jpg", "dcm")[p % 3], ("wav", "flac")[p % 2]
            write_study(folder, stem, rng, image=image, audio=audio)
            cells = [f"{PATIENT}-{p}", f"{STUDY}-{p}-{s}", f"{stem}.{image}", f"{stem}.txt", f"{stem}.{audio}"]
            cells += [str(p % 2), str((p + s) % 2), GRADES[p % 3], "train" if p < train else "test"]
            rows.append(",".join(cells))
    (folder / "manifest.csv").write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    (folder / "site.toml").write_text(policy(folder.name, **changes), encoding="utf-8")
    return folder


def edit_cells(hospital: Path, **values: str) -> None:
    """The same value in a whole column."""
    names, *rows = [line.split(",") for line in (hospital / "manifest.csv").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        for name, value in values.items():
            row[names.index(name)] = value
    text = "".join(",".join(cells) + "\n" for cells in [names, *rows])
    (hospital / "manifest.csv").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "hospitals"
    for name in ("north", "middle", "south"):
        write_hospital(folder / name)
    return folder


@pytest.fixture
def hospitals(_pristine: Path, tmp_path: Path) -> Path:
    """Three hospitals with a research policy and no ledger yet: north, middle, south."""
    return Path(shutil.copytree(_pristine, tmp_path / "hospitals"))


@dataclass(frozen=True)
class Finished:
    """hospitals: two synthetic ones.  run: a finished private run of two rounds over them."""

    hospitals: Path
    run: Path
    made: Ran
    simulated: Ran

    @property
    def one(self) -> Path:
        return self.hospitals / "hospital_1"

    @property
    def two(self) -> Path:
        return self.hospitals / "hospital_2"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    made = fedmm("synth", folder / "hospitals", "--hospitals", 2, "--patients", 12, "--seed", 5)
    ran = simulate(folder / "hospitals", folder / "run")
    return Finished(folder / "hospitals", folder / "run", made, ran)


# --- looking ----------------------------------------------------------------------------------------------------------


def failures(run: Path, hospital: str) -> list[dict[str, Any]]:
    """What the run's records say about a hospital that did not take part."""
    return [failure for record in read_rounds(run) for failure in record["failures"] if failure["hospital"] == hospital]


def leaks(folder: Path, said: str = "", *, secrets: Sequence[str] = SECRETS) -> set[str]:
    """Secrets in any byte or name under `folder`, or in `said`; capitals and DICOM's ^ do not hide one."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = [path.read_bytes() for path in files] + [path.name.encode() for path in files] + [said.encode()]
    return {secret for secret in secrets for text in texts if secret.lower().encode() in text.lower()}
