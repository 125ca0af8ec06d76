"""What a hospital does when it is asked: policy, pay, train, settle. What of it leaves is the gate's to decide."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import Tensor

from client.gate import Scored, Trained, explained, noisy_count, place_of, sealed
from client.outbox import Made, Outbox, Question, Release, closing, question_of
from client.site import Site
from client.traps import check_weights
from client.work import Work, allowed, at_work, buying
from fedmm.config import RunConfig, SiteRelease, installed_version
from fedmm.errors import ConfigError, MessageInvalid, PolicyRefused, Refusal
from fedmm.federation.messages import (
    EvaluateAsk,
    Hello,
    PlanAsk,
    TrainAsk,
    array_record,
    decode_correction,
    decode_weights,
    digest_of,
)
from fedmm.federation.tiles import Values, distance
from fedmm.federation.wire import coded, in_line
from fedmm.models.heads import Objective
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.charge import Charge
from fedmm.privacy.noise import Noise, SystemNoise, with_noise
from fedmm.privacy.plan import Event, PrivacyPlan, Rate
from fedmm.privacy.policy import check_kind, check_model, check_plan, check_settings
from fedmm.privacy.roster import cover
from fedmm.training.augment import check_augment
from fedmm.training.histograms import cells, histogram
from fedmm.training.local import Still, still_parts, unchanged
from fedmm.training.loop import (
    PREDICT_STUDIES,
    Cohort,
    Nobody,
    Workbench,
    all_finite,
    check_unit,
    choose_device,
    forget_workbenches,
    predict,
    train,
    workbench,
)
from fedmm.training.metrics import score
from fedmm.training.watch import ENDED, Check, Watch, nothing

log = logging.getLogger("fedmm.client")
NoiseFor = Callable[[str, int], Noise]  # hospital, round
EXACT_SCORES = Event("exact_scores", 0.0, Rate(1.0), 1)
COUNT_NOISE = 10.0  # of the number of patients, bought once: epsilon 0.28 at delta 1e-4, and 95 % within 20 patients


def system_noise(hospital: str, number: int) -> Noise:
    """Fresh noise from the operating system, whoever asks."""
    return SystemNoise()


class Hospital:
    """What a hospital computes when it is asked. noise_for: where its noise comes from."""

    def __init__(self, noise_for: NoiseFor) -> None:
        self._noise_for = noise_for

    def introduce(self, site: Site, ask: PlanAsk) -> Hello:
        """What a hospital says about itself: nothing that depends on a patient. One that would refuse says so by name."""
        rules = site.config.privacy
        answer: dict[str, Any] = {}
        try:
            answer["least_noise"] = noise_needed(site, PrivacyPlan.from_flat(ask.plan), rounds=ask.rounds, run=ask.run)
            answer["ledger_key"] = site.ledger.public_key()
        except Refusal as refusal:
            answer |= {"refusal_code": refusal.code, "refusal": explained(refusal)}
        return Hello(
            hospital=site.name,
            labels=site.config.labels,
            fedmm=installed_version(),
            ceiling=rules.epsilon,
            delta=rules.delta,
            metrics=site.config.release.metrics,
            modalities=site.config.release.modalities,
            **answer,
        )

    def patients(self, site: Site, bench: Workbench, charge: Charge) -> Cohort:
        """Who is trained on. An audit puts its canaries among them (client/audit.py). Raises: as `patients_of`."""
        return patients_of(site, bench, "train", charge)

    def fit(self, site: Site, ask: TrainAsk, message: Message) -> Trained:
        asked = settings_of(ask)
        config = allowed(asked, site)
        # 1 policy, before data is touched
        check_kind("train", site.config)
        plan = checked_plan(site, ask, config)
        now = plan.of_round(ask.round)  # charged and trained with alike
        still = still_parts(site.config.release.modalities)
        with at_work(site, config, run=ask.run, round=ask.round, timeout=config.federation.round_timeout) as work:
            bench = prepare(site, ask.spec, config, private=plan.private, still=still)
            shapes = {n: tuple(v.shape) for n, v in bench.weights().items()}
            before = decode_weights(message.content, shapes)
            check_weights(before, site.config.runs.max_abs_weight)
            correction = checked_correction(decode_correction(message.content, shapes), config)
            bench.load(before)
            event = now.round_event(ask.round)
            question, outbox = question_of(ask, asked, event, before, correction), Outbox(site)
            release = outbox.answered(question)
            if release is None:
                work.watch()  # before anything is paid
                check_enough(site, ask, bench, self._noise_for(site.name, ask.round), work.watch)
                public_weight(site, config)  # refuses what it would refuse afterwards

                def made(charge: Charge) -> Made:
                    cohort = self.patients(site, bench, charge)
                    # 3 train
                    charge.start()
                    noise, of = self._noise_for(site.name, ask.round), site.config.release
                    with closing(charge, question):
                        trained = train_or_noise(
                            bench, cohort, now, config, noise=noise, correction=correction, release=of, work=work
                        )
                        after = shortened(trained.weights(), before, config.training.max_update_norm)
                        if config.federation.wire != "fp32":
                            change = in_line(numbers(after), numbers(before), still)
                            return made_of(change, config, question, outbox, noise)
                    return Made(array_record(after | {name: before[name] for name in unchanged(before, still)}))

                # 2 pay
                release = paid_once(site, outbox, question, event, plan, made)
        return Trained(cast(ArrayRecord, release), public_weight(site, config))

    def evaluate(self, site: Site, ask: EvaluateAsk, message: Message) -> Scored:
        asked = settings_of(ask)
        config = allowed(asked, site)
        check_kind("evaluate", site.config)
        plan = checked_plan(site, ask, config)
        metrics, declared = site.config.release.metrics, site.config.release.modalities
        event = {"no": None, "exact": EXACT_SCORES, "noisy": plan.evaluation_event()}[metrics]
        if event is None or (event.private and not cells(ask.spec.labels)):
            return Scored()  # policy, or labels of which no histogram is made: nothing would be bought
        with at_work(site, config, run=ask.run, round=ask.round, timeout=config.federation.round_timeout) as work:
            bench = prepare(site, ask.spec, config, private=False)
            weights = decode_weights(message.content, {n: tuple(v.shape) for n, v in bench.weights().items()})
            check_weights(weights, site.config.runs.max_abs_weight)
            bench.load(weights)
            question, outbox = question_of(ask, asked, event, weights), Outbox(site)
            release = outbox.answered(question)
            if release is None:
                work.watch()  # before anything is paid
                check_enough(site, ask, bench, self._noise_for(site.name, ask.round), work.watch)

                def made(charge: Charge) -> Made:
                    cohort = patients_of(site, bench, "test", charge)
                    charge.start()
                    work.status.say("evaluating")
                    with closing(charge, question):
                        if not charge.event.private:
                            limit = min(PREDICT_STUDIES, config.training.physical_studies)
                            found = predict(bench, cohort, modalities=declared, limit=limit, check=work.watch)
                            return Made(score(found, ask.spec.labels))
                        noise = self._noise_for(site.name, ask.round)
                        return Made(
                            histogram_or_noise(bench, cohort, plan, noise=noise, modalities=declared, check=work.watch)
                        )

                release = paid_once(site, outbox, question, event, plan, made)
        if event.private:
            return Scored(histogram=tuple(cast(Sequence[float], release)), noise_multiplier=plan.evaluation_noise)
        return Scored(scores=dict(cast(Mapping[str, Any], release)))


def paid_once(
    site: Site,
    outbox: Outbox,
    question: Question,
    event: Event,
    plan: PrivacyPlan,
    make: Callable[[Charge], Made],
) -> Release:
    """What `make` makes under a charge, on disk before it is settled. Under the charge of an attempt whose process is gone,
    if there is one: then what that one left is settled, or `make` tries again (`Ledger.resume` says why that is sound).

    Raises: BudgetExhausted, PolicyRefused, LedgerUnusable; what `make` raises.
    """
    run, number, digest, ledger = question.run, question.round, plan.digest(), site.ledger
    resumed = ledger.resume(event, run=run, round=number, plan_digest=digest)
    with resumed or ledger.reserve(event, run=run, round=number, plan_digest=digest) as charge:
        release = outbox.left_by(charge, question) if resumed else None
        if release is None:
            made = make(charge)
            outbox.put(charge, question, made)
            release = made.release
        # 4 settle for exactly this: from here on it may leave
        charge.settle(sha256=digest_of(release), question=question.digest)
    return release


def made_of(change: NDArray[np.float32], config: RunConfig, question: Question, outbox: Outbox, noise: Noise) -> Made:
    """The change as it crosses: after the noise, so free. change: (P,), of what is trained.

    What topk leaves out is a part of noisy changes that were paid for, whole; the next round's has it added.
    """
    wire, bound, rng = config.federation.wire, config.training.max_update_norm, noise.generator()
    if wire != "topk":
        return Made(coded(change, wire, bound=bound, rng=rng)[0])
    return Made(*coded(change + outbox.carried(question, change.size), wire, bound=bound, rng=rng))


def numbers(weights: Mapping[str, Tensor]) -> Values:
    return {name: value.numpy() for name, value in weights.items()}


def build(noise_for: NoiseFor = system_noise) -> ClientApp:
    """The ClientApp. noise_for: only tests pass another one; no message, setting or variable reaches it."""
    return sealed(Hospital(noise_for))


def noise_needed(site: Site, plan: PrivacyPlan, *, rounds: int, run: str = "") -> float:
    """With how much noise the rest of the run fits into what the ledger has left.

    run: of one that goes on: what it was charged is not counted twice, since nothing is charged twice.
    Raises: PolicyRefused, PlanInvalid, BudgetExhausted, LedgerUnusable.
    """
    check_plan(plan, site.config)
    scores = plan.evaluation_event() if site.config.release.metrics == "noisy" else None
    charged = [c.row for c in site.ledger.charges_of(run) if c.state != "voided" and c.row.plan == plan.digest()]
    if any(row.kind == "evaluate" for row in charged):
        scores = None
    also = [event for event in (scores, count_event(site)) if event is not None]
    paid = {row.round for row in charged if row.kind == "train"}
    return site.ledger.least_noise(plan, rounds=rounds, also=also, paid=paid)


def checked_plan(site: Site, ask: TrainAsk | EvaluateAsk, config: RunConfig) -> PrivacyPlan:
    """The plan of a message, if policy allows it, it says what the settings say, and the model is an accepted one.

    Raises: PolicyRefused, PlanInvalid.
    """
    plan = PrivacyPlan.from_flat(ask.plan)
    check_plan(plan, site.config)
    check_settings(plan, config)
    check_model(ask.spec.digest(), site.config)
    return plan


def patients_of(site: Site, bench: Workbench, split: str, charge: Charge) -> Cohort:
    """One split's patients; all of the folder's are noted as covered by this ledger. A broken folder gives the charge back.

    If loading fails otherwise, for want of memory say, a private answer is made of nobody: the coordinator chooses how
    large a study is in memory, and an error in place of an answer told how many there are.
    Raises: HospitalInvalid; PolicyRefused if it cannot be known who is under which ledger.
    """
    try:
        data = site.data(bench.model.spec.inputs, bench.fixed_parts())
        first = all(event["state"] != "settled" for event in site.ledger.events())
        ledger = site.folder / site.config.ledger.path
        cover(ledger, data.key_P, first=first, split_before=site.ledger.is_split())
        return data.cohort(split)
    except Refusal:
        charge.void()  # nothing was computed: a broken file must not eat the budget round by round
        raise
    except Exception as error:
        if not charge.event.private:
            raise
        log.error("loading failed (%s at %s): the answer is noise alone", type(error).__name__, place_of(error))
        return Nobody()


def prepare(site: Site, spec: ModelSpec, config: RunConfig, *, private: bool, still: Still = ()) -> Workbench:
    """This process' live model for `spec`.

    Raises: PolicyRefused if it predicts something else than was agreed; PlanInvalid if its studies look at one another.
    """
    check_unit(spec.model, config.privacy.unit)
    if spec.labels != site.config.labels:
        raise PolicyRefused("the model predicts other labels than this hospital's site.toml agrees to")
    try:
        device = choose_device(config.training.device)
    except ConfigError as error:
        raise PolicyRefused(error.what, fix="training.device = auto takes what each hospital has") from None
    objective = Objective.from_config(config.training, spec.labels)
    bench = workbench(spec, device, private, clipping=config.training.clipping, still=still, objective=objective)
    try:
        check_augment(config.training, bench.model.fixed_parts())
    except ConfigError as error:
        raise PolicyRefused(error.what, fix=error.fix) from None
    return bench


def settings_of(ask: TrainAsk | EvaluateAsk) -> RunConfig:
    """Raises: MessageInvalid, without the values."""
    try:
        return RunConfig.from_flat(ask.settings)
    except ConfigError:
        raise MessageInvalid(
            "the run's settings are not valid here", fix="install the same fedmm at both ends"
        ) from None


def checked_correction(correction: dict[str, Tensor] | None, config: RunConfig) -> dict[str, Tensor] | None:
    """Raises: MessageInvalid for one that by itself would be a longer change than a round may make."""
    training = config.training
    if correction is not None:
        steps = training.local_steps * training.learning_rate
        length = distance(numbers(correction), {name: np.zeros(value.shape) for name, value in correction.items()})
        if not length * steps <= training.max_update_norm:
            raise MessageInvalid(
                f"the correction alone would be a longer update than training.max_update_norm = {training.max_update_norm:g}"
            )
    return correction


def train_or_noise(
    bench: Workbench,
    cohort: Cohort,
    plan: PrivacyPlan,
    config: RunConfig,
    *,
    noise: Noise,
    correction: dict[str, Tensor] | None,
    release: SiteRelease,
    work: Work,
) -> Workbench:
    """Train; if that fails under a private plan, answer with the plan's noise alone. Returns the bench that has the result.

    Whether a step fails may depend on the patients (how many were sampled, how much memory they need), and an error in
    place of an answer would be a release without noise: asked often enough it told the number of patients, at epsilon 0.
    Work that was ended from outside, by deadline or stop, is no failure: that is told, and time is not hidden.
    A mitigation, not a proof: a failure that hangs on one patient replaces the whole sum by zero, which is more than C.
    The reason goes to the hospital's own log.
    """
    before, declared = bench.weights(), release.modalities
    learn = partial(train, config=config.training, noise=noise, correction=correction, check=work.watch)
    try:
        learn(bench, cohort, plan, modalities=declared, progress=work.progress("training"))
        return bench
    except Exception as error:
        forget_workbenches()
        if not plan.private or isinstance(error, ENDED):
            raise
        log.error(
            "training failed (%s at %s): this round's answer is noise alone", type(error).__name__, place_of(error)
        )
        clipping, still = config.training.clipping, still_parts(declared)
        fresh = workbench(
            bench.model.spec, str(bench.device), True, clipping=clipping, still=still, objective=bench.objective
        )
        fresh.load(before)
        learn(fresh, Nobody(), plan)
        return fresh


def histogram_or_noise(
    bench: Workbench,
    cohort: Cohort,
    plan: PrivacyPlan,
    *,
    noise: Noise,
    modalities: Sequence[str],
    check: Check = nothing,
) -> tuple[float, ...]:
    """Noisy score histograms of the test patients; of nobody if predicting fails, as in `train_or_noise`."""
    labels = bench.model.spec.labels
    try:
        predictions = predict(bench, cohort, isolate=True, modalities=modalities, check=check)
    except ENDED:
        raise
    except Exception as error:
        log.error("scoring failed (%s at %s): the answer is noise alone", type(error).__name__, place_of(error))
        predictions = predict(bench, Nobody(), isolate=True)
    return tuple(histogram(predictions, labels, noise=noise, noise_multiplier=plan.evaluation_noise))


def shortened(after: dict[str, Tensor], before: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    """`after`, moved towards `before` until the change is at most `bound` long: of what is released already, so free.

    Raises: PolicyRefused if the training diverged.
    """
    if not all_finite(after):
        raise PolicyRefused("the local training diverged", fix="lower training.learning_rate")
    length = distance(numbers(after), numbers(before))
    if length <= bound:
        return after
    return {name: before[name] + (value - before[name]) * (bound / length) for name, value in after.items()}


def count_event(site: Site) -> Event | None:
    """What the noisy number of patients will cost; None if it is not needed or was bought already."""
    needed = site.config.release.counts == "noisy" or site.config.runs.min_patients > 0
    return Event("count", COUNT_NOISE, Rate(1.0), 1) if needed and noisy_count(site) is None else None


def check_enough(site: Site, ask: TrainAsk | EvaluateAsk, bench: Workbench, noise: Noise, watch: Watch) -> None:
    """Raises: PolicyRefused if site.toml wants more patients than the noisy count says, which is bought if need be."""
    if count_event(site) is not None:
        with buying(site, watch):
            buy_count(site, ask, bench, noise)
    known, least = noisy_count(site), site.config.runs.min_patients
    if least and known is not None and known < least:
        raise PolicyRefused(
            "this hospital has fewer patients than its own policy wants",
            why="decided by the noisy count in its ledger, so that the answer tells no more than that",
            fix="runs.min_patients in site.toml",
        )


def buy_count(site: Site, ask: TrainAsk | EvaluateAsk, bench: Workbench, noise: Noise) -> None:
    """Unless another run has bought it while this one waited. Raises: as `paid_once`."""
    if (event := count_event(site)) is None:
        return
    ledger = site.ledger
    with ledger.resume(event, run=ask.run, round=ask.round) or ledger.reserve(
        event, run=ask.run, round=ask.round
    ) as charge:
        patients = patients_of(site, bench, "train", charge).patients
        charge.start()
        value = float(with_noise(torch.tensor(float(patients)), noise, COUNT_NOISE))
        charge.settle(count=value, public_patients=site.config.privacy.public_patients)


def public_weight(site: Site, config: RunConfig) -> float:
    """How much this hospital counts: 1, its public bound of patients, or a noisy count. Never the private number.

    Raises: PolicyRefused if site.toml does not let that leave.
    """
    wanted, allowed, known = config.federation.weights, site.config.release.counts, noisy_count(site)
    if wanted == "uniform":
        return 1.0
    if wanted != allowed or (wanted == "noisy" and known is None):
        raise PolicyRefused(f"this hospital gives no {wanted} count", fix="set federation.weights = uniform")
    return float(site.config.privacy.public_patients) if wanted == "declared" else max(1.0, known or 1.0)


app = build()
