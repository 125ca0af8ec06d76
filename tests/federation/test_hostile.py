"""14 hostile updates against Flower's FedAvg and against the checks, and 10,000 generated replies against the checks alone."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.errors import MessageInvalid
from fedmm.federation.checks import Asked, Expected, check_scores
from fedmm.federation.messages import ARRAYS, FRAME, METRICS, WEIGHT, array_record, encode
from fedmm.privacy.chain import SIGNED_AS, STATED_AS
from tests.federation.scripted import (
    NONCE,
    RUN,
    answer,
    checked,
    fit_content,
    fit_reply,
    key_in_words,
    resigned,
    score_reply,
    weights,
)
from tests.federation.test_checks import NAMES, OTHERS, check, fit

# --- the fourteen -----------------------------------------------------------------------------------------------------


def signed(*, weight: Any = 1.0, **changes: Array) -> Message:
    """basel's update with tensors changed or added, signed as it is."""
    names = {name.replace("__", "."): array for name, array in changes.items()}
    arrays = ArrayRecord({**array_record(weights()), **names})
    content = encode(fit_reply("basel", arrays=arrays), arrays=arrays)
    content[METRICS] = MetricRecord({} if weight is None else {WEIGHT: weight})
    return answer(3, content)


def odd(kind: str, *shape: int, value: float = 1.0) -> Array:
    return Array(np.full(shape, value, kind))


ACCEPTED: dict[str, Callable[[], Message]] = {
    "NaN": lambda: signed(scale=odd("f4", value=math.nan)),
    "infinity": lambda: signed(scale=odd("f4", value=math.inf)),
    "a huge update": lambda: signed(scale=odd("f4", value=1e30)),
    "a tensor that is broadcast": lambda: signed(head__3__weight=odd("f4", 1, 3)),
    "doubles": lambda: signed(head__3__weight=odd("f8", 2, 3)),
    "weight NaN": lambda: signed(weight=math.nan),
    "weight -1": lambda: signed(weight=-1.0),
    "weight 1e12": lambda: signed(weight=1e12),
    "an earlier round": lambda: fit(3, round=0),
    "another ask": lambda: fit(3, nonce="f0" * 16),
}
ENDS: dict[str, Callable[[], Message]] = {
    "a tensor more": lambda: signed(extra=odd("f4", 1)),
    "another shape": lambda: signed(head__3__weight=odd("f4", 3, 2)),
    "no weight": lambda: signed(weight=None),
    "a list as weight": lambda: signed(weight=[1.0]),
}


def averaged(hostile: Message) -> ArrayRecord | None:
    """By Flower's FedAvg alone."""
    replies = [fit(2), hostile, fit(4)]
    for reply in replies:
        del reply.content[FRAME]
    with np.errstate(all="ignore"):
        return FedAvg().aggregate_train(1, replies)[0]


def test_flowers_fedavg_takes_ten_of_the_fourteen_hostile_updates() -> None:
    assert len(ACCEPTED) == 10
    for name, make in ACCEPTED.items():
        assert averaged(make()) is not None, name


def test_the_other_four_end_its_run() -> None:
    assert len(ENDS) == 4
    for make in ENDS.values():
        with pytest.raises(Exception):  # noqa: B017, PT011  (whatever it is: the run is over)
            averaged(make())


@pytest.mark.parametrize("name", [*ACCEPTED, *ENDS])
def test_each_of_the_fourteen_is_isolated_and_named_and_the_honest_ones_are_averaged(name: str) -> None:
    make = {**ACCEPTED, **ENDS}[name]
    hospitals, failures = check(fit(2), make(), fit(4))
    assert hospitals == OTHERS
    assert [(f.hospital, f.kind, f.code) for f in failures] == [("basel", "invalid", MessageInvalid.code)]
    assert failures[0].reason


# --- ten thousand -----------------------------------------------------------------------------------------------------

SMALL: dict[str, tuple[int, ...]] = {"b": (3,), "s": (), "w": (2, 3)}
HONEST = {name: Array(np.full(shape, 0.5, "f4")) for name, shape in SMALL.items()}
BEFORE = {name: torch.zeros(shape) for name, shape in SMALL.items()}
ASKED = Asked(RUN, 1, NONCE, {name: key_in_words(name) for name in NAMES.values()})
EXPECTED = Expected(ASKED, array_record(BEFORE), max_norm=5.0, max_weight=2.0)
LENGTH, NOISE = 6, 2.0
ODD: list[Any] = [
    None, True, 0, -1, 1, 2**53, 10**400, 0.5, -0.5, 1e999, math.nan, "", "x", "\ud800", "0f" * 16, "ab" * 32, "G" * 64, "é" * 70,
    [], [1.0], {}, {"mean_auroc": 2}, {"a": {"b": [1, None]}}, "basel", "aachen", RUN, "run-0", [0.5] * LENGTH, [1] * LENGTH,
]  # fmt: skip


class Forge:
    """One reply in the making. rng: its chance.  body is signed last, unless a change comes after that."""

    def __init__(self, rng: random.Random, kind: str) -> None:
        self.rng, self.kind = rng, kind
        self.arrays: dict[str, Array] = dict(HONEST)
        self.metrics: dict[str, Any] = {WEIGHT: 1.0}
        self.facts: dict[str, Any] = {}
        self.late: list[Callable[[RecordDict], None]] = []
        self.made: dict[str, Any] = {}
        if kind == "scores":
            self.made = rng.choice(
                [{}, {"scores": {"mean_auroc": 0.5}}, {"histogram": (0.5,) * LENGTH, "noise_multiplier": NOISE}]
            )
        self.node, self.error, self.copies = 3, 0, 1

    def fact(self) -> None:
        """Signed as it is: a hospital that lies about itself."""
        name = self.rng.choice(
            ["hospital", "run", "round", "nonce", "release", "epsilon", "ceiling", "delta", "unprotected"]
        )
        lawful = {"epsilon": 0.25, "ceiling": 9.0, "delta": 1e-6, "unprotected": 3, "hospital": "aachen", "round": 2}
        self.facts[name] = self.rng.choice([lawful.get(name, "ab" * 32), "zug", "run-0", 7])

    def edit(self) -> None:
        """The JSON after it was signed: a key changed, added or taken out."""
        value, extra = self.rng.choice(ODD), self.rng.random()

        def apply(content: RecordDict) -> None:
            said = json.loads(str(content.config_records[FRAME]["body"]))
            name = "note" if extra < 0.1 else sorted(said)[int(extra * len(said))]
            said.pop(name, None) if extra > 0.9 else said.__setitem__(name, value)
            content.config_records[FRAME]["body"] = json.dumps(said)

        self.late.append(apply)

    def text(self) -> None:
        """The JSON as text: cut, doubled, with spaces, nested, or something else."""
        place, how = self.rng.random(), self.rng.randrange(7)

        def apply(content: RecordDict) -> None:
            frame = content.config_records[FRAME]
            body = str(frame["body"])
            cut = int(place * len(body))
            frame["body"] = [
                body[:cut], body + body, body.replace(",", " ,\n"), "[" * 5000, body[:cut] + "\x00" + body[cut:],
                body + " " * 10**5, body.replace("{", '{"hospital":"aachen",', 1),
            ][how]  # fmt: skip

        self.late.append(apply)

    def frame(self) -> None:
        part, value = (
            self.rng.choice(["version", "kind", "body", "more"]),
            self.rng.choice([2, 1, "2", b"x", [2], "FitReply", 0.5]),
        )

        def apply(content: RecordDict) -> None:
            content.config_records[FRAME][part] = value

        self.late.append(apply)

    def tensor(self) -> None:
        """Signed as it is: another array of another kind, shape or content."""
        name, rng = self.rng.choice([*SMALL, "more"]), self.rng
        shape = rng.choice([(3,), (), (2, 3), (1, 3), (6,), (0,), (3, 2)])
        value = np.full(shape, rng.choice([0.0, 1.0, -2.0, 4.9, 5.1, 1e30, math.nan, math.inf]))
        order = rng.choice(["C", "F"])
        dtype = rng.choice(["f4", "f4", "f4", "f8", "f2", "i4", ">f4"])
        with np.errstate(all="ignore"):
            self.arrays[name] = Array(np.asarray(value, dtype, order=order))

    def label(self) -> None:
        """Signed as it is: bytes and label that do not belong together."""
        name, rng = self.rng.choice(list(SMALL)), self.rng
        old = self.arrays.get(name)
        if old is None or not old.data:  # an earlier change has taken it away
            return
        data = bytearray(old.data)
        data[rng.randrange(len(data))] = rng.randrange(256)
        other = [
            bytes(data),
            old.data[: rng.randrange(len(old.data))],
            old.data + b"\0" * rng.randrange(700),
            b"",
            old.data,
        ]
        fields = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": rng.choice(other)}
        if rng.random() < 0.3:
            fields |= rng.choice(
                [{"dtype": "float64"}, {"shape": (-1,)}, {"shape": (10**9,)}, {"stype": "pickle"}, {"dtype": ""}]
            )
        self.arrays[name] = Array(**fields)

    def fewer(self) -> None:
        self.arrays.pop(self.rng.choice(list(SMALL)), None)

    def swap(self) -> None:
        """Other weights after the signature."""
        value = self.rng.choice([0.0, 0.5, 0.25])

        def apply(content: RecordDict) -> None:
            if ARRAYS in content:
                content[ARRAYS] = ArrayRecord({n: Array(np.full(s, value, "f4")) for n, s in SMALL.items()})

        self.late.append(apply)

    def weight(self) -> None:
        self.metrics = self.rng.choice(
            [{}, {WEIGHT: 2}, {WEIGHT: 1e-9}, {WEIGHT: -1.0}, {WEIGHT: 0.0}, {WEIGHT: math.nan}, {WEIGHT: math.inf},
             {WEIGHT: 2.0001}, {WEIGHT: [1.0]}, {WEIGHT: 1.0, "loss": 1.0}, {"examples": 1.0}, {WEIGHT: 2**62}]
        )  # fmt: skip

    def records(self) -> None:
        name = self.rng.choice([FRAME, ARRAYS, METRICS, "config", "more", ""])
        record = self.rng.choice(
            [None, ConfigRecord({"a": 1}), MetricRecord({WEIGHT: 1.0}), ArrayRecord(), ConfigRecord()]
        )

        def apply(content: RecordDict) -> None:
            content.pop(name, None)
            if record is not None:
                content[name] = record

        self.late.append(apply)

    def metadata(self) -> None:
        """Another node sends it, or an error comes instead, or it comes twice."""
        how = self.rng.randrange(3)
        self.node = self.rng.choice([2, 9, 0]) if how == 0 else self.node
        self.error = self.rng.choice([1001, 1006, 1099, 5, -1]) if how == 1 else self.error
        self.copies = 2 if how == 2 else self.copies

    def message(self) -> Message:
        if self.error:
            return answer(self.node, Error(self.error, self.rng.choice(["", "x" * 5000, "\x1b[2J", "NAME: because"])))
        if self.kind == "fit":
            arrays = ArrayRecord(self.arrays)
            said: Any = fit_reply("basel", arrays=arrays)
            content = encode(said, arrays=arrays)
            content[METRICS] = MetricRecord(self.metrics)
        else:
            said = score_reply("basel", **self.made)
            content = encode(said)
        if self.facts:
            content = self._with(resigned(said, "basel", **self.facts), content)
        for change in self.late:
            try:
                change(content)
            except Exception:  # an earlier change left nothing to change
                continue
        return answer(self.node, content)

    @staticmethod
    def _with(said: Any, content: RecordDict) -> RecordDict:
        frame = content.config_records[FRAME]
        frame["body"] = json.dumps({n: getattr(said, n) for n in type(said).model_fields})
        return content


CHANGES = ["fact", "edit", "text", "frame", "tensor", "label", "fewer", "swap", "weight", "records", "metadata"]


def lawful_statement(body: dict[str, Any], fields: set[str], name: str) -> bool:
    """The schema, said once more without our code."""
    if set(body) - {"scores", "histogram", "noise_multiplier"} != fields or body["hospital"] != name:
        return False
    numbers = {"epsilon": (0, math.inf), "ceiling": (0, math.inf), "delta": (0, 1), "unprotected": (0, math.inf)}
    if not all(type(body[k]) in (int, float) and low <= body[k] < high for k, (low, high) in numbers.items()):
        return False
    if (
        (body["run"], body["round"], body["nonce"]) != ("run-1", 1, "0f" * 16)
        or body["ceiling"] == 0
        or body["delta"] == 0
    ):
        return False
    if not re.fullmatch("(|[0-9a-f]{64})", body["release"]) or body["ledger_key"] != key_in_words(name):
        return False
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(body["ledger_key"]))
    outside = {"statement_signature", "private", "scores", "histogram", "noise_multiplier"}
    floats = {k: float(body[k]) for k in ("epsilon", "ceiling", "delta")}
    facts = {k: v for k, v in (body | floats).items() if k not in outside}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    try:
        key.verify(bytes.fromhex(body["statement_signature"]), STATED_AS + text.encode())
        key.verify(bytes.fromhex(body["ledger_signature"]), SIGNED_AS + bytes.fromhex(body["ledger_hash"]))
    except (InvalidSignature, ValueError):
        return False
    return True


STATED = {
    "hospital", "run", "round", "nonce", "release", "epsilon", "ceiling", "delta", "unprotected", "ledger_sequence",
    "ledger_hash", "ledger_signature", "ledger_key", "statement_signature",
}  # fmt: skip


def body_of(content: RecordDict, kind: str) -> dict[str, Any] | None:
    frame = dict(content.config_records[FRAME])
    if set(frame) != {"version", "kind", "body"} or (frame["version"], frame["kind"]) != (4, kind):
        return None
    return dict(json.loads(str(frame["body"])))


def lawful_fit(content: RecordDict, name: str) -> bool:
    if set(content) != {FRAME, ARRAYS, METRICS}:
        return False
    body = body_of(content, "FitReply")
    if body is None or type(body.get("private")) is not bool or not lawful_statement(body, STATED | {"private"}, name):
        return False
    weight = dict(content.metric_records[METRICS])
    if set(weight) != {WEIGHT} or not 0 < weight[WEIGHT] <= 2:  # type: ignore[operator]
        return False
    arrays = content.array_records[ARRAYS]
    digest, squares = hashlib.sha256(), 0.0
    if sorted(arrays) != sorted(SMALL):
        return False
    for key in sorted(SMALL):
        array = arrays[key]
        digest.update(f"{len(key)} {key} float32 {SMALL[key]} {len(array.data)}\n".encode() + array.data)
        value = np.load(io.BytesIO(array.data), allow_pickle=False)
        if value.dtype != np.dtype("<f4") or value.shape != SMALL[key] or not np.isfinite(value).all():
            return False
        squares += float(np.square(value.astype("f8")).sum())
    return digest.hexdigest() == body["release"] and squares <= (5 * 1.001) ** 2


def lawful_scores(content: RecordDict, name: str) -> bool:
    body = body_of(content, "ScoreReply") if set(content) == {FRAME} else None
    if body is None or not lawful_statement(body, STATED, name):
        return False
    scores, cells = body.get("scores"), body.get("histogram")
    if scores is not None and cells is not None:
        return False
    if cells is not None and (
        len(cells) != LENGTH or body["noise_multiplier"] != NOISE or not np.isfinite(cells).all()
    ):
        return False
    made = scores if scores is not None else None if cells is None else [float(cell) for cell in cells]
    text = (
        ""
        if made is None
        else hashlib.sha256(json.dumps(made, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    )
    return text == body["release"]


SEEN: Counter[str] = Counter()


@settings(max_examples=10_000, derandomize=True, deadline=None, database=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["fit", "scores"]),
    st.lists(st.sampled_from(CHANGES), min_size=0, max_size=3),
)
def check_one_reply(seed: int, kind: str, changes: list[str]) -> None:
    forge = Forge(random.Random(seed), kind)
    for change in changes:
        getattr(forge, change)()
    reply = forge.message()
    sent, content = [reply] * forge.copies, None if reply.has_error() else reply.content
    names, heard = {3: "basel"}, None
    if kind == "fit":
        fits, heard = checked(sent, names, EXPECTED)
        accepted = list(fits)
    else:
        scored = check_scores(sent, names, ASKED, length=LENGTH, noise_multiplier=NOISE)
        accepted, heard = list(scored.statements), scored.heard
    assert len(heard.arrived) == forge.copies
    assert len(accepted) <= 1
    assert len(accepted) + len(heard.failures) == forge.copies + (forge.node != 3)
    assert all(failure.reason.isprintable() and len(failure.reason) <= 300 for failure in heard.failures)
    if accepted:
        assert content is not None
        assert accepted == ["basel"]
        assert forge.node == 3
        assert (lawful_fit if kind == "fit" else lawful_scores)(content, "basel")
    SEEN[f"{kind} {'accepted' if accepted else 'refused'}{'' if changes else ', honest'}"] += 1


def test_of_ten_thousand_generated_replies_none_that_breaks_the_schema_is_accepted_and_no_error_leaves_the_checks() -> (
    None
):
    SEEN.clear()
    check_one_reply()
    assert sum(SEEN.values()) >= 10_000
    assert SEEN["fit refused, honest"] == SEEN["scores refused, honest"] == 0
    assert min(SEEN["fit accepted, honest"], SEEN["scores accepted, honest"]) > 50
    assert min(SEEN["fit accepted"], SEEN["scores accepted"]) > 50, "changes that the schema allows"
    assert min(SEEN["fit refused"], SEEN["scores refused"]) > 1000


def test_the_restated_schema_takes_an_honest_reply_and_not_a_hostile_one() -> None:
    honest = Forge(random.Random(0), "fit").message().content
    assert lawful_fit(honest, "basel")
    assert not lawful_fit(fit_content("aachen"), "basel")
    assert lawful_scores(encode(score_reply("basel", scores={"mean_auroc": 0.5})), "basel")
    assert not lawful_scores(encode(score_reply("basel", nonce="f0" * 16)), "basel")
