"""A hospital's app with noise that repeats, which obeys the orders of tests/faults/stage.py. Only workers import it: it puts
places where orders are looked for into the classes that a training passes through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import client.app
from client.outbox import Outbox
from client.site import Site
from fedmm.privacy.charge import Charge
from fedmm.privacy.engine import PrivateEngine
from fedmm.privacy.ledger import Ledger
from tests.faults.stage import reach
from tests.fixed_noise import fixed_noise


class Scene:
    """What this process answers; one message at a time."""

    folder = Path()
    what = ""

    @classmethod
    def enter(cls, site: Site, what: str) -> None:
        cls.folder, cls.what = site.folder, what
        reach(cls.folder, f"{what}-begin")


class StagedHospital(client.app.Hospital):
    def introduce(self, site: Site, ask: Any) -> Any:
        Scene.enter(site, "introduce")
        return super().introduce(site, ask)

    def fit(self, site: Site, ask: Any, message: Any) -> Any:
        Scene.enter(site, "train")
        return super().fit(site, ask, message)

    def evaluate(self, site: Site, ask: Any, message: Any) -> Any:
        Scene.enter(site, "evaluate")
        return super().evaluate(site, ask, message)


def put_place(owner: Any, name: str, step: str) -> None:
    """After each call of `owner.name`."""
    honest: Callable[..., Any] = getattr(owner, name)

    def then(*given: Any, **more: Any) -> Any:
        made = honest(*given, **more)
        reach(Scene.folder, f"{Scene.what}-{step}")
        return made

    setattr(owner, name, then)


put_place(Ledger, "reserve", "paid")
put_place(PrivateEngine, "step", "step")
put_place(Outbox, "put", "kept")
put_place(Charge, "settle", "settled")
put_place(Ledger, "record_sent", "sent")
app = client.app.sealed(StagedHospital(fixed_noise))
