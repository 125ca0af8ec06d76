"""Re-linkage: planted pairs are found, random ones are at chance, and a study is seen by one modality at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmm.models.multimodal import ModelSpec
from fedmm.training.loop import Workbench
from fedmm.training.relink import FEWEST, MATCHERS, PAIRS, Pairs, attack_links, link, pairs_of, ranks
from fedmm.training.shadows import start_of
from tests import tiny
from tests.training.invented import hospital
from tests.training.test_membership import CONFIG

RNG = np.random.default_rng(11)
NAMES = ("fused", "answer", "encoder")


def noise(count: int = 200, size: int = 6) -> dict[str, np.ndarray]:
    return {name: RNG.standard_normal((count, size)) for name in NAMES}


@pytest.mark.parametrize("name", ["fused", "answer"])
def test_what_is_the_same_in_one_space_is_found_whatever_the_others_hold(name: str) -> None:
    one = noise()
    found = link(Pairs(one, {**noise(), name: one[name] + 0.01 * RNG.standard_normal(one[name].shape)}))
    assert found["candidates"] == 100
    assert found["top1"]["value"] == 1.0
    assert found["top1"]["low"] > 0.96
    assert found["mean_rank"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert {"fused": "fused", "answer": "answers"}[name] in found["matcher"]


def test_a_linear_map_between_two_encoders_is_learnt_from_other_pairs() -> None:
    one = noise()
    found = link(Pairs(one, {**noise(), "encoder": one["encoder"] @ RNG.standard_normal((6, 6))}))
    assert found["matcher"].startswith("ridge")
    assert found["top5"]["value"] > 0.9


def test_random_pairs_are_found_as_often_as_by_chance() -> None:
    """At this fixed seed; at any, each interval holds chance in 95 of 100 runs or more."""
    found = link(Pairs(noise(), noise()))
    assert (found["chance_top1"], found["chance_top5"], found["chance_mean_rank"]) == (0.01, 0.05, 50.5)
    for what in ("top1", "top5", "mean_rank"):
        assert found[what]["low"] <= found[f"chance_{what}"] <= found[what]["high"], what


def test_where_all_candidates_are_alike_everybody_is_in_the_middle_and_nobody_is_found() -> None:
    flat = {name: np.ones((30, 3)) for name in NAMES}
    for matcher in MATCHERS.values():
        assert (ranks(matcher, Pairs(flat, flat), Pairs(flat, flat)) == 15.5).all()
    assert link(Pairs(flat, flat))["top5"]["value"] == 0.0


def test_of_too_few_pairs_nothing_is_said() -> None:
    found = link(Pairs(noise(FEWEST - 1), noise(FEWEST - 1)))
    assert found["top1"]["value"] is None
    assert found["top1"]["reason"]
    assert found["chance_top1"] is None


@pytest.mark.parametrize("fusion", ["concat", "mimo", "aligned", "timeline"])
def test_an_image_is_seen_without_its_report(fusion: str) -> None:
    spec = ModelSpec(inputs=tiny.INPUTS, model=tiny.leaves(fusion=fusion), labels=tiny.LABELS)
    bench, data = Workbench(spec, torch.device("cpu")), hospital([1] * 8, train=8)
    pairs = pairs_of(bench, data, "image", "report")
    other = replace(data, inputs={**data.inputs, "report": data.inputs["report"].roll(1, 0)})
    moved = pairs_of(bench, other, "image", "report")
    for name in NAMES:
        assert pairs.one[name] == pytest.approx(moved.one[name])
    assert not np.allclose(pairs.other["encoder"], moved.other["encoder"])


def test_one_study_of_each_training_patient_who_has_both_is_asked() -> None:
    spec = ModelSpec(inputs=tiny.INPUTS, model=tiny.leaves(), labels=tiny.LABELS)
    bench, data = Workbench(spec, torch.device("cpu")), hospital([2, 3, 1, 1], train=3)
    seen = data.seen_SM.clone()
    seen[5, 1] = False  # the third patient has no report
    pairs = pairs_of(bench, replace(data, seen_SM=seen), "image", "report")
    assert len(pairs.one["fused"]) == len(pairs.other["answer"]) == 2


def test_every_pair_of_modalities_has_its_entry_and_no_hook_is_left() -> None:
    spec = ModelSpec(inputs=tiny.INPUTS, model=tiny.leaves(width=16), labels=tiny.LABELS)
    bench, data = Workbench(spec, torch.device("cpu")), hospital([1] * 40, train=40)
    found = attack_links(bench, start_of(CONFIG, spec).weights, data)
    assert [(entry["from"], entry["to"]) for entry in found] == list(PAIRS)
    assert all(entry["candidates"] == 20 for entry in found)
    assert not bench.model.fusion._forward_hooks
