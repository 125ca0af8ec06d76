"""A hospital that does not declare a modality: of its parts nothing leaves. One that has none and says nothing sends noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import Hospital, system_noise
from client.gate import Trained, sealed
from client.site import Site
from fedmm.config import load_site
from fedmm.errors import MessageInvalid, ReleaseBlocked
from fedmm.federation.messages import (
    ARRAYS,
    FitReply,
    Hello,
    PlanAsk,
    TrainAsk,
    array_record,
    decode,
    decode_weights,
    digest_of,
    encode,
)
from fedmm.privacy.ledger import Ledger
from tests.client.test_client import PLAN, train_ask, weights
from tests.e2e.conftest import policy, write_hospital

AUDIO = tuple(name for name in weights() if name.startswith(("encoders.audio.", "norms.audio.")))
DECLARED = 'modalities = ["image", "report"]\n'


@pytest.fixture(autouse=True)
def _inside_flower() -> None:
    """Flower asks in whose name a message is made."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 1


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """It has audio files, and declares none."""
    folder = write_hospital(tmp_path / "north")
    (folder / "site.toml").write_text(policy("north", research=False) + DECLARED, encoding="utf-8")
    return folder


def ask_app(app: Any, hospital: Path, content: RecordDict, kind: str = MessageType.TRAIN) -> Message:
    context = Context(run_id=1, node_id=2, node_config={"site": str(hospital)}, state=RecordDict(), run_config={})
    return app(Message(content, 2, kind), context)


def question(**more: Any) -> RecordDict:
    return encode(train_ask(), arrays=array_record(weights()), **more)


def changed(reply: Message) -> set[str]:
    found = decode_weights(reply.content, {name: tuple(value.shape) for name, value in weights().items()})
    return {name for name, value in weights().items() if not torch.equal(value, found[name])}


def test_an_introduction_says_what_is_declared(hospital: Path) -> None:
    app = sealed(Hospital(system_noise))
    reply = ask_app(app, hospital, encode(PlanAsk(plan=PLAN.to_flat(), rounds=2)), MessageType.QUERY)
    assert decode(reply.content, Hello).modalities == ("image", "report")


@pytest.mark.parametrize("groups", ["all", "modality"])
@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
def test_parts_of_what_is_not_declared_come_back_as_they_were_sent_and_all_else_is_noisy(
    hospital: Path, clipping: str, groups: str
) -> None:
    asked = train_ask(training__clipping=clipping, training__clip_groups=groups)
    content = encode(asked, arrays=array_record(weights()))
    reply = ask_app(sealed(Hospital(system_noise)), hospital, content)
    assert changed(reply) == set(weights()) - set(AUDIO)
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        (event,) = ledger.events()
    assert (event["noise_multiplier"], event["sampling_rate"]) == (PLAN.noise_multiplier, PLAN.sampling_rate)


def test_a_failing_step_leaves_them_as_they_were_too(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from client import app as client_app

    honest = client_app.train

    def fail(bench: Any, cohort: Any, *rest: Any, **more: Any) -> None:
        if cohort.patients:
            raise MemoryError
        honest(bench, cohort, *rest, **more)

    monkeypatch.setattr(client_app, "train", fail)
    assert changed(ask_app(sealed(Hospital(system_noise)), hospital, question())) == set(weights()) - set(AUDIO)


def test_a_shortened_update_leaves_them_as_they_were(hospital: Path) -> None:
    content = encode(train_ask(training__max_update_norm=0.25), arrays=array_record(weights()))
    assert changed(ask_app(sealed(Hospital(system_noise)), hospital, content)) <= set(weights()) - set(AUDIO)


def test_one_that_declares_all_and_has_none_sends_noise_there(hospital: Path) -> None:
    """Whether anybody has audio is the patients' secret: the answer has the same form either way."""
    lines = (hospital / "manifest.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines]
    at = rows[0].index("audio")
    text = "".join(
        ",".join("" if i == at and n else cell for i, cell in enumerate(row)) + "\n" for n, row in enumerate(rows)
    )
    (hospital / "manifest.csv").write_text(text)
    (hospital / "site.toml").write_text(policy("north", research=False), encoding="utf-8")
    reply = ask_app(sealed(Hospital(system_noise)), hospital, question())
    decode(reply.content, FitReply)
    assert changed(reply) == set(weights())


class Leaky(Hospital):
    """Trains as it should, then changes one number of a part that it does not declare, and pays for that."""

    def __init__(self, value: float) -> None:
        super().__init__(system_noise)
        self.value = value

    def fit(self, site: Site, ask: TrainAsk, message: Message) -> Trained:
        made = super().fit(site, ask, message)
        shapes = {name: tuple(value.shape) for name, value in weights().items()}
        found = decode_weights(RecordDict({ARRAYS: made.arrays}), shapes)
        found["norms.audio.bias"][0] = self.value
        arrays = array_record(found)
        site.ledger.reserve(PLAN.round_event(1), run=ask.run, round=ask.round).settle(sha256=digest_of(arrays))
        return Trained(arrays, made.weight)


@pytest.mark.parametrize("value", [61.0, -0.0], ids=["a number", "the other zero"])
def test_the_gate_holds_back_a_reply_that_says_something_there(hospital: Path, value: float) -> None:
    assert float(weights()["norms.audio.bias"][0]) == 0
    reply = ask_app(sealed(Leaky(value)), hospital, question())
    assert reply.has_error()
    assert reply.error.code == ReleaseBlocked.code
    assert "norms.audio.bias" in reply.error.reason


class Boastful(Hospital):
    def introduce(self, site: Site, ask: PlanAsk) -> Hello:
        return super().introduce(site, ask).model_copy(update={"modalities": ("image",)})


def test_an_introduction_that_declares_something_else_than_site_toml_does_not_leave(hospital: Path) -> None:
    reply = ask_app(
        sealed(Boastful(system_noise)), hospital, encode(PlanAsk(plan=PLAN.to_flat(), rounds=2)), MessageType.QUERY
    )
    assert reply.has_error()
    assert reply.error.code == ReleaseBlocked.code


# --- corrections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {name: torch.full_like(value, torch.nan) for name, value in weights().items()},
        {name: value for name, value in weights().items() if name not in AUDIO},
        {name: torch.full_like(value, 1e6) for name, value in weights().items()},
    ],
    ids=["not finite", "other names", "longer than an update may be"],
)
def test_a_correction_that_is_none_is_refused_before_anything_is_charged(
    hospital: Path, wrong: dict[str, torch.Tensor]
) -> None:
    reply = ask_app(sealed(Hospital(system_noise)), hospital, question(correction=array_record(wrong)))
    assert reply.has_error()
    assert reply.error.code == MessageInvalid.code
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        assert ledger.events() == []


def test_a_correction_moves_the_answer_and_not_what_is_not_declared(hospital: Path) -> None:
    shift = {name: torch.full_like(value, 100.0) for name, value in weights().items()}
    reply = ask_app(sealed(Hospital(system_noise)), hospital, question(correction=array_record(shift)))
    found = decode_weights(reply.content, {name: tuple(value.shape) for name, value in weights().items()})
    moved = found["head.output.bias"] - weights()["head.output.bias"]
    assert (moved < -5).all(), "rate 0.1 x 100, beside noise of less than 0.1 x 2 C / 4"
    assert all(torch.equal(found[name], weights()[name]) for name in AUDIO)
