"""A coordinator that is killed anywhere goes on: the same final weights, nothing charged twice, nobody left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import server.app
from fedmm.cli import simulate_here
from fedmm.config import find_hospitals, load_site
from fedmm.privacy.ledger import Ledger
from fedmm.report.record import read_rounds
from tests.e2e.test_engines import FIXED, copy_of, hospitals, one_thread, settings

__all__ = ["hospitals", "one_thread"]


def noisy_scores(folder: Path, *, epsilon: float) -> None:
    for hospital in find_hospitals(folder):
        text = (hospital / "site.toml").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not line.startswith(("metrics", "epsilon"))]
        new = "\n".join(lines).replace("[privacy]", f"[privacy]\nepsilon = {epsilon}")
        new = new.replace("[release]", '[release]\nmetrics = "noisy"') if "[release]" in new else new
        (hospital / "site.toml").write_text(new + "\n", encoding="utf-8")


def charges(folder: Path) -> list[tuple[str, list[tuple[str, int, str]], float]]:
    found = []
    for hospital in find_hospitals(folder):
        with Ledger.open(hospital, load_site(hospital), create=False) as ledger:
            ledger.verify()
            events = [(str(e["kind"]), int(e["round"]), str(e["state"])) for e in ledger.events()]
            found.append((hospital.name, sorted(events), ledger.epsilon()))
    return found


def killed_before(name: str, call: int, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """As if by kill -9 in front of the n-th call: nothing of it is on disk, whatever was asked was answered."""
    honest, calls = getattr(server.app, name), []

    def dies(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return honest(*given, **more)

    monkeypatch.setattr(server.app, name, dies)
    return honest


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "call"),
    [("save_checkpoint", 2), ("save_checkpoint", 3), ("append_round", 2), ("save_model", 1)],
    ids=["in round 1", "in round 2", "after the scores", "before the model"],
)
def test_a_resumed_run_ends_with_the_weights_and_charges_of_an_uninterrupted_one(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    """The ledgers have room for this run and no more: a second charge, or room asked for twice, would refuse the rest."""
    weights, spent = {}, {}
    for which in ("calm", "killed"):
        folder = copy_of(hospitals, tmp_path / f"hospitals-{which}")
        noisy_scores(folder, epsilon=8.0)
        config = settings(folder, tmp_path / which, **{"federation.strategy": "fedavgm"})
        if which == "killed":
            with monkeypatch.context() as patch:
                killed_before(name, call, patch)
                with pytest.raises(KeyboardInterrupt):
                    simulate_here(config, workers=0, client=FIXED)
        simulate_here(config, workers=0, client=FIXED)
        weights[which] = load_file(tmp_path / which / "model.safetensors")
        spent[which] = charges(folder)
        assert [sorted(record["trained"]) for record in read_rounds(tmp_path / which)] == [
            ["hospital_1", "hospital_2"]
        ] * 2
    assert all(weights["calm"][n].numpy().tobytes() == v.numpy().tobytes() for n, v in weights["killed"].items())
    assert spent["killed"] == spent["calm"]
    assert all([kind for kind, *_ in events] == ["evaluate", "train", "train"] for _, events, _ in spent["killed"])
    assert all(epsilon <= 8.0 for *_, epsilon in spent["killed"])


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_was_killed_in_round_1_may_begin_anew_with_other_settings(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(hospitals, tmp_path / "hospitals-other")
    with monkeypatch.context() as patch:
        killed_before("save_checkpoint", 2, patch)
        with pytest.raises(KeyboardInterrupt):
            simulate_here(settings(folder, tmp_path / "run"), workers=0, client=FIXED)
    simulate_here(settings(folder, tmp_path / "run", **{"federation.rounds": 1}), workers=0, client=FIXED)
    assert len(read_rounds(tmp_path / "run")) == 1
