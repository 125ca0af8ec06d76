"""Local training: the number of steps, what leaves the data alone, the same code with and without privacy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from fedmm.config import TrainingConfig
from fedmm.errors import ConfigError
from fedmm.models.multimodal import build_model
from fedmm.privacy.plan import PrivacyPlan
from fedmm.schema import Batch
from fedmm.training.loop import Workbench, choose_device, hide_modalities, predict, train
from tests import tiny
from tests.fixed_noise import FixedNoise


@dataclass
class Patients:
    """A cohort of random patients that notes what was asked of it."""

    studies: Sequence[int]
    asked: list[list[int]] = field(default_factory=list)
    nan: bool = False

    @property
    def patients(self) -> int:
        return len(self.studies)

    def physical(
        self, patients: Sequence[int], *, limit: int, max_studies: int | None = None, rng: Any = None
    ) -> Iterator[Batch]:
        self.asked.append(list(patients))
        whole = tiny.batch(self.studies)
        for start in range(0, len(patients), 3):
            yield tiny.pick(whole, list(patients)[start : start + 3])


def plan(*, private: bool = True, steps: int = 4, rate: float = 0.5) -> PrivacyPlan:
    return PrivacyPlan(
        unit="patient", relation="add_or_remove_one", delta=1e-4, epsilon=8.0, max_grad_norm=0.5, sampling_rate=rate,
        steps_per_round=steps, rounds=1, noise_multiplier=1.0 if private else 0.0, private=private,
    )  # fmt: skip


def bench() -> Workbench:
    made = Workbench(tiny.spec(), torch.device("cpu"))
    made.load(build_model(tiny.spec(), 1).state_dict())
    return made


@pytest.mark.parametrize("private", [True, False])
def test_the_plan_decides_the_number_of_steps_whatever_the_data(*, private: bool) -> None:
    for studies in ([], [1], [1, 5, 2, 3, 4, 1, 1]):
        cohort, table = Patients(studies), bench()
        before = table.weights()
        train(table, cohort, plan(private=private), config=TrainingConfig(), noise=FixedNoise(3))
        assert len(cohort.asked) == 4
        moved = any(not torch.equal(before[n], v) for n, v in table.weights().items())
        assert moved == (private or bool(studies)), "without patients a private round is noise, a plain one nothing"


def test_training_repeats_with_fixed_noise_and_not_without() -> None:
    results = []
    for seed in (1, 1, 2):
        table = bench()
        train(table, Patients([1, 2, 3]), plan(), config=TrainingConfig(), noise=FixedNoise(seed))
        results.append(torch.cat([v.flatten() for v in table.weights().values()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_plain_training_lowers_the_loss() -> None:
    from fedmm.models.heads import study_loss

    table, whole = bench(), tiny.batch([1] * 12)
    losses = []
    for _ in range(2):
        losses.append(study_loss(table.model(whole.inputs, whole.seen_BM), whole).mean().item())
        config = TrainingConfig(modality_dropout=0)
        train(table, Patients([1] * 12), plan(private=False, steps=30, rate=1.0), config=config, noise=FixedNoise(0))
    assert losses[1] < 0.8 * losses[0]


def test_the_private_model_serves_many_rounds_without_being_wrapped_again() -> None:
    table = bench()
    first = table.private_model
    for _ in range(3):
        train(table, Patients([1, 2]), plan(steps=1), config=TrainingConfig(), noise=FixedNoise(0))
    assert table.private_model is first
    assert not table.model.training


def test_weights_are_copies() -> None:
    table = bench()
    before = table.weights()
    next(iter(table.model.parameters())).data.fill_(7.0)
    assert not any(bool((v == 7.0).all()) for v in before.values())


def test_prediction_covers_every_study_once_and_touches_nothing() -> None:
    table, cohort = bench(), Patients([1, 3, 2])
    before = table.weights()
    result = predict(table, cohort)
    assert (len(result.probability_BO), result.patients) == (6, 3)
    assert set(result.alone) == set(result.without) == {"image", "report", "audio"}
    assert all(torch.equal(before[n], v) for n, v in table.weights().items())
    assert np.isfinite(result.probability_BO).all()


def test_nobody_to_predict_is_an_empty_result() -> None:
    result = predict(bench(), Patients([]))
    assert result.probability_BO.shape == (0, 5)
    assert result.alone["image"].shape == (0, 5)


def test_modality_dropout_hides_but_never_the_last_one() -> None:
    """Share of hidden slots within 5 sigma of 0.5 among studies that keep something: false alarm below 1e-6."""
    batch = tiny.batch([1] * 2000)
    hidden = hide_modalities(batch, 0.5, np.random.default_rng(0))
    assert not (hidden.seen_BM & ~batch.seen_BM).any()
    assert torch.equal(hidden.seen_BM.any(1), batch.seen_BM.any(1))
    lonely = batch.seen_BM.sum(1) == 1
    assert torch.equal(hidden.seen_BM[lonely], batch.seen_BM[lonely])
    full = batch.seen_BM.all(1)
    # three slots, kept as they are when all three would go: expected share kept = 0.5 + 1/8 / 1
    kept, n = float(hidden.seen_BM[full].float().mean()), int(full.sum()) * 3
    assert abs(kept - 0.625) < 5 * (0.25 / n) ** 0.5 * 1.5
    assert hide_modalities(batch, 0.0, np.random.default_rng(0)) is batch


@pytest.mark.parametrize("wanted", ["tpu", "cuda:99", "mps", "", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_by_name(wanted: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.device"):
        choose_device(wanted)


def test_auto_finds_a_device() -> None:
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
