"""Pretrained folders with tiny models, made once, for the tests that ask for them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pretrained_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import pretrained_folders  # here: transformers takes seconds to import

    root = tmp_path_factory.mktemp("pretrained")
    pretrained_folders.write_all(root)
    return root


@pytest.fixture
def pretrained(pretrained_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of tests/pretrained_folders.py, where this process looks for them."""
    monkeypatch.setenv("FEDMM_PRETRAINED", str(pretrained_root))
    return pretrained_root
