"""Head, probabilities and objective: (B, D) to the logits of every kind of label, and to one loss per study, (B,)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from fedmm.config import TrainingConfig
from fedmm.models import losses
from fedmm.schema import Batch, Labels

# B studies, D width, F findings, C classes, K levels above the least, T intervals of time, V views, J kinds of labels
# O = F + C + K + 1 + T outputs, of the kinds that there are

LARGEST_DOUBT = 4.0  # guess: a kind's weight stays within exp(-4) … exp(4)


@dataclass(frozen=True)
class Output:
    """What a model gives whose fusion trains more than its answer (fusion.Fused), or that learns how kinds of labels share.

    answer_BO: logits.  views_BVO: logits of each view, V may be 0.  trained_BV: bool, which views are trained on the labels
    as well.  penalty_B: added to the study's loss.  doubt_BJ: log variance of each kind of labels in the order of
    `kinds`; None: all labels count alike.
    """

    answer_BO: Tensor
    views_BVO: Tensor
    trained_BV: Tensor
    penalty_B: Tensor
    doubt_BJ: Tensor | None = None


def answer(output: Tensor | Output) -> Tensor:
    """(B, O) the logits that are asked for."""
    return output.answer_BO if isinstance(output, Output) else output


def kinds(labels: Labels) -> dict[str, slice]:
    """Which columns of (B, O) belong to which kind of labels, in the order of `Labels.outputs`; only kinds that there are."""
    sizes = {
        "findings": len(labels.findings),
        "class": len(labels.class_values),
        "ordinal": max(0, len(labels.ordinal_levels) - 1),
        "regression": int(bool(labels.value_name)),
        "survival": len(labels.time_edges),
    }
    found, first = {}, 0
    for kind, size in sizes.items():
        if size:
            found[kind] = slice(first, first + size)
        first += size
    return found


class Head(nn.Module):
    """Logits in the order of `Labels.outputs`: findings, classes, levels, the scaled value, the hazard of each interval.

    Levels share one score, and thresholds that rise: proportional odds (McCullagh 1980). With few patients that is one row
    of weights where a free logit per level would be several. The gaps between thresholds are an Embedding(1, …): a bare
    nn.Parameter has no gradient per study.
    """

    def __init__(self, width: int, labels: Labels) -> None:
        super().__init__()
        self.gaps = max(0, len(labels.ordinal_levels) - 2)
        self.output = nn.Linear(width, len(labels.outputs) - self.gaps)
        if self.gaps:
            self.score = kinds(labels)["ordinal"].start
            self.gap = nn.Embedding(1, self.gaps)

    def forward(self, z_BD: Tensor) -> Tensor:
        out: Tensor = self.output(z_BD)
        if not self.gaps:
            return out
        down_BK = nn.functional.softplus(_learnt(self.gap, z_BD)).cumsum(1)
        first, after = out[:, : self.score + 1], out[:, self.score + 1 :]
        return torch.cat([first, first[:, -1:] - down_BK, after], dim=1)


class Doubt(nn.Module):
    """(B, J) the learnt log variance of each kind of labels, the same for every study. Source: Kendall et al. 2018."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.log_variance = nn.Embedding(1, len(kinds(labels)))
        nn.init.zeros_(self.log_variance.weight)

    def forward(self, output: Tensor | Output) -> Output:
        """The same output, with the doubt beside it. It stays within LARGEST_DOUBT, smoothly, whatever the weights."""
        answer_BO = answer(output)
        doubt_BJ = LARGEST_DOUBT * (_learnt(self.log_variance, answer_BO) / LARGEST_DOUBT).tanh()
        if isinstance(output, Output):
            return Output(answer_BO, output.views_BVO, output.trained_BV, output.penalty_B, doubt_BJ)
        views_BVO = answer_BO.new_zeros(len(answer_BO), 0, answer_BO.shape[1])
        return Output(answer_BO, views_BVO, views_BVO[..., 0] > 0, answer_BO.new_zeros(len(answer_BO)), doubt_BJ)


def _learnt(table: nn.Embedding, rows: Tensor) -> Tensor:
    """(B, …) the table's one row, read for every study."""
    row: Tensor = table(torch.zeros(len(rows), dtype=torch.int64, device=rows.device))
    return row


@dataclass(frozen=True)
class Objective:
    """What training lowers: `objective(output, batch)` is (B,), each number from its own study alone.

    The settings are those of TrainingConfig; all are public, none is counted from patients.
    """

    labels: Labels
    loss: str = "cross_entropy"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    positive_weight: float = 1.0

    @classmethod
    def from_config(cls, training: TrainingConfig, labels: Labels) -> Objective:
        return cls(labels, training.loss, training.focal_gamma, training.label_smoothing, training.positive_weight)

    def __call__(self, output: Tensor | Output, batch: Batch) -> Tensor:
        """(B,) the loss of the answer, of the study's trained views (their mean), and the penalty.

        Each term is the study's own: a view counts where its own modality is present, whatever the others in the batch have.
        """
        if not isinstance(output, Output):
            return self._shared(output, None, batch)
        loss_B = self._shared(output.answer_BO, output.doubt_BJ, batch) + output.penalty_B
        if not output.views_BVO.shape[1]:
            return loss_B
        each_view = output.views_BVO.unbind(1)
        views_BV = torch.stack([self._shared(view_BO, output.doubt_BJ, batch) for view_BO in each_view], dim=1)
        trained_BV = output.trained_BV.to(views_BV.dtype)
        return loss_B + (views_BV * trained_BV).sum(1) / trained_BV.sum(1).clamp(min=1)

    def _shared(self, logits_BO: Tensor, doubt_BJ: Tensor | None, batch: Batch) -> Tensor:
        """(B,) without doubt the mean over the study's own known labels, whatever their kind; 0 for a study without labels.

        With doubt s the sum over the kinds it has labels of, each exp(-s) times the kind's own mean, plus s.
        """
        parts = [self._part(kind, logits_BO[:, columns], batch) for kind, columns in kinds(self.labels).items()]
        sum_BJ, count_BJ = (torch.stack(values, dim=1) for values in zip(*parts, strict=True))
        if doubt_BJ is None:
            return sum_BJ.sum(1) / count_BJ.sum(1).clamp(min=1)
        mean_BJ = sum_BJ / count_BJ.clamp(min=1)
        return ((mean_BJ * (-doubt_BJ).exp() + doubt_BJ) * (count_BJ > 0)).sum(1)

    def _part(self, kind: str, logits_BO: Tensor, batch: Batch) -> losses.Part:
        labels, smoothing = self.labels, self.label_smoothing
        gamma = self.focal_gamma if self.loss == "focal" else 0.0
        if kind == "findings":
            weight = self.positive_weight
            return losses.of_findings(
                logits_BO, batch.finding_BF, gamma=gamma, smoothing=smoothing, positive_weight=weight
            )
        if kind == "class":
            return losses.of_class(logits_BO, batch.class_B, gamma=gamma, smoothing=smoothing)
        further = dict(zip(labels.further, batch.further_BK.unbind(1), strict=True))
        if kind == "ordinal":
            return losses.of_level(logits_BO, further[labels.ordinal_name], smoothing=smoothing)
        if kind == "regression":
            return losses.of_value(logits_BO[:, 0], further[labels.value_name], labels.value_range)
        return losses.of_time(logits_BO, further[labels.time_name], further[labels.event_name], labels.time_edges)


def study_loss(output: Tensor | Output, batch: Batch) -> Tensor:
    """(B,) the objective of the default settings where labels are findings and a class alone: the shapes tell how many.

    Raises: ValueError for other labels; they need an `Objective`.
    """
    if batch.further_BK.shape[1]:
        raise ValueError("study_loss knows findings and a class; for further labels make an Objective")
    findings = batch.finding_BF.shape[1]
    return _plain_objective(findings, answer(output).shape[1] - findings)(output, batch)


@lru_cache(maxsize=16)
def _plain_objective(findings: int, classes: int) -> Objective:
    values = tuple(str(c) for c in range(classes))
    names = tuple(str(f) for f in range(findings))
    return Objective(Labels(findings=names, class_name="class" if values else "", class_values=values))


def probabilities(output: Tensor | Output, labels: Labels) -> Tensor:
    """(B, O) of the answer, as `Labels.outputs` names them.

    Findings by sigmoid, classes by softmax, P(level >= k), the value on its own scale and within its range, P(T <= edge) by
    the hazards. Guarantee: never rising from level to level, never falling from edge to edge.
    """
    logits_BO = answer(output)
    found = []
    for kind, columns in kinds(labels).items():
        own_BO = logits_BO[:, columns]
        if kind == "class":
            found.append(own_BO.softmax(1))
        elif kind == "ordinal":  # an answer that joins several views with negative weights may cross its thresholds
            found.append(own_BO.sigmoid().cummin(1).values)
        elif kind == "regression":
            low, high = labels.value_range
            found.append(low + (high - low) * own_BO.clamp(0.0, 1.0))
        elif kind == "survival":
            found.append(-torch.expm1(nn.functional.logsigmoid(-own_BO).cumsum(1)))
        else:
            found.append(own_BO.sigmoid())
    return torch.cat(found, dim=1)
