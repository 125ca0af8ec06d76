"""Hospitals that follow a script instead of training, and the messages they send: tests of checks and rounds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from fedmm.config import ModelConfig
from fedmm.federation.checks import Expected, Fit, Heard, check_fits
from fedmm.federation.messages import (
    FRAME,
    EvaluateAsk,
    FitReply,
    Hello,
    PlanAsk,
    ScoreReply,
    Statement,
    TrainAsk,
    array_record,
    decode,
    decode_weights,
    digest_of,
    encode,
)
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.chain import SIGNED_AS, public_hex, sign_statement
from fedmm.schema import InputSpec, Labels
from fedmm.seeds import seed_for
from fedmm.training import histograms

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
NONCE = "0f" * 16
REFUSAL = "BUDGET_EXHAUSTED: 3.1 of 3.0"


def weights(seed: str = "start") -> dict[str, torch.Tensor]:
    """Deterministic float32 tensors of SHAPES."""
    generator = torch.Generator().manual_seed(seed_for(1, seed))
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def hello(name: str, **changes: Any) -> Hello:
    said = {"hospital": name, "labels": LABELS, "fedmm": "0.1.0", "ceiling": 3.0, "delta": 1e-4}
    key = "" if changes.get("refusal_code") else key_in_words(name)
    return Hello(**{**said, "metrics": "exact", "least_noise": 0.0, "ledger_key": key, **changes})


@lru_cache
def key_of(name: str) -> Ed25519PrivateKey:
    """A hospital's key: the same wherever it is asked for."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


@lru_cache
def key_in_words(name: str) -> str:
    return public_hex(key_of(name).public_key())


def statement(name: str, **changes: Any) -> dict[str, Any]:
    """What a ledger says about itself, signed by `key_of(name)` unless the signature is among the changes."""
    said: dict[str, Any] = {
        "hospital": name,
        "run": RUN,
        "round": 1,
        "nonce": NONCE,
        "release": "",
        "epsilon": 0.5,
        "ceiling": 3.0,
        "delta": 1e-4,
        "unprotected": 0,
        "ledger_sequence": 7,
        "ledger_hash": "ab" * 32,
    } | changes
    head = bytes.fromhex(said["ledger_hash"])
    signed = {
        "ledger_signature": key_of(name).sign(SIGNED_AS + head).hex(),
        "ledger_key": key_in_words(name),
    }
    facts = {k: v for k, v in (signed | said).items() if k in Statement.model_fields and k != "statement_signature"}
    return {"statement_signature": sign_statement(facts, key_of(name)), **signed, **said}


def fit_reply(name: str, *, arrays: ArrayRecord | None = None, **changes: Any) -> FitReply:
    """arrays: what is signed for; `weights()` if it is not said."""
    release = digest_of(array_record(weights()) if arrays is None else arrays)
    return FitReply(**{"private": True, **statement(name, **{"release": release, **changes})})


def score_reply(name: str, **changes: Any) -> ScoreReply:
    """Signed for the scores or the histogram in it."""
    made = [changes[kind] for kind in ("scores", "histogram") if changes.get(kind) is not None]
    return ScoreReply(**statement(name, **{"release": digest_of(made[0]) if made else "", **changes}))


def resigned(said: FitReply, signer: str, **changes: Any) -> FitReply:
    """The reply with some facts changed, and then signed by `key_of(signer)`."""
    changed = said.model_copy(update=changes)
    return changed.model_copy(update={"statement_signature": sign_statement(changed.facts(), key_of(signer))})


def fit_content(name: str, *, weight: float | None = 1.0, seed: str = "start", **changes: Any) -> RecordDict:
    """What a hospital that trained sends: `weights(seed)` with its statement."""
    arrays = array_record(weights(seed))
    return encode(fit_reply(name, arrays=arrays, **changes), arrays=arrays, weight=weight)


def checked(replies: Iterable[Message], names: Mapping[int, str], expected: Expected) -> tuple[dict[str, Fit], Heard]:
    """The usable replies by name, and the rest."""
    fits: dict[str, Fit] = {}
    heard = check_fits(replies, names, expected, lambda fit: fits.setdefault(fit.hospital, fit))
    return dict(sorted(fits.items())), heard


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
# node_config: name; labels: "other" for other ones; metrics, least_noise: as in its Hello; key: whose key it names;
# signer: whose it signs its Hello with; nonce: of another ask;
# script: JSON, "hello", "train N" or "evaluate N" to what is done there

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


def _metrics(context: Context) -> str:
    return str(context.node_config.get("metrics", "exact"))


@app.query()
def query(message: Message, context: Context) -> Message:
    ask, node = decode(message.content, PlanAsk), context.node_config
    key = str(node.get("key", node["name"]))
    declined = {"refusal_code": 1001, "refusal": REFUSAL + "\n\x1b[2J"}
    said = hello(
        str(node["name"]),
        labels=OTHER_LABELS if node.get("labels") == "other" else LABELS,
        metrics=_metrics(context),
        least_noise=float(node.get("least_noise", 0.0)),
        nonce=str(node.get("nonce", ask.nonce)),
        **({"ledger_key": key_in_words(key)} if key != node["name"] else {}),
        **(declined if _scripted(context, "hello") == "decline" else {}),
    )
    if not said.refusal_code:
        signature = sign_statement(said.facts(), key_of(str(node.get("signer", key))))
        said = said.model_copy(update={"signature": signature})
    return _odd(message, _scripted(context, "hello")) or Message(encode(said), reply_to=message)


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
    if order == "lie":  # within the bound that all are held to
        now = {n: w + 100 for n, w in now.items()}
    if order == "huge":
        now["scale"] = torch.tensor(3e38)
    if order == "double":
        now = {n: w.double() for n, w in now.items()}
    changes = {"ledger_signature": "00" * 64} if order == "forged" else {}
    arrays, asked = array_record(now), {"run": ask.run, "round": ask.round, "nonce": ask.nonce}
    signer = f"{name} rotated" if order == "rotated" else name
    said = fit_reply(signer, arrays=arrays, epsilon=0.25 * ask.round, **asked, **changes)
    if signer != name:
        said = resigned(said, signer, hospital=name)
    # unequal where that is allowed, so that who counts how much shows in the sum
    if order == "heavy":
        return Message(encode(said, arrays=arrays, weight=1.5), reply_to=message)
    weight = 1.0 if ask.settings["federation.weights"] == "uniform" else 1.0 / (1.0 + 0.1 * context.node_id)
    return Message(encode(said, arrays=arrays, weight=weight), reply_to=message)


def noisy_histogram(name: str) -> tuple[float, ...]:
    """Nobody's patients: good scores, far above the noise of the tests' plans."""
    cells = histograms.cells(LABELS)
    generator = torch.Generator().manual_seed(seed_for(2, name))
    noise = torch.randn(cells, generator=generator, dtype=torch.float64)
    half = histograms.BINS
    likely = torch.linspace(0, 20, half, dtype=torch.float64)
    blocks = [part for _ in LABELS.outputs for part in (likely.flip(0), likely)]
    return tuple((torch.cat([*blocks, torch.tensor([50.0, 150.0], dtype=torch.float64)]) + noise).tolist())


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """mean_auroc is only a number; `total` proves which weights were seen. The ledger says 0.125 more than in training."""
    ask, name = decode(message.content, EvaluateAsk), str(context.node_config["name"])
    order = _scripted(context, f"evaluate {ask.round}")
    if odd := _odd(message, order):
        return odd
    said: dict[str, Any] = {"run": ask.run, "round": ask.round, "nonce": ask.nonce}
    said["epsilon"] = 0.25 * ask.round + 0.125
    if order == "forged":
        said["ledger_signature"] = "00" * 64
    if order != "withhold" and _metrics(context) == "noisy":
        said |= {"histogram": noisy_histogram(name), "noise_multiplier": float(ask.plan["evaluation_noise"])}
    elif order != "withhold":
        total = sum(float(w.sum()) for w in decode_weights(message.content, SHAPES).values())
        said["scores"] = {"mean_auroc": 0.5, "total": total}
    content = encode(score_reply(name, **said))
    if order == "nonsense":
        content = rewritten(content, scores={"mean_auroc": "high", "total": float("nan")})
    return Message(content, reply_to=message)
