"""The real chest pack, as a researcher gets it: imported, checked, trained on, and nothing of a patient in the result."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pydicom
import pytest

from fedmm.report.record import read_rounds
from tests.e2e.conftest import Ran, fedmm, leaks, simulate

PACK = Path(__file__).parents[3] / "shared" / "data" / "chest"
NODES = ["cases_eu", "cases_row", "cases_unspec", "mhh_hannover", "nih_us_ap", "nih_us_pa"]
pytestmark = [
    pytest.mark.pack,
    pytest.mark.skipif(not (PACK / "manifest.csv").is_file(), reason=f"the chest pack is not at {PACK}"),
]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    folder = tmp_path_factory.mktemp("pack") / "hospitals"
    return folder, fedmm("import", "chest", PACK, folder)


@pytest.fixture(scope="module")
def trained(
    imported: tuple[Path, Ran], tmp_path_factory: pytest.TempPathFactory, _one_thread: None
) -> tuple[Path, Ran]:
    run = tmp_path_factory.mktemp("pack run") / "run"
    return run, simulate(imported[0], run, privacy__enabled="false", training__sampling_rate=0.2)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (PACK / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_import_makes_one_folder_for_each_node_and_prints_them(imported: tuple[Path, Ran]) -> None:
    folder, ran = imported
    assert ran.code == 0
    assert ran.out.split() == [str(folder / name) for name in NODES]
    assert sorted(path.name for path in folder.iterdir()) == NODES


def test_every_imported_folder_passes_check_with_all_studies_of_the_pack(
    imported: tuple[Path, Ran], rows: list[dict[str, str]]
) -> None:
    found = {name: fedmm("check", imported[0] / name, "--format", "json") for name in NODES}
    assert {name: ran.json["problems"] for name, ran in found.items()} == {name: [] for name in NODES}
    assert {ran.code for ran in found.values()} == {0}
    for name, ran in found.items():
        here = [row for row in rows if row["node"].lower() == name]
        assert ran.json["studies"] == len(here)
        assert ran.json["patients"] == len({row["patient_id"] for row in here})


def test_no_report_that_was_paired_by_label_is_in_any_hospital(
    imported: tuple[Path, Ran], rows: list[dict[str, str]]
) -> None:
    answers = {digest(PACK / row["report_path"]) for row in rows if row["report_path"]}
    copied = {digest(path) for path in imported[0].rglob("*") if path.is_file()}
    allowed = {digest(PACK / row["image_path"]) for row in rows if row["image_path"]}
    assert len(answers) > 100
    assert allowed <= copied  # the comparison does find what was copied
    assert not answers & copied


def test_a_short_run_without_privacy_on_the_pack_works_and_says_not_private(trained: tuple[Path, Ran]) -> None:
    run, ran = trained
    assert ran.code == 0, ran.said
    assert "NOT PRIVATE" in ran.out
    records = read_rounds(run)
    assert [record["trained"] for record in records] == [NODES, NODES]
    assert [record["failures"] for record in records] == [[], []]
    assert set(records[-1]["scores"]) == set(NODES)


def test_no_identifier_of_the_packs_dicom_files_or_manifest_is_in_the_run(
    trained: tuple[Path, Ran], imported: tuple[Path, Ran], rows: list[dict[str, str]]
) -> None:
    secrets = set()
    for row in rows:
        if row["image_path"].endswith(".dcm"):
            header = pydicom.dcmread(PACK / row["image_path"], stop_before_pixels=True)
            for name in ("PatientName", "ReferringPhysicianName", "PatientID", "AccessionNumber"):
                secrets.add(str(header[name].value))
    assert len(secrets) > 10
    assert leaks(imported[0], secrets=sorted(secrets)) == secrets  # the hospitals have them; the search finds them
    secrets |= {row["study_id"] for row in rows} | {row["patient_id"] for row in rows}
    run, ran = trained
    assert leaks(run, ran.said, secrets=sorted(secrets)) == set()
