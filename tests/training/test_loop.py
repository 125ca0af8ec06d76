"""Local training: the number of steps, what leaves the data alone, the same code with and without privacy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from fedmm.config import TrainingConfig
from fedmm.errors import ConfigError, PlanInvalid
from fedmm.models.multimodal import build_model
from fedmm.privacy.engine import CLIPPING
from fedmm.privacy.plan import PrivacyPlan, Rate
from fedmm.schema import SUBSETS, Batch
from fedmm.training import loop
from fedmm.training.augment import hide_modalities
from fedmm.training.loop import (
    Nobody,
    Workbench,
    choose_device,
    forget_workbenches,
    predict,
    train,
    workbench,
)
from tests import tiny
from tests.fixed_noise import FixedNoise


@dataclass
class Patients:
    """A cohort of random patients that notes what was asked of it."""

    studies: Sequence[int]
    asked: list[list[int]] = field(default_factory=list)
    caps: list[int | None] = field(default_factory=list)

    @property
    def patients(self) -> int:
        return len(self.studies)

    def physical(
        self, patients: Sequence[int], *, limit: int, max_studies: int | None = None, rng: Any = None
    ) -> Iterator[Batch]:
        self.asked.append(list(patients))
        self.caps.append(max_studies)
        whole = tiny.batch(self.studies)
        for start in range(0, len(patients), 3):
            yield tiny.pick(whole, list(patients)[start : start + 3])

    def records(self, most: int, rng: Any) -> Patients:
        self.most = most
        self.single = Patients([1] * sum(min(count, most) for count in self.studies))
        return self.single


def plan(
    *, private: bool = True, steps: int = 4, rate: float = 0.5, unit: str = "patient", most: int = 5
) -> PrivacyPlan:
    return PrivacyPlan(
        unit=unit, relation="add_or_remove_one", delta=1e-4, epsilon=8.0, sampling="poisson", max_grad_norm=0.5,
        max_studies=most, sampling_rate=Rate(rate), steps_per_round=steps, rounds=1,
        noise_multiplier=1.0 if private else 0.0, evaluation_noise=0.0, private=private,
    )  # fmt: skip


def bench(clipping: str = "hooks") -> Workbench:
    made = Workbench(tiny.spec(), torch.device("cpu"), clipping=clipping)
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


@pytest.mark.parametrize("steps", [1, 3])
def test_both_ways_of_clipping_train_the_same_model(steps: int) -> None:
    results = []
    for clipping in CLIPPING:
        table = bench(clipping)
        train(table, Patients([1, 2, 3, 12]), plan(steps=steps), config=TrainingConfig(), noise=FixedNoise(1))
        results.append(torch.cat([v.flatten() for v in table.weights().values()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_workbenches_are_kept_by_spec_device_privacy_and_clipping() -> None:
    forget_workbenches()
    hooks, ghost = (workbench(tiny.spec(), "cpu", True, clipping=clipping) for clipping in CLIPPING)
    assert workbench(tiny.spec(), "cpu", True) is hooks
    assert workbench(tiny.spec(), "cpu", True, clipping="ghost") is ghost is not hooks
    plain = workbench(tiny.spec(), "cpu", False)
    assert workbench(tiny.spec(), "cpu", False, clipping="ghost") is plain
    forget_workbenches()
    assert workbench(tiny.spec(), "cpu", True) is not hooks


@pytest.mark.parametrize("most", [1, 4])
def test_the_plan_says_how_many_studies_and_what_a_unit_is(most: int) -> None:
    """One number in one place: the cap that the ledger charges for, whatever the settings say."""
    config = TrainingConfig(max_studies=2)
    by_patient, by_record = Patients([1, 9, 3]), Patients([1, 9, 3])
    train(bench(), by_patient, plan(most=most), config=config, noise=FixedNoise(0))
    assert set(by_patient.caps) == {most}
    train(bench(), by_record, plan(most=most, unit="record", rate=1.0), config=config, noise=FixedNoise(0))
    assert by_record.most == most
    assert by_record.asked == [], "patients themselves are not sampled"
    assert by_record.single.asked == [list(range(by_record.single.patients))] * 4


@pytest.mark.parametrize("clipping", CLIPPING)
def test_a_loss_that_compares_studies_is_refused_before_anybody_is_charged(
    monkeypatch: pytest.MonkeyPatch, clipping: str
) -> None:
    forget_workbenches()
    mixed = lambda self, logits_BO, batch: (logits_BO @ logits_BO.T).log_softmax(1).sum(1)  # noqa: E731
    monkeypatch.setattr(loop.Objective, "__call__", mixed)
    with pytest.raises(PlanInvalid, match="depends on"):
        workbench(tiny.spec(), "cpu", True, clipping=clipping)
    forget_workbenches()


def test_nobody_has_no_records_either() -> None:
    table = bench()
    before = table.weights()
    train(table, Nobody(), plan(unit="record"), config=TrainingConfig(), noise=FixedNoise(0))
    assert all(not torch.equal(before[name], value) for name, value in table.weights().items()), "noise alone"


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
    assert set(result.subset) == set(SUBSETS)
    assert all(torch.equal(before[n], v) for n, v in table.weights().items())
    assert np.isfinite(result.probability_BO).all()


def test_nobody_to_predict_is_an_empty_result() -> None:
    result = predict(bench(), Patients([]))
    assert result.probability_BO.shape == (0, 5)
    assert result.subset["image"].shape == (0, 5)


def test_modality_dropout_hides_but_never_the_last_one() -> None:
    """Share of hidden slots within 5 sigma of 0.5 among studies that keep something: false alarm below 1e-6."""
    batch = tiny.batch([1] * 2000)
    hidden = hide_modalities(batch, 0.5, seed=0)
    assert not (hidden.seen_BM & ~batch.seen_BM).any()
    assert torch.equal(hidden.seen_BM.any(1), batch.seen_BM.any(1))
    lonely = batch.seen_BM.sum(1) == 1
    assert torch.equal(hidden.seen_BM[lonely], batch.seen_BM[lonely])
    full = batch.seen_BM.all(1)
    # three slots, kept as they are when all three would go: expected share kept = 0.5 + 1/8 / 1
    kept, n = float(hidden.seen_BM[full].float().mean()), int(full.sum()) * 3
    assert abs(kept - 0.625) < 5 * (0.25 / n) ** 0.5 * 1.5
    assert hide_modalities(batch, 0.0, seed=0) is batch


@pytest.mark.parametrize("wanted", ["tpu", "cuda:99", "mps", "", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_by_name(wanted: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.device"):
        choose_device(wanted)


def test_auto_finds_a_device() -> None:
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Some:
    """Some of the patients of one batch, together or one by one as asked."""

    whole: Batch
    who: Sequence[int]

    @property
    def patients(self) -> int:
        return len(self.who)

    def physical(
        self, patients: Sequence[int], *, limit: int, max_studies: int | None = None, rng: Any = None
    ) -> Iterator[Batch]:
        chosen = [self.who[patient] for patient in patients]
        for part in [[one] for one in chosen] if limit == 1 else [chosen]:
            yield tiny.pick(self.whole, part)

    def records(self, most: int, rng: Any) -> Some:
        raise NotImplementedError


def test_the_bytes_of_a_prediction_do_not_depend_on_who_else_is_there() -> None:
    """For a release that counts predictions in bins: a hostile model can put them on an edge, where the last bit decides."""
    table, everybody = bench(), list(range(40))
    whole = tiny.batch([1 + p % 3 for p in everybody])
    found = {
        isolate: {
            gone: predict(table, Some(whole, [p for p in everybody if p != gone]), isolate=isolate).probability_BO
            for gone in (None, 0, 7, 39)
        }
        for isolate in (True, False)
    }
    for gone in (0, 7, 39):
        kept = ~np.isin(whole.patient_B.numpy(), [gone])
        assert np.array_equal(found[True][None][kept], found[True][gone])
        assert np.allclose(found[False][None][kept], found[False][gone], atol=1e-5)
    assert np.allclose(found[True][None], found[False][None], atol=1e-5)
