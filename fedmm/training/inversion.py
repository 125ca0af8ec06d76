"""What does one update tell a coordinator who looks at it? The worst case: one step, on one study of one patient.

The attacker has the weights that were sent, the run's settings, the labels and all that the study holds but what is asked
for; the update is made by the training itself, with the clipping and the noise of the plan where there are any.

    tokens   a report moves the rows of the table (columns of the layer) of its own tokens and no others: the longest ones
             are named (known since Melis et al. 2019)
    image    pixels are moved until their gradient points where the update does (Geiping et al. 2020, "Inverting Gradients":
             cosine distance and total variation, Adam on the sign of the gradient, a rate that falls in steps)

Every image of fedmm has mean 0 and variance 1, so a reconstruction is brought to that before it is compared. The baseline is
chance for tokens, and for images how much the same reconstruction resembles the images of the other patients: chests are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor, nn

from fedmm.config import RunConfig, TrainingConfig
from fedmm.data.dataset import Cohort, HospitalData
from fedmm.models.encoder import FixedEncoder
from fedmm.models.heads import Objective
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.noise import SystemNoise
from fedmm.privacy.plan import PrivacyPlan, Rate
from fedmm.schema import MODALITIES, Batch
from fedmm.seeds import stream
from fedmm.training.intervals import LEVEL, SEED
from fedmm.training.loop import Workbench, train
from fedmm.training.rates import Floats
from fedmm.training.relink import first_of_each
from fedmm.training.shadows import Told

# H W pixels, V buckets of the tokeniser, N patients

PATIENTS = 4
PIXEL_RATE, SMOOTH = 0.2, 0.2  # best of 0.03 to 0.4 and 0.001 to 0.4 on one synthetic image each of 32 and 64 pixels
FALLS = (3 / 8, 5 / 8, 7 / 8)  # of the steps, where the rate becomes a tenth: theirs
WORDLESS = "the reports that were chosen have no words"
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM: Wang et al. 2004


@dataclass(frozen=True)
class Observed:
    """A study, and by name of the weight what its update says of its gradient: up to a positive factor with sgd."""

    study: Batch
    gradient: Mapping[str, Tensor]


def attack_updates(
    spec: ModelSpec,
    start: Mapping[str, Tensor],
    data: HospitalData,
    *,
    config: RunConfig,
    plan: PrivacyPlan,
    progress: Told,
    steps: int,
) -> list[dict[str, Any]]:
    """[{"what", "patients", "value", "low", "high", "baseline"}], means over PATIENTS training patients who have image and report.

    start: weights that the patients' updates begin at.  plan: with its privacy, or without any.  steps: of each image.
    What cannot be asked of this model: {"what", "not_applicable"} with the reason. The intervals are Student's over so few
    patients: read them as rough.
    """
    plain = Workbench(spec, torch.device("cpu"))
    plain.load(start)
    reasons = {"tokens recovered": no_tokens(plain), "image ssim": no_pixels(plain), "image psnr": no_pixels(plain)}
    studies = some_studies(data)
    if not studies:
        reasons = dict.fromkeys(reasons, "no training patient has both an image and a report")
    blocked = [{"what": what, "not_applicable": why} for what, why in reasons.items() if why]
    if len(blocked) == len(reasons):
        return blocked
    seen = observe(spec, start, studies, config=config, plan=plan)
    found = []
    if not reasons["tokens recovered"]:
        with_tokens = [one for one in seen if _tokens_of(one)]
        found.append(
            _tokens(plain, with_tokens) if with_tokens else {"what": "tokens recovered", "not_applicable": WORDLESS}
        )
    if not reasons["image ssim"]:
        made = []
        for number, one in enumerate(seen):
            made.append(reconstruct(plain, one, Objective.from_config(config.training, spec.labels), steps=steps))
            progress(number + 1, len(seen))
        found += _images(made, [one.study.inputs["image"][0, 0] for one in seen])
    return found + blocked


def no_tokens(bench: Workbench) -> str:
    """Why reports cannot be read out of this model's updates in this way; empty if they can."""
    if table_of(bench) is None:
        return f"report encoder {bench.model.spec.model.encoder('report')} trains no weights of single tokens"
    return ""


def no_pixels(bench: Workbench) -> str:
    """Why an image's pixels cannot be asked for; empty if they can."""
    encoder, name = bench.model.encoders["image"], bench.model.spec.model.encoder("image")
    if isinstance(encoder, FixedEncoder):
        return (
            f"image encoder {name} has a fixed part: an update tells of its features, and no gradient leads to pixels"
        )
    if not any(weight.requires_grad for weight in encoder.parameters()):
        return f"image encoder {name} is not trained"
    return ""


def table_of(bench: Workbench) -> tuple[str, int] | None:
    """Name and axis of the weights that belong to single tokens of the tokeniser, an embedding or a first layer."""
    buckets = bench.model.spec.inputs.report_buckets
    if bench.model.spec.inputs.report_tokenizer:
        return None
    for name, module in bench.model.encoders["report"].named_modules():
        axis = 0 if isinstance(module, nn.Embedding) else 1 if isinstance(module, nn.Linear) else None
        if axis is not None and module.weight.shape[axis] == buckets and module.weight.requires_grad:
            return f"encoders.report.{name}.weight", axis
    return None


def some_studies(data: HospitalData) -> list[Cohort]:
    """PATIENTS training patients with image and report, at random, of each the first such study alone."""
    wanted = [MODALITIES.index(name) for name in ("image", "report")]
    both_S = first_of_each(data, data.seen_SM[:, wanted].all(1) & data.train_S)
    rows = both_S.nonzero().flatten().numpy()
    chosen = stream(SEED, "inversion").permutation(rows)[:PATIENTS]
    return [Cohort(data, torch.arange(len(both_S)) == int(row)) for row in chosen]


def observe(
    spec: ModelSpec, start: Mapping[str, Tensor], studies: Sequence[Cohort], *, config: RunConfig, plan: PrivacyPlan
) -> list[Observed]:
    """Of each patient one round of one step: nobody else takes part, the patient does for sure, nothing is hidden or varied."""
    alone = replace(plan.of_round(1), sampling_rate=Rate(1.0), steps_per_round=1, unit="patient")
    still = _exact(config.training)
    objective = Objective.from_config(still, spec.labels)
    bench, found = Workbench(spec, torch.device("cpu"), clipping=still.clipping, objective=objective), []
    for one in studies:
        bench.load(start)
        train(bench, one, alone, config=still, noise=SystemNoise())
        after = bench.weights()
        moved = {name: (value - after[name]) / still.learning_rate for name, value in start.items()}
        found.append(Observed(one.batch([0]), moved))
    return found


def _exact(training: TrainingConfig) -> TrainingConfig:
    changes = {"modality_dropout": 0.0, "augment": "", "augment_copies": 1, "local_steps": 1, "proximal": 0.0}
    return TrainingConfig.model_validate({**training.model_dump(), **changes})


# --- reports ------------------------------------------------------------------------------------------------------------


def _tokens(bench: Workbench, seen: Sequence[Observed]) -> dict[str, Any]:
    buckets = bench.model.spec.inputs.report_buckets
    shares, chances = [], []
    for one in seen:
        true = _tokens_of(one)
        named = set(name_tokens(bench, one.gradient, count=len(true)))
        shares.append(len(true & named) / len(true))
        chances.append(len(true) / (buckets - 1))
    return {"what": "tokens recovered", **_mean(shares), "baseline": float(np.mean(chances))}


def _tokens_of(one: Observed) -> set[int]:
    """The different ones of the report; a report of punctuation alone has none."""
    return set(one.study.inputs["report"].flatten().tolist()) - {0}


def name_tokens(bench: Workbench, gradient: Mapping[str, Tensor], *, count: int) -> list[int]:
    """The `count` tokens whose weights moved furthest. count: how many different ones the report has; let it be known."""
    table = table_of(bench)
    if table is None:
        return []
    name, axis = table
    length_V = gradient[name].double().transpose(0, axis).flatten(1).norm(dim=1)
    length_V[0] = -1.0  # padding is no token
    return [int(token) for token in length_V.topk(min(count, len(length_V) - 1)).indices]


# --- images -------------------------------------------------------------------------------------------------------------


def reconstruct(bench: Workbench, one: Observed, objective: Objective, *, steps: int) -> Tensor:
    """(H, W) pixels whose gradient points where the observed one does; mean 0 and variance 1. bench: has the start weights."""
    model = bench.model.eval()
    own = {name: weight for name, weight in model.trained().items() if name.startswith("encoders.image.")}
    wanted = torch.cat([one.gradient[name].flatten() for name in own])
    shape = one.study.inputs["image"].shape
    begin = torch.from_numpy(stream(SEED, "inversion start").standard_normal(tuple(shape)).astype(np.float32))
    image = begin.requires_grad_()
    adam = torch.optim.Adam([image], lr=PIXEL_RATE)
    falls = torch.optim.lr_scheduler.MultiStepLR(adam, [round(share * steps) for share in FALLS])
    with torch.no_grad():
        encoded = model.encode(one.study.inputs, one.study.seen_BM)  # once: of the rest everything is known
    for _ in range(steps):
        encoded["image"] = model.encoders["image"](image)
        loss = objective(model.fuse(encoded, one.study.seen_BM, one.study.timeline), one.study).sum()
        made = torch.autograd.grad(loss, list(own.values()), create_graph=True)
        apart = 1 - nn.functional.cosine_similarity(torch.cat([g.flatten() for g in made]), wanted, dim=0)
        (slope,) = torch.autograd.grad(apart + SMOOTH * roughness(image), image)
        image.grad = slope.sign()
        adam.step()
        falls.step()
    return standardised(image.detach()[0, 0])


def roughness(image_B1HW: Tensor) -> Tensor:
    """Total variation: mean difference between neighbours."""
    return image_B1HW.diff(dim=2).abs().mean() + image_B1HW.diff(dim=3).abs().mean()


def standardised(image_HW: Tensor) -> Tensor:
    """Mean 0 and variance 1; what is flat or not finite is 0."""
    image_HW = image_HW.nan_to_num()
    spread = image_HW.std(correction=0)
    return (image_HW - image_HW.mean()) / spread if float(spread) > 1e-6 else torch.zeros_like(image_HW)


def _images(made: Sequence[Tensor], true: Sequence[Tensor]) -> list[dict[str, Any]]:
    found = []
    for what, like in (("image ssim", ssim), ("image psnr", psnr)):
        own = [like(a, b) for a, b in zip(made, true, strict=True)]
        others = [like(a, b) for i, a in enumerate(made) for j, b in enumerate(true) if i != j]
        found.append({"what": what, **_mean(own), "baseline": float(np.mean(others)) if others else None})
    return found


def ssim(made_HW: Tensor, true_HW: Tensor) -> float:
    """1 for the same image. Range of values: that of the true one. Source: Wang et al. 2004, windows within the image alone."""
    place = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    row = torch.exp(-(place**2) / (2 * SIGMA**2))
    window = (row[:, None] * row[None, :] / row.sum() ** 2)[None, None]
    a, b = made_HW.double()[None, None], true_HW.double()[None, None]

    def mean(value: Tensor) -> Tensor:
        return nn.functional.conv2d(value, window)

    span = float(b.max() - b.min()) or 1.0
    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, both = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def psnr(made_HW: Tensor, true_HW: Tensor) -> float:
    """dB, of the true image's range; at most 100."""
    error = float(((made_HW.double() - true_HW.double()) ** 2).mean())
    span = float(true_HW.max() - true_HW.min()) or 1.0
    return float(10 * np.log10(span**2 / max(error, span**2 * 1e-10)))


def _mean(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean over patients with Student's 95 % interval; of one patient there is none."""
    value_N: Floats = np.asarray(values, dtype=np.float64)
    middle, count = float(value_N.mean()), len(value_N)
    if count < 2:
        return {"patients": count, "value": middle, "low": None, "high": None}
    half = float(student.ppf((1 + LEVEL) / 2, count - 1) * value_N.std(ddof=1) / np.sqrt(count))
    return {"patients": count, "value": middle, "low": middle - half, "high": middle + half}
