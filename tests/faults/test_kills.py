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


# Without them nobody is left who would follow the run: a person has it go on, without waiting for Flower to notice.
TAKE_THE_RUN_ALONG = ("serverapp", "superexec", "coordinator")


@pytest.mark.parametrize("program", [program for programs in PROGRAMS.values() for program in programs])
def test_a_run_survives_the_kill_of_any_process_before_during_and_after_a_training(
    faulty: Faulty, program: str
) -> None:
    """All three in one run."""
    chosen = {
        moment: places[int(stream(SEED, "place", program=program, moment=moment).integers(len(places)))]
        for moment, places in MOMENTS.items()
    }
    order, resumes = list(chosen.values()), 0
    stage.order(faulty.struck, order[0], "hold")
    name = faulty.begin()
    for place, following in zip(order, [*order[1:], ""], strict=True):
        resumes += faulty.comes_to(name, place)
        faulty.kill(program)
        if following:
            stage.order(faulty.struck, following, "hold")
        stage.release(faulty.struck, place)
        if program in TAKE_THE_RUN_ALONG:
            faulty.connected()
            faulty.resume(name)
            resumes += 1
        print(f"{program} {place}: gone on with {resumes} times so far")
    faulty.completes(name)
