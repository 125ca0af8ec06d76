"""Hospitals with something wrong, or unusual, in them: each has a clear outcome, and nothing of a patient leaves."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import soundfile

import client.gate
import server.app
from fedmm.config import load_site
from fedmm.privacy.ledger import Ledger
from fedmm.report.record import read_rounds
from tests.e2e.conftest import (
    HEADER,
    SECRETS,
    WORD,
    Ran,
    edit_cells,
    failures,
    fedmm,
    leaks,
    policy,
    simulate,
    write_hospital,
)

# --- something is broken ----------------------------------------------------------------------------------------------


def first(hospital: Path, suffix: str) -> Path:
    return sorted(hospital.glob(f"*{suffix}"))[0]


def cut(suffix: str) -> Callable[[Path], None]:
    """The first half of a file, as a full disk leaves it."""

    def damage(hospital: Path) -> None:
        file = first(hospital, suffix)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def scribble(suffix: str) -> Callable[[Path], None]:
    """Bytes of another kind, with a secret in them."""

    def damage(hospital: Path) -> None:
        first(hospital, suffix).write_bytes(b"\xff\xfe\x00" + WORD.encode() * 50 + b"\xff\x00")

    return damage


def silence(hospital: Path) -> None:
    soundfile.write(first(hospital, ".wav"), np.zeros(4000), 8000)


def remove(suffix: str) -> Callable[[Path], None]:
    return lambda hospital: first(hospital, suffix).unlink()


def broken_ledger(hospital: Path) -> None:
    Ledger.open(hospital, load_site(hospital)).close()
    content = bytearray((hospital / "ledger.sqlite").read_bytes())
    content[100:2000] = (WORD.encode() * 200)[:1900]
    (hospital / "ledger.sqlite").write_bytes(content)


def ledger_without_key(hospital: Path) -> None:
    Ledger.open(hospital, load_site(hospital)).close()
    (hospital / "ledger.key").unlink()


def open_ledger(hospital: Path) -> None:
    Ledger.open(hospital, load_site(hospital)).close()
    (hospital / "ledger.key").chmod(0o644)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "png, cut": (cut(".png"), "HOSPITAL_INVALID"),
    "png, other bytes": (scribble(".png"), "HOSPITAL_INVALID"),
    "jpeg, cut": (cut(".jpg"), "HOSPITAL_INVALID"),
    "jpeg, other bytes": (scribble(".jpg"), "HOSPITAL_INVALID"),
    "dicom, cut": (cut(".dcm"), "HOSPITAL_INVALID"),
    "dicom, other bytes": (scribble(".dcm"), "HOSPITAL_INVALID"),
    "report, other bytes": (scribble(".txt"), "HOSPITAL_INVALID"),
    "report, gone": (remove(".txt"), "HOSPITAL_INVALID"),
    "wav, cut": (cut(".wav"), "HOSPITAL_INVALID"),
    "wav, other bytes": (scribble(".wav"), "HOSPITAL_INVALID"),
    "wav, silent": (silence, "HOSPITAL_INVALID"),
    "flac, cut": (cut(".flac"), "HOSPITAL_INVALID"),
    "flac, other bytes": (scribble(".flac"), "HOSPITAL_INVALID"),
    "manifest, other bytes": (scribble("manifest.csv"), "HOSPITAL_INVALID"),
    "manifest, gone": (remove("manifest.csv"), "HOSPITAL_INVALID"),
    "ledger, damaged": (broken_ledger, "LEDGER_UNUSABLE"),
    "ledger, no key": (ledger_without_key, "LEDGER_UNUSABLE"),
    "ledger, key open to all": (open_ledger, "LEDGER_UNUSABLE"),
}


def test_the_search_for_leaks_finds_them_where_they_are(hospitals: Path) -> None:
    assert leaks(hospitals / "middle") == set(SECRETS)


def went_on_without_middle(ran: Ran, run: Path) -> None:
    assert ran.code == 0, ran.said
    assert "Traceback" not in ran.said
    assert (run / "model.safetensors").is_file()
    assert [record["trained"] for record in read_rounds(run)] == [["north", "south"]] * 2
    assert leaks(run, ran.said) == set()


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_goes_on_without_a_hospital_whose_file_is_broken_and_tells_nobody_what_was_in_it(
    hospitals: Path, tmp_path: Path, kind: str
) -> None:
    damage, name = DAMAGE[kind]
    damage(hospitals / "middle")
    ran = simulate(hospitals, tmp_path / "run")
    went_on_without_middle(ran, tmp_path / "run")
    assert f"middle: refused: {name}: " in ran.out
    absent = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["absent"]
    found = failures(tmp_path / "run", "middle") + absent
    assert {failure["kind"] for failure in found} == {"refused"}
    assert all(failure["reason"].startswith(f"{name}: ") for failure in found)
    assert name in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "kind", [kind for kind, (_, name) in DAMAGE.items() if name == "HOSPITAL_INVALID" and kind != "manifest, gone"]
)
def test_check_finds_what_training_refuses_and_prints_no_content(hospitals: Path, kind: str) -> None:
    DAMAGE[kind][0](hospitals / "middle")
    ran = fedmm("check", hospitals / "middle")
    assert ran.code == 1
    assert "fix: " in ran.out
    assert leaks(Path("/nonexistent"), ran.said) == set()


def test_the_hospitals_own_log_has_the_list_of_check_and_has_it_once(hospitals: Path, tmp_path: Path) -> None:
    cut(".png")(hospitals / "middle")
    listed = fedmm("check", hospitals / "middle").out.splitlines()[0]
    client.gate._explain_once.cache_clear()
    ran = simulate(hospitals, tmp_path / "run")
    assert ran.log.count(listed) == 1
    assert listed not in ran.out


def test_a_refusal_is_printed_once_a_round(hospitals: Path, tmp_path: Path) -> None:
    cut(".png")(hospitals / "middle")
    assert simulate(hospitals, tmp_path / "run").out.count("middle: refused: HOSPITAL_INVALID") == 2


def test_a_hospital_that_refuses_before_its_first_step_is_not_charged(hospitals: Path, tmp_path: Path) -> None:
    cut(".png")(hospitals / "middle")
    assert simulate(hospitals, tmp_path / "run").code == 0
    shown = fedmm("ledger", "show", hospitals / "middle", "--format", "json").json
    assert (shown["releases"], shown["reserved"], shown["epsilon"]) == (0, 0, 0)


@pytest.mark.parametrize(
    "how",
    [
        "not TOML",
        "not UTF-8",
        "gone",
        "no ceiling",
        "nan",
        "an unknown line",
        "a wrong value",
    ],
)
def test_a_run_goes_on_without_a_hospital_whose_policy_cannot_be_read(
    hospitals: Path, tmp_path: Path, how: str
) -> None:
    file = hospitals / "middle" / "site.toml"
    good = file.read_text(encoding="utf-8")
    texts = {
        "not TOML": f"{good}\n= {WORD} [[",
        "not UTF-8": "\udcff" + good,
        "an unknown line": f'{good}contact = "{WORD}"\n',
        "a wrong value": good.replace("delta = 1e-4", f'delta = "{WORD}"'),
        "no ceiling": good.replace("epsilon = 20.0\n", ""),
        "nan": good.replace("epsilon = 20.0", "epsilon = nan"),
    }
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(texts[how].encode("utf-8", "surrogateescape"))
    ran = simulate(hospitals, tmp_path / "run")
    went_on_without_middle(ran, tmp_path / "run")
    assert "refused: POLICY_REFUSED: " in ran.out
    absent = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["absent"]
    assert [failure["kind"] for failure in absent] == ["refused"]
    assert absent[0]["reason"].startswith("POLICY_REFUSED: ")
    assert not (hospitals / "middle" / "ledger.sqlite").exists()


def test_a_broken_file_that_appears_during_a_run_costs_the_hospital_only_the_rounds_after_it(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = server.app.append_round

    def damage_after_round_1(folder: Path, record: server.app.RoundRecord) -> None:
        append(folder, record)
        if record.round == 1:
            scribble(".png")(hospitals / "middle")

    monkeypatch.setattr(server.app, "append_round", damage_after_round_1)
    ran = simulate(hospitals, tmp_path / "run")
    assert ran.code == 0
    trained = [record["trained"] for record in read_rounds(tmp_path / "run")]
    assert trained == [["middle", "north", "south"], ["north", "south"]]
    assert leaks(tmp_path / "run", ran.said) == set()


def test_nothing_of_a_patient_is_in_what_healthy_hospitals_give(hospitals: Path, tmp_path: Path) -> None:
    ran = simulate(hospitals, tmp_path / "run")
    assert ran.code == 0
    assert leaks(tmp_path / "run", ran.said) == set()
    one = fedmm("evaluate", tmp_path / "run", hospitals / "north", "--split", "all")
    assert leaks(Path("/nonexistent"), one.said) == set()


# --- nothing is broken, but unusual -----------------------------------------------------------------------------------


def replace(hospitals: Path, **how: int) -> Path:
    """Another hospital in the place of the middle one."""
    shutil.rmtree(hospitals / "middle")
    return write_hospital(hospitals / "middle", **how)  # type: ignore[arg-type]


def train_rounds(hospital: Path) -> list[int]:
    events = fedmm("ledger", "export", hospital).json["events"]
    assert {event["state"] for event in events} <= {"settled"}
    return [event["round"] for event in events if event["kind"] == "train"]


def takes_part(hospitals: Path, run: Path) -> dict[str, object]:
    """Two rounds with all three hospitals; the scores of the middle one."""
    ran = simulate(hospitals, run)
    assert ran.code == 0, ran.said
    assert [record["trained"] for record in read_rounds(run)] == [["middle", "north", "south"]] * 2
    assert [record["failures"] for record in read_rounds(run)] == [[], []]
    assert train_rounds(hospitals / "middle") == [1, 2]
    assert leaks(run, ran.said) == set()
    scores = read_rounds(run)[-1]["scores"]["middle"]
    assert isinstance(scores, dict)
    return scores


def test_an_empty_hospital_is_told_so_and_the_run_goes_on(hospitals: Path, tmp_path: Path) -> None:
    (hospitals / "middle" / "manifest.csv").write_text(HEADER + "\n", encoding="utf-8")
    ran = simulate(hospitals, tmp_path / "run")
    went_on_without_middle(ran, tmp_path / "run")
    assert "middle: refused: HOSPITAL_INVALID" in ran.out
    told = fedmm("check", hospitals / "middle", "--format", "json")
    assert told.code == 1
    assert [problem["code"] for problem in told.json["problems"]] == ["no_studies"]


def test_a_hospital_with_one_patient_takes_part(hospitals: Path, tmp_path: Path) -> None:
    replace(hospitals, patients=1)
    scores = takes_part(hospitals, tmp_path / "run")
    assert (scores["studies"], scores["patients"], scores["accuracy"]) == (0, 0, None)
    scored = fedmm("evaluate", tmp_path / "run", hospitals / "middle", "--split", "train", "--format", "json")
    assert scored.code == 0
    assert (scored.json["studies"], scored.json["patients"]) == (2, 1)


def test_a_hospital_without_audio_takes_part_and_its_score_for_audio_is_of_no_study(
    hospitals: Path, tmp_path: Path
) -> None:
    edit_cells(hospitals / "middle", audio="")
    scores = takes_part(hospitals, tmp_path / "run")
    by_modality = scores["by_modality"]
    assert isinstance(by_modality, dict)
    assert by_modality["audio"]["studies"] == 0
    assert by_modality["image"]["studies"] == scores["studies"] == 2


def test_a_hospital_without_any_file_takes_part(hospitals: Path, tmp_path: Path) -> None:
    edit_cells(hospitals / "middle", image="", report="", audio="")
    scores = takes_part(hospitals, tmp_path / "run")
    assert scores["studies"] == 2


def test_labels_of_one_class_only_have_an_accuracy_and_no_auroc(hospitals: Path, tmp_path: Path) -> None:
    edit_cells(hospitals / "middle", pneumonia="1", effusion="0", grade="mild")
    scores = takes_part(hospitals, tmp_path / "run")
    assert scores["accuracy"] is not None
    areas = scores["auroc"]
    assert isinstance(areas, dict)
    assert set(areas.values()) == {None}


def test_a_hospital_without_any_label_takes_part_and_has_no_score(hospitals: Path, tmp_path: Path) -> None:
    edit_cells(hospitals / "middle", pneumonia="", effusion="", grade="")
    scores = takes_part(hospitals, tmp_path / "run")
    assert scores["accuracy"] is None
    assert scores["studies"] == 2
    text = fedmm("evaluate", tmp_path / "run", hospitals / "middle")
    assert text.code == 0
    assert "accuracy -" in text.out


def test_a_hospital_of_test_patients_only_sends_noise_and_pays_for_it(hospitals: Path, tmp_path: Path) -> None:
    edit_cells(hospitals / "middle", split="test")
    scores = takes_part(hospitals, tmp_path / "run")
    assert scores["patients"] == 6
    north, middle = (fedmm("ledger", "show", hospitals / h, "--format", "json").json for h in ("north", "middle"))
    assert middle["epsilon"] == pytest.approx(north["epsilon"], abs=1e-12)
    assert middle["epsilon"] > 0


def test_a_hospital_of_training_patients_only_has_nothing_to_score(hospitals: Path, tmp_path: Path) -> None:
    edit_cells(hospitals / "middle", split="train")
    assert takes_part(hospitals, tmp_path / "run")["studies"] == 0
    scored = fedmm("evaluate", tmp_path / "run", hospitals / "middle", "--format", "json")
    assert scored.code == 0
    assert (scored.json["studies"], scored.json["accuracy"]) == (0, None)


def test_hospitals_that_predict_different_things_do_not_start(hospitals: Path, tmp_path: Path) -> None:
    file = hospitals / "south" / "site.toml"
    file.write_text(file.read_text(encoding="utf-8").replace('"effusion"]', '"oedema"]'), encoding="utf-8")
    ran = simulate(hospitals, tmp_path / "run")
    assert ran.code == 4
    assert "south" in ran.err
    assert "labels" in ran.err
    assert all(fedmm("ledger", "export", hospital).json["events"] == [] for hospital in hospitals.iterdir())


def test_two_hospitals_of_one_name_are_not_two_hospitals(hospitals: Path, tmp_path: Path) -> None:
    (hospitals / "south" / "site.toml").write_text(policy("north"), encoding="utf-8")
    ran = simulate(hospitals, tmp_path / "run")
    assert ran.code == 0
    assert "two hospitals call themselves north" in ran.out
    assert read_rounds(tmp_path / "run")[0]["trained"] == ["middle", "north"]
    assert fedmm("ledger", "export", hospitals / "south").json["events"] == []


def test_declared_weights_of_a_hospital_that_declares_none_cost_it_nothing(hospitals: Path, tmp_path: Path) -> None:
    (hospitals / "middle" / "site.toml").write_text(policy("middle", counts='"no"'), encoding="utf-8")
    ran = simulate(hospitals, tmp_path / "run", federation__weights="declared")
    assert ran.code == 0
    assert "middle: refused: POLICY_REFUSED" in ran.out
    shown = fedmm("ledger", "show", hospitals / "middle", "--format", "json").json
    assert (shown["epsilon"], shown["reserved"]) == (0, 0)


def test_a_parquet_manifest_trains_as_a_csv_one_does(hospitals: Path, tmp_path: Path) -> None:
    csv = hospitals / "middle" / "manifest.csv"
    table = pyarrow.csv.read_csv(io.BytesIO(csv.read_bytes()))
    pyarrow.parquet.write_table(table, hospitals / "middle" / "manifest.parquet")
    csv.unlink()
    assert takes_part(hospitals, tmp_path / "run")["studies"] == 2
