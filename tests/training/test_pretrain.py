"""A model to start from: trained openly on pooled patients, and taken over whole or but for the head."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmm.config import RunConfig
from fedmm.errors import ConfigError
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.models.store import save_model, save_spec
from fedmm.schema import InputSpec, Labels
from fedmm.training.loop import Workbench, predict
from fedmm.training.pretrain import Pooled, open_plan, pretrain, start_from
from tests import tiny
from tests.training.test_loop import Patients

SMALL = RunConfig.from_flat({"training.batch_size": 4, "training.learning_rate": 0.3, "training.modality_dropout": 0})


def stored(folder: Path, spec: ModelSpec, seed: int = 9, **extra: object) -> Path:
    save_spec(spec, folder, extra=extra)
    save_model(build_model(spec, seed), folder)
    return folder


# --- training ---------------------------------------------------------------------------------------------------------


def test_each_patient_of_the_pool_is_found_in_his_own_cohort() -> None:
    cohorts = [Patients([1, 2]), Patients([]), Patients([3, 1, 1])]
    pool = Pooled(cohorts)
    assert pool.patients == 5
    batches = list(pool.physical([4, 0, 3], limit=8, max_studies=5, rng=np.random.default_rng(0)))
    assert [cohort.asked for cohort in cohorts] == [[[0]], [[]], [[2, 1]]]
    assert sum(batch.patients for batch in batches) == 3
    assert pool.records(1, np.random.default_rng(0)).patients == 5


@pytest.mark.parametrize(
    ("patients", "steps", "rate"), [(100, 25, 0.04), (4, 1, 1.0), (2, 1, 1.0), (0, 1, 1.0), (9, 3, 4 / 9)]
)
def test_an_epoch_sees_each_patient_once_on_average_and_adds_no_noise(patients: int, steps: int, rate: float) -> None:
    plan = open_plan(SMALL, patients=patients, epochs=7)
    assert (plan.private, plan.noise_multiplier, plan.rounds) == (False, 0.0, 7)
    assert (plan.steps_per_round, plan.sampling_rate) == (steps, pytest.approx(rate))


def test_pretraining_learns_and_says_how_far_it_is() -> None:
    bench = Workbench(tiny.spec(), torch.device("cpu"))
    bench.load(dict(build_model(tiny.spec(), 1).trained()))
    pool = Pooled([Patients([1] * 6), Patients([1] * 6)])
    said: list[tuple[int, int]] = []

    def likely() -> float:
        found = predict(bench, pool)
        labels = np.nan_to_num(found.finding_BF, nan=0.5)
        return float(np.abs(found.probability_BO[:, : labels.shape[1]] - labels).mean())

    before = likely()
    plan = open_plan(SMALL, patients=pool.patients, epochs=40)
    pretrain(bench, pool, plan, config=SMALL, progress=lambda done, total: said.append((done, total)))
    assert likely() < before - 0.02
    assert said == [(i + 1, 40) for i in range(40)]


# --- starting from it -------------------------------------------------------------------------------------------------


def test_a_run_starts_from_all_weights_and_says_which_they_were(tmp_path: Path) -> None:
    folder = stored(tmp_path / "m", tiny.spec(), pretraining={"note": "public"})
    model = build_model(tiny.spec(), 1)
    origin = start_from(folder, model)
    theirs = build_model(tiny.spec(), 9).trained()
    assert all(torch.equal(value, theirs[name]) for name, value in model.trained().items())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert origin == {"sha256": digest, "pretraining": {"note": "public"}}
    json.dumps(origin)


def test_with_other_labels_all_but_the_head_is_taken_over(tmp_path: Path) -> None:
    other = tiny.spec(labels=Labels(findings=("pneumonia",)))
    folder = stored(tmp_path / "m", other)
    model, fresh, theirs = (
        build_model(tiny.spec(), 1),
        build_model(tiny.spec(), 1).trained(),
        build_model(other, 9).trained(),
    )
    assert start_from(folder, model)["pretraining"] is None
    for name, value in model.trained().items():
        source = fresh if name.startswith("head.") else theirs
        assert torch.equal(value, source[name]), name


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (tiny.spec(fusion="gated"), "model: fusion"),
        (tiny.spec(inputs=InputSpec(**(tiny.INPUTS.model_dump() | {"image_size": 32}))), "image_size"),
    ],
    ids=["another fusion", "another input"],
)
def test_a_model_of_another_build_cannot_be_started_from_and_what_differs_is_named(
    tmp_path: Path, spec: ModelSpec, named: str
) -> None:
    folder, model = stored(tmp_path / "m", spec), build_model(tiny.spec(), 1)
    before = {name: value.clone() for name, value in model.trained().items()}
    with pytest.raises(ConfigError, match=named):
        start_from(folder, model)
    assert all(torch.equal(before[name], value) for name, value in model.trained().items())


def test_where_there_is_no_model_there_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model"):
        start_from(tmp_path, build_model(tiny.spec(), 1))
