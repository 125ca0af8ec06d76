"""What a history of releases costs: the one door to dp-accounting. PLD is the number of record, RDP a fast bound.

Relation: add or remove one patient. Every event is a Poisson-subsampled Gaussian mechanism run `steps` times.
Events with the same (noise_multiplier, sampling_rate) are merged, steps added, in order of first appearance: the order
does not matter to composition, and a thousand rounds of one run cost one evaluation. Measured: merged and
event-by-event composition differ by less than 1e-8 in epsilon (tests/privacy/test_accounting.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fedmm.privacy.plan import Event

GRID = 1e-4  # dp-accounting's own default discretisation of the privacy loss: the number of record
COARSE_GRID = 1e-3  # ten times faster; a valid upper bound too, used to accept early and never to refuse
# Above this the privacy loss no longer fits a fine grid (600 MB at epsilon 200, measured) and is no protection anyway.
RDP_CEILING_FOR_FINE_GRID = 150.0
RDP_CEILING_FOR_PLD = 5000.0
MIN_NOISE, MAX_NOISE = 0.2, 1e5  # one step at 0.2 costs an epsilon of 30: no run may ask for that much


class Term(NamedTuple):
    """All steps of a history that share noise and rate."""

    noise_multiplier: float
    sampling_rate: float
    steps: int


History = tuple[Term, ...]


def merge(events: Iterable[Event]) -> History:
    """One term for each (noise_multiplier, sampling_rate), in order of first appearance.

    Raises: ValueError for an unprotected event, which no epsilon covers: the caller separates those.
    """
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        if not event.private:
            raise ValueError("an unprotected event has no epsilon; separate it before accounting")
        pair = (event.noise_multiplier, event.sampling_rate)
        steps[pair] = steps.get(pair, 0) + event.steps
    return tuple(Term(*pair, count) for pair, count in steps.items())


def epsilon_pld(events: Sequence[Event], delta: float) -> float:
    """Epsilon of the composition at `delta`, by privacy loss distributions: the number of record. 0.0 for no events.

    Guarantee: the composition is (result, delta)-DP; equals dp_accounting's PLDAccountant within 1e-6 up to an RDP
    epsilon of 150. Above, a coarser grid, and far above, RDP: still upper bounds, less tight.
    Raises: ValueError for an unprotected event or a delta outside (0, 1).
    """
    return pld_of(merge(events), delta)


def epsilon_rdp(events: Sequence[Event], delta: float) -> float:
    """Epsilon of the composition at `delta`, by Renyi DP with dp_accounting's orders: looser than PLD, microseconds.

    Raises: ValueError for an unprotected event or a delta outside (0, 1).
    """
    return rdp_of(merge(events), delta)


def exceeds(history: History, delta: float, *, ceiling: float) -> bool:
    """Does this history cost more than `ceiling`? Accepts by the first sound bound that allows it, refuses by PLD."""
    if rdp_of(history, delta) <= ceiling:
        return False
    return _pld(history, delta, COARSE_GRID) > ceiling and pld_of(history, delta) > ceiling


def room(history: History, event: Event, delta: float, *, ceiling: float, most: int) -> int:
    """How many times a private event fits under `ceiling` after this history: at most `most`, exact by PLD."""
    own = (event.noise_multiplier, event.sampling_rate)
    others = tuple(term for term in history if term[:2] != own)
    spent = sum(term.steps for term in history if term[:2] == own)

    def fits(times: int, *, by: Callable[[History, float], float]) -> bool:
        steps = spent + times * event.steps
        return by((*others, Term(*own, steps)) if steps else others, delta) <= ceiling

    # from cheap and strict to dear and exact: each bound starts where the one before ended
    enough = -1
    for bound in (rdp_of, partial(_pld, grid=COARSE_GRID), pld_of):
        enough = _largest(lambda times, by=bound: fits(times, by=by), enough, most)  # type: ignore[misc]
    return max(0, enough)


def _largest(fits: Callable[[int], bool], low: int, most: int) -> int:
    """The largest number from `low` to `most` that fits, when all smaller ones do; `low` is not asked."""
    stride = 1
    while low + stride <= most and fits(low + stride):
        low, stride = low + stride, stride * 2
    high = min(low + stride, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def pld_of(history: History, delta: float) -> float:
    """`epsilon_pld` of a merged history; remembered for the life of the process.

    RDP where it is smaller (millions of steps of tiny cost, where PLD's grid rounds up) or PLD cannot be computed: both
    are upper bounds, and a ledger that was accepted by one must always be readable by the other.
    """
    bound = rdp_of(history, delta)
    try:
        return min(_pld(history, delta, GRID), bound)
    except (ValueError, ArithmeticError, MemoryError):
        return bound


@lru_cache(maxsize=4096)
def rdp_of(history: History, delta: float) -> float:
    """`epsilon_rdp` of a merged history."""
    _check_delta(delta)
    if not history:
        return 0.0
    from dp_accounting import rdp

    curves = [_renyi_of_one_step(term.noise_multiplier, term.sampling_rate) for term in history]
    orders = curves[0][0]  # the same for every term
    total = [
        sum(term.steps * curve[at] for term, (_, curve) in zip(history, curves, strict=True))
        for at in range(len(orders))
    ]
    with _quiet():
        return float(rdp.compute_epsilon(orders, total, delta)[0])


def calibrate(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int | Mapping[float, int], before: History = ()
) -> float:
    """The least noise multiplier (to 1e-5, rounded up) whose `steps` steps cost at most `epsilon` at `delta` by PLD.

    steps: of this noise; or, by multiples of it, how many steps have which: {1.0: 30, 0.5: 10}.
    before: what was or will be spent besides; the composition of both must keep epsilon.
    Guarantee: `epsilon_pld` of the result is <= epsilon, never a hair above.
    Raises: ValueError if the request is not positive and finite, or no noise multiplier up to 100,000 is enough.
    """
    counts = tuple(steps.items()) if isinstance(steps, Mapping) else ((1.0, steps),)
    asked = [("steps", value) for pair in counts for value in pair] or [("steps", 0)]
    for name, value in (("epsilon", epsilon), ("sampling_rate", sampling_rate), *asked):
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be positive and finite, not {value}")
    if sampling_rate > 1:
        raise ValueError(f"sampling_rate must be at most 1, not {sampling_rate}")
    _check_delta(delta)
    if before and pld_of(before, delta) >= epsilon:
        raise ValueError(f"all of epsilon {epsilon:g} is spent")
    return _calibrate(float(epsilon), float(delta), float(sampling_rate), counts, before)


# --- privacy loss distributions ---------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _pld(history: History, delta: float, grid: float) -> float:
    _check_delta(delta)
    if not history:
        return 0.0
    bound = rdp_of(history, delta)
    if bound > RDP_CEILING_FOR_PLD:
        return bound
    if bound > RDP_CEILING_FOR_FINE_GRID:
        grid = 1e-2
    total = _composed(history[0], grid)
    for term in history[1:]:
        total = total.compose(_composed(term, grid))
    return float(total.get_epsilon_for_delta(delta))


def _composed(term: Term, grid: float) -> Any:
    """Of each noise and rate the last one is remembered: terms of earlier runs do not change any more, that of a run that goes on
    does in each round, and every one has 3 to 10 MB."""
    last = _last_composed(term.noise_multiplier, term.sampling_rate, grid)
    made = last.get(term.steps)
    if made is None:
        made = _one_step(term.noise_multiplier, term.sampling_rate, grid).self_compose(term.steps)
        last.clear()
        last[term.steps] = made
    return made


@lru_cache(maxsize=32)
def _last_composed(noise_multiplier: float, sampling_rate: float, grid: float) -> dict[int, Any]:
    """By steps."""
    return {}


@lru_cache(maxsize=16)
def _one_step(noise_multiplier: float, sampling_rate: float, grid: float) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=grid,
        sampling_prob=sampling_rate,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


# --- Renyi ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _renyi_of_one_step(noise_multiplier: float, sampling_rate: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Orders and Renyi divergence at each. dp_accounting has no public way to read it: a test compares the result."""
    from dp_accounting import dp_event, rdp

    accountant = rdp.RdpAccountant()
    with _quiet():
        accountant.compose(dp_event.PoissonSampledDpEvent(sampling_rate, dp_event.GaussianDpEvent(noise_multiplier)))
    return tuple(float(order) for order in accountant._orders), tuple(float(cost) for cost in accountant._rdp)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """absl warns for each Renyi order that it leaves out; fewer orders only loosen an upper bound."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- calibration ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _calibrate(
    epsilon: float, delta: float, sampling_rate: float, steps: tuple[tuple[float, int], ...], before: History
) -> float:
    def log_excess(noise: float, grid: float | None) -> float:
        history = (*before, *(Term(noise * times, sampling_rate, count) for times, count in steps))
        cost = rdp_of(history, delta) if grid is None else _pld(history, delta, grid)
        return math.log(max(cost, 1e-12) / epsilon)

    # RDP is cheap and close, but where nearly all is spent it may see no room that PLD sees
    search = None
    if rdp_of(before, delta) >= epsilon:
        search = COARSE_GRID if _pld(before, delta, COARSE_GRID) < epsilon else GRID
    low, high = MIN_NOISE, MIN_NOISE
    while log_excess(high, search) > 0:
        low, high = high, high * 2
        if high > MAX_NOISE:
            raise ValueError(f"no noise multiplier up to {MAX_NOISE:g} gives epsilon {epsilon:g} at delta {delta:g}")
    for _ in range(10):  # brings the bracket within 0.1 %
        middle = math.sqrt(low * high)
        low, high = (middle, high) if log_excess(middle, search) > 0 else (low, middle)
    while log_excess(high, GRID) > 0:  # rare: many steps of little cost, where the grid's rounding adds up
        high *= 1.25
        if high > MAX_NOISE:
            raise ValueError(f"no noise multiplier up to {MAX_NOISE:g} gives epsilon {epsilon:g} at delta {delta:g}")
    if log_excess(high, COARSE_GRID) <= 0:  # the coarse grid does most of the search, the fine one decides
        high = _shrink(lambda noise: log_excess(noise, COARSE_GRID), high, step=0.1)
    return _shrink(lambda noise: log_excess(noise, GRID), high, step=5e-4)


def _shrink(log_excess: Callable[[float], float], high: float, *, step: float) -> float:
    """The least noise that is enough, below `high`, which is: false position with the Illinois correction."""
    above = log_excess(high)
    low, below = high, above
    while below <= 0:
        high, above = low, below
        low, step = low * (1 - step), min(0.5, step * 2)
        if low < MIN_NOISE:
            return high
        below = log_excess(low)
    side, enough = 0, high
    while high - low > 1e-5 * high and above != 0:
        guess = low + (high - low) * min(max(below / (below - above), 0.02), 0.98)
        value = log_excess(guess)
        if value > 0:
            low, below = guess, value
            above, side = (above / 2 if side == -1 else above), -1
        else:
            high = enough = guess
            above, below, side = value, (below / 2 if side == 1 else below), 1
    return enough


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, not {delta}")
