"""A recording (WAV, FLAC; any rate, any channels) becomes a log-mel spectrogram of one window.

K samples of the file, L samples of the window at `spec.audio_rate`, N mel bands, R frames.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.signal
import soundfile
import torchaudio

from fedmm.data.manifest import FileProblem, open_file
from fedmm.schema import InputSpec

MIN_RATE, MAX_RATE, MAX_SECONDS, MAX_CHANNELS = 2_000, 192_000, 3600, 256
SILENCE = 2e-4  # peak to peak of full scale; about six steps of 16 bits, so dither alone is silence
STEP_SECONDS = 0.01  # of the loudness curve
# measured: 15 to 20 and 50 told spoken digits apart best, across speakers (training patients of the chest pack)
ONSET_DB = 20.0  # sound starts where loudness is within this of the loudest 10 ms
LEAD_SECONDS = 0.05  # kept before the onset, so that a soft consonant is not cut
RANGE_DB = 50.0  # further below the clip's maximum all is floor


def read(path: Path, spec: InputSpec) -> np.ndarray:
    """(N, R) float32: log power by mel band and frame, 0 to -50 dB below the clip's maximum mapped to 2 … -2.
    Of form "waveform": (L,) float32, the window's samples, the loudest at 1 before resampling; zeros after the end.

    The window starts just before the first sound, so a half-second word always begins at the same frame and silence
    follows it; when the sound is longer than the window, the loudest stretch is taken (the coughs, not the pause).
    Loudness of the recording cancels out: the scale is relative to the clip's own maximum, by public constants.
    Guarantee: the same file gives the same array; memory does not grow with the recording's length.
    Raises: FileProblem broken_audio, silent_audio, empty_audio, absurd_size, or as open_file. Nothing else.
    """
    with open_file(path) as file:
        try:
            window_L = _window(file, spec)
            return window_L if spec.audio_form == "waveform" else _log_mel(window_L, spec)
        except (FileProblem, MemoryError):  # how much memory there is says nothing about the file
            raise
        except Exception:  # libsndfile's errors hold the file's name and header
            raise _broken("the file cannot be decoded; it is damaged or cut short") from None


def _broken(message: str) -> FileProblem:
    return FileProblem("broken_audio", message, "export the recording again as WAV or FLAC, or empty the cell")


# --- from the file to a window of samples -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loudness:
    """Energy in each 10 ms of the whole recording, found without holding it."""

    energy: np.ndarray
    step: int  # samples
    offset: float  # mean, the recorder's DC


def _window(file: BinaryIO, spec: InputSpec) -> np.ndarray:
    """(L,) float32 at spec.audio_rate, peak 1, zeros after the end."""
    magic = file.read(4)
    if not magic:
        raise FileProblem("empty_audio", "the file is empty", "record again or empty the cell")
    if magic not in (b"RIFF", b"RIFX", b"RF64", b"fLaC"):  # libsndfile's MP3 decoder would quote bytes on stderr
        raise _broken("the file is not WAV or FLAC")
    _check_riff(file)
    file.seek(0)
    with soundfile.SoundFile(file) as sound:
        _check_header(sound)
        rate = sound.samplerate
        loudness = _measure(sound)
        wanted = math.ceil(spec.audio_seconds * rate)
        start = _start(loudness, wanted, rate)
        sound.seek(start)
        samples_K = sound.read(min(wanted, sound.frames - start), dtype="float32", always_2d=True).mean(axis=1)
    samples_K = samples_K - np.float32(loudness.offset)
    peak = np.abs(samples_K).max(initial=0.0)
    window_L = np.zeros(int(spec.audio_seconds * spec.audio_rate), dtype=np.float32)
    if not peak > 0:  # sound elsewhere, or _measure had refused: a refusal must not depend on the coordinator's spec
        return window_L
    resampled = _resample(samples_K / peak, rate, spec.audio_rate)[: len(window_L)]
    window_L[: len(resampled)] = resampled
    return window_L


def _check_riff(file: BinaryIO) -> None:
    """A WAV whose header promises more samples than the file has was cut short; libsndfile would not say so."""
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return
    position = 12
    while len(chunk := file.read(8)) == 8:
        size = int.from_bytes(chunk[4:], "little")
        position += 8
        if chunk[:4] == b"data":
            # Programs that write to a pipe leave 0 or the largest number there.
            if size < 0x7FFFFFFF and position + size > total:
                raise _broken("the file is shorter than its header says")
            return
        position += size + size % 2
        file.seek(position)


def _check_header(sound: Any) -> None:
    plain = sound.subtype.startswith("PCM_") or sound.subtype in ("FLOAT", "DOUBLE", "ULAW", "ALAW")
    if sound.format not in ("WAV", "WAVEX", "RF64", "FLAC") or not plain:
        raise _broken("the file is not WAV or FLAC, or holds another codec in a WAV")
    if sound.frames <= 0:
        raise FileProblem("empty_audio", "the recording has no samples", "record again or empty the cell")
    sane = MIN_RATE <= sound.samplerate <= MAX_RATE and sound.channels <= MAX_CHANNELS
    if not sane or sound.frames > MAX_SECONDS * sound.samplerate:
        limits = f"{MIN_RATE} to {MAX_RATE} Hz, {MAX_CHANNELS} channels and {MAX_SECONDS} seconds"
        raise FileProblem("absurd_size", f"the recording is outside {limits}", "is this the right file? cut it")


def _blocks(sound: Any, step: int) -> Iterator[np.ndarray]:
    """Mono blocks, whole steps long; only the last may be shorter."""
    length = step * max(1, 2**18 // (step * sound.channels))
    while len(block := sound.read(length, dtype="float32", always_2d=True)):
        yield block.mean(axis=1, dtype=np.float64)


def _measure(sound: Any) -> _Loudness:
    step = max(1, round(STEP_SECONDS * sound.samplerate))
    sums, squares, low, high, count = [], [], math.inf, -math.inf, 0
    for block in _blocks(sound, step):
        if not np.isfinite(block).all():
            raise _broken("samples are NaN or infinite")
        starts = np.arange(0, len(block), step)
        sums.append(np.add.reduceat(block, starts))
        squares.append(np.add.reduceat(block**2, starts))
        low, high, count = min(low, block.min()), max(high, block.max()), count + len(block)
    if count != sound.frames:
        raise _broken("the file is shorter than its header says")
    if high - low <= SILENCE:
        raise FileProblem("silent_audio", "the recording is silent", "record again or empty the cell")
    total, square = np.concatenate(sums), np.concatenate(squares)
    offset = float(total.sum() / count)
    lengths = np.full(len(total), float(step))
    lengths[-1] = count - step * (len(total) - 1)
    energy = (square - 2 * offset * total + lengths * offset**2).clip(min=0)
    return _Loudness(energy, step, offset)


def _start(loudness: _Loudness, wanted: int, rate: int) -> int:
    """First sample of the window."""
    energy, step = loudness.energy, loudness.step
    active = np.flatnonzero(energy >= energy.max() * 10 ** (-ONSET_DB / 10))
    lead = round(LEAD_SECONDS / STEP_SECONDS)
    first, steps = int(active[0]), max(1, wanted // step - lead)
    if int(active[-1]) + 1 - first > steps:
        before = np.concatenate([[0.0], np.cumsum(energy)])
        last = max(first + 1, len(energy) - steps + 1)
        starts = np.arange(first, last)
        first = int(starts[np.argmax(before[np.minimum(starts + steps, len(energy))] - before[starts])])
    return max(0, first - lead) * step


# --- from samples to a spectrogram ------------------------------------------------------------------------------------
# NumPy and SciPy rather than torchaudio's transforms: on arrays this small torch's threads wait for one another, which
# on a busy machine took 60 ms a clip instead of 2 (measured), and sums would depend on the number of threads.


def _resample(samples_K: np.ndarray, rate: int, target: int) -> np.ndarray:
    # The filter grows with both numbers of the ratio: 44,101 to 8,000 would be huge. 1/320 keeps usual rates exact.
    ratio = Fraction(rate, target).limit_denominator(320)
    resampled: np.ndarray = scipy.signal.resample_poly(samples_K, ratio.denominator, ratio.numerator)
    return resampled


def _log_mel(window_L: np.ndarray, spec: InputSpec) -> np.ndarray:
    frames, hop = spec.audio_frames, spec.audio_hop
    mel_RN = np.zeros((frames, spec.audio_mels))
    shape_W, bands_KN = _filters(spec.audio_rate, hop, spec.audio_mels)
    size = len(shape_W)
    padded = np.zeros(frames * hop + size)
    left = (size - hop) // 2  # frame r is centred on the r-th hop
    padded[left : left + len(window_L)] = window_L[: len(padded) - left]
    frames_RW = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    for start in range(0, frames, 1024):  # in parts, as a window of 60 s may have 180,000 frames
        part = slice(start, min(start + 1024, frames))
        mel_RN[part] = (np.abs(np.fft.rfft(frames_RW[part] * shape_W)) ** 2) @ bands_KN
    decibel_RN = 10 * np.log10(mel_RN.clip(min=1e-12))
    decibel_RN = (decibel_RN - decibel_RN.max(initial=-120.0)).clip(min=-RANGE_DB)
    return np.ascontiguousarray(decibel_RN.T * (4 / RANGE_DB) + 2, dtype=np.float32)


@lru_cache(maxsize=8)
def _filters(rate: int, hop: int, mels: int) -> tuple[np.ndarray, np.ndarray]:
    """The frame's window (W,) and the weights of W/2+1 frequencies in the mel bands (K, N), HTK's scale."""
    # Enough frequencies that the narrowest (lowest) band holds one: mel(f) = 2595 log10(1 + f / 700).
    step = 2595 * math.log10(1 + rate / 2 / 700) / (mels + 1)
    narrowest = 700 * (10 ** (step / 2595) - 1)
    size = 2 ** math.ceil(math.log2(max(2 * hop, rate / narrowest)))
    shape_W = np.zeros(size)
    left = size // 2 - hop
    shape_W[left : left + 2 * hop] = scipy.signal.get_window("hann", 2 * hop)
    bands_KN = torchaudio.functional.melscale_fbanks(size // 2 + 1, 0.0, rate / 2, mels, rate)
    return shape_W, bands_KN.numpy().astype(np.float64)
