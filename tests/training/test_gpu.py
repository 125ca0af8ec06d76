"""On a GPU: the same sum as on the CPU, the same bound, noise all over. `make gpu-check` runs these and a table."""

from __future__ import annotations

import pytest
import torch

from fedmm.config import TrainingConfig
from fedmm.models.heads import study_loss
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.engine import CLIPPING
from fedmm.privacy.noise import SystemNoise
from fedmm.training.loop import Workbench, train
from fedmm.training.proof import FAR, LEAST, SMALL, TINY, hospital_of, sensitivity
from tests import tiny
from tests.models.test_device import BY_VALUE
from tests.privacy.measure import clipped_sum, engine_on, plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: make gpu-check fails without one"),
]
LEAVES = [{}, *({kind: name} for kind, names in BY_VALUE.items() for name in names)]


def bench(device: str, clipping: str, leaves: dict[str, str]) -> Workbench:
    spec = ModelSpec(inputs=SMALL, model=tiny.leaves(**leaves), labels=tiny.LABELS)
    return Workbench(spec, torch.device(device), clipping=clipping)


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("leaves", LEAVES, ids=str)
def test_the_clipped_sum_is_the_cpus(leaves: dict[str, str], clipping: str) -> None:
    cpu, gpu = (bench(device, clipping, leaves).model for device in ("cpu", "cuda"))
    gpu.load_state_dict(cpu.state_dict())
    batch = tiny.batch((1, 2, 3, 1), inputs=SMALL)
    here, there = (engine_on(model, clipping=clipping) for model in (cpu, gpu))
    expected = clipped_sum(here, batch, loss=study_loss)
    found = clipped_sum(there, batch.to("cuda"), loss=study_loss).cpu()
    assert float((found - expected).norm() / expected.norm()) < 1e-2  # TF32 in convolutions: guess


@pytest.mark.parametrize("clipping", CLIPPING)
def test_a_patient_moves_the_weights_by_c_at_most(clipping: str) -> None:
    config = TrainingConfig(batch_size=8, modality_dropout=0.0).model_copy(update={"learning_rate": FAR * 8})
    found = sensitivity(bench("cuda", clipping, {}), plan(), config, max_grad_norm=TINY, least=LEAST)
    assert found.passed, found.measured


def test_every_weight_gets_noise_and_the_weights_come_back_on_the_cpu() -> None:
    made = bench("cuda", "ghost", {})
    before = made.weights()
    cohort = hospital_of(tiny.batch((1, 2), inputs=SMALL), tiny.LABELS, SMALL).cohort("train")
    train(made, cohort, plan(), config=TrainingConfig(batch_size=8), noise=SystemNoise())
    after = made.weights()
    assert all(value.device.type == "cpu" for value in after.values())
    assert not [name for name in before if torch.equal(before[name], after[name])]
