"""What an epsilon costs: 10,000 steps of 1, 10 and 100 different (sigma, q), ours beside the two public libraries.

cold   nothing is kept            plus   one step more of the last kind, of the first kind
warm   the same question again    calibrate   the noise for 640 steps of one kind
Every library must find the same epsilon, to its own bound's tightness, before its time counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant, RDPAccountant

from fedmm.privacy import accounting, losses
from fedmm.privacy.accounting import History, Term

DELTA, STEPS, NEAR = 1e-5, 10_000, 0.02  # NEAR: PRV's own error; RDP is an upper bound


class Answer(NamedTuple):
    epsilon: float
    seconds: float


def history(kinds: int) -> History:
    return tuple(Term(4.0 + 0.05 * number, 0.01, STEPS // kinds) for number in range(kinds))


def measure(*, quick: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    accounting.pld_of((Term(9.0, 1.0, 1),), DELTA)  # imports
    for kinds in (1, 10) if quick else (1, 10, 100):
        found |= _compare(kinds)
    forget()
    noise = timed(lambda: accounting.calibrate(epsilon=3, delta=1e-4, sampling_rate=1 / 32, steps=640))
    return {**found, "calibrate_s": noise.seconds}


def _compare(kinds: int) -> dict[str, float]:
    asked = history(kinds)
    last, first = _plus(asked, kinds - 1), _plus(asked, 0)
    forget()
    rdp = timed(lambda: accounting.rdp_of(asked, DELTA))
    cold = timed(lambda: accounting.pld_of(asked, DELTA))
    plus_last, plus_first = (timed(lambda more=more: accounting.pld_of(more, DELTA)) for more in (last, first))
    warm = timed(lambda: accounting.pld_of(asked, DELTA))
    others = {
        "pld": timed(lambda: _dp_accounting(PLDAccountant(), asked)),
        "prv": timed(lambda: _opacus(PRVAccountant(), asked)),
        "rdp": timed(lambda: _dp_accounting(RdpAccountant(), asked)),
        "opacus_rdp": timed(lambda: _opacus(RDPAccountant(), asked)),
    }
    agree(cold.epsilon, {name: other.epsilon for name, other in others.items()})
    at = f"kinds_{kinds}"
    return {
        f"{at}_epsilon": cold.epsilon,
        f"{at}_epsilon_from_pld": abs(cold.epsilon - others["pld"].epsilon),
        f"{at}_rdp_cold_ms": 1e3 * rdp.seconds,
        f"{at}_cold_ms": 1e3 * cold.seconds,
        f"{at}_plus_last_ms": 1e3 * plus_last.seconds,
        f"{at}_plus_first_ms": 1e3 * plus_first.seconds,
        f"{at}_warm_ms": 1e3 * warm.seconds,
        **{f"{at}_{name}_ms": 1e3 * other.seconds for name, other in others.items()},
        f"{at}_cold_to_pld": (rdp.seconds + cold.seconds) / others["pld"].seconds,
        f"{at}_plus_last_to_pld": plus_last.seconds / others["pld"].seconds,
        f"{at}_rdp_cold_to_rdp": rdp.seconds / others["rdp"].seconds,
    }


def agree(ours: float, others: dict[str, float]) -> None:
    """Raises: SystemExit when somebody's epsilon is another one: then no time counts."""
    pld, prv = others["pld"], others["prv"]
    if (
        abs(ours - pld) > 1e-6
        or not ours <= prv + 1e-6
        or prv - ours > NEAR
        or min(others["rdp"], others["opacus_rdp"]) < prv - NEAR
    ):
        raise SystemExit(f"the libraries disagree about epsilon: ours {ours}, {others}")


def timed(ask: Callable[[], float]) -> Answer:
    began = time.perf_counter()
    return Answer(ask(), time.perf_counter() - began)


def forget() -> None:
    """As in a fresh process, imports aside."""
    for kept in (
        accounting._pld, accounting._one_step, accounting.rdp_of, accounting._renyi_of_one_step, accounting._calibrate,
        losses._span, losses._product, losses._power,
    ):  # fmt: skip
        kept.cache_clear()


def _plus(asked: History, at: int) -> History:
    return (*asked[:at], asked[at]._replace(steps=asked[at].steps + 1), *asked[at + 1 :])


def _dp_accounting(accountant: PLDAccountant | RdpAccountant, asked: History) -> float:
    for term in asked:
        gaussian = dp_event.GaussianDpEvent(term.noise_multiplier)
        accountant.compose(dp_event.PoissonSampledDpEvent(term.sampling_rate, gaussian), term.steps)
    return float(accountant.get_epsilon(DELTA))


def _opacus(accountant: PRVAccountant | RDPAccountant, asked: Sequence[Term]) -> float:
    accountant.history = [tuple(term) for term in asked]
    return float(accountant.get_epsilon(delta=DELTA))
