"""What an epsilon costs: 10,000 steps of 1, 10 and 100 different (sigma, q), ours beside the two public libraries.

cold   nothing is kept            plus   a step more of the last kind, of the first kind
warm   the same question again    calibrate   the noise for 640 steps of one kind
Every library must find the same epsilon, to its own bound's tightness, before its time counts.
"""

from __future__ import annotations

import statistics
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
    for kinds, repeats in ((1, 9), (10, 5)) if quick else ((1, 9), (10, 5), (100, 3)):
        found |= _compare(kinds, repeats)
    forget()
    noise = timed(lambda: accounting.calibrate(epsilon=3, delta=1e-4, sampling_rate=1 / 32, steps=640))
    return {**found, "calibrate_s": noise.seconds}


def _compare(kinds: int, repeats: int) -> dict[str, float]:
    """Medians, and ratios to the same turn's answer of a public library with their least and largest."""
    asked = history(kinds)
    turns = [_turn(asked) for _ in range(repeats)]
    prv, opacus = timed(lambda: _opacus(PRVAccountant(), asked)), timed(lambda: _opacus(RDPAccountant(), asked))
    last = turns[-1]
    agree(last["cold"].epsilon, pld=last["pld"].epsilon, prv=prv.epsilon, rdp=(last["rdp"].epsilon, opacus.epsilon))
    at = f"kinds_{kinds}"
    found = {
        f"{at}_epsilon": last["cold"].epsilon,
        f"{at}_epsilon_from_pld": abs(last["cold"].epsilon - last["pld"].epsilon),
        **{f"{at}_{what}_ms": 1e3 * statistics.median(turn[what].seconds for turn in turns) for what in last},
        f"{at}_prv_ms": 1e3 * prv.seconds,
        f"{at}_opacus_rdp_ms": 1e3 * opacus.seconds,
    }
    for ours in ("cold", "plus_last", "plus_first"):
        ratios = [turn[ours].seconds / turn["pld"].seconds for turn in turns]
        found |= {
            f"{at}_{ours}_to_pld": statistics.median(ratios),
            f"{at}_{ours}_to_pld_spread": max(ratios) - min(ratios),
        }
    return found


def _turn(asked: History) -> dict[str, Answer]:
    """cold: RDP's curves included, which come first."""
    last, first = _plus(asked, len(asked) - 1, 1), _plus(asked, 0, 2)
    forget()
    return {
        "cold": timed(lambda: accounting.pld_of(asked, DELTA)),
        "plus_last": timed(lambda: accounting.pld_of(last, DELTA)),
        "plus_first": timed(lambda: accounting.pld_of(first, DELTA)),
        "warm": timed(lambda: accounting.pld_of(asked, DELTA)),
        "pld": timed(lambda: _dp_accounting(PLDAccountant(), asked)),
        "rdp": timed(lambda: _dp_accounting(RdpAccountant(), asked)),
    }


def agree(ours: float, *, pld: float, prv: float, rdp: tuple[float, float]) -> None:
    """Raises: SystemExit when somebody's epsilon is another one: then no time counts."""
    if abs(ours - pld) > 1e-6 or not ours <= prv + 1e-6 or prv - ours > NEAR or min(rdp) < prv - NEAR:
        raise SystemExit(f"the libraries disagree about epsilon: ours {ours}, PLD {pld}, PRV {prv}, RDP {rdp}")


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


def _plus(asked: History, at: int, more: int) -> History:
    return (*asked[:at], asked[at]._replace(steps=asked[at].steps + more), *asked[at + 1 :])


def _dp_accounting(accountant: PLDAccountant | RdpAccountant, asked: History) -> float:
    for term in asked:
        gaussian = dp_event.GaussianDpEvent(term.noise_multiplier)
        accountant.compose(dp_event.PoissonSampledDpEvent(term.sampling_rate, gaussian), term.steps)
    return float(accountant.get_epsilon(DELTA))


def _opacus(accountant: PRVAccountant | RDPAccountant, asked: Sequence[Term]) -> float:
    accountant.history = [tuple(term) for term in asked]
    return float(accountant.get_epsilon(delta=DELTA))
