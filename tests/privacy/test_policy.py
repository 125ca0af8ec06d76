"""The hospital's rules against a coordinator's plan."""

from __future__ import annotations

from typing import Any

import pytest

from fedmm.errors import PlanInvalid, PolicyRefused
from fedmm.privacy.plan import PrivacyPlan
from fedmm.privacy.policy import check_plan
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


def test_only_patients_are_protected_here() -> None:
    with pytest.raises(PolicyRefused, match="unit 'record'"):
        check_plan(plan(unit="record"), site())


def test_delta_must_be_small_for_the_number_of_patients() -> None:
    with pytest.raises(PlanInvalid, match=r"delta 0\.001"):
        check_plan(plan(delta=1e-3), site())  # 1 / (10 x 100), and equal is too much
    check_plan(plan(delta=9.9e-4), site())
