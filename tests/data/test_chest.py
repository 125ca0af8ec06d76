from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from fedmm.config import load_site
from fedmm.data.check import check_hospital
from fedmm.data.chest import NEEDED, import_chest
from fedmm.data.dataset import load_hospital
from fedmm.errors import ConfigError
from fedmm.schema import InputSpec
from tests.data.conftest import ramp, tone, write_wav

PACK = Path(__file__).resolve().parents[3] / "shared/data/chest"
NODES = ["cases_eu", "cases_row", "cases_unspec", "mhh_hannover", "nih_us_ap", "nih_us_pa"]
needs_pack = [
    pytest.mark.pack,
    pytest.mark.skipif(not (PACK / "manifest.csv").exists(), reason=f"the real chest pack is not at {PACK}"),
]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def row(patient: str, number: int, split: str = "open", node: str = "Site_B", **cells: str) -> dict[str, str]:
    blank = dict.fromkeys((*NEEDED, "sex", "report_path"), "")
    return {**blank, "patient_id": patient, "study_id": f"{patient}-{number}", "split": split, "node": node, **cells}


def make_pack(folder: Path, *rows: dict[str, str]) -> Path:
    folder.mkdir()
    Image.fromarray(ramp()).save(folder / "i.png")
    for name in ("note", "masked", "answer"):
        (folder / f"{name}.txt").write_text(f"this is the {name}")
    write_wav(folder / "digit.wav", tone())
    write_wav(folder / "cough.wav", tone(1))
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


FULL = {
    "image_path": "i.png",
    "note_path": "note.txt",
    "note_masked_path": "masked.txt",
    "report_path": "answer.txt",
    "dictation_path": "digit.wav",
    "resp_audio_path": "cough.wav",
    "finding3": "covid19",
    "abnormal": "1",
    "sex": "F",
}


# --- a pack made here -------------------------------------------------------------------------------------------------


def test_masked_note_and_dictation_are_preferred_and_the_report_is_never_used(tmp_path: Path) -> None:
    rest = {**FULL, "note_masked_path": "", "dictation_path": ""}
    pack = make_pack(tmp_path / "pack", row("p", 1, **FULL), row("p", 2, **rest), row("p", 3, report_path="answer.txt"))
    (folder,) = import_chest(pack, tmp_path / "h")
    assert folder == tmp_path / "h" / "site_b"
    first, second, third = rows_of(folder)
    assert (folder / first["report"]).read_text() == "this is the masked"
    assert (folder / first["audio"]).read_bytes() == (pack / "digit.wav").read_bytes()
    assert (folder / second["report"]).read_text() == "this is the note"
    assert (folder / second["audio"]).read_bytes() == (pack / "cough.wav").read_bytes()
    assert third["report"] == third["audio"] == third["image"] == ""
    assert first["sex"] == "F"
    assert not [file for file in folder.rglob("*.txt") if "answer" in file.read_text()]
    assert check_hospital(folder).ok


def test_splits_of_the_pack_are_kept_and_anything_held_back_is_test_for_the_whole_patient(tmp_path: Path) -> None:
    splits = {"a": ["train"], "b": ["test"], "c": ["closed"], "d": ["train", "eval"], "e": ["open", "closed"]}
    rows = [row(patient, n, split) for patient, given in splits.items() for n, split in enumerate(given)]
    (folder,) = import_chest(make_pack(tmp_path / "pack", *rows), tmp_path / "h")
    got = {(entry["patient_id"], entry["split"]) for entry in rows_of(folder)}
    assert got == {("a", "train"), ("b", "test"), ("c", "test"), ("d", "test"), ("e", "test")}


def test_a_pack_that_is_all_held_back_makes_a_hospital_of_test_patients(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", *(row(f"p{n}", 1, "closed", **FULL) for n in range(7)))
    (folder,) = import_chest(pack, tmp_path / "h")
    data = load_hospital(folder, InputSpec())
    assert (data.cohort("train").patients, data.cohort("test").patients) == (0, 7)
    assert load_site(folder).privacy.public_patients == 5


def test_three_tenths_of_the_open_patients_are_test_with_all_their_studies_whatever_the_order(tmp_path: Path) -> None:
    rows = [row(f"p{patient}", n) for patient in range(20) for n in range(2)]
    (one,) = import_chest(make_pack(tmp_path / "a", *rows), tmp_path / "h")
    (two,) = import_chest(make_pack(tmp_path / "b", *rows[::-1]), tmp_path / "i")
    split = {(entry["patient_id"], entry["split"]) for entry in rows_of(one)}
    assert split == {(entry["patient_id"], entry["split"]) for entry in rows_of(two)}
    assert len(split) == 20
    assert sum(part == "test" for _, part in split) == 6


@pytest.mark.parametrize(("patients", "bound"), [(1, 1), (4, 4), (5, 5), (8, 5), (54, 50)])
def test_the_public_bound_is_a_multiple_of_five_below_the_number_of_patients(
    tmp_path: Path, patients: int, bound: int
) -> None:
    (folder,) = import_chest(make_pack(tmp_path / "p", *(row(f"p{n}", 1) for n in range(patients))), tmp_path / "h")
    assert load_site(folder).privacy.public_patients == bound


def test_a_large_pack_still_gets_a_valid_policy(tmp_path: Path) -> None:
    (folder,) = import_chest(make_pack(tmp_path / "p", *(row(f"p{n}", 1) for n in range(1200))), tmp_path / "h")
    assert load_site(folder).privacy.public_patients == 995


def test_importing_again_restores_files_and_keeps_policy_and_ledger(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", row("p", 1, **FULL))
    (folder,) = import_chest(pack, tmp_path / "h")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    (folder / "ledger.sqlite").write_bytes(b"spent")
    policy = (folder / "site.toml").read_text().replace("epsilon = 20.0", "epsilon = 2.0")
    (folder / "site.toml").write_text(policy)
    next(folder.glob("image/*")).write_bytes(b"damaged")
    next(folder.glob("audio/*")).unlink()
    assert import_chest(pack, tmp_path / "h") == [folder]
    assert (folder / "ledger.sqlite").read_bytes() == b"spent"
    assert load_site(folder).privacy.epsilon == 2.0
    assert all(file.read_bytes() == data for file, data in before.items() if file.name != "site.toml")


def test_a_folder_of_someone_else_or_of_another_pack_is_left_alone(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", row("p", 1, **FULL), row("q", 1, node="other", **FULL))
    (tmp_path / "h" / "site_b").mkdir(parents=True)
    (tmp_path / "h" / "site_b" / "manifest.csv").write_text("mine")
    with pytest.raises(ConfigError, match="was not written by an import of this pack") as caught:
        import_chest(pack, tmp_path / "h")
    assert "another folder" in caught.value.fix
    assert [file.name for file in (tmp_path / "h").rglob("*")] == ["site_b", "manifest.csv"]
    import_chest(pack, tmp_path / "i")
    with pytest.raises(ConfigError, match="was not written by an import of this pack"):
        import_chest(make_pack(tmp_path / "second", row("r", 1, **FULL)), tmp_path / "i")


@pytest.mark.parametrize(
    "cells",
    [
        {"image_path": "gone.png"},
        {"image_path": "../secret.png"},
        {"note_masked_path": "/etc/hostname"},
        {"study_id": "../x"},
        {"node": ".."},
        {"node": ""},
    ],
)
def test_a_pack_that_names_what_it_does_not_have_is_refused_before_anything_is_written(
    tmp_path: Path, cells: dict[str, str]
) -> None:
    (tmp_path / "secret.png").write_text("x")
    pack = make_pack(tmp_path / "pack", {**row("p", 1, **FULL), **cells})
    with pytest.raises(ConfigError):
        import_chest(pack, tmp_path / "h")
    assert not (tmp_path / "h").exists()


def test_two_rows_with_one_study_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same study_id"):
        import_chest(make_pack(tmp_path / "pack", row("p", 1, **FULL), row("p", 1, **FULL)), tmp_path / "h")


@pytest.mark.parametrize(
    "data",
    [None, b"", b"a,b\n1,2\n", b"\xff\xfe", ",".join(NEEDED).encode(), ",".join(NEEDED).encode() + b"\nx\n", b'"'],
)
def test_a_wrong_pack_is_a_config_error_that_says_what_to_give(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "manifest.csv").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        import_chest(tmp_path, tmp_path / "h")
    assert "folder that holds the pack's manifest.csv" in caught.value.fix


def test_a_target_that_cannot_be_a_folder_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "h").write_text("a file")
    with pytest.raises(ConfigError, match="cannot write"):
        import_chest(make_pack(tmp_path / "pack", row("p", 1)), tmp_path / "h")


# --- the real pack ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return import_chest(PACK, tmp_path_factory.mktemp("chest") / "hospitals")


class TestRealPack:
    pytestmark = needs_pack

    def test_it_becomes_six_hospitals_that_pass_the_check(self, real: list[Path]) -> None:
        assert [folder.name for folder in real] == NODES
        checks = [check_hospital(folder) for folder in real]
        assert [check.problems for check in checks] == [()] * 6
        assert [check.studies for check in checks] == [35, 13, 38, 138, 205, 135]
        assert [check.patients for check in checks] == [15, 8, 24, 49, 154, 125]

    def test_labels_and_files_are_those_of_the_pack(self, real: list[Path]) -> None:
        with (PACK / "manifest.csv").open(encoding="utf-8", newline="") as file:
            source = {entry["study_id"]: entry for entry in csv.DictReader(file)}
        entries = [(folder, entry) for folder in real for entry in rows_of(folder)]
        assert len(entries) == len(source) == 564
        for folder, entry in entries:
            given = source[entry["study_id"]]
            assert {name: entry[name] for name in ("patient_id", "abnormal", "icu", "finding3")} == {
                name: given[name] for name in ("patient_id", "abnormal", "icu", "finding3")
            }
            assert (folder / entry["image"]).read_bytes() == (PACK / given["image_path"]).read_bytes()
            note = given["note_masked_path"] or given["note_path"]
            assert (folder / entry["report"]).read_bytes() == (PACK / note).read_bytes()
            assert bool(entry["audio"]) == bool(given["dictation_path"] or given["resp_audio_path"])

    def test_every_hospital_has_train_and_test_patients_and_a_research_policy(self, real: list[Path]) -> None:
        for folder in real:
            site, entries = load_site(folder), rows_of(folder)
            patients = {split: {e["patient_id"] for e in entries if e["split"] == split} for split in ("train", "test")}
            total = len(patients["train"] | patients["test"])
            assert not patients["train"] & patients["test"]
            assert abs(len(patients["test"]) - 0.3 * total) <= 0.5
            assert 5 <= site.privacy.public_patients <= total
            assert site.privacy.allow_not_private
            assert site.privacy.epsilon == 20
            assert (site.release.counts, site.release.metrics) == ("declared", "exact")
            assert site.labels.outputs == (
                "abnormal",
                "icu",
                "finding3=covid19",
                "finding3=no_finding",
                "finding3=pneumonia",
            )

    def test_a_compressed_dicom_of_the_extras_is_read(self) -> None:
        from fedmm.data.image import read as read_image

        image = read_image(PACK / "extras/dicom/RG1_J2KI.dcm", InputSpec())[0]
        # An upright chest: the lungs at both sides of the middle are dark, the spine between them is bright.
        assert image[20:36, 28:36].mean() > image[20:36, 10:20].mean()
        assert image[20:36, 28:36].mean() > image[20:36, 44:54].mean()
