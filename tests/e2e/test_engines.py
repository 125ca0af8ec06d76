"""The same two apps, the same messages, the same weights: in one process, in workers, under Ray, and by `flwr run .`"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedmm.cli import simulate_here
from fedmm.config import RunConfig
from fedmm.data.synthetic import synthesize
from fedmm.federation.local import LocalGrid
from fedmm.models.catalogue import catalogue
from fedmm.models.encoder import encoders
from fedmm.report.record import read_rounds
from server.app import coordinate

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "data.image_size": 16,
    "data.audio_seconds": 0.5,
    "model.width": 8,
    "federation.rounds": 2,
    "training.local_steps": 2,
    "training.sampling_rate": 0.5,
    "training.physical_studies": 16,
}
FIXED = "tests.fixed_noise:app"


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "hospitals"
    synthesize(folder, count=2, patients=12, seed=3)
    return folder


def copy_of(hospitals: Path, to: Path) -> Path:
    """A fresh federation: the same files, no ledger yet."""
    subprocess.run(["cp", "-r", str(hospitals), str(to)], check=True)
    return to


def settings(hospitals: Path, out: Path, **more: object) -> RunConfig:
    return RunConfig.from_flat({**TINY, "data.hospitals": str(hospitals), "federation.out": str(out), **more})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads may add up in another order; workers and Ray's actors have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_final_weights_are_equal_engine_by_engine(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # Ray's actors import tests.fixed_noise
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    weights = {}
    for engine in ("process", "workers", "ray"):
        config = settings(copy_of(hospitals, tmp_path / f"hospitals-{engine}"), tmp_path / engine)
        if engine == "ray":  # in a process of its own: Ray leaves threads and open files behind
            code = f"""
from fedmm.cli import simulate_on_ray; from fedmm.config import RunConfig
simulate_on_ray(RunConfig.from_flat({config.flat()!r}), client={FIXED!r})"""
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        else:
            simulate_here(config, workers=2 if engine == "workers" else 0, client=FIXED)
        weights[engine] = load_file(tmp_path / engine / "model.safetensors")
    for engine in ("workers", "ray"):
        assert weights[engine].keys() == weights["process"].keys()
        for name, value in weights["process"].items():
            assert torch.equal(weights[engine][name], value), f"{engine}: {name}"


LARGE = {"densenet121", "resnet50", "vgg16"}  # as resnet18, minutes each
STEPS = {"report": "gru", "audio": "recurrent"}  # what `aligned` needs


def mixes() -> list[dict[str, str]]:
    """Model settings in which every leaf that needs no folder occurs at least once."""
    found = catalogue()
    leaves = {m: [n for n in names if not encoders[m].get(n).from_folder] for m, names in found["encoders"].items()}
    leaves["image"] = [name for name in leaves["image"] if name not in LARGE]
    mixed = []
    for i, fusion in enumerate(found["fusions"]):
        chosen = {m: names[i % len(names)] for m, names in leaves.items()} | (STEPS if fusion == "aligned" else {})
        mixed.append({f"model.{m}": name for m, name in chosen.items()} | {"model.fusion": fusion})
    return mixed


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("which", [slice(2, 4), pytest.param(slice(None), marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_leaf_ends_with_equal_weights_within_this_process_and_in_workers(
    hospitals: Path, tmp_path: Path, which: slice
) -> None:
    for workers in (0, 2):
        folder = copy_of(hospitals, tmp_path / f"hospitals-{workers}")
        nodes = [{"site": str(path)} for path in sorted(folder.iterdir())]
        with LocalGrid(FIXED, nodes, workers=workers) as grid:
            for i, mix in list(enumerate(mixes()))[which]:
                small = {"privacy.epsilon": 0.9, "federation.rounds": 1, "data.image_size": 32}
                coordinate(grid, settings(folder, tmp_path / f"{i}-{workers}", **small, **mix))
    for i, mix in list(enumerate(mixes()))[which]:
        here, there = (load_file(tmp_path / f"{i}-{workers}" / "model.safetensors") for workers in (0, 2))
        assert here.keys() == there.keys()
        assert all(torch.equal(value, there[name]) for name, value in here.items()), mix


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_ends_with_the_same_weights(hospitals: Path, tmp_path: Path) -> None:
    def run(name: str, *, stop_after: int | None) -> Path:
        folder = tmp_path / f"h-{name}"
        config = settings(
            folder if folder.exists() else copy_of(hospitals, folder), tmp_path / name, **{"federation.rounds": 4}
        )
        nodes = [{"site": str(p)} for p in sorted(folder.iterdir())]
        with LocalGrid(FIXED, nodes) as grid:
            if stop_after is None:
                return coordinate(grid, config)
            asked = 0
            send = grid.send_and_receive

            def interrupted(messages: object, **more: object) -> object:
                nonlocal asked
                asked += 1
                if asked > stop_after + 1:  # the first one is the introduction
                    raise KeyboardInterrupt
                return send(messages, **more)  # type: ignore[arg-type]

            grid.send_and_receive = interrupted  # type: ignore[method-assign, assignment]
            with pytest.raises(KeyboardInterrupt):
                coordinate(grid, config)
            return tmp_path / name

    whole = run("whole", stop_after=None)
    run("parts", stop_after=2)
    assert len(read_rounds(tmp_path / "parts")) == 2
    parts = run("parts", stop_after=None)
    assert [r["round"] for r in read_rounds(parts)] == [1, 2, 3, 4]
    for name, value in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(parts / "model.safetensors")[name], value), name


def test_without_the_test_generator_two_runs_differ(hospitals: Path, tmp_path: Path) -> None:
    """Same seed, same data, same settings: only privacy's noise may differ, and it must."""
    found = []
    for name in ("a", "b"):
        config = settings(copy_of(hospitals, tmp_path / f"h-{name}"), tmp_path / name, **{"federation.rounds": 1})
        simulate_here(config, workers=0)
        found.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_flwr_run_trains_two_hospitals_under_ray(hospitals: Path, tmp_path: Path) -> None:
    here, out, home = copy_of(hospitals, tmp_path / "hospitals"), tmp_path / "run", tmp_path / "flwr"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    given = {**TINY, "data.hospitals": str(here), "federation.out": str(out)}
    overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in given.items())
    federation = "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2"
    try:
        done = subprocess.run(
            ["flwr", "run", ".", "--stream", "--federation-config", federation, "-c", overrides],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert (out / "model.safetensors").exists(), done.stdout[-3000:] + done.stderr[-3000:]
        # `flwr run` returns 0 for a failed run as well: the list of runs tells
        listed = subprocess.run(
            ["flwr", "ls", "--format", "json"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert "finished:completed" in listed.stdout, listed.stdout
    finally:
        stop_superlink(home)
    records = read_rounds(out)
    assert [record["trained"] for record in records] == [["hospital_1", "hospital_2"]] * 2
    assert (out / "report.html").exists()


def stop_superlink(home: Path) -> None:
    """`flwr run` leaves a SuperLink; the one with our FLWR_HOME is ours."""
    mark = f"FLWR_HOME={home}".encode()
    for entry in Path("/proc").iterdir():
        try:
            ours = entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if ours and int(entry.name) != os.getpid():
            os.kill(int(entry.name), signal.SIGTERM)
    time.sleep(1)
