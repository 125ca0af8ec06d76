"""One finished run and its page, drawn once; and a page without figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmm.report import plots
from tests.report.run_folder import (
    Page,
    drawn,
    make_run,
)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    """The page without the seconds that figures take: each is an empty one."""
    for name in ("lines", "rows", "intervals", "calibration"):
        monkeypatch.setattr(plots, name, lambda *_, **__: "<svg></svg>")
    return drawn


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="package")
def content(finished: Path) -> str:
    """The page of the finished run, drawn once."""
    return drawn(finished)
