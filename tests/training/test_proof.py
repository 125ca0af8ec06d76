"""A proof on the training loop passes honest code and fails where nothing could have gone wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedmm.config import ModelConfig, TrainingConfig
from fedmm.models.heads import Objective
from fedmm.models.multimodal import ModelSpec
from fedmm.schema import Batch
from fedmm.training.loop import Workbench
from fedmm.training.proof import FAR, LEAST, LIMIT, SMALL, TINY, sensitivity
from tests import tiny
from tests.privacy.measure import plan

CONFIG = TrainingConfig(batch_size=8, modality_dropout=0.0, device="cpu").model_copy(update={"learning_rate": FAR * 8})


def prove(**settings: str) -> tuple[bool, str]:
    bench = Workbench(
        ModelSpec(inputs=SMALL, model=ModelConfig(width=4), labels=tiny.LABELS), torch.device("cpu"), clipping="ghost"
    )
    found = sensitivity(bench, plan(), CONFIG.model_copy(update=settings), max_grad_norm=TINY, least=LEAST)
    return found.passed, found.measured


@pytest.mark.parametrize("settings", [{}, {"clip_groups": "modality"}, {"clip_rule": "auto"}], ids=str)
def test_where_everybody_is_clipped_the_sensitivity_is_c(settings: dict[str, str]) -> None:
    passed, measured = prove(**settings)
    assert passed
    assert LEAST < float(measured.split()[0]) <= LIMIT


def test_a_model_that_nobody_moves_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All gradients are zero, whoever is in: 0 C was within the bound, and the check passed."""
    honest = Objective.__call__

    def still(self: Objective, output: Tensor, batch: Batch) -> Tensor:
        return honest(self, output, batch) * 0.0

    monkeypatch.setattr(Objective, "__call__", still)
    passed, measured = prove()
    assert not passed
    assert measured == "0.00000 C, so no patient's gradient was longer than C = 0.01: it proves nothing"
