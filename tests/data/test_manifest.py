from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmm.data.manifest import MANIFESTS, FileProblem, open_file, read_manifest
from fedmm.schema import Labels
from tests.data.conftest import HEADER, LABELS, ROWS, write_manifest


def found(folder: Path) -> list[tuple[int | None, str, str]]:
    return [(p.row, p.column, p.code) for p in read_manifest(folder, LABELS)[1]]


def test_a_good_manifest_gives_every_study_and_no_problem(hospital: Path) -> None:
    studies, problems = read_manifest(hospital, LABELS)
    assert not problems
    assert [study.row for study in studies] == [2, 3, 4, 5, 6, 7]
    assert studies[0].findings == (1.0, 0.0)
    assert studies[1].findings == (1.0, None)
    assert [study.label_class for study in studies] == [1, 2, None, 0, 0, None]
    assert list(studies[0].paths) == ["image", "report", "audio"]
    assert studies[0].paths["image"] == (hospital / "a.png").resolve()
    assert studies[4].paths == {}
    assert [study.split for study in studies] == ["train"] * 4 + ["test"] * 2


def test_a_studys_text_form_shows_no_patient(hospital: Path) -> None:
    studies, _ = read_manifest(hospital, LABELS)
    assert "Anna" not in repr(studies) + str(studies)
    assert "a.png" not in repr(studies)


def test_bom_crlf_quotes_blank_lines_and_spaces_around_ids_change_nothing(hospital: Path) -> None:
    plain = read_manifest(hospital, LABELS)[0]
    quoted = [",".join(f'" {cell} "' for cell in row.split(",")) for row in (HEADER, *ROWS)]
    (hospital / "manifest.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(quoted).encode() + b"\r\n\r\n")
    assert read_manifest(hospital, LABELS) == (plain, [])


def test_one_patient_written_in_two_unicode_forms_is_one_patient(hospital: Path) -> None:
    write_manifest(hospital, "Zo\u00eb,1,,,,,,,train", "Zoe\u0308,2,,,,,,,train")
    studies, problems = read_manifest(hospital, LABELS)
    assert not problems
    assert len({study.patient_id for study in studies}) == 1


def test_parquet_reads_as_csv_does_with_numbers_gaps_and_booleans(hospital: Path) -> None:
    (hospital / "manifest.csv").unlink()
    table = {
        "patient_id": [1, 2, 2],
        "study_id": ["a", "b", "c"],
        "image": pyarrow.array(["a.png", None, None]).dictionary_encode(),
        "audio": pyarrow.nulls(3),
        "pneumonia": [1.0, None, float("nan")],
        "effusion": [True, False, None],
        "grade": ["mild", None, "none"],
        "split": ["train", "test", "test"],
        "meta_seen": [[1], [2], [3]],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), hospital / "manifest.parquet")
    studies, problems = read_manifest(hospital, LABELS)
    assert not problems
    assert [study.patient_id for study in studies] == ["1", "2", "2"]
    assert [study.findings for study in studies] == [(1.0, 1.0), (None, 0.0), (None, None)]
    assert [study.label_class for study in studies] == [1, None, 0]
    assert [len(study.paths) for study in studies] == [1, 0, 0]


@pytest.mark.parametrize("name", ["patient_id", "split"])
def test_a_parquet_column_that_is_a_list_is_a_problem(hospital: Path, name: str) -> None:
    (hospital / "manifest.csv").unlink()
    table = {"patient_id": [["x"]], "study_id": ["a"], "split": ["train"]}
    table[name] = [["x"]]
    pyarrow.parquet.write_table(pyarrow.table(table), hospital / "manifest.parquet")
    assert found(hospital)[0][2] in ("bad_column_type", "missing_column")
    assert read_manifest(hospital, LABELS)[0] == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("P,1,nothing.png,,,,,,train", ("image", "missing_file")),
        ("P,1,,a.txt/below,,,,,train", ("report", "missing_file")),
        ("P,1,../north/a.png,,,,,,train", ("image", "path_leaves_folder")),
        ("P,1,/etc/hostname,,,,,,train", ("image", "path_leaves_folder")),
        ("P,1,C:\\a.png,,,,,,train", ("image", "path_leaves_folder")),
        ("P,1,..\\a.png,,,,,,train", ("image", "path_leaves_folder")),
        ("P,1,.,,,,,,train", ("image", "not_a_file")),
        (f"P,1,{'x' * 5000},,,,,,train", ("image", "bad_path")),
        ("P,1,,,,2,,,train", ("pneumonia", "bad_label")),
        ("P,1,,,,,yes,,train", ("effusion", "bad_label")),
        ("P,1,,,,nan,,,train", ("pneumonia", "bad_label")),
        ("P,1,,,,,,Mild,train", ("grade", "bad_label")),
        ("P,1,,,,,,,Train", ("split", "bad_split")),
        ("P,1,,,,,,,", ("split", "bad_split")),
        (",1,,,,,,,train", ("patient_id", "missing_id")),
        ("P, ,,,,,,,train", ("study_id", "missing_id")),
        ("P,1,,,,,,train", ("manifest.csv", "ragged_row")),
        ("P,1,,,,,,,train,", ("manifest.csv", "ragged_row")),
        ('P,1,"a"b,,,,,,train', ("manifest.csv", "bad_csv")),
        ('P,1,"never closed,,,,,,train', ("manifest.csv", "bad_csv")),
        (f"P,1,{'x' * 2**20},,,,,,train", ("manifest.csv", "bad_csv")),
    ],
)
def test_a_bad_row_is_found_with_its_line_and_column(hospital: Path, row: str, problem: tuple[str, str]) -> None:
    write_manifest(hospital, "Q,0,,,,,,,test", row)
    assert found(hospital) == [(3, *problem)]
    assert [study.study_id for study in read_manifest(hospital, LABELS)[0]] == ["0"]


def test_lines_are_counted_over_quoted_line_breaks(hospital: Path) -> None:
    header = HEADER + ",meta_note"
    write_manifest(hospital, 'P,1,,,,,,,train,"two\nlines"', "P,2,,,,,,,never,", header=header)
    assert found(hospital) == [(4, "split", "bad_split")]


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_fine(hospital: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(b"x")
    (hospital / "out.png").symlink_to(tmp_path / "outside.png")
    (hospital / "in.png").symlink_to(hospital / "a.png")
    (hospital / "loop.png").symlink_to(hospital / "loop.png")
    write_manifest(hospital, *(f"P,{name},{name}.png,,,,,,train" for name in ("out", "in", "loop")))
    assert found(hospital) == [(2, "image", "path_leaves_folder"), (4, "image", "bad_path")]


def test_a_hospital_folder_that_is_itself_a_link_is_fine(hospital: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(hospital)
    assert not found(tmp_path / "link")


def test_a_pipe_is_refused_without_waiting_for_it(hospital: Path) -> None:
    os.mkfifo(hospital / "pipe")
    write_manifest(hospital, "P,1,pipe,,,,,,train")
    assert found(hospital) == [(2, "image", "not_a_file")]
    with pytest.raises(FileProblem) as caught:
        open_file(hospital / "pipe")
    assert caught.value.code == "not_a_file"
    (hospital / "manifest.csv").unlink()
    os.mkfifo(hospital / "manifest.csv")
    assert found(hospital) == [(None, "manifest.csv", "not_a_file")]


def test_a_patient_in_two_splits_and_a_study_twice_are_found_at_the_later_row(hospital: Path) -> None:
    write_manifest(hospital, "P,1,,,,,,,train", "P,2,,,,,,,test", "Q,1,,,,,,,test")
    assert found(hospital) == [(3, "split", "patient_in_two_splits"), (4, "study_id", "duplicate_study")]


@pytest.mark.parametrize(
    ("header", "problems"),
    [
        (HEADER + ",surname", [(None, "surname", "unknown_column")]),
        (HEADER + ",meta_age", []),
        (HEADER + ",", [(None, "column 10", "unknown_column")]),
        (HEADER + ",Anna Smith 1970-01-01", [(None, "column 10", "unknown_column")]),
        (HEADER + ",image", [(None, "image", "duplicate_column")]),
        (HEADER.replace("grade", "meta_x"), [(None, "grade", "missing_column")]),
        (HEADER.replace("patient_id", "meta_x"), [(None, "patient_id", "missing_column")]),
        (HEADER.replace(",", ";"), [(None, "manifest.csv", "no_header")]),
        (ROWS[0], [(None, "manifest.csv", "no_header")]),
    ],
)
def test_a_wrong_header_is_found(hospital: Path, header: str, problems: list[tuple[None, str, str]]) -> None:
    write_manifest(hospital, "P,1,,,,,,,train" + "," * (header.count(",") - 8), header=header)
    assert [p for p in found(hospital) if p[2] != "ragged_row"] == problems


def test_a_wrong_header_does_not_hide_what_is_wrong_below(hospital: Path) -> None:
    write_manifest(hospital, "P,1,gone.png,,,,,,train,x", header=HEADER + ",surname")
    assert found(hospital) == [(None, "surname", "unknown_column"), (2, "image", "missing_file")]


def test_columns_of_modalities_that_a_hospital_never_has_may_be_left_out(hospital: Path) -> None:
    write_manifest(hospital, "P,1,1,0,mild,train", header="patient_id,study_id,pneumonia,effusion,grade,split")
    studies, problems = read_manifest(hospital, LABELS)
    assert not problems
    assert studies[0].paths == {}


def test_a_label_may_not_have_the_name_of_a_fixed_column(hospital: Path) -> None:
    problems = read_manifest(hospital, Labels(findings=("split",)))[1]
    assert "reserved_label" in [problem.code for problem in problems]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "no_studies"),
        (b"\xef\xbb\xbf\r\n", "no_studies"),
        (HEADER.encode(), "no_studies"),
        (HEADER.encode() + b"\n\n\n", "no_studies"),
        (b"\xff\xfe\x00\x01", "not_text"),
        (HEADER.encode() + b"\nP,1,\0,,,,,,train", "not_text"),
        ("patient_id,study_id,split\nJos\u00e9,1,train".encode("latin-1"), "not_text"),
        (b'"never closed', "bad_csv"),
        (b"patient_id," * 2000, "absurd_size"),
    ],
)
def test_a_whole_file_that_is_wrong_is_one_problem(hospital: Path, data: bytes, code: str) -> None:
    (hospital / "manifest.csv").write_bytes(data)
    assert found(hospital) == [(None, "manifest.csv", code)]


def test_no_manifest_two_manifests_and_no_folder_are_problems(hospital: Path, tmp_path: Path) -> None:
    (hospital / "manifest.parquet").write_bytes(b"")
    assert found(hospital) == [(None, "manifest", "two_manifests")]
    (hospital / "manifest.csv").unlink()
    assert found(hospital) == [(None, "manifest.parquet", "not_parquet")]
    (hospital / "manifest.parquet").unlink()
    assert found(hospital) == [(None, "manifest", "no_manifest")]
    assert found(tmp_path / "nowhere") == [(None, "manifest", "no_folder")]


def test_no_problem_repeats_a_value_of_the_file(hospital: Path) -> None:
    secret = "Wolkenstein"
    rows = [",".join(secret if i == j else "" for j in range(9)) for i in range(9)]
    write_manifest(hospital, *rows, f"{secret},{secret},../{secret},/{secret},{secret}/x,,,,x", f"a,{secret}")
    problems = read_manifest(hospital, LABELS)[1]
    assert len(problems) > 15
    assert not [problem for problem in problems if secret in str(problem) or secret in repr(problem)]
    write_manifest(hospital, f"P,1,train,{secret}", header=f"{secret},Anna,x,{secret}")
    assert secret not in repr(read_manifest(hospital, LABELS))


@given(
    data=st.binary(max_size=300),
    start=st.sampled_from([HEADER.encode() + b"\n", b"PAR1", b""]),
    name=st.sampled_from(MANIFESTS),
)
def test_no_bytes_make_the_reader_raise(data: bytes, start: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(start + data)
        studies, problems = read_manifest(Path(folder), LABELS)
        assert studies or problems


@given(cells=st.lists(st.lists(st.text(max_size=12), min_size=9, max_size=9), min_size=1, max_size=4))
def test_no_cells_make_the_reader_raise(cells: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        columns = dict(zip(HEADER.split(","), zip(*cells, strict=True), strict=True))
        try:
            table = pyarrow.table({name: list(values) for name, values in columns.items()})
        except UnicodeEncodeError:  # a lone surrogate cannot be stored at all
            return
        pyarrow.parquet.write_table(table, Path(folder) / "manifest.parquet")
        studies, problems = read_manifest(Path(folder), LABELS)
        assert studies or problems
