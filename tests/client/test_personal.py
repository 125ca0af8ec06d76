"""A hospital's own model: charged before it exists, of the parts that were asked for, and at home."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from client import personal
from client.site import Site
from fedmm.config import RunConfig, load_site
from fedmm.errors import BudgetExhausted, ConfigError, PolicyRefused, Refusal, RunFailed
from fedmm.models.multimodal import build_model
from fedmm.models.store import load_model, save_model, save_spec
from fedmm.privacy import statement
from fedmm.privacy.ledger import Ledger
from tests.client.test_client import SPEC
from tests.e2e.conftest import SETTINGS, edit_cells, fedmm, policy, write_hospital

STEPS = 3


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run leaves: its model and its settings."""
    folder = tmp_path / "run7"
    settings = {key: str(value) for key, value in SETTINGS.items()} | {"training.sampling_rate": "1.0"}
    save_spec(SPEC, folder, extra={"settings": settings})
    save_model(build_model(SPEC, 1), folder)
    return folder


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    folder = write_hospital(tmp_path / "north")
    set_policy(folder)
    return folder


def set_policy(folder: Path, *, more: str = "", **changes: str) -> None:
    research = changes.pop("research", "") == "yes"
    (folder / "site.toml").write_text(policy("north", research=research, **changes) + more, encoding="utf-8")


def at_home(run: Path, hospital: Path, *, parts: str = "all", **more: Any) -> Path:
    settings = json.loads((run / "config.json").read_text())["settings"]
    given = {"steps": STEPS, "epsilon": 2.0, "proximal": 0.0, "more": {}} | more
    site = Site(hospital, load_site(hospital))
    try:
        config = personal.personal_settings(settings, **given)
        return personal.personalise(site, run, config=config, parts=parts, progress=lambda done, total: None)[0]
    finally:
        site.close()


def events(hospital: Path) -> list[dict[str, Any]]:
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        ledger.verify()
        return ledger.events()


def moved(run: Path, own: Path) -> set[str]:
    before, now = load_file(run / "model.safetensors"), load_file(own / "model.safetensors")
    assert before.keys() == now.keys()
    return {name for name in before if not torch.equal(before[name], now[name])}


# --- what is charged --------------------------------------------------------------------------------------------------


def test_the_ledger_shows_the_training_and_nothing_that_left(run: Path, hospital: Path) -> None:
    own = at_home(run, hospital)
    (event,) = events(hospital)
    assert (event["kind"], event["steps"], event["sampling_rate"], event["state"]) == ("train", STEPS, 1.0, "settled")
    assert str(event["run"]).startswith("personal-")
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        assert 1.9 < ledger.epsilon() <= 2.0
        assert statement.export(ledger)["sent"] == []
        assert all("sha256" not in made for made in ledger.made("train")), "the gate lets nothing out for it"
    assert own == hospital / "models" / "run7"
    about = json.loads((own / "config.json").read_text())["personal"]
    assert (about["run"], about["of"], about["parts"], about["private"]) == (event["run"], "run7", "all", True)
    assert about["plan"]["noise_multiplier"] == event["noise_multiplier"]


def test_where_little_is_left_there_is_more_noise_and_no_more_is_spent(run: Path, hospital: Path) -> None:
    at_home(run, hospital)
    (first,) = events(hospital)
    set_policy(hospital, epsilon="2.9")
    run.rename(run.with_name("run8"))
    at_home(run.with_name("run8"), hospital)
    _, second = events(hospital)
    assert 1 < float(second["noise_multiplier"]) / float(first["noise_multiplier"]) < personal.MAX_RAISE
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        assert ledger.epsilon() <= 2.9


def test_the_charge_is_on_disk_before_a_patient_is_touched(
    run: Path, hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        assert [event["state"] for event in events(hospital)] == ["reserved"]
        raise RuntimeError("a power cut")

    monkeypatch.setattr(personal, "train", fail)
    with pytest.raises(RuntimeError, match="a power cut"):
        at_home(run, hospital)
    assert [event["state"] for event in events(hospital)] == ["reserved"], "and stays charged"
    assert not (hospital / "models").exists()


# --- refusals leave nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "asked", "error"),
    [
        ({"epsilon": "0.4"}, {"steps": 200, "epsilon": 2.0}, BudgetExhausted),
        ({}, {"more": {"privacy.enabled": False}}, PolicyRefused),
        ({}, {"more": {"privacy.unit": "record"}}, PolicyRefused),
        ({"more": '[runs]\nkinds = ["evaluate"]\n'}, {}, PolicyRefused),
        ({"more": '[runs]\nmodels = ["00"]\n'}, {}, PolicyRefused),
        ({}, {"epsilon": 19.0, "steps": 1, "more": {"privacy.delta": 0.009}}, Refusal),
    ],
    ids=["no budget", "not private", "record", "no training here", "not this model", "delta"],
)
def test_what_the_hospital_does_not_allow_is_refused_and_leaves_nothing(
    run: Path, hospital: Path, change: dict[str, str], asked: dict[str, Any], error: type[Exception]
) -> None:
    set_policy(hospital, **change)
    (hospital / "manifest.csv").unlink()  # data are not even looked at
    with pytest.raises(error):
        at_home(run, hospital, **asked)
    assert not (hospital / "models").exists()
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        assert ledger.epsilon() == 0


@pytest.mark.parametrize(
    "asked",
    [{"proximal": 50.0}, {"epsilon": 0.0}, {"more": {"training.stepsize": 1}}],
    ids=["overshoots", "0", "unknown"],
)
def test_settings_that_cannot_work_are_refused_before_anything(
    run: Path, hospital: Path, asked: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        at_home(run, hospital, **asked)
    assert not (hospital / "ledger.sqlite").exists()


@pytest.mark.parametrize(
    "name",
    ["federation.rounds", "federation.strategy", "model.fusion", "data.image_size", "training.local_steps",
     "training.proximal", "privacy.epsilon", "privacy.evaluation_share", "privacy.noise_last"],
)  # fmt: skip
def test_what_the_command_decides_itself_cannot_be_set_and_costs_nothing(run: Path, hospital: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--set {name} does not go with personalise"):
        at_home(run, hospital, more={name: RunConfig().flat()[name]})
    assert not (hospital / "ledger.sqlite").exists()


def test_a_pull_in_a_single_step_is_refused(run: Path, hospital: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.proximal = 1 does nothing"):
        at_home(run, hospital, steps=1, proximal=1.0)
    assert not (hospital / "ledger.sqlite").exists()


def test_a_folder_that_cannot_be_written_is_known_before_it_is_paid(run: Path, hospital: Path) -> None:
    (hospital / "models").write_text("a file, not a folder")
    with pytest.raises(ConfigError, match="cannot be written"):
        at_home(run, hospital)
    assert events(hospital) == []


def test_what_a_killed_process_left_is_cleaned_and_a_living_ones_draft_is_not(run: Path, hospital: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    names = (f".run3.{dead.pid}", f".run7.{os.getpid()}", f".run4.{os.getppid()}", ".note", "run5")
    for name in names:
        (hospital / "models" / name).mkdir(parents=True)
        (hospital / "models" / name / "model.safetensors").write_bytes(b"half")
    at_home(run, hospital)
    left = {path.name for path in (hospital / "models").iterdir()}
    assert left == {*names[2:], "run7"}


def test_a_model_that_is_there_already_is_not_written_over(run: Path, hospital: Path) -> None:
    own = at_home(run, hospital)
    before = (own / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        at_home(run, hospital)
    assert (own / "model.safetensors").read_bytes() == before
    assert len(events(hospital)) == 1


def test_patients_who_cannot_be_loaded_cost_nothing(run: Path, hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("client.site.load_hospital", fail)
    with pytest.raises(RunFailed, match="could not be loaded"):
        at_home(run, hospital)
    assert [event["state"] for event in events(hospital)] == ["voided"]


# --- which parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
@pytest.mark.parametrize(
    ("parts", "is_trained"),
    [
        ("head", lambda name: name.startswith("head.")),
        ("norms", lambda name: "norm" in name),
        ("all", lambda name: True),
    ],
    ids=["head", "norms", "all"],
)
def test_only_the_chosen_parts_are_trained_and_all_else_is_the_runs_bit_by_bit(
    run: Path, hospital: Path, parts: str, is_trained: Any, clipping: str
) -> None:
    own = at_home(run, hospital, parts=parts, more={"training.clipping": clipping})
    names = set(load_model(run).trained())
    chosen = {name for name in names if is_trained(name)}
    if parts == "norms":  # normalisation layers inside encoders have other names
        assert moved(run, own) >= chosen
        assert not {name for name in moved(run, own) if load_file(run / "model.safetensors")[name].dim() > 1}
    else:
        assert moved(run, own) == chosen


def test_the_pull_of_ditto_keeps_the_model_near_the_runs(
    run: Path, hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_policy(hospital, research="yes")
    asked = {"steps": 40, "more": {"privacy.enabled": False}}
    far, near = at_home(run, hospital, **asked), run.with_name("near")
    run.rename(near)
    close = at_home(near, hospital, proximal=8.0, **asked)

    def change(own: Path) -> float:
        before, now = load_file(near / "model.safetensors"), load_file(own / "model.safetensors")
        return float(torch.cat([(now[name] - before[name]).flatten() for name in before]).norm())

    assert 0 < change(close) < 0.5 * change(far)


# --- what stays -------------------------------------------------------------------------------------------------------


def test_the_model_is_for_its_owners_eyes_and_can_be_scored(run: Path, hospital: Path) -> None:
    own = at_home(run, hospital)
    for path, mode in (
        (own.parent, 0o700),
        (own, 0o700),
        (own / "config.json", 0o600),
        (own / "model.safetensors", 0o600),
    ):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    assert sorted(path.name for path in own.iterdir()) == ["config.json", "model.safetensors"]
    scored = fedmm("evaluate", own, hospital, "--format", "json")
    assert scored.code == 0, scored.err
    assert scored.json["patients"] == 2


def test_fine_tuning_serves_a_hospital_whose_labels_are_shifted(run: Path, hospital: Path) -> None:
    """Elsewhere nobody was severely ill, here everybody is: open steps teach it, as the policy of made-up data allows."""
    set_policy(hospital, research="yes")
    edit_cells(hospital, pneumonia="1", effusion="1", grade="severe")
    model = load_model(run)
    with torch.no_grad():
        model.head.output.bias[SPEC.labels.outputs.index("grade=severe")] -= 3.0
    save_model(model, run)
    more = {"privacy.enabled": False, "training.optimizer": "adam", "training.learning_rate": 0.05}
    own = at_home(run, hospital, steps=30, more=more)
    of_run, of_own = (fedmm("evaluate", each, hospital, "--format", "json").json["accuracy"] for each in (run, own))
    assert (of_run, of_own) == (0.0, 1.0)
