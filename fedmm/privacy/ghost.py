"""Clipping by patient without a gradient per study in memory: norms from what flows through each layer, then one sum.

Book-keeping (Bu et al. 2023, "Differentially Private Optimization on Large Model at Small Cost"): one forward pass notes
each layer's input a and, after it, autograd gives the gradient b at each layer's output. A study's gradient of a linear
layer is b aᵀ, so a patient's norm follows from the dot products of his or her studies, exactly and not by the triangle
inequality, and the clipped sum is one product (weight · b)ᵀ a. There is no second backward pass: norm and sum are made of
the same numbers, so a wrong one cannot be clipped by the right one.

Which form a layer's weights take (`Book`), the cheaper one of Bu et al.'s rule, the cross terms of a patient's studies counted:
    pool    what is small (norms, biases, early convolutions): gradients by study, side by side, added up by patient (Pool)
    sums    what is not: each patient's gradient, kept where it takes no more than twice what went in and came out, else made
            twice, a portion of the patients at a time (SumPart)
    dots    wide linear layers and late convolutions: dot products, no gradient of anybody in memory (DotPart)
    tokens  embeddings: by token and patient, only those that occur (EmbeddingPart)
A layer without book-keeping of its own (`layers.way_of`) gives Opacus' gradients by study to the second of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedmm.errors import PlanInvalid
from fedmm.privacy.clip import Clip
from fedmm.privacy.layers import (
    NORMS,
    Convolution,
    as_2d,
    as_sequence,
    in_2d,
    is_plain_convolution,
    products,
    side_by_side,
    trained,
    trains,
    unfolded,
    unfolded_products,
    weight_gradient,
)
from fedmm.privacy.parts import DotPart, EmbeddingPart, Factors, Gradients, Groups, Make, Part, Pool, SumPart
from fedmm.schema import Batch

# S studies, P patients, T positions of a sequence, I inputs, O outputs of a layer; k studies of each of n patients

# Opacus' per-study gradients of a layer: (layer, inputs, gradient at the output) to {parameter: (S, ...)}.
Sampler = Callable[[nn.Module, list[Tensor], Tensor], Mapping[Tensor, Tensor]]
PASSES = 24  # products in the time of writing a value and reading it twice  # measured
POOLED = 2**20  # values of what goes into the pool: a copy of more costs more than a few calls  # measured
NARROW = 2**12  # weights up to which a convolution with a group for each study beats unfolding  # measured


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
        first = not any(value.requires_grad for value in inputs)
        kept = inputs if first else tuple(value.detach() for value in inputs)
        tape.append(Call(layer, kept, output, tuple(t._version for t in (*kept, output)), first))

        def enter(b: Tensor) -> None:
            call, tape[number] = tape[number], None  # let go as the pass goes on: as much memory as a plain one
            if call is not None and self.book is not None:
                self.book.enter(call, b)

        output.register_hook(enter)  # type: ignore[no-untyped-call]


class Book:
    """What one backward pass brings, layer by layer, and the parts that it makes of it.

    A patient's gradient of a layer is kept instead of what went in and came out where it takes no more than twice as much.
    """

    def __init__(self, samplers: Mapping[type[nn.Module], Sampler], groups: Groups, clip: Clip) -> None:
        self.samplers, self.groups, self.clip = samplers, groups, clip
        self._parts: list[Part] = []
        self._pooled: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def enter(self, call: Call, b: Tensor) -> None:
        """One layer. b: the gradient at its output."""
        layer, a = call.layer, call.inputs[0]
        share = self.clip.share_of(trained(layer)[0])
        if type(layer) is nn.Embedding:
            self._parts.append(EmbeddingPart(share, layer, a, b, self.groups))
        elif type(layer) in NORMS:
            scale, shift = NORMS[type(layer)](layer, a, b)
            self._pool(share, layer, weight=scale, bias=shift)
        elif type(layer) is nn.Linear:
            a_STI, b_STO = as_sequence(a), as_sequence(b)
            self._pool(share, layer, bias=b_STO.sum(1) if b_STO.shape[1] > 1 else b_STO[:, 0])
            self._linear(share, layer, a_STI, b_STO)
        elif is_plain_convolution(layer):
            self._pool(share, layer, bias=b.flatten(2).sum(2))
            self._convolution(share, layer, a, b)  # type: ignore[arg-type]
        else:
            self._sampled(share, call, b)

    def parts(self) -> list[Part]:
        return [*self._parts, *(Pool(share, rows, self.groups) for share, rows in self._pooled.items())]

    def _pool(self, share: int, layer: nn.Module, **found: Tensor) -> None:
        rows = [(getattr(layer, name), value) for name, value in found.items() if trains(layer, name)]
        if rows:
            self._pooled.setdefault(share, []).extend(rows)

    def _linear(self, share: int, layer: nn.Linear, a_STI: Tensor, b_STO: Tensor) -> None:
        groups = self.groups
        if not layer.weight.requires_grad:
            return
        keep = self._fits(layer.weight, a_STI, b_STO)
        if not self._dots(layer, b_STO.shape[1], keep=keep):
            self._sums(share, layer, a_STI, b_STO, lambda a, b, own: products(a[0], b, own), keep=keep)
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
                self._pool(share, layer, weight=side_by_side(layer, a, b))
            else:
                by_group: Callable[..., Tensor] = lambda a, b, own: own.sums(side_by_side(layer, a[0], b))  # noqa: E731
                self._sums(share, layer, a, b, by_group, keep=keep)
            return
        if not self._dots(layer, b[0, 0].numel(), keep=keep):
            self._sums(share, layer, a, b, lambda a, b, own: unfolded_products(layer, a[0], b, own), keep=keep)
            return

        def gradient(weighted_STO: Tensor, factors: Factors) -> Tensor:
            counted, weighted = factors.masked(a, groups.patient_S), weighted_STO.transpose(1, 2).reshape(b.shape)
            shape = (*weight.shape[:2], *in_2d(layer)[0])
            return weight_gradient(layer, as_2d(layer, counted), as_2d(layer, weighted), shape, 1).view(weight.shape)

        self._parts.append(DotPart(share, weight, *unfolded(layer, a, b), groups, gradient))

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
        whole: Make = lambda a, b, own: {weight: make(a, b, own).view(-1, *weight.shape)}  # noqa: E731
        self._parts.append(SumPart(share, (a,), b, self.groups, whole, weight.numel(), keep=keep))

    def _sampled(self, share: int, call: Call, b: Tensor) -> None:
        """By Opacus' gradients by study."""
        layer, sampler = call.layer, self.samplers[type(call.layer)]

        def make(inputs: Sequence[Tensor], b: Tensor, own: Groups) -> Gradients:
            found = sampler(layer, [value.contiguous() for value in inputs], b.contiguous())
            return {weight: own.sums(value) for weight, value in found.items() if weight.requires_grad}

        values = sum(parameter.numel() for parameter in trained(layer))
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
    weights = [id(p) for call in calls for p in trained(call.layer)]
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


def add_to(parameter: Tensor, total: Tensor) -> None:
    """To the sum of this logical batch."""
    parameter.summed_grad.add_(total)  # type: ignore[attr-defined]


class GhostClipper:
    """No gradient of a study in memory, but for small layers: see fedmm/privacy/ghost.py. The same sum as HooksClipper."""

    def __init__(self, model: TapedModel, clip: Clip) -> None:
        """Raises: PlanInvalid if the weights of one layer are in two groups."""
        self.model, self.clip = model, clip
        for layer in model.modules():
            if len({clip.share_of(p) for p in trained(layer)}) > 1:
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
