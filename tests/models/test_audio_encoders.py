"""Recordings heard in order, and their MFCC statistics: the contract of each, and tasks that order alone decides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchaudio
from torch import Tensor, nn

from fedmm.config import ModelConfig
from fedmm.models.audio_sequence import FLOOR, mfcc, sounding
from fedmm.models.encoder import Encoder, encoders
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.models.store import load_model, save_model
from fedmm.privacy.engine import CLIPPING
from fedmm.schema import InputSpec, fixed
from fedmm.training.loop import Workbench
from tests import tiny
from tests.privacy.measure import LIMIT, clipped_sum, engine_for, hospital, sensitivity

NAMES = ("mfcc", "recurrent", "transformer")
BANDS = 8
every_encoder = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are tiny: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name: str, width: int = 4, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return encoders["audio"].get(name)(InputSpec(audio_mels=BANDS), width)


def recordings(*shape: int, seed: int = 0) -> Tensor:
    """Log-mel above the floor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1.9, 2)


def model_spec(name: str, inputs: InputSpec = tiny.INPUTS) -> ModelSpec:
    return ModelSpec(inputs=inputs, model=ModelConfig(audio=name, width=4), labels=tiny.LABELS)


# --- contract -----------------------------------------------------------------------------------------------------------


@every_encoder
@pytest.mark.parametrize("studies", [0, 1, 7])
@pytest.mark.parametrize("frames", [8, 20, 128, 130, 700])
@pytest.mark.parametrize("filling", [0.0, FLOOR])
def test_any_batch_and_length_gives_finite_output_and_gradient(
    name: str, studies: int, frames: int, filling: float
) -> None:
    encoder, audio_BNR = make(name), recordings(studies, BANDS, frames)
    audio_BNR[::2] = filling
    out = encoder(audio_BNR)
    assert out.shape == (studies, 4)
    assert out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@every_encoder
def test_a_recording_does_not_hear_the_others_in_its_batch(name: str) -> None:
    encoder, audio_BNR = make(name), recordings(5, BANDS, 150)
    audio_BNR[1, :, 30:], audio_BNR[2], audio_BNR[3, :, :9] = FLOOR, FLOOR, FLOOR
    whole = encoder(audio_BNR)
    for i in range(5):
        torch.testing.assert_close(encoder(audio_BNR[i : i + 1]), whole[i : i + 1], rtol=1e-4, atol=1e-6)


@every_encoder
@pytest.mark.parametrize("frames", [8, 61, 128, 200])
def test_silence_at_the_end_changes_neither_result_nor_gradient(name: str, frames: int) -> None:
    results = []
    for silence in (0, 1, 300):
        encoder = make(name)
        out = encoder(nn.functional.pad(recordings(3, BANDS, frames), [0, silence], value=FLOOR))
        out.square().sum().backward()
        results.append((out.detach(), torch.cat([p.grad.flatten() for p in encoder.parameters()])))
    for out, gradient in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-3, atol=1e-5)


@every_encoder
def test_nothing_but_weights_is_stored_and_what_is_stored_says_the_same(name: str, tmp_path: Path) -> None:
    model, batch = build_model(model_spec(name), 4), tiny.batch([2, 1])
    assert not list(make(name).buffers())
    assert set(model.state_dict()) == {key for key, _ in model.named_parameters()}
    save_model(model, tmp_path)
    assert torch.equal(model(batch.inputs, batch.seen_BM), load_model(tmp_path)(batch.inputs, batch.seen_BM))


# --- privacy ------------------------------------------------------------------------------------------------------------


@every_encoder
@pytest.mark.parametrize("seconds", [0.4, 3.0])
def test_one_patient_moves_the_sum_by_at_most_c_and_both_ways_agree(name: str, seconds: float) -> None:
    inputs = tiny.INPUTS.model_copy(update={"audio_seconds": seconds})
    whole, sums = tiny.batch((1, 5, 2), inputs=inputs), {}
    whole.inputs["audio"][whole.patient_B == 0, :, 12:] = FLOOR
    for clipping in CLIPPING:
        Workbench(model_spec(name, inputs), torch.device("cpu"), clipping=clipping).private_model  # noqa: B018  (rehearsed)
        engine = engine_for(model_spec(name, inputs), clipping=clipping)
        moved = sensitivity(engine, hospital(whole).cohort("all"), limit=20)
        assert max(moved) <= LIMIT
        assert max(moved) >= 1 - 1e-4, "nobody was clipped: the test shows nothing"
        sums[clipping] = clipped_sum(engine, whole)
    assert float((sums["hooks"] - sums["ghost"]).norm()) <= 1e-4 * engine.max_grad_norm * whole.patients


# --- features -----------------------------------------------------------------------------------------------------------


def test_the_cosines_are_those_of_torchaudio_but_for_public_constants() -> None:
    audio_BNR = recordings(2, 40, 5)
    dct_NK = torchaudio.functional.create_dct(20, 40, norm=None)
    lifter_K = 1 + 11 * torch.sin(math.pi * torch.arange(20) / 22)
    torch.testing.assert_close(mfcc(audio_BNR), audio_BNR.transpose(1, 2) @ dct_NK / 80 * lifter_K)
    assert mfcc(recordings(1, 12, 3)).shape == (1, 3, 12)


def test_a_frame_sounds_when_any_band_is_above_the_floor() -> None:
    audio_BNR = torch.full((1, 3, 4), FLOOR)
    audio_BNR[0, 1, 2] = -1.5
    assert sounding(audio_BNR).tolist() == [[False, False, True, False]]


# --- order --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["recurrent", "transformer"])
def test_time_order_changes_the_result(name: str) -> None:
    encoder, audio_BNR = make(name), recordings(1, BANDS, 40)
    assert (encoder(audio_BNR) - encoder(audio_BNR.flip(2))).norm() > 1e-2


def order_task(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A low and a high tone apart in noise; which is first decides. Neither MFCC nor deltas have it in their statistics."""
    chance = torch.Generator().manual_seed(seed)
    audio_BNR = torch.full((count, BANDS, 40), -1.5)
    answer_B = torch.randint(0, 2, (count,), generator=chance)
    early_B, late_B = (torch.randint(low, low + 8, (count,), generator=chance).tolist() for low in (2, 20))
    for i, (early, late) in enumerate(zip(early_B, late_B, strict=True)):
        low, high = (early, late) if answer_B[i] else (late, early)
        audio_BNR[i, 1:3, low : low + 6] = audio_BNR[i, 5:7, high : high + 6] = 1.5
    return audio_BNR + 0.2 * torch.randn(audio_BNR.shape, generator=chance).clamp(-2, 2), answer_B


@pytest.mark.parametrize("name", NAMES)
def test_what_hears_in_order_learns_a_task_of_order_and_statistics_do_not(name: str) -> None:
    model = nn.Sequential(make(name, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    audio_BNR, answer_B = order_task(256, 1)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(audio_BNR), answer_B).backward()
        optimizer.step()
    unheard_BNR, right_B = order_task(256, 2)
    accuracy = float((model(unheard_BNR).argmax(1) == right_B).float().mean())
    if name == "mfcc":
        assert accuracy < 0.65
    else:
        assert accuracy > 0.9


def test_mfcc_statistics_tell_which_bands_sound() -> None:
    model = nn.Sequential(make("mfcc", 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    audio_BNR, answer_B = recordings(256, BANDS, 30) * 0.3, torch.arange(256) % 2
    audio_BNR[answer_B == 1, 2, 10:20] += 1.0
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(audio_BNR[:128]), answer_B[:128]).backward()
        optimizer.step()
    assert float((model(audio_BNR[128:]).argmax(1) == answer_B[128:]).float().mean()) > 0.9


def test_the_statistics_of_mfcc_are_a_fixed_part_that_need_not_be_computed_again() -> None:
    model, batch = build_model(model_spec("mfcc"), 4).eval(), tiny.batch([2, 1])
    part = model.fixed_parts()["audio"]
    kept = part.features(batch.inputs["audio"])
    assert kept.shape == (3, 8 * tiny.INPUTS.audio_mels)
    assert kept.is_contiguous()
    blank = {**batch.inputs, "audio": torch.zeros_like(batch.inputs["audio"]), fixed("audio"): kept}
    assert torch.equal(model(batch.inputs, batch.seen_BM), model(blank, batch.seen_BM))
