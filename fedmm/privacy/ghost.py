"""Clipping by patient without a gradient per study in memory: norms from what flows through each layer, then one sum.

Book-keeping (Bu et al. 2023, "Differentially Private Optimization on Large Model at Small Cost"): one forward pass notes
each layer's input a and, after it, autograd gives the gradient b at each layer's output. A study's gradient of a linear
layer is b aᵀ, so a patient's norm follows from the dot products of his or her studies, exactly and not by the triangle
inequality, and the clipped sum is one product (weight · b)ᵀ a. There is no second backward pass: norm and sum are made of
the same numbers, so a wrong one cannot be clipped by the right one. Linear and embedding layers never hold a gradient per
study; of the others, a few million values are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedmm.errors import PlanInvalid
from fedmm.privacy.clip import Clip
from fedmm.schema import Batch

# S studies, P patients, T positions of a sequence, I inputs, O outputs of a layer

# Opacus' per-study gradients of a layer: (layer, inputs, gradient at the output) to {parameter: (S, ...)}.
Sampler = Callable[[nn.Module, list[Tensor], Tensor], Mapping[Tensor, Tensor]]
HELD = 2**23  # values of per-study gradients in memory at a time, 32 MB: guess
# Where a patient's studies cancel, float32 rounds their sum by more than the sum's own share. A squared norm is kept
# above this share of its studies' squares: costs 5e-6 of the norm when they do not cancel, and 1e-4 C at most when they do.
CANCELLED = 1e-5


@dataclass(frozen=True)
class Call:
    """One call of a layer: what went in, what came out, and their versions, because torch may change them in place."""

    layer: nn.Module
    inputs: tuple[Tensor, ...]
    output: Tensor
    versions: tuple[int, ...]

    def changed(self) -> bool:
        return self.versions != tuple(t._version for t in (*self.inputs, self.output))


class TapedModel(nn.Module):
    """A model that notes the calls of its layers with weights, while it trains and a tape lies ready."""

    def __init__(self, model: nn.Module, samplers: Mapping[type[nn.Module], Sampler]) -> None:
        super().__init__()
        self._module = model
        self.samplers = samplers
        self.tape: list[Call] | None = None
        for module in model.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                module.register_forward_hook(self._note)

    def forward(self, *values: object) -> Any:
        return self._module(*values)

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """The model alone."""
        self.tape = None
        yield

    def clipper(self, parameters: Sequence[nn.Parameter], clip: Clip) -> GhostClipper:
        return GhostClipper(self, clip)

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.tape is not None and torch.is_grad_enabled():
            kept = tuple(value.detach() for value in inputs)
            self.tape.append(Call(layer, kept, output, tuple(t._version for t in (*kept, output))))


@dataclass(frozen=True)
class Groups:
    """Whose study is whose: patient_S as in Batch, patients P."""

    patient_S: Tensor
    patients: int

    def sums(self, value_S: Tensor) -> Tensor:
        """(S, ...) to (P, ...)."""
        out = torch.zeros(self.patients, *value_S.shape[1:], dtype=value_S.dtype, device=value_S.device)
        return out.index_add_(0, self.patient_S, value_S)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All pairs of two studies of one patient, each pair once, in at most as many portions as one patient has studies."""
        order_S = self.patient_S.argsort(stable=True)
        sorted_S = self.patient_S[order_S]
        for distance in range(1, len(order_S)):
            same = sorted_S[:-distance] == sorted_S[distance:]
            if not bool(same.any()):
                return
            yield order_S[:-distance][same], order_S[distance:][same]

    def portions(self, most: int) -> Iterator[tuple[Tensor, Groups]]:
        """Rows of whole patients, at most `most` studies at a time, one patient at least."""
        order_S = self.patient_S.argsort(stable=True)
        counts = torch.bincount(self.patient_S, minlength=self.patients).tolist()
        start = rows = first = 0
        for patient, count in enumerate([*counts, most + 1]):
            if rows and rows + count > most:
                chosen = order_S[start : start + rows]
                yield chosen, Groups(self.patient_S[chosen] - first, patient - first)
                start, rows, first = start + rows, 0, patient
            rows += count


# A weight to what belongs to it. torch's annotations call a layer's weight a Tensor.
Gradients = Mapping[Tensor, Tensor]


class Part(Protocol):
    """The gradients of one layer's weights."""

    @property
    def layer(self) -> nn.Module: ...

    def squares(self) -> Tensor:
        """(P,) float64: squared norm of each patient's gradient, too large by at most CANCELLED x its terms' squares."""
        ...

    def clipped(self, factor_P: Tensor) -> Gradients:
        """Sum of the patients' gradients, each times its factor; factor 0 gives nothing, whatever the gradient."""
        ...


class LinearPart:
    """nn.Linear: |Σ_s b_s a_sᵀ|² = Σ_s,t (b_s · b_t)(a_s · a_t), in double precision."""

    def __init__(self, layer: nn.Linear, a: Tensor, b: Tensor, groups: Groups) -> None:
        self.layer, self.groups = layer, groups
        self.a_STI, self.b_STO = a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), -1, b.shape[-1])

    @staticmethod
    def cheap(layer: nn.Linear, a: Tensor) -> bool:
        """Bu et al.'s rule: dot products of all positions cost less than the gradient itself."""
        positions = a[0].numel() // a.shape[-1]
        return positions == 1 or 2 * positions**2 <= layer.in_features * layer.out_features

    def _dots(self, left: Tensor, right: Tensor) -> Tensor:
        """(pairs,) inner products of two studies' gradients."""
        a_NTT, b_NTT = (
            torch.einsum("nti,nui->ntu", v[left].double(), v[right].double()) for v in (self.a_STI, self.b_STO)
        )
        return (a_NTT * b_NTT).sum((1, 2))

    def squares(self) -> Tensor:
        total_P = torch.zeros(self.groups.patients, dtype=torch.float64, device=self.a_STI.device)
        if self.layer.weight.requires_grad:
            every_S = torch.arange(len(self.a_STI), device=total_P.device)
            total_P += self.groups.sums(self._dots(every_S, every_S))
            for left, right in self.groups.pairs():
                total_P.index_add_(0, self.groups.patient_S[left], 2 * self._dots(left, right))
            square_ST = self.a_STI.double().square().sum(2) * self.b_STO.double().square().sum(2)
            least_P = CANCELLED * self.groups.sums(square_ST.sum(1))
            total_P = torch.maximum(total_P, torch.zeros_like(total_P)) + least_P  # NaN stays NaN
        if self.layer.bias is not None and self.layer.bias.requires_grad:
            total_P += self.groups.sums(self.b_STO.double().sum(1)).square().sum(1)
        return total_P

    def clipped(self, factor_P: Tensor) -> Gradients:
        factor_S = factor_P[self.groups.patient_S].view(-1, 1, 1)
        counts = factor_S > 0
        # a's length moves over to b, in double: a factor of 1e-36 must not make b a denormal, which is rounded
        length_S11 = self.a_STI.double().norm(dim=(1, 2), keepdim=True).clamp(min=1.0)
        b_STO = torch.where(counts, self.b_STO.double() * factor_S, 0.0)
        out: dict[Tensor, Tensor] = {}
        if self.layer.weight.requires_grad:
            a_STI = torch.where(counts, self.a_STI / length_S11.to(self.a_STI.dtype), 0.0)
            scaled_STO = torch.where(counts, b_STO * length_S11, 0.0).to(a_STI.dtype)
            out[self.layer.weight] = torch.einsum("sto,sti->oi", scaled_STO, a_STI)
        if self.layer.bias is not None and self.layer.bias.requires_grad:
            out[self.layer.bias] = b_STO.sum((0, 1)).to(self.layer.bias.dtype)
        return out


class EmbeddingPart:
    """nn.Embedding: gradients are added by token and patient; only tokens that occur take memory."""

    def __init__(self, layer: nn.Embedding, a: Tensor, b: Tensor, groups: Groups) -> None:
        self.layer, self.groups = layer, groups
        self.token_R, self.b_RO = a.reshape(-1), b.reshape(-1, b.shape[-1])
        self.patient_R = groups.patient_S.repeat_interleave(len(self.token_R) // max(len(a), 1))

    def squares(self) -> Tensor:
        key_R = self.patient_R * self.layer.num_embeddings + self.token_R
        key_U, place_R = torch.unique(key_R, return_inverse=True)
        b_RO = self.b_RO.double()
        sum_UO = torch.zeros(len(key_U), b_RO.shape[1], dtype=b_RO.dtype, device=b_RO.device)
        square_U = sum_UO.index_add_(0, place_R, b_RO).square().sum(1)
        total_P = torch.zeros(self.groups.patients, dtype=b_RO.dtype, device=b_RO.device)
        total_P.index_add_(0, key_U // self.layer.num_embeddings, square_U)
        return total_P.index_add_(0, self.patient_R, CANCELLED * b_RO.square().sum(1))

    def clipped(self, factor_P: Tensor) -> Gradients:
        factor_R1 = factor_P[self.patient_R].unsqueeze(1)
        b_RO = torch.where(factor_R1 > 0, self.b_RO.double() * factor_R1, 0.0).to(self.b_RO.dtype)
        return {self.layer.weight: torch.zeros_like(self.layer.weight).index_add_(0, self.token_R, b_RO)}


class HeldPart:
    """Any other layer: Opacus' gradients per study, added up by patient, a portion of the patients at a time."""

    def __init__(self, call: Call, b: Tensor, groups: Groups, sampler: Sampler) -> None:
        self.layer, self.call, self.b, self.groups, self.sampler = call.layer, call, b, groups, sampler
        values = sum(parameter.numel() for parameter in call.layer.parameters(recurse=False))
        self.most = max(1, HELD // values)
        self._kept = list(self._sums()) if len(b) <= self.most else None

    def _sums(self) -> Iterator[dict[Tensor, Tensor]]:
        """{parameter: (P, ...)} of each portion."""
        for rows, own in self.groups.portions(self.most):
            inputs = [value[rows].contiguous() for value in self.call.inputs]
            found = self.sampler(self.call.layer, inputs, self.b[rows].contiguous())
            yield {p: own.sums(g) for p, g in found.items() if p.requires_grad}

    def squares(self) -> Tensor:
        portions = [
            torch.stack([g.flatten(1).double().square().sum(1) for g in sums.values()]).sum(0)
            for sums in self._kept or self._sums()
        ]
        return torch.cat(portions)

    def clipped(self, factor_P: Tensor) -> Gradients:
        out: dict[Tensor, Tensor] = {}
        first = 0
        for sums in self._kept or self._sums():
            for parameter, g in sums.items():
                own_P = factor_P[first : first + len(g)].to(g.dtype)
                rows = torch.where(own_P.view(-1, *[1] * (g.dim() - 1)) > 0, g, 0.0)
                total = torch.einsum("p,p...->...", own_P, rows)
                out[parameter] = out[parameter] + total if parameter in out else total
            first += len(next(iter(sums.values())))
        return out


USE_HOOKS = "training.clipping = hooks"


def parts_of(model: TapedModel, calls: list[Call], loss: Tensor, groups: Groups) -> list[Part]:
    """One backward pass to the layers' outputs; no gradient of any weight is made.

    loss: sum of the studies' losses.
    Raises: PlanInvalid where a patient's share cannot be told apart: a layer that is used twice, that does not see one
    row for each study, or whose input or output was changed in place.
    """
    weights = [id(p) for call in calls for p in call.layer.parameters(recurse=False) if p.requires_grad]
    if len(set(weights)) != len(weights):
        raise PlanInvalid("a layer is used twice in one pass, which ghost clipping cannot bound", fix=USE_HOOKS)
    studies = len(groups.patient_S)
    if any(not call.inputs or any(len(v) != studies for v in (*call.inputs, call.output)) for call in calls):
        raise PlanInvalid(
            "a layer does not see one row for each study",
            why="rows that are left out or added cannot be assigned to their patients",
            fix="run every encoder on every row, and replace the absent ones after it",
        )
    if any(call.changed() for call in calls):
        raise PlanInvalid(
            "a layer's input or output was changed in place", fix=f"no in-place operations, or {USE_HOOKS}"
        )
    gradients = torch.autograd.grad(loss, [call.output for call in calls], allow_unused=True)
    pairs = zip(calls, gradients, strict=True)
    return [_part(model, call, b, groups) for call, b in pairs if b is not None]


def _part(model: TapedModel, call: Call, b: Tensor, groups: Groups) -> Part:
    layer = call.layer
    if type(layer) is nn.Linear and LinearPart.cheap(layer, call.inputs[0]):
        return LinearPart(layer, call.inputs[0], b, groups)
    if type(layer) is nn.Embedding:
        return EmbeddingPart(layer, call.inputs[0], b, groups)
    return HeldPart(call, b, groups, model.samplers[type(layer)])


def way_of(layer: nn.Module) -> str:
    """How a layer's gradients are bounded: by "book-keeping" of its own, or held as "Opacus' sampler" gives them."""
    return "book-keeping" if type(layer) in (nn.Linear, nn.Embedding) else "Opacus' sampler"


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    """The layer's own, without those of layers in it."""
    return [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]


def add_to(parameter: Tensor, total: Tensor) -> None:
    """To the sum of this logical batch."""
    parameter.summed_grad = parameter.summed_grad + total  # type: ignore[attr-defined]


class GhostClipper:
    """No gradient of a study in memory, but for small layers: see fedmm/privacy/ghost.py. The same sum as HooksClipper."""

    def __init__(self, model: TapedModel, clip: Clip) -> None:
        """Raises: PlanInvalid if the weights of one layer are in two groups."""
        self.model, self.clip = model, clip
        for layer in model.modules():
            if len({clip.share_of(p) for p in _trained(layer)}) > 1:
                raise PlanInvalid(
                    "weights of one layer are clipped apart, which ghost clipping does not do", fix=USE_HOOKS
                )

    def logits(self, batch: Batch) -> Any:
        self.model.tape = []
        return self.model(batch.inputs, batch.seen_BM, batch.timeline)

    def add(self, loss: Tensor, batch: Batch, max_norm: float) -> int:
        calls, self.model.tape = self.model.tape or [], None
        parts = parts_of(self.model, calls, loss, Groups(batch.patient_B, batch.patients))
        rows = ((_trained(part.layer)[0], part.squares()) for part in parts)
        norms = [own.sum(0).sqrt() for own in self.clip.sorted(rows, batch.patients)]
        factor_GP, zeroed = self.clip.factors(torch.stack(norms), max_norm)
        for part in parts:
            for parameter, total in part.clipped(factor_GP[self.clip.share_of(_trained(part.layer)[0])]).items():
                add_to(parameter, total)
        return zeroed

    def clear(self) -> None:
        self.model.tape = None
