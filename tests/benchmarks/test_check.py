"""A benchmark that got slower is found, and one that only looks different is not. With invented figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import check

FIGURES = {"step_ms": 80.0, "step_to_plain": 1.3, "step_to_plain_spread": 0.1, "memory_to_plain": 2.0, "into": 3.0}


def measured(name: str, figures: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark of this name that finds these figures."""
    module = ModuleType(f"benchmarks.{name}")
    module.measure = lambda quick: figures  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"benchmarks.{name}", module)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(check, "STORED", tmp_path / "ratios.json")
    monkeypatch.setattr(check, "_commit", lambda: "abc")
    monkeypatch.setattr(check, "NAMES", ("step", "other"))
    measured("step", FIGURES, monkeypatch)
    measured("other", {}, monkeypatch)
    run(monkeypatch, "step", "--store")
    return tmp_path / "ratios.json"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check", *words])
    return check.main()


def test_ratios_are_what_is_kept_and_nothing_else(stored: Path) -> None:
    kept = json.loads(stored.read_text())["full"]["step"]
    assert kept["ratios"] == {
        "step_to_plain": {"value": 1.3, "spread": 0.1},
        "memory_to_plain": {"value": 2.0, "spread": 0.0},
    }
    assert kept["commit"] == "abc"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"step_ms": 8000.0}, 0),
        ({"step_to_plain": 1.3 * 1.15 + 0.099}, 0),
        ({"step_to_plain": 1.3 * 1.15 + 0.101}, 1),
        ({"memory_to_plain": 2.31}, 1),
        ({"memory_to_plain": 0.5, "new_to_plain": 9.0}, 0),
        ({"step_to_plain": float("nan")}, 1),
    ],
    ids=[
        "the same",
        "a slower machine",
        "within the limit",
        "beyond it",
        "no spread",
        "better, and a new one",
        "no number",
    ],
)
def test_a_loss_beyond_the_spread_fails(
    stored: Path,
    change: dict[str, float],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured("step", FIGURES | change, monkeypatch)
    assert run(monkeypatch) == code
    said = capsys.readouterr().out
    assert ("LOSS" in said) == bool(code)
    assert "step_to_plain" in said
    assert "1.59" in said, "the limit is shown"


def test_a_ratio_that_is_no_longer_measured_fails(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured("step", {"step_to_plain": 1.0}, monkeypatch)
    assert run(monkeypatch) == 1


@pytest.mark.parametrize("words", [("other",), ("step", "--quick"), ("--quick",), ("unknown",)])
def test_a_check_that_would_check_nothing_is_refused(
    stored: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as refused:
        run(monkeypatch, *words)
    assert refused.value.code == 2
