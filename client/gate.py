"""The one way out of a hospital. Handlers return values; only this file makes messages, after checking and writing down.

    query       Hello       name, labels, ceiling, delta and release policy must be those of site.toml; signed here
    train       Trained     declared tensors, finite, coded as asked, inside the norm bound as the coordinator decodes them, an
                            agreed weight, a settled charge; parts of modalities that site.toml does not declare as they were sent
    evaluate    Scored      of the kind, form and noise that policy and plan allow, a settled charge for exactly these; or nothing
    refusal     Error       a code and one sentence; of an unexpected error a code and a correlation id

What the ledger says about itself is read here and not taken from a handler. Each message is a row of the ledger, with kind,
size and digest, before it leaves; if that row cannot be written, nothing leaves but the refusal that says so. The digest of
an answer that no charge covers is of what stays the same however often and with whatever nonce it is asked for: one row.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from flwr.app import ArrayRecord, Context, Error, Message
from flwr.clientapp import ClientApp

from client.refusal import refused
from client.site import Site, open_site
from fedmm.config import RunConfig
from fedmm.errors import UNEXPECTED_CODE, FedmmError, LedgerUnusable, MessageInvalid, Refusal, ReleaseBlocked
from fedmm.federation.messages import (
    ARRAYS,
    EXACT,
    HELLO,
    HISTOGRAM,
    UPDATE,
    WITHHELD,
    EvaluateAsk,
    FitReply,
    Hello,
    PlanAsk,
    ScoreReply,
    TrainAsk,
    decode,
    digest_of,
    encode,
    records_of,
    size_bytes,
    views,
)
from fedmm.federation.tiles import distance
from fedmm.federation.wire import received
from fedmm.training.histograms import cells
from fedmm.training.local import still_parts, unchanged

log = logging.getLogger("fedmm.client")
FLEETING = {"least_noise", "nonce", "signature"}  # of an introduction: the coordinator's question decides on them
MAX_REASON = 300  # characters of a refusal; the coordinator keeps no more


@dataclass(frozen=True)
class Trained:
    """What training hands to the gate. arrays: settled with their `digest_of`.  weight: in the average."""

    arrays: ArrayRecord
    weight: float


@dataclass(frozen=True)
class Scored:
    """What evaluation hands to the gate: one of the two, settled with its `digest_of`, or neither."""

    scores: dict[str, Any] | None = None
    histogram: tuple[float, ...] | None = None
    noise_multiplier: float = 0.0


class Handlers(Protocol):
    """What the hospital computes; `message` gives access to the weights that came."""

    def introduce(self, site: Site, ask: PlanAsk) -> Hello: ...

    def fit(self, site: Site, ask: TrainAsk, message: Message) -> Trained: ...

    def evaluate(self, site: Site, ask: EvaluateAsk, message: Message) -> Scored: ...


def sealed(handlers: Handlers) -> ClientApp:
    """A ClientApp whose every answer passes the gate."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        def answer(site: Site) -> Message:
            ask = decode(message.content, PlanAsk)
            return _greeting(message, site, ask, handlers.introduce(site, ask))

        return _guarded(message, context, answer)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def answer(site: Site) -> Message:
            ask = decode(message.content, TrainAsk)
            return _update(message, site, ask, handlers.fit(site, ask, message))

        return _guarded(message, context, answer)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        def answer(site: Site) -> Message:
            ask = decode(message.content, EvaluateAsk)
            return _scores(message, site, ask, handlers.evaluate(site, ask, message))

        return _guarded(message, context, answer)

    return app


# --- what may leave ---------------------------------------------------------------------------------------------------


def _greeting(message: Message, site: Site, ask: PlanAsk, hello: Hello) -> Message:
    rules = site.config.privacy
    release = site.config.release
    public = (site.name, site.config.labels, rules.epsilon, rules.delta, release.metrics, release.modalities)
    if not isinstance(hello, Hello) or public != (
        hello.hospital,
        hello.labels,
        hello.ceiling,
        hello.delta,
        hello.metrics,
        hello.modalities,
    ):
        raise ReleaseBlocked("the introduction says something else than this hospital's site.toml")
    if hello.refusal_code == 0 and hello.ledger_key != site.ledger.public_key():
        raise ReleaseBlocked("the introduction names another key than that of this hospital's ledger")
    hello = hello.model_copy(update={"nonce": ask.nonce, "signature": ""})
    if hello.refusal_code == 0:
        hello = hello.model_copy(update={"signature": site.ledger.sign(hello.facts())})
    reply = Message(encode(hello), reply_to=message)
    what = f"refusal {hello.refusal_code}" if hello.refusal_code else HELLO
    lasting = hello.model_dump_json(exclude=FLEETING)
    try:
        _write_down(site, reply, what, sha256=_sha256(lasting))
    except LedgerUnusable as unwritten:
        if hello.refusal_code == 0:
            raise
        log.error("the refusal that leaves is not in the ledger: %s", unwritten)
    return reply


def _update(message: Message, site: Site, ask: TrainAsk, made: Trained) -> Message:
    if made.weight not in agreed_weights(site):
        raise ReleaseBlocked("the weight in the average is not one that was agreed")
    sha256 = digest_of(made.arrays)
    body = FitReply(private=bool(ask.plan["private"]), **_statement(site, ask, release=sha256))
    reply = Message(encode(body, arrays=made.arrays, weight=made.weight), reply_to=message)
    asked, still = RunConfig.from_flat(ask.settings), still_parts(site.config.release.modalities)
    sent = records_of(message.content, ArrayRecord)[ARRAYS]
    before = views(sent)
    try:
        after = views(received(reply.content, sent, before, still, asked.federation.wire))
    except MessageInvalid as error:
        raise ReleaseBlocked(error.what) from None
    for name in unchanged(before, still):
        if after[name].tobytes() != before[name].tobytes():  # -0 and 0 are two messages
            raise ReleaseBlocked(f"{name} belongs to a modality that site.toml does not declare, and was changed")
    bound = asked.training.max_update_norm
    if not distance(after, before) <= bound * (1 + 1e-4):
        raise ReleaseBlocked(f"the update is longer than training.max_update_norm = {bound:g}")
    _pay(site, reply, UPDATE, ask, kinds=("train", "not_private"), sha256=sha256)
    return reply


def _scores(message: Message, site: Site, ask: EvaluateAsk, made: Scored) -> Message:
    if made.scores is not None and made.histogram is not None:
        raise ReleaseBlocked("exact scores and a noisy histogram in one answer")
    release = made.scores if made.scores is not None else made.histogram
    sha256 = "" if release is None else digest_of(release)
    body = ScoreReply(**vars(made), **_statement(site, ask, release=sha256))
    reply = Message(encode(body), reply_to=message)
    allowed = site.config.release.metrics
    if made.scores is not None and allowed == "exact":
        _pay(site, reply, EXACT, ask, kinds=("exact_scores",), sha256=sha256)
    elif made.histogram is not None and allowed == "noisy":
        if len(made.histogram) != cells(ask.spec.labels) or made.noise_multiplier != ask.plan["evaluation_noise"]:
            raise ReleaseBlocked("the score histogram has another form or noise than was asked for")
        _pay(site, reply, HISTOGRAM, ask, kinds=("evaluate",), sha256=sha256)
    elif made.scores is not None or made.histogram is not None:
        raise ReleaseBlocked("scores that release.metrics in site.toml does not let out")
    elif made.noise_multiplier:
        raise ReleaseBlocked("a noise multiplier without a histogram")
    else:
        _write_down(site, reply, WITHHELD, ask=ask, sha256=_sha256(f"{WITHHELD} {ask.round} {ask.run}"))
    return reply


def _statement(site: Site, ask: TrainAsk | EvaluateAsk, *, release: str) -> dict[str, Any]:
    """What the coordinator learns about the ledger: depends on plans and policy, never on a patient.

    release: digest of what goes with it, so that nobody can put something else under this hospital's signature.
    """
    spent, head = site.ledger.spent(), site.ledger.head()
    facts = {
        "hospital": site.name,
        "run": ask.run,
        "round": ask.round,
        "nonce": ask.nonce,
        "release": release,
        "epsilon": spent.epsilon,
        "ceiling": spent.ceiling,
        "delta": spent.delta,
        "unprotected": spent.not_private,
        "ledger_sequence": head.seq,
        "ledger_hash": head.hash,
        "ledger_signature": head.signature,
        "ledger_key": site.ledger.public_key(),
    }
    return {**facts, "statement_signature": site.ledger.sign(facts)}


def agreed_weights(site: Site) -> set[float]:
    """1, and what policy lets leave beside it: the declared bound, or the noisy count that was paid for."""
    counts, bound = site.config.release.counts, site.config.privacy.public_patients
    if counts == "declared":
        return {1.0, float(bound)}
    known = noisy_count(site) if counts == "noisy" else None
    return {1.0} if known is None else {1.0, max(1.0, known)}


def noisy_count(site: Site) -> float | None:
    """The noisy number of training patients that was bought under the present public bound; None before that.

    Bought once and used by every run: what was released costs nothing more. A new `public_patients` asks for a new one.
    """
    bound = site.config.privacy.public_patients
    bought = [float(m["count"]) for m in site.ledger.made("count") if m.get("public_patients") == bound]
    return bought[-1] if bought else None


def _pay(
    site: Site, reply: Message, what: str, ask: TrainAsk | EvaluateAsk, *, kinds: Sequence[str], sha256: str
) -> None:
    charge = site.ledger.payable(ask.run, ask.round, sha256, kinds=kinds)
    if charge is None:
        raise ReleaseBlocked(
            f"no settled charge covers these {what}",
            why="what leaves must be what was paid for, in this round",
        )
    _write_down(site, reply, what, ask=ask, sha256=sha256, charge=charge)


def _write_down(
    site: Site,
    reply: Message,
    what: str,
    *,
    sha256: str,
    ask: TrainAsk | EvaluateAsk | None = None,
    charge: int = 0,
) -> None:
    run, number = (ask.run, ask.round) if ask else ("", 0)
    site.ledger.record_sent(what, run=run, round=number, size=size_bytes(reply), sha256=sha256, charge=charge)


# --- refusals ---------------------------------------------------------------------------------------------------------


def _guarded(message: Message, context: Context, answer: Callable[[Site], Message]) -> Message:
    """A refusal becomes its code and safe text. Anything unforeseen becomes a code and a correlation id: the exception's
    text may hold a patient's value and stays in the hospital's own log (only its type and place are written there)."""
    site: Site | None = None
    try:
        site = open_site(context)
        try:
            return answer(site)
        finally:
            site.close()
    except Refusal as refusal:
        text = explained(refusal)
        return _no(message, site, Error(refusal.code, text), said=text)
    except Exception as error:  # the boundary: nothing may escape to the coordinator
        ticket = secrets.token_hex(4)
        log.error("unexpected %s, correlation id %s, at %s", type(error).__name__, ticket, place_of(error))
        if isinstance(error, FedmmError):
            log.error("%s", error.what)
        text = f"UNEXPECTED: see the hospital's log, correlation id {ticket}"
        return _no(message, site, Error(UNEXPECTED_CODE, text), said="UNEXPECTED")


def _no(message: Message, site: Site | None, error: Error, *, said: str) -> Message:
    """With a ledger opened anew, whatever happened to the one that was open."""
    if site is None:
        return refused(message, error, folder=None, said=said)
    return refused(message, error, folder=site.folder, site=site.config, said=said)


def explained(refusal: Refusal) -> str:
    """What may be said of a refusal outside; the rest is written to the hospital's own log."""
    log.warning("refused: %s", refusal.public_text)
    _explain_once(str(refusal))
    return refusal.public_text[:MAX_REASON]


@lru_cache(maxsize=64)
def _explain_once(text: str) -> None:
    """Why, fix and the list of problems, for the hospital's own log: once, not in each round."""
    log.warning("%s", text)


def place_of(error: Exception) -> str:
    """Files, lines and functions of the traceback, without values."""
    steps, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        steps.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return " < ".join(reversed(steps))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
