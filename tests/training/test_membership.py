"""Membership inference: the arithmetic against known answers, and both attacks where they must and must not succeed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from fedmm.config import RunConfig
from fedmm.data.dataset import HospitalData
from fedmm.models.multimodal import ModelSpec
from fedmm.training.loop import Workbench
from fedmm.training.membership import (
    ALARMS,
    VIEWS,
    attack_membership,
    clopper_pearson,
    confidence,
    judged,
    likelihood_ratio,
    members,
    strongest,
    true_positives,
)
from fedmm.training.rates import auroc
from fedmm.training.shadows import Recipe, as_the_run, by_heart, halves, some_of, start_of
from tests import tiny
from tests.training.invented import hospital

SPEC = ModelSpec(inputs=tiny.INPUTS, model=tiny.leaves(width=16), labels=tiny.LABELS)
CONFIG = RunConfig.from_flat({"federation.rounds": 3, "training.batch_size": 8, "training.device": "cpu"})


# --- arithmetic ---------------------------------------------------------------------------------------------------------


def test_the_likelihood_ratio_is_that_of_two_normals_with_pooled_spread() -> None:
    inside = np.array([[True, False], [True, False], [False, True], [False, True]])
    shadow = np.array([[5.0, 0.0], [3.0, 2.0], [1.0, 6.0], [2.0, 8.0]])
    got = likelihood_ratio(np.array([3.0, 3.5]), shadow, inside)
    into, out = np.array([4.0, 7.0]), np.array([1.5, 1.0])
    s_in, s_out = np.sqrt((1 + 1 + 1 + 1) / 2), np.sqrt((0.25 + 0.25 + 1 + 1) / 2)
    moved = np.array([3.0, 3.5]) - np.mean(np.array([3.0, 3.5]) - (into + out) / 2)
    assert got == pytest.approx(norm.logpdf(moved, into, s_in) - norm.logpdf(moved, out, s_out))


def test_lira_reaches_the_best_possible_auc_where_patients_differ_more_than_membership_does() -> None:
    """Logit = patient (spread 3) + 1 if a member + N(0, 1). Who knows the patient's level reaches Phi(1 / sqrt 2) = 0.760, who
    does not Phi(1 / sqrt 20) = 0.588. Of 4,000 patients the AUC's standard error is 0.008; 16 shadows cost a little."""
    rng, patients = np.random.default_rng(5), 4000
    inside, member = halves(16, patients), rng.random(patients) < 0.5
    level = 3 * rng.standard_normal(patients)
    shadow = level + inside + rng.standard_normal(inside.shape)
    target = level + member + rng.standard_normal(patients)
    assert auroc(target, member) == pytest.approx(0.588, abs=0.03)
    ratio = likelihood_ratio(target, shadow, inside)
    assert 0.71 < (auroc(ratio, member) or 0) < 0.785
    assert likelihood_ratio(target + 7, shadow, inside) == pytest.approx(ratio)  # a model that is surer of everybody


def test_a_patient_without_a_score_has_no_ratio_and_changes_nobodys() -> None:
    rng, inside = np.random.default_rng(1), halves(4, 6)
    shadow, target = rng.standard_normal((4, 6)), rng.standard_normal(6)
    shadow[:, 2] = target[2] = np.nan
    got, rest = likelihood_ratio(target, shadow, inside), np.arange(6) != 2
    assert np.isnan(got[2])
    assert got[rest] == pytest.approx(likelihood_ratio(target[rest], shadow[:, rest], inside[:, rest]))


@pytest.mark.parametrize(("count", "patients"), [(2, 1), (2, 9), (16, 50)])
def test_each_patient_is_in_exactly_half_of_the_shadows(count: int, patients: int) -> None:
    inside = halves(count, patients)
    assert inside.shape == (count, patients)
    assert (inside.sum(0) == count // 2).all()


def test_not_all_patients_are_in_the_same_half() -> None:
    assert len(np.unique(halves(16, 50), axis=1).T) > 40


@given(hits=st.integers(0, 40), more=st.integers(0, 40))
def test_the_interval_of_a_share_is_clopper_and_pearsons(hits: int, more: int) -> None:
    if hits + more:
        wanted = binomtest(hits, hits + more).proportion_ci(0.95, method="exact")
        assert clopper_pearson(hits, hits + more) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_true_positives_are_counted_above_what_the_allowed_non_members_reach() -> None:
    other = np.arange(100.0)  # one of a hundred may pass: the threshold is 98
    got = true_positives(np.array([98.0, 98.5, 99.0, 200.0, -1.0]), other, rate=0.01)
    low, high = clopper_pearson(3, 5)
    assert got == {"value": 0.6, "low": low, "high": high}


def test_a_rate_that_the_non_members_cannot_resolve_is_not_invented() -> None:
    member, other = np.ones(50), np.zeros(99)
    got = true_positives(member, other, rate=0.01)
    assert got["value"] is None
    assert "99 non-members" in str(got["reason"])
    assert true_positives(member, np.zeros(100), rate=0.01)["value"] == 1.0


def test_a_score_that_is_the_same_for_all_finds_nobody() -> None:
    got = judged(np.ones(300), np.arange(300) < 150)
    assert got["auc"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert got["tpr"]["0.01"]["value"] == 0.0


@given(st.lists(st.integers(0, 5), min_size=10, max_size=60), st.sampled_from(ALARMS))
def test_no_more_non_members_pass_than_the_rate_says(scores: list[int], rate: float) -> None:
    """Asked of the non-members themselves, also with many equal scores."""
    other = np.array(scores, dtype=float)
    got = true_positives(other, other, rate=rate)["value"]
    assert got is None or float(got) <= rate


def test_the_auc_is_the_area_under_the_curve_and_its_interval_is_about_it() -> None:
    rng, member = np.random.default_rng(2), np.arange(200) < 120
    score = rng.standard_normal(200) + member
    got = judged(score, member)["auc"]
    assert got["value"] == pytest.approx(auroc(score, member))
    assert got["low"] < got["value"] < got["high"]
    # Hanley and McNeil 1982: standard error about 0.033 for 120 against 80 at 0.76
    assert 0.09 < got["high"] - got["low"] < 0.17


def test_of_too_few_patients_nothing_is_said() -> None:
    got = judged(np.arange(14.0), np.arange(14) < 9)
    assert (got["members"], got["non_members"]) == (9, 5)
    assert got["auc"]["value"] is None
    assert got["auc"]["reason"]
    assert strongest([got]) is None


# --- what is asked of a model -------------------------------------------------------------------------------------------


def test_a_patients_score_is_the_mean_over_the_studies_that_have_the_modality_and_a_label() -> None:
    data, bench = hospital([1, 3, 2], train=2), Workbench(SPEC, torch.device("cpu"))
    whole = confidence(bench, data)
    alone = [confidence(bench, single(data, row)) for row in range(6)]
    assert whole.loss["all"][1] == pytest.approx(np.mean([alone[row].loss["all"][0] for row in (1, 2, 3)]), rel=1e-4)
    assert whole.logit["image"][2] == pytest.approx(np.mean([alone[row].logit["image"][0] for row in (4, 5)]), rel=1e-4)
    seen, findings, classes = data.seen_SM.clone(), data.finding_SF.clone(), data.class_S.clone()
    seen[0, 0] = False
    findings[1], classes[1] = torch.nan, -1
    less = confidence(bench, replace(data, seen_SM=seen, finding_SF=findings, class_S=classes))
    assert np.isnan(less.loss["image"][0])
    assert less.loss["report"][0] == pytest.approx(whole.loss["report"][0], rel=1e-4)
    assert less.loss["all"][1] == pytest.approx(np.mean([alone[row].loss["all"][0] for row in (2, 3)]), rel=1e-4)


def single(data: HospitalData, row: int) -> HospitalData:
    """One study as a hospital of its own."""
    rows = torch.tensor([row])
    return replace(
        data,
        inputs={name: value[rows] for name, value in data.inputs.items()},
        **{
            name: getattr(data, name)[rows]
            for name in ("seen_SM", "finding_SF", "class_S", "train_S", "further_SK", "day_S")
        },
        patient_S=torch.zeros(1, dtype=torch.int64),
        key_P=(0,),
    )


def test_the_patients_of_a_shadow_are_those_chosen_with_all_their_studies() -> None:
    data = hospital([1, 3, 2, 1], train=2)
    chosen = np.array([False, True, False, True])
    cohort = some_of(data, chosen)
    assert (cohort.patients, cohort.studies) == (2, 4)
    assert members(data).tolist() == [True, True, False, False]


def test_a_model_that_learnt_its_patients_by_heart_is_found_out_and_one_that_never_saw_them_is_not() -> None:
    """Random labels: nobody can know them but who saw them. Trained: AUC 0.99 or so, asked for 0.8, which by chance alone is
    4 standard errors of 0.08 above a half. Never trained: the interval at this fixed seed holds 0.5 (any seed: 95 of 100)."""
    data, bench = hospital([1] * 60, train=30), Workbench(SPEC, torch.device("cpu"))
    start = start_of(CONFIG, SPEC)
    recipe = by_heart(CONFIG, start, patients=30, epochs=60)
    recipe.make(bench, data.cohort("train"))
    learnt, done = bench.weights(), []
    entries = attack(bench, learnt, data, recipe, shadows=4, done=done)
    found = of(entries)
    unseen = entries[len(VIEWS)]["unseen"]
    assert abs(unseen["value"] - 0.5) < 0.3  # type: ignore[index]  # 4 standard errors: those models know nothing
    assert found["loss threshold", "all"] > 0.8
    assert found["lira", "all"] > 0.8
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    never = attack(bench, start.weights, data, recipe, shadows=0, done=done)
    assert [entry["attack"] for entry in never] == ["loss threshold"] * len(VIEWS)
    assert all(entry["auc"]["low"] <= 0.5 <= entry["auc"]["high"] for entry in never)


def attack(
    bench: Workbench,
    target: Mapping[str, torch.Tensor],
    data: HospitalData,
    recipe: Recipe,
    *,
    shadows: int,
    done: list[tuple[int, int]],
) -> list[dict[str, object]]:
    return attack_membership(
        bench, target, data, recipe=recipe, shadows=shadows, progress=lambda *step: done.append(step)
    )


def of(found: list[dict[str, object]]) -> dict[tuple[str, str], float]:
    return {(entry["attack"], entry["modality"]): entry["auc"]["value"] for entry in found}  # type: ignore[index, misc]


# --- how shadows are trained --------------------------------------------------------------------------------------------


def test_shadows_begin_where_the_run_began_and_take_its_steps_with_the_coordinators_momentum() -> None:
    start = start_of(CONFIG, SPEC)
    assert start.same
    recipe = as_the_run(CONFIG, start, patients=30)
    assert (recipe.rounds, recipe.momentum, recipe.plan.private) == (3, 0.9, False)
    plain = as_the_run(
        CONFIG.replace(**{"federation.strategy": "fedavg", "training.local_steps": 2}), start, patients=30
    )
    assert (plain.rounds, plain.plan.steps_per_round, plain.momentum) == (1, 6, 0.0)
    many = as_the_run(CONFIG, start, patients=6400)
    assert many.plan.sampling_rate == pytest.approx(0.01)


def test_momentum_makes_a_shadow_go_on_where_it_went() -> None:
    """Two steps on everybody, without chance: the second goes the way of the first once more."""
    start, data = start_of(CONFIG, SPEC), hospital([1] * 6, train=6)
    bench = Workbench(SPEC, torch.device("cpu"))
    moved = []
    for momentum in (0.0, 0.9):
        recipe = replace(
            as_the_run(CONFIG.replace(**{"training.modality_dropout": 0.0}), start, patients=6),
            rounds=2,
            momentum=momentum,
        )
        recipe.make(bench, data.cohort("train"))
        moved.append(sum(float((v - start.weights[n]).norm() ** 2) for n, v in bench.weights().items()) ** 0.5)
    assert moved[1] > 1.2 * moved[0]


def test_where_the_folder_it_started_from_is_not_here_that_is_known(tmp_path: object) -> None:
    gone = CONFIG.replace(**{"federation.start_from": f"{tmp_path}/gone"})
    assert not start_of(gone, SPEC).same
