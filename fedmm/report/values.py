"""Any JSON in, plain values out; and shares of real patients rounded so that they do not tell how many there are.

A share k/n in full, or its exact interval, gives n away; two decimals do too where n is below a hundred. So of such a share
nothing finer is kept than half the width of its interval, which many n have in common. That narrows n down and does not give it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedmm.errors import ConfigError

LONGEST = 200  # characters of a text that came from a file
MOST = 200  # lines of a list that came from a file
# Steps in the width of a share's interval. With 4, three shares of the same 35 patients left one n.  # measured
PART = 2
TWO_DIGITS = 0.01
Read = TypeVar("Read")


def load(path: Path) -> dict[str, Any]:
    """Raises: ConfigError if it cannot be read as a JSON object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("no object")
        return raw
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read", why=type(error).__name__, fix="check the path") from None


def reading(path: Path, read: Callable[[], Read]) -> Read:
    """What `read` makes of a loaded file. Raises: ConfigError for whatever goes wrong on the way."""
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        raise ConfigError(
            f"{path} is damaged or of another version of fedmm", why=type(error).__name__, fix="measure it again"
        ) from None


def number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("not a finite number")
    return float(value)


def maybe(value: Any) -> float | None:
    return None if value is None else number(value)


def whole(value: Any, *, most: int = 2**53) -> int:
    if type(value) is not int or not 0 <= value < most:
        raise ValueError("not a count")
    return value


def text(value: Any) -> str:
    return str(value)[:LONGEST]


def shown(value: Any) -> str:
    return f"{value:.4g}" if type(value) is float else text("" if value is None else value)


def listed(value: Any) -> Sequence[Mapping[str, Any]]:
    lines: Iterable[Mapping[str, Any]] = value or []
    return list(lines)[:MOST]


# --- rounded ----------------------------------------------------------------------------------------------------------


def measured(raw: Mapping[str, Any], *, step: float | None = None) -> dict[str, Any]:
    """{"value", "low", "high", "reason"}, rounded by `rounded`.

    reason: why there is no value, "" where there is one; what has a number in it becomes "too few patients".
    Raises: KeyError without a value; ValueError for what is no number, or lies outside of its interval.
    """
    value, low, high = maybe(raw["value"]), maybe(raw.get("low")), maybe(raw.get("high"))
    if value is None:
        why = text(raw.get("reason") or "not known")
        too_few = any(letter.isdigit() for letter in why)
        return {"value": None, "low": None, "high": None, "reason": "too few patients" if too_few else why}
    if low is not None and high is not None and not low - 1e-9 <= value <= high + 1e-9:
        raise ValueError("a value lies outside of its interval")
    return {**rounded(value, low, high, step=step), "reason": ""}


def rounded(
    value: float | None, low: float | None, high: float | None, *, step: float | None = None
) -> dict[str, float | None]:
    """The ends outward (low down, high up) to a multiple of `step`, the value to the nearest one.

    step: None takes it from the width of the interval, the least of 1, 2, 5 times a power of ten that is a `PART`th of it or
    more: for a share k/n, whose exact interval would give n. `TWO_DIGITS` for what is no function of counts alone.
    Guarantee: the rounded interval holds the given one and the rounded value; what lies in 0 to 1 stays there.
    """
    if step is None:
        width = 0.0 if low is None or high is None else high - low
        step = up125(width / PART) if width > 0 else TWO_DIGITS
    return {
        "value": None if value is None else _tidy(round(value / step) * step),
        "low": None if low is None else _tidy(math.floor(low / step) * step),
        "high": None if high is None else _tidy(math.ceil(high / step) * step),
    }


def two_digits(value: float | None) -> float | None:
    """A share that has no interval. 0.67 is 2 of 3 as well as 67 of 100."""
    return None if value is None else round(value, 2)


def down(value: float, *, step: float) -> float:
    """A lower bound stays one."""
    return _tidy(math.floor(value / step + 1e-9) * step)


def up125(value: float) -> float:
    """The least of …, 0.1, 0.2, 0.5, 1, 2, 5, … that is not less. value: > 0."""
    power = 10.0 ** math.floor(math.log10(value))
    return _tidy(next(m * power for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-12)))


def _tidy(value: float) -> float:
    """Without the dust of binary fractions."""
    return float(f"{value:.9g}")
