"""The hospital's answer to a plan, before any data is touched. The server may ask; site.toml decides."""

from __future__ import annotations

from fedmm.config import RunConfig, SiteConfig
from fedmm.errors import PlanInvalid, PolicyRefused
from fedmm.privacy.plan import PrivacyPlan

# Delta is the chance that the promise fails altogether; at 1/patients one patient's record could simply be published.
DELTA_MARGIN = 10


# Ranges in which clipping in float32 and the accountants are exact; no honest plan is outside (guess, generous).
RANGES = {
    "max_grad_norm": (1e-6, 1e6),
    "noise_multiplier": (1e-3, 1e3),
    "evaluation_noise": (0.0, 1e3),
    "noise_last": (0.25, 4.0),
    "sampling_rate": (1e-6, 1.0),
    "steps_per_round": (1, 10_000),
    "rounds": (1, 10_000),
}


MAX_STEPS = 1_000_000  # of a run: calibrating for 1e8 took more than a minute


def check_settings(plan: PrivacyPlan, config: RunConfig) -> None:
    """Do plan and settings of one message say the same? Raises: PlanInvalid naming what differs."""
    asked = {
        "unit": config.privacy.unit,
        "private": config.privacy.enabled,
        "epsilon": config.privacy.epsilon,
        "delta": config.privacy.delta,
        "max_grad_norm": config.privacy.max_grad_norm,
        "max_studies": config.training.max_studies,
        "sampling_rate": config.training.sampling_rate,
        "steps_per_round": config.training.local_steps,
        "rounds": config.federation.rounds,
        "noise_last": config.privacy.noise_last,
    }
    differs = [name for name, value in asked.items() if getattr(plan, name) != value]
    if differs:
        raise PlanInvalid(f"plan and settings differ in {', '.join(differs)}", fix="both come from one configuration")


def check_plan(plan: PrivacyPlan, site: SiteConfig) -> None:
    """Does this hospital's policy allow the plan? Returns nothing when it does. The budget is the ledger's to check.

    Raises: PolicyRefused for a run without privacy where site.toml does not allow it, too little noise, too high a
    rate, or another unit than the patient; PlanInvalid for a delta of 1 / (10 x public_patients) or more.
    """
    rules = site.privacy
    if plan.unit != "patient" and not rules.allow_record_unit:
        raise PolicyRefused(
            f"unit {plan.unit!r} is not accepted",
            why="this hospital promises privacy to patients, by adding or removing one",
            fix="privacy.unit = patient, or privacy.allow_record_unit in site.toml",
        )
    if not plan.private:
        if not rules.allow_not_private:
            raise PolicyRefused(
                "a run without privacy is not allowed here",
                fix="set privacy.enabled = true, or privacy.allow_not_private in site.toml for research data",
            )
        return
    for name, (low, high) in RANGES.items():
        if not low <= getattr(plan, name) <= high:
            raise PlanInvalid(f"{name} {getattr(plan, name):g} is outside {low:g} to {high:g}")
    if plan.rounds * plan.steps_per_round > MAX_STEPS:
        raise PlanInvalid(f"more than {MAX_STEPS:,} steps in one run", fix="ask for fewer rounds or steps")
    limit = 1 / (DELTA_MARGIN * rules.public_patients)
    if plan.delta >= limit:
        raise PlanInvalid(
            f"delta {plan.delta:g} must be below 1 / ({DELTA_MARGIN} x public_patients) = {limit:g}",
            fix="ask for a smaller privacy.delta",
        )
    least = min(
        plan.noise_in(1), plan.noise_in(plan.rounds)
    )  # of all rounds: from stage to stage it only grows or falls
    for name, noise in (("noise_multiplier", least), ("evaluation_noise", plan.evaluation_noise)):
        if noise < rules.min_noise_multiplier and (noise or name == "noise_multiplier"):
            raise PolicyRefused(
                f"{name} {noise:.4g} is below the least here, {rules.min_noise_multiplier:g}",
                fix="ask for a smaller epsilon, or fewer steps at a lower rate for the same epsilon",
            )
    if plan.sampling_rate > rules.max_sampling_rate:
        raise PolicyRefused(
            f"sampling_rate {plan.sampling_rate:g} is above the most here, {rules.max_sampling_rate:g}",
            fix="ask for a lower training.sampling_rate",
        )


def check_kind(kind: str, site: SiteConfig) -> None:
    """Raises: PolicyRefused if site.toml does not accept runs of this kind."""
    if kind not in site.runs.kinds:
        raise PolicyRefused(f"{kind} is not accepted here", fix="the hospital may add it to runs.kinds in site.toml")


def check_model(digest: str, site: SiteConfig) -> None:
    """digest: of the model's configuration. Raises: PolicyRefused if site.toml lists others only."""
    if site.runs.models and digest not in site.runs.models:
        raise PolicyRefused(
            f"the model configuration {digest[:16]} is not accepted here",
            fix=f"the hospital may add {digest} to runs.models in site.toml",
        )
