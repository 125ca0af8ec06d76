"""The gate against the hospital's own app: what an app that is wrong, or was tampered with, cannot send."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity

from client.app import COUNT_NOISE, Hospital, numbers, system_noise
from client.gate import Scored, Trained, sealed
from client.site import Site
from fedmm.config import load_site
from fedmm.errors import LedgerUnusable
from fedmm.federation.messages import (
    EvaluateAsk,
    FitReply,
    Hello,
    PlanAsk,
    ScoreReply,
    TrainAsk,
    array_record,
    decode,
    digest_of,
    encode,
    fresh_nonce,
    size_bytes,
)
from fedmm.federation.tiles import distance
from fedmm.privacy import statement
from fedmm.privacy.chain import statement_is_signed
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import Event
from fedmm.schema import Labels
from fedmm.training.histograms import cells
from tests.client.test_client import LABELS, PLAN, evaluate_ask, train_ask, weights
from tests.e2e.conftest import policy, write_hospital

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = 1008


@pytest.fixture(autouse=True)
def _inside_flower() -> None:
    """Flower asks in whose name a message is made."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 1


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    folder = write_hospital(tmp_path / "north")
    set_policy(folder, metrics="noisy")
    return folder


def set_policy(folder: Path, *, metrics: str = "noisy", counts: str = "no", extra: str = "") -> None:
    text = policy("north", research=False)
    start, _, rest = text.partition("[release]")
    _, _, after = rest.partition("\n[")
    release = f'[release]\ncounts = "{counts}"\nmetrics = "{metrics}"\n'
    (folder / "site.toml").write_text(start + release + (f"\n[{after}" if after else "") + extra, encoding="utf-8")


def ask_app(app: Any, hospital: Path, content: RecordDict, kind: str) -> Message:
    question = Message(content, 2, kind)
    context = Context(run_id=1, node_id=2, node_config={"site": str(hospital)}, state=RecordDict(), run_config={})
    return app(question, context)


def train(app: Any, hospital: Path, *, round: int = 1, **settings: object) -> Message:
    content = encode(train_ask(round=round, **settings), arrays=array_record(weights()))
    return ask_app(app, hospital, content, MessageType.TRAIN)


def evaluate(app: Any, hospital: Path, *, round: int = 2) -> Message:
    return ask_app(
        app, hospital, encode(evaluate_ask(round=round), arrays=array_record(weights())), MessageType.EVALUATE
    )


def left(hospital: Path) -> list[dict[str, Any]]:
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        ledger.verify()
        return statement.export(ledger)["sent"]


def blocked(reply: Message) -> bool:
    """The coordinator learns that something was held back, and nothing of it."""
    return reply.has_error() and reply.error.code == BLOCKED and not reply.has_content()


@dataclass
class Tampered(Hospital):
    """The honest app with one method replaced."""

    fit_as: Callable[..., Any] | None = None
    evaluate_as: Callable[..., Any] | None = None
    introduce_as: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        Hospital.__init__(self, system_noise)

    def introduce(self, site: Site, ask: PlanAsk) -> Hello:
        return self.introduce_as(super(), site, ask) if self.introduce_as else super().introduce(site, ask)

    def fit(self, site: Site, ask: TrainAsk, message: Message) -> Trained:
        return self.fit_as(super(), site, ask, message) if self.fit_as else super().fit(site, ask, message)

    def evaluate(self, site: Site, ask: EvaluateAsk, message: Message) -> Scored:
        return (
            self.evaluate_as(super(), site, ask, message) if self.evaluate_as else super().evaluate(site, ask, message)
        )


# --- training ---------------------------------------------------------------------------------------------------------


def changed(arrays: ArrayRecord, **new: Any) -> ArrayRecord:
    name = sorted(arrays)[0]
    old = arrays[name]
    fields = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data, **new}
    return ArrayRecord({**{n: arrays[n] for n in sorted(arrays)}, name: Array(**fields)})


def unpaid(_: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
    return Trained(array_record(weights()), 1.0)


def reserved_only(_: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
    site.ledger.reserve(PLAN.round_event(ask.round), run=ask.run, round=ask.round)
    return Trained(array_record(weights()), 1.0)


def voided(_: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
    site.ledger.reserve(PLAN.round_event(ask.round), run=ask.run, round=ask.round).void()
    return Trained(array_record(weights()), 1.0)


def settled_without_digest(_: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
    site.ledger.reserve(PLAN.round_event(ask.round), run=ask.run, round=ask.round).settle()
    return Trained(array_record(weights()), 1.0)


def settled_for_another_round(_: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
    arrays = array_record(weights())
    site.ledger.reserve(PLAN.round_event(ask.round), run=ask.run, round=ask.round + 1).settle(sha256=digest_of(arrays))
    return Trained(arrays, 1.0)


def changed_after_settling(honest: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
    made = honest.fit(site, ask, message)
    other = {name: value + 1e-3 for name, value in weights().items()}
    return replace(made, arrays=array_record(other))


def smuggles_in_the_header(honest: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
    made = honest.fit(site, ask, message)
    name = sorted(made.arrays)[0]
    arrays = changed(made.arrays, data=made.arrays[name].data + b"Anna Example")
    site.ledger.reserve(PLAN.round_event(ask.round), run=ask.run, round=ask.round).settle(sha256=digest_of(arrays))
    return replace(made, arrays=arrays)


def one_tensor_more(_: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
    arrays = array_record({**weights(), "patients": torch.tensor([61.0])})
    site.ledger.reserve(PLAN.round_event(ask.round), run=ask.run, round=ask.round).settle(sha256=digest_of(arrays))
    return Trained(arrays, 1.0)


def not_finite(_: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
    arrays = array_record({name: torch.full_like(value, torch.nan) for name, value in weights().items()})
    site.ledger.reserve(PLAN.round_event(ask.round), run=ask.run, round=ask.round).settle(sha256=digest_of(arrays))
    return Trained(arrays, 1.0)


def paid_as_scores(_: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
    arrays = array_record(weights())
    event = Event("evaluate", 500.0, 1.0, 1)
    site.ledger.reserve(event, run=ask.run, round=ask.round).settle(sha256=digest_of(arrays))
    return Trained(arrays, 1.0)


def too_long(_: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
    arrays = array_record({name: value + 1e4 for name, value in weights().items()})
    site.ledger.reserve(PLAN.round_event(ask.round), run=ask.run, round=ask.round).settle(sha256=digest_of(arrays))
    return Trained(arrays, 1.0)


def weighs_its_patients(honest: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
    return replace(honest.fit(site, ask, message), weight=61.0)


@pytest.mark.parametrize(
    "wrong",
    [
        unpaid, reserved_only, voided, settled_without_digest, settled_for_another_round, changed_after_settling,
        smuggles_in_the_header, one_tensor_more, not_finite, too_long, paid_as_scores, weighs_its_patients,
    ],
)  # fmt: skip
def test_an_app_cannot_send_weights_that_were_not_paid_for_or_are_not_as_declared(hospital: Path, wrong: Any) -> None:
    reply = train(sealed(Tampered(fit_as=wrong)), hospital)
    assert blocked(reply)
    assert [message["what"] for message in left(hospital)] == [f"refusal {BLOCKED}"]


def test_settings_that_leave_the_norm_bound_out_have_its_default(hospital: Path) -> None:
    asked = train_ask()
    settings = {key: value for key, value in asked.settings.items() if key != "training.max_update_norm"}
    content = encode(asked.model_copy(update={"settings": settings}), arrays=array_record(weights()))
    assert ask_app(sealed(Hospital(system_noise)), hospital, content, MessageType.TRAIN).has_content()


def test_one_charge_pays_for_one_release_as_often_as_it_is_asked_for(hospital: Path) -> None:
    kept: list[Trained] = []

    def keep(honest: Any, site: Site, ask: TrainAsk, message: Message) -> Trained:
        if not kept:
            kept.append(honest.fit(site, ask, message))
        return kept[0]

    app = sealed(Tampered(fit_as=keep))
    assert [decode(train(app, hospital).content, FitReply).round for _ in range(2)] == [1, 1]
    one, two = left(hospital)
    assert (one["charge"], one["sha256"]) == (two["charge"], two["sha256"])
    kept[0] = replace(kept[0], arrays=array_record({name: value + 1e-3 for name, value in weights().items()}))
    assert blocked(train(app, hospital))


def test_what_the_app_returns_need_not_even_be_the_right_thing(hospital: Path) -> None:
    for nonsense in (None, "Anna Example", Message(RecordDict(), 1, MessageType.TRAIN)):
        reply = train(sealed(Tampered(fit_as=lambda *_, said=nonsense: said)), hospital)
        assert reply.has_error()
        assert "Anna" not in reply.error.reason


def test_a_long_update_is_shortened_before_the_gate_and_passes(hospital: Path) -> None:
    """Honest: the bound is part of the training, the gate only holds the app to it."""
    reply = train(sealed(Hospital(system_noise)), hospital, training__max_update_norm=0.5)
    after = {name: torch.from_numpy(array.numpy()) for name, array in reply.content.array_records["arrays"].items()}
    assert distance(numbers(after), numbers(weights())) == pytest.approx(0.5, rel=1e-4)


# --- scores and introductions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        Scored(scores={"mean_auroc": 0.9}),
        Scored(histogram=(1.0,) * cells(LABELS), noise_multiplier=3.0),
        Scored(scores={}, histogram=(1.0,)),
        Scored(noise_multiplier=61.0),
    ],
    ids=["unpaid scores", "unpaid histogram", "both", "a number for nothing"],
)
def test_an_app_cannot_send_scores_that_were_not_paid_for(hospital: Path, made: Scored) -> None:
    assert blocked(evaluate(sealed(Tampered(evaluate_as=lambda *_: made)), hospital))


def test_an_empty_histogram_is_neither_bought_nor_sent(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.app.cells", lambda _: 0)  # labels without findings and class
    reply = evaluate(sealed(Hospital(system_noise)), hospital)
    assert decode(reply.content, ScoreReply).histogram is None
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        assert ledger.spent().epsilon == 0


def test_exact_scores_leave_under_a_research_policy_and_are_counted_apart(hospital: Path) -> None:
    (hospital / "site.toml").write_text(policy("north", research=True), encoding="utf-8")
    reply = decode(evaluate(sealed(Hospital(system_noise)), hospital).content, ScoreReply)
    assert reply.scores is not None
    assert (reply.epsilon, reply.unprotected) == (0.0, 1)
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        (kind,) = statement.show(ledger)["sent"]
    assert (kind["what"], kind["covered"]) == ("exact scores", "no")


def test_two_kinds_of_scores_at_once_do_not_leave(hospital: Path) -> None:
    for made in (Scored(scores={}, histogram=(1.0,)), Scored(noise_multiplier=2.0)):
        assert blocked(evaluate(sealed(Tampered(evaluate_as=lambda *_, made=made: made)), hospital))


@pytest.mark.parametrize(
    ("metrics", "made", "event"),
    [
        ("noisy", Scored(scores={"mean_auroc": 0.9}), Event("evaluate", 3.0, 1.0, 1)),
        ("no", Scored(histogram=(1.0,) * cells(LABELS), noise_multiplier=3.0), Event("evaluate", 3.0, 1.0, 1)),
        ("noisy", Scored(histogram=(1.0,) * cells(LABELS), noise_multiplier=3.0), Event("train", 3.0, 1.0, 1)),
        ("noisy", Scored(histogram=(1.0, 2.0), noise_multiplier=3.0), Event("evaluate", 3.0, 1.0, 1)),
        ("noisy", Scored(histogram=(1.0,) * cells(LABELS), noise_multiplier=61.0), Event("evaluate", 3.0, 1.0, 1)),
    ],
    ids=["exact ones as noisy", "against the policy", "paid as training", "another length", "another noise"],
)
def test_scores_of_another_kind_than_were_paid_for_do_not_leave(
    hospital: Path, metrics: str, made: Scored, event: Event
) -> None:
    set_policy(hospital, metrics=metrics)

    def pay(_: Any, site: Site, ask: EvaluateAsk, message: Message) -> Scored:
        digest = digest_of(made.scores if made.scores is not None else made.histogram or ())
        site.ledger.reserve(event, run=ask.run, round=ask.round).settle(sha256=digest)
        return made

    assert blocked(evaluate(sealed(Tampered(evaluate_as=pay)), hospital))


def test_a_histogram_costs_what_the_plan_says_and_leaves_with_its_charge(hospital: Path) -> None:
    reply = decode(evaluate(sealed(Hospital(system_noise)), hospital).content, ScoreReply)
    assert reply.histogram is not None
    assert len(reply.histogram) == cells(LABELS)
    assert reply.noise_multiplier == PLAN.evaluation_noise
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        (event,) = statement.export(ledger)["events"]
        assert (event["kind"], event["noise_multiplier"], event["sampling_rate"]) == ("evaluate", 3.0, 1.0)
        assert reply.epsilon == pytest.approx(ledger.epsilon(), abs=1e-12)
    (sent,) = left(hospital)
    assert (sent["what"], sent["charge"]) == ("score histogram", event["seq"])


def test_histograms_of_two_rounds_have_different_noise_and_cost_twice(hospital: Path) -> None:
    app = sealed(Hospital(system_noise))
    one, two = (decode(evaluate(app, hospital, round=n).content, ScoreReply) for n in (1, 2))
    assert one.histogram is not None
    assert two.histogram is not None
    assert not set(one.histogram) & set(two.histogram)
    assert two.epsilon > one.epsilon


def test_a_failing_prediction_answers_with_the_noise_of_nobody(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from client import app as client_app

    honest = client_app.predict

    def fail(bench: Any, cohort: Any, **more: Any) -> Any:
        if cohort.patients:
            raise MemoryError("Anna Example")
        return honest(bench, cohort, **more)

    monkeypatch.setattr(client_app, "predict", fail)
    reply = decode(evaluate(sealed(Hospital(system_noise)), hospital).content, ScoreReply)
    assert reply.histogram is not None
    assert abs(sum(reply.histogram)) < 8 * 3.0 * 3 * len(reply.histogram) ** 0.5  # false alarm below 1e-12


def test_an_introduction_must_be_one(hospital: Path) -> None:
    content = encode(PlanAsk(plan=PLAN.to_flat(), rounds=2))
    south = {"hospital": "south", "labels": LABELS, "fedmm": "0", "ceiling": 1.0, "delta": 1e-5, "metrics": "no"}
    other = Hello(**south, least_noise=1.0, ledger_key="0" * 64)
    honest = decode(ask_app(sealed(Hospital(system_noise)), hospital, content, MessageType.QUERY).content, Hello)
    smuggled = honest.model_copy(update={"labels": Labels(findings=("Anna Example",))})
    keyed = honest.model_copy(update={"ledger_key": "0" * 64})
    for said in (other, smuggled, keyed, {"hospital": "north"}, None):
        reply = ask_app(sealed(Tampered(introduce_as=lambda *_, said=said: said)), hospital, content, MessageType.QUERY)
        assert blocked(reply)


def test_an_introduction_says_how_much_noise_the_ledger_has_room_for(hospital: Path) -> None:
    app, content = sealed(Hospital(system_noise)), encode(PlanAsk(plan=PLAN.to_flat(), rounds=2))
    assert decode(ask_app(app, hospital, content, MessageType.QUERY).content, Hello).least_noise == 2.0
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        ledger.reserve(Event("train", 0.475, 1.0, 3), run="before", round=1).settle()
    needed = decode(ask_app(app, hospital, content, MessageType.QUERY).content, Hello).least_noise
    assert needed > 2.0
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        for number in range(2):
            ledger.reserve(Event("train", needed, 1.0, 1), run="now", round=number)
        ledger.reserve(Event("evaluate", 3.0, 1.0, 1), run="now", round=3)


def introduced(hospital: Path, ask: PlanAsk) -> Hello:
    reply = ask_app(sealed(Hospital(system_noise)), hospital, encode(ask), MessageType.QUERY)
    return decode(reply.content, Hello)


def test_an_introduction_is_signed_by_the_ledgers_key_for_this_ask_alone(hospital: Path) -> None:
    asks = [PlanAsk(plan=PLAN.to_flat(), rounds=2) for _ in range(2)]
    said = [introduced(hospital, ask) for ask in asks]
    assert [hello.nonce for hello in said] == [ask.nonce for ask in asks]
    assert said[0].nonce != said[1].nonce
    for hello in said:
        assert statement_is_signed(hello.facts(), hello.signature, hello.ledger_key)
        for changes in ({"nonce": "0f" * 16}, {"hospital": "south"}, {"least_noise": 0.0}):
            changed = hello.model_copy(update=changes)
            assert not statement_is_signed(changed.facts(), hello.signature, hello.ledger_key)


def test_a_refused_introduction_has_no_key_and_needs_no_signature(hospital: Path) -> None:
    ask = PlanAsk(plan=replace(PLAN, noise_multiplier=0.1).to_flat(), rounds=2)
    hello = introduced(hospital, ask)
    assert (hello.refusal_code, hello.ledger_key, hello.signature, hello.nonce) == (1002, "", "", ask.nonce)


def test_asking_what_costs_nothing_over_and_over_does_not_fill_the_ledger(hospital: Path) -> None:
    set_policy(hospital, metrics="no")
    app, rows = sealed(Hospital(system_noise)), []
    for number in range(3):
        other = replace(PLAN, noise_multiplier=PLAN.noise_multiplier + number)
        introduced(hospital, PlanAsk(plan=other.to_flat(), rounds=2))
        ask = evaluate_ask(round=2).model_copy(update={"nonce": fresh_nonce()})
        assert ask_app(app, hospital, encode(ask, arrays=array_record(weights())), MessageType.EVALUATE).has_content()
        rows.append([sent["what"] for sent in left(hospital)])
    assert rows == [["hello", "scores withheld"]] * 3
    evaluate(app, hospital, round=3)
    assert [sent["round"] for sent in left(hospital)] == [0, 2, 3], "another round is another answer"


def test_a_hospital_whose_ledger_is_broken_says_so_by_its_name(
    hospital: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app, content = sealed(Hospital(system_noise)), encode(PlanAsk(plan=PLAN.to_flat(), rounds=2))
    train(app, hospital)
    (hospital / "ledger.sqlite").write_bytes(b"not a ledger")
    hello = decode(ask_app(app, hospital, content, MessageType.QUERY).content, Hello)
    assert (hello.hospital, hello.refusal_code) == ("north", 1005)
    assert "is not in the ledger" in caplog.text


def test_without_a_row_of_its_own_an_introduction_does_not_leave(
    hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise LedgerUnusable("the ledger cannot be used (SQLITE_FULL)")

    monkeypatch.setattr(Ledger, "record_sent", full)
    content = encode(PlanAsk(plan=PLAN.to_flat(), rounds=2))
    reply = ask_app(sealed(Hospital(system_noise)), hospital, content, MessageType.QUERY)
    assert (reply.has_content(), reply.error.code) == (False, 1005)


# --- the noisy count --------------------------------------------------------------------------------------------------


def test_a_noisy_count_is_bought_once_and_used_by_every_run(hospital: Path) -> None:
    set_policy(hospital, counts="noisy")
    app = sealed(Hospital(system_noise))
    sent = [train(app, hospital, round=number, federation__weights="noisy") for number in (1, 2)]
    said = [float(reply.content.metric_records["metrics"]["num-examples"]) for reply in sent]  # type: ignore[arg-type]
    assert said[0] == said[1] >= 1.0
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        kinds = [event["kind"] for event in statement.export(ledger)["events"]]
        (bought,) = ledger.made("count")
    assert sorted(kinds) == ["count", "train", "train"]
    assert max(1.0, bought["count"]) == said[0]


def test_another_public_bound_asks_for_another_count(hospital: Path) -> None:
    set_policy(hospital, counts="noisy")
    app = sealed(Hospital(system_noise))
    train(app, hospital, federation__weights="noisy")
    text = (hospital / "site.toml").read_text(encoding="utf-8")
    bound = load_site(hospital).privacy.public_patients
    (hospital / "site.toml").write_text(
        text.replace(f"public_patients = {bound}", f"public_patients = {bound - 1}"), encoding="utf-8"
    )
    train(app, hospital, federation__weights="noisy", round=2)
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        assert len(ledger.made("count")) == 2


@pytest.mark.parametrize(("counts", "wanted"), [("no", "noisy"), ("no", "declared"), ("noisy", "declared")])
def test_a_count_that_policy_does_not_give_is_refused(hospital: Path, counts: str, wanted: str) -> None:
    set_policy(hospital, counts=counts)
    reply = train(sealed(Hospital(system_noise)), hospital, federation__weights=wanted)
    assert reply.error.code == 1002
    assert f"no {wanted} count" in reply.error.reason


def test_too_few_patients_are_told_by_the_noisy_count_alone(hospital: Path) -> None:
    """A plain comparison would tell at the border whether one patient is there."""
    set_policy(hospital, extra="\n[runs]\nmin_patients = 100000\n")
    reply = train(sealed(Hospital(system_noise)), hospital)
    assert reply.error.code == 1002
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        (event,) = statement.export(ledger)["events"]
    assert (event["kind"], event["noise_multiplier"]) == ("count", COUNT_NOISE)


# --- refusals, and what the ledger says left --------------------------------------------------------------------------


def test_too_few_patients_take_no_part_in_scores_either(hospital: Path) -> None:
    set_policy(hospital, extra="\n[runs]\nmin_patients = 100000\n")
    assert evaluate(sealed(Hospital(system_noise)), hospital).error.code == 1002
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        assert [event["kind"] for event in statement.export(ledger)["events"]] == ["count"]


def test_run_kinds_and_models_that_policy_does_not_list_are_refused(hospital: Path) -> None:
    app = sealed(Hospital(system_noise))
    set_policy(hospital, extra='\n[runs]\nkinds = ["train"]\n')
    assert evaluate(app, hospital).error.code == 1002
    set_policy(hospital, extra='\n[runs]\nkinds = ["evaluate"]\n')
    assert train(app, hospital).error.code == 1002
    assert evaluate(app, hospital).has_content()
    set_policy(hospital, extra=f'\n[runs]\nmodels = ["{"0" * 64}"]\n')
    assert train(app, hospital).error.code == 1002
    digest = train_ask().spec.digest()
    set_policy(hospital, extra=f'\n[runs]\nmodels = ["{digest}"]\n')
    assert train(app, hospital).has_content()


@pytest.mark.parametrize("where", ["loss hooks", "loss ghost", "augmentation hooks"])
def test_of_isolated_patients_one_who_breaks_the_step_is_left_out_alone(
    hospital: Path, monkeypatch: pytest.MonkeyPatch, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With all in one batch a failure that hangs on one patient would take everybody's share away: more than C."""
    from fedmm.training import loop

    text = (hospital / "site.toml").read_text(encoding="utf-8")
    (hospital / "site.toml").write_text(
        text.replace("[privacy]", "[privacy]\nisolate_patients = true"), encoding="utf-8"
    )
    app = sealed(Hospital(system_noise))
    settings = {"training__clipping": where.split()[1], "training__sampling_rate": 1.0}
    assert train(app, hospital, **settings).has_content()
    loss, vary, seen = loop.Objective.__call__, loop.vary, []

    def fail_on_the_second(batch: Any) -> None:
        seen.append(batch.patients)
        if len(seen) == 2:
            raise MemoryError("Anna Example")

    def broken_loss(objective: loop.Objective, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        fail_on_the_second(batch)
        return loss(objective, logits, batch)

    def broken_vary(batch: Any, **given: Any) -> Any:
        fail_on_the_second(batch)
        return vary(batch, **given)

    if where.startswith("loss"):
        monkeypatch.setattr(loop.Objective, "__call__", broken_loss)
    else:
        monkeypatch.setattr(loop, "vary", broken_vary)
    assert train(app, hospital, round=2, **settings).has_content()
    assert set(seen) == {1}
    assert len(seen) > 2
    assert "noise alone" not in caplog.text


def test_a_refusal_is_written_down_once_for_each_text(hospital: Path) -> None:
    app = sealed(Hospital(system_noise))
    content = encode(train_ask(replace(PLAN, noise_multiplier=0.1)), arrays=array_record(weights()))
    for _ in range(3):
        assert ask_app(app, hospital, content, MessageType.TRAIN).error.code == 1002
    (sent,) = left(hospital)
    assert (sent["what"], sent["charge"]) == ("refusal 1002", 0)


def test_an_unusable_ledger_is_told_and_nothing_else_leaves(hospital: Path) -> None:
    app = sealed(Hospital(system_noise))
    train(app, hospital)
    (hospital / "ledger.key").unlink()
    reply = train(app, hospital, round=2)
    assert reply.error.code == 1005


def test_a_hospital_without_policy_refuses_without_a_ledger(hospital: Path) -> None:
    (hospital / "site.toml").unlink()
    assert train(sealed(Hospital(system_noise)), hospital).error.code == 1002
    assert not (hospital / "ledger.sqlite").exists()


def test_the_ledger_lists_every_message_with_the_bytes_that_left(hospital: Path) -> None:
    app = sealed(Hospital(system_noise))
    hello = ask_app(app, hospital, encode(PlanAsk(plan=PLAN.to_flat(), rounds=2)), MessageType.QUERY)
    set_policy(hospital, metrics="no")
    replies = [hello, train(app, hospital), evaluate(app, hospital)]
    replies.append(train(app, hospital, federation__weights="declared"))
    crossed = [
        len(recorddict_to_proto(reply.content).SerializeToString()) if reply.has_content() else len(reply.error.reason)
        for reply in replies
    ]
    assert [size_bytes(reply) for reply in replies] == crossed
    listed = left(hospital)
    assert [message["bytes"] for message in listed] == crossed
    assert [message["what"] for message in listed] == ["hello", "weights", "scores withheld", "refusal 1002"]


def test_only_the_gate_makes_messages() -> None:
    """Whoever adds a second way out of the hospital has to change this test."""
    for path in sorted((ROOT / "client").glob("*.py")):
        called = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        made = called & {"Message", "ClientApp", "Error", "RecordDict"}
        if path.name == "refusal.py":
            made -= {"Message"}  # out of an Error alone: a code and a sentence
        if path.name == "executor.py":
            made -= {"Error"}  # out of which refusal.py makes a message
        assert not made or path.name == "gate.py", path
