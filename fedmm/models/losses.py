"""The loss of each kind of labels on its own logits: (B,) sums over a study's known labels, and (B,) how many those are.

Every row looks at its own study alone, and no divisor or weight comes from the batch: a mean over the valid labels of a
batch, or class weights that are counted in it, let one patient change the weight of another (../shared/privacy.md: 2.73 C
and 12.2 C). A missing label gives no loss and no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

# B studies, F findings, C classes, K levels above the least, T intervals of time

LEAST_MISS = 1e-7  # 1 - p below float32's resolution: a power below 1 of it would have an endless slope


class Part(NamedTuple):
    """sum_B over the labels that are known.  count_B: how many."""

    sum_B: Tensor
    count_B: Tensor


def of_findings(
    logits_BF: Tensor, finding_BF: Tensor, *, gamma: float, smoothing: float, positive_weight: float
) -> Part:
    """Binary cross entropy; focal where gamma > 0. finding_BF: 0, 1 or NaN.

    Source: Lin et al. 2017, on soft targets: each outcome's term is (1 - its probability)^gamma times its cross entropy.
    """
    known_BF = ~finding_BF.isnan()
    target_BF = torch.where(known_BF, finding_BF, 0.0) * (1 - smoothing) + smoothing / 2
    yes_BF, no_BF = logsigmoid(logits_BF), logsigmoid(-logits_BF)
    present_BF, absent_BF = -positive_weight * target_BF * yes_BF, -(1 - target_BF) * no_BF
    if gamma > 0:  # by exp and not pow, whose slope at 0 is endless
        present_BF, absent_BF = present_BF * (gamma * no_BF).exp(), absent_BF * (gamma * yes_BF).exp()
    return _total(present_BF + absent_BF, known_BF)


def of_class(logits_BC: Tensor, class_B: Tensor, *, gamma: float, smoothing: float) -> Part:
    """Categorical cross entropy; focal where gamma > 0. class_B: -1 is missing."""
    classes = logits_BC.shape[1]
    right_BC = torch.nn.functional.one_hot(class_B.clamp(min=0), classes).to(logits_BC.dtype)
    target_BC = right_BC * (1 - smoothing) + smoothing / classes
    log_BC = logits_BC.log_softmax(1)
    terms_BC = -target_BC * log_BC
    if gamma > 0:
        terms_BC = terms_BC * (1 - log_BC.exp()).clamp(min=LEAST_MISS).pow(gamma)
    return _total(terms_BC.sum(1, keepdim=True), (class_B >= 0).unsqueeze(1))


def of_level(logits_BK: Tensor, level_B: Tensor, *, smoothing: float) -> Part:
    """Mean over the thresholds of binary cross entropy on "at least this level". level_B: 0 … K, NaN is missing.

    Source: Cao et al. 2020 (CORAL), with the mean for its sum, so that the label weighs as one.
    """
    above = logits_BK.shape[1]
    step_K = torch.arange(1, above + 1, device=logits_BK.device)
    known_B1 = ~level_B.isnan().unsqueeze(1)
    reached_BK = torch.where(known_B1, level_B.unsqueeze(1), 0.0) >= step_K
    even_K = 1 - step_K / (above + 1)  # all levels alike
    target_BK = reached_BK.to(logits_BK.dtype) * (1 - smoothing) + smoothing * even_K
    loss_BK = -target_BK * logsigmoid(logits_BK) - (1 - target_BK) * logsigmoid(-logits_BK)
    return _total(loss_BK.mean(1, keepdim=True), known_B1)


def of_value(scaled_B: Tensor, value_B: Tensor, value_range: tuple[float, float]) -> Part:
    """Squared error on the public range, which is 0 … 1. scaled_B: of the model.  value_B: NaN is missing."""
    low, high = value_range
    known_B = ~value_B.isnan()
    target_B = ((torch.where(known_B, value_B, low) - low) / (high - low)).clamp(0.0, 1.0)
    return _total((scaled_B - target_B).square().unsqueeze(1), known_B.unsqueeze(1))


def of_time(logits_BT: Tensor, time_B: Tensor, event_B: Tensor, edges: tuple[float, ...]) -> Part:
    """Negative log likelihood of hazards per interval of time, censored studies included.

    Interval t ends at edges[t], which belongs to it. A study counts as having lived through the intervals before its event,
    or through those that ended before its observation did; an event adds the hazard of its own interval. Beyond the last
    edge all intervals were lived through. One that was lost in the first interval says nothing: no label.
    Source: Gensheimer and Narasimhan 2019.
    """
    edge_T = torch.tensor(edges, dtype=logits_BT.dtype, device=logits_BT.device)
    known_B = ~(time_B.isnan() | event_B.isnan())
    time_B1 = torch.where(known_B, time_B, 0.0).to(logits_BT.dtype).unsqueeze(1).contiguous()
    before_B1 = torch.bucketize(time_B1, edge_T)
    here_BT = torch.arange(len(edges), device=logits_BT.device) == before_B1
    hit_BT = here_BT & (event_B > 0.5).unsqueeze(1) & known_B.unsqueeze(1)
    lived_BT = (edge_T <= time_B1) & ~hit_BT
    loss_BT = torch.where(lived_BT, softplus(logits_BT), 0.0) + torch.where(hit_BT, softplus(-logits_BT), 0.0)
    return _total(loss_BT.sum(1, keepdim=True), (lived_BT | hit_BT).any(1, keepdim=True))


def _total(loss_BF: Tensor, known_BF: Tensor) -> Part:
    return Part((loss_BF * known_BF).sum(1), known_BF.sum(1).to(loss_BF.dtype))
