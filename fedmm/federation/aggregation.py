"""From checked replies to the next weights, around any Flower strategy, and all that is remembered for it.

What hospitals sent is released, so everything here is post-processing and free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedmm.config import ROBUST, RunConfig
from fedmm.errors import RunFailed
from fedmm.federation.checks import Fit
from fedmm.federation.fold import Everybody, Mean
from fedmm.federation.messages import CORRECTION, TrainAsk, array_record, config_record, view, views
from fedmm.federation.scaffold import ControlVariates
from fedmm.federation.strategies import restore_strategy, strategy_state
from fedmm.training.checkpoint import Checkpoint
from fedmm.training.local import Still, still_parts

AVERAGE = "average"  # in a checkpoint: sum of the weights after each round, decayed; float64


class Aggregator:
    """arrays: the weights that hospitals train on.  model: those that are evaluated and become the model.  still: by hospital
    what it does not train.

    declared: by hospital the modalities whose parts it trains.  start: where to go on.
    """

    def __init__(
        self, strategy: Strategy, config: RunConfig, *, declared: Mapping[str, Sequence[str]], start: Checkpoint
    ) -> None:
        self._strategy, self._decay = strategy, config.federation.average
        self.still = {hospital: still_parts(names) for hospital, names in declared.items()}
        self._clip, liars = config.federation.clip_norm, config.federation.byzantine
        _check_declared(self.still, liars)
        robust = config.federation.strategy in ROBUST
        self._replies: Mean | Everybody = Everybody(self.still, liars=liars) if robust else Mean(self.still)
        self._round, self._sum = start.round, _part(start.strategy, AVERAGE)
        self._variates: ControlVariates | None = None
        if config.federation.strategy == "scaffold":
            training = config.training
            self._variates = ControlVariates(
                self.still, steps=training.local_steps, rate=training.learning_rate, bound=training.max_update_norm
            )
            self._variates.restore(start.strategy)
        self.arrays = array_record(start.weights)
        if start.round:
            restore_strategy(strategy, start.strategy, self.arrays)

    @property
    def model(self) -> ArrayRecord:
        if not self._sum:
            return self.arrays
        return array_record(_corrected(self._sum, self._decay, self._round))

    def questions(self, number: int, ask: TrainAsk, grid: Grid, names: Mapping[int, str]) -> list[Message]:
        """The round's messages, to the nodes in `names` alone."""
        messages = self._strategy.configure_train(number, self.arrays, config_record(ask), grid)
        chosen = [message for message in messages if message.metadata.dst_node_id in names]
        if self._variates is None:
            return chosen
        weights = tensors(self.arrays)
        for message in chosen:
            correction = self._variates.correction(names[message.metadata.dst_node_id], weights)
            if correction is not None:  # Flower gives every message the same content
                message.content = RecordDict({**message.content, CORRECTION: array_record(correction)})
        return chosen

    def add(self, fit: Fit) -> None:
        """A checked reply of this round, as it arrives. Another attempt of the round adds to the same ones."""
        if self._clip:
            shorten(fit, self.arrays, self._clip)
        if self._variates is not None:
            self._variates.learn(fit.hospital, tensors(self.arrays), tensors(fit.arrays))
        self._replies.add(fit)

    def finish(self, number: int) -> None:
        """The round, from what was added. Raises: RunFailed if the result is nothing, or not finite."""
        if self._variates is not None:
            self._variates.over()
        arrays, _ = self._strategy.aggregate_train(number, self._replies.replies(self.arrays))
        if arrays is None:
            raise RunFailed(f"round {number}: the strategy gave no weights")
        weights = tensors(arrays)
        if not all(torch.isfinite(value).all() for value in weights.values()):
            raise RunFailed(
                f"round {number}: the aggregated weights are not finite",
                fix="lower training.learning_rate or federation.server_learning_rate",
            )
        self.arrays, self._round = array_record(weights), number
        if self._decay:
            self._sum = {
                name: self._decay * self._sum.get(name, torch.zeros_like(value, dtype=torch.float64))
                + (1 - self._decay) * value.double()
                for name, value in weights.items()
            }

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint: beside `arrays`, all that the next round depends on."""
        return {
            **strategy_state(self._strategy),
            **(self._variates.state() if self._variates is not None else {}),
            **{f"{AVERAGE}/{name}": value for name, value in self._sum.items()},
        }


def final_weights(checkpoint: Checkpoint, decay: float) -> dict[str, Tensor]:
    """The model of a run that stands here. decay: federation.average."""
    total = _part(checkpoint.strategy, AVERAGE)
    return _corrected(total, decay, checkpoint.round) if total else checkpoint.weights


def _corrected(total: Mapping[str, Tensor], decay: float, rounds: int) -> dict[str, Tensor]:
    """Without the pull of the zeros that the sum began with (Kingma and Ba 2015, section 3)."""
    return {name: (value / (1 - decay**rounds)).float() for name, value in total.items()}


def _check_declared(still: Mapping[str, Still], liars: int) -> None:
    """Raises: RunFailed if those who train a part are too few for one that lies to be outvoted."""
    for part in {part for parts in still.values() for part in parts}:
        own = sorted(hospital for hospital, parts in still.items() if part not in parts)
        if liars and 0 < len(own) < 2 * liars + 1:
            raise RunFailed(
                f"{', '.join(own)} alone train {part}*; federation.byzantine = {liars} asks for {2 * liars + 1} hospitals",
                why="among fewer, those that lie cannot be outvoted",
                fix="fewer liars, or hospitals that all declare the modality or none of them",
            )


def shorten(fit: Fit, before: ArrayRecord, bound: float) -> None:
    """Norm bounding (Sun et al. 2019): no hospital moves the weights further than `bound`. Changes `fit`."""
    if fit.length <= bound:
        return
    for name, start in views(before).items():  # one by one, so that two of a model are never there
        change = view(fit.arrays[name], name) - start
        fit.arrays[name] = Array(np.asarray(start + change * np.float32(bound / fit.length)))


def tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """float32: a strategy may compute in double (FedAdam and FedYogi do), hospitals and checkpoints do not."""
    return {name: torch.from_numpy(array.numpy().astype("float32")) for name, array in arrays.items()}


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}/"): v for k, v in state.items() if k.startswith(f"{prefix}/")}
