"""Local training and prediction: the same code on CPU and CUDA, with and without privacy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedmm.config import TrainingConfig
from fedmm.data.dataset import blank
from fedmm.errors import ConfigError, PlanInvalid
from fedmm.models.heads import answer, probabilities, study_loss
from fedmm.models.multimodal import ModelSpec, MultimodalModel
from fedmm.privacy.engine import PrivateEngine, PrivateModel, wrap
from fedmm.privacy.noise import Noise
from fedmm.privacy.plan import PrivacyPlan
from fedmm.privacy.rehearsal import rehearse
from fedmm.schema import MODALITIES, MODALITY, Batch
from fedmm.training.metrics import Predictions

# B studies, M modalities

PLAIN_MAX_NORM = 1.0  # without privacy: longest gradient of a batch, for stability with momentum
PREDICT_STUDIES = 256  # studies in memory at once when nothing is trained
REHEARSAL = (1, 2, 1)  # studies of the made-up patients


class Cohort(Protocol):
    """Patients of one split, as fedmm.data serves them."""

    @property
    def patients(self) -> int: ...

    def physical(
        self,
        patients: Sequence[int],
        *,
        limit: int,
        max_studies: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Iterator[Batch]: ...

    def records(self, most: int, rng: np.random.Generator) -> Cohort: ...


class Workbench:
    """One live model of a process: weights are loaded into it, it is never built or wrapped again.

    (Re-wrapping with Opacus for each hospital and round cost 10 GB in ../shared/performance.md.)
    """

    def __init__(self, spec: ModelSpec, device: torch.device, *, clipping: str = "hooks") -> None:
        self.device, self.clipping = device, clipping
        self.model = MultimodalModel(spec).to(device)
        self._private: PrivateModel | None = None
        self._rehearse()

    @property
    def private_model(self) -> PrivateModel:
        """The model with what clips it, attached and rehearsed at the first use. Raises: PlanInvalid."""
        if self._private is None:
            private = wrap(self.model, self.clipping)
            one, other = (made_up(self.model.spec, REHEARSAL, seed).to(self.device) for seed in (1, 2))
            rehearse(private, study_loss, one, other)
            self._private = private
        return self._private

    def _rehearse(self) -> None:
        """One forward and backward pass on one blank study: a model that cannot run must fail before anybody is charged,
        whoever the patients are. Before the hooks are attached. Raises: what torch raises."""
        inputs = blank(1, self.model.spec.inputs)
        seen_BM = torch.ones(1, len(MODALITIES), dtype=torch.bool)
        self.model.eval()
        output = self.model({n: v.to(self.device) for n, v in inputs.items()}, seen_BM.to(self.device))
        torch.autograd.backward(answer(output).sum())
        self.model.zero_grad(set_to_none=True)
        self.model.train()  # as built: Opacus' validator wants it so

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Raises: ValueError if they are not this model's."""
        self.model.load_trained(weights)

    def weights(self) -> dict[str, Tensor]:
        """What is trained: a copy on the CPU, contiguous."""
        return {name: value.detach().cpu().clone().contiguous() for name, value in self.model.trained().items()}


def made_up(spec: ModelSpec, studies_P: Sequence[int], seed: int) -> Batch:
    """Random studies that no patient has, studies_P[i] of patient i: modalities and labels are there and missing."""
    rng = np.random.default_rng(seed)
    count, labels, inputs = sum(studies_P), spec.labels, spec.inputs
    values = {
        n: torch.from_numpy(
            rng.integers(0, inputs.report_buckets, (count, *s))
            if MODALITY[n].whole
            else rng.standard_normal((count, *s)).astype(np.float32)
        )
        for n, s in inputs.shapes.items()
    }
    finding_BF = rng.choice(np.array([0, 1, np.nan], dtype=np.float32), (count, len(labels.findings)))
    return Batch(
        inputs=values,
        seen_BM=torch.from_numpy(rng.random((count, len(MODALITIES))) < 0.7),
        finding_BF=torch.from_numpy(finding_BF),
        class_B=torch.from_numpy(rng.integers(-1, max(len(labels.class_values), 1), count)),
        patient_B=torch.repeat_interleave(torch.arange(len(studies_P)), torch.tensor(studies_P)),
        patients=len(studies_P),
        further_BK=torch.from_numpy(rng.choice(np.array([0, 1, np.nan], np.float32), (count, len(labels.further)))),
        day_B=torch.from_numpy(rng.choice(np.array([0, 30, np.nan], np.float32), count)),
    )


def workbench(spec: ModelSpec, device: str, private: bool, *, clipping: str = "hooks") -> Workbench:  # noqa: FBT001
    """This process' workbench for a model. Plain and private ones are separate: hooks would slow the plain one.

    clipping: as in `wrap`; of no effect on a plain one.
    """
    return _workbench(spec, device, private, clipping if private else "hooks")


@lru_cache(maxsize=4)
def _workbench(spec: ModelSpec, device: str, private: bool, clipping: str) -> Workbench:  # noqa: FBT001  (a cache key)
    bench = Workbench(spec, torch.device(device), clipping=clipping)
    if private:
        bench.private_model  # noqa: B018  (wrapped now, so that a model that cannot be private fails before any charge)
    return bench


def forget_workbenches() -> None:
    """After a failed step: Opacus' hooks keep activations of a forward pass that no backward pass took away."""
    _workbench.cache_clear()


class Nobody:
    """A cohort without patients: training on it releases noise alone."""

    patients = 0

    def physical(
        self,
        patients: Sequence[int],
        *,
        limit: int,
        max_studies: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Iterator[Batch]:
        return iter(())

    def records(self, most: int, rng: np.random.Generator) -> Cohort:
        return self


def choose_device(wanted: str) -> str:
    """auto: CUDA when there is one. Raises: ConfigError for a device that is not there."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"training.device = {wanted!r} is no device", fix="auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"training.device = {wanted!r} is not supported", fix="auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"training.device = {wanted!r}, but this machine has no such GPU", fix="use auto or cpu")
    return wanted


def train(bench: Workbench, cohort: Cohort, plan: PrivacyPlan, *, config: TrainingConfig, noise: Noise) -> None:
    """`plan.steps_per_round` steps of DP-SGD on Poisson samples of patients, or plain SGD where the plan is not private.

    Of unit "record", each study is sampled and clipped alone, at most `plan.max_studies` of a patient in a round.
    Changes the bench's weights in place. The number of steps does not depend on the data: an empty sample is a step too.
    """
    model = bench.private_model if plan.private else bench.model
    model.train()
    optimizer = _optimizer(bench.model, config)
    engine = None
    if plan.private:
        engine = PrivateEngine(model, optimizer, plan=plan, batch_size=config.batch_size, noise=noise)
    rng = noise.generator()
    if plan.unit == "record":
        cohort = cohort.records(plan.max_studies, rng)
    for _ in range(plan.steps_per_round):
        patients = noise.sample(cohort.patients, plan.sampling_rate)
        batches = cohort.physical(patients, limit=config.physical_studies, max_studies=plan.max_studies, rng=rng)
        batches = (hide_modalities(batch, config.modality_dropout, rng).to(bench.device) for batch in batches)
        if engine is not None:
            for batch in batches:
                _accumulate(engine, batch, alone=config.physical_studies == 1)
            engine.step()
        else:
            _plain_step(bench.model, optimizer, batches, patients=len(patients))
    model.eval()


def _accumulate(engine: PrivateEngine, batch: Batch, *, alone: bool) -> None:
    """alone: the batch is one patient's. Then a pass that fails on it costs this patient's share, at most C, and nobody
    else's; in a batch of several the failure would hang on all of them. Raises: PlanInvalid, and what torch raises."""
    try:
        engine.accumulate(batch, study_loss)
    except PlanInvalid:
        raise
    except Exception:
        if not alone:
            raise
        engine.leave_out()


def _plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], *, patients: int) -> None:
    """Mean over the sampled patients of the mean over each one's studies; the batch's gradient is kept within 1."""
    optimizer.zero_grad()
    for batch in batches:
        if batch.studies:
            studies_P = torch.bincount(batch.patient_B, minlength=batch.patients).float()
            loss_B = study_loss(model(batch.inputs, batch.seen_BM), batch)
            torch.autograd.backward((loss_B / studies_P[batch.patient_B]).sum() / patients)
    if patients:
        nn.utils.clip_grad_norm_(model.parameters(), PLAIN_MAX_NORM)
        optimizer.step()


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate)


def hide_modalities(batch: Batch, probability: float, rng: np.random.Generator) -> Batch:
    """Modality dropout: each present modality of each study is hidden with `probability`, never the last one left."""
    if probability == 0 or batch.studies == 0:
        return batch
    seen_BM = batch.seen_BM.numpy()
    kept_BM = seen_BM & (rng.random(seen_BM.shape) >= probability)
    kept_BM[~kept_BM.any(1)] = seen_BM[~kept_BM.any(1)]
    return replace(batch, seen_BM=torch.from_numpy(kept_BM))


def predict(bench: Workbench, cohort: Cohort, *, isolate: bool = False) -> Predictions:
    """Probabilities for each study of the cohort: as it is, with each modality alone, and with each one removed.

    isolate: each patient in a batch of its own, and only as it is: for a release, where no patient's numbers may depend
    on who else is there, not even in the last bit (rounding follows the shape of the batch).
    """
    model, labels = bench.model.eval(), bench.model.spec.labels
    parts: dict[str, list[Tensor]] = {}
    batches = list(cohort.physical(range(cohort.patients), limit=1 if isolate else PREDICT_STUDIES))
    with torch.no_grad():
        for batch in batches:
            batch = batch.to(bench.device)
            views = {"all": batch.seen_BM} if isolate else _views(batch.seen_BM)
            for name, mask in views.items():
                parts.setdefault(name, []).append(probabilities(model(batch.inputs, mask), labels).double().cpu())
    outputs = len(labels.outputs)
    joined = {name: torch.cat(values).numpy() for name, values in parts.items()}
    empty = np.zeros((0, outputs))
    first = np.cumsum([0, *(b.patients for b in batches)])
    return Predictions(
        probability_BO=joined.get("all", empty),
        finding_BF=np.concatenate(
            [b.finding_BF.double().numpy() for b in batches] or [empty[:, : len(labels.findings)]]
        ),
        class_B=np.concatenate([b.class_B.numpy() for b in batches] or [np.zeros(0, dtype=np.int64)]),
        seen_BM=np.concatenate([b.seen_BM.numpy() for b in batches] or [np.zeros((0, len(MODALITIES)), dtype=bool)]),
        alone={name: joined.get(f"only {name}", empty) for name in MODALITIES},
        without={name: joined.get(f"without {name}", empty) for name in MODALITIES},
        patient_B=np.concatenate(
            [b.patient_B.numpy() + shift for b, shift in zip(batches, first, strict=False)]
            or [np.zeros(0, dtype=np.int64)]
        ),
        patients=cohort.patients,
    )


def _views(seen_BM: Tensor) -> dict[str, Tensor]:
    views = {"all": seen_BM}
    for m, name in enumerate(MODALITIES):
        mask = torch.zeros_like(seen_BM)
        mask[:, m] = True
        views[f"only {name}"] = seen_BM & mask
        views[f"without {name}"] = seen_BM & ~mask
    return views


def all_finite(weights: Mapping[str, Tensor]) -> bool:
    """Whether every weight is a finite number."""
    return all(math.isfinite(float(value.double().sum())) for value in weights.values())
