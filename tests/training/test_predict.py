"""Prediction given each subset of the modalities: encoders run once, and the numbers are those of the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from fedmm.models.fusion import fusions
from fedmm.models.heads import probabilities
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.schema import MODALITIES, SUBSETS, Batch
from fedmm.training.loop import Workbench, predict
from fedmm.training.metrics import WHOLE
from tests import tiny

STUDIES = [1, 3, 2, 1, 4]


@dataclass
class Together:
    """All patients of one batch."""

    whole: Batch

    @property
    def patients(self) -> int:
        return self.whole.patients

    def physical(
        self, patients: Sequence[int], *, limit: int, max_studies: int | None = None, rng: Any = None
    ) -> Iterator[Batch]:
        yield tiny.pick(self.whole, list(patients))

    def records(self, most: int, rng: Any) -> Together:
        raise NotImplementedError


def bench(spec: ModelSpec) -> Workbench:
    made = Workbench(spec, torch.device("cpu"))
    made.load(build_model(spec, seed=3).trained())
    return made


@pytest.mark.parametrize("fusion", fusions.names())
def test_each_subset_is_what_the_model_says_of_studies_that_have_nothing_else(fusion: str) -> None:
    """The rest is not only unseen but gone: zeros in its place, as of a file that never was."""
    spec = tiny.spec(fusion, labels=tiny.EVERY)
    table, whole = bench(spec), tiny.batch(STUDIES, labels=tiny.EVERY)
    got = predict(table, Together(whole))
    assert set(got.subset) == set(SUBSETS)
    for name, some in SUBSETS.items():
        seen_BM = whole.seen_BM & torch.tensor([m in some for m in MODALITIES])
        inputs = {m: value if m in some else torch.zeros_like(value) for m, value in whole.inputs.items()}
        with torch.no_grad():
            want_BO = probabilities(table.model(inputs, seen_BM, whole.timeline), spec.labels)
        np.testing.assert_allclose(got.subset[name], want_BO.double().numpy(), atol=1e-6, err_msg=name)
    assert np.array_equal(got.subset[WHOLE], got.probability_BO)
    assert np.array_equal(got.further_BK, whole.further_BK.numpy(), equal_nan=True)


def test_each_encoder_runs_once_for_all_subsets() -> None:
    table, ran = bench(tiny.spec()), []
    for name, encoder in table.model.encoders.items():
        encoder.register_forward_hook(lambda *_, name=name: ran.append(name))
    predict(table, Together(tiny.batch(STUDIES)))
    assert sorted(ran) == sorted(MODALITIES)


def test_what_a_study_does_not_have_changes_no_subset() -> None:
    table, whole = bench(tiny.spec()), tiny.batch(STUDIES)
    noise = {
        name: torch.where(whole.seen_BM[:, m].view(-1, *[1] * (value.dim() - 1)), value, torch.full_like(value, 7))
        for m, (name, value) in enumerate((n, whole.inputs[n]) for n in MODALITIES)
    }
    first, second = predict(table, Together(whole)), predict(table, Together(replace(whole, inputs=noise)))
    assert all(np.array_equal(first.subset[name], second.subset[name]) for name in SUBSETS)


def test_a_prediction_for_a_release_has_no_subset_and_none_has_groups() -> None:
    table, whole = bench(tiny.spec()), tiny.batch(STUDIES)
    assert predict(table, Together(whole), isolate=True).subset == {}
    assert predict(table, Together(whole)).groups == {}
