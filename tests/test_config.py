"""Settings: one name, one default, a message that names what is wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmm.config import RunConfig, SiteConfig, find_hospitals, load_site, parse_settings, settings_table
from fedmm.errors import ConfigError, PolicyRefused

ROOT = Path(__file__).resolve().parents[1]
SITE = """
[hospital]
name = "north"
[labels]
findings = ["effusion"]
[privacy]
epsilon = 10.0
delta = 1e-4
public_patients = 500
"""


def test_defaults_equal_those_of_flower_s_app_table() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    flat = {f"{section}.{name}": value for section, names in table.items() for name, value in names.items()}
    assert flat == RunConfig().flat()


def test_the_settings_page_is_made_from_the_code() -> None:
    assert settings_table() in (ROOT / "docs/settings.md").read_text()


def test_settings_survive_being_text() -> None:
    config = RunConfig()
    assert RunConfig.from_flat({key: str(value) for key, value in config.flat().items()}) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("privacy.epsilon", "nan"), ("privacy.epsilon", "inf"), ("privacy.epsilon", "-1"), ("privacy.epsilon", "0"),
        ("privacy.epsilon", "1e9"), ("privacy.delta", "0.5"), ("privacy.enabled", "maybe"), ("training.sampling_rate", "1.5"),
        ("federation.rounds", "2.5"), ("federation.strategy", "magic"), ("privacy.unit", "hospital"), ("training.local_steps", ""),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        RunConfig.from_flat({key: value})


@pytest.mark.parametrize("key", ["epsilon", "privacy", "privacy.", ".epsilon", "privacy.epsilonn", "nonsense.x", ""])
def test_an_unknown_setting_is_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        RunConfig.from_flat({key: "1"})


@given(st.text(), st.text())
def test_no_text_of_a_setting_ends_in_a_traceback(key: str, value: str) -> None:
    try:
        RunConfig.from_flat({key: value, "training.device": value})
    except ConfigError:
        return


def test_a_pair_without_equals_shows_how_to_write_it() -> None:
    assert parse_settings(["a.b=1=2", " c.d = x "]) == {"a.b": "1=2", "c.d": "x"}
    with pytest.raises(ConfigError, match="has no '='"):
        parse_settings(["privacy.epsilon"])


# --- site.toml ------------------------------------------------------------------------------------------------------------


def write_site(folder: Path, text: str) -> Path:
    (folder / "site.toml").write_text(text)
    return folder


def test_the_default_policy_lets_nothing_unprotected_out(tmp_path: Path) -> None:
    site = load_site(write_site(tmp_path, SITE))
    assert not site.privacy.allow_not_private
    assert (site.release.metrics, site.release.counts) == ("no", "no")


def test_no_policy_no_training(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match=r"no site\.toml"):
        load_site(tmp_path)


@pytest.mark.parametrize("line", [line for line in SITE.splitlines() if "=" in line and "findings" not in line])
def test_what_decides_the_promise_has_no_default(tmp_path: Path, line: str) -> None:
    with pytest.raises(PolicyRefused, match=line.split(" ")[0]):
        load_site(write_site(tmp_path, SITE.replace(line, "")))


@pytest.mark.parametrize(
    "change",
    [
        ("delta = 1e-4", "delta = 2e-4"),  # 1 / (10 x 500)
        ("epsilon = 10.0", "epsilon = nan"), ("epsilon = 10.0", "epsilon = inf"), ("epsilon = 10.0", "epsilon = -1.0"),
        ("public_patients = 500", "public_patients = 0"), ("[privacy]", "[privacy]\nunknown = 1"),
        ('name = "north"', 'name = "../north"'), ('name = "north"', 'name = "<b>"'), ("[labels]", "[labels"),
        ("public_patients = 500", 'public_patients = 500\n[release]\nmetrics = "exact"'),
    ],
)  # fmt: skip
def test_an_unsafe_or_broken_policy_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    assert change[0] in SITE
    with pytest.raises(PolicyRefused):
        load_site(write_site(tmp_path, SITE.replace(*change)))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x00", b"= 3"])
def test_a_policy_that_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "site.toml").write_bytes(content)
    with pytest.raises(PolicyRefused, match=r"cannot be read|not valid"):
        load_site(tmp_path)


def test_the_example_policy_is_valid_and_closed() -> None:
    site = SiteConfig.model_validate(tomllib.loads((ROOT / "deploy/site.example.toml").read_text()))
    assert not site.privacy.allow_not_private
    assert site.release.metrics == "no"


def test_hospitals_are_found_in_order_or_the_folder_itself_is_one(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        write_site(tmp_path / name, SITE)
    (tmp_path / "empty").mkdir()
    assert [p.name for p in find_hospitals(tmp_path)] == ["a", "b"]
    assert find_hospitals(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(ConfigError, match="no hospital folder"):
        find_hospitals(tmp_path / "empty")
