"""Canaries in the real local training: patients of whom it is known, to the audit alone, whether they are in.

A **Dirac canary** is the worst patient that clipping allows: a gradient along one coordinate in each set of weights that is
clipped apart, a hundred times too long, whatever the weights are. It is drawn by the real sampler, shortened by the real clip
rule, and gets the real noise; only its own gradient is made up. Canaries of distinct coordinates do not disturb each other
(Nasr et al. 2023, Steinke et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmm.models.heads import Objective
from fedmm.privacy.clip import Clip
from fedmm.privacy.engine import Clipper, PrivateModel
from fedmm.privacy.ghost import add_to
from fedmm.schema import Batch
from fedmm.training.local import clip_groups
from fedmm.training.loop import PREDICT_STUDIES, Cohort, Workbench, made_up

# M canaries
KEY = 2**63 - 1  # of the blank study that stands for Dirac canaries in a batch; patients' are hashes
TOO_LONG = 100.0  # times the clipping norm: a canary that is not shortened stands out


class Diracs:
    """Canaries, each with a coordinate of its own in every share of the weights that is clipped apart, and a sign.

    Over all shares a canary is as long as clipping allows. shares: the trained weights by name, in sets that share a bound.
    in_M: whether each is among the patients. A share with fewer weights than canaries has none of them.
    """

    def __init__(
        self, shares: Sequence[Mapping[str, Tensor]], in_M: NDArray[np.bool_], rng: np.random.Generator
    ) -> None:
        self.in_M = in_M
        self.sign_M = rng.choice(np.array([-1.0, 1.0]), len(in_M))
        self.sampled: list[int] = []  # of the batch that is being worked on
        self._at: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        for weights in shares:
            first = np.cumsum([0, *(weight.numel() for weight in weights.values())])
            if first[-1] >= len(in_M):
                place_M = rng.choice(int(first[-1]), len(in_M), replace=False)
                which_M = np.searchsorted(first, place_M, side="right") - 1
                self._at |= {
                    name: (np.flatnonzero(which_M == k), place_M[which_M == k] - first[k])
                    for k, name in enumerate(weights)
                }

    @property
    def inside(self) -> list[int]:
        return [int(canary) for canary in np.flatnonzero(self.in_M)]

    def along(self, change: Mapping[str, Tensor]) -> NDArray[np.float64]:
        """(M,) how far each went in its own direction: higher for one that is in. change: weights before, less after."""
        score_M: NDArray[np.float64] = np.zeros(len(self.in_M))
        for name, (canaries, places) in self._at.items():
            score_M[canaries] += change[name].detach().cpu().double().flatten().numpy()[places]
        out_M: NDArray[np.float64] = score_M * self.sign_M
        return out_M

    def gradients(self, lengths: Mapping[str, float], weights: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(weight, sum of the sampled canaries' gradients). lengths: of each gradient, by name of its weight."""
        here = np.zeros(len(self.in_M), dtype=bool)
        here[self.sampled] = True
        for name, (canaries, places) in self._at.items():
            if (mine := here[canaries]).any():
                total = torch.zeros(weights[name].numel(), dtype=torch.float64)
                values = self.sign_M[canaries[mine]] * lengths[name]
                total[torch.from_numpy(places[mine])] = torch.from_numpy(values)
                weight = weights[name]
                yield weight, total.view(weight.shape).to(weight.device, weight.dtype)


class CanaryModel(nn.Module):
    """A private model that gives Dirac canaries their gradients; all other patients pass through to what it is around."""

    def __init__(self, model: PrivateModel, weights: Mapping[str, Tensor], diracs: Diracs) -> None:
        super().__init__()
        self.inner, self._weights, self._diracs = model, dict(weights), diracs

    def forward(self, *values: object) -> Any:
        return self.inner(*values)

    def clipper(self, parameters: Sequence[nn.Parameter], clip: Clip) -> CanaryClipper:
        return CanaryClipper(self.inner.clipper(parameters, clip), clip, self.inner, self._weights, self._diracs)


class CanaryClipper:
    """As Clipper; the batch of canaries is shortened by the same `Clip.factors` as everybody."""

    def __init__(
        self, inner: Clipper, clip: Clip, model: nn.Module, weights: Mapping[str, Tensor], diracs: Diracs
    ) -> None:
        self.inner, self.clip, self.model, self.weights, self.diracs = inner, clip, model, weights, diracs

    def logits(self, batch: Batch) -> Any:
        if not _are_diracs(batch):
            return self.inner.logits(batch)
        with torch.no_grad():  # only so that the loss has its shape
            return self.model(batch.inputs, batch.seen_BM, batch.timeline)

    def add(self, loss: Tensor, batch: Batch, max_norm: float) -> int:
        if not _are_diracs(batch):
            return self.inner.add(loss, batch, max_norm)
        lengths = {}
        for name, weight in self.weights.items():
            norm_GP = torch.zeros(self.clip.shares, 1, dtype=torch.float64)
            norm_GP[self.clip.share_of(weight)] = TOO_LONG * max_norm
            factor_GP, _ = self.clip.factors(norm_GP, max_norm)
            lengths[name] = float(factor_GP[self.clip.share_of(weight), 0]) * TOO_LONG * max_norm
        for weight, total in self.diracs.gradients(lengths, self.weights):
            add_to(weight, total)
        return 0

    def clear(self) -> None:
        self.inner.clear()


def _are_diracs(batch: Batch) -> bool:
    return batch.patients == 1 and bool((batch.key_B == KEY).all())


class WithDiracs:
    """A cohort with the canaries that are in it behind its patients. As loop.Cohort."""

    def __init__(self, cohort: Cohort, diracs: Diracs, blank: Batch) -> None:
        """blank: one study of one patient, with KEY."""
        self.cohort, self.diracs, self.blank = cohort, diracs, blank

    @property
    def patients(self) -> int:
        return self.cohort.patients + len(self.diracs.inside)

    def physical(
        self,
        patients: Sequence[int],
        *,
        limit: int,
        max_studies: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Iterator[Batch]:
        own = [patient for patient in patients if patient < self.cohort.patients]
        inside = self.diracs.inside
        sampled = [inside[patient - self.cohort.patients] for patient in patients if patient >= self.cohort.patients]
        real = self.cohort.physical(own, limit=limit, max_studies=max_studies, rng=rng)

        def batches() -> Iterator[Batch]:
            yield from real
            self.diracs.sampled = sampled
            if sampled:
                yield self.blank

        return batches()

    def records(self, most: int, rng: np.random.Generator) -> Cohort:
        return WithDiracs(self.cohort.records(most, rng), self.diracs, self.blank)


def among(bench: Workbench, cohort: Cohort, diracs: Diracs) -> Cohort:
    """The cohort with the canaries, on a bench whose private model knows them from now on."""
    bench.around_private(lambda model: CanaryModel(model, trained_of(bench), diracs))
    blank = made_up(bench.model.spec, (1,), 0)
    blank.key_B.fill_(KEY)
    return WithDiracs(cohort, diracs, blank)


def trained_of(bench: Workbench) -> dict[str, Tensor]:
    return {name: weight for name, weight in bench.trained().items() if weight.requires_grad}


def shares_of(bench: Workbench, groups: str) -> list[dict[str, Tensor]]:
    """The trained weights as `training.clip_groups` has them clipped."""
    trained = trained_of(bench)
    found = [{id(p) for p in group} for group in clip_groups(bench.model, groups)]
    apart = [{name: weight for name, weight in trained.items() if id(weight) in ids} for ids in found]
    return [share for share in apart if share] or [trained]


def patient_losses(bench: Workbench, cohort: Cohort, objective: Objective) -> NDArray[np.float64]:
    """(P,) the mean loss of each patient's studies, without anything that chance does in training."""
    model, found = bench.model.eval(), []
    with torch.no_grad():
        for batch in cohort.physical(range(cohort.patients), limit=PREDICT_STUDIES):
            batch = batch.to(bench.device)
            loss_S = objective(model(batch.inputs, batch.seen_BM, batch.timeline), batch).double()
            studies_P = torch.bincount(batch.patient_B, minlength=batch.patients)
            sum_P = torch.zeros(batch.patients, dtype=torch.float64, device=loss_S.device)
            found.append((sum_P.index_add_(0, batch.patient_B, loss_S) / studies_P).cpu().numpy())
    return np.concatenate(found)
