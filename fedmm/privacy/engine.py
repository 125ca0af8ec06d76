"""The one door to Opacus: per-study gradients, grouped to patients, clipped once, summed, noised.

    for batch in physical batches of one Poisson sample:  engine.accumulate(batch, loss)   # sensitivity C per patient
    engine.step()                                                                          # noise, public divisor, update

The guarantee of one `step`: for the sum over the sample, adding or removing all studies of one patient changes it by at
most C = max_grad_norm in L2 norm, and Gaussian noise of standard deviation noise_multiplier x C is added to it.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from opacus import GradSampleModule
from opacus.layers import DPMultiheadAttention
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmm.errors import PlanInvalid
from fedmm.privacy.clip import Clip
from fedmm.privacy.ghost import TapedModel, add_to
from fedmm.privacy.noise import Noise, with_noise
from fedmm.privacy.parts import Groups
from fedmm.privacy.plan import PrivacyPlan
from fedmm.schema import Batch

# S studies, P patients

CLIPPING = ("hooks", "ghost")


class HookedModel(GradSampleModule):  # type: ignore[misc]  # Opacus ships no types
    """Opacus' hooks: a gradient for each study in `grad_sample` of each weight. Loud or right where Opacus is silent."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, loss_reduction="sum", strict=True)

    def rearrange_grad_samples(self, **given: Any) -> tuple[list[Tensor], Tensor]:
        """Contiguous: Opacus' convolutions read a permuted or channels_last tensor in the wrong order, silently."""
        activations, backprops = super().rearrange_grad_samples(**given)
        return [value.contiguous() for value in activations], backprops.contiguous()

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """The model alone."""
        self.disable_hooks()
        try:
            with quiet_hooks():
                yield
        finally:
            self.enable_hooks()

    def clipper(self, parameters: Sequence[nn.Parameter], clip: Clip) -> Clipper:
        return HooksClipper(self, parameters, clip)

    def forget(self) -> None:
        """What a forward pass left behind that no backward pass took away: the next one would read it."""
        for module in self._module.modules():
            for name in ("activations", "max_batch_len"):
                module.__dict__.pop(name, None)
        for parameter in self._module.parameters():
            parameter.__dict__.pop("_current_grad_sample", None)
            parameter.grad_sample, parameter._forward_counter = None, 0


PrivateModel: TypeAlias = HookedModel | TapedModel


def wrap(model: nn.Module, clipping: str = "hooks") -> PrivateModel:
    """Attach what bounds a patient's gradient. Wrap once per process and load weights into it: re-wrapping leaks memory.

    clipping: one of CLIPPING.
    Raises: PlanInvalid for a layer that mixes patients (BatchNorm), whose gradients Opacus is known to get wrong or that
    nobody knows how to bound, and for a model that is wrapped already.
    """
    if clipping not in CLIPPING:
        raise PlanInvalid("this way of clipping is unknown", fix=f"use one of {', '.join(CLIPPING)}")
    problems = [str(problem).split("\n")[0] for problem in ModuleValidator.validate(model, strict=False)]
    problems += [found for name, module in model.named_modules() if (found := _problem(name, module))]
    if problems:
        raise PlanInvalid(
            "the model has a layer whose gradient cannot be bounded for one patient",
            why="; ".join(problems),
            fix="use GroupNorm or LayerNorm, and layers that Opacus supports",
        )
    if clipping == "ghost":
        return TapedModel(model, GradSampleModule.GRAD_SAMPLERS)
    return HookedModel(model)


def _problem(name: str, module: nn.Module) -> str:
    """Why this layer alone is refused; empty when it is not."""
    if mixes(module):
        return f"{name} takes statistics of the batch, frozen or not"
    if isinstance(module, DPMultiheadAttention) and not (module.batch_first and module.num_heads == 1):
        return f"{name}: use Linear layers and scaled_dot_product_attention; Opacus' attention mixes studies or heads"
    taped = any(isinstance(getattr(hook, "__self__", None), TapedModel) for hook in module._forward_hooks.values())
    if taped or hasattr(module, "autograd_grad_sample_hooks") or isinstance(module, HookedModel | TapedModel):
        return f"{name or 'the model'} is wrapped already"
    trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    if trained and type(module) not in GradSampleModule.GRAD_SAMPLERS:
        return f"{name or 'the model'} ({type(module).__name__}) has weights of its own; a learnt token is an Embedding(1, d)"
    return ""


def mixes(module: nn.Module) -> bool:
    """Does this layer, as it stands, let one study change what another gives?"""
    return isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats)


class Clipper(Protocol):
    """Adds the patients' clipped gradients to `summed_grad` of each weight."""

    def logits(self, batch: Batch) -> Any:
        """What the model gives, for the loss to read: logits, or whatever this model has around them."""
        ...

    def add(self, loss: Tensor, batch: Batch, max_norm: float) -> int:
        """loss: sum over patients of the mean over each one's studies.

        Guarantee: each patient adds at most max_norm in L2 norm, whatever rule and groups (`Clip`). One whose gradient is
        not finite or longer than LARGEST_NORM adds nothing: max_norm over it must stay a normal float32 (with crafted
        weights and a tiny C the factor was a denormal, was rounded up, and the sensitivity was 1.98 C, measured).
        Returns the number of those.
        """
        ...

    def clear(self) -> None:
        """Forget what an interrupted step left behind."""
        ...


class HooksClipper:
    """A gradient for each study in memory, by Opacus' hooks; grouped to patients, clipped, added."""

    def __init__(self, model: HookedModel, parameters: Sequence[nn.Parameter], clip: Clip) -> None:
        self.model, self.parameters, self.clip = model, parameters, clip

    def logits(self, batch: Batch) -> Any:
        return self.model(batch.inputs, batch.seen_BM, batch.timeline)

    def add(self, loss: Tensor, batch: Batch, max_norm: float) -> int:
        with quiet_hooks():
            torch.autograd.backward(loss)
        groups = Groups(batch.patient_B, batch.patients)
        per_patient = [groups.sums(self._of_studies(p, batch.studies)) for p in self.parameters]
        norms = [g.flatten(1).double().norm(dim=1) for g in per_patient]
        shares = self.clip.sorted(zip(self.parameters, norms, strict=True), batch.patients)
        factor_GP, zeroed = self.clip.factors(torch.stack([own.norm(dim=0) for own in shares]), max_norm)
        for parameter, gradient in zip(self.parameters, per_patient, strict=True):
            factor_P = factor_GP[self.clip.share_of(parameter)]
            rows = torch.where(factor_P.view(-1, *[1] * (gradient.dim() - 1)) > 0, gradient, 0.0)
            add_to(parameter, torch.einsum("p,p...->...", factor_P.to(rows.dtype), rows))
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]
        return zeroed

    def _of_studies(self, parameter: nn.Parameter, studies: int) -> Tensor:
        """(S, ...) Raises: PlanInvalid if there is not one gradient for each study."""
        gradient = parameter.grad_sample  # type: ignore[attr-defined]
        if not isinstance(gradient, Tensor) or len(gradient) != studies:
            raise PlanInvalid(
                "a layer does not give one gradient for each study",
                why="rows that are left out or added cannot be assigned to their patients",
                fix="run every encoder on every row, and replace the absent ones after it",
            )
        return gradient

    def clear(self) -> None:
        self.model.forget()


class PatientOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser with noise of `Noise`, and a divisor that is public. Clipping is the clipper's.

    batch_size: public expected patients per step. Never the number that was sampled, never the private N.
    total_W: sum of the clipped gradients of all W trained weights; each parameter's `summed_grad` is its part of it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, plan: PrivacyPlan, *, batch_size: int, noise: Noise) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=batch_size,
        )
        self.noise = noise
        self.total_W = torch.cat([torch.zeros_like(parameter).flatten() for parameter in self.params])
        self.noisy_W = self.total_W
        self.zeroed = 0  # patients whose gradient was not finite; stays at the hospital

    def add_noise(self) -> None:
        """p.grad = clipped sum + N(0, (noise_multiplier x C)^2), on a grid. Raises: PlanInvalid rather than add none."""
        std = self.noise_multiplier * self.max_grad_norm
        if not sys.float_info.min < std < math.inf:
            raise PlanInvalid("the noise of this plan is not a positive number")
        self.noisy_W = with_noise(self.total_W, self.noise, std)
        for parameter, grad in zip(self.params, self._cut(self.noisy_W), strict=True):
            parameter.grad = grad

    def scale_grad(self) -> None:
        self.noisy_W /= self.expected_batch_size

    def clear(self) -> None:
        """An empty Poisson sample is a step with noise only, so the sum starts at zero."""
        self.total_W.zero_()
        for parameter, total in zip(self.params, self._cut(self.total_W), strict=True):
            parameter.grad, parameter.summed_grad = None, total

    def _cut(self, value_W: Tensor) -> Iterator[Tensor]:
        """A view for each parameter."""
        parts = torch.split(value_W, [parameter.numel() for parameter in self.params])
        return (part.view(parameter.shape) for part, parameter in zip(parts, self.params, strict=True))


class PrivateEngine:
    """Clip, sum, noise and step for one local training. Make a fresh one for each round.

    model: from `wrap`.  optimizer: over its parameters.  plan: of one round (`PrivacyPlan.of_round`).
    batch_size: public divisor.  clip_rule, groups: as in `Clip`; the bound C of a patient is the same for all of them.
    Raises: PlanInvalid if the plan is not private or its numbers are impossible, or its noise depends on a round that is
    not said: the noise added must be the noise charged.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        plan: PrivacyPlan,
        batch_size: int,
        noise: Noise,
        clip_rule: str = "flat",
        groups: Sequence[Iterable[nn.Parameter]] = (),
    ) -> None:
        if plan.noise_last != 1:
            raise PlanInvalid("the noise of this plan depends on the round", fix="plan.of_round(round)")
        if not plan.private or not (math.isfinite(plan.noise_multiplier) and plan.noise_multiplier > 0):
            raise PlanInvalid("the private engine needs a private plan with a positive noise multiplier")
        self.model = model
        self.max_grad_norm = plan.max_grad_norm
        self.optimizer = PatientOptimizer(optimizer, plan, batch_size=batch_size, noise=noise)
        trained = self.optimizer.params
        self.clipper = clipper_for(model, trained, Clip(trained, rule=clip_rule, groups=groups))
        self._batch_norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._clear()

    def _clear(self) -> None:
        """Start a logical batch."""
        self.clipper.clear()
        self.optimizer.clear()

    def accumulate(self, batch: Batch, loss: Callable[[Any, Batch], Tensor]) -> None:
        """Add the clipped gradients of the batch's patients; a patient's loss is the mean over his or her studies.

        batch: with all studies of each of its patients; an empty one adds nothing (and must not reach the model: its
        hooks would keep an activation that no backward pass takes away).
        loss: what the model gives and the batch to (S,), one loss per study that depends on this study alone (`rehearse`).
        Raises: PlanInvalid if the loss has another shape ((S, 1) under ghost clipping cost 135 C, measured), if C was
        changed or a BatchNorm woken up.
        """
        self._check()
        if batch.studies == 0:
            return
        loss_S = loss(self.clipper.logits(batch), batch)
        if loss_S.shape != (batch.studies,):
            raise PlanInvalid(
                "the loss must be one number for each study",  # crosses to the coordinator: no count of anything
                why=f"its shape is {tuple(loss_S.shape)}, not ({batch.studies},)",
            )
        studies_P = torch.bincount(batch.patient_B, minlength=batch.patients).to(loss_S.dtype)
        total = (loss_S / studies_P[batch.patient_B]).sum()
        self.optimizer.zeroed += self.clipper.add(total, batch, self.optimizer.max_grad_norm)

    def savepoint(self) -> Callable[[], None]:
        """What goes back to the sum as it is now, after a pass that failed in its midst: who was in it may be added again."""
        before_W = self.optimizer.total_W.clone()

        def undo() -> None:
            self.clipper.clear()
            self.optimizer.total_W.copy_(before_W)

        return undo

    def leave_out(self) -> None:
        """After a pass that failed: nothing of it is read by the next one. What it added already is within the bound."""
        self.clipper.clear()
        self.optimizer.zeroed += 1

    def _check(self) -> None:
        if self.optimizer.max_grad_norm != self.max_grad_norm:
            raise PlanInvalid("the clipping norm changed during training", fix="one owner of C: the plan")
        if any(mixes(module) for module in self._batch_norms):
            raise PlanInvalid(
                "a frozen BatchNorm takes statistics of the batch", fix="keep it in eval() in every round"
            )

    def clipped_sum(self) -> Tensor:
        """(parameters,) the sum before noise. For the sensitivity test; it never leaves."""
        return self.optimizer.total_W.clone()

    def step(self) -> None:
        """Noise, divide by the public batch size, take the optimiser's step. Raises: PlanInvalid if C was changed."""
        self._check()
        self.optimizer.add_noise()
        self.optimizer.scale_grad()
        self.optimizer.original_optimizer.step()
        self._clear()


def clipper_for(model: nn.Module, parameters: Sequence[nn.Parameter], clip: Clip) -> Clipper:
    """What the model brings along: from `wrap`, or around one (an audit's canaries). Raises: PlanInvalid for a bare model."""
    make: Callable[[Sequence[nn.Parameter], Clip], Clipper] | None = getattr(model, "clipper", None)
    if make is None:
        raise PlanInvalid("the private engine needs a model from wrap()")
    return make(parameters, clip)


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Opacus hooks the first layers, whose inputs need no gradient; torch warns about that, rightly and without effect."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield
