"""The bundle says which code runs: the same code gives the same bytes, other code others."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flwr.cli.config_utils import get_fab_config

from client.executor import check_bundle
from fedmm.config import RunConfig
from fedmm.errors import PolicyRefused
from fedmm.federation.bundle import ROOMS, bundle, bundle_hash

ROOT = Path(__file__).resolve().parents[2]


def test_it_holds_every_module_that_is_installed_and_nothing_else() -> None:
    with zipfile.ZipFile(io.BytesIO(bundle())) as fab:
        names = {name for name in fab.namelist() if name.endswith(".py")}
        others = set(fab.namelist()) - names
        for name in names:
            assert fab.read(name) == (ROOT / name).read_bytes()
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in fab.infolist())
    assert names == {str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert others == {"pyproject.toml", ".info/CONTENT"}


def test_its_settings_are_those_of_the_config() -> None:
    """`coordinator run` overrides every setting, and Flower lets only those be overridden that the bundle names."""
    config = get_fab_config(bundle())["tool"]["flwr"]["app"]["config"]
    assert config == RunConfig().flat()


def test_another_process_makes_the_same_bytes() -> None:
    code = "from fedmm.federation.bundle import bundle_hash; print(bundle_hash())"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == bundle_hash() == hashlib.sha256(bundle()).hexdigest()


def test_a_hospital_refuses_a_bundle_in_which_one_byte_differs() -> None:
    check_bundle(bundle())
    for other in (b"", bundle() + b"\0", bundle().replace(b"def ", b"DEF ", 1)):
        with pytest.raises(PolicyRefused, match="not the fedmm that is installed"):
            check_bundle(other)
