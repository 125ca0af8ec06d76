"""A second opinion on epsilon by Opacus' accountants: the second and last door to opacus, lazy because of torch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedmm.privacy.accounting import History, merge, rdp_of

if TYPE_CHECKING:
    from fedmm.privacy.plan import Event

# PRV's grid grows with epsilon until memory ends or the result is inf (privacy.md); epsilon means nothing there anyway.
PRV_LIMIT = 50.0


def prv_epsilon(events: Sequence[Event], delta: float) -> float | None:
    """Upper bound on epsilon by Opacus' PRV accountant; None when RDP is above 50. 0.0 for no events."""
    return prv_of(merge(events), delta)


def prv_of(history: History, delta: float) -> float | None:
    """`prv_epsilon` of a merged history."""
    if not history:
        return 0.0
    if rdp_of(history, delta) > PRV_LIMIT:
        return None
    from opacus.accountants import PRVAccountant

    return _ask(PRVAccountant(), history, delta)


def rdp_epsilon(events: Sequence[Event], delta: float) -> float:
    """Epsilon by Opacus' RDP accountant. 0.0 for no events."""
    history = merge(events)
    if not history:
        return 0.0
    from opacus.accountants import RDPAccountant

    return _ask(RDPAccountant(), history, delta)


def _ask(accountant: Any, history: History, delta: float) -> float:
    accountant.history = [tuple(term) for term in history]
    with warnings.catch_warnings():
        # "Optimal order is the largest alpha": looser than it could be, still an upper bound.
        warnings.simplefilter("ignore", UserWarning)
        # log(0) in a branch that np.where then drops
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(accountant.get_epsilon(delta))
