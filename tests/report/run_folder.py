"""A synthetic run folder, and how to read its page."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedmm.report.render import write_report
from fedmm.schema import SUBSETS

FINDINGS, CLASSES = ["abnormal", "effusion"], ["covid19", "no_finding", "pneumonia"]
OUTPUTS = [*FINDINGS, *(f"finding3={value}" for value in CLASSES)]
NAMES = ["aachen", "basel_university_clinic", "mhh_hannover", "nih_us_ap"]
HOSTILE = "<img src=x onerror=1>"
Page = Callable[[Path], str]


def summary(level: float, rng: np.random.Generator) -> dict[str, Any]:
    """Scores around `level` of AUROC."""
    areas = {name: float(np.clip(level + rng.normal(0, 0.03), 0, 1)) for name in OUTPUTS}
    mean = float(np.mean(list(areas.values())))
    return {"accuracy": mean - 0.12, "f1_macro": mean - 0.15, "auroc": areas, "mean_auroc": mean}


def scores(level: float, rng: np.random.Generator, *, studies: int) -> dict[str, Any]:
    """What fedmm.training.metrics.score gives."""
    drop = {"image": 0.09, "report": 0.05, "audio": 0.02}
    count = rng.integers(5, 60, 10)
    predicted = (np.arange(10) + 0.5) / 10
    confusion = {name: {"values": ["no", "yes"], "counts": rng.integers(3, 40, (2, 2)).tolist()} for name in FINDINGS}
    counts = (np.eye(3, dtype=int) * 20 + rng.integers(0, 9, (3, 3))).tolist()
    return {
        "studies": studies,
        "patients": studies // 2,
        **summary(level, rng),
        "majority": 0.45,
        "by_modality": {
            name: {
                "studies": int(studies * share),
                "only": summary(0.5 + (level - 0.5) * 0.6 + less, rng),
                "without": summary(level - less, rng),
            }
            for (name, less), share in zip(drop.items(), (1, 0.9, 0.6), strict=True)
        },
        "by_subset": {
            name: {"studies": studies // (2 * len(some)), "patients": 9, **summary(level - 0.1 / len(some), rng)}
            for name, some in SUBSETS.items()
        },
        "collapsed": {name: {"collapsed": False} for name in (*FINDINGS, "finding3")},
        "confusion": {**confusion, "finding3": {"values": CLASSES, "counts": counts}},
        "calibration": {
            "predicted": predicted.tolist(),
            "observed": (predicted**1.3).tolist(),
            "count": count.tolist(),
            "expected_calibration_error": 0.04,
        },
    }


def estimate(value: float | None, *, half: float) -> tuple[float | None, list[float]]:
    return (None, [0.0, 1.0]) if value is None else (value, [value - half, value + half])


def noisy(level: float | None, *, patients: int) -> dict[str, Any]:
    """What fedmm.training.histograms.noisy_score gives; level None: all is hidden by the noise."""
    half = 1.2 / math.sqrt(patients)
    area = {name: estimate(None if level is None else level - 0.01 * i, half=half) for i, name in enumerate(OUTPUTS)}
    mean, accuracy = estimate(level, half=half / 2), estimate(None if level is None else level - 0.1, half=half)
    rates = [estimate(None if b > 6 or level is None else 0.05 + 0.1 * b, half=0.04) for b in range(10)]
    return {
        "noisy": True,
        "patients": patients,
        "auroc": {name: value for name, (value, _) in area.items()},
        "auroc_interval": {name: interval for name, (_, interval) in area.items()},
        "mean_auroc": mean[0],
        "mean_auroc_interval": mean[1],
        "accuracy": accuracy[0],
        "accuracy_interval": accuracy[1],
        "calibration": {
            "predicted": [0.05 + 0.1 * b for b in range(10)],
            "observed": [value for value, _ in rates],
            "observed_interval": [interval for _, interval in rates],
            "count": [7 + b for b in range(10)],
            "expected_calibration_error": None if level is None else 0.031,
        },
    }


def arrive(line: dict[str, Any]) -> dict[str, Any]:
    """The record with the messages that its content says have arrived, and their bytes."""
    arrived = [{"hospital": name, "what": "weights", "bytes": 1_234_567} for name in line["trained"]]
    for name, shown in line["scores"].items():
        what, size = ("score histogram", 5_123) if shown.get("noisy") else ("exact scores", 3_210)
        arrived.append({"hospital": name, "what": what, "bytes": size})
    for failure in line["failures"]:
        arrived.append({"hospital": failure["hospital"], "what": f"refusal {failure['code']}", "bytes": 71})
    line.update(arrived=arrived, bytes_up=sum(each["bytes"] for each in arrived))
    return line


def noisy_record(number: int, *, rounds: int, levels: dict[str, float | None], exact: list[str]) -> dict[str, Any]:
    """The last line of a run where hospitals of `levels` gave noisy scores, and others maybe exact ones."""
    names = [*levels, *exact]
    line = record(number, names, rounds=rounds)
    shown = {name: noisy(level, patients=80 + 10 * i) for i, (name, level) in enumerate(levels.items())}
    known = [level for level in levels.values() if level is not None]
    pooled = noisy(sum(known) / len(known) if known else None, patients=90 * len(levels))
    line.update(scores={**{n: line["scores"][n] for n in exact}, **shown}, pooled=pooled)
    return arrive(line)


def record(number: int, names: list[str], *, rounds: int, private: bool = True, scored: bool = True) -> dict[str, Any]:
    """One line of run.jsonl. Hospital i has spent 0.3 i in earlier runs and, of five, learns a little more slowly."""
    rng = np.random.default_rng(number)
    level = 0.55 + 0.35 * (1 - math.exp(-number / 5))
    epsilon = {
        name: {
            "spent": 0.3 * i + 0.9 * math.sqrt(number),
            "ceiling": 10.0 if i % 2 else 20.0,
            "delta": 1e-4,
            "unprotected": number // 2 if scored else 0,
            "ledger_sequence": 3 * number + i,
            "ledger_hash": f"{number:02x}{i:02x}" * 16,
            "ledger_signature": f"{i:02x}{number:02x}" * 32,
            "ledger_key": f"{i:02x}aa" * 16,
        }
        for i, name in enumerate(names)
    }
    shown = {n: scores(level - 0.02 * (i % 5), rng, studies=40 + 30 * i) for i, n in enumerate(names)}
    line = {
        "round": number,
        "rounds": rounds,
        "private": private,
        "trained": list(names),
        "failures": [],
        "epsilon": epsilon,
        "evaluated": scored,
        "scores": shown if scored else {},
        "pooled": None,
        "withheld": [],
        "bytes_down": 1_200_000 * len(names),
        "seconds": 7.25,
    }
    return arrive(line)


def config(names: list[str], *, rounds: int, private: bool = True) -> dict[str, Any]:
    """What the coordinator writes beside the model."""
    settings = {
        "data.hospitals": "/secret/place/hospitals",
        "data.image_size": 64,
        "data.report_tokens": 256,
        "model.image": "cnn",
        "model.report": "ngrams",
        "model.audio": "cnn",
        "model.fusion": "concat",
        "training.batch_size": 32,
        "training.sampling_rate": 0.25,
        "training.local_steps": 2,
        "training.learning_rate": 0.5,
        "privacy.enabled": private,
        "privacy.epsilon": 8.0,
        "privacy.delta": 1e-4,
        "federation.rounds": rounds,
        "federation.strategy": "fedavgm",
        "federation.weights": "uniform",
        "federation.evaluate_every": 2,
    }
    plan = {
        "unit": "patient",
        "relation": "add_or_remove_one",
        "epsilon": 8.0,
        "delta": 1e-4,
        "sampling": "poisson",
        "max_grad_norm": 1.0,
        "max_studies": 5,
        "sampling_rate": 0.25,
        "steps_per_round": 2,
        "rounds": rounds,
        "noise_multiplier": 1.2208 if private else 0.0,
        "evaluation_noise": 0.0,
        "private": private,
    }
    return {
        "format": 1,
        "labels": {"findings": FINDINGS, "class_name": "finding3", "class_values": CLASSES},
        "settings": settings,
        "plan": plan,
        "run": "7f3a90c2d1e4b856",
        "private": private,
        "hospitals": names,
        "started": "2026-03-14T09:26:53+00:00",
        "absent": [],
        "arrived": [{"hospital": name, "what": "hello", "bytes": 300} for name in names],
    }


def write_run(folder: Path, settings: dict[str, Any], records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "run.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def make_run(
    folder: Path,
    *,
    names: list[str] = NAMES,
    rounds: int = 4,
    done: int | None = None,
    private: bool = True,
    scored: bool = True,
) -> Path:
    """A run folder: evaluation in every second round; the last of several hospitals refuses from round 3."""
    records = []
    for number in range(1, (rounds if done is None else done) + 1):
        line = record(number, names, rounds=rounds, private=private, scored=scored and number % 2 == 0)
        if len(names) > 1 and number >= 3 and private:
            line["trained"].remove(names[-1])
            if not line["scores"]:
                del line["epsilon"][names[-1]]
            line["failures"] = [refusal(names[-1], number)]
            arrive(line)
        records.append(line)
    return write_run(folder, config(names, rounds=rounds, private=private), records)


def refusal(hospital: str, number: int) -> dict[str, Any]:
    reason = f"BUDGET_EXHAUSTED: round {number} would bring epsilon to 10.04 of 10.00 at delta 0.0001"
    return {"hospital": hospital, "kind": "refused", "code": 1001, "reason": reason}


def drawn(folder: Path) -> str:
    """The whole page, figures included."""
    return write_report(folder).read_text(encoding="utf-8")


def cells(content: str, first: str) -> list[list[str]]:
    """Rows of all tables whose first cell is `first`, as a reader sees them."""
    rows = re.findall(r"<tr>(.*?)</tr>", content)
    read = [
        [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
        for row in rows
    ]
    return [row for row in read if row and row[0] == first]
