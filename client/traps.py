"""Weights that a coordinator made to read patients out of an update, and not to learn from them.

Two ways are known, and both leave a mark that no honest weights have:

    imprint (Fowl et al. 2022, "Robbing the Fed"): the rows of a matrix are copies of one direction, with other biases, so
        that each row's gradient is about the patients of one bin
    trap weights (Boenisch et al. 2023, "When the curious abandon honesty"): in each row the positive entries are the negative
        ones, scaled and in another order, so that a neuron is silent for all patients but one

The guarantee of a private plan does not depend on this file: its noise covers whatever the weights are. It is for what the
guarantee does not cover: runs without privacy, and rounding, which large weights blow up. Whoever knows this file can make
weights that pass it; it ends the attacks as they were published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from fedmm.errors import PolicyRefused

LEAST = 16  # rows, columns: in few dimensions rows are parallel by chance
ROWS = (
    256  # of a larger matrix so many are looked at, drawn anew each time: a quarter of the rows cannot hide from that
)
PARALLEL, SAME = 1 - 1e-6, 1e-5  # guess
SHARE = 0.25  # guess: of the rows; the published attacks use all


def check_weights(weights: Mapping[str, Tensor], limit: float) -> None:
    """limit: of a weight's magnitude, `runs.max_abs_weight`. weights: finite, float32. Raises: PolicyRefused, without values.

    On one machine all hospitals get the same weights: what passed last is not looked at again.
    """
    digest = hashlib.sha256(repr(limit).encode())
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)}\n".encode())
        digest.update(weights[name].numpy().tobytes())
    if _passed != [digest.digest()]:
        _look(weights, limit)
        _passed[:] = [digest.digest()]


_passed: list[bytes] = []  # digest of the weights that were looked at last, and of the limit


def _look(weights: Mapping[str, Tensor], limit: float) -> None:
    """Raises: PolicyRefused."""
    for name, value in weights.items():
        if value.numel() and float(value.abs().max()) > limit:
            raise PolicyRefused(
                f"a weight of {name} is larger than this hospital accepts, {limit:g}",
                why="large weights blow up rounding and read out single patients",
                fix="lower training.learning_rate or federation.server_learning_rate, or raise runs.max_abs_weight in site.toml",
            )
    for name, value in weights.items():
        rows = _rows(value)
        if len(rows) >= LEAST and (parallel(rows) > SHARE or mirrored(rows) > SHARE):
            raise PolicyRefused(
                f"{name} looks as if it was made to read out patients",
                why="many of its rows are copies of one another, or of themselves with the sign turned",
                fix="ask the coordinator where these weights come from",
            )


def _rows(value: Tensor) -> Tensor:
    """(R, K) rows of a matrix or filters of a convolution that are not zero, at most ROWS, at length 1; none of a small one."""
    if value.dim() < 2 or value.shape[0] < LEAST or value[0].numel() < LEAST:
        return value.new_zeros((0, 1))
    matrix = value.flatten(1)
    if len(matrix) > ROWS:
        chance = torch.Generator()
        chance.seed()  # from the operating system, and nobody else's generator moves
        matrix = matrix[torch.randperm(len(matrix), generator=chance)[:ROWS]]
    matrix = matrix.double()
    length = matrix.norm(dim=1, keepdim=True)
    rows: Tensor = (matrix / length.clamp_min(1e-12))[length.squeeze(1) > 1e-12]
    return rows


def parallel(rows: Tensor) -> float:
    """rows: (R, K) of length 1. Share of them that are parallel to one and the same row."""
    return float(((rows @ rows.T).abs() > PARALLEL).sum(1).max() - 1) / max(1, len(rows) - 1)


def mirrored(rows: Tensor) -> float:
    """rows: (R, K). Share of them whose positive entries are their negative ones times a factor, in any order."""
    half = rows.shape[1] // 2
    ordered = rows.sort(dim=1).values
    down, up = -ordered[:, :half], ordered[:, -half:].flip(1)  # each from the largest magnitude on
    # least squares: up = factor x down; exact for a mirrored row, whatever the factor
    factor = (up * down).sum(1, keepdim=True) / down.square().sum(1, keepdim=True).clamp_min(1e-24)
    left = (up - factor * down).norm(dim=1) / up.norm(dim=1).clamp_min(1e-12)
    return float(((left < SAME) & (factor.squeeze(1) > 0)).double().mean())
