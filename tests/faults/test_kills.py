"""kill -9 of every process of a federation, before, during and after a hospital's training: the run ends as if nothing
had happened, each round is paid once, and a person does at most what docs/reliability.md says."""

from __future__ import annotations

import pytest

from fedmm.seeds import stream
from tests.faults import stage
from tests.faults.federation import PROGRAMS, Faulty

SEED = 5
MOMENTS = {
    "before": ("introduce-begin", "train-begin"),
    "during": ("train-step", "train-paid"),
    "after": ("train-sent", "evaluate-begin", "train-settled"),
}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("program", [program for programs in PROGRAMS.values() for program in programs])
def test_a_run_survives_the_kill_of_any_process_at_any_moment(faulty: Faulty, program: str, moment: str) -> None:
    places = MOMENTS[moment]
    place = places[int(stream(SEED, "place", program=program, moment=moment).integers(len(places)))]
    stage.order(faulty.struck, place, "hold")
    name = faulty.begin()
    faulty.held(place)
    faulty.kill(program)
    stage.let_go(faulty.struck)
    resumes = faulty.completes(name)
    print(f"{program} {place}: gone on with {resumes} times")
