"""A run's state on disk after each round: written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedmm.errors import ConfigError

CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """After `round` rounds: global weights, what the strategy remembers, and notes (JSON)."""

    round: int
    weights: dict[str, Tensor]
    strategy: dict[str, Tensor]
    notes: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Atomic: a crash leaves the checkpoint before or the new one. One file, so the parts cannot disagree."""
    tensors = {f"weights/{k}": v.contiguous() for k, v in checkpoint.weights.items()}
    tensors |= {f"strategy/{k}": v.contiguous() for k, v in checkpoint.strategy.items()}
    about = {"round": str(checkpoint.round), "notes": json.dumps(checkpoint.notes)}
    write_atomically(folder / CHECKPOINT_FILE, save(tensors, metadata=about))


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """None if there is none yet. Raises: ConfigError if the file is damaged."""
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        tensors = load(data)
        about = _metadata(data)
        return Checkpoint(
            round=int(about["round"]),
            weights=_part(tensors, "weights/"),
            strategy=_part(tensors, "strategy/"),
            notes=json.loads(about["notes"]),
        )
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__})", fix="start a new run") from None


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _metadata(data: bytes) -> dict[str, str]:
    """The header of a safetensors file: 8 bytes of length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + length])
    return header["__metadata__"]


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, flush to disk, rename over."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
