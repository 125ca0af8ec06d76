"""One round's updates: ask, collect, check; and once more those who were out of reach, while too few have answered.

A hospital that is asked again answers what it has paid for from its outbox, at no cost, and goes on under the charge of an attempt
that was cut short. So asking again spends nothing twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from fedmm.config import RunConfig
from fedmm.errors import DeadlinePassed, HospitalBusy, RunFailed
from fedmm.federation.aggregation import Aggregator
from fedmm.federation.checks import MAX_WEIGHT, Arrival, Asked, Expected, Failure, Fit, check_fits
from fedmm.federation.members import POLL_SECONDS, Members, named
from fedmm.federation.messages import FitReply, TrainAsk, fresh_nonce, size_bytes
from fedmm.federation.watch import Watch, as_they_come
from fedmm.models.multimodal import ModelSpec
from fedmm.privacy.plan import PrivacyPlan

OUT_OF_REACH = ("silent", "failed")  # kinds of failures that may be over by now
LATER = (DeadlinePassed.code, HospitalBusy.code)  # refusals that may be


@dataclass(frozen=True)
class Course:
    """What stays the same during a run. run: its name.  watch: is told what happens; changes nothing."""

    grid: Grid
    members: Members
    run: str
    config: RunConfig
    spec: ModelSpec
    plan: PrivacyPlan
    watch: Watch


@dataclass
class Gathered:
    """used: statements of those whose updates count, in order of the hospital's name.  failures, arrived: of all attempts.
    bytes_down: of all asks."""

    used: dict[str, FitReply] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    arrived: list[Arrival] = field(default_factory=list)
    bytes_down: int = 0


def gather(course: Course, weights: Aggregator, number: int) -> Gathered:
    """Each usable update is in `weights` when this returns, and nowhere else: it is added as it arrives.

    Raises: RunFailed if fewer than `federation.min_hospitals` are left after `federation.retries` further attempts."""
    rules, got = course.config.federation, Gathered()
    left: Mapping[int, str] = course.members.names
    for _ in range(1 + rules.retries):
        _wait_connected(course, left, number, at_least=rules.min_hospitals - len(got.used))
        again = _attempt(course, weights, number, left, got)
        if len(got.used) >= rules.min_hospitals or not again:
            break
        left = again
    if len(got.used) < rules.min_hospitals:
        raise RunFailed(
            f"round {number}: {len(got.used)} usable replies, federation.min_hospitals is {rules.min_hospitals}",
            why=named(got.failures),
        )
    got.used = dict(sorted(got.used.items()))
    return got


def _attempt(
    course: Course, weights: Aggregator, number: int, left: Mapping[int, str], got: Gathered
) -> dict[int, str]:
    """Ask the hospitals in `left`; adds to `got`. Returns those that can be asked once more."""
    config, watch = course.config, course.watch
    asked = Asked(course.run, number, fresh_nonce(), course.members.keys)
    ask = TrainAsk(
        run=course.run,
        round=number,
        nonce=asked.nonce,
        settings=config.flat(),
        spec=course.spec,
        plan=course.plan.to_flat(),
    )
    questions = weights.questions(number, ask, course.grid, left)
    bytes_down = sum(size_bytes(message) for message in questions)
    watch.asked([left[message.metadata.dst_node_id] for message in questions], bytes=bytes_down)
    watch.phase("collect")
    replies = course.grid.send_and_receive(questions, timeout=config.federation.round_timeout)
    cap = 1.0 if config.federation.weights == "uniform" else MAX_WEIGHT
    bound, wire = config.training.max_update_norm, config.federation.wire
    expected = Expected(asked, weights.arrays, bound, cap, wire, weights.still)

    def take(fit: Fit) -> None:
        weights.add(fit)
        got.used[fit.hospital] = fit.reply

    heard = check_fits(as_they_come(replies, left, watch, then="check"), left, expected, take)
    watch.heard(heard)
    got.failures += heard.failures
    got.arrived += heard.arrived
    got.bytes_down += bytes_down
    again = {f.hospital for f in heard.failures if f.kind in OUT_OF_REACH or f.code in LATER}
    return {node: name for node, name in left.items() if name in again}


def _wait_connected(course: Course, names: Mapping[int, str], number: int, *, at_least: int) -> None:
    """Before anybody is charged for a round that cannot count: until so many of them are connected.

    Flower's strategies would wait for ever for a first one. Raises: RunFailed that names who is gone.
    """
    end = time.monotonic() + course.config.federation.connect_seconds
    while True:
        connected = set(course.grid.get_node_ids())
        gone = sorted(name for node, name in names.items() if node not in connected)
        if len(names) - len(gone) >= at_least or time.monotonic() > end:
            break
        course.watch.gone(gone)
        time.sleep(POLL_SECONDS)
    course.watch.gone(gone)
    if len(names) - len(gone) < at_least:
        raise RunFailed(
            f"round {number}: {len(names) - len(gone)} hospitals are connected, "
            f"federation.min_hospitals is {course.config.federation.min_hospitals}",
            why=f"not connected: {', '.join(gone)}",
        )
