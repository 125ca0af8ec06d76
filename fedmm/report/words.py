"""Numbers as people read them: factors, shares, upper bounds, times."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def number(value: float) -> str:
    """2.7, 20, 2,980, 3.3e+21."""
    if value >= 1e9:
        return f"{value:.1e}"
    return f"{value:.1f}" if value < 20 else f"{float(f'{value:.3g}'):,.0f}"


def share(value: float) -> str:
    """A probability as per cent, never rounded to certainty."""
    per_cent = 100 * value
    if per_cent > 99.99:
        return "over 99.99 %" if value < 1 else "100 %"
    if 0 < per_cent < 0.0001:
        return "under 0.0001 %"
    text = f"{per_cent:.2f}" if 1 <= per_cent < 99 else f"{per_cent:.2g}" if per_cent < 1 else f"{per_cent:.2f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def up(value: float, digits: int = 2) -> str:
    """Rounded up: an upper bound stays one."""
    scale = 10**digits
    return f"{math.ceil(value * scale - 1e-6) / scale:.{digits}f}"


def day(at: str) -> str:
    """2026-03-14 09:26 UTC, from ISO 8601. Raises: ValueError for what is no time, or has no zone."""
    time = datetime.fromisoformat(at)
    if time.tzinfo is None:
        raise ValueError("a time without its zone")
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
