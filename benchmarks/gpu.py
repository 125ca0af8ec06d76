"""python -m benchmarks.gpu [--device cuda] [--tiny]: a private step against the same model's plain step, on a GPU.

For ResNet-50 at 224 pixels, a report encoder of BERT-base's size and the default model, 64 and 512 patients a step in
physical batches of the largest that fits: seconds, ratio, peak memory, a round, and how many patients fit.
Weights are drawn, nothing is downloaded. `make gpu-check` runs it after the tests marked gpu; on an H200 under 8 minutes (guess).
--tiny: small models and batches, to try this file on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.dp_step import LABELS, PLAN
from fedmm.config import ModelConfig
from fedmm.models.encoder import Encoder, encoders
from fedmm.models.heads import Objective
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.engine import PrivateEngine
from fedmm.privacy.noise import SystemNoise
from fedmm.schema import Batch, InputSpec
from fedmm.training.loop import Workbench, made_up
from fedmm.training.memory import halves, is_out_of_memory

STEPS_OF_A_ROUND = 5
BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BERT_TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@dataclass(frozen=True)
class Case:
    name: str
    inputs: InputSpec
    leaves: dict[str, Any]


@dataclass(frozen=True)
class Size:
    """patients: of a step, each way.  most: where the search for the largest batch ends.  repeats: of a step."""

    cases: tuple[Case, ...]
    patients: tuple[int, ...]
    most: int
    repeats: int


def sizes(*, tiny: bool) -> Size:
    other = {"image_size": 16, "report_tokens": 8, "report_buckets": 64, "audio_mels": 8, "audio_seconds": 0.4}
    width = 4 if tiny else ModelConfig().width
    seen = {} if tiny else {"image_size": 224}
    read = {} if tiny else {"report_tokens": 256, "report_buckets": 30522}
    cases = (
        Case("resnet50", InputSpec(**other | seen), {"image": "cnn" if tiny else "resnet50", "width": width}),
        Case("bert", InputSpec(**other | read), {"report": "bert_of_noise", "width": width}),
        Case("default", InputSpec(**other) if tiny else InputSpec(), {"width": width}),
    )
    return Size(cases, (2,), 4, 1) if tiny else Size(cases, (64, 512), 4096, 5)


def register_bert(shape: dict[str, int]) -> None:
    """A report encoder `bert_of_noise`: transformers' BERT of this shape with drawn weights, all trained, for this process."""
    from transformers import BertConfig, BertModel

    class Bert(Encoder):
        def __init__(self, spec: InputSpec, width: int) -> None:
            super().__init__(spec, width)
            config = BertConfig(vocab_size=spec.report_buckets, attn_implementation="sdpa", hidden_dropout_prob=0.0,
                                attention_probs_dropout_prob=0.0, **shape)  # fmt: skip
            self.bert = BertModel(config, add_pooling_layer=False)
            self.project = nn.Linear(config.hidden_size, width)

        def forward(self, report_BT: torch.Tensor) -> torch.Tensor:
            place_BT = torch.arange(report_BT.shape[1], device=report_BT.device).repeat(len(report_BT), 1)
            kind_BT = torch.zeros_like(report_BT)
            mask_BT = (report_BT > 0) | (place_BT == 0)
            found = self.bert(report_BT, attention_mask=mask_BT, position_ids=place_BT, token_type_ids=kind_BT)
            out: torch.Tensor = self.project(found.last_hidden_state[:, 0])
            return out

    encoders["report"].register("bert_of_noise")(Bert)


class Steps:
    """A private and a plain step of one model on the device."""

    def __init__(self, case: Case, device: torch.device) -> None:
        spec = ModelSpec(inputs=case.inputs, model=ModelConfig(**case.leaves), labels=LABELS)
        self.device, self.objective = device, Objective(LABELS)
        self.benches = {way: Workbench(spec, device, clipping="ghost") for way in ("plain", "private")}
        self.spec = spec

    def batch(self, patients: int) -> Batch:
        """On the CPU, one study a patient."""
        return made_up(self.spec, [1] * patients, 1)

    def plain(self, batch: Batch, most: int) -> None:
        """most: patients of a physical batch."""
        model = self.benches["plain"].model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        for part in parts(batch, most):
            there = part.to(self.device)
            loss_B = self.objective(model(there.inputs, there.seen_BM, there.timeline), there)
            torch.autograd.backward(loss_B.sum() / batch.patients)
        optimizer.step()
        model.zero_grad()

    def private(self, batch: Batch, most: int) -> None:
        bench = self.benches["private"]
        model = bench.private_model.train()
        optimizer = torch.optim.SGD(bench.model.parameters(), lr=1e-3)
        engine = PrivateEngine(model, optimizer, plan=PLAN, batch_size=batch.patients, noise=SystemNoise(), groups=())
        for part in parts(batch, most):
            engine.accumulate(part.to(self.device), self.objective)
        engine.step()


def parts(batch: Batch, most: int) -> Iterator[Batch]:
    """Physical batches of at most `most` patients."""
    if batch.patients <= most:
        yield batch
    else:
        for half in halves(batch):
            yield from parts(half, most)


def measure(device: torch.device, *, tiny: bool) -> dict[str, float]:
    size = sizes(tiny=tiny)
    if "bert_of_noise" not in encoders["report"].names():
        register_bert(BERT_TINY if tiny else BERT_BASE)
    found: dict[str, float] = {}
    for case in size.cases:
        steps = Steps(case, device)
        largest = {way: most_that_fits(partial(try_one, steps, way), size.most, device) for way in ("plain", "private")}
        found |= {f"{case.name}_{way}_largest_batch": float(most) for way, most in largest.items()}
        for patients in size.patients:
            found |= compare(steps, f"{case.name}_{patients}", patients, largest, size.repeats)
        del steps
        release(device)
    return found


def compare(steps: Steps, at: str, patients: int, largest: dict[str, int], repeats: int) -> dict[str, float]:
    """Medians, the ratio to the plain step of the same turn, peak MiB, and a private round of STEPS_OF_A_ROUND."""
    batch, peak = steps.batch(patients), {}
    seconds: dict[str, list[float]] = {"plain": [], "private": []}
    for turn in range(repeats + 1):
        for way, taken in seconds.items():
            begin_peak(steps.device)
            took = timed(steps, way, batch, largest[way])
            peak[way] = peak_mib(steps.device)
            if turn:  # the first one allocates and chooses kernels
                taken.append(took)
    ratios = sorted(b / a for a, b in zip(seconds["plain"], seconds["private"], strict=True))
    began = time.perf_counter()
    for _ in range(STEPS_OF_A_ROUND):
        step(steps, "private", batch, largest["private"])
    wait(steps.device)
    return {
        **{f"{at}_{way}_ms": 1000 * statistics.median(taken) for way, taken in seconds.items()},
        f"{at}_private_to_plain": statistics.median(ratios),
        f"{at}_private_to_plain_spread": ratios[-1] - ratios[0],
        **{f"{at}_{way}_peak_mib": mib for way, mib in peak.items()},
        f"{at}_private_round_s": time.perf_counter() - began,
    }


def step(steps: Steps, way: str, batch: Batch, most: int) -> None:
    {"plain": steps.plain, "private": steps.private}[way](batch, most)


def try_one(steps: Steps, way: str, patients: int) -> None:
    step(steps, way, steps.batch(patients), patients)
    wait(steps.device)


def timed(steps: Steps, way: str, batch: Batch, most: int) -> float:
    wait(steps.device)
    began = time.perf_counter()
    step(steps, way, batch, most)
    wait(steps.device)
    return time.perf_counter() - began


def most_that_fits(step: Callable[[int], None], most: int, device: torch.device) -> int:
    """Patients of one physical batch: doubled until memory runs out, then halved in between to a quarter.

    step: with this many patients.  most: not searched beyond.  Raises: SystemExit where not one patient fits.
    """
    fits, fails, wanted = 0, most + 1, 1
    while fits < wanted < fails and fails - fits > fits // 4:
        try:
            step(wanted)
            fits = wanted
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fails = wanted
        if fails == wanted:  # behind the handler: the error holds the frames, and they hold what fills the memory
            release(device)
        wanted = min(2 * fits, most) if fails > most else (fits + fails) // 2
    if not fits:
        raise SystemExit("not one patient fits into this device's memory")
    return fits


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def begin_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_mib(device: torch.device) -> float:
    """Of the tensors of this process; NaN on a CPU, where torch does not count."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of this file on a CPU")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was checked (torch.cuda.is_available() is False)", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(json.dumps({"device": name, "torch": torch.__version__, **measure(device, tiny=args.tiny)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
