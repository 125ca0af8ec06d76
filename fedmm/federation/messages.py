"""What crosses between coordinator and hospital: each kind with its encoding beside its decoding.

    kind        coordinator asks                      hospital answers
    query       PlanAsk: what the run will cost       Hello: name, labels, ceiling, noise it needs | Error(code, safe text)
    train       TrainAsk: plan, settings, weights, …  FitReply: weights, what the ledger says      | Error(code, safe text)
    evaluate    EvaluateAsk: plan, settings, weights  ScoreReply: scores, if policy allows         | Error(code, safe text)

This is the only place with string keys. A frame is a Flower RecordDict with one ConfigRecord `fedmm` (version, kind, JSON
body) and, where weights travel, one ArrayRecord `arrays`; a TrainAsk may carry a second one, `correction`, of the same
names and shapes (federation/scaffold.py). A peer's message is checked, never trusted: sizes before anything is parsed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SType
from flwr.common.serde import config_record_to_proto, metric_record_to_proto
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from fedmm.errors import MessageInvalid
from fedmm.federation.tiles import finite
from fedmm.models.multimodal import ModelSpec
from fedmm.schema import MODALITIES, Frozen, Labels

VERSION = 4
# What a message that leaves a hospital is called in its ledger, in the run folder and in the report.
HELLO, UPDATE, HISTOGRAM, EXACT, WITHHELD = "hello", "weights", "score histogram", "exact scores", "scores withheld"
FRAME, ARRAYS, CORRECTION, METRICS, WEIGHT = "fedmm", "arrays", "correction", "metrics", "num-examples"
STRATEGY_CONFIG = "config"  # where Flower's strategies put the ConfigRecord they are given

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"  # a hospital's name, as in site.toml: it goes to terminals, files and pages
NONCE, DIGEST = r"^[0-9a-f]{32}$", r"^[0-9a-f]{64}$"
NOTHING_OR_DIGEST = r"^([0-9a-f]{64})?$"
NOTHING_OR_SIGNATURE = r"^([0-9a-f]{128})?$"

# Most characters of a message's JSON, counted before it is parsed. By arithmetic: the texts of a statement have 2,800, each six
# when escaped, and a number of a histogram has 24 and a comma. Of all else: guess, 20 times what honest ones have.
STATEMENT_JSON, NUMBER_JSON, BODY_JSON = 2**15, 26, 2**20
HEADER_BYTES = 512  # most of what numpy.save writes before the numbers; 128 for up to eight axes  # measured

Weights = Mapping[str, torch.Tensor]


def fresh_nonce() -> str:
    """For one round's ask to all hospitals. One will do: whose answer it is, is said and signed by the hospital itself."""
    return secrets.token_hex(16)


class PlanAsk(Frozen):
    """Before anything starts: would you take part in this, and with how much noise?"""

    plan: dict[str, str | int | float | bool] = Field(description="PrivacyPlan.to_flat().")
    rounds: int = Field(ge=0, le=10_000, description="Rounds of it that are still to come.")
    run: str = Field("", max_length=64, description="Of a run that goes on: what it was charged already counts once.")
    nonce: str = Field(
        default_factory=fresh_nonce,
        pattern=NONCE,
        description="Comes back, signed: an introduction for this ask alone.",
    )


class Hello(Frozen):
    """What a hospital says about itself before anything starts; nothing that depends on a patient."""

    hospital: str = Field(pattern=NAME)
    labels: Labels
    fedmm: str = Field(max_length=64, description="Version that is installed there.")
    ceiling: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    metrics: Literal["no", "noisy", "exact"] = Field(description="Which test scores may leave.")
    ledger_key: str = Field(
        "",
        pattern=NOTHING_OR_DIGEST,
        description="Public key of its ledger: signs all that comes. Empty with a refusal.",
    )
    modalities: tuple[str, ...] = Field(MODALITIES, description="Of the others' parts nothing will come from here.")
    least_noise: float = Field(0.0, ge=0, description="Least noise_multiplier with which the run fits into its ledger.")
    refusal_code: int = Field(0, ge=0, description="Why it would not take part in this plan; 0 if it would.")
    refusal: str = Field("", max_length=300, description="The same in words.")
    nonce: str = Field("", pattern=r"^([0-9a-f]{32})?$", description="Of the ask that this answers.")
    signature: str = Field(
        "", pattern=NOTHING_OR_SIGNATURE, description="Of `ledger_key` over `facts` as JSON. Empty with a refusal."
    )

    def facts(self) -> dict[str, Any]:
        """What the signature covers."""
        return self.model_dump(mode="json", exclude={"signature"})

    @field_validator("modalities")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or names != tuple(name for name in MODALITIES if name in names):
            raise ValueError("some of the modalities, in their order")
        return names

    @model_validator(mode="after")
    def _can_be_held_to_it(self) -> Hello:
        if bool(self.ledger_key) == bool(self.refusal_code):
            raise ValueError("a key, or a refusal")
        return self


class TrainAsk(Frozen):
    run: str = Field(min_length=1, max_length=64)
    round: int = Field(ge=1)
    nonce: str = Field(pattern=NONCE, description="Comes back in the answer's statement: an answer to this ask alone.")
    settings: dict[str, str | int | float | bool] = Field(description="Run settings, dotted keys.")
    spec: ModelSpec
    plan: dict[str, str | int | float | bool] = Field(description="PrivacyPlan.to_flat().")


class Statement(Frozen):
    """What a hospital's ledger says about itself as the answer leaves: all runs together, this answer included."""

    hospital: str = Field(max_length=64)
    run: str = Field(max_length=64)
    round: int
    nonce: str = Field(pattern=NONCE, description="Of the ask that this answers.")
    release: str = Field(pattern=NOTHING_OR_DIGEST, description="`digest_of` what comes with it; empty: nothing.")
    epsilon: float = Field(ge=0, description="Spent at this hospital so far, all runs, by its own ledger.")
    ceiling: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    unprotected: int = Field(ge=0, description="Releases in that ledger that no epsilon covers (research policy only).")
    ledger_sequence: int = Field(ge=0)
    ledger_hash: str = Field(max_length=256)
    ledger_signature: str = Field(max_length=1024)
    ledger_key: str = Field(max_length=256, description="Public key that the signatures belong to, hexadecimal.")
    statement_signature: str = Field(
        max_length=1024, description="Over `facts` as JSON: the hospital can be held to it."
    )

    def facts(self) -> dict[str, Any]:
        """What the statement's signature covers."""
        return {name: getattr(self, name) for name in Statement.model_fields if name != "statement_signature"}


class FitReply(Statement):
    private: bool


class EvaluateAsk(Frozen):
    run: str = Field(min_length=1, max_length=64)
    round: int = Field(ge=0)
    nonce: str = Field(pattern=NONCE)
    settings: dict[str, str | int | float | bool]
    spec: ModelSpec
    plan: dict[str, str | int | float | bool]


class ScoreReply(Statement):
    """Exact scores, a noisy histogram of scores, or neither where policy keeps them home."""

    scores: dict[str, Any] | None = Field(None, description="`training.metrics.score`; research policy only.")
    histogram: tuple[float, ...] | None = Field(None, max_length=2**20, description="`training.histograms.histogram`.")
    noise_multiplier: float = Field(0.0, ge=0, le=1e6, description="Of the histogram's noise.")

    @field_validator("scores")
    @classmethod
    def _can_be_shown(cls, scores: dict[str, Any] | None) -> dict[str, Any] | None:
        """The report leaves out what has another form; run.jsonl and the progress line need valid JSON and this number."""
        if scores is not None:
            json.dumps(scores, allow_nan=False)
            area = scores.get("mean_auroc")
            if area is not None and not (isinstance(area, int | float) and 0 <= area <= 1):
                raise ValueError("mean_auroc is no area")
        return scores


Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)
Body = TypeVar("Body", PlanAsk, Hello, TrainAsk, FitReply, EvaluateAsk, ScoreReply)


def config_record(body: Frozen) -> ConfigRecord:
    """The frame as Flower's strategies want it; they add `server-round` and put it under `config`."""
    return ConfigRecord({"version": VERSION, "kind": type(body).__name__, "body": body.model_dump_json()})


def encode(
    body: Frozen,
    *,
    arrays: ArrayRecord | None = None,
    correction: ArrayRecord | None = None,
    weight: float | None = None,
) -> RecordDict:
    """A frame. arrays, correction: from `array_record`.  weight: of this reply in the average; public by agreement."""
    content = RecordDict({FRAME: config_record(body)})
    if arrays is not None:
        content[ARRAYS] = arrays
    if correction is not None:
        content[CORRECTION] = correction
    if weight is not None:
        content[METRICS] = MetricRecord({WEIGHT: float(weight)})
    return content


def decode(content: RecordDict, kind: type[Body], *, most: int = BODY_JSON) -> Body:
    """most: characters of JSON. Raises: MessageInvalid if the frame is missing, of another version or kind, too long, or
    breaks the schema."""
    found = records_of(content, ConfigRecord)
    record = found.get(FRAME) or found.get(STRATEGY_CONFIG)
    if record is None:
        raise MessageInvalid("the message has no fedmm frame", fix="do both sides run fedmm?")
    if record.get("version") != VERSION or record.get("kind") != kind.__name__:
        raise MessageInvalid(
            f"expected {kind.__name__} of version {VERSION}, got another kind or version",
            fix="install the same fedmm at both ends",
        )
    body = record.get("body")
    try:
        if not isinstance(body, str):
            raise TypeError("body")
        if len(body) > most:
            raise ValueError("too long")
        return kind.model_validate_json(body, strict=True)
    except (ValueError, TypeError):  # pydantic's and json's errors are ValueErrors
        raise MessageInvalid(f"the {kind.__name__} breaks its schema") from None


def records_of(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """Flower's `array_records`, `config_records`, `metric_records`, but for this: what those return is part of a circle with
    the content, and a model that was looked at so stays in memory until the garbage collector comes by."""
    return {key: record for key, record in content.items() if isinstance(record, kind)}


def array_record(weights: Weights) -> ArrayRecord:
    """float32 arrays, in the order of the names, so that every engine sums in the same order."""
    return ArrayRecord({name: Array(weights[name].detach().cpu().numpy()) for name in sorted(weights)})


def decode_correction(content: RecordDict, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor] | None:
    """What is to be added to each gradient; None if nothing is. As strict as `decode_weights`. Raises: MessageInvalid."""
    return decode_weights(content, shapes, key=CORRECTION) if CORRECTION in records_of(content, ArrayRecord) else None


def decode_weights(
    content: RecordDict, shapes: Mapping[str, tuple[int, ...]], *, key: str = ARRAYS
) -> dict[str, torch.Tensor]:
    """Copies of `look_at(content, shapes, key=key)`. Raises: as that."""
    return {name: torch.from_numpy(value.copy()) for name, value in look_at(content, shapes, key=key).items()}


def look_at(
    content: RecordDict,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    key: str = ARRAYS,
    dtypes: Mapping[str, str] | None = None,
) -> dict[str, NDArray[Any]]:
    """The numbers, if they are exactly those that `shapes` names: finite, of the declared type and size, read-only in the
    message's own bytes. Nothing is decoded before all of them have been looked at from outside.

    dtypes: by name one of DTYPES; float32 where it says nothing.
    The bytes must be exactly what `numpy.save` writes for such an array. `numpy.load` is not asked: for hostile bytes it
    evaluates a header, opens zip files, allocates what a header declares, and raises a dozen kinds of errors.
    Raises: MessageInvalid.
    """
    record, dtypes = records_of(content, ArrayRecord).get(key), dtypes or {}
    if record is None or len(record) != len(shapes) or set(record) != set(shapes):
        raise MessageInvalid("the tensors are not the ones of this model")
    for name, shape in shapes.items():
        _check_label(record[name], name, shape, dtypes.get(name, "float32"))
    found = {name: view(record[name], name) for name in shapes}
    for name, value in found.items():
        if not finite(value):
            raise MessageInvalid(f"tensor {name} has a value that is not finite")
    return found


def views(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """The numbers of a record that was checked, or made here: read-only, in its own bytes."""
    return {name: view(array, name) for name, array in record.items()}


def check_records(content: RecordDict, *names: str) -> None:
    """Does a reply hold these records and no others? Raises: MessageInvalid."""
    if set(content) != set(names):
        raise MessageInvalid(
            "the message has other records than were asked for", fix="install the same fedmm at both ends"
        )
    if set(records_of(content, ConfigRecord).get(FRAME, ())) != {"version", "kind", "body"}:
        raise MessageInvalid("the fedmm frame has other parts than a version, a kind and a body")


def check_digest(release: ArrayRecord | Sequence[float] | Mapping[str, Any] | None, said: Statement) -> None:
    """Is this what the hospital signed for? Raises: MessageInvalid."""
    try:
        found = "" if release is None else digest_of(release)
    except ValueError:  # NaN
        found = None
    if found != said.release:
        raise MessageInvalid("what came is not what the hospital's ledger signed for", fix="was it changed on the way?")


DTYPES = {
    "float32": "<f4",
    "float16": "<f2",
    "int8": "|i1",
    "int32": "<i4",
}  # that may cross, as `numpy.save` names them
# Magic, version 1.0, two bytes of length, then a dictionary, then spaces.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(?s:..)\{'descr': '(?P<type>[<|][a-z]\d)', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': (?P<shape>\([0-9, ]*\)), \}"
)


def _check_label(array: Array, name: str, shape: tuple[int, ...], dtype: str) -> None:
    if array.dtype != dtype or tuple(array.shape) != shape or array.stype != SType.NUMPY:
        raise MessageInvalid(f"tensor {name} has another type or shape than the model's")
    if not 0 < len(array.data) - np.dtype(dtype).itemsize * math.prod(shape) <= HEADER_BYTES:
        raise MessageInvalid(f"tensor {name} has another size than the model's")


def view(array: Array, name: str) -> NDArray[Any]:
    """One of them. C order: of what came in Fortran's a copy. Raises: MessageInvalid."""
    header, shape, dtype = _NPY.match(array.data), tuple(array.shape), np.dtype(DTYPES[array.dtype])
    start = 10 + int.from_bytes(array.data[8:10], "little")
    if header is None or header.end() > start or len(array.data) != start + dtype.itemsize * math.prod(shape):
        raise MessageInvalid(f"tensor {name} has another size or header than the model's")
    said = (header["type"].decode(), header["shape"].decode())
    if said != (DTYPES[array.dtype], str(shape)) or array.data[header.end() : start].strip():
        raise MessageInvalid(f"tensor {name} is not what its header says")
    order: Literal["C", "F"] = "F" if header["fortran"] == b"True" else "C"
    value = np.frombuffer(array.data, dtype=dtype, offset=start).reshape(shape, order=order)
    return value if value.flags.c_contiguous else value.copy(order="C")


def digest_of(release: ArrayRecord | Sequence[float] | Mapping[str, Any]) -> str:
    """SHA-256 of what a charge pays for, hexadecimal: names, types, shapes and bytes of arrays, or JSON of scores."""
    if not isinstance(release, ArrayRecord):
        text = json.dumps(release, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
    digest = hashlib.sha256()
    for name in sorted(release):
        array = release[name]
        digest.update(f"{len(name)} {name} {array.dtype} {tuple(array.shape)} {len(array.data)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def size_bytes(message: Message) -> int:
    """Bytes of a message's content as they cross the wire; of an error its text. Flower's envelope is not counted.

    Counted by protobuf's rules: making one would copy every byte (1.3 s for 100 MB # measured), and raises for what a hostile
    peer can put beside an array. Never raises.
    """
    if message.has_error():
        return len((message.error.reason or "").encode())
    if not message.has_content():
        return 0
    return sum(_field(_text(key) + _field(_record(record))) for key, record in message.content.items())


def _record(record: ArrayRecord | MetricRecord | ConfigRecord) -> int:
    if isinstance(record, ArrayRecord):
        return sum(_field(_text(name) + _field(_array(array))) for name, array in record.items())
    made = metric_record_to_proto(record) if isinstance(record, MetricRecord) else config_record_to_proto(record)
    return int(made.ByteSize())


def _array(array: Array) -> int:
    shape = _field(sum(_number(n) for n in array.shape)) if array.shape else 0
    return _text(array.dtype) + shape + _text(array.stype) + (_field(len(array.data)) if array.data else 0)


def _text(text: str) -> int:
    return _field(len(text.encode(errors="surrogatepass"))) if text else 0


def _field(size: int) -> int:
    """Bytes of a field with so many: a byte of tag, the length, the content."""
    return 1 + _number(size) + size


def _number(value: int) -> int:
    """Bytes of a number: seven bits in each, a negative one as if it had 64."""
    return max(1, -(-(value % 2**64).bit_length() // 7))
