"""What an epoch of reading costs once rows are kept, and what frozen encoders save when their features are kept.

decoded       every file, in a process that keeps nothing ([cache] gigabytes = 0); on one thread, and on all cores
kept, sealed  the same files later: one more epoch of a process; the first epoch of a new one; and that with all that
              load_hospital does before it (manifest, policy, times of files, checksums; sealed: decryption)
training      a private epoch of a model with a frozen ResNet-18: decoded and encoded again, or with its features kept

Large JPEG and PNG as in ../shared/performance.md, and the largest hospital of the open chest pack where it is at hand. The ways
take turns, each in processes of its own; files and rows are in the system's memory for all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.dp_step import PLAN
from fedmm.config import ModelConfig, TrainingConfig, load_site
from fedmm.data.chest import import_chest
from fedmm.data.dataset import Cohort, load_hospital
from fedmm.models.multimodal import ModelSpec
from fedmm.pretrained_folder import VARIABLE, digests
from fedmm.privacy.noise import SystemNoise
from fedmm.schema import InputSpec
from fedmm.training.loop import Workbench, train
from tests.data.conftest import HEADER, SITE, tone, write_manifest, write_wav
from tests.pretrained_folders import write_image

PACK = Path("../shared/data/chest")
SIZES: Mapping[str, tuple[int, int]] = {"jpg": (3056, 2544), "png": (1024, 1024)}  # height, width
INPUTS = InputSpec(image_size=224)
WAYS = {
    "decoded": "[cache]\ngigabytes = 0\n[limits]\nthreads = 1",
    "decoded on all cores": "[cache]\ngigabytes = 0",
    "kept": "",
    "sealed": "[cache]\nencrypted = true",
}


def measure(*, quick: bool) -> dict[str, float]:
    """Milliseconds a study, medians over turns with their range; ratios of those medians."""
    found: dict[str, float] = {}
    studies, turns = (60, 1) if quick else (200, 3)
    with tempfile.TemporaryDirectory() as name:
        os.environ[VARIABLE] = name
        write_image(Path(name) / "resnet18", "resnet18")
        cases = {kind: _written(Path(name) / kind, kind, studies) for kind in list(SIZES)[: 1 if quick else None]}
        if PACK.exists() and not quick:
            cases["chest"] = max(import_chest(PACK, Path(name) / "hospitals"), key=_studies)
        for case, hospital in cases.items():
            ways = {way: _linked(hospital, Path(name) / f"{case} {way}", text) for way, text in WAYS.items()}
            found |= _compare(case, ways, "read", turns)
            if case == "jpg":
                found |= _compare(
                    "frozen", {way: ways[way] for way in ("decoded on all cores", "kept")}, "train", turns
                )
    return found


def _compare(case: str, ways: Mapping[str, Path], what: str, turns: int) -> dict[str, float]:
    for way, folder in ways.items():
        if "decoded" not in way:
            _child(folder, what)
    seen: dict[str, list[float]] = {}
    for _ in range(turns):
        for way, folder in ways.items():
            load, first, later = _child(folder, what)
            name = f"{case}_{way.replace(' ', '_')}"
            if "decoded" in way:
                seen.setdefault(f"{name}_ms", []).append(load + first)
                continue
            for which, value in (("process", load + first), ("first_epoch", first), ("epoch", later)):
                seen.setdefault(f"{name}_{which}_ms", []).append(value)
    found = {name: statistics.median(values) for name, values in seen.items()}
    spread = {f"{name}_spread": max(values) - min(values) for name, values in seen.items()}
    slow = [name for name in found if "decoded" in name]
    ratios = {
        f"{one[:-3]}_to_{fast[:-3]}": found[one] / found[fast] for one in slow for fast in found if fast not in slow
    }
    return found | spread | ratios


def _child(folder: Path, what: str) -> tuple[float, float, float]:
    """`_timed` in a process of its own, which has imported everything and loaded nothing."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_timed, (folder, what))


def _timed(folder: Path, what: str) -> tuple[float, float, float]:
    """Milliseconds a study: loading, the first epoch, the best of later ones."""
    torch.set_num_threads(1)
    bench, parts = None, {}
    if what == "train":
        model = ModelConfig(image="resnet18", image_from="resnet18", tuning="frozen")
        labels = load_site(folder).labels
        bench = Workbench(
            ModelSpec(inputs=INPUTS, model=model, labels=labels, pretrained=digests(model, INPUTS)),
            torch.device("cpu"),
            clipping="ghost",
        )
        bench.private_model  # noqa: B018  (wrapped before the clock starts)
        parts = bench.fixed_parts()
    marks = [time.perf_counter()]
    cohort = load_hospital(folder, INPUTS, parts=parts).cohort("all")
    marks.append(time.perf_counter())
    for _ in range(6):
        _epoch(cohort, bench)
        marks.append(time.perf_counter())
    load, first, *later = (1000 * seconds / cohort.studies for seconds in np.diff(marks))
    return load, first, min(later)


def _epoch(cohort: Cohort, bench: Workbench | None) -> None:
    """Everybody once: read, or in one private step."""
    if bench is not None:
        config = TrainingConfig(batch_size=cohort.patients)
        train(bench, cohort, PLAN, config=config, noise=SystemNoise())
        return
    for batch in cohort.physical(range(cohort.patients), limit=TrainingConfig().physical_studies):
        assert batch.studies


def _written(folder: Path, kind: str, studies: int) -> Path:
    """A hospital of patients with one study each: a large image of this kind, a report, a recording."""
    folder.mkdir()
    (folder / "site.toml").write_text(SITE, encoding="utf-8")
    rng = np.random.default_rng(1)
    (height, width), rows = SIZES[kind], []
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for number in range(studies):
        if number < 8:  # then their copies: what is inside does not change what decoding costs
            body = 120 + 70 * np.sin(x / (200 + 20 * number)) * np.cos(y / 300) + rng.normal(0, 4, x.shape)
            Image.fromarray(body.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.{kind}", quality=90)
        else:
            (folder / f"{number}.{kind}").write_bytes((folder / f"{number % 8}.{kind}").read_bytes())
        (folder / f"{number}.txt").write_text("The heart is of normal size. No effusion, no consolidation. " * 5)
        write_wav(folder / f"{number}.wav", tone(2.0, hertz=300.0 + number))
        rows.append(f"p{number},s{number},{number}.{kind},{number}.txt,{number}.wav,1,0,mild,train")
    write_manifest(folder, *rows, header=HEADER)
    return folder


def _linked(hospital: Path, folder: Path, text: str) -> Path:
    """The same files as another hospital, with these lines more in site.toml and with nothing kept."""
    shutil.copytree(hospital, folder, copy_function=os.link)
    site = (folder / "site.toml").read_text(encoding="utf-8")
    (folder / "site.toml").unlink()
    (folder / "site.toml").write_text(f"{site}\n{text}\n", encoding="utf-8")
    return folder


def _studies(hospital: Path) -> int:
    return len((hospital / "manifest.csv").read_text(encoding="utf-8").splitlines())
