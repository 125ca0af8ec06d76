"""The commands as a hospital engineer types them: exit codes, JSON that scripts rely on, help that can be copied."""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant

import client.site
import server.app
from fedmm.cli import build_parser
from fedmm.data.dataset import HospitalData
from fedmm.report.record import read_rounds
from fedmm.schema import MODALITIES, InputSpec
from tests.e2e.conftest import Finished, Ran, Started, fedmm, policy, set_flags, simulate

SHOW_KEYS = {
    "unit", "relation", "delta", "epsilon", "epsilon_prv", "epsilon_rdp", "ceiling", "releases", "reserved", "refusals",
}  # fmt: skip
EVENT_KEYS = {"seq", "kind", "noise_multiplier", "sampling_rate", "steps", "run", "round", "state"}
SCORE_KEYS = {"studies", "patients", "accuracy", "auroc", "f1_macro", "by_modality"}


def commands(parser: argparse.ArgumentParser | None = None, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command that the parser knows, by its words."""
    groups = [a for a in (parser or build_parser())._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield before
    for group in groups:
        for name, sub in group.choices.items():
            yield from commands(sub, (*before, name))


COMMANDS = list(commands())


def refused_as_wrong_use(ran: Ran) -> bool:
    """Exit 2, nothing on stdout but progress, a message with a fix and no traceback on stderr."""
    return ran.code == 2 and ran.err.startswith("fedmm: ") and "fix: " in ran.err and "Traceback" not in ran.said


# --- help -------------------------------------------------------------------------------------------------------------


def test_the_issues_commands_are_all_there() -> None:
    wanted = ["synth", "import", "check", "simulate", "evaluate", "predict", "report", "ledger show", "ledger export"]
    assert set(wanted) <= {" ".join(words) for words in COMMANDS}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_of_a_command_has_its_exit_codes_and_an_example_that_the_parser_accepts(words: tuple[str, ...]) -> None:
    ran = fedmm(*words, "--help")
    assert ran.code == 0
    assert "exit codes: 0 done, 1 the answer is no, 2 wrong use, 3 refused, 4 failed" in ran.out
    example = next(line for line in ran.out.splitlines() if line.startswith("example: fedmm "))
    typed = shlex.split(example.removeprefix("example: fedmm "))
    assert tuple(typed[: len(words)]) == words
    assert build_parser().parse_args(typed).run_command is not None


def test_help_of_fedmm_lists_each_command_and_the_exit_codes() -> None:
    ran = fedmm("--help")
    assert ran.code == 0
    assert all(words[0] in ran.out for words in COMMANDS)
    assert "exit codes:" in ran.out


# --- the way from files to a prediction -------------------------------------------------------------------------------


def test_synth_prints_the_folders_that_it_made_and_they_pass_check(finished: Finished) -> None:
    assert finished.made.code == 0
    assert finished.made.out.split() == [str(finished.one), str(finished.two)]
    ran = fedmm("check", finished.two, "--format", "json")
    assert ran.code == 0
    assert ran.json["ok"] is True
    assert ran.json["problems"] == []
    assert ran.json["patients"] == 12


def test_simulate_prints_a_line_a_round_and_leaves_a_complete_run_folder(finished: Finished) -> None:
    ran = finished.simulated
    assert ran.code == 0, ran.said
    lines = [line for line in ran.out.splitlines() if line.startswith("round ")]
    assert [line.split(" | ")[0] for line in lines] == ["round 1/2", "round 2/2"]
    assert all(" of 20.00 | " in line and line.endswith(" left") for line in lines)
    names = {path.name for path in finished.run.iterdir()}
    assert {"config.json", "model.safetensors", "run.jsonl", "checkpoint.safetensors", "report.html"} <= names
    assert {"status.json", "tensorboard"} <= names
    config = json.loads((finished.run / "config.json").read_text(encoding="utf-8"))
    assert config["private"] is True
    assert config["settings"]["model.width"] == 8
    assert [record["round"] for record in read_rounds(finished.run)] == [1, 2]


def test_report_is_written_again_and_needs_nothing_from_elsewhere(finished: Finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    (run / "report.html").unlink()
    ran = fedmm("report", run)
    assert ran.code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert ran.out.strip() == str(run / "report.html")
    assert "hospital_1" in page
    assert not [address for address in ('src="http', "src='http", "url(http", "<link") if address in page]


def test_check_lists_each_problem_with_row_column_code_message_and_fix(finished: Finished, tmp_path: Path) -> None:
    hospital = Path(shutil.copytree(finished.one, tmp_path / "hospital_1"))
    broken = sorted((hospital / "report").iterdir())[0]
    broken.write_bytes(b"\xff\xfe\xfd")
    ran = fedmm("check", hospital, "--format", "json")
    assert ran.code == 1
    assert set(ran.json) >= {"ok", "studies", "patients", "problems"}
    assert ran.json["ok"] is False
    (problem,) = ran.json["problems"]
    assert set(problem) == {"row", "column", "code", "message", "fix"}
    line = (hospital / "manifest.csv").read_text(encoding="utf-8").splitlines()[problem["row"] - 1]
    assert (problem["column"], f"report/{broken.name}" in line) == ("report", True)
    text = fedmm("check", hospital)
    assert text.code == 1
    assert f"row {problem['row']}, report: {problem['code']}: " in text.out


def test_evaluate_gives_the_keys_of_the_contract_and_a_value_or_null_for_each_label(finished: Finished) -> None:
    ran = fedmm("evaluate", finished.run, finished.one, "--format", "json")
    assert ran.code == 0
    assert set(ran.json) >= SCORE_KEYS
    outputs = {"effusion", "consolidation", "cardiomegaly", "severity=none", "severity=mild", "severity=severe"}
    assert set(ran.json["auroc"]) == outputs
    assert all(area is None or 0 <= area <= 1 for area in ran.json["auroc"].values())
    assert set(ran.json["by_modality"]) == set(MODALITIES)


def test_split_all_is_train_and_test_and_test_is_what_one_gets_without_asking(finished: Finished) -> None:
    scores = {s: fedmm("evaluate", finished.run, finished.one, "--split", s, "--format", "json").json
              for s in ("train", "test", "all")}  # fmt: skip
    for count in ("studies", "patients"):
        assert scores["all"][count] == scores["train"][count] + scores["test"][count]
        assert scores["train"][count] > scores["test"][count] > 0
    assert fedmm("evaluate", finished.run, finished.one, "--format", "json").json == scores["test"]


def test_several_hospitals_are_scored_together(finished: Finished) -> None:
    one, two = (fedmm("evaluate", finished.run, h, "--format", "json").json for h in (finished.one, finished.two))
    both = fedmm("evaluate", finished.run, finished.one, finished.two, "--format", "json")
    assert both.code == 0
    for count in ("studies", "patients"):
        assert both.json[count] == one[count] + two[count]
    assert fedmm("evaluate", finished.run, finished.one, finished.two).out.startswith(f"{both.json['studies']} studies")


def files_of_one_study(hospital: Path) -> dict[str, Path]:
    return {name: sorted((hospital / name).iterdir())[0] for name in MODALITIES}


@pytest.mark.parametrize("given", [s for n in range(4) for s in itertools.combinations(MODALITIES, n)], ids=str)
def test_predict_takes_any_subset_of_the_modalities(finished: Finished, given: tuple[str, ...]) -> None:
    files = files_of_one_study(finished.two)
    flags = [part for name in given for part in (f"--{name}", files[name])]
    ran = fedmm("predict", finished.run, *flags, "--format", "json")
    assert ran.code == 0, ran.said
    assert set(ran.json) >= {"probabilities", "modalities"}
    assert ran.json["modalities"] == list(given)
    chances = ran.json["probabilities"]
    assert all(math.isfinite(chance) and 0 <= chance <= 1 for chance in chances.values())
    grades = [chance for name, chance in chances.items() if name.startswith("severity=")]
    assert len(grades) == 3
    assert sum(grades) == pytest.approx(1, abs=1e-5)


def test_predict_depends_on_what_it_is_given(finished: Finished) -> None:
    files = files_of_one_study(finished.one)
    flags = [[], ["--image", files["image"]], ["--report", files["report"]], ["--audio", files["audio"]]]
    answers = [fedmm("predict", finished.run, *flag, "--format", "json").json["probabilities"] for flag in flags]
    assert all(a != b for a, b in itertools.combinations(answers, 2))


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("how", ["broken", "missing", "folder"])
def test_predict_names_the_flag_of_a_file_that_it_cannot_use_and_nothing_of_its_content(
    finished: Finished, tmp_path: Path, modality: str, how: str
) -> None:
    path = tmp_path / f"study{ {'image': '.png', 'report': '.txt', 'audio': '.wav'}[modality] }"
    if how == "broken":
        path.write_bytes(b"\xff\x00Wilhelmina has a cough\xff" * 20)
    elif how == "folder":
        path.mkdir()
    ran = fedmm("predict", finished.run, f"--{modality}", path)
    assert refused_as_wrong_use(ran)
    assert modality in ran.err.splitlines()[0]
    assert "Wilhelmina" not in ran.said
    assert ran.out == ""


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("privacy.epsilom=3", "privacy.epsilom"),
        ("privcy.epsilon=3", "privacy.epsilon"),
        ("epsilon=3", "epsilon"),
        ("privacy=3", "privacy.epsilon"),
        ("privacy.epsilon", "="),
        ("privacy.epsilon=nan", "privacy.epsilon"),
        ("privacy.epsilon=inf", "privacy.epsilon"),
        ("privacy.epsilon=0", "privacy.epsilon"),
        ("privacy.epsilon=-1", "privacy.epsilon"),
        ("privacy.epsilon=lots", "privacy.epsilon"),
        ("privacy.enabled=perhaps", "privacy.enabled"),
        ("training.sampling_rate=1.5", "training.sampling_rate"),
        ("federation.rounds=0", "federation.rounds"),
        ("federation.rounds=2.5", "federation.rounds"),
        ("federation.strategy=fedsgd", "federation.strategy"),
        ("federation.out=elsewhere", "--out"),
        ("data.hospitals=elsewhere", "HOSPITALS"),
        ("model.fusion=glue", "concat"),
        ("model.image=vgg", "cnn"),
        ("training.augment=image,lab", "any of image, report, audio"),
    ],
)
def test_a_wrong_setting_is_exit_2_names_the_fix_and_makes_no_run(
    hospitals: Path, tmp_path: Path, setting: str, said: str
) -> None:
    ran = fedmm("simulate", hospitals, "--out", tmp_path / "run", "--workers", 0, *set_flags(), "--set", setting)
    assert refused_as_wrong_use(ran), ran.said
    assert said in ran.err
    assert not (tmp_path / "run" / "config.json").exists()
    assert not list(hospitals.glob("*/ledger.sqlite"))


def test_augmenting_what_is_kept_as_features_is_exit_2_and_makes_no_run(hospitals: Path, tmp_path: Path) -> None:
    given = ("--set", "training.augment=image", "--set", "model.image=hog")
    ran = fedmm("simulate", hospitals, "--out", tmp_path / "run", "--workers", 0, *set_flags(), *given)
    assert refused_as_wrong_use(ran), ran.said
    assert "image has an encoder with a fixed part" in ran.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "conquer",
        "simulate H",
        "simulate H --out R --engine spark",
        "simulate H --out R --workers few",
        "simulate H --out R --workers -1",
        "check",
        "check H --format yaml",
        "evaluate R H --split validation",
        "predict R --video film.mp4",
        "ledger",
        "ledger burn H",
        "import lungs PACK H",
        "synth H --patients many",
    ],
)
def test_a_command_line_that_makes_no_sense_is_exit_2_and_points_to_help(typed: str) -> None:
    ran = fedmm(*typed.split())
    assert refused_as_wrong_use(ran), ran.said
    assert "--help" in ran.err


@pytest.mark.parametrize("value", ["0", "-3", "100000000"])
def test_synth_refuses_an_absurd_number_of_patients(tmp_path: Path, value: str) -> None:
    assert refused_as_wrong_use(fedmm("synth", tmp_path / "hospitals", "--patients", value))
    assert not (tmp_path / "hospitals").exists()


NO_RUN = ("missing", "empty", "a file", "not JSON")


@pytest.mark.parametrize(
    ("words", "state"),
    [(words, state) for words in ("evaluate RUN HOSPITAL", "predict RUN", "report RUN") for state in NO_RUN]
    + [("evaluate RUN HOSPITAL", "unfinished"), ("predict RUN", "unfinished")],
)
def test_a_run_folder_that_is_none_is_exit_2(finished: Finished, tmp_path: Path, words: str, state: str) -> None:
    run = tmp_path / "run"
    if state == "a file":
        run.write_text("a run?", encoding="utf-8")
    elif state != "missing":
        run.mkdir()
    if state == "unfinished":
        shutil.copy(finished.run / "config.json", run)
    if state == "not JSON":
        (run / "config.json").write_text("[1, 2", encoding="utf-8")
    places = {"RUN": run, "HOSPITAL": finished.one}
    ran = fedmm(*[places.get(word, word) for word in words.split()])
    assert ran.code == 2, ran.said
    assert ran.err.startswith("fedmm: ")
    assert str(run) in ran.err


def test_an_unfinished_run_has_a_report_too(finished: Finished, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished.run / "config.json", run)
    assert fedmm("report", run).code == 0
    assert (run / "report.html").stat().st_size > 0


def test_a_damaged_model_is_exit_2(finished: Finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:1000])
    ran = fedmm("predict", run)
    assert ran.code == 2
    assert "model.safetensors" in ran.err


@pytest.mark.parametrize("words", ["evaluate RUN NOWHERE", "ledger show NOWHERE", "ledger export NOWHERE"])
def test_a_hospital_folder_that_is_not_there_is_exit_2_and_not_a_lecture_on_policy(
    finished: Finished, tmp_path: Path, words: str
) -> None:
    places = {"RUN": finished.run, "NOWHERE": tmp_path / "nowhere"}
    ran = fedmm(*[places.get(word, word) for word in words.split()])
    assert refused_as_wrong_use(ran), ran.said
    assert str(tmp_path / "nowhere") in ran.err
    assert not (tmp_path / "nowhere").exists()


def test_check_of_a_folder_that_is_not_there_is_the_answer_no(tmp_path: Path) -> None:
    ran = fedmm("check", tmp_path / "nowhere", "--format", "json")
    assert ran.code == 1
    assert "no_folder" in {problem["code"] for problem in ran.json["problems"]}


def test_a_folder_without_hospitals_is_exit_2(tmp_path: Path) -> None:
    ran = simulate(tmp_path / "nowhere", tmp_path / "run")
    assert refused_as_wrong_use(ran)
    assert "fedmm synth" in ran.err
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_run_again(finished: Finished) -> None:
    before = {path.name: path.read_bytes() for path in finished.run.rglob("*") if path.is_file()}
    ran = simulate(finished.hospitals, finished.run)
    assert refused_as_wrong_use(ran)
    assert "finished run" in ran.err
    assert before == {path.name: path.read_bytes() for path in finished.run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["file", "folder of something else", "below a file"])
def test_a_run_folder_that_belongs_to_something_else_is_refused_and_left_alone(
    hospitals: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "thesis"
    if kind == "folder of something else":
        out.mkdir()
        (out / "chapter_1.txt").write_text("call me", encoding="utf-8")
    else:
        out.write_text("call me", encoding="utf-8")
    ran = simulate(hospitals, out / "run" if kind == "below a file" else out)
    assert refused_as_wrong_use(ran), ran.said
    kept = out / "chapter_1.txt" if kind == "folder of something else" else out
    assert kept.read_text(encoding="utf-8") == "call me"


def test_a_full_disk_ends_a_run_with_exit_4_and_a_line_and_the_run_can_go_on(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, record: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "run.jsonl"))

    with monkeypatch.context() as patch:
        patch.setattr(server.app, "append_round", full)
        ran = simulate(hospitals, tmp_path / "run")
    assert ran.code == 4
    assert ran.err == f"fedmm: No space left on device: {tmp_path / 'run' / 'run.jsonl'}\n"
    assert simulate(hospitals, tmp_path / "run").code == 0


def test_a_model_is_not_scored_on_a_hospital_that_fails_its_check_and_the_list_is_printed(
    finished: Finished, tmp_path: Path
) -> None:
    hospital = Path(shutil.copytree(finished.one, tmp_path / "hospital_1"))
    for report in (hospital / "report").iterdir():
        report.write_bytes(b"\xff\xfeWilhelmina")
    ran = fedmm("evaluate", finished.run, hospital)
    assert ran.code == 3
    assert ", report: " in ran.err
    assert "Wilhelmina" not in ran.said
    assert report.name not in ran.said


def test_a_model_is_not_scored_on_a_hospital_with_other_labels(finished: Finished, hospitals: Path) -> None:
    ran = fedmm("evaluate", finished.run, hospitals / "north")
    assert refused_as_wrong_use(ran)
    assert "labels" in ran.err


# --- the ledger -------------------------------------------------------------------------------------------------------


def composed_elsewhere(hospital: Path) -> float:
    """Epsilon from the exported JSON alone, event by event, by dp-accounting's own accountant."""
    exported = fedmm("ledger", "export", hospital).json
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in exported["events"]:
        if event["noise_multiplier"] > 0:
            step = dp_event.PoissonSampledDpEvent(
                event["sampling_rate"], dp_event.GaussianDpEvent(event["noise_multiplier"])
            )
            accountant.compose(dp_event.SelfComposedDpEvent(step, event["steps"]))
    return float(accountant.get_epsilon(exported["delta"]))


def test_ledger_show_and_export_have_the_keys_of_the_contract(finished: Finished) -> None:
    shown, exported = (fedmm("ledger", how, finished.one, "--format", "json") for how in ("show", "export"))
    assert (shown.code, exported.code) == (0, 0)
    assert set(shown.json) >= SHOW_KEYS
    assert (shown.json["unit"], shown.json["relation"]) == ("patient", "add_or_remove_one")
    assert shown.json["epsilon"] <= shown.json["epsilon_prv"] + 1e-9
    assert shown.json["epsilon_prv"] <= shown.json["epsilon_rdp"] + 0.02
    assert set(exported.json) >= {"delta", "events"}
    assert all(set(event) >= EVENT_KEYS for event in exported.json["events"])
    assert [event["round"] for event in exported.json["events"] if event["noise_multiplier"] > 0] == [1, 2]
    assert shown.json["not_private"] == 1  # the exact scores of the last round
    assert (shown.json["reserved"], shown.json["refusals"]) == (0, 0)
    assert {event["state"] for event in exported.json["events"]} == {"settled"}


def test_the_text_of_ledger_show_has_the_same_epsilon_as_its_json(finished: Finished) -> None:
    shown = fedmm("ledger", "show", finished.one, "--format", "json").json
    assert f"{shown['epsilon']:.4f} of {shown['ceiling']:g} at delta {shown['delta']:g}" in " ".join(
        fedmm("ledger", "show", finished.one).out.split()
    )


def test_looking_at_a_ledger_does_not_change_it(finished: Finished) -> None:
    head = fedmm("ledger", "verify", finished.one, "--format", "json").json
    first, second = (fedmm("ledger", "show", finished.one).out for _ in range(2))
    assert first == second
    assert fedmm("ledger", "verify", finished.one, "--format", "json").json == head
    assert head["ok"] is True


def test_epsilon_is_dp_accountings_own_composition_after_one_run_and_after_a_second(
    hospitals: Path, tmp_path: Path
) -> None:
    spent = []
    for number, rate in ((1, 0.5), (2, 1.0)):
        ran = simulate(hospitals, tmp_path / f"run{number}", training__sampling_rate=rate)
        assert ran.code == 0
        shown = fedmm("ledger", "show", hospitals / "south", "--format", "json").json
        assert shown["epsilon"] == pytest.approx(composed_elsewhere(hospitals / "south"), abs=1e-6)
        record = read_rounds(tmp_path / f"run{number}")[-1]
        assert record["epsilon"]["south"]["spent"] == pytest.approx(shown["epsilon"], abs=1e-6)
        spent.append(shown["epsilon"])
    assert spent[0] <= 4 < spent[1]  # the second run has its own budget of 4, the ledger adds both up


def lower_ceiling(hospital: Path, to: float) -> None:
    (hospital / "site.toml").write_text(policy(hospital.name, epsilon=str(to)), encoding="utf-8")


def test_a_run_for_which_no_hospital_has_budget_left_fails_with_exit_4_and_touches_no_data(
    hospitals: Path, tmp_path: Path
) -> None:
    for hospital in hospitals.iterdir():
        lower_ceiling(hospital, 0.5)
        (hospital / "manifest.csv").write_bytes(b"\xff not a table")
    ran = simulate(hospitals, tmp_path / "run")
    assert ran.code == 4
    assert ran.err.count("BUDGET_EXHAUSTED") == 3
    assert "HOSPITAL_INVALID" not in ran.said
    assert not (tmp_path / "run" / "model.safetensors").exists()
    for hospital in hospitals.iterdir():
        shown = fedmm("ledger", "show", hospital, "--format", "json").json
        assert (shown["releases"], shown["epsilon"]) == (0, 0)


def test_a_third_run_is_refused_by_the_hospital_whose_ceiling_is_near_before_it_touches_data_and_the_others_go_on(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        assert simulate(hospitals, tmp_path / f"run{number}").code == 0
    spent = fedmm("ledger", "show", hospitals / "middle", "--format", "json").json["epsilon"]
    (hospitals / "middle" / "site.toml").write_text(
        policy("middle", epsilon=f"{spent + 0.01}", metrics='"no"'), encoding="utf-8"
    )
    touched = watch_loading(monkeypatch)
    ran = simulate(hospitals, tmp_path / "run3")
    assert ran.code == 0
    assert "middle: refused: BUDGET_EXHAUSTED" in ran.out
    assert set(touched) == {"north", "south"}
    assert all(record["trained"] == ["north", "south"] for record in read_rounds(tmp_path / "run3"))
    (refusal,) = json.loads((tmp_path / "run3" / "config.json").read_text(encoding="utf-8"))["absent"]
    assert (refusal["hospital"], refusal["kind"], refusal["code"]) == ("middle", "refused", 1001)
    assert refusal["reason"].startswith("BUDGET_EXHAUSTED")
    shown = fedmm("ledger", "show", hospitals / "middle", "--format", "json").json
    assert shown["epsilon"] == pytest.approx(spent, abs=1e-12)


def watch_loading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the hospitals whose data is loaded from now on."""
    load, touched = client.site.load_hospital, []

    def watched(hospital: Path, spec: InputSpec, **parts: Any) -> HospitalData:
        touched.append(hospital.name)
        return load(hospital, spec, **parts)

    monkeypatch.setattr(client.site, "load_hospital", watched)
    return touched


def test_looking_at_a_hospital_that_never_trained_shows_zero_and_makes_no_ledger(hospitals: Path) -> None:
    """A ledger that was taken away must not be replaced by looking for it."""
    shown = fedmm("ledger", "show", hospitals / "north", "--format", "json").json
    assert (shown["epsilon"], shown["releases"], shown["reserved"], shown["refusals"]) == (0, 0, 0, 0)
    assert fedmm("ledger", "export", hospitals / "north").json["events"] == []
    assert fedmm("ledger", "forecast", hospitals / "north").code == 0
    ran = fedmm("ledger", "verify", hospitals / "north")
    assert (ran.code, "there is no ledger here" in ran.out) == (1, True)
    assert not list((hospitals / "north").glob("ledger*"))


@pytest.mark.parametrize("left", ["ledger.key", "ledger.patients"])
def test_what_is_left_of_a_ledger_that_was_taken_away_is_not_taken_for_a_new_hospital(
    hospitals: Path, tmp_path: Path, left: str
) -> None:
    assert simulate(hospitals, tmp_path / "run").code == 0
    for file in (hospitals / "north").glob("ledger*"):
        if file.name != left:
            file.unlink()
    for command in ("show", "export", "forecast"):
        assert fedmm("ledger", command, hospitals / "north").code == 3
    ran = simulate(hospitals, tmp_path / "again")
    assert ran.code == 0
    assert "north: refused: LEDGER_UNUSABLE" in ran.out
    assert [file.name for file in (hospitals / "north").glob("ledger*")] == [left]


def test_a_tampered_ledger_is_refused_by_show_and_found_by_verify(finished: Finished, tmp_path: Path) -> None:
    hospital = tmp_path / "hospital_1"
    shutil.copytree(finished.one, hospital, ignore=lambda *_: [*MODALITIES])
    content = bytearray((hospital / "ledger.sqlite").read_bytes())
    at = content.rindex(b"train")
    content[at : at + 5] = b"tra1n"
    (hospital / "ledger.sqlite").write_bytes(content)
    assert fedmm("ledger", "verify", hospital).code == 1
    for how in ("show", "export"):
        ran = fedmm("ledger", how, hospital)
        assert ran.code == 3
        assert ran.out == ""


# --- without privacy --------------------------------------------------------------------------------------------------


def test_without_privacy_is_refused_where_the_policy_does_not_allow_it(hospitals: Path, tmp_path: Path) -> None:
    for hospital in hospitals.iterdir():
        (hospital / "site.toml").write_text(policy(hospital.name, research=False), encoding="utf-8")
    ran = simulate(hospitals, tmp_path / "run", privacy__enabled="false")
    assert ran.code == 4
    assert ran.err.count("POLICY_REFUSED") == 3
    assert not (tmp_path / "run" / "model.safetensors").exists()
    for hospital in hospitals.iterdir():
        shown = fedmm("ledger", "show", hospital, "--format", "json").json
        assert shown["releases"] == shown["not_private"] == 0


def test_one_hospital_that_keeps_its_promise_does_not_stop_a_research_run_of_the_others(
    hospitals: Path, tmp_path: Path
) -> None:
    (hospitals / "south" / "site.toml").write_text(policy("south", research=False), encoding="utf-8")
    ran = simulate(hospitals, tmp_path / "run", privacy__enabled="false")
    assert ran.code == 0
    assert "south: refused: POLICY_REFUSED" in ran.out
    assert read_rounds(tmp_path / "run")[0]["trained"] == ["middle", "north"]


def test_without_privacy_everything_says_so(hospitals: Path, tmp_path: Path) -> None:
    ran = simulate(hospitals, tmp_path / "run", privacy__enabled="false")
    assert ran.code == 0
    for line in ran.out.splitlines():
        assert not line.startswith(("privacy ", "round ")) or "NOT PRIVATE" in line
    assert "epsilon" not in ran.out
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["private"] is False
    assert {record["private"] for record in read_rounds(tmp_path / "run")} == {False}
    assert "NOT PRIVATE" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8").upper()
    shown = fedmm("ledger", "show", hospitals / "north", "--format", "json").json
    assert (shown["epsilon"], shown["not_private"]) == (0, 3)  # two rounds, one set of scores
    assert "NOT PRIVATE 3" in fedmm("ledger", "show", hospitals / "north").out


def test_a_private_run_never_says_that_it_is_not(hospitals: Path, tmp_path: Path) -> None:
    for hospital in hospitals.iterdir():
        (hospital / "site.toml").write_text(policy(hospital.name, research=False), encoding="utf-8")
    ran = simulate(hospitals, tmp_path / "run")
    assert ran.code == 0
    assert "NOT PRIVATE" not in ran.out
    assert fedmm("ledger", "show", hospitals / "north", "--format", "json").json["not_private"] == 0
    assert read_rounds(tmp_path / "run")[-1]["withheld"] == ["middle", "north", "south"]


# --- interruptions ----------------------------------------------------------------------------------------------------


def wait_for_lines(started: Started, log: Path, lines: int) -> None:
    for _ in range(60_000):  # ten minutes: the machine may have other things to do
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            return
        assert started.process.poll() is None, started.said
        time.sleep(0.01)
    raise AssertionError(started.said)


def ended(started: Started) -> bool:
    """Whether all processes of a command are gone, a little later at the latest."""
    for _ in range(500):
        if not started.alive():
            return True
        time.sleep(0.02)
    return False


def test_a_killed_run_goes_on_with_the_same_command_and_pays_at_most_one_round_twice(
    hospitals: Path, tmp_path: Path, start: Callable[..., Started]
) -> None:
    run, settings = tmp_path / "run", {"federation__rounds": 4, "training__sampling_rate": 1.0}
    started = start("simulate", hospitals, "--out", run, "--workers", 2, *set_flags(**settings))
    wait_for_lines(started, run / "run.jsonl", 1)
    started.process.kill()
    assert started.process.wait() == -signal.SIGKILL
    assert ended(started)  # the workers too: one that trained on unseen would charge behind our back
    done = len((run / "run.jsonl").read_text(encoding="utf-8").splitlines())
    assert 1 <= done < 4
    other = simulate(hospitals, run, **settings | {"privacy__epsilon": 3})
    assert refused_as_wrong_use(other)
    assert "privacy.epsilon" in other.err
    ran = simulate(hospitals, run, **settings)
    assert ran.code == 0
    assert "going on after round " in ran.out
    lines = [json.loads(line)["round"] for line in (run / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [1, 2, 3, 4]
    for hospital in hospitals.iterdir():
        events = fedmm("ledger", "export", hospital).json["events"]
        rounds = [event["round"] for event in events if event["kind"] == "train"]
        assert set(rounds) == set(lines)
        assert len(rounds) <= len(lines) + 1
        assert len({event["run"] for event in events}) == 1


def test_a_run_that_died_between_checkpoint_and_record_still_has_a_record_of_each_round(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = server.app.append_round

    def die_after_round_1(folder: Path, record: server.app.RoundRecord) -> None:
        if record.round > 1:
            raise KeyboardInterrupt
        append(folder, record)

    with monkeypatch.context() as patch:
        patch.setattr(server.app, "append_round", die_after_round_1)
        assert simulate(hospitals, tmp_path / "run", federation__rounds=3, privacy__enabled="false").code == 130
    assert simulate(hospitals, tmp_path / "run", federation__rounds=3, privacy__enabled="false").code == 0
    assert [record["round"] for record in read_rounds(tmp_path / "run")] == [1, 2, 3]


def test_a_run_that_failed_before_its_first_checkpoint_may_be_started_again_with_other_settings(
    hospitals: Path, tmp_path: Path
) -> None:
    site = hospitals / "south" / "site.toml"
    site.rename(site.with_suffix(".off"))
    assert simulate(hospitals, tmp_path / "run", federation__min_hospitals=3).code == 4
    site.with_suffix(".off").rename(site)
    assert simulate(hospitals, tmp_path / "run", federation__min_hospitals=2).code == 0


def test_more_hospitals_than_there_are_folders_is_exit_2_at_once(hospitals: Path, tmp_path: Path) -> None:
    ran = simulate(hospitals, tmp_path / "run", federation__min_hospitals=4)
    assert refused_as_wrong_use(ran)
    assert "federation.min_hospitals" in ran.err
    assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_a_run_with_workers_and_leaves_no_process(
    hospitals: Path, tmp_path: Path, start: Callable[..., Started]
) -> None:
    flags = set_flags(federation__rounds=2000, privacy__enabled="false")
    started = start("simulate", hospitals, "--out", tmp_path / "run", "--workers", 2, *flags)
    wait_for_lines(started, tmp_path / "run" / "run.jsonl", 1)
    assert len(started.alive()) >= 3  # the coordinator and its two workers
    os.killpg(started.process.pid, signal.SIGINT)
    assert started.process.wait(timeout=60) == 130
    assert "fedmm: interrupted" in started.said
    assert "Traceback" not in started.said
    assert ended(started)
