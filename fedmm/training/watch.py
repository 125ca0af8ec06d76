"""When a piece of work must end before it is done: asked between steps, so that nothing is left half written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from fedmm.errors import DeadlinePassed, RunStopped

STOP_VARIABLE = "FEDMM_STOP_FILE"  # names a file; as soon as it is there, work ends at its next step
ENDED = (DeadlinePassed, RunStopped)  # not failures of the work: nothing may be answered in its place

Check = Callable[[], None]


class Watch:
    """Called between steps, it raises once the time is up or the stop file is there. It looks at the clock, never at data.

    seconds: from now; 0: no deadline.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._end = time.monotonic() + seconds if seconds else None
        stop = os.environ.get(STOP_VARIABLE)
        self._stop = Path(stop) if stop else None

    @property
    def late(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

    def stopped(self) -> None:
        """Raises: RunStopped."""
        if self._stop is not None and self._stop.exists():
            raise RunStopped("the run was stopped", fix=f"remove the file that {STOP_VARIABLE} names, then ask again")

    def __call__(self) -> None:
        """Raises: RunStopped, DeadlinePassed."""
        self.stopped()
        if self.late:
            raise DeadlinePassed(
                "the work did not end before its deadline",
                why="limits.seconds of site.toml or federation.round_timeout of the run, whichever is less",
                fix="give it more time, or ask for fewer steps or studies",
            )


def nothing() -> None:
    """A check that never ends the work."""
