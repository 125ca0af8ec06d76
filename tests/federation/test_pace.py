"""How often somebody looks for what is not there yet."""

from __future__ import annotations

import pytest

from fedmm.federation import pace
from fedmm.federation.pace import FIRST_WAIT, PART, Pace


def test_waits_grow_with_the_time_in_which_nothing_happened_and_are_short_again_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, waits = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        waits.append(seconds)

    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    monkeypatch.setattr(pace.time, "sleep", sleep)
    looks = Pace(0.5)
    while now < 130:
        looks.wait()
    assert waits[0] == FIRST_WAIT
    assert waits == sorted(waits)
    assert waits[-1] == 0.5
    assert all(wait <= max(FIRST_WAIT, PART * (sum(waits[:i]))) + 1e-9 for i, wait in enumerate(waits))
    assert len(waits) < 30 / 0.5 + 40, "few more looks than at an even pace"
    looks.happened()
    looks.wait()
    assert waits[-1] == FIRST_WAIT
