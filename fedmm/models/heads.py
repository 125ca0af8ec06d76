"""Head and loss: (B, D) -> (B, F + C) logits; one loss per study, of shape (B,)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmm.schema import Batch, Labels

# B studies, D width, F findings, C classes, O = F + C outputs, V views


@dataclass(frozen=True)
class Output:
    """What a model gives whose fusion trains more than its answer (fusion.Fused); every other gives the answer alone.

    answer_BO: logits.  views_BVO: logits of each view.  trained_BV: bool, which views are trained on the labels as well.
    penalty_B: added to the study's loss.
    """

    answer_BO: Tensor
    views_BVO: Tensor
    trained_BV: Tensor
    penalty_B: Tensor


def answer(output: Tensor | Output) -> Tensor:
    """(B, O) the logits that are asked for."""
    return output.answer_BO if isinstance(output, Output) else output


class Head(nn.Module):
    """Logits of the findings, then of the classes, in the order of `Labels.outputs`."""

    def __init__(self, width: int, labels: Labels) -> None:
        super().__init__()
        self.output = nn.Linear(width, len(labels.outputs))

    def forward(self, z_BD: Tensor) -> Tensor:
        out: Tensor = self.output(z_BD)
        return out


def study_loss(output: Tensor | Output, batch: Batch) -> Tensor:
    """(B,) what training lowers: the loss of the answer, of the study's trained views (their mean), and the penalty.

    Each term is the study's own: a view counts where its own modality is present, whatever the others in the batch have.
    """
    if not isinstance(output, Output):
        return label_loss(output, batch)
    views_BV = torch.stack([label_loss(view_BO, batch) for view_BO in output.views_BVO.unbind(1)], dim=1)
    trained_BV = output.trained_BV.to(views_BV.dtype)
    of_views_B = (views_BV * trained_BV).sum(1) / trained_BV.sum(1).clamp(min=1)
    return label_loss(output.answer_BO, batch) + of_views_B + output.penalty_B


def label_loss(logits_BO: Tensor, batch: Batch) -> Tensor:
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


def probabilities(output: Tensor | Output, labels: Labels) -> Tensor:
    """(B, F + C) of the answer: sigmoid for the findings, softmax over the classes."""
    logits_BO = answer(output)
    findings = len(labels.findings)
    return torch.cat([logits_BO[:, :findings].sigmoid(), logits_BO[:, findings:].softmax(1)], dim=1)
