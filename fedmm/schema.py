"""What all rooms share: the modalities, the labels, the form of an input and of a batch.

Shape letters: B studies, M modalities, F findings, C classes, H W pixels, T tokens, R frames, N mel bands, P patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Modality:
    """What all rooms must know of one: `fedmm.data.MODULE` reads its files, `fedmm.models.MODULE` encodes them.

    module: name of both.  shape: of one study's tensor.  encoder: the default one.  files: for --help.  whole: int64, not
    float32.
    """

    module: str
    shape: Callable[[InputSpec], tuple[int, ...]]
    encoder: str
    files: str
    whole: bool = False


# A new modality is a line here and its two files (docs/howto-modality.md). The order is part of the model format: axis M of
# every (B, M, D) and (B, M) tensor.
MODALITY: dict[str, Modality] = {
    "image": Modality("image", lambda s: (1, s.image_size, s.image_size), "cnn", "PNG, JPEG or DICOM"),
    "report": Modality("text", lambda s: (s.report_tokens,), "ngrams", "text", whole=True),
    "audio": Modality("audio", lambda s: s.audio_shape, "cnn", "WAV or FLAC"),
}
MODALITIES = tuple(MODALITY)
# Every one but the empty one, by its name ("image+report"), the small ones first.
SUBSETS = {"+".join(some): some for n in range(len(MODALITIES)) for some in combinations(MODALITIES, n + 1)}
SPLITS = ("train", "test")


class Frozen(BaseModel):
    """Settings: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Labels(Frozen):
    """What the model predicts; public, agreed by all hospitals. Findings are yes/no; the class is one of several."""

    findings: tuple[str, ...] = Field((), description="Columns with 0, 1 or empty.")
    class_name: str = Field("", description="Column with one of `class_values` or empty; '' when there is none.")
    class_values: tuple[str, ...] = Field((), description="The possible classes, in the order of the model's output.")
    ordinal_name: str = Field("", description="Column with one of `ordinal_levels` or empty; '' when there is none.")
    ordinal_levels: tuple[str, ...] = Field((), description="The possible levels, the least severe first.")
    value_name: str = Field("", description="Column with a number (a risk, a score) or empty; '' when there is none.")
    value_range: tuple[float, float] = Field((0.0, 1.0), description="Public range of it; what lies outside is cut.")
    time_name: str = Field("", description="Column with the time to the event or to the end of observation, or empty.")
    event_name: str = Field("", description="Column with 1 where the event was seen, 0 where observation ended before.")
    time_edges: tuple[float, ...] = Field((), description="Public ends of the intervals of time, increasing.")

    @field_validator("findings", "class_values", "ordinal_levels")
    @classmethod
    def _no_duplicates(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names) or "" in names:
            raise ValueError("names must be unique and not empty")
        return names

    @model_validator(mode="after")
    def _something_to_predict(self) -> Labels:
        if bool(self.class_name) != (len(self.class_values) >= 2):
            raise ValueError("a class needs a name and at least two values; without a class leave both empty")
        if bool(self.ordinal_name) != (len(self.ordinal_levels) >= 2):
            raise ValueError("an ordinal label needs a name and at least two levels; without one leave both empty")
        if not self.value_range[0] < self.value_range[1]:
            raise ValueError("value_range is (lowest, highest)")
        if not bool(self.time_name) == bool(self.event_name) == (len(self.time_edges) >= 1):
            raise ValueError(
                "survival needs time_name, event_name and at least one of time_edges; else leave all empty"
            )
        if list(self.time_edges) != sorted(set(self.time_edges)) or any(edge <= 0 for edge in self.time_edges):
            raise ValueError("time_edges must increase and be above 0")
        if len(set(self.columns)) != len(self.columns):
            raise ValueError("two labels have the same column")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Label columns of a manifest."""
        return self.findings + tuple(filter(None, (self.class_name, *self.further)))

    @property
    def further(self) -> tuple[str, ...]:
        """Columns of `Batch.further_BK`, in its order: level, value, time, event; those that there are."""
        return tuple(filter(None, (self.ordinal_name, self.value_name, self.time_name, self.event_name)))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's outputs: findings, `class=value`, `level>=level` but for the least, the value, `time<=edge`."""
        return (
            self.findings
            + tuple(f"{self.class_name}={value}" for value in self.class_values)
            + tuple(f"{self.ordinal_name}>={level}" for level in self.ordinal_levels[1:])
            + ((self.value_name,) if self.value_name else ())
            + tuple(f"{self.time_name}<={edge:g}" for edge in self.time_edges)
        )


def fixed(modality: str) -> str:
    """Key in `Batch.inputs` of what an encoder's fixed part made of a modality."""
    return f"{modality} fixed"


MIN_FRAMES = 8
PRETRAINED_NAME = r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,63})?$"  # of a folder with a pretrained model; never a path
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
    audio_form: Literal["log_mel", "waveform"] = Field(
        "log_mel", description="What the audio encoder gets; wav2vec2, whisper and ast take the waveform."
    )
    report_tokenizer: str = Field(
        "", pattern=PRETRAINED_NAME, description="Pretrained folder whose tokeniser reads reports; empty: hashing."
    )

    @model_validator(mode="after")
    def _sane_size(self) -> InputSpec:
        if self.audio_frames < MIN_FRAMES:
            raise ValueError(
                f"audio_seconds x audio_rate / audio_hop gives {self.audio_frames} frames, needs {MIN_FRAMES}"
            )
        if math.prod(self.audio_shape) > MAX_VALUES:
            raise ValueError(f"the recording of one study would have more than {MAX_VALUES:,} values")
        return self

    @property
    def audio_frames(self) -> int:
        """R, frames of the log-mel spectrogram."""
        return int(self.audio_seconds * self.audio_rate) // self.audio_hop

    @property
    def audio_shape(self) -> tuple[int, ...]:
        """(N, R) of a log-mel spectrogram, (L,) of a waveform."""
        if self.audio_form == "waveform":
            return (int(self.audio_seconds * self.audio_rate),)
        return (self.audio_mels, self.audio_frames)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one study's tensor, by modality."""
        return {name: modality.shape(self) for name, modality in MODALITY.items()}


class Timeline(NamedTuple):
    """Whose study each is, and when: what a fusion over time may look at. Both as in `Batch`."""

    patient_B: torch.Tensor
    day_B: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Studies of some patients, as tensors. All studies of a patient are in the same batch.

    inputs: image (B, 1, H, W) float32; report (B, T) int64, 0 is padding; audio (B, N, R) float32. Absent: zeros. Under a
    modality's `fixed(name)`, if it is there, stands what the encoder's fixed part made of it (models/encoder.py).
    seen_BM: bool, which modality is present.  finding_BF: float32, NaN is missing.  class_B: int64, -1 is missing.
    patient_B: int64, 0 … patients-1: whose study it is.
    further_BK: float32, columns of `Labels.further`: level by number, value, time, event; NaN is missing.
    day_B: float32, day of the study on a calendar of the patient's own; NaN is unknown.
    key_B: int64, names the patient whoever else is there: what chance does to a study hangs on it, not on its place.
    copies: each study stands that many times in a row, augmented; the copies of a study do not look at each other.
    """

    inputs: Mapping[str, torch.Tensor]
    seen_BM: torch.Tensor
    finding_BF: torch.Tensor
    class_B: torch.Tensor
    patient_B: torch.Tensor
    patients: int
    further_BK: torch.Tensor
    day_B: torch.Tensor
    key_B: torch.Tensor
    copies: int = 1

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            inputs={name: value.to(device) for name, value in self.inputs.items()},
            seen_BM=self.seen_BM.to(device),
            finding_BF=self.finding_BF.to(device),
            class_B=self.class_B.to(device),
            patient_B=self.patient_B.to(device),
            patients=self.patients,
            further_BK=self.further_BK.to(device),
            day_B=self.day_B.to(device),
            key_B=self.key_B.to(device),
            copies=self.copies,
        )

    @property
    def studies(self) -> int:
        """B."""
        return int(self.seen_BM.shape[0])

    @property
    def timeline(self) -> Timeline:
        """With copies, each has a history of its own: the first copies of a patient's studies, the second ones, …"""
        row_B = self.patient_B.new_ones(self.studies).cumsum(0) - 1
        return Timeline(self.patient_B * self.copies + row_B % self.copies, self.day_B)
