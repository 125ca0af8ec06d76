"""A private step against the same model's plain step, through the engine that hospitals train with.

plain   forward, backward, SGD step of the mean over patients            noise   what drawing and adding the noise takes of it
ghost   `training.clipping = ghost`: book-keeping, one backward pass      hooks   Opacus' own gradients per study

Patients of one to five studies. The ways take turns, so that whatever else the machine does meets all of them; one thread.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fedmm.config import ModelConfig
from fedmm.models.heads import Objective
from fedmm.models.multimodal import ModelSpec
from fedmm.pretrained_folder import VARIABLE, digests
from fedmm.privacy.engine import PrivateEngine, wrap
from fedmm.privacy.noise import SystemNoise, with_noise
from fedmm.privacy.plan import PrivacyPlan, Rate
from fedmm.schema import Batch, InputSpec, Labels, fixed
from fedmm.training.loop import Workbench, made_up

LABELS = Labels(findings=("a", "b", "c"), class_name="severity", class_values=("none", "mild", "severe"))
STUDIES = (1, 2, 3, 4, 5)  # of patients, in turn: 2.9 a patient
BERT = "small-bert"  # folder of a model with random weights: four layers of width 256
TOKENS = 64


@dataclass(frozen=True)
class Case:
    """patients: of a step.  pretrained: whether the report is read by BERT, with its tokens."""

    patients: int
    leaves: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def spec(self) -> ModelSpec:
        inputs = {"report_tokens": TOKENS, **self.inputs}
        if self.leaves.get("report") == "bert":
            os.environ[VARIABLE] = str(_pretrained())
            inputs["report_tokenizer"] = BERT
        form, model = InputSpec(**inputs), ModelConfig(**self.leaves)
        return ModelSpec(inputs=form, model=model, labels=LABELS, pretrained=digests(model, form))


SMALL = {"report": "transformer"}
BERT_REPORT = {"report": "bert", "report_from": BERT}
CACHED = {"image": "hog", "audio": "mfcc", **BERT_REPORT, "tuning": "frozen"}
CASES: Mapping[str, Case] = {
    "default": Case(32, inputs={"report_tokens": 256}),
    "small_concat": Case(32, SMALL),
    "small_crossattention": Case(32, {**SMALL, "fusion": "cross_attention"}),
    "cached_concat": Case(128, CACHED),
    "cached_crossattention": Case(128, {**CACHED, "fusion": "cross_attention"}),
    "cached_wide": Case(128, {**CACHED, "width": 512}),
    "bert": Case(32, {"image": "hog", "audio": "mfcc", **BERT_REPORT, "tuning": "full"}),
    "resnet18": Case(8, {"image": "resnet18"}, {"image_size": 224}),
}
QUICK = 6  # cases
LEAST_MIB = 50.0  # of memory that can be compared
PLAN = PrivacyPlan(
    unit="patient", relation="add_or_remove_one", delta=1e-5, epsilon=8.0, sampling="poisson", max_grad_norm=0.4,
    max_studies=5, sampling_rate=Rate(1.0), steps_per_round=1, rounds=1, noise_multiplier=1.0, evaluation_noise=0.0,
    private=True,
)  # fmt: skip


def measure(*, quick: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    for case in list(CASES)[: QUICK if quick else None]:
        slow = case in ("bert", "resnet18")
        found |= compare(case, repeats=7 if quick or slow else 21)
        if not quick:
            found |= memory(case)
    return found


def compare(case: str, *, repeats: int) -> dict[str, float]:
    """Medians, ratios to the plain step of the same turn and their quartiles."""
    torch.set_num_threads(1)
    ways = {way: step_of(case, way) for way in ("plain", "ghost", "hooks", "noise")}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 2):
        for way, step in ways.items():
            if way == "hooks" and turn % 3:
                continue  # ten to two hundred times as long as the others
            began = time.perf_counter()
            step()
            if turn >= 2:  # the first ones allocate
                seconds[way].append(time.perf_counter() - began)
    plain = statistics.median(seconds["plain"])
    found = {f"{case}_plain_ms": 1000 * plain}
    for way in ("ghost", "hooks", "noise"):
        ratios = [value / plain for value in seconds[way]]
        if way == "ghost":
            ratios = [a / b for a, b in zip(seconds[way], seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found |= {f"{case}_{way}_to_plain": middle, f"{case}_{way}_to_plain_spread": high - low}
    return found


def memory(case: str) -> dict[str, float]:
    """Peaks beyond what building the model takes; nothing where a step takes no more."""
    plain = _memory(case, "plain")
    if plain < LEAST_MIB:
        return {}
    return {f"{case}_{way}_memory_to_plain": _memory(case, way) / plain for way in ("ghost", "hooks")}


def step_of(case: str, way: str) -> Callable[[], None]:
    """One step of this way on a model and patients of its own."""
    spec, patients = CASES[case].spec(), CASES[case].patients
    bench = Workbench(spec, torch.device("cpu"))
    studies = sorted(STUDIES[i % len(STUDIES)] for i in range(patients))  # in the order in which a cohort gives them
    batch = _ready(bench, made_up(spec, studies, 1))
    objective, model = Objective(LABELS), bench.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if way == "plain":
        studies_P = torch.bincount(batch.patient_B, minlength=batch.patients).float()

        def plain() -> None:
            optimizer.zero_grad()
            loss_B = objective(model(batch.inputs, batch.seen_BM, batch.timeline), batch)
            torch.autograd.backward((loss_B / studies_P[batch.patient_B]).sum() / batch.patients)
            optimizer.step()

        return plain
    if way == "noise":
        noise, std = SystemNoise(), PLAN.noise_multiplier * PLAN.max_grad_norm
        total = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

        def draw() -> None:
            with_noise(total, noise, std)

        return draw
    engine = PrivateEngine(
        wrap(model, way), optimizer, plan=PLAN, batch_size=batch.patients, noise=SystemNoise(), groups=()
    )

    def private() -> None:
        engine.accumulate(batch, objective)
        engine.step()

    return private


def _ready(bench: Workbench, batch: Batch) -> Batch:
    """With what fixed encoders make of files in their place, as a hospital keeps it."""
    inputs = dict(batch.inputs)
    for name, part in bench.fixed_parts().items():
        inputs[fixed(name)] = part.compute(inputs.pop(name)).float()
    return replace(batch, inputs=inputs)


@lru_cache(maxsize=1)
def _pretrained() -> Path:
    """A folder of pretrained folders for this process and those that it starts."""
    if "FEDMM_DP_STEP" in os.environ:
        return Path(os.environ["FEDMM_DP_STEP"])
    import transformers as hf
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers.utils import logging

    logging.disable_progress_bar()
    root = Path(tempfile.mkdtemp(prefix="fedmm-bench-"))
    config = hf.BertConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, vocab_size=4096,
        max_position_embeddings=TOKENS + 2,
    )  # fmt: skip
    hf.BertForMaskedLM(config).save_pretrained(root / BERT)
    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])}
    Tokenizer(WordLevel(words, unk_token="[UNK]")).save(str(root / BERT / "tokenizer.json"))
    os.environ["FEDMM_DP_STEP"] = str(root)
    return root


def _memory(case: str, way: str) -> float:
    """Peak resident MiB of a process that takes three steps, less that of one that only builds the model."""
    command = [sys.executable, "-m", "benchmarks.dp_step", case, way]
    base, peak = (float(subprocess.run([*command, n], capture_output=True, check=True).stdout) for n in ("0", "3"))
    return peak - base


def _peak(case: str, way: str, steps: int) -> float:
    torch.set_num_threads(1)
    step = step_of(case, way)
    for _ in range(steps):
        step()
    # Linux; what getrusage calls the peak is inherited from the parent
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    print(_peak(sys.argv[1], sys.argv[2], int(sys.argv[3])))
