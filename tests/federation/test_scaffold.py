"""Control variates: less drift where hospitals differ, and nothing forgotten."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fedmm.federation.scaffold import ControlVariates, norm
from fedmm.training.local import still_parts

STEPS, RATE = 10, 0.2
# f_i(w) = curve_i / 2 (w - goal_i)^2: steep hospitals run to their own optimum within a round, flat ones do not
HOSPITALS = {"aachen": (3.0, 1.0), "basel": (0.2, -3.0), "chur": (0.5, 5.0)}
OPTIMUM = sum(curve * goal for curve, goal in HOSPITALS.values()) / sum(curve for curve, _ in HOSPITALS.values())


def variates(still: Mapping[str, tuple[str, ...]] | None = None, *, bound: float = 1e9) -> ControlVariates:
    return ControlVariates(still or dict.fromkeys(HOSPITALS, ()), steps=STEPS, rate=RATE, bound=bound)


def local(
    hospital: str, start: torch.Tensor, correction: Mapping[str, torch.Tensor] | None, *, noise: float = 0.0
) -> torch.Tensor:
    curve, goal = HOSPITALS[hospital]
    w = start.clone()
    for _ in range(STEPS):
        gradient = curve * (w - goal) + noise * torch.randn_like(w)
        w = w - RATE * (gradient + (0 if correction is None else correction["w"]))
    return w


def a_round(
    w: torch.Tensor, memory: ControlVariates | None, *, absent: tuple[str, ...] = (), noise: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    before, after = {"w": w}, {}
    for hospital in sorted(set(HOSPITALS)):
        correction = memory.correction(hospital, before) if memory else None
        if hospital not in absent:
            after[hospital] = local(hospital, w, correction, noise=noise)
    if memory:
        learn(memory, before, {hospital: {"w": value} for hospital, value in after.items()})
    return torch.stack(list(after.values())).mean(0), after


def learn(
    memory: ControlVariates, before: dict[str, torch.Tensor], after: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    for hospital, weights in after.items():
        memory.learn(hospital, before, weights)
    memory.over()


def run(memory: ControlVariates | None, rounds: int, *, noise: float = 0.0) -> tuple[float, float]:
    """How far the mean over the last half of the rounds ends from the optimum, and how far hospitals ended apart."""
    torch.manual_seed(0)
    w, found, apart = torch.zeros(64), [], 0.0
    for number in range(rounds):
        w, after = a_round(w, memory, noise=noise)
        if number >= rounds // 2:
            found.append(w.mean())
        ends = torch.stack(list(after.values()))
        apart = float((ends - ends.mean(0)).norm(dim=0).mean())
    return abs(float(torch.stack(found).mean()) - OPTIMUM), apart


def test_where_hospitals_differ_drift_goes_and_the_optimum_is_found() -> None:
    off, apart = run(None, 200)
    off_with, apart_with = run(variates(), 200)
    assert off > 0.3
    assert off_with < 1e-3
    assert apart_with < 0.01 * apart


def test_with_noise_in_every_step_the_drift_is_still_gone_on_average() -> None:
    """64 coordinates x 200 rounds: the mean's standard error is below 0.01, the limit is beyond 10 of them."""
    off, _ = run(None, 400, noise=0.5)
    off_with, _ = run(variates(), 400, noise=0.5)
    assert off_with < 0.1 < off


def test_in_the_first_round_there_is_nothing_to_correct() -> None:
    assert variates().correction("aachen", {"w": torch.zeros(1)}) is None


def test_a_variate_is_the_mean_gradient_of_the_round_less_what_was_added() -> None:
    memory, w = variates(), torch.zeros(1)
    for _ in range(3):
        before = w
        correction = memory.correction("aachen", {"w": w})
        _, after = a_round(w, memory)
        added = torch.zeros(1) if correction is None else correction["w"]
        torch.testing.assert_close(
            memory.state()["scaffold/aachen/w"], (before - after["aachen"]) / (STEPS * RATE) - added
        )
        w = torch.stack(list(after.values())).mean(0)


def test_who_is_asked_late_in_a_round_is_sent_what_was_known_when_it_began() -> None:
    """Or an attempt that is made again would be another question, which a hospital that has answered refuses."""
    memory, w = variates(), torch.zeros(1)
    w, _ = a_round(w, memory)
    first = memory.correction("chur", {"w": w})
    memory.learn("aachen", {"w": w}, {"w": w + 5})
    again = memory.correction("chur", {"w": w})
    assert first is not None
    assert again is not None
    assert torch.equal(first["w"], again["w"])
    memory.over()
    after = memory.correction("chur", {"w": w})
    assert after is not None
    assert not torch.equal(first["w"], after["w"])


def test_who_is_absent_keeps_its_variate_and_who_comes_late_begins_with_none() -> None:
    memory, w = variates(), torch.zeros(1)
    w, _ = a_round(w, memory, absent=("chur",))
    first = memory.state()
    assert set(first) == {"scaffold/aachen/w", "scaffold/basel/w"}
    late = memory.correction("chur", {"w": w})
    assert late is not None
    torch.testing.assert_close(late["w"], (first["scaffold/aachen/w"] + first["scaffold/basel/w"]) / 3)
    w, _ = a_round(w, memory, absent=("basel",))
    second = memory.state()
    assert torch.equal(second["scaffold/basel/w"], first["scaffold/basel/w"])
    assert not torch.equal(second["scaffold/aachen/w"], first["scaffold/aachen/w"])
    assert "scaffold/chur/w" in second


def test_what_is_put_aside_goes_on_bit_by_bit() -> None:
    memory, w = variates(), torch.zeros(3)
    for _ in range(3):
        w, _ = a_round(w, memory)
    again = variates()
    again.restore(memory.state() | {"momentum.0": torch.ones(2), "average/w": torch.ones(1)})
    assert again.state().keys() == memory.state().keys()
    assert torch.equal(a_round(w, memory)[0], a_round(w, again)[0])


def test_corrections_cancel_in_the_mean_over_hospitals() -> None:
    memory, w = variates(), torch.zeros(4)
    w, _ = a_round(w, memory)
    sent = [memory.correction(hospital, {"w": w}) for hospital in HOSPITALS]
    total = torch.stack([each["w"] for each in sent if each is not None]).sum(0)
    torch.testing.assert_close(total, torch.zeros(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bound", [0.5, 1e9])
def test_a_correction_is_no_longer_than_a_rounds_change_may_be(bound: float) -> None:
    memory = variates(bound=bound)
    w, _ = a_round(torch.zeros(4), memory)
    correction = memory.correction("basel", {"w": w})
    assert correction is not None
    assert (norm(correction) * STEPS * RATE > 0.49) if bound == 0.5 else (norm(correction) > 1)
    assert norm(correction) * STEPS * RATE <= bound


def test_a_hospital_has_no_part_in_the_mean_of_what_it_does_not_train() -> None:
    name, still = "encoders.audio.a", still_parts(("image", "report"))
    memory = variates({"aachen": (), "basel": still, "chur": ()})
    before = {name: torch.zeros(2), "head": torch.zeros(2)}
    after = {h: {name: torch.full((2,), -float(i)), "head": torch.full((2,), -1.0)} for i, h in enumerate(HOSPITALS)}
    learn(memory, before, after)
    assert "scaffold/basel/head" in memory.state()
    assert f"scaffold/basel/{name}" not in memory.state()
    sent = {h: memory.correction(h, before) for h in HOSPITALS}
    assert sent["aachen"] is not None
    assert sent["basel"] is not None
    assert sent["basel"][name].abs().max() == 0
    own = memory.state()
    mean = (own[f"scaffold/aachen/{name}"] + own[f"scaffold/chur/{name}"]) / 2
    torch.testing.assert_close(sent["aachen"][name], mean - own[f"scaffold/aachen/{name}"])
