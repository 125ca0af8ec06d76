"""What one layer, or many small ones, add to a patient's norm and to the clipped sum: the forms that ghost.py chooses from.

In the precision of the layer, with a margin: a square is made larger by SLACK of its terms' squares, because the float32 sum
of what cancels is off by more than its own share. It costs 5e-6 of the norm where nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

# S studies, P patients, T positions of a sequence, I inputs, O outputs of a layer; k studies of each of n patients

HELD = 2**23  # values at a time of what is not kept, 32 MB: guess
SLACK = {torch.float32: 1e-5, torch.float64: 1e-13}


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

    def products(self, left_STX: Tensor, right_STY: Tensor) -> Tensor:
        """(P, X, Y): sum over a patient's studies and positions of left rightᵀ."""
        parts = list(zip(self.split(left_STX), self.split(right_STY), strict=True))
        out = left_STX.new_empty(sum(len(left) for left, _ in parts), left_STX.shape[2], right_STY.shape[2])
        first = 0
        for left_nTX, right_nTY in parts:
            torch.bmm(left_nTX.transpose(1, 2), right_nTY, out=out[first : first + len(left_nTX)])
            first += len(left_nTX)
        return self._by_patient(out)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """(n, ...) of what `split` gave, one after the other, to (P, ...)."""
        return self._by_patient(torch.cat(list(parts)))

    def _by_patient(self, whole: Tensor) -> Tensor:
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
    """Gradients by study side by side, so that many small weights cost no more calls than one. rows: weights and their (S, ...)."""

    def __init__(self, share: int, rows: Rows, groups: Groups) -> None:
        self.share, self.weights = share, [weight for weight, _ in rows]
        self.sum_PN = groups.sums(torch.cat([value.flatten(1) for _, value in rows], 1))

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
