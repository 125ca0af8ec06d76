"""What may be done to a local gradient beside privacy: pulls that are known outside, and parts that stay as they are.

Both are free. A pull is added after the noise and is made of weights that were sent or released already; a part that stays
has no gradient, gets no noise and is not in the update at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedmm.config import RunConfig
from fedmm.errors import ConfigError
from fedmm.schema import MODALITIES, Batch

Still = tuple[str, ...]  # names of weights begin with one of these: they are not trained


def check_local(config: RunConfig) -> None:
    """Do the settings of local training go together? Raises: ConfigError."""
    training, federation = config.training, config.federation
    if training.optimizer == "sgd" and training.proximal * training.learning_rate > 1:
        raise ConfigError(
            f"training.proximal x training.learning_rate is {training.proximal * training.learning_rate:g}, above 1",
            why="each step would overshoot the round's weights, and the pull drive the model away from them",
            fix=f"training.proximal of at most {1 / training.learning_rate:g}, or a smaller step",
        )
    if federation.strategy != "scaffold":
        return
    if training.optimizer != "sgd":
        raise ConfigError(
            f"federation.strategy = scaffold does not work with training.optimizer = {training.optimizer}",
            why="the control variates are worked out from the change of the weights, which must be steps x rate x gradient",
            fix="training.optimizer = sgd",
        )
    if federation.weights != "uniform":
        raise ConfigError(
            f"federation.strategy = scaffold does not work with federation.weights = {federation.weights}",
            why="the control variates are a plain mean over hospitals, and the corrections must cancel in the average",
            fix="federation.weights = uniform",
        )


def pull(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, proximal: float, correction: Mapping[str, Tensor] | None
) -> bool:
    """Before each step of `optimizer`, add to the gradient of each trained weight w:
    mu (w - w_now) of FedProx (Li et al. 2020) and c - c_i of SCAFFOLD (Karimireddy et al. 2020).

    proximal: mu.  correction: c - c_i by name of the weight.  Returns whether there is anything to add.
    """
    if not proximal and correction is None:
        return False
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    terms = [
        (weight, weight.detach().clone(), None if correction is None else correction[name].to(weight.device))
        for name, weight in trained
    ]

    @torch.no_grad()
    def add(*_: object) -> None:
        for weight, start, shift in terms:
            total = torch.zeros_like(weight) if weight.grad is None else weight.grad
            if proximal:
                total = total + proximal * (weight - start)
            weight.grad = total if shift is None else total + shift

    optimizer.register_step_pre_hook(add)
    return True


def still_parts(declared: Sequence[str]) -> Still:
    """What belongs to the modalities alone that a hospital does not declare."""
    return tuple(f"{part}.{name}." for name in MODALITIES if name not in declared for part in ("encoders", "norms"))


def clip_groups(model: nn.Module, wanted: str) -> list[list[nn.Parameter]]:
    """Weights that are clipped together. modality: each one's encoder and norm, then all others; all: no groups."""
    if wanted == "all":
        return []
    starts = [(f"encoders.{name}.", f"norms.{name}.") for name in MODALITIES]
    named = list(model.named_parameters())
    groups = [[weight for name, weight in named if name.startswith(start)] for start in starts]
    own = tuple(prefix for start in starts for prefix in start)
    return [*groups, [weight for name, weight in named if not name.startswith(own)]]


def unchanged(names: Iterable[str], still: Still) -> list[str]:
    """Those that are not trained."""
    return [name for name in names if name.startswith(still)]


def see_only(batch: Batch, modalities: Sequence[str]) -> Batch:
    """The batch as if studies had no other modality."""
    if set(modalities) == set(MODALITIES):
        return batch
    allowed_M = torch.tensor([name in modalities for name in MODALITIES], device=batch.seen_BM.device)
    return replace(batch, seen_BM=batch.seen_BM & allowed_M)
