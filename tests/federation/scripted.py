"""Hospitals that follow a script instead of training, and the messages they send: tests of checks and rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from fedmm.config import ModelConfig
from fedmm.federation.messages import (
    FRAME,
    EvaluateAsk,
    FitReply,
    Hello,
    ScoreReply,
    TrainAsk,
    decode,
    decode_weights,
    encode,
)
from fedmm.models.multimodal import ModelSpec
from fedmm.schema import InputSpec, Labels
from fedmm.seeds import seed_for

LABELS = Labels(findings=("pneumonia", "effusion"), class_name="grade", class_values=("none", "some"))
OTHER_LABELS = Labels(findings=("pneumonia",))
SPEC = ModelSpec(
    inputs=InputSpec(image_size=16, report_tokens=8, report_buckets=64, audio_mels=8, audio_seconds=0.2),
    model=ModelConfig(width=4),
    labels=LABELS,
)
# More than ten, so that an order of names as text differs from an order by number; one scalar, one empty.
SHAPES: dict[str, tuple[int, ...]] = {f"head.{i}.weight": (2, 3) for i in range(11)} | {"scale": (), "none": (0, 2)}
RUN = "run-1"
REFUSAL = "BUDGET_EXHAUSTED: 3.1 of 3.0"


def weights(seed: str = "start") -> dict[str, torch.Tensor]:
    """Deterministic float32 tensors of SHAPES."""
    generator = torch.Generator().manual_seed(seed_for(1, seed))
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def hello(name: str, **changes: Any) -> Hello:
    return Hello(**{"hospital": name, "labels": LABELS, "fedmm": "0.1.0", "ceiling": 3.0, "delta": 1e-4, **changes})


def fit_reply(name: str, **changes: Any) -> FitReply:
    content: dict[str, Any] = {
        "hospital": name,
        "run": RUN,
        "round": 1,
        "private": True,
        "epsilon": 0.5,
        "ceiling": 3.0,
        "delta": 1e-4,
        "unprotected": 0,
        "ledger_sequence": 7,
        "ledger_hash": "ab" * 32,
        "ledger_signature": "cd" * 64,
    }
    return FitReply(**{**content, **changes})


def rewritten(content: RecordDict, **changes: Any) -> RecordDict:
    """The frame's JSON with keys changed, as a peer that does not validate would send it."""
    frame = dict(content.config_records[FRAME])
    frame["body"] = json.dumps(json.loads(str(frame["body"])) | changes)
    content[FRAME] = ConfigRecord(frame)
    return content


def on_the_wire(message: Message) -> Message:
    return message_from_proto(ProtoMessage.FromString(message_to_proto(message).SerializeToString()))


def answer(node: int, content: RecordDict | Error, kind: str = MessageType.TRAIN) -> Message:
    """A reply of `node`."""
    return Message(content, reply_to=Message(RecordDict(), node, kind))


# --- the app ----------------------------------------------------------------------------------------------------------
# node_config: name; labels: "other" for other ones; script: JSON, "hello", "train N" or "evaluate N" to what is done there

app = ClientApp()


def _scripted(context: Context, moment: str) -> str:
    script: Mapping[str, str] = json.loads(str(context.node_config.get("script", "{}")))
    return script.get(moment, "")


def _odd(message: Message, order: str) -> Message | None:
    if order == "refuse":
        return Message(Error(1001, REFUSAL), reply_to=message)
    if order == "raise":
        raise RuntimeError("Anna Example")
    if order == "garbage":
        return Message(RecordDict({"junk": ConfigRecord({"a": 1})}), reply_to=message)
    return None


@app.query()
def query(message: Message, context: Context) -> Message:
    labels = OTHER_LABELS if context.node_config.get("labels") == "other" else LABELS
    reply = encode(hello(str(context.node_config["name"]), labels=labels))
    return _odd(message, _scripted(context, "hello")) or Message(reply, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    ask, name = decode(message.content, TrainAsk), str(context.node_config["name"])
    order = _scripted(context, f"train {ask.round}")
    if odd := _odd(message, order):
        return odd
    step = weights(f"{name} {ask.round}")
    now = {n: w + 0.1 * step[n] for n, w in decode_weights(message.content, SHAPES).items()}
    if order == "nan":
        now["scale"] = torch.tensor(float("nan"))
    if order == "huge":
        now["scale"] = torch.tensor(3e38)
    if order == "double":
        now = {n: w.double() for n, w in now.items()}
    reply = fit_reply(name, run=ask.run, round=ask.round, epsilon=0.25 * ask.round)
    weight = 1.0 / (1.0 + 0.1 * context.node_id)  # unequal, so that who counts how much shows in the sum
    return Message(encode(reply, weights=now, weight=weight), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """mean_auroc is only a number; `total` proves which weights were seen."""
    ask, name = decode(message.content, EvaluateAsk), str(context.node_config["name"])
    order = _scripted(context, f"evaluate {ask.round}")
    if odd := _odd(message, order):
        return odd
    total = sum(float(w.sum()) for w in decode_weights(message.content, SHAPES).values())
    scores = None if order == "withhold" else {"mean_auroc": 0.5, "total": total}
    content = encode(ScoreReply(hospital=name, run=ask.run, round=ask.round, scores=scores))
    if order == "nonsense":
        content = rewritten(content, scores={"mean_auroc": "high", "total": float("nan")})
    return Message(content, reply_to=message)
