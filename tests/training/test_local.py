"""Pulls on a local gradient, and parts that stay as they are."""

from __future__ import annotations

import pytest
import torch

from fedmm.config import RunConfig, TrainingConfig
from fedmm.errors import ConfigError
from fedmm.models.multimodal import build_model
from fedmm.privacy.engine import CLIPPING
from fedmm.schema import MODALITIES
from fedmm.training import loop
from fedmm.training.local import Still, check_local, see_only, still_parts, unchanged
from fedmm.training.loop import Workbench, train
from tests import tiny
from tests.fixed_noise import FixedNoise
from tests.training.test_loop import Patients, plan

RATE = 0.25
CONFIG = TrainingConfig(learning_rate=RATE, modality_dropout=0, batch_size=4)
STUDIES = [1, 2, 3, 1, 2]
NO_AUDIO = ("image", "report")
Weights = dict[str, torch.Tensor]


def made(clipping: str = "hooks", still: Still = ()) -> Workbench:
    bench = Workbench(tiny.spec(), torch.device("cpu"), clipping=clipping, still=still)
    bench.load(dict(build_model(tiny.spec(), 1).trained()))
    return bench


def after(
    bench: Workbench, *, private: bool, steps: int = 4, config: TrainingConfig = CONFIG, **more: object
) -> Weights:
    noise = FixedNoise(5, scale=float(more.pop("scale", 1.0)))  # type: ignore[arg-type]
    cohort = Patients(more.pop("studies", STUDIES))  # type: ignore[arg-type]
    train(bench, cohort, plan(private=private, steps=steps, rate=1.0), config=config, noise=noise, **more)  # type: ignore[arg-type]
    return bench.weights()


def change(after: Weights, before: Weights) -> float:
    return float(torch.cat([(after[name] - before[name]).flatten() for name in before]).norm())


# --- FedProx ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [True, False])
def test_without_a_pull_every_bit_is_as_if_there_were_none(monkeypatch: pytest.MonkeyPatch, *, private: bool) -> None:
    with_it = after(made(), private=private)
    monkeypatch.setattr(loop, "pull", lambda *_, **__: False)
    without = after(made(), private=private)
    assert all(torch.equal(with_it[name], without[name]) for name in without)


@pytest.mark.parametrize("private", [True, False])
def test_the_strongest_pull_keeps_the_weights_one_step_from_the_rounds(*, private: bool) -> None:
    """mu x rate = 1 takes back all that was walked before each step: 40 steps end as far away as one does."""
    start = made().weights()
    pulled = CONFIG.model_copy(update={"proximal": 1 / RATE})
    one = change(after(made(), private=private, steps=1), start)
    far = change(after(made(), private=private, steps=40), start)
    near = change(after(made(), private=private, steps=40, config=pulled), start)
    assert near < 2 * one < 0.8 * far
    weaker = CONFIG.model_copy(update={"proximal": 0.1 / RATE})
    assert near < change(after(made(), private=private, steps=40, config=weaker), start) < far


def test_a_pull_is_added_after_the_noise_and_changes_neither_clipping_nor_noise() -> None:
    """One step from the round's own weights: nothing to pull yet, so the noisy step is the same to the last bit."""
    pulled = CONFIG.model_copy(update={"proximal": 3.0})
    one, two = after(made(), private=True, steps=1), after(made(), private=True, steps=1, config=pulled)
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- SCAFFOLD's correction --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("private", [True, False])
def test_a_correction_moves_each_step_by_itself_times_the_rate(clipping: str, *, private: bool) -> None:
    correction = {name: torch.full_like(value, 0.5) for name, value in made().weights().items()}
    plain = after(made(clipping), private=private, steps=1)
    moved = after(made(clipping), private=private, steps=1, correction=correction)
    for name, value in plain.items():
        torch.testing.assert_close(moved[name], value - RATE * correction[name])


def test_a_plain_step_without_patients_is_a_step_of_the_correction() -> None:
    """The server takes the number of steps as given: K x rate x correction, whoever was sampled."""
    start = made().weights()
    correction = {name: torch.full_like(value, 0.5) for name, value in start.items()}
    moved = after(made(), private=False, steps=3, studies=[], correction=correction)
    for name, value in start.items():
        torch.testing.assert_close(moved[name], value - 3 * RATE * 0.5)


# --- parts that stay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("private", [True, False])
def test_parts_of_undeclared_modalities_stay_bit_by_bit_and_all_others_are_trained(
    clipping: str, *, private: bool
) -> None:
    still = still_parts(NO_AUDIO)
    bench = made(clipping, still)
    before = bench.weights()
    now = after(bench, private=private, modalities=NO_AUDIO)
    stays = {name for name in before if torch.equal(before[name], now[name])}
    assert set(unchanged(before, still)) == {n for n in before if n.startswith(("encoders.audio.", "norms.audio."))}
    assert stays == set(unchanged(before, still)) if private else stays >= set(unchanged(before, still))


@pytest.mark.parametrize("clipping", CLIPPING)
def test_what_is_trained_is_what_it_is_without_the_modality(clipping: str) -> None:
    """Same sum, same clipping: leaving parts out changes nothing in the rest, so the sensitivity is the same C."""
    all_trained = after(made(clipping), private=True, scale=0.0, modalities=NO_AUDIO)
    some = after(made(clipping, still_parts(NO_AUDIO)), private=True, scale=0.0, modalities=NO_AUDIO)
    for name, value in all_trained.items():
        torch.testing.assert_close(some[name], value, rtol=1e-5, atol=1e-6)


def test_a_study_shows_only_what_is_declared() -> None:
    batch = tiny.batch([3, 2])
    seen = see_only(batch, NO_AUDIO)
    audio = MODALITIES.index("audio")
    assert batch.seen_BM[:, audio].any()
    assert not seen.seen_BM[:, audio].any()
    assert torch.equal(seen.seen_BM[:, :audio], batch.seen_BM[:, :audio])
    assert see_only(batch, MODALITIES) is batch


def test_a_hospital_that_declares_all_leaves_nothing_out() -> None:
    assert still_parts(MODALITIES) == ()
    assert unchanged(made().weights(), ()) == []


def test_weights_of_another_model_are_refused_whatever_is_trained() -> None:
    bench = made(still=still_parts(NO_AUDIO))
    weights = bench.weights()
    del weights["norms.audio.weight"]
    with pytest.raises(ValueError, match="not those of this model"):
        bench.load(weights)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"training.proximal": 2.0, "training.learning_rate": 0.6}, "above 1"),
        ({"federation.strategy": "scaffold", "training.optimizer": "adam"}, "scaffold does not work with training.opt"),
        ({"federation.strategy": "scaffold", "federation.weights": "declared"}, "scaffold does not work with federa"),
    ],
    ids=["overshoots", "adam", "weights"],
)
def test_settings_that_cannot_work_together_are_refused_at_the_start(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_local(RunConfig.from_flat(settings))


@pytest.mark.parametrize(
    "settings",
    [{}, {"training.proximal": 2.0, "training.learning_rate": 0.5}, {"federation.strategy": "scaffold"},
     {"training.proximal": 50.0, "training.optimizer": "adam"}],
)  # fmt: skip
def test_settings_that_work_are_accepted(settings: dict[str, object]) -> None:
    check_local(RunConfig.from_flat(settings))
