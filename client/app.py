"""The hospital's app: policy, reserve, train, settle. Nothing leaves without a charge; no exception's text leaves at all."""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from client.site import Site, open_site
from fedmm.config import RunConfig
from fedmm.errors import UNEXPECTED_CODE, ConfigError, FedmmError, MessageInvalid, PolicyRefused, Refusal
from fedmm.federation.messages import EvaluateAsk, FitReply, Hello, ScoreReply, TrainAsk, decode, decode_weights, encode
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.noise import Noise, SystemNoise
from fedmm.privacy.plan import Event, PrivacyPlan
from fedmm.privacy.policy import check_plan, check_settings
from fedmm.training.loop import (
    Cohort,
    Nobody,
    Workbench,
    all_finite,
    choose_device,
    forget_workbenches,
    predict,
    train,
    workbench,
)
from fedmm.training.metrics import score

log = logging.getLogger("fedmm.client")
Handler = Callable[[Message, Context], Message]
NoiseFor = Callable[[str, int], Noise]  # hospital, round


def system_noise(hospital: str, number: int) -> Noise:
    """Fresh noise from the operating system, whoever asks."""
    return SystemNoise()


def guarded(handler: Handler) -> Handler:
    """A refusal becomes its code and safe text. Anything unforeseen becomes a code and a correlation id: the exception's
    text may hold a patient's value and stays in the hospital's own log (only its type and place are written there)."""

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Refusal as refusal:
            log.warning("refused: %s", refusal.public_text)
            _explain_once(str(refusal))
            return Message(Error(refusal.code, refusal.public_text), reply_to=message)
        except Exception as error:  # the boundary: nothing may escape to the coordinator
            ticket = secrets.token_hex(4)
            log.error("unexpected %s, correlation id %s, at %s", type(error).__name__, ticket, _place(error))
            if isinstance(error, FedmmError):
                log.error("%s", error.what)
            text = f"UNEXPECTED: see the hospital's log, correlation id {ticket}"
            return Message(Error(UNEXPECTED_CODE, text), reply_to=message)

    return answer


@functools.lru_cache(maxsize=64)
def _explain_once(text: str) -> None:
    """Why, fix and the list of problems, for the hospital's own log: once, not in each round."""
    log.warning("%s", text)


def _place(error: Exception) -> str:
    """Files, lines and functions of the traceback, without values."""
    steps, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        steps.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return " < ".join(reversed(steps))


def build(noise_for: NoiseFor = system_noise) -> ClientApp:
    """The ClientApp. noise_for: only tests pass another one; no message, setting or variable reaches it."""
    app = ClientApp()

    @app.query()
    @guarded
    def query(message: Message, context: Context) -> Message:
        return Message(encode(introduce(open_site(context))), reply_to=message)

    @app.train()
    @guarded
    def fit(message: Message, context: Context) -> Message:
        ask = decode(message.content, TrainAsk)
        site, config = open_site(context), settings_of(ask)
        # 1 policy, before data is touched
        plan = PrivacyPlan.from_flat(ask.plan)
        check_plan(plan, site.config)
        check_settings(plan, config)
        weight = public_weight(site, config)
        bench = prepare(site, ask.spec, config, private=plan.private)
        bench.load(decode_weights(message.content, {n: tuple(v.shape) for n, v in bench.weights().items()}))
        with site.ledger() as ledger:
            # 2 pay
            with ledger.reserve(plan.round_event(), run=ask.run, round=ask.round, plan_digest=plan.digest()) as charge:
                try:
                    cohort = site.data(ask.spec.inputs).cohort("train")
                except Refusal:
                    charge.void()  # nothing was computed: a broken file must not eat the budget round by round
                    raise
                # 3 train
                charge.start()
                bench = train_or_noise(bench, cohort, plan, config, noise=noise_for(site.name, ask.round))
                # 4 settle: from here on it may leave
                charge.settle()
            reply = fit_reply(site, ask, plan, ledger=ledger)
        weights = bench.weights()
        if not all_finite(weights):
            raise PolicyRefused("the local training diverged", fix="lower training.learning_rate")
        return Message(encode(reply, weights=weights, weight=weight), reply_to=message)

    @app.evaluate()
    @guarded
    def evaluate(message: Message, context: Context) -> Message:
        ask = decode(message.content, EvaluateAsk)
        site, config = open_site(context), settings_of(ask)
        scores = None
        if site.config.release.metrics == "exact":
            bench = prepare(site, ask.spec, config, private=False)
            bench.load(decode_weights(message.content, {n: tuple(v.shape) for n, v in bench.weights().items()}))
            cohort = site.data(ask.spec.inputs).cohort("test")
            with site.ledger() as ledger, ledger.reserve(EXACT_SCORES, run=ask.run, round=ask.round) as charge:
                charge.start()
                scores = score(predict(bench, cohort), ask.spec.labels)
                charge.settle()
        reply = ScoreReply(hospital=site.name, run=ask.run, round=ask.round, scores=scores)
        return Message(encode(reply), reply_to=message)

    return app


EXACT_SCORES = Event("exact_scores", 0.0, 1.0, 1)


def introduce(site: Site) -> Hello:
    """What a hospital says about itself: nothing that depends on a patient."""
    rules = site.config.privacy
    return Hello(
        hospital=site.name,
        labels=site.config.labels,
        fedmm=installed_version(),
        ceiling=rules.epsilon,
        delta=rules.delta,
    )


def prepare(site: Site, spec: ModelSpec, config: RunConfig, *, private: bool) -> Workbench:
    """This process' live model for `spec`. Raises: PolicyRefused if it predicts something else than was agreed."""
    if spec.labels != site.config.labels:
        raise PolicyRefused("the model predicts other labels than this hospital's site.toml agrees to")
    try:
        device = choose_device(config.training.device)
    except ConfigError as error:
        raise PolicyRefused(error.what, fix="training.device = auto takes what each hospital has") from None
    return workbench(spec, device, private)


def fit_reply(site: Site, ask: TrainAsk, plan: PrivacyPlan, *, ledger: Ledger) -> FitReply:
    """What the coordinator learns about the ledger: depends on plans and policy, never on a patient."""
    spent, head = ledger.spent(), ledger.head()
    return FitReply(
        hospital=site.name,
        run=ask.run,
        round=ask.round,
        private=plan.private,
        epsilon=spent.epsilon,
        ceiling=site.config.privacy.epsilon,
        delta=site.config.privacy.delta,
        unprotected=spent.not_private,
        ledger_sequence=head[0],
        ledger_hash=head[1],
        ledger_signature=head[2],
    )


def settings_of(ask: TrainAsk | EvaluateAsk) -> RunConfig:
    """Raises: MessageInvalid, without the values."""
    try:
        return RunConfig.from_flat(ask.settings)
    except ConfigError:
        raise MessageInvalid(
            "the run's settings are not valid here", fix="install the same fedmm at both ends"
        ) from None


def train_or_noise(
    bench: Workbench, cohort: Cohort, plan: PrivacyPlan, config: RunConfig, *, noise: Noise
) -> Workbench:
    """Train; if that fails under a private plan, answer with the plan's noise alone. Returns the bench that has the result.

    Whether a step fails may depend on the patients (how many were sampled, how much memory they need), and an error in
    place of an answer would be a release without noise: asked often enough it told the number of patients, at epsilon 0.
    A mitigation, not a proof: a failure that hangs on one patient replaces the whole sum by zero, which is more than C.
    The reason goes to the hospital's own log.
    """
    before = bench.weights()
    try:
        train(bench, cohort, plan, config=config.training, noise=noise)
        return bench
    except Exception as error:
        forget_workbenches()
        if not plan.private:
            raise
        log.error("training failed (%s at %s): this round's answer is noise alone", type(error).__name__, _place(error))
        fresh = workbench(bench.model.spec, str(bench.device), True)
        fresh.load(before)
        train(fresh, Nobody(), plan, config=config.training, noise=noise)
        return fresh


def public_weight(site: Site, config: RunConfig) -> float:
    """How much this hospital counts: 1, or its public bound of patients. Never the private number of patients."""
    if config.federation.weights == "uniform":
        return 1.0
    if site.config.release.counts != "declared":
        raise PolicyRefused("this hospital declares no count", fix="set federation.weights = uniform")
    return float(site.config.privacy.public_patients)


def installed_version() -> str:
    try:
        return version("fedmm")
    except PackageNotFoundError:  # run from a checkout or a Flower bundle
        return "0+unknown"


app = build()
