"""Orders to a hospital's app that a test gave it (tests/faults/staged.py): hold, die or fail at a named place.

HOSPITAL/stage/<place>.<act>   brought about once, when the place is reached next; renamed to <place>.now at that moment

place: <what>-<step>, what of introduce, train, evaluate; step of STEPS.
act: hold (until <place>.now is gone), die (kill -9 of the process), fail (an error that nobody foresaw).
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

STAGE = "stage"
STEPS = (
    "begin",
    "paid",
    "step",
    "kept",
    "settled",
    "sent",
)  # in the order of a training; begin: nothing is charged yet
ACTS = ("hold", "die", "fail")
LONGEST_HOLD = 240.0  # seconds; a test that forgets to let go ends all the same


def order(hospital: Path, place: str, act: str) -> None:
    """To be brought about once."""
    (hospital / STAGE).mkdir(exist_ok=True)
    (hospital / STAGE / f"{place}.{act}").touch()


def came(hospital: Path, place: str) -> bool:
    """Has the place been reached, and is not let go yet?"""
    return (hospital / STAGE / f"{place}.now").exists()


def release(hospital: Path, place: str) -> None:
    """What is held at this place goes on; other orders stand."""
    (hospital / STAGE / f"{place}.now").unlink(missing_ok=True)


def let_go(hospital: Path) -> None:
    """Whatever is held goes on; whatever was ordered and did not happen is taken back."""
    for file in (hospital / STAGE).glob("*.*"):
        file.unlink(missing_ok=True)


def reach(hospital: Path, place: str) -> None:
    """In the hospital's process. Raises: RuntimeError if that was ordered."""
    now = hospital / STAGE / f"{place}.now"
    for act in ACTS:
        try:
            now.with_suffix(f".{act}").rename(now)
        except FileNotFoundError:
            continue
        if act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "fail":
            raise RuntimeError("as a test ordered")
        end = time.monotonic() + LONGEST_HOLD
        while now.exists() and time.monotonic() < end:
            time.sleep(0.02)
