"""What site.toml grants a training of this machine, when it ends early, and what its own people see of it."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import client.app
import client.status
import client.work
from client.site import Site
from client.work import allowed, at_work
from fedmm.config import load_site
from fedmm.errors import LedgerUnusable, PolicyRefused
from fedmm.training.watch import STOP_VARIABLE
from tests.client.test_client import CONFIG, hospital, spent
from tests.client.test_gate import set_policy
from tests.client.test_outbox import asked, books, status

__all__ = ["hospital"]
LATE, STOPPED, POLICY = 1010, 1011, 1002


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(STOP_VARIABLE, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def limit(hospital: Path, text: str) -> Site:
    with (hospital / "site.toml").open("a", encoding="utf-8") as file:
        file.write(f"\n[limits]\n{text}\n")
    return Site(hospital, load_site(hospital))


# --- deadline and stop --------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves: an hour with each step."""
    now = [0.0]
    honest = client.app.train

    def hour(*given: Any, progress: Any = lambda *_: None, check: Any, **more: Any) -> None:
        def late() -> None:
            now[0] += 3600
            check()

        honest(*given, progress=progress, check=late, **more)

    monkeypatch.setattr("fedmm.training.watch.time.monotonic", lambda: now[0])
    monkeypatch.setattr(client.app, "train", hour)
    return now


@pytest.mark.parametrize("who", ["hospital", "coordinator"])
def test_a_training_that_passes_its_deadline_ends_and_goes_on_under_its_charge(
    hospital: Path, monkeypatch: pytest.MonkeyPatch, slow: list[float], who: str
) -> None:
    settings = {"federation__round_timeout": 604_800.0}
    if who == "hospital":
        limit(hospital, "seconds = 60")
    else:
        settings = {"federation__round_timeout": 60.0}
    reply = asked(hospital, **settings)
    assert (reply.error.code, status(hospital)["phase"], status(hospital)["code"]) == (LATE, "refused", LATE)
    assert books(hospital)[:2] == ([("train", 1, "reserved")], 0)
    monkeypatch.undo()
    assert asked(hospital, **settings).has_content()
    assert books(hospital)[:2] == ([("train", 1, "settled")], 1)


def test_a_stop_ends_training_and_scoring_at_the_next_step(
    hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_policy(hospital, metrics="noisy")
    stop = tmp_path / "stop"
    monkeypatch.setenv(STOP_VARIABLE, str(stop))
    honest = client.app.patients_of

    def stopped_while_loading(*given: Any) -> Any:
        stop.touch()
        return honest(*given)

    for kind in ("train", "evaluate"):
        with monkeypatch.context() as patch:
            patch.setattr(client.app, "patients_of", stopped_while_loading)
            assert asked(hospital, kind=kind).error.code == STOPPED
        before = books(hospital)
        assert [state for *_, state in before[0]] == ["reserved"] if kind == "train" else ["settled", "reserved"]
        assert asked(hospital, kind=kind, run="run2").error.code == STOPPED
        assert books(hospital)[0] == before[0], "who comes after the stop spends nothing"
        stop.unlink()
        assert asked(hospital, kind=kind).has_content()
    assert [state for *_, state in books(hospital)[0]] == ["settled", "settled"]


# --- limits -------------------------------------------------------------------------------------------------------------


def test_the_hospitals_machine_is_the_hospitals(hospital: Path) -> None:
    site = limit(hospital, 'device = "cpu"\nphysical_studies = 7')
    wants = CONFIG.replace(**{"training.device": "cuda:3", "training.physical_studies": 100})
    got = allowed(wants, site).training
    assert (got.device, got.physical_studies) == ("cpu", 7)
    assert allowed(wants.replace(**{"training.physical_studies": 3}), site).training.physical_studies == 3
    assert asked(hospital, training__device="cuda:3").has_content()


def test_isolated_patients_are_isolated_whatever_the_limit(hospital: Path) -> None:
    text = (hospital / "site.toml").read_text(encoding="utf-8")
    (hospital / "site.toml").write_text(
        text.replace("[privacy]", "[privacy]\nisolate_patients = true"), encoding="utf-8"
    )
    assert allowed(CONFIG, limit(hospital, "physical_studies = 7")).training.physical_studies == 1


@pytest.mark.parametrize(
    "line",
    [
        'device = "tpu"',
        "device = 1",
        "memory_mb = -1",
        "seconds = nan",
        "seconds = inf",
        "threads = -2",
        "trainings = 0",
        "x = 1",
    ],
)
def test_a_limit_that_is_none_refuses_everything(hospital: Path, line: str) -> None:
    with pytest.raises(PolicyRefused):
        limit(hospital, line)
    assert asked(hospital).error.code == POLICY


def test_threads_and_memory_are_limited_for_the_work_and_as_before_after_it(hospital: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    site = limit(hospital, "threads = 2\nmemory_mb = 900000")
    with at_work(site, CONFIG, run="r", round=1):
        assert torch.get_num_threads() == 2
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 900_000 * 2**20
    assert torch.get_num_threads() == 1
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_memory_of_a_gpu_is_limited_to_its_part(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[float] = []

    class Gpu:
        total_memory = 4000 * 2**20

    def set_part(part: float, device: int | torch.device) -> None:
        assert torch._utils._get_device_index(device) == 0, "as torch reads it: a device without a number is an error"
        set_to.append(part)

    monkeypatch.setattr(client.work, "choose_device", lambda wanted: wanted)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_part)
    site = limit(hospital, "memory_mb = 1000")
    with at_work(site, CONFIG.replace(**{"training.device": "cuda"}), run="r", round=1):
        assert set_to == [0.25]
    assert set_to == [0.25, 1.0]


def test_a_device_that_is_not_there_is_refused_by_name_and_not_by_the_limit(hospital: Path) -> None:
    limit(hospital, 'memory_mb = 1000\ndevice = "cuda:77"')
    assert asked(hospital).error.code == POLICY
    assert spent(hospital).releases == 0


def test_without_a_lock_nothing_is_trained(hospital: Path) -> None:
    (hospital / ".fedmm").touch()
    assert asked(hospital).error.code == LedgerUnusable.code
    assert spent(hospital).releases == 0


# --- status -------------------------------------------------------------------------------------------------------------


def test_the_status_tells_what_is_done_and_nothing_of_a_patient(
    hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    replace = client.status.os.replace

    def note(new: Path, old: Path) -> None:
        if old.name == "status.json":
            seen.append(json.loads(new.read_text(encoding="utf-8")))
        replace(new, old)

    monkeypatch.setattr(client.status.os, "replace", note)
    assert asked(hospital).has_content()
    assert [said["phase"] for said in seen] == ["waiting", "loading", "training", "settled"]
    assert (seen[2]["run"], seen[2]["round"], seen[2]["step"], seen[2]["steps"]) == ("run1", 1, 1, 1)
    assert seen[2]["step_seconds"] > 0
    keys = {"run", "round", "phase", "step", "steps", "step_seconds", "started", "updated", "code", "memory_mb"}
    assert {frozenset(said) for said in seen} == {frozenset(keys | {"gpu_memory_mb"})}
    assert status(hospital)["memory_mb"] > 0
    assert (hospital / ".fedmm" / "status.json").stat().st_mode & 0o077 == 0


def test_steps_of_a_phase_are_written_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(client.status.time, "monotonic", lambda: now[0])
    told = client.status.Status(tmp_path / "status.json", run="r", round=1)
    steps = []
    for step in range(1, 31):
        now[0] += 0.1
        told.say("training", step=step, steps=30)
        steps.append(json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))["step"])
    assert 3 <= len(set(steps)) <= 4
    told.say("settled")
    assert json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))["phase"] == "settled"


def test_an_unforeseen_error_is_a_failure_in_the_status(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("PATIENT-SECRET")

    monkeypatch.setattr(client.app, "train", fail)
    assert asked(hospital).error.code == 1099
    assert (status(hospital)["phase"], status(hospital)["code"]) == ("failed", 1099)
    assert "SECRET" not in json.dumps(status(hospital))


def test_a_status_that_cannot_be_written_stops_nobody(hospital: Path) -> None:
    (hospital / ".fedmm" / "status.json").mkdir(parents=True)
    assert asked(hospital).has_content()
