"""Whole runs with FedProx, SCAFFOLD, an average, a warm start, and a hospital that has no audio."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedmm.cli import simulate_here
from fedmm.config import RunConfig, find_hospitals, load_site
from fedmm.federation.local import LocalGrid
from fedmm.privacy.ledger import Ledger
from fedmm.report.record import read_rounds
from server.app import coordinate
from tests.e2e.conftest import edit_cells, fedmm, policy, set_flags, simulate, write_hospital

FIXED = "tests.fixed_noise:app"
FULL = {"training__sampling_rate": 1.0}  # accounting takes no time
OPEN = {"privacy__enabled": "false", **FULL}


def run_fixed(hospitals: Path, out: Path, *, stop_after: int | None = None, **changes: object) -> Path:
    """A run with noise that repeats. stop_after: interrupted when the next round is asked."""
    flags = set_flags(federation__rounds=4, **FULL, **changes)[1::2]
    settings = dict(pair.split("=", 1) for pair in flags)
    config = RunConfig.from_flat({**settings, "data.hospitals": str(hospitals), "federation.out": str(out)})
    with LocalGrid(FIXED, [{"site": str(path)} for path in find_hospitals(hospitals)]) as grid:
        if stop_after is None:
            return coordinate(grid, config)
        send, asked = grid.send_and_receive, 0

        def interrupted(messages: Any, **more: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked > stop_after + 1:  # the first one is the introduction
                raise KeyboardInterrupt
            return send(messages, **more)

        grid.send_and_receive = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            coordinate(grid, config)
        return out


def copied(hospitals: Path, to: Path) -> Path:
    return Path(shutil.copytree(hospitals, to))


@pytest.mark.parametrize("private", ["true", "false"])
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_a_run_with_all_of_it_that_was_interrupted_ends_as_an_unbroken_one(
    hospitals: Path, tmp_path: Path, strategy: str, private: str
) -> None:
    asked = {
        "federation__strategy": strategy, "federation__average": 0.5, "training__proximal": 0.5,
        "training__local_steps": 2, "privacy__enabled": private,
    }  # fmt: skip
    whole = run_fixed(copied(hospitals, tmp_path / "a"), tmp_path / "whole", **asked)
    other = copied(hospitals, tmp_path / "b")
    run_fixed(other, tmp_path / "parts", stop_after=2, **asked)
    assert len(read_rounds(tmp_path / "parts")) == 2
    parts = run_fixed(other, tmp_path / "parts", **asked)
    left, right = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(left[name], right[name]) for name in left)
    state = load_file(whole / "checkpoint.safetensors")
    assert any(name.startswith("strategy/scaffold/north/") for name in state) is (strategy == "scaffold")
    assert any(not torch.equal(left[name], state[f"weights/{name}"]) for name in left), "the model is the average"


def test_a_run_in_few_bytes_that_was_interrupted_ends_as_an_unbroken_one(hospitals: Path, tmp_path: Path) -> None:
    """What topk leaves out lies at the hospitals, beside what they have answered."""
    whole = run_fixed(
        copied(hospitals, tmp_path / "a"), tmp_path / "whole", federation__wire="topk", privacy__enabled="false"
    )
    other = copied(hospitals, tmp_path / "b")
    run_fixed(other, tmp_path / "parts", stop_after=2, federation__wire="topk", privacy__enabled="false")
    parts = run_fixed(other, tmp_path / "parts", federation__wire="topk", privacy__enabled="false")
    left, right = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(left[name], right[name]) for name in left)
    start = load_start(whole)
    assert any(not torch.equal(left[name], value) for name, value in start.items())
    sizes = [a["bytes"] for record in read_rounds(whole) for a in record["arrived"] if a["what"] == "weights"]
    assert len(sizes) == 4 * 3
    assert max(sizes) < 0.1 * sum(4 * value.numel() for value in start.values()) + 2000, "a statement and three headers"


def test_corrections_cross_to_worker_processes_as_within_one(hospitals: Path, tmp_path: Path) -> None:
    pairs = set_flags(federation__strategy="scaffold", training__local_steps=2, **FULL)[1::2]
    settings = dict(pair.split("=", 1) for pair in pairs)
    found = []
    for workers in (0, 2):
        folder, out = copied(hospitals, tmp_path / f"h{workers}"), tmp_path / f"run{workers}"
        config = RunConfig.from_flat({**settings, "data.hospitals": str(folder), "federation.out": str(out)})
        simulate_here(config, workers=workers, client=FIXED)
        found.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_scaffold_keeps_hospitals_that_differ_closer_together(hospitals: Path, tmp_path: Path) -> None:
    """Each hospital has one class only: without corrections each pulls the model its own way for ten steps."""
    for name, grade in (("north", "none"), ("middle", "mild"), ("south", "severe")):
        edit_cells(hospitals / name, grade=grade, pneumonia="", effusion="")
    asked = {**OPEN, "training__local_steps": 10, "training__modality_dropout": 0, "federation__rounds": 6}
    spread = {}
    for strategy in ("fedavg", "scaffold"):
        ends: dict[int, list[dict[str, torch.Tensor]]] = {}
        _watched(copied(hospitals, tmp_path / strategy), tmp_path / f"run-{strategy}", ends, strategy, asked)
        last = [torch.cat([value.flatten() for _, value in sorted(each.items())]) for each in ends[6]]
        spread[strategy] = float(torch.stack([value - sum(last) / 3 for value in last]).norm())
    assert spread["scaffold"] < 0.8 * spread["fedavg"]


def _watched(
    hospitals: Path, out: Path, ends: dict[int, list[dict[str, torch.Tensor]]], strategy: str, asked: dict[str, object]
) -> None:
    """A run; ends: by round what came back, in the order of the hospitals' names."""
    pairs = set_flags(federation__strategy=strategy, **asked)[1::2]
    config = RunConfig.from_flat(
        {**dict(p.split("=", 1) for p in pairs), "data.hospitals": str(hospitals), "federation.out": str(out)}
    )
    with LocalGrid(FIXED, [{"site": str(path)} for path in find_hospitals(hospitals)]) as grid:
        send, number = grid.send_and_receive, 0

        def watched(messages: Any, **more: Any) -> Any:
            nonlocal number
            replies = sorted(send(messages, **more), key=lambda reply: reply.metadata.src_node_id)  # asked in any order
            if replies and replies[0].has_content() and "arrays" in replies[0].content:
                number += 1
                ends[number] = [
                    {name: torch.from_numpy(array.numpy().copy()) for name, array in each.content["arrays"].items()}
                    for each in replies
                ]
            return replies

        grid.send_and_receive = watched  # type: ignore[method-assign]
        coordinate(grid, config)


@pytest.mark.parametrize(
    "wrong",
    [
        {"training__proximal": 50},
        {"federation__strategy": "scaffold", "training__optimizer": "adam"},
        {"training__proximal": 0.1},
        {"training__clip_rule": "auto", "privacy__enabled": "false"},
    ],
    ids=str,
)
def test_settings_that_cannot_work_end_before_anything_begins(
    hospitals: Path, tmp_path: Path, wrong: dict[str, object]
) -> None:
    ran = simulate(hospitals, tmp_path / "run", **wrong)
    assert (ran.code, (tmp_path / "run").exists()) == (2, False)
    assert "fix:" in ran.err
    assert not (hospitals / "north" / "ledger.sqlite").exists()


# --- hospitals without a modality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False], ids=["says so", "says nothing"])
def test_a_hospital_without_audio_receives_a_model_that_hears(tmp_path: Path, *, declared: bool) -> None:
    hospitals = tmp_path / "hospitals"
    for name in ("deaf", "north", "south"):
        write_hospital(hospitals / name)
    edit_cells(hospitals / "deaf", audio="")
    lines = (hospitals / "deaf" / "manifest.csv").read_text().splitlines()
    names = lines[0].split(",")
    fixed = [line.split(",") for line in lines]
    for row in fixed[1:]:
        row[names.index("audio")] = ""
    (hospitals / "deaf" / "manifest.csv").write_text("".join(",".join(row) + "\n" for row in fixed))
    if declared:
        text = policy("deaf") + 'modalities = ["image", "report"]\n'
        (hospitals / "deaf" / "site.toml").write_text(text, encoding="utf-8")
    ends: dict[int, list[dict[str, torch.Tensor]]] = {}
    asked = {**FULL, "federation__rounds": 2, "privacy__epsilon": 8}
    _watched(hospitals, tmp_path / "run", ends, "fedavg", asked)
    before = load_start(tmp_path / "run")
    audio = [name for name in before if name.startswith(("encoders.audio.", "norms.audio."))]
    deaf, north, _ = ends[1]
    for name in audio:
        assert torch.equal(deaf[name], before[name]) is declared, "noise, or nothing"
        assert not torch.equal(north[name], before[name])
    heard = {name: value for name, value in load_file(tmp_path / "run" / "model.safetensors").items() if name in audio}
    mean = {
        name: sum(each[name] for each in ends[2][1 if declared else 0 :]) / (2 if declared else 3) for name in audio
    }
    for name, value in heard.items():
        torch.testing.assert_close(value, mean[name])
        assert not torch.equal(value, before[name]), "what it receives was learnt elsewhere"
    for folder in find_hospitals(hospitals):
        with Ledger.open(folder, load_site(folder)) as ledger:
            assert ledger.epsilon() == pytest.approx(8.0, abs=0.01), "the price is the same"


def load_start(run: Path) -> dict[str, torch.Tensor]:
    from fedmm.models.multimodal import build_model
    from fedmm.models.store import load_spec

    return {name: value.detach() for name, value in build_model(load_spec(run), 1).trained().items()}


# --- a warm start -----------------------------------------------------------------------------------------------------

TINY = set_flags()


@pytest.fixture
def public(tmp_path: Path) -> Path:
    for name in ("open_a", "open_b"):
        write_hospital(tmp_path / "public" / name)
    return tmp_path / "public"


def test_a_run_starts_from_a_pretrained_model_and_says_so(public: Path, hospitals: Path, tmp_path: Path) -> None:
    made = fedmm("pretrain", public, "--out", tmp_path / "m", "--epochs", 2, *TINY)
    assert made.code == 0, made.err
    assert "epoch 2/2" in made.out
    assert "pretrained without privacy on 10 studies of public data" in made.out
    about = json.loads((tmp_path / "m" / "config.json").read_text())["pretraining"]
    assert (about["studies"], about["folders"]) == (10, ["open_a", "open_b"])
    for folder in find_hospitals(public):
        with Ledger.open(folder, load_site(folder)) as ledger:
            assert (ledger.epsilon(), ledger.spent().not_private) == (0.0, 1), "written down as not covered"
    start = tmp_path / "m"
    ran = simulate(hospitals, tmp_path / "run", federation__start_from=start, federation__rounds=1, **FULL)
    assert ran.code == 0, ran.err
    assert "this run's epsilon does not cover that" in ran.out
    said = json.loads((tmp_path / "run" / "config.json").read_text())["start_from"]
    assert said["pretraining"]["note"] == about["note"]
    assert len(said["sha256"]) == 64
    assert "does not cover" in (tmp_path / "run" / "report.html").read_text()
    # the first weights that hospitals saw: the change of one round is bounded by the noise, and they are not the seed's
    theirs, seed, now = (
        load_file(start / "model.safetensors"),
        load_start(tmp_path / "run"),
        load_file(tmp_path / "run" / "model.safetensors"),
    )

    def far(other: dict[str, torch.Tensor]) -> float:
        return float(torch.cat([(now[name] - other[name]).flatten() for name in now]).norm())

    assert far(theirs) < far(seed)


@pytest.mark.parametrize("change", [{"model__width": 4}, {"data__image_size": 32}], ids=str)
def test_a_start_that_does_not_fit_is_refused_and_nothing_is_charged(
    public: Path, hospitals: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    assert fedmm("pretrain", public, "--out", tmp_path / "m", "--epochs", 1, *TINY).code == 0
    ran = simulate(hospitals, tmp_path / "run", federation__start_from=tmp_path / "m", **change)
    assert ran.code == 2
    assert next(iter(change)).partition("__")[2] in ran.err
    with Ledger.open(hospitals / "north", load_site(hospitals / "north")) as ledger:
        assert ledger.events() == []


def test_pretraining_on_patients_is_refused_before_a_folder_is_read(public: Path, tmp_path: Path) -> None:
    (public / "open_b" / "site.toml").write_text(policy("open_b", research=False), encoding="utf-8")
    for folder in find_hospitals(public):
        (folder / "manifest.csv").unlink()
    ran = fedmm("pretrain", public, "--out", tmp_path / "m", *TINY)
    assert ran.code == 3
    assert "open_b is not for training without privacy" in ran.err
    assert not (tmp_path / "m").exists()
    assert not (public / "open_a" / "ledger.sqlite").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"training__augment": "foo"}, "'foo' cannot be augmented"),
        ({"training__augment": "image", "model__image": "hog"}, "image has an encoder with a fixed part"),
        ({"training__proximal": 50}, "above 1"),
        ({"training__proximal": 0.1}, "does not go with pretrain"),
        ({"training__clip_rule": "auto"}, "does nothing without privacy"),
        ({"privacy__unit": "record", "model__fusion": "timeline"}, "privacy.unit = record"),
    ],
    ids=str,
)
def test_settings_that_pretraining_cannot_use_are_told_before_a_ledger_is_opened(
    public: Path, tmp_path: Path, wrong: dict[str, object], said: str
) -> None:
    ran = fedmm("pretrain", public, "--out", tmp_path / "m", "--epochs", 1, *set_flags(**wrong))
    assert ran.code in (2, 3), ran.said
    assert said in ran.err
    assert "fix:" in ran.err
    assert "Traceback" not in ran.said
    assert not (tmp_path / "m").exists()
    assert not list(public.glob("*/ledger.sqlite"))


def test_pretraining_that_never_began_gives_the_rows_of_all_folders_back(public: Path, tmp_path: Path) -> None:
    (public / "open_b" / "manifest.csv").write_text("patient_id\n", encoding="utf-8")
    assert fedmm("pretrain", public, "--out", tmp_path / "m", "--epochs", 1, *TINY).code == 3
    for folder in find_hospitals(public):
        with Ledger.open(folder, load_site(folder)) as ledger:
            assert [event["state"] for event in ledger.events()] == ["voided"], folder.name
            assert ledger.spent().not_private == 0


def test_pretraining_that_broke_off_stays_written_down(
    public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fedmm.training.pretrain.train", fail)
    with pytest.raises(MemoryError):
        fedmm("pretrain", public, "--out", tmp_path / "m", "--epochs", 1, *TINY)
    for folder in find_hospitals(public):
        with Ledger.open(folder, load_site(folder)) as ledger:
            assert [event["state"] for event in ledger.events()] == ["reserved"], folder.name


# --- afterwards, at home ----------------------------------------------------------------------------------------------


def test_a_hospital_makes_its_own_model_of_a_run_and_the_next_one_has_no_budget(
    hospitals: Path, tmp_path: Path
) -> None:
    run, home = tmp_path / "run", hospitals / "north"
    assert simulate(hospitals, run, federation__rounds=1, privacy__epsilon=2, **FULL).code == 0
    done = fedmm("personalise", run, home, "--parts", "head", "--epsilon", 1, "--steps", 3)
    assert done.code == 0, done.err
    assert "step 3/3" in done.out
    assert fedmm("evaluate", home / "models" / "run", home).code == 0
    (home / "site.toml").write_text(policy("north", epsilon="2.0"), encoding="utf-8")
    run.rename(tmp_path / "again")
    refused = fedmm("personalise", tmp_path / "again", home, "--epsilon", 3, "--steps", 3)
    assert (refused.code, "BUDGET" in refused.err or "spent" in refused.err) == (3, True), refused.out
    assert sorted(path.name for path in (home / "models").iterdir()) == ["run"]
    assert fedmm("personalise", tmp_path, home).code == 2
