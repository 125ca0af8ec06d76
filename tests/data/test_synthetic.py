"""Synthetic hospitals: deterministic, valid, different from one another, each modality tells a part."""

from __future__ import annotations

import csv
import json
import math
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import soundfile
from PIL import Image
from scipy.stats import spearmanr

from fedmm.config import load_site
from fedmm.data import synthetic
from fedmm.data.check import check_hospital
from fedmm.data.synthetic import synthesize
from fedmm.data.synthetic_people import FURTHER, course
from fedmm.data.synthetic_policy import policy
from fedmm.errors import ConfigError
from fedmm.schema import MODALITIES, SPLITS, Labels

PATIENTS = 40


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return synthesize(tmp_path_factory.mktemp("synth"), patients=PATIENTS)


def rows_of(hospital: Path) -> list[dict[str, str]]:
    with (hospital / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def grey(path: Path) -> np.ndarray:
    """Pixels in [0, 1] as a radiologist sees them."""
    if path.suffix != ".dcm":
        with Image.open(path) as picture:
            return np.asarray(picture, dtype=float) / 255
    data = pydicom.dcmread(path)
    shown = np.clip((data.pixel_array - float(data.WindowCenter)) / float(data.WindowWidth) + 0.5, 0, 1)
    return 1 - shown if data.PhotometricInterpretation == "MONOCHROME1" else shown


def auroc(scores: list[float], truths: list[bool]) -> float:
    score, truth = np.array(scores), np.array(truths)
    difference = score[truth][:, None] - score[~truth][None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def is_informative(
    hospitals: list[Path], modality: str, label: str, positive: str, reader: Callable[[Path], float]
) -> bool:
    """Is one hand-made feature above chance over all hospitals, with each hospital's mean taken off?

    False-alarm rate for a feature without signal: below 1e-4. The AUROC of n independent studies, a share p positive,
    spreads by sqrt(1 / (12 n p (1 - p))). A patient's studies may be copies of one another, so n counts patients, and
    unequal numbers of studies widen that by 1.14 = sqrt(1 + cv^2); 4.5 spreads are then at least 3.9. The seed is
    fixed: the test never flickers, the rate is that of a generator that has lost its signal.
    """
    scores, truths, patients = [], [], set()
    for hospital in hospitals:
        rows = [row for row in rows_of(hospital) if row[modality] and row[label]]
        values = np.array([reader(hospital / row[modality]) for row in rows])
        scores += (values - values.mean()).tolist()
        truths += [row[label] == positive for row in rows]
        patients |= {row["patient_id"] for row in rows}
    p = sum(truths) / len(truths)
    return auroc(scores, truths) > 0.5 + 4.5 * math.sqrt(1 / (12 * len(patients) * p * (1 - p)))


# --- determinism ------------------------------------------------------------------------------------------------------


def test_two_calls_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        synthesize(tmp_path / name, count=4, patients=3, seed=11)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert len(content(tmp_path / "a")) > 4 * 3


def test_another_seed_writes_other_hospitals(tmp_path: Path) -> None:
    one, two = (content(synthesize(tmp_path / str(seed), count=1, patients=3, seed=seed)[0]) for seed in (1, 2))
    assert one["manifest.csv"] != two["manifest.csv"]


def test_growing_the_count_leaves_earlier_hospitals_as_they_are(tmp_path: Path) -> None:
    before = content(synthesize(tmp_path / "a", count=2, patients=3)[1])
    synthesize(tmp_path / "b", count=5, patients=3)
    assert content(tmp_path / "b" / "hospital_2") == before
    synthesize(tmp_path / "a", count=5, patients=3)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_missing_decides_which_files_exist_and_not_what_is_in_them(tmp_path: Path) -> None:
    full, sparse = (
        content(synthesize(tmp_path / str(missing), count=1, patients=8, missing=missing)[0]) for missing in (0.0, 0.6)
    )
    kept = {name for name in sparse if "/" in name}
    assert kept < {name for name in full if "/" in name}
    assert all(full[name] == sparse[name] for name in kept)


# --- what is written --------------------------------------------------------------------------------------------------


def test_manifest_rows_are_valid(hospitals: list[Path]) -> None:
    studies = []
    for hospital in hospitals:
        rows = rows_of(hospital)
        assert tuple(rows[0]) == synthetic.COLUMNS
        for row in rows:
            studies.append(row["study_id"])
            assert row["split"] in SPLITS
            assert {row[name] for name in synthetic.FINDINGS} <= {"0", "1", ""}
            assert row["severity"] in (*synthetic.SEVERITY, "")
            assert any(row[m] for m in MODALITIES)
        named = {row[m] for row in rows for m in MODALITIES if row[m]}
        assert named == {name for name in content(hospital) if "/" in name}
    assert len(set(studies)) == len(studies)


def test_every_hospital_passes_the_check(tmp_path: Path) -> None:
    for hospital in synthesize(tmp_path, patients=3):
        assert check_hospital(hospital).problems == ()


def test_site_policy_is_a_research_policy_that_says_the_data_is_invented(hospitals: list[Path]) -> None:
    for number, hospital in enumerate(hospitals, start=1):
        site = load_site(hospital)
        assert site.hospital.name == hospital.name == f"hospital_{number}"
        assert site.labels.columns == (*synthetic.FINDINGS, "severity")
        assert site.labels.class_values == synthetic.SEVERITY
        assert (site.privacy.epsilon, site.privacy.delta, site.privacy.public_patients) == (20.0, 1e-4, PATIENTS)
        assert site.privacy.allow_not_private
        assert (site.release.counts, site.release.metrics) == ("declared", "exact")
        assert "holds no real patient" in (hospital / "site.toml").read_text(encoding="utf-8")


def test_policy_of_a_large_hospital_keeps_delta_small_enough() -> None:
    settings = tomllib.loads(policy("hospital_1", 100_000, further=Labels()))
    assert settings["privacy"]["delta"] < 1 / (10 * settings["privacy"]["public_patients"])


def test_patients_have_one_to_five_studies_and_one_split(hospitals: list[Path]) -> None:
    counts: dict[str, int] = defaultdict(int)
    for hospital in hospitals:
        splits = defaultdict(set)
        for row in rows_of(hospital):
            splits[row["patient_id"]].add(row["split"])
            counts[row["patient_id"]] += 1
        assert all(len(found) == 1 for found in splits.values())
        assert sum(found == {"train"} for found in splits.values()) == round(0.7 * PATIENTS)
        assert len(splits) == PATIENTS
    assert set(counts.values()) == {1, 2, 3, 4, 5}


def test_formats_are_those_of_the_four_scanners_and_recorders(hospitals: list[Path]) -> None:
    images = [sorted((hospital / "image").iterdir()) for hospital in hospitals]
    assert [{p.suffix for p in paths} for paths in images] == [{".png"}, {".dcm"}, {".dcm"}, {".jpg"}]
    for number, kind in ((0, "PNG"), (3, "JPEG")):
        with Image.open(images[number][0]) as picture:
            assert picture.format == kind
    sounds = [sorted((hospital / "audio").iterdir())[0] for hospital in hospitals]
    assert [soundfile.info(p).samplerate for p in sounds] == [8000, 16000, 22050, 44100]
    assert [soundfile.info(p).format for p in sounds] == ["WAV", "WAV", "FLAC", "WAV"]
    for path in sounds:
        samples, rate = soundfile.read(path)
        assert 2 <= len(samples) / rate <= 3
        assert 0.01 < samples.std() < 0.5


def test_dicom_files_are_valid_radiographs_with_invented_identifiers(hospitals: list[Path]) -> None:
    for hospital, kind in ((hospitals[1], "MONOCHROME2"), (hospitals[2], "MONOCHROME1")):
        paths = sorted((hospital / "image").iterdir())
        files = [pydicom.dcmread(path) for path in paths]
        for path, data in zip(paths, files, strict=True):
            assert data.SOPClassUID == pydicom.uid.ComputedRadiographyImageStorage
            assert data.file_meta.MediaStorageSOPInstanceUID == data.SOPInstanceUID
            assert (data.PhotometricInterpretation, data.BitsStored) == (kind, 12)
            assert path.name.startswith(data.PatientID)
            assert data.PatientName
            assert all(len(str(spacing)) <= 16 for spacing in data.PixelSpacing)  # what a decimal string may hold
            assert data.pixel_array.max() < 2**12
        assert len({data.SOPInstanceUID for data in files}) == len(files)
        names = defaultdict(set)
        for data in files:
            names[data.PatientID].add((str(data.PatientName), data.PatientBirthDate))
        assert all(len(found) == 1 for found in names.values())


def test_every_scanner_shows_dense_tissue_bright(hospitals: list[Path]) -> None:
    for hospital in hospitals:
        for path in sorted((hospital / "image").iterdir())[:5]:
            picture = grey(path)
            height, width = picture.shape
            belly = picture[int(0.9 * height) :, int(0.4 * width) : int(0.6 * width)]
            lung = picture[int(0.35 * height) : int(0.5 * height), int(0.2 * width) : int(0.35 * width)]
            assert belly.mean() > lung.mean() + 0.2
            assert 192 <= min(height, width) <= max(height, width) <= 320


def test_each_hospital_misses_another_modality_most_often(hospitals: list[Path]) -> None:
    # Expected rates are 0.48 against at most 0.27, of about 100 studies: another order by chance is below 2e-3.
    most_missing = []
    for hospital in hospitals[:3]:
        rows = rows_of(hospital)
        most_missing.append(max(MODALITIES, key=lambda m: sum(not row[m] for row in rows)))
    assert most_missing == ["audio", "image", "report"]


def test_nothing_is_missing_when_told_so(tmp_path: Path) -> None:
    rows = rows_of(synthesize(tmp_path, count=1, patients=5, missing=0)[0])
    assert all(row[m] for row in rows for m in MODALITIES)


def test_a_few_labels_are_missing(hospitals: list[Path]) -> None:
    cells = [row[c] for h in hospitals for row in rows_of(h) for c in (*synthetic.FINDINGS, "severity")]
    assert 0.01 < cells.count("") / len(cells) < 0.06  # 0.03 expected of some 1,600: six spreads


def test_reports_negate_and_differ_in_style_and_never_state_severity(hospitals: list[Path]) -> None:
    openings = set()
    for hospital in hospitals:
        reports = [path.read_text(encoding="utf-8") for path in sorted((hospital / "report").iterdir())]
        everything = "\n".join(reports).lower()
        assert re.search(r"\b(no|without evidence of) (pleural effusion|consolidation|cardiomegaly)", everything)
        assert "without evidence of" in everything
        assert not re.search(r"mild|severe|severity|moderate", everything)
        openings.add(reports[0][:4])
    assert len(openings) == len(hospitals)


# --- who they are, when they come, what becomes of them ---------------------------------------------------------------


def test_every_patient_has_a_sex_an_age_and_days_that_agree_with_the_dicom_files(hospitals: list[Path]) -> None:
    for hospital in hospitals:
        of_patient: dict[str, list[dict[str, str]]] = defaultdict(list)
        for row in rows_of(hospital):
            of_patient[row["patient_id"]].append(row)
            if row["image"].endswith(".dcm"):
                data = pydicom.dcmread(hospital / row["image"], stop_before_pixels=True)
                assert data.PatientSex == row["sex"]
                born = int(data.PatientBirthDate[:4])
                assert int(row["age"]) == 2016 - born + int(row["day"]) // 365
        for rows in of_patient.values():
            days = [int(row["day"]) for row in rows]
            assert days[0] == 0
            assert days == sorted(set(days))
            assert len({row["sex"] for row in rows}) == 1
    assert {row["sex"] for hospital in hospitals for row in rows_of(hospital)} == {"F", "M"}


def test_the_further_labels_come_on_request_and_change_nothing_else(tmp_path: Path) -> None:
    plain, every = (
        synthesize(tmp_path / labels, count=1, patients=12, labels=labels)[0] for labels in synthetic.LABELS
    )
    before, after = content(plain), content(every)
    assert set(before) == set(after)
    assert {name for name in before if before[name] != after[name]} == {"manifest.csv", "site.toml", synthetic.STAMP}
    for row, more in zip(rows_of(plain), rows_of(every), strict=True):
        assert {name: more[name] for name in row} == row
        assert set(more) - set(row) == set(FURTHER.columns)
    assert check_hospital(every).problems == ()
    found = load_site(every).labels
    assert found.further == ("stage", "risk", "time", "event")
    assert found.model_copy(update=Labels().model_dump(exclude={"findings", "class_name", "class_values"})) == (
        load_site(plain).labels
    )


def test_a_stage_a_risk_and_a_time_follow_from_the_same_disease(tmp_path: Path) -> None:
    """Rank correlation with the burden over 400 patients' last studies: 0.15 by chance is three spreads, 1.4e-3."""
    last: dict[str, dict[str, str]] = {}
    for patient in range(400):
        burden_S = [patient % 6] * (1 + patient % 3)
        last |= {str(patient): course(7, f"P{patient}", burden_S, missing=0.0)[-1] | {"burden": str(burden_S[-1])}}
    rows = list(last.values())
    burden = [int(row["burden"]) for row in rows]
    stage = [FURTHER.ordinal_levels.index(row["stage"]) for row in rows]
    assert spearmanr(burden, stage).statistic > 0.8
    assert spearmanr(burden, [float(row["risk"]) for row in rows]).statistic > 0.8
    events = [row for row in rows if row["event"] == "1"]
    assert 0.3 < len(events) / len(rows) < 0.7
    times, of_events = [int(row["time"]) for row in events], [int(row["burden"]) for row in events]
    assert spearmanr(of_events, times).statistic < -0.15
    assert all(
        any(low < time <= high for time in times)
        for low, high in zip((0, 90, 180, 365), (90, 180, 365, 730), strict=True)
    )
    assert set(stage) == {0, 1, 2, 3}


def test_an_event_is_one_day_in_a_patients_life() -> None:
    for patient in range(20):
        rows = course(7, f"P{patient}", [2, 3, 1, 4], missing=0.0)
        assert len({int(row["day"]) + int(row["time"]) for row in rows}) <= 2  # rounded
        assert len({row["event"] for row in rows}) == 1


def test_the_sicker_come_again_sooner() -> None:
    gaps = {
        burden: np.mean([int(course(7, f"P{p}", [burden, 0], missing=0.0)[1]["day"]) for p in range(300)])
        for burden in (0, 5)
    }
    assert gaps[0] > 3 * gaps[5]  # 6 expected; a mean of 300 exponentials spreads by 6 %


def test_unknown_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="labels"):
        synthesize(tmp_path / "new", labels="some")
    assert not (tmp_path / "new").exists()


# --- every modality tells a part --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "box"), [("effusion", (0.58, 0.7, 0.18, 0.35)), ("cardiomegaly", (0.5, 0.7, 0.6, 0.72))]
)
def test_the_image_shows(hospitals: list[Path], label: str, box: tuple[float, float, float, float]) -> None:
    def brightness(path: Path) -> float:
        picture = grey(path)
        (h, w), (top, bottom, left, right) = picture.shape, box
        return float(picture[int(top * h) : int(bottom * h), int(left * w) : int(right * w)].mean() / picture.mean())

    assert is_informative(hospitals, "image", label, "1", brightness)


@pytest.mark.parametrize("label", synthetic.FINDINGS)
def test_the_report_mentions(hospitals: list[Path], label: str) -> None:
    yes, no = {
        "effusion": ("layering", "pleural effusion"),
        "consolidation": ("airspace", "consolidation"),
        "cardiomegaly": ("enlarged", "cardiomegaly"),
    }[label]

    def affirmed(path: Path) -> float:
        text = path.read_text(encoding="utf-8").lower()
        return 1.0 if yes in text else -1.0 if re.search(rf"\b(no|of|for) {no}|{no} is absent", text) else 0.0

    assert is_informative(hospitals, "report", label, "1", affirmed)


@pytest.mark.parametrize(
    ("label", "value", "low", "high"), [("consolidation", "1", 1500, 2300), ("severity", "severe", 470, 570)]
)
def test_the_sound_carries(hospitals: list[Path], label: str, value: str, low: int, high: int) -> None:
    def energy(path: Path) -> float:
        samples, rate = soundfile.read(path)
        power, frequency = np.abs(np.fft.rfft(samples)) ** 2, np.fft.rfftfreq(len(samples), 1 / rate)
        return float(np.log(power[(frequency > low) & (frequency < high)].mean()))

    assert is_informative(hospitals, "audio", label, value, energy)


# --- folders that exist, and arguments --------------------------------------------------------------------------------


def test_a_second_call_leaves_the_folder_and_its_ledger(tmp_path: Path) -> None:
    folder = synthesize(tmp_path, count=1, patients=2)[0]
    (folder / "ledger.sqlite").write_bytes(b"spent")
    (folder / "site.toml").write_text("stricter", encoding="utf-8")
    before = content(tmp_path)
    seen: list[tuple[int, int]] = []
    assert synthesize(tmp_path, count=1, patients=2, progress=lambda done, of: seen.append((done, of))) == [folder]
    assert content(tmp_path) == before
    assert seen == [(2, 2)]


@pytest.mark.parametrize(
    "change", [{"patients": 3}, {"seed": 8}, {"missing": 0.1}, {"labels": "all"}, {"count": 1}, {"count": 10}]
)
def test_other_parameters_are_refused_and_change_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    synthesize(tmp_path, count=2, patients=2)
    before = content(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        synthesize(tmp_path, **{"count": 2, "patients": 2} | change)  # type: ignore[arg-type]
    assert refusal.value.fix
    assert content(tmp_path) == before


def test_a_folder_of_somebody_else_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "hospital_2").mkdir()
    (tmp_path / "hospital_2" / "manifest.csv").write_text("patient_id\n", encoding="utf-8")
    before = content(tmp_path)
    with pytest.raises(ConfigError, match="hospital_2"):
        synthesize(tmp_path, count=2, patients=2)
    assert content(tmp_path) == before
    assert not (tmp_path / "hospital_1").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be made"):
        synthesize(tmp_path / "file", count=1, patients=1)


def test_an_interrupted_hospital_does_not_look_complete_and_is_rewritten(tmp_path: Path) -> None:
    def stop(done: int, of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "a", count=1, patients=4, progress=stop)
    names = set(content(tmp_path / "a" / "hospital_1"))
    assert not {"manifest.csv", "site.toml", synthetic.STAMP} & names
    synthesize(tmp_path / "a", count=1, patients=4)
    synthesize(tmp_path / "b", count=1, patients=4)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_the_stamp_holds_the_parameters(hospitals: list[Path]) -> None:
    stamp = json.loads((hospitals[2] / synthetic.STAMP).read_text(encoding="utf-8"))
    assert (stamp["hospital"], stamp["patients"], stamp["seed"], stamp["missing"]) == (3, PATIENTS, 7, 0.3)


def test_progress_counts_patients_up_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    synthesize(tmp_path, count=2, patients=2, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_one_patient_is_enough(tmp_path: Path) -> None:
    rows = rows_of(synthesize(tmp_path, count=1, patients=1)[0])
    assert {row["split"] for row in rows} == {"train"}


def test_names_are_padded_when_there_are_more_than_nine(tmp_path: Path) -> None:
    names = [folder.name for folder in synthesize(tmp_path, count=10, patients=1)]
    assert names[0] == "hospital_01"
    assert names == sorted(names)


@pytest.mark.parametrize(
    "argument",
    [
        {"count": 0},
        {"count": 1001},
        {"patients": 0},
        {"patients": 100_001},
        {"missing": -0.1},
        {"missing": 0.91},
        {"missing": math.nan},
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, argument: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(argument))) as refusal:
        synthesize(tmp_path / "new", **argument)  # type: ignore[arg-type]
    assert "between" in refusal.value.fix
    assert not (tmp_path / "new").exists()
