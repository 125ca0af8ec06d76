"""Who takes part in a run: introductions, and the plan that all ledgers have room for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedmm.errors import BudgetExhausted, MessageInvalid, RunFailed
from fedmm.federation.checks import Arrival, Failure, collect, declined
from fedmm.federation.messages import HELLO, Hello, PlanAsk, decode, encode
from fedmm.privacy.chain import statement_is_signed
from fedmm.privacy.plan import PrivacyPlan
from fedmm.schema import Labels

MAX_RAISE = 4.0  # guess: a hospital that needs more noise than this many times the plan's is left out
ANSWER_SECONDS = 120.0  # guess: for an introduction, of which the first one imports torch
POLL_SECONDS = 0.2  # guess: how often to ask Flower whether a hospital has connected


@dataclass(frozen=True)
class Members:
    """Hospitals of a run by node id, and those that could not take part from the start."""

    hello: Mapping[int, Hello]
    failures: tuple[Failure, ...]
    arrived: tuple[Arrival, ...] = ()

    @property
    def names(self) -> dict[int, str]:
        return {node: hello.hospital for node, hello in self.hello.items()}

    @property
    def keys(self) -> dict[str, str]:
        """By hospital the public key of its ledger, which signs all that it sends in this run."""
        return {hello.hospital: hello.ledger_key for hello in self.hello.values()}

    @property
    def labels(self) -> Labels:
        """The labels all agree on. Raises: RunFailed that names who differs."""
        hellos = sorted(self.hello.values(), key=lambda h: h.hospital)
        first = hellos[0]
        for other in hellos[1:]:
            if other.labels != first.labels:
                raise RunFailed(
                    f"{first.hospital} and {other.hospital} predict different labels",
                    why="one model is trained for all",
                    fix="make [labels] in every site.toml the same",
                )
        return first.labels

    def who_score(self, plan: PrivacyPlan, *, last: bool) -> dict[int, str]:
        """Nodes that are asked for scores: exact ones whenever the model is evaluated, noisy ones after the last round,
        where they are paid for once."""
        wanted = {"exact", "noisy"} if last and plan.evaluation_noise else {"exact"}
        return {node: hello.hospital for node, hello in self.hello.items() if hello.metrics in wanted}


def introduce(
    grid: Grid,
    ask: PlanAsk,
    *,
    at_least: int,
    wait: float,
    kits: Callable[[], Mapping[int, str]] | None = None,
    labels: Labels | None = None,
) -> Members:
    """Wait until `at_least` nodes are there, ask each one who it is and whether it would take part in this plan.

    kits: gives, by id of a connected node, the name that its kit was made for; None where there are no kits.
    labels: of this run: a hospital with other ones is left out; None where only the hospitals say which they are.
    Raises: RunFailed if too few say so in time.
    """
    nodes = _connected(grid, at_least=at_least, wait=wait)
    questions = [Message(encode(ask), node, MessageType.QUERY) for node in nodes]
    found: dict[int, Hello] = {}
    made_for = kits() if kits is not None else {}

    def use(reply: Message, _: str) -> str:
        hello = decode(reply.content, Hello)
        _check_signed(hello, ask)
        kit = made_for.get(reply.metadata.src_node_id, "")
        if kits is not None and kit != hello.hospital:
            raise MessageInvalid(f"it calls itself {hello.hospital}, and its kit was made for {kit or 'nobody'}")
        _check_no_twin(hello, found.values())
        if labels is not None and not hello.refusal_code and hello.labels != labels:
            raise MessageInvalid("its [labels] are not those of this run: make them as in the kit's federation.json")
        found[reply.metadata.src_node_id] = hello
        return f"refusal {hello.refusal_code}" if hello.refusal_code else HELLO

    # by node id, so that not the order of arrival decides which of two namesakes stays
    timeout = max(wait, ANSWER_SECONDS)
    replies = sorted(grid.send_and_receive(questions, timeout=timeout), key=lambda reply: reply.metadata.src_node_id)
    known = {node: made_for.get(node) or f"node {node}" for node in nodes}
    heard = collect(replies, known, use)
    names = {known[node]: hello.hospital for node, hello in found.items()}
    arrived = [replace(arrival, hospital=names.get(arrival.hospital, arrival.hospital)) for arrival in heard.arrived]
    refused = [declined(h.hospital, h.refusal_code, h.refusal) for h in found.values() if h.refusal_code]
    failures = sorted(heard.failures + refused, key=lambda failure: failure.hospital)
    stay = {node: hello for node, hello in found.items() if not hello.refusal_code}
    if len(stay) < at_least:
        raise RunFailed(f"only {len(stay)} of at least {at_least} hospitals can take part", why=named(failures))
    return Members(stay, tuple(failures), tuple(arrived))


def _connected(grid: Grid, *, at_least: int, wait: float) -> list[int]:
    """Ids of the nodes that are there. Raises: RunFailed if they are too few for too long."""
    end = time.monotonic() + wait
    while len(nodes := sorted(grid.get_node_ids())) < at_least:
        if time.monotonic() > end:
            raise RunFailed(
                f"{len(nodes)} of at least {at_least} hospitals connected within {wait:.0f} s",
                fix="start the missing hospitals, or lower federation.min_hospitals",
            )
        time.sleep(POLL_SECONDS)
    return nodes


def _check_no_twin(hello: Hello, others: Iterable[Hello]) -> None:
    """Raises: MessageInvalid if another one has its name or its key."""
    for other in others:
        if hello.hospital == other.hospital:
            raise MessageInvalid(f"two hospitals call themselves {hello.hospital}")
        if hello.ledger_key and other.ledger_key == hello.ledger_key:
            raise MessageInvalid(
                f"{hello.hospital} introduces itself with the key of {other.hospital}; is its folder a copy? "
                "Then delete ledger and key of the copy, or rotate its key"
            )


def _check_signed(hello: Hello, ask: PlanAsk) -> None:
    """A key is public: only who has the private one may introduce itself with it, or it would throw its owner out.

    Raises: MessageInvalid.
    """
    if hello.refusal_code:
        return
    if hello.nonce != ask.nonce or not statement_is_signed(hello.facts(), hello.signature, hello.ledger_key):
        raise MessageInvalid("its introduction is not signed, for this ask, by the ledger key that it names")


def agree(plan: PrivacyPlan, members: Members, *, at_least: int) -> tuple[PrivacyPlan, Members]:
    """The plan with the noise that all ledgers have room for, and the hospitals that can follow it.

    A hospital that has so little left that it would need more than MAX_RAISE times the plan's noise is left out: it would
    drown what the others have learnt. Raises: RunFailed if too few stay.
    """
    limit = plan.noise_multiplier * MAX_RAISE
    stay = {node: hello for node, hello in members.hello.items() if hello.least_noise <= limit}
    failures = [
        Failure(
            hello.hospital,
            "refused",
            BudgetExhausted.code,
            f"BUDGET_EXHAUSTED: its ledger has room for this run only with noise {hello.least_noise:.3g}; "
            f"the plan has {plan.noise_multiplier:.3g}",
        )
        for node, hello in members.hello.items()
        if node not in stay
    ]
    if len(stay) < at_least:
        raise RunFailed(
            f"only {len(stay)} of at least {at_least} hospitals have budget left for this run",
            why=named(failures),
            fix="ask for fewer rounds or a smaller privacy.epsilon",
        )
    noise = max([plan.noise_multiplier, *(hello.least_noise for hello in stay.values())])
    return replace(plan, noise_multiplier=noise), replace(
        members, hello=stay, failures=(*members.failures, *sorted(failures, key=lambda f: f.hospital))
    )


def named(failures: Sequence[Failure]) -> str:
    """Who did not take part and why, in one line."""
    return "; ".join(f"{f.hospital}: {f.reason}" for f in failures) or "no hospital answered"
