"""A hospital's process that dies, or fails, at each place of its work, over the local engine: the run ends as if nothing had
happened, and each round is paid once. A seeded part runs always; the rest with `make faults`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedmm.cli import simulate_here
from fedmm.config import RunConfig, find_hospitals
from fedmm.data.synthetic import synthesize
from fedmm.errors import RunFailed
from fedmm.federation.local import LocalGrid
from fedmm.report.record import read_rounds
from fedmm.seeds import stream
from server.app import coordinate
from tests.faults import stage
from tests.faults.books import all_settled, charges, check_books, run_id
from tests.faults.federation import GIVEN, ROUNDS

SEED = 1
TRAINING = [f"train-{step}" for step in stage.STEPS]
SCORING = [f"evaluate-{step}" for step in stage.STEPS if step != "step"]


def some(places: list[str], *, what: str, count: int) -> list[Any]:
    """So many of them always, the seed says which; the others with `make faults`."""
    short = set(stream(SEED, what).choice(places, count, replace=False))
    return [place if place in short else pytest.param(place, marks=pytest.mark.slow) for place in places]


FAILURES = [place for place in TRAINING if place != "train-step"] + some(SCORING, what="failures", count=2)


@dataclass
class Local:
    """hospitals: their folders, the second one is struck."""

    grid: LocalGrid
    folder: Path
    hospitals: list[Path]
    expected: dict[str, bytes]

    @property
    def struck(self) -> Path:
        return self.hospitals[1]

    def run(self, name: str, **more: object) -> Path:
        given = {**GIVEN, "data.hospitals": str(self.folder), "federation.out": str(self.folder.parent / name), **more}
        return coordinate(self.grid, RunConfig.from_flat(given))

    def ended_as_if_nothing_had_happened(self, run: Path) -> None:
        check_books(run, self.hospitals)
        all_settled(run, self.hospitals, rounds=ROUNDS)
        got = load_file(run / "model.safetensors")
        assert {name: value.numpy().tobytes() for name, value in got.items()} == self.expected


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    folder = tmp_path_factory.mktemp("places")
    for made in synthesize(folder / "hospitals", count=3, patients=12, seed=3):
        with (made / "site.toml").open("a", encoding="utf-8") as file:
            file.write("\n[limits]\nthreads = 1\n")  # two may add up in another order
    shutil.copytree(folder / "hospitals", folder / "calm")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    given = {**GIVEN, "data.hospitals": str(folder / "calm"), "federation.out": str(folder / "calm-run")}
    simulate_here(RunConfig.from_flat(given), workers=0, client="tests.fixed_noise:app")
    hospitals = find_hospitals(folder / "hospitals")
    with LocalGrid("tests.faults.staged:app", [{"site": str(h)} for h in hospitals], workers=2) as grid:
        model = load_file(folder / "calm-run" / "model.safetensors")
        expected = {name: value.numpy().tobytes() for name, value in model.items()}
        yield Local(grid, folder / "hospitals", hospitals, expected)
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _nothing_ordered(local: Local) -> Iterator[None]:
    yield
    stage.let_go(local.struck)


@pytest.mark.parametrize("place", FAILURES)
def test_an_error_that_nobody_foresaw_anywhere_costs_nothing_twice(local: Local, place: str) -> None:
    stage.order(local.struck, place, "fail")
    run = local.run(f"fail-{place}")
    assert stage.came(local.struck, place)
    local.ended_as_if_nothing_had_happened(run)
    (failed,) = [failure for record in read_rounds(run) for failure in record["failures"]]
    assert (failed["hospital"], failed["kind"], failed["code"]) == (local.struck.name, "failed", 1099)


def test_a_training_that_fails_on_the_way_is_answered_with_its_noise_and_charged(local: Local) -> None:
    stage.order(local.struck, "train-step", "fail")
    run = local.run("fail-train-step")
    check_books(run, local.hospitals)
    all_settled(run, local.hospitals, rounds=ROUNDS)
    assert not any(record["failures"] for record in read_rounds(run))


@pytest.mark.parametrize("place", some(TRAINING + SCORING, what="deaths", count=1))
def test_a_process_that_is_killed_anywhere_costs_nothing_twice(local: Local, place: str) -> None:
    stage.order(local.struck, place, "die")
    run = local.run(f"die-{place}")
    assert stage.came(local.struck, place)
    local.ended_as_if_nothing_had_happened(run)
    assert [f["hospital"] for record in read_rounds(run) for f in record["failures"]] == [local.struck.name]


def test_a_run_whose_introduction_failed_has_cost_nothing_and_begins_again(local: Local) -> None:
    stage.order(local.struck, "introduce-begin", "fail")
    with pytest.raises(RunFailed, match="only 2 of at least 3 hospitals can take part"):
        local.run("introduction")
    assert not (local.folder.parent / "introduction").exists()
    local.ended_as_if_nothing_had_happened(local.run("introduction"))


@pytest.mark.parametrize(
    ("place", "state"),
    [("train-step", "reserved"), pytest.param("train-sent", "settled", marks=pytest.mark.slow)],
)
def test_below_the_minimum_the_run_fails_and_goes_on_at_no_further_charge(local: Local, place: str, state: str) -> None:
    """Without retries, to have it at once: the round is asked again when the run goes on."""
    stage.order(local.struck, place, "die")
    out = local.folder.parent / f"few-{place}"
    with pytest.raises(RunFailed, match=r"round 1: 2 usable replies, federation\.min_hospitals is 3"):
        local.run(out.name, **{"federation.retries": 0})
    assert charges(local.struck, run_id(out)) == [(1, state)]
    local.ended_as_if_nothing_had_happened(local.run(out.name, **{"federation.retries": 0}))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "state"), [("train-step", "reserved"), ("train-sent", "settled")])
def test_silence_and_late_answers_are_told_charged_and_not_waited_for(local: Local, place: str, state: str) -> None:
    """Its charge stays: reserved while it trains, settled when the answer is late and of no use any more."""
    stage.order(local.struck, place, "hold")
    run = local.run(f"silent-{place}", **{"federation.min_hospitals": 2, "federation.round_timeout": 30.0})
    check_books(run, local.hospitals)
    first, second = read_rounds(run)
    assert [(f["hospital"], f["kind"]) for f in first["failures"]] == [(local.struck.name, "silent")]
    assert local.struck.name in second["trained"]
    assert charges(local.struck, run_id(run)) == [(1, state), (2, "settled")]
