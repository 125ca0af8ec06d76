"""How a patient's gradient is shortened to C: by which rule, and which weights share which part of the bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fedmm.errors import PlanInvalid

# P patients, G shares: sets of weights that are clipped together, K parameters

RULES = ("flat", "auto")
BELOW = 1 - 1e-14  # so that rounding, five times half of 2e-16, cannot lead above the bound
GAMMA = 0.01  # stability constant of AUTO-S (Bu et al. 2023), here in units of the bound: a factor is at most 100
# Of one share of one patient's gradient. C is at least 1e-6 (policy.RANGES), so C / norm >= 1e-37 is a normal float32.
LARGEST_NORM = 1e30


def clip_factors(norm_GP: Tensor, max_norm: float, *, rule: str = "flat") -> tuple[Tensor, int]:
    """(G, P) float64: what to multiply each share of each patient's gradient with; and how many patients add nothing.

    With C_G = max_norm / sqrt(G), of the norm n of one share:
    flat: min(1, C_G / n) (Abadi et al. 2016, Algorithm 1).  auto: C_G / (n + GAMMA C_G), AUTO-S of Bu et al. 2023,
    "Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger", there with gamma = 0.01.
    Guarantee: factor x n <= C_G, under flat up to rounding in double precision, under auto in spite of it; so all G shares
    together are at most max_norm. A patient of whom one norm is NaN or not below LARGEST_NORM has factor 0 everywhere.
    """
    bound = max_norm / math.sqrt(len(norm_GP))
    finite_P = (norm_GP < LARGEST_NORM).all(0)  # false for NaN
    if rule == "auto":
        factor_GP = BELOW / (norm_GP / bound + GAMMA)
    else:
        factor_GP = (bound / norm_GP.clamp(min=1e-12)).clamp(max=1.0)
    return torch.where(finite_P, factor_GP, 0.0), int((~finite_P).sum())


class Clip:
    """A rule, and which of the trained parameters are clipped together.

    parameters: all that are trained.  rule: one of RULES.  groups: which of them share a bound; none given: all of them
    do. A group without a trained parameter does not count.
    Raises: PlanInvalid for an unknown rule, and unless each trained parameter is in exactly one group.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, rule: str = "flat", groups: Sequence[Iterable[nn.Parameter]] = ()
    ) -> None:
        if rule not in RULES:
            raise PlanInvalid("this clip rule is unknown", fix=f"use one of {', '.join(RULES)}")
        trained = {id(parameter) for parameter in parameters}
        found = ([id(p) for p in group if id(p) in trained] for group in groups or (parameters,))
        shares = [own for own in found if own]
        if sorted(key for own in shares for key in own) != sorted(trained):
            raise PlanInvalid(
                "a weight is in none or several of the groups that are clipped apart",
                why="what is in no group would not be clipped",
                fix="each trained parameter in one group",
            )
        self.rule, self.shares, self._device = rule, len(shares), parameters[0].device
        self._share = {key: number for number, own in enumerate(shares) for key in own}

    def share_of(self, parameter: Tensor) -> int:
        return self._share[id(parameter)]

    def sorted(self, rows: Iterable[tuple[Tensor, Tensor]], patients: int) -> list[Tensor]:
        """For each share the rows (P,) of its parameters, (., P); a row of zeros where there is none."""
        found: list[list[Tensor]] = [[] for _ in range(self.shares)]
        for parameter, row_P in rows:
            found[self.share_of(parameter)].append(row_P)
        nothing = torch.zeros(patients, dtype=torch.float64, device=self._device)
        return [torch.stack(own or [nothing]) for own in found]

    def factors(self, norm_GP: Tensor, max_norm: float) -> tuple[Tensor, int]:
        """As `clip_factors`, by this rule."""
        return clip_factors(norm_GP, max_norm, rule=self.rule)
