"""One plan couples sampling, clipping, noise and accounting. Nobody types the noise: it follows from epsilon."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedmm.config import RunConfig, Scalar
from fedmm.errors import PlanInvalid
from fedmm.privacy.accounting import calibrate

# Releases without protection, possible under a research policy only: a training without noise, exact scores of test
# patients. The ledger keeps them apart: no epsilon covers them.
UNPROTECTED = ("not_private", "exact_scores")
KINDS = ("train", "evaluate", *UNPROTECTED)
UNITS = ("patient", "record")
RELATION = "add_or_remove_one"


@dataclass(frozen=True)
class Event:
    """One Poisson-subsampled Gaussian mechanism, run `steps` times: what a release costs.

    kind: one of KINDS.  noise_multiplier: noise over sensitivity; 0 for the UNPROTECTED ones and only there.
    sampling_rate: public probability in (0, 1] that a patient takes part in a step.
    Raises: PlanInvalid for anything else, NaN and infinity included.
    """

    kind: str
    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanInvalid(f"event kind {self.kind!r} is unknown", fix=f"use one of {', '.join(KINDS)}")
        noise = _number("noise_multiplier", self.noise_multiplier)
        rate = _rate(self.sampling_rate)
        _count("steps", self.steps)
        if (self.kind in UNPROTECTED) != (noise == 0) or noise < 0:
            raise PlanInvalid(
                f"noise_multiplier {noise:g} does not fit an event of kind {self.kind}",
                why="a private event has noise above 0, an unprotected one has exactly 0",
            )
        # 1 and 1.0 must be the same event, the same hash and the same term
        object.__setattr__(self, "noise_multiplier", noise)
        object.__setattr__(self, "sampling_rate", rate)

    @property
    def private(self) -> bool:
        return self.kind not in UNPROTECTED

    def to_dict(self) -> dict[str, Scalar]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Event:
        """Raises: PlanInvalid for missing or unknown keys and wrong values."""
        return cls(**_exact_keys(cls, value))


@dataclass(frozen=True)
class PrivacyPlan:
    """What a run asks of each hospital, all rounds together.

    unit: whose participation is hidden.  epsilon, delta: budget of the whole run; void of meaning when not private.
    max_grad_norm: C, the longest gradient of one patient.
    sampling_rate: the one number that the sampler uses and the ledger charges.
    noise_multiplier: standard deviation of the noise on the sum, in units of C; 0 when not private.
    Raises: PlanInvalid for NaN, infinity, negative or contradictory values.
    """

    unit: str
    relation: str
    delta: float
    epsilon: float
    max_grad_norm: float
    sampling_rate: float
    steps_per_round: int
    rounds: int
    noise_multiplier: float
    private: bool

    def __post_init__(self) -> None:
        if self.unit not in UNITS or self.relation != RELATION:
            raise PlanInvalid(f"no guarantee for unit {self.unit!r} under relation {self.relation!r}")
        for name in ("delta", "epsilon", "max_grad_norm"):
            if _number(name, getattr(self, name)) <= 0:
                raise PlanInvalid(f"{name} must be above 0, not {getattr(self, name):g}")
        if self.delta >= 1:
            raise PlanInvalid(f"delta must be below 1, not {self.delta:g}", why="at 1 nothing is promised")
        for name in ("steps_per_round", "rounds"):
            _count(name, getattr(self, name))
        if not isinstance(self.private, bool):
            raise PlanInvalid("private must be true or false")
        for name in ("delta", "epsilon", "max_grad_norm", "sampling_rate", "noise_multiplier"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        self.round_event()

    def round_event(self) -> Event:
        """What one round costs a hospital: the event that its ledger charges. Raises: PlanInvalid."""
        kind = "train" if self.private else "not_private"
        return Event(kind, self.noise_multiplier, self.sampling_rate, self.steps_per_round)

    def digest(self) -> str:
        """SHA-256 of the plan as canonical JSON, hexadecimal."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_flat(self) -> dict[str, Scalar]:
        """For a message: field names to scalars."""
        return asdict(self)

    @classmethod
    def from_flat(cls, value: Mapping[str, Any]) -> PrivacyPlan:
        """From a peer's message. Raises: PlanInvalid for missing or unknown keys and wrong values."""
        return cls(**_exact_keys(cls, value))


def make_plan(config: RunConfig) -> PrivacyPlan:
    """The plan of a run: noise calibrated by PLD so that all rounds together cost at most `privacy.epsilon`.

    With `privacy.enabled` off: private is False and the noise 0.
    Raises: PlanInvalid if no noise reaches the epsilon.
    """
    wanted, training, rounds = config.privacy, config.training, config.federation.rounds
    noise = 0.0
    if wanted.enabled:
        try:
            noise = calibrate(
                epsilon=wanted.epsilon,
                delta=wanted.delta,
                sampling_rate=training.sampling_rate,
                steps=rounds * training.local_steps,
            )
        except ValueError as error:
            raise PlanInvalid(
                f"epsilon {wanted.epsilon:g} cannot be kept over {rounds} rounds of {training.local_steps} steps",
                why=str(error),
                fix="ask for fewer rounds or steps, a lower sampling rate, or a larger epsilon",
            ) from None
    return PrivacyPlan(
        unit=wanted.unit,
        relation=RELATION,
        delta=wanted.delta,
        epsilon=wanted.epsilon,
        max_grad_norm=wanted.max_grad_norm,
        sampling_rate=training.sampling_rate,
        steps_per_round=training.local_steps,
        rounds=rounds,
        noise_multiplier=noise,
        private=wanted.enabled,
    )


# --- checks -----------------------------------------------------------------------------------------------------------


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise PlanInvalid(f"{name} must be a finite number", why=f"it is {_shown(value)}")
    except OverflowError:
        raise PlanInvalid(f"{name} must be a finite number", why="it is too large") from None
    return float(value)


def _rate(value: object) -> float:
    rate = _number("sampling_rate", value)
    if not 0 < rate <= 1:
        raise PlanInvalid(f"sampling_rate must be above 0 and at most 1, not {rate:g}")
    return rate


def _count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**9:
        raise PlanInvalid(f"{name} must be a whole number from 1 to 1e9", why=f"it is {_shown(value)}")


def _shown(value: object) -> str:
    return repr(value)[:40] if isinstance(value, int | float) else f"of type {type(value).__name__}"


def _exact_keys(kind: type[Event] | type[PrivacyPlan], value: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(kind)}
    if not isinstance(value, Mapping) or set(value) != known:
        found = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise PlanInvalid(f"a {kind.__name__} needs exactly the keys {', '.join(sorted(known))}", why=f"found {found}")
    return dict(value)
