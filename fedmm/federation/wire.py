"""How a hospital's update crosses: what it sends beside what the coordinator makes of it.

    federation.wire   an update of P weights is                                         bytes for each weight
    fp32              the weights themselves, also those that the hospital does not train   4
    fp16              its change, rounded to half precision                                 2
    int8              its change, rounded at random to whole steps: right on average        1
    topk              the hundredth of its change that is largest, in half precision        0.06

A change is the weights that a hospital has trained, in the order of their names, in line. Each ROW of it has a scale of its own:
with one scale for a whole tensor a single large value would coarsen all others. What topk leaves out is kept by the hospital
and added to its change in the next round (error feedback, Stich et al. 2018; Karimireddy et al. 2019).

All of it is worked out of weights after noise: post-processing, which costs nothing. So is what topk keeps: it is the rest of a
noisy change that was paid for, whole, and nothing else. The chance of int8 comes from the operating system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from fedmm.config import ROBUST, FederationConfig
from fedmm.errors import ConfigError, MessageInvalid
from fedmm.federation.messages import ARRAYS, look_at, records_of
from fedmm.federation.tiles import TILE, Values, finite
from fedmm.training.local import Still

ROW = 1024  # values to a scale; TILE is a multiple
FRACTION = 100  # topk sends one in so many
CODES, SCALES, INDEX = "codes", "scales", "index"
CODE = {"fp16": "float16", "int8": "int8", "topk": "float16"}
LARGEST = {"fp16": 1.0, "int8": 127.0, "topk": 1.0}  # code of a row's largest value


def check_wire(federation: FederationConfig) -> None:
    """Does the coding go with the strategy? Raises: ConfigError."""
    wire, strategy = federation.wire, federation.strategy
    if strategy == "scaffold" and wire != "fp32":
        raise ConfigError(
            f"federation.strategy = scaffold does not work with federation.wire = {wire}",
            why="control variates are the change of the weights divided by steps x rate, and so would be its rounding",
            fix="federation.wire = fp32, or another strategy",
        )
    if strategy in ROBUST and wire == "topk":
        raise ConfigError(
            f"federation.strategy = {strategy} does not work with federation.wire = topk",
            why="hospitals send different weights, so of each weight the most say nothing, and the rule follows the most",
            fix="federation.wire = int8, or a strategy that averages",
        )


# --- what a hospital sends --------------------------------------------------------------------------------------------


def coded(
    change: NDArray[np.float32], wire: str, *, bound: float, rng: np.random.Generator
) -> tuple[ArrayRecord, NDArray[np.float32]]:
    """The record that crosses, and what it leaves out of the change.

    change: (P,), finite.  wire: any but fp32.  bound: longest change that may come out at the other end.
    """
    index = _largest(change) if wire == "topk" else None
    sent = _rounded(change if index is None else change[index], wire, index, rng)
    out = sent.values(0, change.size)
    length = float(np.linalg.norm(out.astype("float64")))
    if length > bound:  # rounding can make it longer
        sent.scales *= np.float32(bound / length * (1 - 1e-6))
        out = sent.values(0, change.size)
    arrays = {CODES: sent.codes, SCALES: sent.scales} | ({} if index is None else {INDEX: index})
    return ArrayRecord({name: Array(arrays[name]) for name in sorted(arrays)}), change - out


def in_line(values: Values, before: Values, still: Still) -> NDArray[np.float32]:
    """(P,), the change of what is trained."""
    names = trained(before, still)
    return np.concatenate([(values[n] - before[n]).reshape(-1) for n in names] or [np.zeros(0, "float32")])


def trained(names: Mapping[str, Any], still: Still) -> list[str]:
    """In the order in which they cross."""
    return sorted(name for name in names if not name.startswith(still))


def _largest(change: NDArray[np.float32]) -> NDArray[np.int32]:
    """Places of the values that cross, ascending."""
    count = sent_values(change.size)
    return np.sort(np.argpartition(np.abs(change), change.size - count)[change.size - count :]).astype("int32")


def sent_values(count: int) -> int:
    """How many of so many values topk sends."""
    return -(-count // FRACTION)


def _rounded(
    values: NDArray[np.float32], wire: str, index: NDArray[np.int32] | None, rng: np.random.Generator
) -> _Coded:
    codes = np.empty(values.size, CODE[wire])
    scales = np.empty(-(-values.size // ROW), "float32")
    for at in range(0, values.size, TILE):
        tile = values[at : at + TILE]
        scale = np.maximum.reduceat(np.abs(tile), np.arange(0, tile.size, ROW)) / np.float32(LARGEST[wire])
        scales[at // ROW : at // ROW + scale.size] = scale
        steps = tile / np.repeat(np.where(scale > 0, scale, np.float32(1)), ROW)[: tile.size]
        if wire == "int8":  # up with the probability of what is left below: its mean is the value
            steps = np.floor(steps + rng.random(tile.size, dtype=np.float32)).clip(-LARGEST[wire], LARGEST[wire])
        codes[at : at + TILE] = steps
    return _Coded(codes, scales, index)


# --- what the coordinator makes of it ---------------------------------------------------------------------------------


def received(content: RecordDict, before: Mapping[str, Array], sent: Values, still: Still, wire: str) -> ArrayRecord:
    """The hospital's weights, all of them, in float32. The peer is checked, not trusted: sizes before anything is made.

    before: the round's weights, and `sent` their views.  still: what the hospital does not train.
    Raises: MessageInvalid.
    """
    shapes = {name: value.shape for name, value in sent.items()}
    if wire == "fp32":
        look_at(content, shapes)
        return records_of(content, ArrayRecord)[ARRAYS]
    names = trained(shapes, still)
    change = _read(content, sum(sent[name].size for name in names), wire)
    arrays, at = dict(before), 0
    for name in names:
        size = sent[name].size
        with np.errstate(over="ignore", invalid="ignore"):
            value = np.asarray(sent[name] + change.values(at, at + size).reshape(sent[name].shape))
        if not finite(value):
            raise MessageInvalid(f"tensor {name} has a value that is not finite")
        arrays[name], at = Array(value), at + size
    return ArrayRecord({name: arrays[name] for name in sorted(arrays)})


def _read(content: RecordDict, count: int, wire: str) -> _Coded:
    """count: P. Raises: MessageInvalid."""
    codes = sent_values(count) if wire == "topk" else count
    shapes = {CODES: (codes,), SCALES: (-(-codes // ROW),)} | ({INDEX: (codes,)} if wire == "topk" else {})
    found = look_at(content, shapes, dtypes={CODES: CODE[wire], INDEX: "int32"})
    index = found.get(INDEX)
    if index is not None and index.size and not (index[0] >= 0 and index[-1] < count and (np.diff(index) > 0).all()):
        raise MessageInvalid("the places of the largest values are not ascending ones of this model")
    return _Coded(found[CODES], found[SCALES], index)


@dataclass
class _Coded:
    """codes: (K,).  scales: one for each ROW of them.  index: (K,) ascending places in the change; None: all, in turn."""

    codes: NDArray[Any]
    scales: NDArray[np.float32]
    index: NDArray[np.int32] | None

    def values(self, start: int, end: int) -> NDArray[np.float32]:
        """Of the change, decoded."""
        out = np.zeros(end - start, "float32")
        if self.index is None:
            self._into(out, start, end)
        else:
            first, last = np.searchsorted(self.index, [start, end])
            found = np.empty(last - first, "float32")
            self._into(found, int(first), int(last))
            out[self.index[first:last] - start] = found
        return out

    def _into(self, out: NDArray[np.float32], start: int, end: int) -> None:
        at = start
        while at < end:  # up to the next border of a tile, so that rows and scales stay together
            to = min(end, at - at % TILE + TILE)
            scale = np.repeat(self.scales[at // ROW : -(-to // ROW)], ROW)[at % ROW :][: to - at]
            np.multiply(self.codes[at:to], scale, out=out[at - start : to - start])
            at = to
