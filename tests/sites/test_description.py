"""federation.toml: whatever is in it, the answer is a description or a ConfigError."""

from __future__ import annotations

import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.errors import ConfigError
from fedmm.sites.authority import general_name
from fedmm.sites.description import is_host, read_description
from tests.sites.federation import TEXT, written

GOOD = TEXT.format(host="fl.example.org", port=9443, hospitals='[[hospitals]]\nname = "north"')
values = st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none())


def read(text: str | bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "federation.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        with contextlib.suppress(ConfigError):
            read_description(path)


@settings(deadline=None)  # it writes files
@given(st.binary())
def test_no_bytes_end_in_a_traceback(content: bytes) -> None:
    read(content)


@settings(deadline=None)
@given(st.integers(0, len(GOOD)), st.text(max_size=20), st.integers(0, 20))
def test_no_edit_of_a_good_one_ends_in_a_traceback(at: int, put: str, gone: int) -> None:
    read(GOOD[:at] + put + GOOD[at + gone :])


def test_deep_nesting_is_no_traceback() -> None:
    read("a = " + "[" * 100_000)


@given(st.text(max_size=80))
def test_a_host_that_is_accepted_fits_into_a_certificate(name: str) -> None:
    if is_host(name):
        general_name(name)


@pytest.mark.parametrize(
    "name", ["", "*.example.org", "a..b", "-a", "a_b", "x" * 254, "fe80::1%eth0", "host:9443", "ä.de"]
)
def test_no_such_host(name: str) -> None:
    assert not is_host(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('name = "north"', 'name = "ca"'), "cannot be named"), (('name = "north"', 'name = "Coordinator"'), "cannot be named"),
        (('name = "north"', 'name = "../x"'), "hospitals.0.name"), (("fl.example.org", "*.example.org"), "host"),
        (("9443", "0"), "port"), (('[[hospitals]]\nname = "north"', ""), "hospitals"), (('"effusion"', '""'), "labels"),
        (('"chest"', '"chest"\ndays_valid = 0'), "days_valid"), (('"chest"', '"chest"\nepsilon = 1'), "epsilon"),
        (('findings = ["effusion"]\nclass_name = "severity"\nclass_values = ["none", "mild", "severe"]', ""), "at least one"),
        (('"effusion"', '"a\\u0007b"'), "printable"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    assert change[0] in GOOD
    path = tmp_path / "federation.toml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(ConfigError) as caught:
        read_description(path)
    assert said in caught.value.why


def test_two_hospitals_of_one_name_are_refused_whatever_the_case(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_description(written(tmp_path, names=("north", "North")))
    assert "same name" in caught.value.why
