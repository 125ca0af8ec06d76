"""The hospital's rules against a coordinator's plan."""

from __future__ import annotations

from typing import Any

import pytest

from fedmm.config import RunConfig, SiteConfig, SiteRuns
from fedmm.errors import PlanInvalid, PolicyRefused
from fedmm.privacy.plan import PrivacyPlan, make_plan
from fedmm.privacy.policy import RANGES, check_kind, check_model, check_plan, check_settings
from tests.privacy.ledger_worker import site
from tests.privacy.test_plan import FLAT


def plan(**changed: Any) -> PrivacyPlan:
    return PrivacyPlan.from_flat({**FLAT, **changed})


def test_a_plan_inside_the_rules_passes() -> None:
    check_plan(plan(), site())
    check_plan(plan(noise_multiplier=0.3, sampling_rate=1.0), site())


def test_privacy_off_needs_the_hospitals_word() -> None:
    off = plan(private=False, noise_multiplier=0.0)
    with pytest.raises(PolicyRefused, match="without privacy"):
        check_plan(off, site())
    check_plan(off, site(allow_not_private=True))


def test_too_little_noise_is_refused() -> None:
    with pytest.raises(PolicyRefused, match=r"noise_multiplier 0\.9"):
        check_plan(plan(noise_multiplier=0.9), site(min_noise_multiplier=1.0))


def test_too_high_a_rate_is_refused() -> None:
    with pytest.raises(PolicyRefused, match=r"sampling_rate 0\.25"):
        check_plan(plan(), site(max_sampling_rate=0.2))


def test_only_patients_are_protected_here_unless_the_hospital_says_otherwise() -> None:
    with pytest.raises(PolicyRefused, match="unit 'record'"):
        check_plan(plan(unit="record"), site())
    check_plan(plan(unit="record"), site(allow_record_unit=True))


def test_delta_must_be_small_for_the_number_of_patients() -> None:
    with pytest.raises(PlanInvalid, match=r"delta 0\.001"):
        check_plan(plan(delta=1e-3), site())  # 1 / (10 x 100), and equal is too much
    check_plan(plan(delta=9.9e-4), site())


def test_scores_with_too_little_noise_are_refused() -> None:
    with pytest.raises(PolicyRefused, match=r"evaluation_noise 0\.2"):
        check_plan(plan(evaluation_noise=0.2), site())
    check_plan(plan(evaluation_noise=0.3), site())


@pytest.mark.parametrize("name", RANGES)
def test_what_is_out_of_range_is_refused_by_name(name: str) -> None:
    low, high = RANGES[name]
    for value in (low / 2, high * 2):
        if (name == "sampling_rate" and value > 1) or value == 0:
            continue  # no plan at all
        with pytest.raises(PlanInvalid, match=name):
            check_plan(plan(**{name: type(low)(value) or 10**6}), site())


def allowing(**runs: Any) -> SiteConfig:
    return site().model_copy(update={"runs": SiteRuns.model_validate(runs)})


def test_a_hospital_may_take_no_part_in_training_or_evaluation() -> None:
    with pytest.raises(PolicyRefused, match="train is not accepted"):
        check_kind("train", allowing(kinds=("evaluate",)))
    with pytest.raises(PolicyRefused, match="evaluate is not accepted"):
        check_kind("evaluate", allowing(kinds=("train",)))
    check_kind("evaluate", allowing())


def test_a_hospital_may_list_the_models_that_it_accepts() -> None:
    check_model("ab" * 32, allowing())
    check_model("ab" * 32, allowing(models=("cd" * 32, "ab" * 32)))
    with pytest.raises(PolicyRefused, match="abababababababab"):
        check_model("ab" * 32, allowing(models=("cd" * 32,)))


def test_a_plan_that_differs_from_the_settings_is_refused_by_name() -> None:
    config = RunConfig().replace(**{"federation.rounds": 3, "privacy.evaluation_share": 0})
    check_settings(make_plan(config), config)
    for changed in ({"training.max_studies": 9}, {"privacy.epsilon": 7}, {"federation.rounds": 4}):
        with pytest.raises(PlanInvalid, match=next(iter(changed)).partition(".")[2]):
            check_settings(make_plan(config), config.replace(**changed))


def test_a_plan_that_would_keep_a_hospital_calculating_is_refused() -> None:
    with pytest.raises(PlanInvalid, match="1,000,000 steps"):
        check_plan(plan(rounds=10_000, steps_per_round=10_000), site())
