"""What TensorBoard and MLflow are shown of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from fedmm.federation.rounds import RoundRecord
from fedmm.report.trackers import MLFLOW_URI, TENSORBOARD, Trackers, scalars
from tests.report.run_folder import NAMES, config, record, write_run

ROUNDS = [RoundRecord(**record(number, NAMES, rounds=2, scored=number == 2)) for number in (1, 2)]


def events(folder: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of all event files, read by their form: length, 4 bytes of check, an Event, 4 bytes of check."""
    found = []
    for path in sorted((folder / TENSORBOARD).iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + size :]
    return found


def track(folder: Path) -> list[str]:
    """What was said."""
    said: list[str] = []
    with Trackers(folder, say=said.append) as trackers:
        for one in ROUNDS:
            trackers.note(one)
    return said


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(MLFLOW_URI, raising=False)
    return write_run(tmp_path / "run", config(NAMES, rounds=2), [])


def test_tensorboard_has_every_number_of_every_round(run: Path) -> None:
    assert track(run) == []
    wanted = [(name, one.round, value) for one in ROUNDS for name, value in scalars(one).items()]
    assert events(run) == [(name, step, pytest.approx(value, rel=1e-6)) for name, step, value in wanted]
    names = {name for name, _, _ in wanted}
    assert {f"epsilon/{name}" for name in NAMES} | {"round/seconds", "bytes/up", "bytes/down"} <= names
    assert f"mean_auroc/{NAMES[0]}" in names


def test_nothing_is_written_before_a_round_is_done(run: Path) -> None:
    with Trackers(run, say=print):
        pass
    assert not (run / TENSORBOARD).exists()


def test_mlflow_that_is_asked_for_and_not_installed_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MLFLOW_URI, "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert track(run) == ["MLflow: not installed; the run goes on without it"]
    assert len(events(run)) > 0


def test_mlflow_gets_the_settings_once_and_the_numbers_by_round(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    fake = SimpleNamespace(
        set_experiment=lambda name: calls.append(("experiment", name)),
        start_run=lambda run_name: calls.append(("run", run_name)),
        log_params=lambda values: calls.append(("params", values)),
        log_metrics=lambda values, step: calls.append(("metrics", (step, values))),
        end_run=lambda status: calls.append(("end", status)),
    )
    monkeypatch.setenv(MLFLOW_URI, "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    assert track(run) == []
    assert [what for what, _ in calls] == ["experiment", "run", "params", "metrics", "metrics", "end"]
    assert "data.hospitals" not in calls[2][1]
    assert calls[2][1]["privacy.epsilon"] == 8.0
    assert calls[3][1] == (1, scalars(ROUNDS[0]))
    assert calls[-1] == ("end", "FINISHED")


def test_a_tracker_that_fails_ends_no_run_and_is_named_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / TENSORBOARD).write_text("not a folder")
    (said,) = track(run)
    assert said.startswith("TensorBoard: ")
    assert said.endswith("Error; the run goes on without it")
