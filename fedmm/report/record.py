"""A run folder: what is in it, how it is written, how it is read.

config.json              model spec, run settings, privacy plan, hospitals: enough to load the model and to read the run
run.jsonl                one RoundRecord a round
checkpoint.safetensors   state after the last round, for resuming
model.safetensors        the finished model
report.html              one self-contained page
status.json              what the run is doing now, hospital by hospital (fedmm.report.status)
tensorboard/             the same numbers for TensorBoard (fedmm.report.trackers)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmm.errors import ConfigError

if TYPE_CHECKING:
    from fedmm.federation.rounds import RoundRecord

CONFIG_FILE, LOG_FILE, MODEL_FILE, REPORT_FILE = "config.json", "run.jsonl", "model.safetensors", "report.html"


def append_round(folder: Path, record: RoundRecord) -> None:
    """One line, on disk when this returns."""
    line = json.dumps(vars(record), separators=(",", ":"))
    path = folder / LOG_FILE
    with path.open("a+b") as file:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if data[whole:]:  # a power cut left a line without its end: finish it if it is whole, or take it away
            file.write(b"\n") if _is_json(data[whole:]) else file.truncate(whole)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises: ConfigError if this is no run folder."""
    try:
        content: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if not {"settings", "labels"} <= set(content):  # a model without a run has no settings
            raise KeyError("settings")
        return content
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        raise ConfigError(
            f"{folder} is not a run folder",
            why=f"{CONFIG_FILE} is missing or not a run's",
            fix="give a folder that --out wrote",
        ) from None


def note_arrivals(folder: Path, arrived: Sequence[Mapping[str, Any]]) -> None:
    """More messages that left a hospital outside of a round, in config.json: the introductions of a run that goes on."""
    content = read_config(folder)
    content["arrived"] = [*content["arrived"], *arrived]
    new = folder / (CONFIG_FILE + ".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(new, folder / CONFIG_FILE)


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """Records in order of rounds, each once, the last line of a round counts.

    A half line at the end (power cut) is left out. Raises: ConfigError if a line in the middle is damaged.
    """
    try:
        lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            found[int(record["round"])] = record
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            if number != len(lines):
                raise ConfigError(f"line {number} of {folder / LOG_FILE} is damaged") from None
    return [found[number] for number in sorted(found)]


def progress_line(record: RoundRecord, *, seconds_left: float) -> str:
    """One line a round, units written: round 7/40 | 5 of 6 hospitals | auroc 0.871 | epsilon 1.34 of 20.00 | …"""
    width = len(str(record.rounds))
    hospitals = len(record.trained) + len({f["hospital"] for f in record.failures} - set(record.trained))
    parts = [f"round {record.round:>{width}}/{record.rounds}", f"{len(record.trained)} of {hospitals} hospitals"]
    parts += _score(record)
    parts.append(_budget(record.epsilon) if record.private else "NOT PRIVATE")
    parts.append(f"{record.bytes_up / 1e6:.1f} MB up")
    parts.append(f"{record.seconds:.1f} s")
    parts.append(f"{format_seconds(seconds_left)} left")
    return " | ".join(parts)


def _score(record: RoundRecord) -> list[str]:
    """The mean of exact scores, or what the noisy ones say together."""
    exact = [s.get("mean_auroc") for s in record.scores.values() if not s.get("noisy")]
    areas = [area for area in exact if area is not None]
    if areas:
        return [f"auroc {sum(areas) / len(areas):.3f}"]
    if record.pooled is None:
        return []
    area, (low, high) = record.pooled["mean_auroc"], record.pooled["mean_auroc_interval"]
    return [f"auroc {'not known' if area is None else f'{area:.2f}'} ({low:.2f} to {high:.2f})"]


def _budget(epsilon: Mapping[str, Mapping[str, float]]) -> str:
    """The hospital that is closest to its ceiling."""
    if not epsilon:
        return "epsilon unknown"
    worst = max(epsilon.values(), key=lambda e: e["spent"] / e["ceiling"])
    return f"epsilon {worst['spent']:.2f} of {worst['ceiling']:.2f}"


def format_seconds(seconds: float) -> str:
    """12 s, 5 min, 3.2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
