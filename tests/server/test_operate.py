"""Starting runs, without a SuperLink."""

from __future__ import annotations

from pathlib import Path

import pytest

import server.operate
from fedmm.config import RunConfig
from fedmm.errors import ConfigError, RunFailed
from fedmm.report.status import StatusFile
from fedmm.sites.kit import Kit, open_kit
from server.link import FlowerRun
from tests.sites.federation import provision


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kit:
    def launched(kit: Kit, config: RunConfig) -> int:
        return 7

    monkeypatch.setattr(server.operate, "_launch", launched)
    provision(tmp_path / "kits", port=9443)
    return open_kit(tmp_path / "kits" / "coordinator")


def test_a_run_that_died_in_its_introduction_leaves_its_name_free(kit: Kit) -> None:
    with StatusFile(kit.runs / "r", rounds=2):
        pass
    assert [file.name for file in (kit.runs / "r").iterdir()] == ["status.json"]
    assert server.operate.start(kit, {}, name="r") == (7, kit.runs / "r")


def test_a_run_that_began_is_gone_on_with_and_not_started_again(kit: Kit) -> None:
    (kit.runs / "r").mkdir(parents=True)
    (kit.runs / "r" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="there is a run r already"):
        server.operate.start(kit, {}, name="r")


class SlowLink:
    """A SuperLink that starts a run and answers too late, if `begins`; that is not there, if not."""

    begins = True

    def __init__(self, kit: Kit) -> None:
        self._runs: list[FlowerRun] = []

    def __enter__(self) -> SlowLink:
        return self

    def __exit__(self, *_: object) -> None: ...

    def runs(self) -> list[FlowerRun]:
        return self._runs

    def start(self, settings: dict[str, str]) -> int:
        if SlowLink.begins:
            self._runs.append(FlowerRun(9, settings["federation.out"], "running", ""))
        raise RunFailed("the coordinator's SuperLink does not answer")


def test_a_run_that_started_although_the_superlink_answered_too_late_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.operate, "Link", SlowLink)
    provision(tmp_path / "kits", port=9443)
    kit = open_kit(tmp_path / "kits" / "coordinator")
    assert server.operate.start(kit, {}, name="r")[0] == 9
    monkeypatch.setattr(SlowLink, "begins", False)
    with pytest.raises(RunFailed, match="does not answer"):
        server.operate.start(kit, {}, name="other")
