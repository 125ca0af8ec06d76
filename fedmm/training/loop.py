"""Local training and prediction: the same code on CPU and CUDA, with and without privacy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedmm.config import ModelConfig, TrainingConfig
from fedmm.data.dataset import blank
from fedmm.data.kept import FixedPart
from fedmm.errors import ConfigError, PlanInvalid
from fedmm.models.encoder import FixedEncoder
from fedmm.models.fusion import fusions
from fedmm.models.heads import Objective, answer, probabilities
from fedmm.models.multimodal import ModelSpec, MultimodalModel
from fedmm.privacy.engine import PrivateEngine, PrivateModel, wrap
from fedmm.privacy.noise import Noise
from fedmm.privacy.plan import PrivacyPlan
from fedmm.privacy.rehearsal import rehearse
from fedmm.schema import MODALITIES, MODALITY, SUBSETS, Batch
from fedmm.training.augment import vary
from fedmm.training.local import Still, clip_groups, pull, see_only, unchanged
from fedmm.training.memory import in_parts, keep_pages
from fedmm.training.metrics import WHOLE, Predictions
from fedmm.training.watch import Check, nothing

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

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        *,
        clipping: str = "hooks",
        still: Still = (),
        objective: Objective | None = None,
    ) -> None:
        """still: what is not trained, found neither by hooks nor by the optimiser: no gradient, no noise.

        objective: the only one that private training may lower here, because it is the one that is rehearsed; None: the
        default one.
        """
        keep_pages()
        self.device, self.clipping = device, clipping
        self.objective = objective or Objective(spec.labels)
        self.model = MultimodalModel(spec).to(device)
        self._weights = self.model.trained()  # what travels, whether it is trained here or not
        for name in unchanged(self._weights, still):
            self._weights[name].requires_grad = False
        self._private: PrivateModel | None = None
        self._around: nn.Module | None = None
        self._rehearse()

    @property
    def private_model(self) -> PrivateModel:
        """The model with what clips it, attached and rehearsed at the first use. Raises: PlanInvalid."""
        if self._private is None:
            private = wrap(self.model, self.clipping)
            one, other = (made_up(self.model.spec, REHEARSAL, seed).to(self.device) for seed in (1, 2))
            rehearse(private, self.objective, one, other, groups=clip_groups(self.model, "modality"))
            self._private = private
        return self._private

    def to_train(self, plan: PrivacyPlan) -> nn.Module:
        """The private model, or the plain one where the plan is not private."""
        if not plan.private:
            return self.model
        return self.private_model if self._around is None else self._around

    def around_private(self, make: Callable[[PrivateModel], nn.Module]) -> None:
        """What an audit puts around the private model, in the place of what an earlier one put there."""
        self._around = make(self.private_model)

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

    def fixed_parts(self) -> dict[str, FixedPart]:
        """By modality, what `load_hospital` may keep in the files' place."""
        made = self.model.fixed_parts().items()
        return {name: FixedPart(encoder.identity(), partial(self._features, encoder)) for name, encoder in made}

    def _features(self, encoder: FixedEncoder, value: Tensor) -> Tensor:
        """Each study alone: how a product is rounded depends on the batch's shape, and no patient's numbers may depend on who
        else is here."""
        with torch.no_grad():
            rows = [encoder.features(row.to(self.device)).cpu() for row in torch.split(value, 1)]
            return torch.cat(rows) if rows else encoder.features(value.to(self.device)).cpu()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Raises: ValueError if they are not this model's."""
        if {n: v.shape for n, v in weights.items()} != {n: v.shape for n, v in self._weights.items()}:
            raise ValueError("the weights are not those of this model")
        with torch.no_grad():
            for name, value in weights.items():
                self._weights[name].copy_(value)

    def trained(self) -> Mapping[str, Tensor]:
        """What travels, by name: the model's own, not a copy."""
        return self._weights

    def weights(self) -> dict[str, Tensor]:
        """What travels, what is trained here and what is not: a copy on the CPU, contiguous."""
        return {name: value.detach().cpu().clone().contiguous() for name, value in self._weights.items()}


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
    part_BK = rng.choice(np.array([0, 0.4, 1, np.nan], dtype=np.float32), (count, len(labels.further)))
    most = {labels.ordinal_name: len(labels.ordinal_levels) - 1, labels.value_name: labels.value_range[1]}
    most |= {labels.time_name: max(labels.time_edges, default=0), labels.event_name: 1}
    most_K = np.array([most[name] for name in labels.further], dtype=np.float32)
    return Batch(
        inputs=values,
        seen_BM=torch.from_numpy(rng.random((count, len(MODALITIES))) < 0.7),
        finding_BF=torch.from_numpy(finding_BF),
        class_B=torch.from_numpy(rng.integers(-1, max(len(labels.class_values), 1), count)),
        patient_B=torch.repeat_interleave(torch.arange(len(studies_P)), torch.tensor(studies_P)),
        patients=len(studies_P),
        further_BK=torch.from_numpy(part_BK * most_K),
        day_B=torch.from_numpy(rng.choice(np.array([0, 30, np.nan], np.float32), count)),
        key_B=torch.repeat_interleave(torch.arange(len(studies_P)), torch.tensor(studies_P)),
    )


def workbench(
    spec: ModelSpec,
    device: str,
    private: bool,  # noqa: FBT001
    *,
    clipping: str = "hooks",
    still: Still = (),
    objective: Objective | None = None,
) -> Workbench:
    """This process' workbench for a model. Plain and private ones are separate: hooks would slow the plain one.

    clipping: as in `wrap`; objective: as in Workbench; both of no effect on a plain one.  still: as in Workbench.
    """
    return _workbench(spec, device, private, clipping if private else "hooks", still, objective if private else None)


@lru_cache(maxsize=4)
def _workbench(
    spec: ModelSpec,
    device: str,
    private: bool,  # noqa: FBT001  (a cache key)
    clipping: str,
    still: Still,
    objective: Objective | None,
) -> Workbench:
    bench = Workbench(spec, torch.device(device), clipping=clipping, still=still, objective=objective)
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


def train(
    bench: Workbench,
    cohort: Cohort,
    plan: PrivacyPlan,
    *,
    config: TrainingConfig,
    noise: Noise,
    correction: Mapping[str, Tensor] | None = None,
    modalities: Sequence[str] = MODALITIES,
    progress: Callable[[int, int], None] | None = None,
    check: Check = nothing,
) -> None:
    """`plan.steps_per_round` steps of DP-SGD on Poisson samples of patients, or plain SGD where the plan is not private.

    Of unit "record", each study is sampled and clipped alone, at most `plan.max_studies` of a patient in a round.
    Changes the bench's weights in place. The number of steps does not depend on the data: an empty sample is a step too.

    correction: added to each gradient after its noise, by name of the weight.  modalities: all that studies may have.
    progress: called with steps done and steps in all.  check: called between batches; what it raises ends the training,
    and the bench must not be used any more.
    """
    check_unit(bench.model.spec.model, plan.unit)
    objective = Objective.from_config(config, bench.model.spec.labels)
    if plan.private and objective != bench.objective:
        raise PlanInvalid("another loss than the rehearsed one", fix="make the workbench with the run's objective")
    model = bench.to_train(plan)
    model.train()
    optimizer = _optimizer(bench.model, config)
    pulled = pull(optimizer, bench.model, proximal=config.proximal, correction=correction)
    engine = None
    if plan.private:
        groups = clip_groups(bench.model, config.clip_groups)
        size, rule = config.batch_size, config.clip_rule
        engine = PrivateEngine(model, optimizer, plan=plan, batch_size=size, noise=noise, clip_rule=rule, groups=groups)
    limit = max(1, config.physical_studies // config.augment_copies)
    rng = noise.generator()
    if plan.unit == "record":
        cohort = cohort.records(plan.max_studies, rng)
    for step in range(plan.steps_per_round):
        patients = noise.sample(cohort.patients, plan.sampling_rate)
        batches = cohort.physical(patients, limit=limit, max_studies=plan.max_studies, rng=rng)
        ready = partial(_ready, bench, modalities=modalities, config=config, seed=int(rng.integers(2**63)))
        optimizer.zero_grad()
        for batch in batches:
            check()
            if engine is not None:
                _accumulate(engine, batch, ready, objective=objective, alone=limit == 1)
            else:
                _add_plain(bench.model, batch, ready, objective=objective, patients=len(patients))
        check()
        if engine is not None:
            engine.step()
        elif patients or pulled:  # pulled: a step without patients is a step too
            nn.utils.clip_grad_norm_(bench.model.parameters(), PLAIN_MAX_NORM)
            optimizer.step()
        if progress is not None:
            progress(step + 1, plan.steps_per_round)
    model.eval()


def check_unit(model: ModelConfig, unit: str) -> None:
    """Raises: PlanInvalid if units would look at one another: a fusion over time joins studies, each its own unit."""
    if unit == "record" and fusions.get(model.fusion).over_time:
        raise PlanInvalid(
            f"model.fusion = {model.fusion} does not go with privacy.unit = record",
            why="it looks at other studies of the patient, and then one record changes what another contributes",
            fix="privacy.unit = patient, or a fusion that looks at one study",
        )


def _ready(bench: Workbench, batch: Batch, *, modalities: Sequence[str], config: TrainingConfig, seed: int) -> Batch:
    """The batch as the model gets it: declared modalities, varied by chance, on its device."""
    return vary(see_only(batch, modalities), config=config, seed=seed, spec=bench.model.spec.inputs).to(bench.device)


def _accumulate(
    engine: PrivateEngine, batch: Batch, ready: Callable[[Batch], Batch], *, objective: Objective, alone: bool
) -> None:
    """alone: the batch is one patient's. Then what fails on it, `ready` or the pass, costs this patient's share, at most C,
    and nobody else's; in a batch of several the failure would hang on all of them. Raises: PlanInvalid, what torch raises."""
    try:
        in_parts(batch, lambda part: engine.accumulate(ready(part), objective), engine.savepoint)
    except PlanInvalid:
        raise
    except Exception:
        if not alone:
            raise
        engine.leave_out()


def _add_plain(
    model: nn.Module, batch: Batch, ready: Callable[[Batch], Batch], *, objective: Objective, patients: int
) -> None:
    """The batch's part of the gradient of the mean over the sampled patients of the mean over each one's studies."""

    def add(part: Batch) -> None:
        part = ready(part)
        if part.studies:
            studies_P = torch.bincount(part.patient_B, minlength=part.patients).float()
            loss_B = objective(model(part.inputs, part.seen_BM, part.timeline), part)
            torch.autograd.backward((loss_B / studies_P[part.patient_B]).sum() / patients)

    def keep() -> Callable[[], None]:
        before = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters()]

        def undo() -> None:
            for parameter, gradient in before:
                parameter.grad = gradient

        return undo

    in_parts(batch, add, keep)


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate)


def predict(
    bench: Workbench,
    cohort: Cohort,
    *,
    isolate: bool = False,
    modalities: Sequence[str] = MODALITIES,
    limit: int = PREDICT_STUDIES,
    check: Check = nothing,
) -> Predictions:
    """Probabilities for each study of the cohort: as it is, and given only what it has of each subset of the modalities.

    isolate: each patient in a batch of its own, and only as it is: for a release, where no patient's numbers may depend
    on who else is there, not even in the last bit (rounding follows the shape of the batch).
    modalities: all that studies may have.  limit: studies in memory at once.  check: as in `train`.
    """
    labels, views = bench.model.spec.labels, [WHOLE] if isolate else list(SUBSETS)
    parts: dict[str, list[Tensor]] = {}
    limit = 1 if isolate else limit
    batches = [see_only(batch, modalities) for batch in cohort.physical(range(cohort.patients), limit=limit)]
    for batch in batches:
        check()
        for made in in_parts(batch, partial(_probabilities, bench, views=views), lambda: nothing):
            for name, probability_BO in made.items():
                parts.setdefault(name, []).append(probability_BO)
    outputs = len(labels.outputs)
    joined = {name: torch.cat(values).numpy() for name, values in parts.items()}
    empty = np.zeros((0, outputs))
    first = np.cumsum([0, *(b.patients for b in batches)])
    return Predictions(
        probability_BO=joined.get(WHOLE, empty),
        finding_BF=np.concatenate(
            [b.finding_BF.double().numpy() for b in batches] or [empty[:, : len(labels.findings)]]
        ),
        class_B=np.concatenate([b.class_B.numpy() for b in batches] or [np.zeros(0, dtype=np.int64)]),
        further_BK=np.concatenate(
            [b.further_BK.double().numpy() for b in batches] or [np.zeros((0, len(labels.further)))]
        ),
        seen_BM=np.concatenate([b.seen_BM.numpy() for b in batches] or [np.zeros((0, len(MODALITIES)), dtype=bool)]),
        subset={} if isolate else {name: joined.get(name, empty) for name in SUBSETS},
        patient_B=np.concatenate(
            [b.patient_B.numpy() + shift for b, shift in zip(batches, first, strict=False)]
            or [np.zeros(0, dtype=np.int64)]
        ),
        patients=cohort.patients,
    )


def _probabilities(bench: Workbench, batch: Batch, *, views: Iterable[str]) -> dict[str, Tensor]:
    """By name of a view, (studies, outputs)."""
    model, labels, batch = bench.model.eval(), bench.model.spec.labels, batch.to(bench.device)
    with torch.no_grad():
        made = model.encode(batch.inputs, batch.seen_BM)  # once for all subsets: nearly all of the work
        fused = {n: model.fuse(made, mask, batch.timeline) for n, mask in _views(batch.seen_BM, views).items()}
        return {name: probabilities(output, labels).double().cpu() for name, output in fused.items()}


def _views(seen_BM: Tensor, subsets: Iterable[str]) -> dict[str, Tensor]:
    """By name in SUBSETS, what is seen if nothing else is given."""
    kept = {name: torch.tensor([m in SUBSETS[name] for m in MODALITIES], device=seen_BM.device) for name in subsets}
    return {name: seen_BM & kept_M for name, kept_M in kept.items()}


def all_finite(weights: Mapping[str, Tensor]) -> bool:
    """Whether every weight is a finite number."""
    return all(math.isfinite(float(value.double().sum())) for value in weights.values())
