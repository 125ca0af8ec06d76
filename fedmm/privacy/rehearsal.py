"""Before anybody is charged, on made-up studies: does this model and loss bound one patient's share at all?

Shape checks cannot see a loss that compares studies with each other, a layer that mixes rows, or gradients that Opacus gets
wrong for an odd memory layout. Moving the other studies and looking can. Never run on patients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedmm.errors import PlanInvalid
from fedmm.privacy.clip import RULES, Clip
from fedmm.privacy.engine import PrivateModel, clipper_for
from fedmm.schema import Batch

Loss = Callable[[Any, Batch], Tensor]  # what the model gives, and the batch, to (S,)

SAME_SHAPE = 1e-5  # relative: nothing but chance may differ between two passes of one shape
OTHER_SHAPE = 1e-2  # relative: a GPU takes another kernel, in TF32; the mildest trap measured moves it by 25 %
UNCLIPPED = 1e20  # a norm that no made-up study reaches


def rehearse(
    model: PrivateModel,
    loss: Loss,
    batch: Batch,
    other: Batch,
    *,
    groups: Sequence[Iterable[nn.Parameter]] = (),
) -> None:
    """model: from `wrap`, in training mode.  batch, other: made-up studies of the same patients and shapes, all different.
    groups: of weights that a run may ask to clip apart; each clip rule is tried with them and without.

    Raises: PlanInvalid if a study's loss depends on other studies, by their values or their number, if a pass changes a
    buffer, if the gradients of all studies do not add up to autograd's own, or if the clipped sum is another one.
    """
    buffers = [(name, value.clone()) for name, value in model.named_buffers()]
    with _same_chance(batch):
        before_S = _losses(model, batch, loss)
    for patient in range(batch.patients):
        own_S = batch.patient_B == patient
        with _same_chance(batch):
            moved_S = _losses(model, _join(own_S, batch, other), loss)
        if not torch.allclose(moved_S[own_S], before_S[own_S], rtol=SAME_SHAPE, atol=SAME_SHAPE):
            raise _mixed("on the values of other patients' studies")
    model.eval()
    whole_S = _losses(model, batch, loss)
    for patient in range(batch.patients):
        own_S = batch.patient_B == patient
        alone_S = _losses(model, _rows(batch, own_S), loss)
        if not torch.allclose(alone_S, whole_S[own_S], rtol=OTHER_SHAPE, atol=SAME_SHAPE):
            raise _mixed("on the number of studies in the batch")
    model.train()
    _check_gradients(model, batch, loss, groups)
    now = dict(model.named_buffers())
    for name, value in buffers:
        if not torch.equal(value, now[name]):
            raise PlanInvalid(
                f"{name} is changed by a pass", why="it is part of the model and would leave without noise"
            )


def _mixed(how: str) -> PlanInvalid:
    return PlanInvalid(
        f"the loss of a study depends {how}",
        why="then one patient changes what others contribute, and clipping bounds nobody",
        fix="a layer or loss that looks at one study; negatives from a fixed public set",
    )


def _losses(model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
    """(S,). Without gradients, so that no hook keeps anything. Raises: PlanInvalid."""
    with torch.no_grad():
        loss_S = loss(model(batch.inputs, batch.seen_BM, batch.timeline), batch)
    if loss_S.shape != (batch.studies,):
        raise PlanInvalid("the loss must be one number for each study", why=f"its shape is {tuple(loss_S.shape)}")
    return loss_S


def _check_gradients(model: PrivateModel, batch: Batch, loss: Loss, groups: Sequence[Iterable[nn.Parameter]]) -> None:
    """Against plain autograd, patient by patient: unclipped, then by each rule with a bound that some are above."""
    parameters: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
    plain_PK = _plain(model, batch, loss, parameters)
    norm_P = torch.stack([torch.cat([g.flatten() for g in plain_K]).double().norm() for plain_K in plain_PK])
    some = max(float(norm_P.mean()), 1e-6)
    tried = [(Clip(parameters), UNCLIPPED)]
    tried += [(Clip(parameters, rule=rule, groups=g), some) for rule in RULES for g in ((), groups)[: 1 + bool(groups)]]
    for clip, bound in tried:
        found = _clipped_sum(model, batch, loss, clip, bound)
        expected = _clipped_here(plain_PK, parameters, clip, bound)
        if not float((found - expected).norm()) <= OTHER_SHAPE * float(expected.norm()):
            raise PlanInvalid(
                "the gradients of single studies do not add up to the gradient"
                if bound == UNCLIPPED
                else f"clipping by the rule {clip.rule}, {clip.shares} groups of weights apart, gives another sum than it must",
                why="a layer's gradient for each study is wrong, so clipping would bound something else",
                fix="use another layer, or see docs/pitfalls.md",
            )


def _plain(model: PrivateModel, batch: Batch, loss: Loss, parameters: Sequence[nn.Parameter]) -> list[list[Tensor]]:
    """By patient and parameter: autograd's own gradients, of one forward pass, so that chance is that of the others."""
    with _same_chance(batch), model.without_hooks():
        loss_S = loss(model(batch.inputs, batch.seen_BM, batch.timeline), batch)
        return [
            list(
                torch.autograd.grad(
                    loss_S[batch.patient_B == patient].sum(),
                    parameters,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
            for patient in range(batch.patients)
        ]


def _clipped_sum(model: PrivateModel, batch: Batch, loss: Loss, clip: Clip, bound: float) -> Tensor:
    """(parameters,) as the engine makes it."""
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
    clipper = clipper_for(model, parameters, clip)
    clipper.clear()
    for parameter in parameters:
        parameter.summed_grad = torch.zeros_like(parameter)
    with _same_chance(batch):
        clipper.add(loss(clipper.logits(batch), batch).sum(), batch, bound)
    clipper.clear()
    return torch.cat([p.summed_grad.flatten() for p in parameters])


def _clipped_here(
    plain_PK: Sequence[Sequence[Tensor]], parameters: Sequence[nn.Parameter], clip: Clip, bound: float
) -> Tensor:
    """(parameters,) the sum as it must be: each patient's shares apart, each times its factor."""
    shares = [clip.share_of(parameter) for parameter in parameters]
    square_PG = [[0.0] * clip.shares for _ in plain_PK]
    for squares, plain_K in zip(square_PG, plain_PK, strict=True):
        for share, gradient in zip(shares, plain_K, strict=True):
            squares[share] += float(gradient.double().square().sum())
    factor_GP, _ = clip.factors(torch.tensor(square_PG, dtype=torch.float64).T.sqrt(), bound)
    return torch.stack(
        [
            torch.cat(
                [gradient.flatten() * float(factor_GP[s, p]) for s, gradient in zip(shares, plain_K, strict=True)]
            )
            for p, plain_K in enumerate(plain_PK)
        ]
    ).sum(0)


@contextmanager
def _same_chance(batch: Batch) -> Iterator[None]:
    """Dropout draws the same in each; nobody else's chance moves."""
    device = batch.seen_BM.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _join(own_S: Tensor, batch: Batch, other: Batch) -> Batch:
    """The chosen studies of `batch`, all others from `other`."""

    def mix(mine: Tensor, theirs: Tensor) -> Tensor:
        return torch.where(own_S.view(-1, *[1] * (mine.dim() - 1)), mine, theirs)

    return replace(
        batch,
        inputs={name: mix(value, other.inputs[name]) for name, value in batch.inputs.items()},
        seen_BM=mix(batch.seen_BM, other.seen_BM),
        finding_BF=mix(batch.finding_BF, other.finding_BF),
        class_B=mix(batch.class_B, other.class_B),
        further_BK=mix(batch.further_BK, other.further_BK),
        day_B=mix(batch.day_B, other.day_B),
        key_B=mix(batch.key_B, other.key_B),
    )


def _rows(batch: Batch, own_S: Tensor) -> Batch:
    """One patient alone."""
    return Batch(
        inputs={name: value[own_S] for name, value in batch.inputs.items()},
        seen_BM=batch.seen_BM[own_S],
        finding_BF=batch.finding_BF[own_S],
        class_B=batch.class_B[own_S],
        patient_B=torch.zeros_like(batch.patient_B[own_S]),
        patients=1,
        further_BK=batch.further_BK[own_S],
        day_B=batch.day_B[own_S],
        key_B=batch.key_B[own_S],
    )
