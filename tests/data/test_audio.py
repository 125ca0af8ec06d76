from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from fedmm.data.audio import read as read_audio
from fedmm.data.manifest import FileProblem
from fedmm.schema import InputSpec
from tests.data.conftest import tone, write_wav

SPEC = InputSpec()


def problem_of(path: Path) -> str:
    with pytest.raises(FileProblem) as caught:
        read_audio(path, SPEC)
    return caught.value.code


def chirp(seconds: float = 0.6, *, rate: int = 8000, low: float = 300.0, high: float = 1500.0) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * (low * time + (high - low) / (2 * seconds) * time**2))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference, in units of the 4 that the scale spans."""
    return float(np.abs(a - b).mean())


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_a_clip_becomes_bands_by_frames_in_a_public_range(tmp_path: Path) -> None:
    mel = read_audio(write_wav(tmp_path / "a.wav", chirp()), SPEC)
    assert mel.shape == (SPEC.audio_mels, SPEC.audio_frames)
    assert mel.dtype == np.float32
    assert mel.max() == 2
    assert mel.min() == -2
    assert np.array_equal(mel, read_audio(tmp_path / "a.wav", SPEC))


def test_a_higher_tone_lies_in_a_higher_band_and_a_short_clip_ends_in_silence(tmp_path: Path) -> None:
    low = read_audio(write_wav(tmp_path / "a.wav", tone(hertz=300)), SPEC)
    high = read_audio(write_wav(tmp_path / "b.wav", tone(hertz=2000)), SPEC)
    assert low[:, :20].mean(axis=1).argmax() < high[:, :20].mean(axis=1).argmax()
    assert (low[:, 40:] == -2).all()


@pytest.mark.parametrize("rate", [2000, 8001, 11_025, 16_000, 22_050, 44_100, 44_101, 96_000, 191_999, 192_000])
def test_any_rate_gives_the_same_picture(tmp_path: Path, rate: int) -> None:
    slow = {"low": 200.0, "high": 700.0}
    mel = read_audio(write_wav(tmp_path / "a.wav", chirp(rate=rate, **slow), rate=rate), SPEC)
    expected = read_audio(write_wav(tmp_path / "b.wav", chirp(**slow)), SPEC)
    assert likeness(mel, expected) > 0.95
    assert likeness(np.flip(mel, axis=0), expected) < 0.3
    assert likeness(np.flip(mel, axis=1), expected) < 0.3


@pytest.mark.parametrize("kind", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_wav_and_flac_of_any_width_and_channel_count_gives_the_same_picture(
    tmp_path: Path, kind: str, channels: int
) -> None:
    expected = read_audio(write_wav(tmp_path / "b.wav", chirp()), SPEC)
    samples = np.repeat(chirp()[:, np.newaxis], channels, axis=1)
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype=kind)
    assert distance(read_audio(tmp_path / "a.wav", SPEC), expected) < 0.1
    if kind in ("PCM_16", "PCM_24"):
        soundfile.write(tmp_path / "a.flac", samples, 8000, subtype=kind)
        assert distance(read_audio(tmp_path / "a.flac", SPEC), expected) < 0.01


def test_loudness_offset_and_leading_silence_cancel_out(tmp_path: Path) -> None:
    expected = read_audio(write_wav(tmp_path / "a.wav", chirp()), SPEC)
    quiet = read_audio(write_wav(tmp_path / "b.wav", 0.05 * chirp()), SPEC)
    shifted = read_audio(write_wav(tmp_path / "c.wav", 0.3 + chirp()), SPEC)
    late = read_audio(write_wav(tmp_path / "d.wav", np.concatenate([np.zeros(10_400), chirp()])), SPEC)
    later = read_audio(write_wav(tmp_path / "e.wav", np.concatenate([np.zeros(80_000), chirp()])), SPEC)
    assert distance(quiet, expected) < 0.05
    assert distance(shifted, expected) < 0.05
    assert np.allclose(late, later, atol=0.02)  # the mean over the clip, taken off as the recorder's offset, differs
    assert likeness(late[:, 2:], expected[:, :-2]) > 0.9  # nothing but the 50 ms that are kept before the onset


def test_of_a_long_recording_the_loudest_stretch_is_taken(tmp_path: Path) -> None:
    weak = 0.2 * tone(6, hertz=300)
    samples = np.concatenate([weak, tone(1, hertz=2000), weak])
    mel = read_audio(write_wav(tmp_path / "a.wav", samples), SPEC)
    alone = read_audio(write_wav(tmp_path / "b.wav", tone(1, hertz=2000)), SPEC)
    band = int(alone.sum(axis=1).argmax())
    assert (mel[band] > 1.5).sum() >= 48  # a second is 50 frames


@pytest.mark.parametrize("mels", [8, 40, 256])
@pytest.mark.parametrize("rate", [2000, 48_000])
@pytest.mark.parametrize(("seconds", "hop"), [(0.1, 16), (20, 4096)])
def test_every_allowed_spec_gives_its_own_shape(tmp_path: Path, mels: int, rate: int, seconds: float, hop: int) -> None:
    spec = InputSpec(audio_mels=mels, audio_rate=rate, audio_seconds=seconds, audio_hop=hop)
    mel = read_audio(write_wav(tmp_path / "a.wav", chirp()), spec)
    assert mel.shape == spec.shapes["audio"]
    assert np.isfinite(mel).all()


@pytest.mark.parametrize("samples", [np.zeros(8000), np.full(8000, 0.4), np.resize([0, 1 / 32767], 8000)])
def test_silence_a_constant_and_dither_alone_are_silent(tmp_path: Path, samples: np.ndarray) -> None:
    assert problem_of(write_wav(tmp_path / "a.wav", samples)) == "silent_audio"


def test_a_file_without_samples_is_empty(tmp_path: Path) -> None:
    assert problem_of(write_wav(tmp_path / "a.wav", np.zeros(0))) == "empty_audio"
    (tmp_path / "b.wav").write_bytes(b"")
    assert problem_of(tmp_path / "b.wav") == "empty_audio"


def test_one_sample_is_silent_and_a_click_of_few_samples_is_read(tmp_path: Path) -> None:
    assert problem_of(write_wav(tmp_path / "a.wav", np.array([0.5]))) == "silent_audio"
    assert np.isfinite(read_audio(write_wav(tmp_path / "a.wav", np.array([0.5, -0.5, 0.1])), SPEC)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_a_sample_that_is_not_finite_breaks_the_file_wherever_it_is(tmp_path: Path, value: float) -> None:
    samples = tone(4)
    samples[-3] = value
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="DOUBLE")
    assert problem_of(tmp_path / "a.wav") == "broken_audio"


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_truncated_or_foreign_file_is_broken(tmp_path: Path, name: str) -> None:
    soundfile.write(tmp_path / name, np.random.default_rng(1).uniform(-1, 1, 20_000), 8000)
    whole = (tmp_path / name).read_bytes()
    for length in (1, 20, len(whole) // 2, len(whole) - 1000):
        (tmp_path / name).write_bytes(whole[:length])
        assert problem_of(tmp_path / name) == "broken_audio", length
    (tmp_path / name).write_bytes(b"ID3" + whole)
    assert problem_of(tmp_path / name) == "broken_audio"


def test_other_formats_that_the_library_knows_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.ogg", tone(), 8000)
    soundfile.write(tmp_path / "a.aiff", tone(), 8000)
    soundfile.write(tmp_path / "gsm.wav", tone(), 8000, subtype="GSM610")
    assert problem_of(tmp_path / "gsm.wav") == "broken_audio"
    assert problem_of(tmp_path / "a.ogg") == problem_of(tmp_path / "a.aiff") == "broken_audio"


def test_a_wav_written_to_a_pipe_has_no_length_and_is_read(tmp_path: Path) -> None:
    expected = read_audio(write_wav(tmp_path / "a.wav", tone()), SPEC)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(data)
    assert np.array_equal(read_audio(tmp_path / "a.wav", SPEC), expected)


def test_an_absurd_rate_or_length_is_seen_from_the_header(tmp_path: Path) -> None:
    assert problem_of(write_wav(tmp_path / "a.wav", tone(), rate=1999)) == "absurd_size"
    assert problem_of(write_wav(tmp_path / "a.wav", tone(), rate=192_001)) == "absurd_size"
    soundfile.write(tmp_path / "a.flac", np.zeros(3601 * 2000, dtype=np.int16), 2000)
    assert problem_of(tmp_path / "a.flac") == "absurd_size"
    os.truncate(tmp_path / "a.wav", 2**29 + 1)
    assert problem_of(tmp_path / "a.wav") == "absurd_size"


@given(
    start=st.sampled_from(
        [b"", b"RIFF\xff\xff\0\0WAVE", b"fLaC\0\0\0\x22", b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0"]
    ),
    data=st.binary(max_size=400),
)
def test_no_bytes_make_the_reader_raise_anything_else(start: bytes, data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(start + data)
        file.flush()
        with contextlib.suppress(FileProblem):
            assert np.isfinite(read_audio(Path(file.name), SPEC)).all()


@given(name=st.sampled_from(["a.flac", "a.wav"]), where=st.floats(0, 1), byte=st.integers(0, 255))
def test_one_changed_byte_gives_a_spectrogram_or_a_problem(name: str, where: float, byte: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        soundfile.write(path, tone(0.05), 8000)
        data = bytearray(path.read_bytes())
        data[int(where * (len(data) - 1))] = byte
        path.write_bytes(data)
        with contextlib.suppress(FileProblem):
            assert np.isfinite(read_audio(path, SPEC)).all()


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_a_waveform_has_the_wanted_rate_and_length_and_ends_in_zeros(tmp_path: Path, rate: int) -> None:
    spec = InputSpec(audio_form="waveform", audio_rate=16000, audio_seconds=1.0)
    wave = read_audio(write_wav(tmp_path / "a.wav", chirp(0.5, rate=rate), rate=rate), spec)
    assert wave.dtype == np.float32
    assert wave.shape == (16000,)
    assert 0.9 < np.abs(wave).max() < 1.2
    assert not wave[8100:].any()
    spectrum = np.abs(np.fft.rfft(wave))
    assert 300 <= np.argmax(spectrum) <= 1500, "Hz, as the chirp"
