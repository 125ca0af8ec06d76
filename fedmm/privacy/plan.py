"""One plan couples sampling, clipping, noise and accounting. Nobody types the noise: it follows from epsilon."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fedmm.config import RunConfig, Scalar
from fedmm.errors import PlanInvalid
from fedmm.privacy.accounting import History, Term, calibrate

# Releases without protection, possible under a research policy only: a training without noise, exact scores of test
# patients. The ledger keeps them apart: no epsilon covers them.
UNPROTECTED = ("not_private", "exact_scores")
# A training round, noisy score histograms of the test patients, the noisy number of patients.
KINDS = ("train", "evaluate", "count", *UNPROTECTED)
UNITS = ("patient", "record")
RELATION = "add_or_remove_one"
STAGES = 4  # of a run, in which the noise is constant: accounting sees at most as many different events
SAMPLING = "poisson"  # the accountants' sampling, and the only one for which an epsilon is printed


class Rate(float):
    """A sampling rate: public probability in (0, 1] that a patient takes part in a step.

    One type for the sampler, which accepts nothing else, the plan and the ledger's event: one number in one place.
    Raises: PlanInvalid for anything else, NaN and infinity included.
    """

    def __new__(cls, value: object) -> Rate:
        rate = _number("sampling_rate", value)
        if not 0 < rate <= 1:
            raise PlanInvalid(f"sampling_rate must be above 0 and at most 1, not {rate:g}")
        return super().__new__(cls, rate)


@dataclass(frozen=True)
class Event:
    """One Poisson-subsampled Gaussian mechanism, run `steps` times: what a release costs.

    kind: one of KINDS.  noise_multiplier: noise over sensitivity; 0 for the UNPROTECTED ones and only there.
    sampling_rate: public probability in (0, 1] that a patient takes part in a step.
    Raises: PlanInvalid for anything else, NaN and infinity included.
    """

    kind: str
    noise_multiplier: float
    sampling_rate: Rate
    steps: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanInvalid(f"event kind {self.kind!r} is unknown", fix=f"use one of {', '.join(KINDS)}")
        noise = _number("noise_multiplier", self.noise_multiplier)
        rate = Rate(self.sampling_rate)
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
        return {**asdict(self), "sampling_rate": float(self.sampling_rate)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Event:
        """Raises: PlanInvalid for missing or unknown keys and wrong values."""
        return cls(**_exact_keys(cls, value))


@dataclass(frozen=True)
class PrivacyPlan:
    """What a run asks of each hospital, all rounds together.

    unit: whose participation is hidden.  epsilon, delta: budget of the whole run; void of meaning when not private.
    sampling: "poisson"; for another sampler no epsilon is known.
    max_grad_norm: C, the longest gradient of one unit.  max_studies: public cap on the studies of one patient in a step.
    sampling_rate: the one number that the sampler uses and the ledger charges.
    noise_multiplier: standard deviation of the noise on the sum, in units of C; 0 when not private. Of the first stage.
    evaluation_noise: the same for the score histograms after the last round; 0 when none are asked for.
    noise_last: r, the noise of the last stage in units of the first one's. The rounds fall into STAGES stages of nearly
    equal length; stage k = 0 .. 3 has noise_multiplier x r^(k/3). 1: the same noise in every round.
    Raises: PlanInvalid for NaN, infinity, negative or contradictory values.
    """

    unit: str
    relation: str
    delta: float
    epsilon: float
    sampling: str
    max_grad_norm: float
    max_studies: int
    sampling_rate: Rate
    steps_per_round: int
    rounds: int
    noise_multiplier: float
    evaluation_noise: float
    private: bool
    noise_last: float = 1.0

    def __post_init__(self) -> None:
        if self.unit not in UNITS or self.relation != RELATION:
            raise PlanInvalid(f"no guarantee for unit {self.unit!r} under relation {self.relation!r}")
        if self.sampling != SAMPLING:
            raise PlanInvalid(
                "no epsilon is known for this sampler",
                why="shuffled batches accounted as Poisson claimed 0.7 where the truth was above 4",
                fix=f"sampling is {SAMPLING!r}: every patient takes part in a step independently",
            )
        for name in ("delta", "epsilon", "max_grad_norm", "noise_last"):
            if _number(name, getattr(self, name)) <= 0:
                raise PlanInvalid(f"{name} must be above 0, not {getattr(self, name):g}")
        if self.delta >= 1:
            raise PlanInvalid(f"delta must be below 1, not {self.delta:g}", why="at 1 nothing is promised")
        for name in ("steps_per_round", "rounds", "max_studies"):
            _count(name, getattr(self, name))
        if not isinstance(self.private, bool):
            raise PlanInvalid("private must be true or false")
        if self.noise_last != 1 and self.rounds < STAGES:
            raise PlanInvalid(
                f"noise_last {self.noise_last:g} needs {STAGES} rounds or more, not {self.rounds}",
                why="noise changes from one quarter of the rounds to the next",
                fix="privacy.noise_last = 1",
            )
        for name in ("delta", "epsilon", "max_grad_norm", "noise_multiplier", "evaluation_noise", "noise_last"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        object.__setattr__(self, "sampling_rate", Rate(self.sampling_rate))
        if self.evaluation_noise < 0 or (self.evaluation_noise > 0 and not self.private):
            raise PlanInvalid(f"evaluation_noise {self.evaluation_noise:g} does not fit this plan")
        self.round_event(1)
        self.round_event(self.rounds)

    def noise_in(self, round: int) -> float:
        """Noise multiplier of a round, 1 to `rounds`. Raises: PlanInvalid for a round that the plan does not have."""
        if not 1 <= round <= self.rounds:
            raise PlanInvalid(f"the plan has rounds 1 to {self.rounds}, not {round}")
        return self.noise_multiplier * self._times((round - 1) * STAGES // self.rounds)

    def of_round(self, round: int) -> PrivacyPlan:
        """The plan as it is in one round, with this round's noise: what may be trained with. Its `round_event` is the same
        for every round, and the one of this plan for that round: what is added is what is charged. Raises: PlanInvalid."""
        return replace(self, noise_multiplier=self.noise_in(round), noise_last=1.0)

    def stages(self, *, after: int = 0, without: Collection[int] = ()) -> dict[float, int]:
        """Noise in units of `noise_multiplier` to the number of rounds that have it, of those after round `after`, and not
        one of `without`. Raises: PlanInvalid if `after` is below 0."""
        if after < 0:
            raise PlanInvalid(f"the plan has {self.rounds} rounds, not {self.rounds - after}")
        found: dict[float, int] = {}
        ends = [-(-stage * self.rounds // STAGES) for stage in range(STAGES + 1)]
        for stage, (start, end) in enumerate(itertools.pairwise(ends)):
            first = max(start, after)
            if (count := end - first - sum(first < round <= end for round in set(without))) > 0:
                times = self._times(stage)
                found[times] = found.get(times, 0) + count
        return found

    def _times(self, stage: int) -> float:
        return float(self.noise_last ** (stage / (STAGES - 1)))

    def round_event(self, round: int) -> Event:
        """What one round costs a patient: the event that the ledger charges. Raises: PlanInvalid.

        Ledgers protect patients whatever the plan's unit. With unit "record" up to k = max_studies records of a patient
        are drawn independently, each worth C: shifts of at most k C with probability at most 1 - (1 - q)^k. That pair
        dominates the mixture over the number drawn (mixtures of Gaussians are monotone in their shifts:
        Choquette-Choo et al. 2024, "Privacy Amplification for Matrix Mechanisms", lemma on MoG mechanisms).
        """
        return self._event(self.noise_in(round))

    def rest(self, *, after: int = 0, without: Collection[int] = ()) -> list[Event]:
        """What the rounds that `stages` counts cost a patient: one event for each noise. Raises: PlanInvalid."""
        stages = self.stages(after=after, without=without)
        made = [(self._event(self.noise_multiplier * times), count) for times, count in stages.items()]
        return [replace(event, steps=count * event.steps) for event, count in made]

    def _event(self, noise: float) -> Event:
        if not self.private:
            return Event("not_private", noise, self.sampling_rate, self.steps_per_round)
        if self.unit == "patient":
            return Event("train", noise, self.sampling_rate, self.steps_per_round)
        reached = Rate(1 - (1 - self.sampling_rate) ** self.max_studies)
        return Event("train", noise / self.max_studies, reached, self.steps_per_round)

    def evaluation_event(self) -> Event | None:
        """What the score histograms after the last round cost; None when none are asked for."""
        return Event("evaluate", self.evaluation_noise, Rate(1.0), 1) if self.evaluation_noise else None

    def later(self) -> str:
        """For people, behind the noise of the first stage: what becomes of it. Empty when it stays."""
        return "" if self.noise_last == 1 else f", in {STAGES} stages to {self.noise_last:g} times that"

    def digest(self) -> str:
        """SHA-256 of the plan as canonical JSON, hexadecimal."""
        text = json.dumps(self.to_flat(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_flat(self) -> dict[str, Scalar]:
        """For a message: field names to scalars. A `noise_last` of 1 is left out: older plans, run folders and digests
        hold."""
        flat = {**asdict(self), "sampling_rate": float(self.sampling_rate)}
        return {name: value for name, value in flat.items() if name != "noise_last" or value != 1}

    @classmethod
    def from_flat(cls, value: Mapping[str, Any]) -> PrivacyPlan:
        """From a peer's message. Raises: PlanInvalid for missing or unknown keys and wrong values."""
        if isinstance(value, Mapping):
            value = {"noise_last": 1.0, **value}
        return cls(**_exact_keys(cls, value))


def make_plan(config: RunConfig, *, noisy_scores: bool = False) -> PrivacyPlan:
    """The plan of a run: noise calibrated by PLD so that all rounds together cost at most `privacy.epsilon`.

    noisy_scores: also score histograms after the last round, for a share `privacy.evaluation_share` of that epsilon.
    With `privacy.enabled` off: private is False and the noise 0.
    Raises: PlanInvalid if no noise reaches the epsilon.
    """
    wanted, training, rounds = config.privacy, config.training, config.federation.rounds
    evaluation = evaluation_noise(config) if noisy_scores else 0.0
    plan = PrivacyPlan(
        unit=wanted.unit,
        relation=RELATION,
        delta=wanted.delta,
        epsilon=wanted.epsilon,
        sampling=SAMPLING,
        max_grad_norm=wanted.max_grad_norm,
        max_studies=training.max_studies,
        sampling_rate=Rate(training.sampling_rate),
        steps_per_round=training.local_steps,
        rounds=rounds,
        noise_multiplier=float(wanted.enabled),
        evaluation_noise=evaluation,
        private=wanted.enabled,
        noise_last=wanted.noise_last,
    )
    if not plan.private:
        return plan
    before: History = (Term(evaluation, 1.0, 1),) if evaluation else ()
    try:
        noise = calibrate(
            epsilon=wanted.epsilon,
            delta=wanted.delta,
            sampling_rate=training.sampling_rate,
            steps={times: count * training.local_steps for times, count in plan.stages().items()},
            before=before,
        )
    except ValueError as error:
        raise PlanInvalid(
            f"epsilon {wanted.epsilon:g} cannot be kept over {rounds} rounds of {training.local_steps} steps",
            why=str(error),
            fix="ask for fewer rounds or steps, a lower sampling rate, or a larger epsilon",
        ) from None
    return replace(plan, noise_multiplier=noise)


def evaluation_noise(config: RunConfig) -> float:
    """Noise multiplier of the score histograms; 0 when none are wanted. Raises: PlanInvalid as make_plan."""
    wanted = config.privacy
    if not wanted.enabled or not wanted.evaluation_share:
        return 0.0
    epsilon = wanted.epsilon * wanted.evaluation_share
    try:
        return calibrate(epsilon=epsilon, delta=wanted.delta, sampling_rate=1.0, steps=1)
    except ValueError as error:
        raise PlanInvalid(
            f"no noise gives test scores for epsilon {epsilon:g}", why=str(error), fix="raise privacy.evaluation_share"
        ) from None


# --- checks -----------------------------------------------------------------------------------------------------------


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise PlanInvalid(f"{name} must be a finite number", why=f"it is {_shown(value)}")
    except OverflowError:
        raise PlanInvalid(f"{name} must be a finite number", why="it is too large") from None
    return float(value)


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
