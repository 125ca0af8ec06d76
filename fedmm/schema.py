"""What all rooms share: the modalities, the labels, the form of an input and of a batch.

Shape letters: B studies, M modalities, F findings, C classes, H W pixels, T tokens, R frames, N mel bands, P patients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    import torch

# The order is part of the model format: axis M of every (B, M, D) and (B, M) tensor.
MODALITIES = ("image", "report", "audio")
SPLITS = ("train", "test")


class Frozen(BaseModel):
    """Settings: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Labels(Frozen):
    """What the model predicts; public, agreed by all hospitals. Findings are yes/no; the class is one of several."""

    findings: tuple[str, ...] = Field((), description="Columns with 0, 1 or empty.")
    class_name: str = Field("", description="Column with one of `class_values` or empty; '' when there is none.")
    class_values: tuple[str, ...] = Field((), description="The possible classes, in the order of the model's output.")

    @field_validator("findings", "class_values")
    @classmethod
    def _no_duplicates(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names) or "" in names:
            raise ValueError("names must be unique and not empty")
        return names

    @model_validator(mode="after")
    def _something_to_predict(self) -> Labels:
        if bool(self.class_name) != (len(self.class_values) >= 2):
            raise ValueError("a class needs a name and at least two values; without a class leave both empty")
        if self.class_name in self.findings:
            raise ValueError(f"{self.class_name!r} is both a finding and the class")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Label columns of a manifest."""
        return self.findings + ((self.class_name,) if self.class_name else ())

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's outputs: findings, then `class=value`."""
        return self.findings + tuple(f"{self.class_name}={value}" for value in self.class_values)


MIN_FRAMES = 8
MAX_VALUES = 2**20  # of one study and modality: 4 MB, as the largest image


class InputSpec(Frozen):
    """How files become tensors. Part of the saved model: prediction reads files as training did."""

    image_size: int = Field(64, ge=16, le=1024, description="Side of the square image, pixels.")
    report_tokens: int = Field(256, ge=8, le=8192, description="Longest report, in hashed tokens; the rest is cut.")
    report_buckets: int = Field(4096, ge=64, le=2**20, description="Buckets of the hashing tokeniser.")
    audio_rate: int = Field(8000, ge=2000, le=48000, description="Sample rate after resampling, Hz.")
    audio_seconds: float = Field(2.0, gt=0, le=60, description="Length of the audio window, seconds.")
    audio_mels: int = Field(40, ge=8, le=256, description="Mel bands.")
    audio_hop: int = Field(160, ge=16, le=4096, description="Samples between two spectrogram frames.")

    @model_validator(mode="after")
    def _sane_size(self) -> InputSpec:
        if self.audio_frames < MIN_FRAMES:
            raise ValueError(
                f"audio_seconds x audio_rate / audio_hop gives {self.audio_frames} frames, needs {MIN_FRAMES}"
            )
        if self.audio_frames * self.audio_mels > MAX_VALUES:
            raise ValueError(f"the spectrogram of one study would have more than {MAX_VALUES:,} values")
        return self

    @property
    def audio_frames(self) -> int:
        """R, frames of the log-mel spectrogram."""
        return int(self.audio_seconds * self.audio_rate) // self.audio_hop

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one study's tensor, by modality."""
        return {
            "image": (1, self.image_size, self.image_size),
            "report": (self.report_tokens,),
            "audio": (self.audio_mels, self.audio_frames),
        }


@dataclass(frozen=True)
class Batch:
    """Studies of some patients, as tensors. All studies of a patient are in the same batch.

    inputs: image (B, 1, H, W) float32; report (B, T) int64, 0 is padding; audio (B, N, R) float32. Absent: zeros.
    seen_BM: bool, which modality is present.  finding_BF: float32, NaN is missing.  class_B: int64, -1 is missing.
    patient_B: int64, 0 … patients-1: whose study it is.
    """

    inputs: Mapping[str, torch.Tensor]
    seen_BM: torch.Tensor
    finding_BF: torch.Tensor
    class_B: torch.Tensor
    patient_B: torch.Tensor
    patients: int

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            inputs={name: value.to(device) for name, value in self.inputs.items()},
            seen_BM=self.seen_BM.to(device),
            finding_BF=self.finding_BF.to(device),
            class_B=self.class_B.to(device),
            patient_B=self.patient_B.to(device),
            patients=self.patients,
        )

    @property
    def studies(self) -> int:
        """B."""
        return int(self.seen_BM.shape[0])
