"""What chance does to the studies of a step: each modality varied on the fly, in several copies, and hidden now and then.

Copies of a study are rows of its patient, and a patient's rows are averaged before they are clipped once: the mean over
augmentations costs no privacy (De et al. 2022).

Chance has a name, and a patient's hangs on that patient alone: each row has a generator made of the step's seed, the
patient's key and the row's number within the patient. If it hung on the place in the batch, a patient more would change
what happens to all those after, and one patient could move the sum by more than C (test_augment.py measures it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fedmm.config import TrainingConfig
from fedmm.data.audio import RANGE_DB
from fedmm.errors import ConfigError
from fedmm.schema import MODALITIES, Batch, InputSpec
from fedmm.seeds import stream
from fedmm.training.augment_report import guard_for, vary_report

# B rows (studies x copies), H W pixels, T tokens, N mel bands, R frames, L samples

# Images: small enough that a finding stays what and where it is.
TURN, MOVE, ZOOM = math.radians(7), 0.06, 0.1  # +- radians; +- of the side; 0.9 to 1.1: guess
CONTRAST, BRIGHTNESS, GRAIN = 0.2, 0.2, 0.05  # +- factor; +-, and at most, in the image's own standard deviation: guess

# Recordings.
LOWEST_SNR, HIGHEST_SNR = 10.0, 30.0  # dB: a noisy ward to a quiet room; guess
DELAY = 0.1  # +- of the window
GAIN_DB = 6.0  # +-
BAND_MASK, FRAME_MASK = 0.15, 0.1  # at most, of bands and frames; SpecAugment, Park et al. 2019, one mask of each

Chance = Sequence[np.random.Generator]


def modalities_to_augment(config: TrainingConfig) -> tuple[str, ...]:
    """In the order of the model."""
    named = set(filter(None, config.augment.split(",")))
    return tuple(name for name in MODALITIES if name in named) + tuple(sorted(named - set(MODALITIES)))


def check_augment(config: TrainingConfig, fixed: Collection[str] = ()) -> None:
    """Can all of training.augment be done?

    fixed: modalities of which only what an encoder's fixed part made is kept (`MultimodalModel.fixed_parts`).
    Raises: ConfigError.
    """
    for name in modalities_to_augment(config):
        if name not in VARY:
            raise ConfigError(f"training.augment: {name!r} cannot be augmented", fix=f"any of {', '.join(VARY)}")
        if name in fixed:
            raise ConfigError(
                f"training.augment: {name} has an encoder with a fixed part",
                why="its features are made once for each study and kept, so there is nothing left to vary in a step",
                fix=f"choose a model.{name} that is trained as a whole, or take {name} out of training.augment",
            )


def vary(batch: Batch, config: TrainingConfig, *, seed: int, spec: InputSpec) -> Batch:
    """All that chance does to a physical batch of one step.

    seed: drawn anew for each step, by a source that nobody else can repeat.
    Guarantee: what happens to a patient's studies depends on `seed` and on this patient alone.
    """
    names, copies = modalities_to_augment(config), config.augment_copies
    batch = augment(batch, names, copies=copies, seed=seed, spec=spec)
    return hide_modalities(batch, config.modality_dropout, seed=seed)


def augment(batch: Batch, modalities: Sequence[str], *, copies: int, seed: int, spec: InputSpec) -> Batch:
    """Each study `copies` times in a row, each copy with its own variation of these modalities.

    Labels, presence and absent modalities stay. Reports that another tokeniser read (spec.report_tokenizer) stay too:
    which of its tokens make a word, a sentence or a negation is not known.
    """
    batch = _copied(batch, copies)
    inputs = dict(batch.inputs)
    for name in modalities:
        rows = batch.seen_BM[:, MODALITIES.index(name)].nonzero().flatten()
        if len(rows):
            chance = _chance(batch, seed, f"augment {name}")
            inputs[name] = inputs[name].clone()
            inputs[name][rows] = VARY[name](inputs[name][rows], [chance[row] for row in rows.tolist()], spec)
    return replace(batch, inputs=inputs)


def hide_modalities(batch: Batch, probability: float, *, seed: int) -> Batch:
    """Modality dropout: each present modality of each row is hidden with `probability`, never the last one left."""
    if probability == 0 or batch.studies == 0:
        return batch
    seen_BM = batch.seen_BM.numpy()
    draw_BM = np.stack([rng.random(seen_BM.shape[1]) for rng in _chance(batch, seed, "modality dropout")])
    kept_BM = seen_BM & (draw_BM >= probability)
    kept_BM[~kept_BM.any(1)] = seen_BM[~kept_BM.any(1)]
    return replace(batch, seen_BM=torch.from_numpy(kept_BM))


def _copied(batch: Batch, copies: int) -> Batch:
    if copies == 1:
        return batch
    row_B = torch.arange(batch.studies).repeat_interleave(copies)
    changed: dict[str, Any] = {"inputs": {name: value[row_B] for name, value in batch.inputs.items()}, "copies": copies}
    changed |= {f.name: value[row_B] for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}
    return replace(batch, **changed)


def _chance(batch: Batch, seed: int, name: str) -> list[np.random.Generator]:
    """A generator for each row."""
    before: dict[int, int] = {}
    made = []
    for patient, key in zip(batch.patient_B.tolist(), batch.key_B.tolist(), strict=True):
        number = before[patient] = before.get(patient, -1) + 1
        made.append(stream(seed, name, patient=key, row=number))
    return made


# --- images -------------------------------------------------------------------------------------------------------------


def _vary_images(image_B1HW: Tensor, chance: Chance, spec: InputSpec) -> Tensor:
    """Turned, moved, zoomed, lighter or darker, with grain. Never mirrored: the side of the body is a finding."""
    draw_B7 = torch.tensor(np.stack([rng.uniform(-1, 1, 7) for rng in chance]), dtype=torch.float32)
    turn_B, right_B, down_B, zoom_B, contrast_B, brightness_B, grain_B = draw_B7.unbind(1)
    scale_B = 1 / (1 + ZOOM * zoom_B)
    cos_B, sin_B = scale_B * (TURN * turn_B).cos(), scale_B * (TURN * turn_B).sin()
    row_B3, next_B3 = (cos_B, -sin_B, 2 * MOVE * right_B), (sin_B, cos_B, 2 * MOVE * down_B)  # the side is 2 long
    theta_B23 = torch.stack([torch.stack(row_B3, 1), torch.stack(next_B3, 1)], 1)
    grid_BHW2 = affine_grid(theta_B23, list(image_B1HW.shape), align_corners=False)
    moved_B1HW = grid_sample(image_B1HW, grid_BHW2, padding_mode="border", align_corners=False)
    size = image_B1HW.shape[1:]
    noise_B1HW = torch.from_numpy(np.stack([rng.standard_normal(size, dtype=np.float32) for rng in chance]))
    contrast_B, brightness_B, grain_B = 1 + CONTRAST * contrast_B, BRIGHTNESS * brightness_B, GRAIN * grain_B
    out: Tensor = moved_B1HW * _wide(contrast_B) + _wide(brightness_B) + noise_B1HW * _wide(grain_B)
    return out


def _wide(value_B: Tensor) -> Tensor:
    return value_B.view(-1, 1, 1, 1)


# --- reports ------------------------------------------------------------------------------------------------------------


def _vary_reports(report_BT: Tensor, chance: Chance, spec: InputSpec) -> Tensor:
    if spec.report_tokenizer:
        return report_BT
    guard = guard_for(spec)
    rows = zip(report_BT.numpy(), chance, strict=True)
    return torch.from_numpy(np.stack([vary_report(tokens_T, rng, guard=guard) for tokens_T, rng in rows]))


# --- recordings ---------------------------------------------------------------------------------------------------------


def _vary_recordings(audio: Tensor, chance: Chance, spec: InputSpec) -> Tensor:
    vary_one = _vary_waveform if spec.audio_form == "waveform" else _vary_log_mel
    return torch.from_numpy(np.stack([vary_one(value, rng) for value, rng in zip(audio.numpy(), chance, strict=True)]))


def _vary_log_mel(value_NR: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moved in time, noise of every band added to the power, then read as data/audio.py does (relative to the loudest, so
    a gain would change nothing), then a band and a stretch of time masked by the floor."""
    power_NR = 10 ** ((value_NR.clip(-2, 2).astype(np.float64) - 2) * (RANGE_DB / 40))
    power_NR = _delayed(power_NR, rng, fill=10 ** (-RANGE_DB / 10))
    # The power of noise in one frequency of one frame is exponentially distributed.
    power_NR += power_NR.mean() * _noise_to_signal(rng) * rng.standard_exponential(power_NR.shape)
    decibel_NR = 10 * np.log10(power_NR)
    made_NR = (decibel_NR - decibel_NR.max()).clip(min=-RANGE_DB) * (4 / RANGE_DB) + 2
    made_NR[_stretch(made_NR.shape[0], BAND_MASK, rng)] = -2
    made_NR[:, _stretch(made_NR.shape[1], FRAME_MASK, rng)] = -2
    varied_NR: np.ndarray = made_NR.astype(np.float32)
    return varied_NR


def _vary_waveform(value_L: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moved in time, with noise of all frequencies, louder or softer."""
    moved_L = _delayed(value_L, rng, fill=0.0)
    loudness = math.sqrt(float(np.square(moved_L, dtype=np.float64).mean()) * _noise_to_signal(rng))
    noisy_L = moved_L + np.float32(loudness) * rng.standard_normal(len(moved_L), dtype=np.float32)
    varied_L: np.ndarray = noisy_L * np.float32(10 ** (rng.uniform(-GAIN_DB, GAIN_DB) / 20))
    return varied_L


def _delayed(value: np.ndarray, rng: np.random.Generator, *, fill: float) -> np.ndarray:
    """Moved along the last axis, later or earlier."""
    length = value.shape[-1]
    most = int(DELAY * length)
    steps = int(rng.integers(-most, most + 1))
    moved = np.full_like(value, fill)
    moved[..., max(steps, 0) : length + min(steps, 0)] = value[..., max(-steps, 0) : length - max(steps, 0)]
    return moved


def _noise_to_signal(rng: np.random.Generator) -> float:
    return float(10 ** (-rng.uniform(LOWEST_SNR, HIGHEST_SNR) / 10))


def _stretch(length: int, share: float, rng: np.random.Generator) -> slice:
    width = int(rng.integers(0, int(share * length) + 1))
    start = int(rng.integers(0, length - width + 1))
    return slice(start, start + width)


VARY: dict[str, Callable[[Tensor, Chance, InputSpec], Tensor]] = {
    "image": _vary_images,
    "report": _vary_reports,
    "audio": _vary_recordings,
}
