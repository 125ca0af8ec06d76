from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmm.config import DataConfig
from fedmm.data import check
from fedmm.data.check import check_hospital
from fedmm.data.dataset import HospitalData, load_hospital, study_batch
from fedmm.errors import ConfigError, HospitalInvalid
from fedmm.schema import MODALITIES, Batch, InputSpec, Labels
from tests.data.conftest import LABELS, ROWS, tensors, write_manifest

SPEC = InputSpec(image_size=16, report_tokens=16, audio_seconds=0.2, audio_mels=8)


def patients_of(counts: list[int]) -> HospitalData:
    """A hospital whose patient p has counts[p] studies; the first pixel of a study is its number."""
    studies = sum(counts)
    inputs = {"image": torch.arange(studies, dtype=torch.float32).reshape(-1, 1, 1, 1)}
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    return HospitalData(
        name="made",
        labels=Labels(findings=("x",)),
        spec=SPEC,
        inputs=inputs,
        seen_SM=torch.ones(studies, 3, dtype=torch.bool),
        finding_SF=torch.zeros(studies, 1),
        class_S=torch.full((studies,), -1),
        patient_S=owner,
        train_S=torch.ones(studies, dtype=torch.bool),
        further_SK=torch.zeros(studies, 0),
        day_S=torch.full((studies,), torch.nan),
        group_S={},
        key_P=tuple(range(100, 100 + len(counts))),
    )


def numbers(batch: Batch) -> list[int]:
    return [int(value) for value in batch.inputs["image"].flatten()]


def test_groups_of_a_cohort_are_in_the_order_of_its_batches() -> None:
    """Studies of two patients alternate in the manifest, one patient is in the other split."""
    data = replace(
        patients_of([3, 1, 2]),
        patient_S=torch.tensor([0, 1, 0, 2, 0, 1]),
        train_S=torch.tensor([True, True, True, False, True, True]),
        group_S={"sex": ("a0", "b1", "a2", "c3", "a4", "b5")},
    )
    cohort = data.cohort("train")
    in_order = [study for batch in cohort.physical(range(2), limit=1) for study in numbers(batch)]
    assert in_order == [0, 2, 4, 1, 5]
    assert cohort.groups == {"sex": tuple(data.group_S["sex"][study] for study in in_order)}


# --- from a folder ----------------------------------------------------------------------------------------------------


def test_further_labels_days_and_groups_become_columns(hospital: Path) -> None:
    site = (hospital / "site.toml").read_text(encoding="utf-8")
    lines = """[labels]
ordinal_name = "stage"
ordinal_levels = ["I", "II", "III"]
value_name = "risk"
time_name = "time"
event_name = "event"
time_edges = [30.0, 90.0]
"""
    (hospital / "site.toml").write_text(site.replace("[labels]\n", lines), encoding="utf-8")
    header = "patient_id,study_id,split,pneumonia,effusion,grade,risk,stage,event,time,day,sex,age"
    rows = ("P,1,train,,,,0.5,III,1,40,0,F,39", "P,2,train,,,,,,,,,,", "Q,1a,test,1,,,2,I,0,7.5,12,m,80")
    write_manifest(hospital, *rows, header=header)
    data = load_hospital(hospital, SPEC)
    assert data.labels.further == ("stage", "risk", "time", "event")
    nan = float("nan")
    expected = torch.tensor([[2, 0.5, 40, 1], [nan, nan, nan, nan], [0, 1.0, 7.5, 0]])
    torch.testing.assert_close(data.further_SK, expected, equal_nan=True)
    torch.testing.assert_close(data.day_S, torch.tensor([0, nan, 12]), equal_nan=True)
    assert data.group_S == {"sex": ("F", "", "M"), "age": ("18-39", "", "80+")}
    batch = data.cohort("all").batch([1, 0])
    torch.testing.assert_close(batch.further_BK, expected[[2, 0, 1]], equal_nan=True)
    torch.testing.assert_close(batch.day_B, torch.tensor([12, 0, nan]), equal_nan=True)


def test_a_folder_becomes_tensors_in_the_order_of_the_manifest(hospital: Path) -> None:
    data = load_hospital(hospital, SPEC)
    assert data.name == "north"
    assert {name: tuple(value.shape[1:]) for name, value in tensors(data).items()} == SPEC.shapes
    assert tensors(data)["report"].dtype == torch.int64
    assert data.seen_SM.int().tolist() == [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]]
    assert data.patient_S.tolist() == [0, 0, 0, 1, 2, 2]
    assert data.class_S.tolist() == [1, 2, -1, 0, 0, -1]
    expected = [[1, 0], [1, -1], [-1, -1], [0, 1], [0, -1], [1, 1]]
    assert data.finding_SF.nan_to_num(nan=-1).tolist() == expected
    for axis, name in enumerate(MODALITIES):
        assert tensors(data)[name][data.seen_SM[:, axis]].any()
        assert not tensors(data)[name][~data.seen_SM[:, axis]].any()


def test_cohorts_hold_whole_patients_of_their_split(hospital: Path) -> None:
    data = load_hospital(hospital, SPEC)
    sizes = {split: (data.cohort(split).patients, data.cohort(split).studies) for split in ("train", "test", "all")}
    assert sizes == {"train": (2, 4), "test": (1, 2), "all": (3, 6)}
    batch = data.cohort("test").batch([0])
    assert batch.finding_BF[1].tolist() == [1, 1]
    with pytest.raises(ValueError, match="split must be"):
        data.cohort("eval")


def test_no_patient_can_be_found_in_what_is_kept_in_memory(hospital: Path) -> None:
    data = load_hospital(hospital, SPEC)
    for shown in (repr(data), str(data), repr(data.cohort("all"))):
        assert "Anna" not in shown
        assert len(shown) < 100
    held = repr([getattr(data, part.name) for part in fields(data)]) + repr(vars(data.cohort("all")))
    assert "Anna" not in held
    assert "a.png" not in held


def test_a_folder_that_fails_the_check_is_refused_with_the_same_list(hospital: Path) -> None:
    (hospital / "a.txt").write_bytes(b"\xff")
    write_manifest(hospital, *ROWS, "Dora,d1,gone.png,a.txt,,,,,train")
    with pytest.raises(HospitalInvalid) as caught:
        load_hospital(hospital, SPEC)
    assert caught.value.problems == check_hospital(hospital, SPEC).problems
    assert [problem.row for problem in caught.value.problems] == [2, 4, 7, 8, 8]
    assert "Anna" not in str(caught.value)
    assert caught.value.public_text == "HOSPITAL_INVALID: the hospital folder fails its own check"


def test_a_broken_file_alone_is_refused_too(hospital: Path) -> None:
    (hospital / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(HospitalInvalid) as caught:
        load_hospital(hospital, SPEC)
    assert {problem.code for problem in caught.value.problems} == {"broken_audio"}


@pytest.mark.parametrize("damage", ["no policy", "no rows"])
def test_without_a_policy_or_studies_there_is_no_hospital(hospital: Path, damage: str) -> None:
    if damage == "no policy":
        (hospital / "site.toml").unlink()
    else:
        write_manifest(hospital)
    with pytest.raises(HospitalInvalid) as caught:
        load_hospital(hospital, SPEC)
    assert caught.value.problems[0].code == ("bad_policy" if damage == "no policy" else "no_studies")


def test_a_hospital_without_audio_and_with_one_class_and_one_patient_loads(hospital: Path) -> None:
    write_manifest(
        hospital,
        "Anna,1,a.png,,1,0,mild,train",
        header="patient_id,study_id,image,report,pneumonia,effusion,grade,split",
    )
    data = load_hospital(hospital, SPEC)
    assert data.seen_SM.tolist() == [[True, False, False]]
    assert data.cohort("test").patients == 0
    assert data.cohort("test").batch([]).studies == 0


def test_files_are_decoded_once_until_one_of_them_changes(hospital: Path) -> None:
    seen: list[tuple[int, int]] = []

    def load(spec: InputSpec = SPEC) -> HospitalData:
        return load_hospital(hospital, spec, progress=lambda done, total: seen.append((done, total)))

    first = load()
    before = tensors(first)
    assert seen == [(done, 6) for done in range(1, 7)]
    with mock.patch.object(check, "READERS", {}):  # decoding anything would be a KeyError
        assert load() is first
    changed = os.stat(hospital / "a.txt")
    (hospital / "a.txt").write_text("Bn effusion. Heart is normal.", encoding="utf-8")  # as long as before
    os.utime(hospital / "a.txt", ns=(changed.st_atime_ns, changed.st_mtime_ns))  # and as old
    assert not torch.equal(tensors(load())["report"], before["report"])
    (hospital / "manifest.csv").write_text((hospital / "manifest.csv").read_text().replace("mild", "none"))
    assert load().class_S[0] == 0
    assert load(SPEC.model_copy(update={"image_size": 32})).cohort("all").batch([0]).inputs["image"].shape[-1] == 32
    (hospital / "a.wav").unlink()
    with pytest.raises(HospitalInvalid):
        load()


def test_a_run_config_is_an_input_spec(hospital: Path) -> None:
    spec = DataConfig(**SPEC.model_dump(), hospitals="anything")
    assert load_hospital(hospital, spec) is load_hospital(hospital, SPEC)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_holds_all_studies_of_its_patients_in_the_order_asked() -> None:
    batch = patients_of([1, 3, 2]).cohort("all").batch([2, 1])
    assert numbers(batch) == [4, 5, 1, 2, 3]
    assert batch.patient_B.tolist() == [0, 0, 1, 1, 1]
    assert batch.patients == 2
    assert batch.patient_B.dtype == torch.int64


def test_no_patients_give_a_batch_of_zero_studies_with_the_right_shapes(hospital: Path) -> None:
    batch = load_hospital(hospital, SPEC).cohort("train").batch([], max_studies=2, rng=np.random.default_rng(1))
    assert (batch.studies, batch.patients) == (0, 0)
    assert {name: tuple(value.shape) for name, value in batch.inputs.items()} == {
        name: (0, *shape) for name, shape in SPEC.shapes.items()
    }
    assert batch.finding_BF.shape == (0, 2)
    assert batch.seen_BM.shape == (0, 3)
    assert batch.class_B.shape == batch.patient_B.shape == (0,)


@pytest.mark.parametrize("patients", [[3], [-1], [0, 0]])
def test_a_patient_who_is_unknown_or_there_twice_is_refused(patients: list[int]) -> None:
    cohort = patients_of([1, 1, 1]).cohort("all")
    with pytest.raises(ValueError, match="patient"):
        cohort.batch(patients)
    with pytest.raises(ValueError, match="patient"):
        cohort.physical(patients, limit=1)


def test_a_cap_without_a_generator_and_a_limit_of_zero_are_refused() -> None:
    cohort = patients_of([1]).cohort("all")
    with pytest.raises(ValueError, match="rng"):
        cohort.batch([0], max_studies=2)
    with pytest.raises(ValueError, match="max_studies"):
        cohort.batch([0], max_studies=0, rng=np.random.default_rng(1))
    with pytest.raises(ValueError, match="limit"):
        cohort.physical([0], limit=0)


def test_every_study_of_a_patient_is_drawn_equally_often() -> None:
    # 2,000 draws of 2 of 5: each study is expected 800 times, deviation 22; 5 deviations: false alarm below 1e-5.
    cohort, rng = patients_of([5]).cohort("all"), np.random.default_rng(1)
    counts = np.bincount([n for _ in range(2000) for n in numbers(cohort.batch([0], max_studies=2, rng=rng))])
    assert np.abs(counts - 800).max() < 110
    assert counts.sum() == 4000


def test_a_patients_draw_does_not_depend_on_who_else_is_there() -> None:
    # The unit of privacy is the patient: adding one may not change what the others contribute, even with a known seed.
    both, alone = patients_of([6, 7]), patients_of([6])
    rng_both, rng_alone = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(5):
        first = both.cohort("all").batch([1, 0], max_studies=3, rng=rng_both)
        second = alone.cohort("all").batch([0], max_studies=3, rng=rng_alone)
        assert numbers(first)[3:] == numbers(second)


@given(
    counts=st.lists(st.integers(1, 6), max_size=12),
    limit=st.integers(1, 15),
    cap=st.none() | st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_physical_batches_together_are_the_batch(counts: list[int], limit: int, cap: int | None, seed: int) -> None:
    cohort = patients_of(counts).cohort("all")
    order = np.random.default_rng(seed).permutation(len(counts)).tolist()
    whole = cohort.batch(order, max_studies=cap, rng=np.random.default_rng(seed))
    parts = list(cohort.physical(order, limit=limit, max_studies=cap, rng=np.random.default_rng(seed)))
    assert [number for part in parts for number in numbers(part)] == numbers(whole)
    assert sum(part.patients for part in parts) == whole.patients == len(counts)
    shifts = np.cumsum([0, *(part.patients for part in parts)])
    owners = [int(p) + int(shift) for part, shift in zip(parts, shifts, strict=False) for p in part.patient_B]
    assert owners == whole.patient_B.tolist()
    assert all(part.studies <= limit or part.patients == 1 for part in parts)
    assert all(part.patients >= 1 for part in parts)


# --- one study as unit ------------------------------------------------------------------------------------------------


@given(counts=st.lists(st.integers(1, 6), max_size=8), most=st.integers(1, 7), seed=st.integers(0, 100))
def test_records_are_units_of_one_study_at_most_so_many_of_a_patient(counts: list[int], most: int, seed: int) -> None:
    cohort = patients_of(counts).cohort("all")
    view = cohort.records(most, np.random.default_rng(seed))
    assert view.patients == view.studies == sum(min(count, most) for count in counts)
    batch = view.batch(range(view.patients))
    assert batch.patient_B.tolist() == list(range(view.patients))
    owner = np.repeat(np.arange(len(counts)), counts)
    drawn = np.bincount(owner[numbers(batch)], minlength=len(counts)) if counts else np.zeros(0)
    assert drawn.tolist() == [min(count, most) for count in counts]
    assert len(set(numbers(batch))) == view.patients
    assert cohort.patients == len(counts), "the cohort itself stays as it was"


def test_the_records_of_a_patient_do_not_depend_on_who_else_is_there() -> None:
    both, alone = patients_of([6, 7]).cohort("all"), patients_of([6]).cohort("all")
    rng_both, rng_alone = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(5):
        first, second = both.records(3, rng_both), alone.records(3, rng_alone)
        assert numbers(first.batch(range(3))) == numbers(second.batch(range(3)))


def test_every_study_is_drawn_as_a_record_equally_often() -> None:
    # 2,000 draws of 2 of 5, as above: false alarm below 1e-5.
    cohort, rng = patients_of([5]).cohort("all"), np.random.default_rng(1)
    counts = np.bincount([n for _ in range(2000) for n in numbers(cohort.records(2, rng).batch([0, 1]))])
    assert np.abs(counts - 800).max() < 110


def test_no_records_are_drawn_without_a_cap() -> None:
    with pytest.raises(ValueError, match="max_studies"):
        patients_of([1]).cohort("all").records(0, np.random.default_rng(1))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(limit=st.integers(1, 8), cap=st.none() | st.integers(1, 4))
def test_physical_batches_of_a_real_folder_carry_everything(hospital: Path, limit: int, cap: int | None) -> None:
    cohort = load_hospital(hospital, SPEC).cohort("all")
    whole = cohort.batch([2, 0, 1], max_studies=cap, rng=np.random.default_rng(3))
    parts = list(cohort.physical([2, 0, 1], limit=limit, max_studies=cap, rng=np.random.default_rng(3)))
    for name in ("seen_BM", "finding_BF", "class_B"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined.nan_to_num(nan=9), getattr(whole, name).nan_to_num(nan=9))
    for name in MODALITIES:
        assert torch.equal(torch.cat([part.inputs[name] for part in parts]), whole.inputs[name])


# --- one study --------------------------------------------------------------------------------------------------------


def test_loose_files_become_the_study_that_the_folder_gives(hospital: Path) -> None:
    whole = load_hospital(hospital, SPEC).cohort("all").batch([0])
    files = {"image": hospital / "a.png", "report": hospital / "a.txt", "audio": hospital / "a.wav"}
    batch = study_batch(SPEC, LABELS, files)
    for name in MODALITIES:
        assert torch.equal(batch.inputs[name][0], whole.inputs[name][0])
    assert batch.seen_BM.tolist() == [[True, True, True]]
    assert batch.finding_BF.isnan().all()
    assert batch.finding_BF.shape == (1, 2)
    assert (batch.class_B.tolist(), batch.patient_B.tolist(), batch.patients) == ([-1], [0], 1)


def test_no_file_at_all_is_a_study_with_nothing_seen() -> None:
    batch = study_batch(SPEC, LABELS, {})
    assert batch.seen_BM.tolist() == [[False, False, False]]
    assert not any(value.any() for value in batch.inputs.values())


@pytest.mark.parametrize("name", MODALITIES)
def test_a_missing_or_broken_loose_file_is_named(tmp_path: Path, name: str) -> None:
    files = {name: tmp_path / "Anna"}
    with pytest.raises(ConfigError, match=f"the {name} file") as caught:
        study_batch(SPEC, LABELS, files)
    (tmp_path / "Anna").write_bytes(b"\xff\0junk")
    with pytest.raises(ConfigError, match=f"the {name} file") as broken:
        study_batch(SPEC, LABELS, files)
    assert "Anna" not in str(caught.value) + str(broken.value)
