"""A small hospital folder with one good file of each kind, which tests then damage."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from fedmm.data.dataset import HospitalData
from fedmm.schema import Labels

# A slow machine is no failure, and nothing of a run is kept.
settings.register_profile("fedmm-data", deadline=None, database=None)
settings.load_profile("fedmm-data")

SITE = """
[hospital]
name = "north"
[labels]
findings = ["pneumonia", "effusion"]
class_name = "grade"
class_values = ["none", "mild", "severe"]
[privacy]
epsilon = 3.0
delta = 1e-4
public_patients = 5
"""
LABELS = Labels(findings=("pneumonia", "effusion"), class_name="grade", class_values=("none", "mild", "severe"))
HEADER = "patient_id,study_id,image,report,audio,pneumonia,effusion,grade,split"
ROWS = (
    "Anna,a1,a.png,a.txt,a.wav,1,0,mild,train",
    "Anna,a2,a.png,,,1,,severe,train",
    "Anna,a3,,a.txt,,,,,train",
    "Bert,b1,,,a.wav,0,1,none,train",
    "Cleo,c1,,,,0,,none,test",
    "Cleo,c2,a.png,a.txt,a.wav,1,1,,test",
)


def write_wav(path: Path, samples: np.ndarray, *, rate: int = 8000) -> Path:
    """samples: (K,) or (K, channels) between -1 and 1, as 16-bit PCM."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def tone(seconds: float = 0.5, *, rate: int = 8000, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def ramp(height: int = 48, width: int = 40) -> np.ndarray:
    """(H, W) uint8, darker at the top left."""
    return np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8)


def write_manifest(folder: Path, *rows: str, header: str = HEADER) -> None:
    (folder / "manifest.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def tensors(data: HospitalData) -> dict[str, torch.Tensor]:
    """Inputs of all studies, in the order of the manifest."""
    return {name: value[torch.arange(len(value))] for name, value in data.inputs.items()}


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / "site.toml").write_text(SITE, encoding="utf-8")
    Image.fromarray(ramp()).save(folder / "a.png")
    (folder / "a.txt").write_text("No effusion. Heart is normal.", encoding="utf-8")
    write_wav(folder / "a.wav", tone())
    write_manifest(folder, *ROWS)
    return folder
