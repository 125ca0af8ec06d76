"""A thousand identifiers at three hospitals, everything goes wrong that can, and none of them is in any byte outside."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from flwr.app import Message
from flwr.common.serde import message_to_proto

import client.app
import server.app
from fedmm.config import RunConfig
from fedmm.federation.local import LocalGrid
from fedmm.federation.rounds import RoundRecord
from fedmm.report.record import read_rounds
from fedmm.report.status import describe_status, read_status
from fedmm.sites.logs import json_logs
from tests.e2e.conftest import GRADES, HEADER, SETTINGS, policy
from tests.planted import plant

PLANTED = plant()
STUDIES = len(PLANTED.number)
HOSPITALS = ("north", "middle", "south")
TAGS = (
    "PatientName", "PatientID", "OtherPatientNames", "PatientAddress", "AccessionNumber", "StudyID", "StudyDescription",
    "ReferringPhysicianName", "InstitutionName", "DeviceSerialNumber", "PatientComments",
)  # fmt: skip
NUMBERED = ("PatientID", "AccessionNumber", "StudyID")
UIDS = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


def write_dicom(path: Path, i: int, rng: np.random.Generator) -> None:
    meta = pydicom.dataset.FileMetaDataset()
    data = pydicom.dataset.FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = PLANTED.uid[i]
    for name in UIDS:
        setattr(data, name, PLANTED.uid[i])
    for name in TAGS:
        setattr(
            data,
            name,
            PLANTED.number[i] if name in NUMBERED else PLANTED.name[i],
        )
    pixels = rng.integers(0, 256, (12, 10), dtype=np.uint8)
    data.SamplesPerPixel, data.Rows, data.Columns = 1, *pixels.shape
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)


def write_hospital(folder: Path, studies: Iterable[int]) -> Path:
    """Each study has five identifiers: patient, file name, word of the report, and in its DICOM header name and UIDs."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    rows = []
    for k, i in enumerate(studies):
        stem = PLANTED.path[i].lstrip("/").removesuffix(".dcm")
        (folder / stem).parent.mkdir(parents=True, exist_ok=True)
        write_dicom(folder / f"{stem}.dcm", i, rng)
        text = f"{PLANTED.name[i]} has {PLANTED.word[i]}. See {PLANTED.uid[i]}."
        (folder / f"{stem}.txt").write_text(text, encoding="utf-8")
        study = PLANTED.name[i].replace("^", "_")
        cells = [PLANTED.number[i], f"{study}-{PLANTED.uid[i]}", f"{stem}.dcm", f"{stem}.txt", ""]
        rows.append(",".join([*cells, str(k % 2), str(k // 2 % 2), GRADES[k % 3], "test" if k % 4 == 0 else "train"]))
    (folder / "manifest.csv").write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    (folder / "site.toml").write_text(policy(folder.name), encoding="utf-8")
    return folder


class Wiretap(LocalGrid):
    """Keeps every byte that crosses, both ways, as Flower writes it."""

    crossed: list[bytes]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        messages = list(messages)
        self.crossed += [message_to_proto(message).SerializeToString() for message in messages]
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.crossed += [message_to_proto(reply).SerializeToString() for reply in replies]
        return replies


@dataclass
class Trouble:
    """What is done to the hospitals while the run goes on."""

    middle: Path
    round: int = 1
    raised: list[str] = field(default_factory=list)

    def fail(self) -> Any:
        """In place of training and predicting, in round 2: an exception full of identifiers."""
        self.raised.append(f"round {self.round}")
        raise ValueError(
            f"cannot convert {PLANTED.number[0]} of {PLANTED.name[0]} in {PLANTED.path[0]}: {PLANTED.uid[0]}"
        )

    def after(self, record: RoundRecord) -> None:
        self.round = record.round + 1
        if record.round == 2:  # a file breaks, with a word of a report in it
            image = sorted(self.middle.rglob("*.dcm"))[0]
            image.write_bytes(image.read_bytes()[:200] + PLANTED.word[1].encode() * 9)


@pytest.fixture
def told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[Path, list[bytes], Path, str]:
    """A run of three rounds: its folder, what crossed, the log of coordinator and hospitals, what was printed."""
    home = tmp_path / PLANTED.path[0].split("/")[2] / PLANTED.name[0].replace("^", " ")  # the folder tells a name too
    each = np.array_split(np.arange(STUDIES), len(HOSPITALS))
    folders = [write_hospital(home / name, part.tolist()) for name, part in zip(HOSPITALS, each, strict=True)]
    broken = write_hospital(home / "broken", [0])
    (broken / "site.toml").write_text(f'{policy("broken")}\n[contact]\nof = "{PLANTED.name[2]}"\n', encoding="utf-8")
    with (folders[2] / "site.toml").open("a", encoding="utf-8") as south:
        south.write('[runs]\nkinds = ["evaluate"]\n')  # refuses each round
    trouble = Trouble(folders[1])
    train, predict, append = client.app.train, client.app.predict, server.app.append_round

    def spoiled(do: Callable[..., Any]) -> Callable[..., Any]:
        def instead(bench: Any, cohort: Any, *rest: Any, **named: Any) -> Any:
            return trouble.fail() if trouble.round == 2 and cohort.patients else do(bench, cohort, *rest, **named)

        return instead

    def appended(folder: Path, record: RoundRecord) -> None:
        append(folder, record)
        trouble.after(record)

    monkeypatch.setattr(client.app, "train", spoiled(train))
    monkeypatch.setattr(client.app, "predict", spoiled(predict))
    monkeypatch.setattr(server.app, "append_round", appended)
    run, stream = tmp_path / "run", io.StringIO()
    settings = SETTINGS | {
        "federation.rounds": 3,
        "federation.evaluate_every": 1,
        "federation.out": str(run),
        "training.sampling_rate": 1.0,
    }
    config = RunConfig.from_flat(settings | {"data.hospitals": "nowhere"})
    nodes = [{"site": str(folder)} for folder in [*folders, broken]]
    with json_logs(tmp_path / "logs", "all", stream=stream) as log, Wiretap("client.app:app", nodes) as grid:
        grid.crossed = []
        server.app.coordinate(grid, config)
    assert len(trouble.raised) >= 2
    printed = "".join(capfd.readouterr())
    assert "round 3/3" in printed
    return run, grid.crossed, log, printed + stream.getvalue()


def everything(folder: Path) -> list[bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.read_bytes() for path in files] + [str(path.relative_to(folder)).encode() for path in files]


def test_a_thousand_identifiers_are_at_the_hospitals_and_in_no_byte_outside(
    told: tuple[Path, list[bytes], Path, str], tmp_path: Path
) -> None:
    run, crossed, log, printed = told
    hospitals = next(path for path in tmp_path.iterdir() if path.name not in ("run", "logs"))
    assert PLANTED.found_in(*everything(hospitals)) == set(PLANTED.all)
    # everything went wrong that should
    failures = [f for record in read_rounds(run) for f in record["failures"]]
    assert {f["code"] for f in failures} >= {1002, 1004, 1099}
    absent = json.loads((run / "config.json").read_text(encoding="utf-8"))["absent"]
    assert {f["code"] for f in absent} == {1002}
    assert read_status(run).phase == "done"
    assert "noise alone" in log.read_text(encoding="utf-8")
    # and nothing of a patient is in what the coordinator has, what crossed, or what was printed or logged
    places = {
        "run folder": everything(run),
        "wire": crossed,
        "log": [log.read_bytes()],
        "status": [describe_status(run).encode()],
        "console": [printed.encode()],
    }
    assert {place: PLANTED.found_in(*texts) for place, texts in places.items()} == {place: set() for place in places}
    assert len(crossed) > 20
