"""The hospital's app as a coordinator meets it: curious, mistaken, of another version, or hostile."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict

import client.app
from client.site import HOSPITALS_VARIABLE, open_site
from fedmm.config import RunConfig, load_site
from fedmm.errors import ConfigError, HospitalInvalid, PolicyRefused
from fedmm.federation.local import LocalGrid
from fedmm.federation.messages import (
    ARRAYS,
    FRAME,
    VERSION,
    EvaluateAsk,
    FitReply,
    Hello,
    PlanAsk,
    ScoreReply,
    TrainAsk,
    array_record,
    decode,
    decode_weights,
    encode,
)
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import PrivacyPlan, Rate
from fedmm.schema import Labels
from tests.e2e.conftest import SETTINGS, policy, write_hospital

SECRET, NONCE = "PATIENT-SECRET", "0f" * 16
CONFIG = RunConfig.from_flat({key: str(value) for key, value in SETTINGS.items()})
LABELS = Labels(findings=("pneumonia", "effusion"), class_name="grade", class_values=("none", "mild", "severe"))
SPEC = ModelSpec(inputs=CONFIG.data.inputs, model=CONFIG.model, labels=LABELS)
# Rate 1 keeps the accounting of these tests to milliseconds.
PLAN = PrivacyPlan(
    unit="patient",
    relation="add_or_remove_one",
    delta=1e-4,
    epsilon=4.0,
    sampling="poisson",
    max_grad_norm=1.0,
    max_studies=5,
    sampling_rate=Rate(1.0),
    steps_per_round=1,
    rounds=2,
    noise_multiplier=2.0,
    evaluation_noise=3.0,
    private=True,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    return write_hospital(tmp_path / "north")


def weights() -> dict[str, torch.Tensor]:
    return dict(build_model(SPEC, 1).state_dict())


def train_ask(plan: PrivacyPlan = PLAN, *, spec: ModelSpec = SPEC, round: int = 1, **settings: object) -> TrainAsk:
    said = {
        "privacy.enabled": plan.private,
        "privacy.unit": plan.unit,
        "training.max_studies": plan.max_studies,
        "privacy.epsilon": plan.epsilon,
        "privacy.delta": plan.delta,
        "privacy.max_grad_norm": plan.max_grad_norm,
        "training.sampling_rate": plan.sampling_rate,
        "training.local_steps": plan.steps_per_round,
        "federation.rounds": plan.rounds,
    }
    flat = CONFIG.flat() | said | {key.replace("__", "."): value for key, value in settings.items()}
    return TrainAsk(run="run1", round=round, nonce=NONCE, settings=flat, spec=spec, plan=plan.to_flat())


def of_run(body: TrainAsk, run: str) -> TrainAsk:
    return body.model_copy(update={"run": run})


def evaluate_ask(plan: PrivacyPlan = PLAN, *, round: int = 1) -> EvaluateAsk:
    asked = train_ask(plan, round=round)
    return EvaluateAsk(**asked.model_dump() | {"spec": asked.spec})


def ask(hospital: Path, content: RecordDict, kind: str = MessageType.TRAIN) -> Message:
    """The app's answer, through Flower's wire format."""
    grid = LocalGrid("client.app:app", [{"site": str(hospital)}])
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(content, node, kind)])
    return reply


def refusal(reply: Message) -> tuple[int, str]:
    assert reply.has_error()
    return reply.error.code, reply.error.reason


def spent(hospital: Path) -> Any:
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        return ledger.spent()


# --- what a good hospital says ----------------------------------------------------------------------------------------


def test_hello_says_only_what_is_public(hospital: Path) -> None:
    reply = ask(hospital, encode(PlanAsk(plan=PLAN.to_flat(), rounds=2)), MessageType.QUERY)
    hello = decode(reply.content, Hello)
    assert (hello.hospital, hello.labels, hello.ceiling, hello.delta) == ("north", LABELS, 20.0, 1e-4)
    assert (hello.metrics, hello.least_noise) == ("exact", 2.0)
    public = {"hospital", "labels", "fedmm", "ceiling", "delta", "metrics", "modalities", "least_noise", "ledger_key"}
    public |= {"refusal_code", "refusal", "nonce", "signature"}
    assert set(Hello.model_fields) == public
    assert spent(hospital).releases == 0


def test_a_training_changes_the_weights_is_charged_and_says_what_the_ledger_says(hospital: Path) -> None:
    reply = ask(hospital, encode(train_ask(), arrays=array_record(weights())))
    body = decode(reply.content, FitReply)
    trained = decode_weights(reply.content, {name: tuple(value.shape) for name, value in weights().items()})
    assert any(not torch.equal(trained[name], value) for name, value in weights().items())
    now = spent(hospital)
    assert (body.hospital, body.run, body.round, body.private) == ("north", "run1", 1, True)
    assert body.epsilon == pytest.approx(now.epsilon, abs=1e-12)
    assert (now.releases, now.reserved) == (1, 0)


def test_the_same_question_of_two_runs_gives_different_noise(hospital: Path) -> None:
    shapes = {name: tuple(value.shape) for name, value in weights().items()}
    one, two = (
        decode_weights(ask(hospital, encode(of_run(train_ask(), run), arrays=array_record(weights()))).content, shapes)
        for run in ("run1", "run2")
    )
    assert all(not torch.equal(one[name], two[name]) for name in shapes)
    assert spent(hospital).releases == 2


def test_scores_stay_at_home_where_the_policy_says_so_and_cost_nothing(hospital: Path) -> None:
    (hospital / "site.toml").write_text(policy("north", research=False), encoding="utf-8")
    content = encode(evaluate_ask(), arrays=array_record(weights()))
    reply = decode(ask(hospital, content, MessageType.EVALUATE).content, ScoreReply)
    assert reply.scores is None
    assert spent(hospital).releases == 0


# --- the unforeseen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ValueError(SECRET), KeyError(SECRET), MemoryError(SECRET), ConfigError("no such GPU")]
)
def test_an_unforeseen_error_reaches_the_coordinator_as_a_code_and_a_ticket_that_the_log_has_too(
    hospital: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(client.app, "train", fail)
    with caplog.at_level(logging.DEBUG):
        code, reason = refusal(ask(hospital, encode(train_ask(), arrays=array_record(weights()))))
    assert code == 1099
    ticket = re.fullmatch(r"UNEXPECTED: see the hospital's log, correlation id ([0-9a-f]{8})", reason)
    assert ticket is not None
    assert ticket[1] in caplog.text
    assert type(error).__name__ in caplog.text


def test_the_text_of_an_unforeseen_error_is_in_no_log_record(
    hospital: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        try:
            raise ValueError(SECRET)
        except ValueError as cause:
            raise RuntimeError(f"row of {SECRET}") from cause

    monkeypatch.setattr(client.app, "train", fail)
    with caplog.at_level(logging.DEBUG):
        code, reason = refusal(ask(hospital, encode(train_ask(), arrays=array_record(weights()))))
    assert code == 1099
    formatter = logging.Formatter()
    said = [formatter.format(record) + repr(vars(record)) for record in caplog.records]
    printed = capfd.readouterr()
    assert said
    assert not [text for text in (*said, reason, printed.out, printed.err) if SECRET in text]


def test_what_failed_after_the_first_step_may_have_begun_stays_charged(
    hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr(client.app, "train", fail)
    assert refusal(ask(hospital, encode(train_ask(), arrays=array_record(weights()))))[0] == 1099
    now = spent(hospital)
    assert (now.releases, now.reserved) == (1, 0)  # closed, for nothing: no further attempt is free under it
    assert now.epsilon > 0


def test_a_refusal_while_loading_is_given_back(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise HospitalInvalid("broken")

    monkeypatch.setattr(client.site, "load_hospital", fail)
    assert refusal(ask(hospital, encode(train_ask(), arrays=array_record(weights()))))[0] == 1004
    assert spent(hospital).releases == 0


def test_loading_that_fails_for_want_of_memory_answers_with_noise_alone(
    hospital: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The coordinator chooses how large a study is in memory: an error told how many studies there are, at epsilon 0."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError(SECRET)

    monkeypatch.setattr(client.site, "load_hospital", fail)
    reply = ask(hospital, encode(train_ask(), arrays=array_record(weights())))
    assert decode(reply.content, FitReply).epsilon > 0
    (hospital / "site.toml").write_text(policy("north", research=False, metrics='"noisy"'), encoding="utf-8")
    content = encode(evaluate_ask(), arrays=array_record(weights()))
    assert decode(ask(hospital, content, MessageType.EVALUATE).content, ScoreReply).histogram is not None
    assert "noise alone" in caplog.text
    assert SECRET not in caplog.text


# --- a hostile coordinator --------------------------------------------------------------------------------------------


def test_a_step_that_fails_because_of_the_patients_answers_with_noise_alone(
    hospital: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Error or answer must not depend on the sample: asked often enough it told the number of patients at epsilon 0."""
    honest = client.app.train

    def fail_with_patients(bench: Any, cohort: Any, *arguments: Any, **more: Any) -> None:
        if cohort.patients:
            raise MemoryError(SECRET)
        honest(bench, cohort, *arguments, **more)

    monkeypatch.setattr(client.app, "train", fail_with_patients)
    reply = ask(hospital, encode(train_ask(), arrays=array_record(weights())))
    decode(reply.content, FitReply)
    assert (spent(hospital).releases, spent(hospital).reserved) == (1, 0)
    assert "noise alone" in caplog.text
    assert SECRET not in caplog.text


def test_a_failed_step_does_not_spoil_the_next_round(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opacus' hooks keep what a forward pass left behind when no backward pass follows."""
    from fedmm.training import loop

    decode(ask(hospital, encode(train_ask(), arrays=array_record(weights()))).content, FitReply)
    honest, failed = loop.Objective.__call__, []

    def fail_once(*arguments: Any) -> torch.Tensor:
        if not failed:
            failed.append(True)
            raise RuntimeError("out of memory")
        return honest(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Objective, "__call__", fail_once)
        decode(ask(hospital, encode(train_ask(round=2), arrays=array_record(weights()))).content, FitReply)
    assert failed
    for number in (1, 2):
        asked = of_run(train_ask(round=number), "run2")
        decode(ask(hospital, encode(asked, arrays=array_record(weights()))).content, FitReply)
    assert (spent(hospital).releases, spent(hospital).reserved) == (4, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"max_grad_norm": 1.1e-8}, {"max_grad_norm": 1e7}, {"noise_multiplier": 1e9}, {"sampling_rate": 5e-324},
        {"steps_per_round": 10**9}, {"max_grad_norm": 5e-324},
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_out_of_range_is_refused_and_the_ledger_stays_readable(hospital: Path, change: dict[str, Any]) -> None:
    plan = PrivacyPlan(**(vars(PLAN) | change))
    code, _ = refusal(
        ask(hospital, encode(train_ask().model_copy(update={"plan": plan.to_flat()}), arrays=array_record(weights())))
    )
    assert code == 1003
    assert spent(hospital).releases == 0
    decode(ask(hospital, encode(train_ask(), arrays=array_record(weights()))).content, FitReply)


def test_a_plan_that_says_something_else_than_the_settings_is_refused(hospital: Path) -> None:
    other = PrivacyPlan(**(vars(PLAN) | {"max_grad_norm": 0.5}))
    code, reason = refusal(
        ask(hospital, encode(train_ask().model_copy(update={"plan": other.to_flat()}), arrays=array_record(weights())))
    )
    assert code == 1003
    assert "max_grad_norm" in reason


@pytest.mark.parametrize(
    ("augment", "image"), [("lab", "cnn"), ("image", "hog")], ids=["unknown modality", "kept features"]
)
def test_what_cannot_be_augmented_is_refused_before_it_is_paid(hospital: Path, augment: str, image: str) -> None:
    spec = SPEC.model_copy(update={"model": SPEC.model.model_copy(update={"image": image})})
    asked = train_ask(spec=spec, training__augment=augment, model__image=image)
    code, reason = refusal(ask(hospital, encode(asked, arrays=array_record(dict(build_model(spec, 1).trained())))))
    assert code == 1002
    assert "training.augment" in reason
    assert spent(hospital).releases == 0


def test_settings_that_are_none_are_a_broken_message_and_their_values_go_nowhere(
    hospital: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = train_ask()
    code, reason = refusal(
        ask(
            hospital,
            encode(
                asked.model_copy(update={"settings": asked.settings | {"training.device": 3, SECRET: 1}}),
                arrays=array_record(weights()),
            ),
        )
    )
    assert code == 1006
    assert SECRET not in reason + caplog.text


def test_weights_that_are_no_longer_finite_do_not_leave(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(bench: Any, *_: object, **__: object) -> None:
        next(iter(bench.model.parameters())).data.fill_(np.nan)

    monkeypatch.setattr(client.app, "train", diverge)
    code, reason = refusal(ask(hospital, encode(train_ask(), arrays=array_record(weights()))))
    assert code == 1002
    assert "diverged" in reason
    assert spent(hospital).releases == 1  # that it diverged is told, so it is paid


# --- a coordinator of another version, or hostile ---------------------------------------------------------------------


def framed(**changes: object) -> RecordDict:
    content = encode(train_ask(), arrays=array_record(weights()))
    content[FRAME] = ConfigRecord({**content.config_records[FRAME], **changes})
    return content


BROKEN = {
    "another version": lambda: framed(version=VERSION + 1),
    "another kind": lambda: framed(kind="EvaluateAsk"),
    "no JSON": lambda: framed(body="{"),
    "an unknown key": lambda: framed(body=json.dumps(json.loads(train_ask().model_dump_json()) | {"site": "/etc"})),
    "a body of bytes": lambda: framed(body=b"{}"),
    "round 0": lambda: framed(body=train_ask().model_dump_json().replace('"round":1', '"round":0')),
    "no frame": lambda: RecordDict(),
    "no weights": lambda: encode(train_ask()),
    "a tensor too few": lambda: encode(train_ask(), arrays=array_record(dict(list(weights().items())[1:]))),
    "a tensor too many": lambda: encode(train_ask(), arrays=array_record(weights() | {"extra": torch.zeros(1)})),
    "NaN": lambda: encode(
        train_ask(), arrays=array_record({n: torch.full_like(v, torch.nan) for n, v in weights().items()})
    ),
    "another shape": lambda: encode(
        train_ask(), arrays=array_record({n: v.unsqueeze(0) for n, v in weights().items()})
    ),
    "double": lambda: encode(train_ask(), arrays=array_record({n: v.double() for n, v in weights().items()})),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_message_that_breaks_the_agreed_form_is_refused_and_costs_nothing(hospital: Path, kind: str) -> None:
    code, reason = refusal(ask(hospital, BROKEN[kind]()))
    assert (code, reason.split(":")[0]) == (1006, "MESSAGE_INVALID")
    assert spent(hospital).releases == 0


def test_weights_that_would_unpickle_something_are_refused(hospital: Path) -> None:
    content = encode(train_ask(), arrays=array_record(weights()))
    record = ArrayRecord()
    for name, array in content.array_records[ARRAYS].items():
        bad = b"\x80\x04\x95" + array.data[3:]
        record[name] = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=bad)
    content[ARRAYS] = record
    assert refusal(ask(hospital, content))[0] == 1006


def spec_of_other_labels() -> ModelSpec:
    return SPEC.model_copy(update={"labels": Labels(findings=("smoker",))})


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (lambda: train_ask(replace(PLAN, private=False, noise_multiplier=0.0, evaluation_noise=0.0)), 1002),
        (lambda: train_ask(replace(PLAN, noise_multiplier=0.01)), 1002),
        (lambda: train_ask(replace(PLAN, delta=0.0099)), 1003),
        (lambda: train_ask(replace(PLAN, unit="record")), 1002),
        (lambda: train_ask(spec=spec_of_other_labels()), 1002),
        (lambda: train_ask(federation__weights="declared"), 1002),
        (lambda: train_ask().model_copy(update={"plan": PLAN.to_flat() | {"noise_multiplier": -1.0}}), 1003),
        (lambda: train_ask().model_copy(update={"plan": {"private": False}}), 1003),
    ],
    ids=["not private", "little noise", "large delta", "record level", "other labels", "count", "negative", "no plan"],
)
def test_what_the_policy_does_not_allow_is_refused_before_data_is_touched_or_anything_charged(
    hospital: Path, asked: Any, code: int
) -> None:
    (hospital / "site.toml").write_text(policy("north", research=False, public_patients="20"), encoding="utf-8")
    (hospital / "manifest.csv").unlink()
    question = asked()
    shapes = dict(build_model(question.spec, 1).state_dict())
    assert refusal(ask(hospital, encode(question, arrays=array_record(shapes))))[0] == code
    assert spent(hospital).releases == 0


def test_no_setting_of_a_message_reaches_the_noise(hospital: Path) -> None:
    """federation.seed is the coordinator's to choose: noise that followed it could be subtracted."""
    shapes = {name: tuple(value.shape) for name, value in weights().items()}
    asked = [of_run(train_ask(federation__seed=7), run) for run in ("run1", "run2")]
    content = [encode(body, arrays=array_record(weights())) for body in asked]
    one, two = (decode_weights(ask(hospital, each).content, shapes) for each in content)
    assert all(not torch.equal(one[name], two[name]) for name in shapes)


# --- which hospital am I ----------------------------------------------------------------------------------------------


def context(node: dict[str, Any], run: dict[str, Any]) -> Context:
    return Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config=run)


def test_a_node_that_knows_its_folder_follows_nobody_elsewhere(
    hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_hospital(tmp_path / "elsewhere" / "south")
    monkeypatch.setenv(HOSPITALS_VARIABLE, str(other.parent))
    node = {"site": str(hospital), "partition-id": 0}
    run = {"data.hospitals": str(other.parent), "site": str(other), "data.site": str(other)}
    assert open_site(context(node, run)).folder == hospital


def test_a_message_cannot_point_a_node_at_another_folder(hospital: Path, tmp_path: Path) -> None:
    other = write_hospital(tmp_path / "elsewhere" / "south")
    content = encode(
        train_ask(data__hospitals=str(other.parent), federation__out=str(other)), arrays=array_record(weights())
    )
    content["site"] = ConfigRecord({"site": str(other), "partition-id": 0})
    reply = ask(hospital, content)
    assert decode(reply.content, FitReply).hospital == "north"
    assert spent(hospital).releases == 1
    assert not (other / "ledger.sqlite").exists()


def test_a_numbered_node_takes_the_folder_of_its_number_and_the_machine_wins_over_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "a", here / "b", there / "c"):
        write_hospital(folder, patients=1)
    monkeypatch.delenv(HOSPITALS_VARIABLE, raising=False)
    run = {"data.hospitals": str(there)}
    assert open_site(context({"partition-id": 0}, run)).folder == there / "c"
    monkeypatch.setenv(HOSPITALS_VARIABLE, str(here))
    assert [open_site(context({"partition-id": i}, run)).name for i in range(2)] == ["a", "b"]


@pytest.mark.parametrize("node", [{}, {"partition-id": 5}, {"site": "/nowhere"}, {"site": ""}], ids=str)
def test_a_node_without_a_hospital_refuses(
    hospital: Path, monkeypatch: pytest.MonkeyPatch, node: dict[str, Any], tmp_path: Path
) -> None:
    monkeypatch.setenv(HOSPITALS_VARIABLE, str(hospital.parent))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PolicyRefused):
        open_site(context(node, {"data.hospitals": str(hospital.parent)}))
