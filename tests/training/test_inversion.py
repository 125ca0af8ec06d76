"""Gradient inversion: an open update of one patient gives the report away and much of the image; a private one neither."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedmm.config import RunConfig
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.plan import PrivacyPlan, make_plan
from fedmm.schema import InputSpec
from fedmm.training.inversion import (
    WINDOW,
    attack_updates,
    name_tokens,
    no_pixels,
    observe,
    psnr,
    some_studies,
    ssim,
    standardised,
    table_of,
)
from fedmm.training.loop import Workbench
from fedmm.training.shadows import start_of
from tests import tiny
from tests.training.invented import hospital

INPUTS = InputSpec(image_size=16, report_tokens=8, report_buckets=512, audio_mels=8, audio_seconds=0.4)
SPEC = ModelSpec(inputs=INPUTS, model=tiny.leaves(width=16), labels=tiny.LABELS)
CONFIG = RunConfig.from_flat({"federation.rounds": 10, "training.device": "cpu", "data.report_buckets": 512})
OPEN = make_plan(CONFIG.replace(**{"privacy.enabled": False}))
PRIVATE = make_plan(CONFIG)


def attacked(plan: PrivacyPlan, spec: ModelSpec = SPEC, *, steps: int = 60) -> dict[str, dict[str, float]]:
    data, told = hospital([2] * 6, train=6, inputs=INPUTS), []
    found = attack_updates(
        spec, start_of(CONFIG, spec).weights, data, config=CONFIG, plan=plan,
        progress=lambda *step: told.append(step), steps=steps,
    )  # fmt: skip
    return {entry["what"]: entry for entry in found}


def test_an_open_update_of_one_patient_gives_every_token_and_much_of_the_image_away() -> None:
    found = attacked(OPEN, steps=120)
    assert found["tokens recovered"]["value"] == 1.0
    assert found["image ssim"]["value"] > found["image ssim"]["baseline"] + 0.15
    assert found["image psnr"]["value"] > found["image psnr"]["baseline"] + 1
    assert found["image ssim"]["low"] < found["image ssim"]["value"] < found["image ssim"]["high"]


def test_a_private_update_of_one_patient_tells_hardly_more_than_chance() -> None:
    """32 tokens, each named by chance with probability 1/64: more than 8 hits happen in fewer than 1 of 10^7 runs."""
    found = attacked(PRIVATE, steps=10)
    assert found["tokens recovered"]["value"] <= 0.25
    assert found["tokens recovered"]["baseline"] == pytest.approx(8 / 511, rel=0.2)
    assert abs(found["image ssim"]["value"] - found["image ssim"]["baseline"]) < 0.15


@pytest.mark.parametrize("report", ["ngrams", "gru", "transformer"])
def test_tokens_are_read_from_whatever_table_the_encoder_has(report: str) -> None:
    spec = ModelSpec(inputs=INPUTS, model=tiny.leaves(width=16, report=report), labels=tiny.LABELS)
    bench, start = Workbench(spec, torch.device("cpu")), start_of(CONFIG, spec).weights
    (one, *_) = some_studies(hospital([1] * 3, train=3, inputs=INPUTS))
    (seen,) = observe(spec, start, [one], config=CONFIG, plan=OPEN)
    true = set(seen.study.inputs["report"].flatten().tolist()) - {0}
    assert set(name_tokens(bench, seen.gradient, count=len(true))) == true


def test_what_cannot_be_asked_of_an_encoder_is_said_with_its_name() -> None:
    fixed = ModelSpec(inputs=INPUTS, model=tiny.leaves(width=16, image="hog"), labels=tiny.LABELS)
    assert "hog" in no_pixels(Workbench(fixed, torch.device("cpu")))
    assert no_pixels(Workbench(SPEC, torch.device("cpu"))) == ""
    assert table_of(Workbench(SPEC, torch.device("cpu"))) == ("encoders.report.project.weight", 1)


def test_a_report_of_punctuation_alone_is_left_out_and_if_all_are_that_is_said() -> None:
    def tokens(wordless: int) -> dict[str, Any]:
        data = hospital([1] * 4, train=4, inputs=INPUTS)
        data.inputs["report"][:wordless] = 0
        found = attack_updates(
            SPEC, start_of(CONFIG, SPEC).weights, data, config=CONFIG, plan=OPEN, progress=lambda *_: None, steps=1
        )
        return {entry["what"]: entry for entry in found}["tokens recovered"]

    assert (tokens(1)["patients"], tokens(1)["value"]) == (3, 1.0)
    assert "no words" in tokens(4)["not_applicable"]


def test_without_a_patient_who_has_both_nothing_is_attacked() -> None:
    data = hospital([1] * 4, train=0, inputs=INPUTS)
    found = attack_updates(
        SPEC, start_of(CONFIG, SPEC).weights, data, config=CONFIG, plan=OPEN, progress=lambda *_: None, steps=1
    )
    assert {entry["what"] for entry in found} == {"tokens recovered", "image ssim", "image psnr"}
    assert all("no training patient" in entry["not_applicable"] for entry in found)


def test_the_studies_attacked_are_of_different_training_patients_and_one_of_each() -> None:
    studies = some_studies(hospital([3, 2, 2, 1, 1, 1], train=3, inputs=INPUTS))
    assert [(one.patients, one.studies) for one in studies] == [(1, 1)] * 3
    assert {int(one.batch([0]).key_B[0]) for one in studies} == {0, 1, 2}


# --- images -------------------------------------------------------------------------------------------------------------


def test_ssim_of_one_window_is_its_formula_and_of_the_same_image_one() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, WINDOW, WINDOW))
    row = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * 1.5**2))
    w = np.outer(row, row) / row.sum() ** 2
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb, both = (w * a * a).sum() - ma**2, (w * b * b).sum() - mb**2, (w * a * b).sum() - ma * mb
    c1, c2 = ((k * (b.max() - b.min())) ** 2 for k in (0.01, 0.03))
    wanted = (2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(wanted)
    assert ssim(torch.from_numpy(b), torch.from_numpy(b)) == pytest.approx(1.0)


def test_psnr_of_an_image_that_is_off_by_a_tenth_of_its_range_is_20_db() -> None:
    true = torch.linspace(0, 1, 64).reshape(8, 8)
    assert psnr(true + 0.1, true) == pytest.approx(20.0, abs=1e-3)
    assert psnr(true, true) == pytest.approx(100.0)


def test_a_flat_or_broken_reconstruction_is_no_image_and_no_error() -> None:
    assert not standardised(torch.full((4, 4), 3.0)).any()
    assert bool(standardised(torch.tensor([[float("nan"), 1.0], [2.0, float("inf")]])).isfinite().all())
