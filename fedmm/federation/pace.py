"""How often somebody looks for what is not there yet. Flower's waits are made for hours of training: 3 s between two looks for
a message, and 1, 2, 4, 8, 10 s for a piece of one that is still on its way. A small round is done in less."""

from __future__ import annotations

import time
from typing import Any

from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects

FIRST_WAIT, LONGEST_WAIT = (
    0.05,
    1.0,
)  # seconds; # measured: 15 to 27 s a round of two hospitals and 42,000 weights before


def hurry() -> None:
    """For this process: pieces of a message are asked for again soon, and as often as it takes in Flower's 2 hours."""
    for pull in (pull_objects, pull_and_inflate_object_from_tree):
        defaults: dict[str, Any] = pull.__kwdefaults__ or {}
        defaults |= {"initial_backoff": FIRST_WAIT, "backoff_cap": LONGEST_WAIT, "max_tries_per_object": None}


class Pace:
    """Waits between two looks: short ones just after something happened, longer ones the longer nothing does.

    A wait is PART of the time since then, so it makes an answer at most that much later, and a hospital that is idle for
    minutes asks no more often than `longest` says.  longest: seconds.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self.happened()

    def happened(self) -> None:
        """From now on look often again."""
        self._last = time.monotonic()

    def seconds(self) -> float:
        """The wait that is due now."""
        return min(self._longest, max(FIRST_WAIT, PART * (time.monotonic() - self._last)))

    def wait(self) -> None:
        time.sleep(self.seconds())


PART = 0.125  # guess
