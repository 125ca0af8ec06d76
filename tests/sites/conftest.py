"""A federation of two hospitals as `fedmm provision` makes it, and a coordinator's port that answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import pytest

from fedmm.sites import authority
from tests.sites.federation import Listener, provision

Move = Callable[[timedelta], None]


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as listener:
        yield listener


@pytest.fixture
def kits(tmp_path: Path, listener: Listener) -> Path:
    """KITS with coordinator, north and south; its public port is the listener's."""
    provision(tmp_path / "kits", port=listener.port)
    return tmp_path / "kits"


@pytest.fixture
def move_clock(monkeypatch: pytest.MonkeyPatch) -> Move:
    """Certificates are made as if it were later or, with a negative time, earlier."""

    def move(by: timedelta) -> None:
        class Moved(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Moved:
                return super().now(tz) + by

        monkeypatch.setattr(authority, "datetime", Moved)

    return move
