"""Head and loss: (B, D) -> (B, F + C) logits; one loss per study, of shape (B,)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmm.schema import Batch, Labels

# B studies, D width, F findings, C classes


class Head(nn.Module):
    """Logits of the findings, then of the classes, in the order of `Labels.outputs`."""

    def __init__(self, width: int, labels: Labels) -> None:
        super().__init__()
        self.output = nn.Linear(width, len(labels.outputs))

    def forward(self, z_BD: Tensor) -> Tensor:
        out: Tensor = self.output(z_BD)
        return out


def study_loss(logits_BO: Tensor, batch: Batch) -> Tensor:
    """Mean over the study's own labels of binary or categorical cross entropy, (B,); 0 for a study without labels.

    The divisor is the study's own number of labels, never the batch's: a mean over the valid labels of a batch lets one
    patient change the weight of another (measured 2.73 C in ../shared/privacy.md).
    """
    findings = batch.finding_BF.shape[1]
    known_BF = ~batch.finding_BF.isnan()
    target_BF = torch.where(known_BF, batch.finding_BF, torch.zeros_like(batch.finding_BF))
    loss_BF = nn.functional.binary_cross_entropy_with_logits(logits_BO[:, :findings], target_BF, reduction="none")
    total_B = (loss_BF * known_BF).sum(1)
    count_B = known_BF.sum(1).to(total_B.dtype)
    if logits_BO.shape[1] > findings:
        known_B = batch.class_B >= 0
        loss_B = nn.functional.cross_entropy(logits_BO[:, findings:], batch.class_B.clamp(min=0), reduction="none")
        total_B = total_B + loss_B * known_B
        count_B = count_B + known_B.to(count_B.dtype)
    return total_B / count_B.clamp(min=1)


def probabilities(logits_BO: Tensor, labels: Labels) -> Tensor:
    """(B, F + C): sigmoid for the findings, softmax over the classes."""
    findings = len(labels.findings)
    return torch.cat([logits_BO[:, :findings].sigmoid(), logits_BO[:, findings:].softmax(1)], dim=1)
