"""Work ends between two steps when its time is up or somebody stops it; not before, and not because of data."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fedmm.errors import DeadlinePassed, RunStopped
from fedmm.training.watch import STOP_VARIABLE, Watch


def test_without_deadline_and_stop_file_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STOP_VARIABLE, raising=False)
    watch = Watch()
    watch()
    assert not watch.late


def test_a_deadline_counts_from_when_the_watch_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watch(5.0)
    now[0] = 105.0
    watch()
    now[0] = 105.1
    with pytest.raises(DeadlinePassed):
        watch()


def test_the_stop_file_ends_work_as_soon_as_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = tmp_path / "stop"
    monkeypatch.setenv(STOP_VARIABLE, str(stop))
    watch = Watch()
    watch()
    stop.touch()
    with pytest.raises(RunStopped):
        watch()
    stop.unlink()
    watch()
