"""Control variates against drift, kept by the server (SCAFFOLD, Karimireddy et al. 2020, option II).

c_i is what a step at hospital i was on average in the last round that it took part in, c the mean of them all. A hospital
that is sent c - c_i adds it to each step, and so goes where all would go together. All of it is worked out here, from
weights that hospitals released: post-processing, which costs no privacy, and hospitals keep nothing between rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedmm.training.local import Still

PREFIX = "scaffold"


class ControlVariates:
    """still: by hospital of this run, what it does not train; it has no part in those weights' mean.

    steps, rate: K and the step size of a round.  bound: longest change of the weights in a round.
    """

    def __init__(self, still: Mapping[str, Still], *, steps: int, rate: float, bound: float) -> None:
        self._still, self._length, self._bound = still, steps * rate, bound
        self._own: dict[str, dict[str, Tensor]] = {}
        self._sent: dict[str, dict[str, Tensor]] = {}
        self._learnt: dict[str, dict[str, Tensor]] = {}

    def correction(self, hospital: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """c - c_i, for the round that begins; None while nothing is known. weights: those that are sent.

        Zero in what the hospital does not train; shortened where it alone would be a longer change than `bound`, which
        hospitals refuse.
        """
        if not self._own:
            return None
        own, still = self._own.get(hospital, {}), self._still.get(hospital, ())
        found = {
            name: torch.zeros_like(value)
            if name.startswith(still)
            else self._mean(name, value) - own.get(name, torch.zeros_like(value))
            for name, value in weights.items()
        }
        longest, length = self._bound / self._length, norm(found)
        if length > longest:
            found = {name: value * (0.999 * longest / length) for name, value in found.items()}
        self._sent[hospital] = found
        return found

    def _mean(self, name: str, like: Tensor) -> Tensor:
        """c. Hospitals that have not answered yet count with zero."""
        everybody = sorted({*self._own, *self._still})
        have = [h for h in everybody if not name.startswith(self._still.get(h, ()))]
        known = [self._own[h][name] for h in have if name in self._own.get(h, {})]
        return torch.stack(known).sum(0) / len(have) if known else torch.zeros_like(like)

    def learn(self, hospital: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """after: what came back. Counts once the round is `over`: until then others may be asked, with what was known.

        c_i+ = c_i - c + (before - after) / (K rate): the mean step less what was added to it.
        """
        sent, still = self._sent.get(hospital, {}), self._still.get(hospital, ())
        self._learnt[hospital] = {
            name: (before[name] - value) / self._length - sent.get(name, torch.zeros_like(value))
            for name, value in after.items()
            if not name.startswith(still)
        }

    def over(self) -> None:
        """The round is. Whoever did not answer keeps its c_i."""
        for hospital, learnt in sorted(self._learnt.items()):
            self._own[hospital] = learnt
        self._learnt, self._sent = {}, {}

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {f"{PREFIX}/{h}/{name}": value for h, own in self._own.items() for name, value in own.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Undo of `state`; other keys are left alone."""
        for key, value in state.items():
            prefix, _, rest = key.partition("/")
            if prefix == PREFIX:
                hospital, _, name = rest.partition("/")
                self._own.setdefault(hospital, {})[name] = value


def norm(tensors: Mapping[str, Tensor]) -> float:
    """L2, over all together."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))
