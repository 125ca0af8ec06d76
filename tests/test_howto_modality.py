"""docs/howto-modality.md, followed to the letter in a copy of the source: a fourth modality from two files and a line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/howto-modality.md").read_text(encoding="utf-8")
LEADS = "I,II,III,aVR,aVL,aVF,V1,V2,V3,V4,V5,V6"
SITE = """
[hospital]
name = "{name}"
[labels]
findings = ["arrhythmia"]
[privacy]
epsilon = 20.0
delta = 1e-4
public_patients = 8
allow_not_private = true
[release]
metrics = "exact"
"""
TINY = {
    "data.image_size": 16, "data.report_tokens": 16, "data.report_buckets": 64, "data.audio_mels": 8, "data.audio_seconds": 0.4,
    "model.width": 8, "federation.rounds": 2, "training.batch_size": 8,
}  # fmt: skip


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)


def commands() -> dict[str, list[str]]:
    (text,) = blocks("sh")
    lines = [line.split() for line in text.splitlines()]
    return {words[1]: words[1:] for words in lines if words[0] == "fedmm"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages with what the page adds."""
    folder = tmp_path_factory.mktemp("copy")
    for package in ("fedmm", "client", "server"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    reader, encoder, line = blocks("python")
    names = re.findall(r"^## \d\..*: (fedmm/\S+\.py)$", PAGE, flags=re.MULTILINE)
    for name, source in zip(names, (reader, encoder), strict=True):
        assert not (folder / name).exists(), "the page adds files, it changes none"
        (folder / name).write_text(source, encoding="utf-8")
    schema = folder / "fedmm/schema.py"
    table, end, rest = schema.read_text(encoding="utf-8").partition("\n}\nMODALITIES = ")
    assert line.count("\n") == 1
    schema.write_text(f"{table}\n{line.rstrip()}{end}{rest}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hospitals of eight patients; the second has no report, nobody has an image or a recording."""
    folder = tmp_path_factory.mktemp("hospitals")
    rng = np.random.default_rng(3)
    for name in ("north", "south"):
        (folder / name).mkdir()
        (folder / name / "site.toml").write_text(SITE.format(name=name))
        rows = ["patient_id,study_id,report,ecg,arrhythmia,split"]
        for p in range(8):
            (folder / name / f"{p}.csv").write_text(recording(rng, sick=p % 2 == 1))
            (folder / name / f"{p}.txt").write_text("palpitations" if p % 2 else "no complaint")
            report = f"{p}.txt" if name == "north" else ""
            rows.append(f"p{p},s{p},{report},{'' if p == 7 else f'{p}.csv'},{p % 2},{'train' if p < 4 else 'test'}")
        (folder / name / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def recording(rng: np.random.Generator, *, sick: bool) -> str:
    """Beats, regular or not, in twelve leads."""
    beats = np.cumsum(rng.uniform(40, 120, 25) if sick else np.full(25, 80.0)).astype(int)
    signal_T = np.zeros(1000)
    signal_T[beats[beats < 1000]] = 1.0
    signal_TL = signal_T[:, None] * rng.uniform(0.5, 1.5, 12) + 0.02 * rng.standard_normal((1000, 12))
    return "\n".join(["rate_hz,100", LEADS, *(",".join(f"{v:.3f}" for v in row) for row in signal_TL)]) + "\n"


def python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=copy, check=False,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def fedmm(copy: Path, *arguments: str) -> str:
    done = python(copy, "-m", "fedmm.cli", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_of_the_page_train_score_and_predict_with_the_new_modality(
    copy: Path, hospitals: Path, tmp_path: Path
) -> None:
    run, north = tmp_path / "run", hospitals / "north"
    place = {
        "HOSPITALS": str(hospitals), "HOSPITALS/north": str(north), "HOSPITALS/south": str(hospitals / "south"),
        "RUN": str(run), "note.txt": str(north / "1.txt"), "ecg.csv": str(north / "1.csv"),
    }  # fmt: skip
    said = {name: [place.get(word, word) for word in words] for name, words in commands().items()}
    assert set(said) == {"check", "simulate", "evaluate", "predict"}
    checked = json.loads(fedmm(copy, *said["check"], "--format", "json"))
    assert (checked["ok"], checked["studies"]) == (True, 8)
    settings = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    fedmm(copy, *said["simulate"], *settings, "--workers", "0")
    assert "ecg only" in (run / "report.html").read_text(encoding="utf-8")
    scored = json.loads(fedmm(copy, *said["evaluate"], "--format", "json"))
    assert scored["by_modality"]["ecg"]["studies"] == 6
    assert scored["by_modality"]["ecg"]["only"]["mean_auroc"] is not None
    assert json.loads(fedmm(copy, *said["predict"], "--format", "json"))["modalities"] == ["report", "ecg"]


EVERY_FUSION = """
import json
import torch
from fedmm.config import ModelConfig, RunConfig, settings_table
from fedmm.models.catalogue import catalogue
from fedmm.models.fusion import fusions
from fedmm.models.heads import answer
from fedmm.models.multimodal import ModelSpec
from fedmm.schema import MODALITIES, InputSpec, Labels
from fedmm.training.loop import Workbench, made_up

inputs = InputSpec(image_size=16, report_tokens=8, report_buckets=64, audio_mels=8, audio_seconds=0.4)
heard = {}
for fusion in fusions.names():
    model = ModelConfig(width=8, fusion=fusion, report="gru", audio="recurrent")
    spec = ModelSpec(inputs=inputs, model=model, labels=Labels(findings=("yes",)))
    bench = Workbench(spec, torch.device("cpu"), clipping="ghost")
    bench.private_model  # wrapped and rehearsed
    batch = made_up(spec, (1, 2, 1), 3)
    without_BM = batch.seen_BM & (torch.arange(len(MODALITIES)) != MODALITIES.index("ecg"))
    with_BM = without_BM | (torch.arange(len(MODALITIES)) == MODALITIES.index("ecg"))
    with torch.no_grad():
        said = [answer(bench.model.eval()(batch.inputs, seen, batch.timeline)) for seen in (with_BM, without_BM)]
    heard[fusion] = bool((said[0] != said[1]).all())
settings = RunConfig.from_flat({"model.ecg": "cnn", "model.ecg_from": ""}).flat()
print(json.dumps({"heard": heard, "models": catalogue(inputs, 8), "settings": settings, "page": settings_table()}))
"""


def test_every_fusion_listens_to_the_fourth_modality_and_is_private_with_it(copy: Path) -> None:
    """Built, wrapped for ghost clipping, rehearsed; and the settings and the catalogue know the newcomer."""
    done = python(copy, "-c", EVERY_FUSION)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"concat", "hierarchical", "tokens", "timeline", "aligned"} <= set(found["heard"])
    assert all(found["heard"].values()), found["heard"]
    assert found["models"]["encoders"]["ecg"] == ["cnn"]
    assert found["models"]["details"]["ecg cnn"]["trained"] > 0
    assert found["settings"]["model.ecg"] == "cnn"
    assert "`model.ecg`" in found["page"]


BROKEN = {
    "wrong rate": ("broken_ecg", lambda text: text.replace("rate_hz,100", "rate_hz,500")),
    "a lead missing": ("broken_ecg", lambda text: text.replace(",V6", "")),
    "too short": ("broken_ecg", lambda text: text[: len(text) // 2]),
    "NaN": ("broken_ecg", lambda text: re.sub(r"-?\d\.\d+$", "nan", text, count=1, flags=re.MULTILINE)),
    "a cell too many": ("broken_ecg", lambda text: re.sub(r"(\d\.\d+)$", r"\1,1", text, count=1, flags=re.MULTILINE)),
    "letters": ("broken_ecg", lambda text: re.sub(r"-?\d\.\d+$", "high", text, count=1, flags=re.MULTILINE)),
    "a flat lead": ("flat_ecg", lambda text: re.sub(r"-?\d\.\d+$", "0.0", text, flags=re.MULTILINE)),
    "microvolts": ("absurd_size", lambda text: re.sub(r"-?\d\.\d+$", "900.0", text, count=1, flags=re.MULTILINE)),
    "empty": ("broken_ecg", lambda text: ""),
}


def test_a_broken_recording_is_named_by_row_and_code_and_nothing_from_inside_is_said(
    copy: Path, hospitals: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(hospitals / "north", folder)
    rows = ["patient_id,study_id,ecg,arrhythmia,split"]
    whole = (folder / "0.csv").read_text()
    for row, (_, broken) in enumerate(BROKEN.values()):
        (folder / f"{row}.csv").write_text(broken(whole))
        rows.append(f"p{row},s{row},{row}.csv,1,train")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    done = python(copy, "-m", "fedmm.cli", "check", str(folder), "--format", "json")
    assert done.returncode == 1, done.stderr
    problems = json.loads(done.stdout)["problems"]
    assert [(p["row"], p["code"]) for p in problems] == [(n, code) for n, (code, _) in enumerate(BROKEN.values(), 2)]
    assert "high" not in done.stdout
    assert "900" not in done.stdout
