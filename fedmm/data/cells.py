"""One cell of a manifest to a value. An empty cell is a missing value; what is wrong is said in kinds of value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from fedmm.schema import Labels

LARGEST = 1e9  # guess: of a day, a time, a value; far below what float32 cannot hold
NUMBER = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE
)  # no 1_000, no nan, no decimal comma
SEX = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,15}")
BANDS = ((18, "0-17"), (40, "18-39"), (60, "40-59"), (80, "60-79"), (131, "80+"))  # below this many years
UNKNOWN = "write {}, or nothing (unknown)"


class BadCell(Exception):
    """A cell that cannot be used. Holds nothing of what is in it."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(f"{message}; fix: {fix}")
        self.message, self.fix = message, fix


def kind_of(cell: str) -> str:
    """What sort of value a cell holds, in words that do not give it away."""
    if not cell:
        return "an empty cell"
    try:
        number = float(cell)
    except ValueError:
        return "text"
    return "a number" if math.isfinite(number) else "a NaN or infinity"


def flag(cell: str) -> float | None:
    """Raises: BadCell."""
    if not cell:
        return None
    # Spreadsheets and pandas write 0/1 columns with gaps as 0.0 and 1.0.
    known = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}
    if cell not in known:
        raise BadCell(f"{kind_of(cell)} where 0 or 1 belongs", "write 0, 1 or nothing (unknown)")
    return known[cell]


def one_of(cell: str, names: tuple[str, ...], what: str) -> int | None:
    """Its place among the names. what: "class" or "level". Raises: BadCell."""
    if not cell:
        return None
    if cell not in names:
        fix = UNKNOWN.format(f"one of {', '.join(names)}")
        raise BadCell(f"{kind_of(cell)} that is not a known {what}", fix)
    return names.index(cell)


def number(cell: str, *, above: float = -math.inf) -> float | None:
    """A finite number of at most LARGEST in size, above `above`. Raises: BadCell."""
    if not cell:
        return None
    value = float(cell) if NUMBER.fullmatch(cell) else math.nan
    if not (abs(value) <= LARGEST and value > above):
        wanted = "a number" if above == -math.inf else f"a number above {above:g}"
        raise BadCell(f"{kind_of(cell)} where {wanted} of at most {LARGEST:g} belongs", UNKNOWN.format("such a number"))
    return value


def further(name: str, cells: Mapping[str, str], labels: Labels) -> float | None:
    """The value of one column of `Labels.further`: a level's number, a value within its range, a time, an event.

    Raises: BadCell, also for a time without an event and an event without a time.
    """
    cell = cells.get(name, "")
    if name == labels.ordinal_name:
        return one_of(cell, labels.ordinal_levels, "level")
    if name == labels.value_name:
        low, high = labels.value_range
        return None if (value := number(cell)) is None else min(max(value, low), high)
    other = labels.event_name if name == labels.time_name else labels.time_name
    if not cell and cells.get(other, ""):
        raise BadCell(
            f"an empty cell where {other} is given", f"write {labels.time_name} and {labels.event_name}, or neither"
        )
    return number(cell, above=0) if name == labels.time_name else flag(cell)


def sex(cell: str) -> str:
    """F, M or another code of one word in capitals; "" for anything else. For scores by group, never an input."""
    return cell.upper() if SEX.fullmatch(cell) else ""


def age_band(cell: str) -> str:
    """Years as a band; "" for anything but 0 … 130."""
    years = float(cell) if NUMBER.fullmatch(cell) else math.nan
    return next((name for below, name in BANDS if 0 <= years < below), "") if years <= 130 else ""
