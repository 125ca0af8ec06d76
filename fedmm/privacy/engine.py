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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from fedmm.errors import PlanInvalid
from fedmm.privacy.noise import Noise, add_on_grid
from fedmm.privacy.plan import PrivacyPlan
from fedmm.schema import Batch

# S studies, P patients

# Of one patient's gradient. C is at least 1e-6 (policy.RANGES), so C / norm >= 1e-36 is a normal float32.
LARGEST_NORM = 1e30


def wrap(model: nn.Module) -> nn.Module:
    """Attach Opacus' per-sample hooks. Wrap once per process and load weights into it: re-wrapping leaks memory.

    Raises: PlanInvalid for a layer that mixes patients (BatchNorm) or that Opacus cannot handle.
    """
    problems = ModuleValidator.validate(model, strict=False)
    if problems:
        raise PlanInvalid(
            "the model has a layer whose gradient cannot be bounded for one patient",
            why="; ".join(str(problem).split("\n")[0] for problem in problems),
            fix="use GroupNorm or LayerNorm, and layers that Opacus supports",
        )
    wrapped: nn.Module = GradSampleModule(model, loss_reduction="sum", strict=True)
    return wrapped


class PatientOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus ships no types
    """Opacus' optimiser with the patient as unit, noise of `Noise`, and a divisor that is public.

    batch_size: public expected patients per step. Never the number that was sampled, never the private N.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, plan: PrivacyPlan, *, batch_size: int, noise: Noise) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=batch_size,
        )
        self.noise = noise
        self.patient_S = torch.zeros(0, dtype=torch.int64)
        self.patients = 0
        self.zeroed = 0  # patients whose gradient was not finite; stays at the hospital

    def clip_and_accumulate(self) -> None:
        """Sum each patient's per-study gradients, clip the sum to C, add it up. A non-finite gradient becomes zero.

        So does one beyond LARGEST_NORM: C over it must stay a normal float32. With crafted weights and a tiny C the factor
        became a denormal, was rounded up, and the sensitivity was 1.98 C (measured).
        """
        per_patient = [self._by_patient(gradient) for gradient in self.grad_samples]
        norm_P = torch.stack([g.flatten(1).double().norm(dim=1) for g in per_patient]).norm(dim=0)
        finite_P = norm_P < LARGEST_NORM  # false for NaN
        self.zeroed += int((~finite_P).sum())
        factor_P = torch.where(finite_P, (self.max_grad_norm / norm_P.clamp(min=1e-12)).clamp(max=1.0), 0.0)
        for parameter, gradient in zip(self.params, per_patient, strict=True):
            rows = torch.where(finite_P.view(-1, *[1] * (gradient.dim() - 1)), gradient, 0.0)
            total = torch.einsum("p,p...->...", factor_P.to(rows.dtype), rows)
            parameter.summed_grad = total if parameter.summed_grad is None else parameter.summed_grad + total
            parameter.grad_sample = None

    def _by_patient(self, gradient: Tensor) -> Tensor:
        """(S, ...) to (P, ...)."""
        out = torch.zeros(self.patients, *gradient.shape[1:], dtype=gradient.dtype, device=gradient.device)
        return out.index_add_(0, self.patient_S, gradient)

    def add_noise(self) -> None:
        """p.grad = clipped sum + N(0, (noise_multiplier x C)^2), on a grid. Raises: PlanInvalid rather than add none."""
        std = self.noise_multiplier * self.max_grad_norm
        if not sys.float_info.min < std < math.inf:
            raise PlanInvalid("the noise of this plan is not a positive number")
        for parameter in self.params:
            total = parameter.summed_grad
            parameter.grad = add_on_grid(total, self.noise.gaussian(total.shape, std), std)

    def scale_grad(self) -> None:
        for parameter in self.params:
            parameter.grad = parameter.grad / self.expected_batch_size


class PrivateEngine:
    """Clip, sum, noise and step for one local training. Make a fresh one for each round.

    model: from `wrap`.  optimizer: over its parameters.  batch_size: public divisor.
    Raises: PlanInvalid if the plan is not private or its numbers are impossible.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        plan: PrivacyPlan,
        batch_size: int,
        noise: Noise,
    ) -> None:
        if not plan.private or not (math.isfinite(plan.noise_multiplier) and plan.noise_multiplier > 0):
            raise PlanInvalid("the private engine needs a private plan with a positive noise multiplier")
        self.model = model
        self.max_grad_norm = plan.max_grad_norm
        self.optimizer = PatientOptimizer(optimizer, plan, batch_size=batch_size, noise=noise)
        self._clear()

    def _clear(self) -> None:
        """Start a logical batch. An empty Poisson sample is a step with noise only, so the sum starts at zero."""
        for parameter in self.optimizer.params:
            parameter.grad_sample = None
            parameter.grad = None
            parameter.summed_grad = torch.zeros_like(parameter)

    def accumulate(self, batch: Batch, loss: Callable[[Tensor, Batch], Tensor]) -> None:
        """Add the clipped gradients of the batch's patients; a patient's loss is the mean over his or her studies.

        batch: with all studies of each of its patients; an empty one adds nothing (and must not reach the model: its
        hooks would keep an activation that no backward pass takes away).
        loss: (S, outputs) logits and the batch to (S,), one loss per study that depends on this study alone.
        Raises: PlanInvalid if the loss has another shape ((S, 1) under ghost clipping cost 135 C, measured).
        """
        if batch.studies == 0:
            return
        loss_S = loss(self.model(batch.inputs, batch.seen_BM), batch)
        if loss_S.shape != (batch.studies,):
            raise PlanInvalid(f"the loss must have shape ({batch.studies},), it has {tuple(loss_S.shape)}")
        studies_P = torch.bincount(batch.patient_B, minlength=batch.patients).to(loss_S.dtype)
        with quiet_hooks():
            torch.autograd.backward((loss_S / studies_P[batch.patient_B]).sum())
        self.optimizer.patient_S, self.optimizer.patients = batch.patient_B, batch.patients
        self.optimizer.clip_and_accumulate()

    def clipped_sum(self) -> Tensor:
        """(parameters,) the sum before noise. For the sensitivity test; it never leaves."""
        return torch.cat([parameter.summed_grad.flatten() for parameter in self.optimizer.params]).detach().clone()

    def step(self) -> None:
        """Noise, divide by the public batch size, take the optimiser's step. Raises: PlanInvalid if C was changed."""
        if self.optimizer.max_grad_norm != self.max_grad_norm:
            raise PlanInvalid("the clipping norm changed during training", fix="one owner of C: the plan")
        self.optimizer.add_noise()
        self.optimizer.scale_grad()
        self.optimizer.original_optimizer.step()
        self._clear()


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Opacus hooks the first layers, whose inputs need no gradient; torch warns about that, rightly and without effect."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield
