"""A hospital under audit: the real one, with canaries among its patients, and a count of the steps that it takes.

Made by `fedmm audit` in its own process, around a copy of the hospital folder; no message, setting or variable reaches it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from client.app import Hospital, NoiseFor, system_noise
from client.site import Site
from fedmm.data.strangers import Canary
from fedmm.privacy.audit import SIGNIFICANCE, Floats, fdp_bound, guess, one_run_bound, rates_bound
from fedmm.privacy.charge import Charge
from fedmm.privacy.noise import Noise
from fedmm.privacy.plan import Rate
from fedmm.training.canaries import Diracs, among, shares_of
from fedmm.training.loop import Cohort, Workbench

GUESSED = 5  # one canary in so many is guessed about: half the highest scores, half the lowest
OBSERVED = 12  # rounds after which the canaries that are files are looked at
SEEN_BY = {
    "update": "the coordinator, from the hospital's updates",
    "global": "another hospital, from the model of each round",
    "final": "the public, from the final model",
}


class CountedNoise:
    """The hospital's own noise; each sample that is drawn is a step."""

    def __init__(self, noise: Noise, count: Callable[[], None]) -> None:
        self._noise, self._count = noise, count

    def gaussian(self, shape: Sequence[int], std: float) -> Tensor:
        return self._noise.gaussian(shape, std)

    def sample(self, count: int, rate: Rate) -> list[int]:
        self._count()
        return self._noise.sample(count, rate)

    def generator(self) -> np.random.Generator:
        return self._noise.generator()


class AuditedHospital(Hospital):
    """name: of the one that has the canaries; all others answer as ever.  in_M: which canaries are inside.

    steps: taken, by round, at the audited one.  diracs: made when it first trains.
    """

    def __init__(
        self,
        name: str,
        in_M: NDArray[np.bool_],
        rng: np.random.Generator,
        *,
        clip_groups: str = "all",
        noise_for: NoiseFor = system_noise,
    ) -> None:
        super().__init__(self._counted)
        self.name, self._in_M, self._rng, self._noise_of = name, in_M, rng, noise_for
        self._clip_groups = clip_groups
        self.diracs: Diracs | None = None
        self.steps: Counter[int] = Counter()

    def noise(self, number: int) -> Noise:
        """As it makes it for a round."""
        return self._noise_of(self.name, number)

    def _counted(self, hospital: str, number: int) -> Noise:
        noise = self._noise_of(hospital, number)
        if hospital != self.name:
            return noise
        return CountedNoise(noise, lambda: self.steps.update([number]))

    def patients(self, site: Site, bench: Workbench, charge: Charge) -> Cohort:
        cohort = super().patients(site, bench, charge)
        if site.name != self.name:
            return cohort
        if self.diracs is None:
            self.diracs = Diracs(shares_of(bench, self._clip_groups), self._in_M, self._rng)
        return among(bench, cohort, self.diracs)


@dataclass
class Heard:
    """What onlookers of a run learn, as it goes on; every score is higher for a canary that is inside.

    losses: weights to (P,) of the canaries that are files.
    totals: by (kind of canary, who sees), (M,) sums of what each round told.
    """

    hospital: AuditedHospital
    canaries: list[Canary]
    losses: Callable[[Mapping[str, Tensor]], Floats]
    rounds: int
    number: int = 0
    totals: dict[tuple[str, str], Floats] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    first_losses: Floats = field(default_factory=lambda: np.zeros(0))

    def round(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """before: the global model that was sent.  after: what the audited hospital sent back."""
        self.number += 1
        diracs = self.hospital.diracs
        if not self.first:
            self.first, self.first_losses = dict(before), self.losses(before)
        if diracs is not None:
            self._add("dirac", "update", diracs.along({n: v - after[n] for n, v in before.items()}))
            self._add("dirac", "global", diracs.along({n: v - before[n] for n, v in self.first.items()}))
        if self.number % max(1, self.rounds // OBSERVED) == 0:
            was, now = self.losses(before), self.losses(after)
            self._files("update", was - now)
            self._files("global", self.first_losses - was)

    def end(self, final: Mapping[str, Tensor]) -> None:
        if self.hospital.diracs is not None:
            self._add("dirac", "final", self.hospital.diracs.along({n: v - final[n] for n, v in self.first.items()}))
        self._files("final", self.first_losses - self.losses(final))

    def _files(self, seen_by: str, score_P: Floats) -> None:
        for kind in dict.fromkeys(canary.kind for canary in self.canaries):
            mine = [i for i, canary in enumerate(self.canaries) if canary.kind == kind]
            self._add(kind, seen_by, score_P[mine])

    def _add(self, kind: str, seen_by: str, score_M: Floats) -> None:
        self.totals[kind, seen_by] = self.totals.get((kind, seen_by), np.zeros(len(score_M))) + score_M


def views_of(heard: Heard, in_M: NDArray[np.bool_], *, delta: float) -> Iterator[dict[str, Any]]:
    """One view for each kind of canary and onlooker. `lower_bound` holds for all views together at 95 %."""
    each = SIGNIFICANCE / len(heard.totals)  # Bonferroni: one view in error is an error
    for (kind, onlooker), score_M in heard.totals.items():
        inside_M = in_M if kind == "dirac" else np.array([c.inside for c in heard.canaries if c.kind == kind])
        wanted = max(2, len(inside_M) // GUESSED // 2 * 2)
        found = guess(score_M, inside_M, wanted)
        order_M = np.argsort(-score_M, kind="stable")
        top_M = inside_M[order_M[: wanted // 2]]
        rates = rates_bound(
            int(top_M.sum()),
            int(inside_M.sum()),
            int((~top_M).sum()),
            int((~inside_M).sum()),
            delta=delta,
            significance=each,
        )
        yield {
            "canary": kind,
            "seen_by": SEEN_BY[onlooker],
            **found._asdict(),
            "lower_bound": one_run_bound(found, delta=delta, significance=each),
            "fdp_lower_bound": fdp_bound(found, delta=delta, significance=each),
            "clopper_pearson": rates,
        }
