"""Clipping by patient without a gradient per study in memory: norms from what flows through each layer, then one sum.

Book-keeping (Bu et al. 2023, "Differentially Private Optimization on Large Model at Small Cost"): one forward pass notes
each layer's input a and, after it, autograd gives the gradient b at each layer's output. A study's gradient of a linear
layer is b aᵀ, so a patient's norm follows from the dot products of his or her studies, exactly and not by the triangle
inequality, and the clipped sum is one product (weight · b)ᵀ a. There is no second backward pass: norm and sum are made of
the same numbers, so a wrong one cannot be clipped by the right one.

Which form a layer's weights take (`Book`), the cheaper one of Bu et al.'s rule, the cross terms of a patient's studies counted:
    pool    what is small (norms, biases, early convolutions): gradients by study, side by side, added up by patient (Pool)
    sums    what is not: each patient's gradient, kept while all that is kept is no more than the layers' own outputs, else
            made twice, a portion of the patients at a time (SumPart)
    dots    wide linear layers and late convolutions: dot products, no gradient of anybody in memory (DotPart)
    tokens  embeddings: by token and patient, only those that occur (EmbeddingPart)
A layer without book-keeping of its own (`way_of`) gives Opacus' gradients by study to the first or second of these.

In the precision of the layer, with a margin: a square is made larger by SLACK of its terms' squares, because the float32 sum
of what cancels is off by more than its own share. It costs 5e-6 of the norm where nothing cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedmm.errors import PlanInvalid
from fedmm.privacy.clip import Clip
from fedmm.schema import Batch

# S studies, P patients, T positions of a sequence, I inputs, O outputs of a layer; k studies of each of n patients

# Opacus' per-study gradients of a layer: (layer, inputs, gradient at the output) to {parameter: (S, ...)}.
Sampler = Callable[[nn.Module, list[Tensor], Tensor], Mapping[Tensor, Tensor]]
HELD = 2**23  # values at a time of what is not kept, 32 MB: guess
FEW = (
    2**17
)  # values of all studies' gradients of a linear layer up to which one product beats one for each k  # measured
PASSES = 24  # products in the time of writing a value and reading it twice  # measured
POOLED = 2**20  # values of what goes into the pool: a copy of more costs more than a few calls  # measured
NARROW = 2**12  # weights up to which a convolution with a group for each study beats unfolding  # measured
SLACK = {torch.float32: 1e-5, torch.float64: 1e-13}


@dataclass(frozen=True)
class Call:
    """One call of a layer: what went in, what came out, and their versions, because torch may change them in place.

    first: whether no layer with weights is before it.
    """

    layer: nn.Module
    inputs: tuple[Tensor, ...]
    output: Tensor
    versions: tuple[int, ...]
    first: bool

    def changed(self) -> bool:
        return self.versions != tuple(t._version for t in (*self.inputs, self.output))


class TapedModel(nn.Module):
    """A model that notes the calls of its layers with weights, while it trains and a tape lies ready."""

    def __init__(self, model: nn.Module, samplers: Mapping[type[nn.Module], Sampler]) -> None:
        super().__init__()
        self._module = model
        self.samplers = samplers
        self.tape: list[Call | None] | None = None
        self.book: Book | None = None
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
        if self.tape is None or not torch.is_grad_enabled():
            return
        tape, number = self.tape, len(self.tape)
        kept = tuple(value.detach() for value in inputs)
        first = not any(value.requires_grad for value in inputs)
        tape.append(Call(layer, kept, output, tuple(t._version for t in (*kept, output)), first))

        def enter(b: Tensor) -> None:
            call, tape[number] = tape[number], None  # let go as the pass goes on: as much memory as a plain one
            if call is not None and self.book is not None:
                self.book.enter(call, b)

        output.register_hook(enter)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Groups:
    """Whose study is whose: patient_S as in Batch, patients P."""

    patient_S: Tensor
    patients: int

    @cached_property
    def _counts_P(self) -> Tensor:
        return torch.bincount(self.patient_S, minlength=self.patients)

    @cached_property
    def _order_S(self) -> Tensor | None:
        """Rows by number of studies of their patient, then by patient; None where they stand so already."""
        key_S = self._counts_P[self.patient_S] * self.patients + self.patient_S
        if bool((key_S[1:] >= key_S[:-1]).all()):
            return None
        return key_S.argsort(stable=True)

    @cached_property
    def _patient_N(self) -> Tensor:
        """Patients with a study, in the order of `_order_S`."""
        order_P = self._counts_P.argsort(stable=True)
        return order_P[self._counts_P[order_P] > 0]

    @cached_property
    def _blocks(self) -> list[tuple[int, int]]:
        """(k, n): so many patients have so many studies."""
        return [(k, n) for k, n in enumerate(torch.bincount(self._counts_P).tolist()) if k and n]

    @cached_property
    def most(self) -> int:
        """Studies of a patient; 1 where there is none."""
        return max((k for k, _ in self._blocks), default=1)

    @cached_property
    def _one_each(self) -> bool:
        return self.most == 1 and self._order_S is None and len(self.patient_S) == self.patients

    def sums(self, value_S: Tensor) -> Tensor:
        """(S, ...) to (P, ...)."""
        if self._one_each:
            return value_S
        out = torch.zeros(self.patients, *value_S.shape[1:], dtype=value_S.dtype, device=value_S.device)
        return out.index_add_(0, self.patient_S, value_S)

    def split(self, value_STX: Tensor, values: int = 1) -> list[Tensor]:
        """(S, T, X) to (n, k T, X) for each number k of studies; at most HELD / (`values` k²) patients at a time, one at
        least."""
        if self._order_S is not None:
            value_STX = value_STX.index_select(0, self._order_S)
        parts, first = [], 0
        for k, n in self._blocks:
            most = max(1, HELD // (values * k * k))
            for done in range(0, n, most):
                here = min(most, n - done)
                rows = value_STX[first : first + here * k]
                parts.append(rows.reshape(here, -1, value_STX.shape[2]))
                first += here * k
        return parts

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """(n, ...) of what `split` gave, one after the other, to (P, ...)."""
        whole = torch.cat(list(parts)) if len(parts) != 1 else parts[0]
        if self._order_S is None and len(whole) == self.patients:
            return whole
        out = torch.zeros(self.patients, *whole.shape[1:], dtype=whole.dtype, device=whole.device)
        return out.index_copy_(0, self._patient_N, whole)

    def portions(self, most: int) -> Iterator[tuple[Tensor, Groups]]:
        """Rows of whole patients, at most `most` studies at a time, one patient at least."""
        order_S = self.patient_S.argsort(stable=True)
        counts = self._counts_P.tolist()
        start = rows = first = 0
        for patient, count in enumerate([*counts, most + 1]):
            if rows and rows + count > most:
                chosen = order_S[start : start + rows]
                yield chosen, Groups(self.patient_S[chosen] - first, patient - first)
                start, rows, first = start + rows, 0, patient
            rows += count


@dataclass(frozen=True)
class Factors:
    """What each patient's gradient is multiplied with. some_zero: whether any is 0: then it may be NaN, and must not count."""

    factor_P: Tensor
    some_zero: bool

    def weigh(self, value_P: Tensor) -> Tensor:
        """(P, ...) to the weighted sum (...)."""
        rows_PN = value_P.flatten(1)
        if self.some_zero:
            rows_PN = torch.where(self.factor_P.unsqueeze(1) > 0, rows_PN, 0.0)
        return torch.mv(rows_PN.t(), self.factor_P.to(rows_PN.dtype)).view(value_P.shape[1:])

    def scaled(self, value_S: Tensor, patient_S: Tensor) -> Tensor:
        """(S, ...) each times its patient's factor."""
        factor_S = self.factor_P[patient_S].view(-1, *[1] * (value_S.dim() - 1))
        scaled_S = value_S * factor_S.to(value_S.dtype)
        return torch.where(factor_S > 0, scaled_S, 0.0) if self.some_zero else scaled_S

    def masked(self, value_S: Tensor, patient_S: Tensor) -> Tensor:
        """(S, ...) with zeros for those who do not count."""
        if not self.some_zero:
            return value_S
        return torch.where(self.factor_P[patient_S].view(-1, *[1] * (value_S.dim() - 1)) > 0, value_S, 0.0)


# A weight to what belongs to it. torch's annotations call a layer's weight a Tensor.
Gradients = Mapping[Tensor, Tensor]
Rows = Sequence[tuple[Tensor, Tensor]]
Total = Callable[[Tensor, "Factors"], Tensor]


class Part(Protocol):
    """The gradients of some weights that share a bound. share: as in `Clip`."""

    share: int

    def squares(self) -> Tensor:
        """(P,) float64: squared norm of each patient's gradient, too large by at most SLACK x its terms' squares."""
        ...

    def clipped(self, factors: Factors) -> Gradients:
        """Sum of the patients' gradients, each times its factor; factor 0 gives nothing, whatever the gradient."""
        ...


def _square(value_P: Tensor) -> Tensor:
    """(P, ...) to (P,) float64, with its slack. What is longer than the square root of the largest number becomes inf."""
    norm_P: Tensor = torch.linalg.vector_norm(value_P.flatten(1), dim=1)
    return norm_P.double().square_().mul_(1 + SLACK[value_P.dtype])


class Pool:
    """Gradients side by side, so that many small layers cost no more calls than one.

    by_study, by_patient: weights and their (S, ...) or (P, ...).
    """

    def __init__(self, share: int, by_study: Rows, by_patient: Rows, groups: Groups) -> None:
        self.share, self.weights = share, [weight for weight, _ in (*by_study, *by_patient)]
        parts = [groups.sums(torch.cat([value.flatten(1) for _, value in by_study], 1))] if by_study else []
        parts += [value.flatten(1) for _, value in by_patient]
        self.sum_PN = torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def squares(self) -> Tensor:
        return _square(self.sum_PN)

    def clipped(self, factors: Factors) -> Gradients:
        totals = torch.split(factors.weigh(self.sum_PN), [weight.numel() for weight in self.weights])
        return {weight: total.view(weight.shape) for weight, total in zip(self.weights, totals, strict=True)}


class DotPart:
    """|Σ_s b_s a_sᵀ|² = Σ_s,t (b_s · b_t)(a_s · a_t) over all positions of a patient's studies.

    a_STI, b_STO: the gradient of `weight` is the sum of b aᵀ over studies and positions.  total: makes that sum of b that is
    weighted, in the weight's shape.
    """

    def __init__(self, share: int, weight: Tensor, a_STI: Tensor, b_STO: Tensor, groups: Groups, total: Total) -> None:
        self.share, self.weight, self.groups, self.total, self.b_STO = share, weight, groups, total, b_STO
        self._square_P = self._squares(a_STI)

    def squares(self) -> Tensor:
        return self._square_P

    def _squares(self, a_STI: Tensor) -> Tensor:
        """A product below the smallest number is lost, and the other factor, up to 1e38, may have made it count: `lost` is
        more than that in the end, and nothing beside a bound of 1e-6."""
        positions = a_STI.shape[1]
        slack, tiny = SLACK[a_STI.dtype], torch.finfo(a_STI.dtype).tiny
        lost = tiny * max(a_STI.shape[2], self.b_STO.shape[2]) * positions * self.groups.most / slack
        squares, own = [], []
        parts = (self.groups.split(value, 2 * positions**2) for value in (a_STI, self.b_STO))
        for a_nTI, b_nTO in zip(*parts, strict=True):
            a_nTT, b_nTT = torch.bmm(a_nTI, a_nTI.transpose(1, 2)), torch.bmm(b_nTO, b_nTO.transpose(1, 2))
            own_nT = (a_nTT.diagonal(dim1=1, dim2=2) + lost).mul_(b_nTT.diagonal(dim1=1, dim2=2) + lost)
            own.append(own_nT.sum(1))
            squares.append(a_nTT.mul_(b_nTT).sum((1, 2)))
        square_P, own_P = self.groups.joined(squares), self.groups.joined(own)
        return square_P.double().clamp_(min=0).add_(own_P, alpha=slack)  # NaN stays NaN

    def clipped(self, factors: Factors) -> Gradients:
        return {self.weight: self.total(factors.scaled(self.b_STO, self.groups.patient_S), factors)}


class EmbeddingPart:
    """nn.Embedding: gradients are added by token and patient; only tokens that occur take memory."""

    def __init__(self, share: int, layer: nn.Embedding, a: Tensor, b: Tensor, groups: Groups) -> None:
        self.share, self.layer, self.groups = share, layer, groups
        self.token_R, self.b_RO = a.reshape(-1), b.reshape(-1, b.shape[-1])
        patient_R = groups.patient_S.repeat_interleave(len(self.token_R) // max(len(a), 1))
        key_U, place_R = torch.unique(patient_R * layer.num_embeddings + self.token_R, return_inverse=True)
        self.patient_U, self.token_U = key_U // layer.num_embeddings, key_U % layer.num_embeddings
        self.sum_UO = torch.zeros(len(key_U), b.shape[-1], dtype=b.dtype, device=b.device)
        self.sum_UO.index_add_(0, place_R, self.b_RO)

    def squares(self) -> Tensor:
        total_P = torch.zeros(self.groups.patients, dtype=torch.float64, device=self.sum_UO.device)
        return total_P.index_add_(0, self.patient_U, _square(self.sum_UO))

    def clipped(self, factors: Factors) -> Gradients:
        weighted_UO = factors.scaled(self.sum_UO, self.patient_U)
        return {self.layer.weight: torch.zeros_like(self.layer.weight).index_add_(0, self.token_U, weighted_UO)}


# The weights' gradients by patient from (a's rows, b's rows, whose) of some whole patients.
Make = Callable[[Sequence[Tensor], Tensor, Groups], Gradients]


class SumPart:
    """Each patient's gradient: kept, or made twice, a portion of the patients at a time."""

    def __init__(
        self, share: int, inputs: Sequence[Tensor], b: Tensor, groups: Groups, make: Make, values: int, *, keep: bool
    ) -> None:
        """values: of a patient's gradient."""
        self.share, self.groups = share, groups
        self._kept = make(inputs, b, groups) if keep else None
        if not keep:
            self.inputs, self.b, self.make, self.values = inputs, b, make, values

    def _sums(self) -> Iterator[tuple[slice, Gradients]]:
        """Of each portion: its patients, and {weight: (P, ...)}."""
        if self._kept is not None:
            yield slice(None), self._kept
            return
        first = 0
        for rows, own in self.groups.portions(max(1, HELD // self.values)):
            found = self.make([value[rows] for value in self.inputs], self.b[rows], own)
            yield slice(first, first + own.patients), found
            first += own.patients

    def squares(self) -> Tensor:
        return torch.cat([torch.stack([_square(g) for g in found.values()]).sum(0) for _, found in self._sums()])

    def clipped(self, factors: Factors) -> Gradients:
        out: dict[Tensor, Tensor] = {}
        for own, found in self._sums():
            here = Factors(factors.factor_P[own], factors.some_zero)
            for weight, value_P in found.items():
                total = here.weigh(value_P)
                out[weight] = out[weight] + total if weight in out else total
        return out


# --- layer by layer -----------------------------------------------------------------------------------------------------


def _trains(layer: nn.Module, name: str) -> bool:
    weight = getattr(layer, name, None)
    return weight is not None and bool(weight.requires_grad)


def _products(a_STI: Tensor, b_STO: Tensor, groups: Groups) -> Tensor:
    """(P, O, I): sums of b aᵀ."""
    if len(a_STI) * a_STI.shape[2] * b_STO.shape[2] <= FEW:
        return groups.sums(torch.bmm(b_STO.transpose(1, 2), a_STI))
    parts = zip(groups.split(a_STI), groups.split(b_STO), strict=True)
    return groups.joined([torch.bmm(b_nTO.transpose(1, 2), a_nTI) for a_nTI, b_nTO in parts])


def _layer_norm(layer: nn.LayerNorm, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(S, ...) gradients of weight and bias."""
    standard = nn.functional.layer_norm(a, layer.normalized_shape, None, None, layer.eps).mul_(b)
    between = list(range(1, b.dim() - len(layer.normalized_shape)))
    return (standard.sum(between), b.sum(between)) if between else (standard, b)


def _group_norm(layer: nn.GroupNorm, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(S, C) gradients of weight and bias."""
    standard_SCX = nn.functional.group_norm(a, layer.num_groups, eps=layer.eps).flatten(2)
    b_SCX = b.reshape(standard_SCX.shape)
    return standard_SCX.mul_(b_SCX).sum(2), b_SCX.sum(2)


NORMS: Mapping[type[nn.Module], Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}
Convolution = nn.Conv1d | nn.Conv2d


def _as_2d(layer: Convolution, value: Tensor) -> Tensor:
    """A map (S, C, H, W) whatever the convolution."""
    return value if isinstance(layer, nn.Conv2d) else value.unsqueeze(2)


def _pairs(layer: Convolution) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, stride, padding and dilation in two dimensions."""
    lead = {1: ([1], [1], [0], [1]), 2: ([], [], [], [])}[len(layer.kernel_size)]
    own = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    kernel, stride, padding, dilation = ([*first, *map(int, rest)] for first, rest in zip(lead, own, strict=True))
    return kernel, stride, padding, dilation


def _unfolded(layer: Convolution, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(S, T, I), (S, T, O): what the kernel sees at each position, and the gradient there."""
    kernel, stride, padding, dilation = _pairs(layer)
    a, b = _as_2d(layer, a), _as_2d(layer, b)
    padded = nn.functional.pad(a, (padding[1], padding[1], padding[0], padding[0])).contiguous()
    s, c, h, w = padded.stride()
    size = (len(a), a.shape[1], *kernel, b.shape[2], b.shape[3])
    seen = padded.as_strided(size, (s, c, h * dilation[0], w * dilation[1], h * stride[0], w * stride[1]))
    return seen.reshape(len(a), -1, b[0, 0].numel()).transpose(1, 2), b.flatten(2).transpose(1, 2)


def _weight_gradient(layer: Convolution, a: Tensor, b: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """torch's own. shape: of the weight in two dimensions."""
    _, stride, padding, dilation = _pairs(layer)
    weight = b.new_zeros(()).expand(shape)  # not read
    made = torch.ops.aten.convolution_backward(
        b, a, weight, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )
    out: Tensor = made[1]
    return out


def _side_by_side(layer: Convolution, a: Tensor, b: Tensor) -> Tensor:
    """(S, O, I, ...) the weight's gradients by study, by one convolution in which each study is a group."""
    a_SCHW, b_SOHW = _as_2d(layer, a), _as_2d(layer, b)
    studies = len(a)
    a_1CHW, b_1OHW = (value.reshape(1, -1, *value.shape[2:]) for value in (a_SCHW, b_SOHW))
    shape = (studies * layer.out_channels, layer.in_channels // layer.groups, *_pairs(layer)[0])
    made = _weight_gradient(layer, a_1CHW, b_1OHW, shape, studies * layer.groups)
    return made.view(studies, *layer.weight.shape)


def way_of(layer: nn.Module) -> str:
    """How a layer's weights are clipped under training.clipping = ghost: "book-keeping" or "Opacus' sampler"."""
    own = type(layer) in (nn.Linear, nn.Embedding, *NORMS) or _plain_convolution(layer)
    return "book-keeping" if own else "Opacus' sampler"


def _plain_convolution(layer: nn.Module) -> bool:
    return (
        type(layer) in (nn.Conv1d, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def _sequence(value: Tensor) -> Tensor:
    """(S, T, ·), whatever lies between."""
    return value.reshape(len(value), -1, value.shape[-1])


class Book:
    """What one backward pass brings, layer by layer, and the parts that it makes of it.

    A patient's gradient of a layer is kept instead of what went in and came out where it takes no more than twice as much.
    """

    def __init__(self, samplers: Mapping[type[nn.Module], Sampler], groups: Groups, clip: Clip) -> None:
        self.samplers, self.groups, self.clip = samplers, groups, clip
        self._parts: list[Part] = []
        self._by_study: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._by_patient: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def enter(self, call: Call, b: Tensor) -> None:
        """One layer. b: the gradient at its output."""
        layer, a = call.layer, call.inputs[0]
        share = self.clip.share_of(_trained(layer)[0])
        if type(layer) is nn.Embedding:
            self._parts.append(EmbeddingPart(share, layer, a, b, self.groups))
        elif type(layer) in NORMS:
            scale, shift = NORMS[type(layer)](layer, a, b)
            self._pool(share, layer, weight=scale, bias=shift)
        elif type(layer) is nn.Linear:
            a_STI, b_STO = _sequence(a), _sequence(b)
            self._pool(share, layer, bias=b_STO.sum(1) if b_STO.shape[1] > 1 else b_STO[:, 0])
            self._linear(share, layer, a_STI, b_STO)
        elif _plain_convolution(layer):
            self._pool(share, layer, bias=b.flatten(2).sum(2))
            self._convolution(share, layer, a, b)  # type: ignore[arg-type]
        else:
            self._sampled(share, call, b)

    def parts(self) -> list[Part]:
        shares = sorted({*self._by_study, *self._by_patient})
        pools = [Pool(n, self._by_study.get(n, []), self._by_patient.get(n, []), self.groups) for n in shares]
        return [*self._parts, *pools]

    def _pool(self, share: int, layer: nn.Module, **found: Tensor) -> None:
        rows = [(getattr(layer, name), value) for name, value in found.items() if _trains(layer, name)]
        self._by_study.setdefault(share, []).extend(rows)

    def _linear(self, share: int, layer: nn.Linear, a_STI: Tensor, b_STO: Tensor) -> None:
        groups = self.groups
        if not layer.weight.requires_grad:
            return
        keep = self._fits(layer.weight, a_STI, b_STO)
        if not self._dots(layer, b_STO.shape[1], keep=keep):
            self._sums(share, layer, a_STI, b_STO, lambda a, b, own: _products(a[0], b, own), keep=keep)
            return

        def product(weighted_STO: Tensor, factors: Factors) -> Tensor:
            counted_STI = factors.masked(a_STI, groups.patient_S)
            return weighted_STO.flatten(0, 1).t() @ counted_STI.flatten(0, 1)

        self._parts.append(DotPart(share, layer.weight, a_STI, b_STO, groups, product))

    def _convolution(self, share: int, layer: Convolution, a: Tensor, b: Tensor) -> None:
        groups, weight = self.groups, layer.weight
        if not weight.requires_grad:
            return
        keep = self._fits(weight, a, b)
        if weight.numel() <= NARROW or layer.groups > 1:
            if len(a) * weight.numel() <= POOLED:
                self._pool(share, layer, weight=_side_by_side(layer, a, b))
            else:
                by_group: Callable[..., Tensor] = lambda a, b, own: own.sums(_side_by_side(layer, a[0], b))  # noqa: E731
                self._sums(share, layer, a, b, by_group, keep=keep)
            return
        if not self._dots(layer, b[0, 0].numel(), keep=keep):
            self._sums(share, layer, a, b, lambda a, b, own: _products(*_unfolded(layer, a[0], b), own), keep=keep)
            return

        def gradient(weighted_STO: Tensor, factors: Factors) -> Tensor:
            counted, weighted = factors.masked(a, groups.patient_S), weighted_STO.transpose(1, 2).reshape(b.shape)
            shape = (*weight.shape[:2], *_pairs(layer)[0])
            return _weight_gradient(layer, _as_2d(layer, counted), _as_2d(layer, weighted), shape, 1).view(weight.shape)

        self._parts.append(DotPart(share, weight, *_unfolded(layer, a, b), groups, gradient))

    def _fits(self, weight: Tensor, a: Tensor, b: Tensor) -> bool:
        """May the patients' gradients be kept?"""
        return self.groups.patients * weight.numel() <= max(POOLED, 2 * (a.numel() + b.numel()))

    def _dots(self, layer: nn.Linear | Convolution, positions: int, *, keep: bool) -> bool:
        """Products of all pairs of positions of a patient, and then the sum? Or his or her gradient itself, which gives the
        sum as well, at three passes over it while it can be kept? Bu et al. 2023, section 3, have the last line."""
        outputs, inputs = layer.weight.shape[0], layer.weight[0].numel()
        pairs = positions * math.ceil(len(self.groups.patient_S) / self.groups.patients)
        if keep:
            small = self.groups.patients * inputs * outputs <= POOLED
            return not small and pairs**2 * (inputs + outputs) <= PASSES * inputs * outputs
        return pairs * (inputs + outputs) <= inputs * outputs

    def _sums(
        self,
        share: int,
        layer: nn.Linear | Convolution,
        a: Tensor,
        b: Tensor,
        make: Callable[..., Tensor],
        *,
        keep: bool,
    ) -> None:
        """make: (inputs, gradient at the output, whose) to the weight's gradients by patient."""
        weight = layer.weight
        if self.groups.patients * weight.numel() <= POOLED:
            self._by_patient.setdefault(share, []).append((weight, make((a,), b, self.groups)))
        else:
            whole: Make = lambda a, b, own: {weight: make(a, b, own)}  # noqa: E731
            self._parts.append(SumPart(share, (a,), b, self.groups, whole, weight.numel(), keep=keep))

    def _sampled(self, share: int, call: Call, b: Tensor) -> None:
        """By Opacus' gradients by study."""
        layer, sampler = call.layer, self.samplers[type(call.layer)]

        def make(inputs: Sequence[Tensor], b: Tensor, own: Groups) -> Gradients:
            found = sampler(layer, [value.contiguous() for value in inputs], b.contiguous())
            return {weight: own.sums(value) for weight, value in found.items() if weight.requires_grad}

        values = sum(parameter.numel() for parameter in _trained(layer))
        room = max(POOLED, 2 * sum(value.numel() for value in (*call.inputs, b)))
        keep = len(b) * values <= room
        self._parts.append(SumPart(share, call.inputs, b, self.groups, make, values, keep=keep))


USE_HOOKS = "training.clipping = hooks"


def parts_of(model: TapedModel, loss: Tensor, groups: Groups, clip: Clip) -> list[Part]:
    """One backward pass to the layers' outputs; no gradient of any weight is made, and the tape is used up.

    loss: sum of the studies' losses.
    Raises: PlanInvalid where a patient's share cannot be told apart: a layer that is used twice, that does not see one
    row for each study, or whose input or output was changed in place.
    """
    calls, model.tape = [call for call in model.tape or [] if call is not None], None
    weights = [id(p) for call in calls for p in _trained(call.layer)]
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
    first = [call.output for call in calls if call.first]  # whatever leads to them passes all the others
    del calls
    model.book = book = Book(model.samplers, groups, clip)
    try:
        torch.autograd.grad(loss, first, allow_unused=True)
    finally:
        model.book = None
    return book.parts()


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    """The layer's own, without those of layers in it."""
    return [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]


def add_to(parameter: Tensor, total: Tensor) -> None:
    """To the sum of this logical batch."""
    parameter.summed_grad.add_(total)  # type: ignore[attr-defined]


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
        parts = parts_of(self.model, loss, Groups(batch.patient_B, batch.patients), self.clip)
        square_GP = torch.zeros(self.clip.shares, batch.patients, dtype=torch.float64, device=loss.device)
        for part in parts:
            square_GP[part.share] += part.squares()
        factor_GP, zeroed = self.clip.factors(square_GP.sqrt_(), max_norm)
        for part in parts:
            factors = Factors(factor_GP[part.share], zeroed > 0)
            for parameter, total in part.clipped(factors).items():
                add_to(parameter, total)
        return zeroed

    def clear(self) -> None:
        self.model.tape = None
