"""`fedmm attack` as a security officer uses it: the contract of its JSON, its text, and what it must not tell or change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedmm import cli_attack
from fedmm.schema import MODALITIES
from fedmm.training import shadows
from tests.e2e.conftest import Finished, Ran, fedmm, leaks, simulate

KEYS = {"hospital", "run", "date", "private", "epsilon", "note", "start_known", "shadows", "membership", "relinkage",
        "inversion", "control"}  # fmt: skip


@pytest.fixture(scope="module")
def attacked(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path, bytes]:
    out = tmp_path_factory.mktemp("attack") / "found.json"
    before = (finished.one / "ledger.sqlite").read_bytes()
    ran = fedmm(
        "attack", finished.run, finished.one, "--shadows", 2, "--image-steps", 3, "--out", out, "--format", "json"
    )
    assert ran.code == 0, ran.said
    return ran, out, before


def test_the_json_has_every_attack_on_the_model_and_on_the_control(attacked: tuple[Ran, Path, bytes]) -> None:
    found = attacked[0].json
    assert set(found) == KEYS
    assert (found["hospital"], found["private"], found["epsilon"]) == ("hospital_1", True, 4.0)
    for part in (found, found["control"]):
        asked = [(entry["attack"], entry["modality"]) for entry in part["membership"]]
        views = ("all", *MODALITIES)
        assert asked == [(a, v) for a in ("loss threshold", "lira") for v in views]
        for entry in part["membership"]:
            more = {"unseen"} if entry["attack"] == "lira" else set()
            assert set(entry) == {"attack", "modality", "members", "non_members", "auc", "tpr"} | more
            assert set(entry["tpr"]) == {"0.1", "0.01", "0.001"}
            assert entry["tpr"]["0.01"]["value"] is None  # twelve patients
        assert [(entry["from"], entry["to"]) for entry in part["relinkage"]] == [
            ("image", "report"),
            ("audio", "report"),
        ]
        assert {entry["what"] for entry in part["inversion"]} == {"tokens recovered", "image ssim", "image psnr"}
    tokens = {e["what"]: e for e in found["control"]["inversion"]}["tokens recovered"]
    assert tokens["value"] == 1.0


def test_the_file_is_what_was_said_and_for_its_owner_alone(attacked: tuple[Ran, Path, bytes]) -> None:
    ran, out, _ = attacked
    assert json.loads(out.read_text(encoding="utf-8")) == ran.json
    assert out.stat().st_mode & 0o077 == 0
    assert "stays at the hospital" in ran.json["note"]


def test_nothing_is_charged_and_nothing_in_the_hospital_changes(
    finished: Finished, attacked: tuple[Ran, Path, bytes]
) -> None:
    assert (finished.one / "ledger.sqlite").read_bytes() == attacked[2]


def test_no_patient_can_be_found_in_what_is_said_or_written(hospitals: Path, tmp_path: Path) -> None:
    assert simulate(hospitals, tmp_path / "run").code == 0
    ran = fedmm("attack", tmp_path / "run", hospitals / "north", "--shadows", 2, "--image-steps", 3)
    assert ran.code == 0, ran.said
    assert leaks(tmp_path / "run", ran.said) == set()
    assert (tmp_path / "run" / "attack-north.json").exists()
    assert "stays at the hospital" in ran.out
    assert "None" not in ran.out
    for row in ("loss threshold", "lira", "image to report", "tokens recovered", "image ssim"):
        assert row in ran.out


def test_without_a_control_the_table_has_one_column_of_each(finished: Finished, tmp_path: Path) -> None:
    ran = fedmm("attack", finished.run, finished.one, "--shadows", 0, "--no-control", "--image-steps", 3,
                "--out", tmp_path / "x.json")  # fmt: skip
    assert ran.code == 0, ran.said
    assert "control" not in ran.out.rsplit("written", 1)[0]
    assert "lira" not in ran.out
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["control"] is None


@pytest.mark.parametrize("shadows", ["3", "-2", "many", "1000"])
def test_an_absurd_number_of_shadows_is_wrong_use(finished: Finished, shadows: str) -> None:
    assert fedmm("attack", finished.run, finished.one, "--shadows", shadows).code == 2


def test_what_is_no_run_no_hospital_or_one_of_other_labels_is_wrong_use(
    finished: Finished, hospitals: Path, tmp_path: Path
) -> None:
    assert fedmm("attack", tmp_path, finished.one).code == 2
    assert fedmm("attack", finished.run, tmp_path / "nowhere").code == 2
    assert fedmm("attack", finished.run, hospitals / "north").code == 2
    assert fedmm("attack", finished.run, finished.one, "--out", tmp_path / "no" / "x.json").code == 2


def test_a_hospital_whose_patients_the_run_never_trained_on_is_refused(finished: Finished, tmp_path: Path) -> None:
    stranger = shutil.copytree(finished.one, tmp_path / "stranger")
    policy = (stranger / "site.toml").read_text(encoding="utf-8")
    assert '"hospital_1"' in policy
    (stranger / "site.toml").write_text(policy.replace('"hospital_1"', '"hospital_9"'), encoding="utf-8")
    refused = fedmm("attack", finished.run, stranger, "--no-control", "--shadows", 0)
    assert refused.code == 2
    assert "hospital_9 trained in no round" in refused.said
    idle = copy_of_run(finished.run, tmp_path / "idle")
    lines = [json.loads(line) for line in (idle / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["trained"].remove("hospital_1")
    (idle / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    refused = fedmm("attack", idle, finished.one, "--no-control", "--shadows", 0)
    assert refused.code == 2
    assert "hospital_1 trained in no round" in refused.said
    assert not (idle / "attack-hospital_1.json").exists()


def copy_of_run(run: Path, to: Path) -> Path:
    to.mkdir()
    for name in ("config.json", "run.jsonl", "model.safetensors"):
        shutil.copy2(run / name, to)
    return to


def test_the_privacy_report_takes_what_the_command_wrote_and_verifies(
    finished: Finished, attacked: tuple[Ran, Path, bytes], tmp_path: Path
) -> None:
    """Twelve patients: most rates cannot be told, re-linkage not at all, and the page has to say so."""
    run = copy_of_run(finished.run, tmp_path / "run")
    shutil.copy2(attacked[1], run / "attack-hospital_1.json")
    assert fedmm("report", run, "--privacy", finished.one).code == 0
    for suffix in (".json", ".html"):
        checked = fedmm("report", "--verify", run / f"privacy-hospital_1{suffix}")
        assert checked.code == 0, checked.said
    page = (run / "privacy-hospital_1.html").read_text(encoding="utf-8")
    page = page[: page.index('<script type="application/json"')]
    for words in ("cannot be told at", "cannot be told: too few patients", "tokens recovered", "lira"):
        assert words in page
    assert "Another run" not in page, "the file names the run as the report does, whatever the folder is called"
    found = json.loads((run / "privacy-hospital_1.json").read_text(encoding="utf-8"))["document"]["attacks"]
    assert len(found["membership"]) == len(found["control"]["membership"]) == 8
    assert "non-members" not in json.dumps(found), "a reason has gone out with its counts"


def test_the_command_and_the_attack_agree_on_how_many_shadows_there_are() -> None:
    assert cli_attack.SHADOWS == shadows.SHADOWS
