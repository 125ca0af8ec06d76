"""Metrics: what a scrape says, that it changes nothing, reads only what is new, and answers on loopback alone."""

from __future__ import annotations

import json
import os
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from fedmm.config import load_site
from fedmm.errors import BudgetExhausted
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import Event, Rate
from fedmm.sites import metrics
from fedmm.sites.metrics import CoordinatorMetrics, HospitalMetrics, coordinator_registry, hospital_registry, serve
from tests.e2e.conftest import policy
from tests.report.run_folder import NAMES, make_run

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def values(registry: CollectorRegistry) -> Values:
    """What Prometheus reads, over the socket and back through its own parser: (name, labels) to value."""
    with serve(registry, 0) as served, urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics") as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def plain(found: Values) -> dict[str, float]:
    """Those without labels."""
    return {name: value for (name, labels), value in found.items() if not labels}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An older run, and the newest: five of six rounds, one hospital refused three times."""
    runs = tmp_path / "runs"
    old = make_run(runs / "old", rounds=2)
    for file in old.iterdir():
        os.utime(file, (1, 1))
    new = make_run(runs / "new", rounds=6, done=5)
    hospitals: dict[str, Any] = {name: {"phase": "asked", "round": 6} for name in NAMES}
    hospitals[NAMES[0]]["phase"] = "gone"
    status = {
        "run": "7f3a90c2d1e4b856", "round": 6, "rounds": 6, "phase": "collect", "hospitals": hospitals,
        "seconds": {"collect": 12.5, "check": 0.5}, "bytes_up": 700, "bytes_down": 900,
    }  # fmt: skip
    (new / "status.json").write_text(json.dumps(status))
    return runs


def test_a_coordinator_shows_its_newest_run(runs: Path) -> None:
    found = values(coordinator_registry(runs))
    told = plain(found)
    assert (told["fedmm_run_round"], told["fedmm_run_rounds"], told["fedmm_rounds_total"]) == (6, 6, 5)
    assert told["fedmm_round_seconds_total"] == pytest.approx(5 * 7.25)
    assert (told["fedmm_bytes_received_total"], told["fedmm_bytes_sent_total"]) == (700, 900)
    assert (told["fedmm_hospitals_connected"], told["fedmm_hospitals_known"]) == (3, 4)
    phases = {dict(labels)["phase"]: v for (name, labels), v in found.items() if name == "fedmm_run_phase"}
    assert {name for name, on in phases.items() if on} == {"collect"}
    assert found["fedmm_phase_seconds_total", (("phase", "collect"),)] == 12.5
    assert found["fedmm_run_info", (("run", "7f3a90c2d1e4b856"),)] == 1
    refused = (("code", "1001"), ("hospital", NAMES[-1]), ("kind", "refused"))
    assert found["fedmm_refusals_total", refused] == 3
    assert found["fedmm_told_epsilon", (("hospital", NAMES[1]),)] == pytest.approx(0.3 + 0.9 * 5**0.5)
    assert found["fedmm_told_epsilon_ceiling", (("hospital", NAMES[1]),)] == 10


def test_no_run_yet_is_an_empty_answer(tmp_path: Path) -> None:
    assert values(coordinator_registry(tmp_path / "nowhere")) == {}
    (tmp_path / "empty").mkdir()
    assert values(coordinator_registry(tmp_path)) == {}


def test_a_scrape_reads_only_what_was_added_and_leaves_a_half_line_for_the_next(runs: Path) -> None:
    collector = CoordinatorMetrics(runs)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    assert plain(values(registry))["fedmm_rounds_total"] == 5
    log = runs / "new" / "run.jsonl"
    data = log.read_bytes()
    line = data.splitlines()[-1]
    log.write_bytes(b"?" * len(data) + line[:50])  # what was read already is not read again
    assert plain(values(registry))["fedmm_rounds_total"] == 5
    log.write_bytes(b"?" * len(data) + line + b"\n")
    assert plain(values(registry))["fedmm_rounds_total"] == 6


@pytest.mark.parametrize("content", ["", "[]", "{", '{"hospitals": 3, "seconds": [], "round": "six", "phase": 7}'])
def test_a_damaged_status_leaves_numbers_out_and_breaks_no_scrape(runs: Path, content: str) -> None:
    (runs / "new" / "status.json").write_text(content)
    with (runs / "new" / "run.jsonl").open("a") as file:
        file.write('{"round": 6}\nnonsense\n[]\n')
    told = plain(values(coordinator_registry(runs)))
    assert "fedmm_run_round" not in told
    assert told["fedmm_rounds_total"] >= 5


# --- hospital ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / "site.toml").write_text(policy("north", epsilon="3.0"))
    return folder


def charge(hospital: Path, *, noise: float = 8.0, settle: bool = True) -> None:
    with (
        Ledger.open(hospital, load_site(hospital)) as ledger,
        ledger.reserve(Event("train", noise, Rate(0.5), 1), run="r", round=1) as paid,
    ):
        paid.start()
        if settle:
            paid.settle(sha256="ab" * 32)


def test_a_hospital_shows_what_its_ledger_says_and_what_it_is_doing(hospital: Path) -> None:
    charge(hospital)
    charge(hospital, settle=False)
    with pytest.raises(BudgetExhausted):
        charge(hospital, noise=0.3)
    (hospital / ".fedmm").mkdir()
    doing = {"phase": "training", "round": 3, "step": 2, "steps": 5, "step_seconds": 0.25, "memory_mb": 900, "code": 0}
    (hospital / ".fedmm" / "status.json").write_text(json.dumps(doing))
    told = plain(found := values(hospital_registry(hospital)))
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        spent = ledger.spent()
    assert told["fedmm_epsilon_spent"] == spent.epsilon > 0
    assert (told["fedmm_epsilon_ceiling"], told["fedmm_epsilon_left"]) == (3.0, 3.0 - spent.epsilon)
    assert (told["fedmm_delta"], told["fedmm_ledger_usable"]) == (1e-4, 1)
    assert (told["fedmm_ledger_releases_total"], told["fedmm_ledger_reserved"]) == (2, 1)
    assert told["fedmm_ledger_refusals_total"] == 1
    assert (told["fedmm_site_step_seconds"], told["fedmm_site_memory_bytes"]) == (0.25, 900e6)
    assert "fedmm_site_gpu_memory_bytes" not in told
    assert found["fedmm_site_phase", (("phase", "training"),)] == 1


def test_a_scrape_makes_no_ledger_and_changes_none(hospital: Path) -> None:
    assert "fedmm_epsilon_spent" not in plain(values(hospital_registry(hospital)))
    assert sorted(path.name for path in hospital.iterdir()) == ["site.toml"]
    charge(hospital)
    before = {path.name: path.read_bytes() for path in hospital.iterdir()}
    assert plain(values(hospital_registry(hospital)))["fedmm_ledger_releases_total"] == 1
    assert before == {path.name: path.read_bytes() for path in hospital.iterdir()}


@pytest.mark.parametrize("harm", ["key", "sqlite", "site", "rows"])
def test_a_ledger_that_cannot_be_trusted_is_shown_as_such_and_nothing_is_repaired(hospital: Path, harm: str) -> None:
    charge(hospital)
    if harm == "rows":
        (hospital / "ledger.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    else:
        (hospital / {"key": "ledger.key", "sqlite": "ledger.sqlite", "site": "site.toml"}[harm]).unlink()
    names = sorted(path.name for path in hospital.iterdir())
    told = plain(values(hospital_registry(hospital)))
    assert told["fedmm_ledger_usable"] == 0
    assert "fedmm_epsilon_spent" not in told
    assert sorted(path.name for path in hospital.iterdir()) == names


class Opened:
    """Counts how often the ledger is opened, and how often epsilon is computed with it."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Ledger:
        self.times += 1
        return Ledger.open(*args, **kwargs)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    opened = Opened()
    monkeypatch.setattr(metrics, "Ledger", type("Counted", (), {"open": opened}))
    return opened


def test_the_ledger_is_read_after_a_change_only_and_not_more_than_once_in_its_seconds(
    hospital: Path, opened: Opened
) -> None:
    charge(hospital)
    now = 0.0
    registry = CollectorRegistry(auto_describe=False)
    registry.register(HospitalMetrics(hospital, clock=lambda: now))
    releases = [plain(values(registry))["fedmm_ledger_releases_total"] for _ in range(3)]
    assert (releases, opened.times) == ([1, 1, 1], 1)
    charge(hospital)
    assert plain(values(registry))["fedmm_ledger_releases_total"] == 1
    now = metrics.LEDGER_SECONDS
    assert plain(values(registry))["fedmm_ledger_releases_total"] == 2
    assert opened.times == 2


# --- the server -------------------------------------------------------------------------------------------------------


def test_only_this_machine_can_ask_and_the_port_is_free_afterwards(tmp_path: Path) -> None:
    with serve(coordinator_registry(tmp_path), 0) as served:
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if int(port, 16) == served.port and line.split()[3] == "0A":
                assert address == "0100007F"
        port = served.port
    served.close()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_every_name_follows_the_conventions_of_prometheus(runs: Path, hospital: Path) -> None:
    charge(hospital)
    families = [*CoordinatorMetrics(runs).collect(), *HospitalMetrics(hospital).collect()]
    for family in families:
        assert family.name.startswith("fedmm_")
        assert family.documentation.endswith(".")
        assert not family.name.endswith(("_ms", "_mb", "_total"))  # base units; `_total` is added to counters
    assert len({family.name for family in families}) == len(families)
