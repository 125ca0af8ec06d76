from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmm.data import check
from fedmm.data.check import READERS, check_hospital
from fedmm.schema import MODALITIES, InputSpec
from tests.data.conftest import HEADER, ROWS, write_manifest, write_wav


def found(folder: Path) -> list[tuple[int | None, str, str]]:
    return [(p.row, p.column, p.code) for p in check_hospital(folder).problems]


def test_a_good_folder_is_ok(hospital: Path) -> None:
    done: list[tuple[int, int]] = []
    check = check_hospital(hospital, progress=lambda *step: done.append(step))
    assert check.ok
    assert check.as_json() == {"ok": True, "studies": 6, "patients": 3, "problems": []}
    assert done[-1] == (6, 6)


def test_all_problems_come_in_one_list_by_row_with_a_fix(hospital: Path) -> None:
    (hospital / "cut.png").write_bytes((hospital / "a.png").read_bytes()[:60])
    (hospital / "blank.txt").write_text(" \n")
    write_wav(hospital / "silent.wav", np.zeros(800))
    write_wav(hospital / "empty.wav", np.zeros(0))
    write_manifest(
        hospital,
        *ROWS,
        "Dora,d1,cut.png,blank.txt,silent.wav,,,,train",
        "Dora,d1,gone.png,a.txt,empty.wav,5,,,test",
        "Emil,e1,/a.png,cut.png,a.txt,,,,train",
    )
    check = check_hospital(hospital)
    assert sorted(found(hospital)) == sorted(
        [
            (8, "image", "broken_image"),
            (8, "report", "broken_report"),
            (8, "audio", "silent_audio"),
            (9, "split", "patient_in_two_splits"),
            (9, "study_id", "duplicate_study"),
            (9, "image", "missing_file"),
            (9, "pneumonia", "bad_label"),
            (9, "audio", "empty_audio"),
            (10, "image", "path_leaves_folder"),
            (10, "report", "broken_report"),
            (10, "audio", "broken_audio"),
        ]
    )
    assert [problem.row for problem in check.problems] == sorted(problem.row or 0 for problem in check.problems)
    assert all(problem.message and problem.fix for problem in check.problems)
    assert not check.ok
    shown = json.loads(json.dumps(check.as_json()))
    assert set(shown["problems"][0]) == {"row", "column", "code", "message", "fix"}


def test_a_problem_is_one_readable_line(hospital: Path) -> None:
    write_manifest(hospital, "P,1,gone.png,,,,,,train")
    text = str(check_hospital(hospital).problems[0])
    assert text == "row 2, image: missing_file: there is no such file; fix: restore the file or empty the cell"


def test_the_policy_is_part_of_the_folder_and_does_not_hide_the_rest(hospital: Path) -> None:
    write_manifest(hospital, *ROWS, "Dora,d1,gone.png,,,,,,train")
    for text in ("", "[hospital", "\0", "a=" + "[" * 5000, '[hospital]\nname = "x y"'):
        (hospital / "site.toml").write_text(text)
        assert found(hospital) == [(None, "site.toml", "bad_policy"), (8, "image", "missing_file")]
    (hospital / "site.toml").unlink()
    assert found(hospital)[0] == (None, "site.toml", "bad_policy")
    os.mkfifo(hospital / "site.toml")
    assert found(hospital)[0] == (None, "site.toml", "bad_policy")


def test_an_empty_folder_a_file_and_nothing_at_all_are_answers_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    codes = {name: [code for _, _, code in found(tmp_path / name)] for name in ("file", "empty", "nowhere")}
    assert codes == {
        "file": ["bad_policy", "no_folder"],
        "empty": ["bad_policy", "no_manifest"],
        "nowhere": ["bad_policy", "no_folder"],
    }


def test_there_is_a_reader_for_each_modality_in_the_order_of_the_model() -> None:
    assert tuple(READERS) == MODALITIES


def test_problems_do_not_depend_on_how_files_become_tensors(hospital: Path) -> None:
    (hospital / "a.wav").write_bytes(b"x")
    assert check_hospital(hospital, InputSpec(image_size=224)) == check_hospital(hospital)


def test_nothing_of_a_patient_reaches_the_log_or_the_list(
    hospital: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("a.png", "a.txt", "a.wav"):
        (hospital / name).write_bytes((hospital / name).read_bytes()[:50] + b"\xffWolkenstein")
    write_manifest(hospital, *ROWS, "Anna,Wolkenstein,Anna.png,Anna,Anna,Anna,Anna,Anna,Anna")
    check = check_hospital(hospital)
    captured = capfd.readouterr()
    text = caplog.text + captured.out + captured.err + repr(check) + json.dumps(check.as_json())
    assert len(check.problems) > 10
    assert "Anna" not in text
    assert "Wolkenstein" not in text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(name=st.sampled_from(["site.toml", "manifest.csv", "a.png", "a.txt", "a.wav"]), data=st.binary(max_size=200))
def test_no_file_of_random_bytes_makes_the_check_raise(hospital: Path, name: str, data: bytes) -> None:
    before = (hospital / name).read_bytes()
    (hospital / name).write_bytes(data)
    try:
        check = check_hospital(hospital)
    finally:
        (hospital / name).write_bytes(before)
    assert check.ok == (not check.problems)
    if name in ("site.toml", "manifest.csv"):
        assert not check.ok


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(rows=st.lists(st.text(alphabet="AB,./\\\"'\n;01 train", max_size=40), max_size=5))
def test_no_text_in_the_manifest_makes_the_check_raise(hospital: Path, rows: list[str]) -> None:
    (hospital / "manifest.csv").write_text("\n".join([HEADER, *rows]), encoding="utf-8", newline="")
    check = check_hospital(hospital)
    assert check.studies or check.problems


def test_a_folder_is_read_again_when_the_policy_the_manifest_or_a_file_has_changed(
    hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    honest = check._read_folder
    monkeypatch.setattr(check, "_read_folder", lambda folder: (reads.append(folder), honest(folder))[1])
    first = check.read_folder(hospital)
    assert not first[1].problems
    assert check.read_folder(hospital) == first
    assert len(reads) == 1
    for number, name in enumerate(("site.toml", "manifest.csv", "a.txt"), start=2):
        os.utime(hospital / name, ns=(number, number))
        check.read_folder(hospital)
        check.read_folder(hospital)
        assert len(reads) == number, name
    (hospital / "a.txt").unlink()
    for _ in range(2):  # what is wrong is never remembered
        assert {problem.code for problem in check.read_folder(hospital)[1].problems} == {"missing_file"}
    assert len(reads) == 6


def test_only_so_many_tables_are_remembered(hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_known", {})
    monkeypatch.setattr(check, "MOST_STUDIES", 2 * len(check.read_folder(hospital)[1].studies))
    others = [Path(shutil.copytree(hospital, tmp_path / f"other_{i}")) for i in range(3)]
    for folder in (*others, others[1]):
        check.read_folder(folder)
    assert list(check._known) == [others[2], others[1]], "those that were read last"
