from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmm.data.cells import BadCell, age_band, further, number, sex
from fedmm.data.manifest import MANIFESTS, FileProblem, Study, open_file, read_manifest
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


EVERY = Labels(
    **LABELS.model_dump(include={"findings", "class_name", "class_values"}), ordinal_name="stage",
    ordinal_levels=("I", "II", "III"), value_name="risk", value_range=(0.0, 10.0), time_name="time", event_name="event",
    time_edges=(30.0, 90.0),
)  # fmt: skip
EVERY_HEADER = "patient_id,study_id,pneumonia,effusion,grade,split,stage,risk,time,event,day,sex,age"


def every(folder: Path, *tails: str) -> tuple[list[Study], list[tuple[int | None, str, str]]]:
    """Rows of a manifest with every optional column, from stage on."""
    rows = [f"P,{number},,,,train,{tail}" for number, tail in enumerate(tails)]
    write_manifest(folder, *rows, header=EVERY_HEADER)
    studies, problems = read_manifest(folder, EVERY)
    return studies, [(p.row, p.column, p.code) for p in problems]


def test_levels_values_times_days_and_groups_are_read(hospital: Path) -> None:
    studies, problems = every(
        hospital, "II,2.5,40,1,-3,F,39", "I,11,0.5,0,1e2,m,80.5", "III,-.5,90.0,1.0,0.25,x_other,0", ",,,,,,", "I,,,,,,"
    )
    assert not problems
    assert [study.further for study in studies] == [
        (1, 2.5, 40.0, 1.0),
        (0, 10.0, 0.5, 0.0),  # cut to the public range
        (2, 0.0, 90.0, 1.0),
        (None, None, None, None),
        (0, None, None, None),
    ]
    assert [study.day for study in studies] == [-3.0, 100.0, 0.25, None, None]
    assert [study.groups["sex"] for study in studies] == ["F", "M", "X_OTHER", "", ""]
    assert [study.groups["age"] for study in studies] == ["18-39", "80+", "0-17", "", ""]


@pytest.mark.parametrize(
    ("tail", "problem"),
    [
        ("IV,,,,,,", ("stage", "bad_label")),
        ("1,,,,,,", ("stage", "bad_label")),
        (",high,,,,,", ("risk", "bad_label")),
        (",nan,,,,,", ("risk", "bad_label")),
        (",1e999,,,,,", ("risk", "bad_label")),
        (",1_0,,,,,", ("risk", "bad_label")),
        (",,0,1,,,", ("time", "bad_label")),
        (",,-2,1,,,", ("time", "bad_label")),
        (",,inf,1,,,", ("time", "bad_label")),
        (",,3e9,1,,,", ("time", "bad_label")),
        (",,5,2,,,", ("event", "bad_label")),
        (",,5,,,,", ("event", "bad_label")),
        (",,,1,,,", ("time", "bad_label")),
        (",,,,monday,,", ("day", "bad_day")),
        (",,,,2026-11-21,,", ("day", "bad_day")),
        (",,,,inf,,", ("day", "bad_day")),
    ],
)
def test_a_bad_further_cell_is_found_with_its_line_and_column(
    hospital: Path, tail: str, problem: tuple[str, str]
) -> None:
    studies, problems = every(hospital, ",,,,,,", tail)
    assert problems == [(3, *problem)]
    assert len(studies) == 1


@pytest.mark.parametrize(
    ("years", "band"),
    [("0", "0-17"), ("17.9", "0-17"), ("18", "18-39"), ("40", "40-59"), ("60", "60-79"), ("79.99", "60-79"), ("80", "80+"),
     ("130", "80+"), ("130.5", ""), ("-1", ""), ("old", ""), ("nan", ""), ("1e400", "")],
)  # fmt: skip
def test_an_age_is_a_band_or_nothing_and_never_a_problem(hospital: Path, years: str, band: str) -> None:
    (study,), problems = every(hospital, f",,,,,,{years}")
    assert (study.groups["age"], problems) == (band, [])


@pytest.mark.parametrize(
    ("cell", "code"),
    [("f", "F"), ("Divers", "DIVERS"), ("not known", ""), ("x" * 17, ""), ("1", ""), ("ſ" * 3, ""), ("é", "")],
)
def test_a_sex_is_one_word_or_nothing_and_never_a_problem(hospital: Path, cell: str, code: str) -> None:
    (study,), problems = every(hospital, f",,,,,{cell},")
    assert (study.groups["sex"], problems) == (code, [])


@pytest.mark.parametrize("name", ["sex", "age", "day"])
def test_no_label_may_have_the_name_of_an_optional_column(hospital: Path, name: str) -> None:
    problems = read_manifest(hospital, Labels(findings=("pneumonia",), value_name=name))[1]
    assert (name, "reserved_label") in [(problem.column, problem.code) for problem in problems]


def test_optional_columns_are_known_and_labels_must_be_there(hospital: Path) -> None:
    write_manifest(hospital, "P,1,,,,,,,train,F,40,3", header=HEADER + ",sex,age,day")
    assert not found(hospital)
    problems = read_manifest(hospital, EVERY)[1]
    assert [(p.column, p.code) for p in problems] == [(n, "missing_column") for n in ("stage", "risk", "time", "event")]


def test_parquet_reads_further_labels_days_and_groups_as_csv_does(hospital: Path) -> None:
    studies, _ = every(hospital, "II,2.5,40,1,-3,F,39", ",,,,,,", "III,1,7,0,12,M,80")
    (hospital / "manifest.csv").unlink()
    table = {
        "patient_id": ["P"] * 3, "study_id": ["0", "1", "2"], "split": ["train"] * 3,
        "pneumonia": pyarrow.nulls(3), "effusion": pyarrow.nulls(3), "grade": pyarrow.nulls(3),
        "stage": pyarrow.array(["II", None, "III"]).dictionary_encode(), "risk": [2.5, None, 1.0], "time": [40, None, 7],
        "event": [True, None, False], "day": [-3.0, float("nan"), 12.0], "sex": ["F", None, "M"], "age": [39, None, 80],
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(table), hospital / "manifest.parquet")
    assert read_manifest(hospital, EVERY) == (studies, [])


def test_no_problem_of_a_further_cell_repeats_its_value(hospital: Path) -> None:
    secret = "Wolkenstein"
    write_manifest(hospital, f"P,1,,,,train,{','.join([secret] * 7)}", header=EVERY_HEADER)
    problems = read_manifest(hospital, EVERY)[1]
    assert [p.column for p in problems] == ["stage", "risk", "time", "event", "day"]
    assert secret not in repr(problems)


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


@given(cells=st.lists(st.text(max_size=12) | st.floats().map(str), min_size=7, max_size=7))
def test_no_further_cells_make_the_reader_raise_or_give_what_a_float32_cannot_hold(cells: list[str]) -> None:
    row = dict(zip(EVERY_HEADER.split(",")[6:], cells, strict=True))
    for reader in (*(partial(further, name, row, EVERY) for name in EVERY.further), partial(number, cells[4])):
        try:
            value = reader()
        except BadCell:
            continue
        assert value is None or abs(value) <= 1e9
    assert age_band(cells[6]) in ("", "0-17", "18-39", "40-59", "60-79", "80+")
    assert len(sex(cells[5])) <= 16


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
