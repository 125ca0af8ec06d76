"""Three hospitals and a coordinator as they are run for real: kits, TLS with certificates, Flower's SuperLink and SuperNodes."""

from __future__ import annotations

import json
import sqlite3
import stat
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedmm.config import load_site
from fedmm.privacy.ledger import Ledger
from fedmm.report.record import read_rounds
from server.link import DATABASE
from tests.e2e.sites import Sites, flags, settings, simulated, until

NAMES = ("north", "middle", "south")


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    with Sites(tmp_path, NAMES) as sites:
        yield sites


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_a_run_survives_kills_and_a_restart_of_everything_and_ends_as_simulated(sites: Sites) -> None:
    given = settings(federation__rounds=3, federation__min_hospitals=3, federation__retries=8)
    kit = sites.kit().folder
    sites.up()
    until(lambda: sites.connected() == set(NAMES), what="all hospitals connect")
    # round 1, then two kill -9 while the run goes on
    sites.fedmm("coordinator", "run", kit, "--name", "r", "--detach", *flags(given))
    until(lambda: sites.rounds("r") >= 1, what="round 1")
    sites.kill("north", "supernode")
    sites.kill("coordinator", "superlink")
    until(lambda: sites.rounds("r") >= 2, what="round 2")
    # everything down, up again, and on
    sites.fedmm("coordinator", "stop", kit)
    sites.started.pop("coordinator").wait(60)
    shown = {run["name"]: run for run in json.loads(sites.fedmm("runs", "list", kit, "--format", "json").stdout)}
    if shown["r"]["state"] != "done":  # it may have been quicker
        assert shown["r"]["state"] == "stopped"
        sites.up("coordinator")
        until(lambda: sites.connected() == set(NAMES), what="all hospitals come back")
        said = sites.fedmm("runs", "resume", kit, "r").stdout
        assert "going on after round" in said
        assert "round 3/3" in said

    run = sites.kit().runs / "r"
    expected = load_file(simulated(sites, given) / "model.safetensors")
    got = load_file(run / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    _charged_once(sites, rounds=3)
    _nothing_stays(sites, got)


def _charged_once(sites: Sites, *, rounds: int) -> None:
    """Each hospital's ledger is intact and holds one settled charge a round, whatever was killed."""
    for name in NAMES:
        hospital = sites.kit(name).hospital
        with Ledger.open(hospital, load_site(hospital), create=False) as ledger:
            ledger.verify()
            charges = [(e["round"], e["state"]) for e in ledger.events() if e["kind"] == "train"]
        assert charges == [(number, "settled") for number in range(1, rounds + 1)], name


def _nothing_stays(sites: Sites, model: dict[str, torch.Tensor]) -> None:
    """The SuperLink's database is private and is rid of weights soon after the run."""
    database = sites.kit().state / DATABASE
    assert stat.S_IMODE(database.stat().st_mode) == 0o600
    needle = max(model.values(), key=torch.numel).flatten()[:64].numpy().tobytes()
    if "coordinator" not in sites.started:
        sites.up("coordinator")

    def clean() -> bool:
        with sqlite3.connect(database) as db:
            (objects,) = db.execute("SELECT count(*) FROM objects").fetchone()
        db.close()
        files = [database, *database.parent.glob(DATABASE + "-*")]
        return objects == 0 and not any(needle in file.read_bytes() for file in files)

    until(clean, what="weights are gone from the database")


@pytest.mark.slow  # two minutes, most of it a dozen commands that start; `make faults` has it
def test_what_people_see_while_nothing_is_wrong_and_when_a_hospital_is_away(sites: Sites) -> None:
    kit = sites.kit().folder
    assert sites.fedmm("coordinator", "status", kit, expect=1).stdout.startswith("rehearsal is not up")
    sites.up("coordinator", "north", "south")
    until(lambda: sites.connected() == {"north", "south"}, what="two hospitals connect")
    said = sites.fedmm("coordinator", "status", kit).stdout
    assert [line.split() for line in said.splitlines() if line.startswith(NAMES)] == [
        ["middle", "not", "connected"],
        ["north", "connected"],
        ["south", "connected"],
    ]
    given = flags(settings(federation__rounds=1, federation__min_hospitals=3, federation__connect_seconds=1))
    failed = sites.fedmm("coordinator", "run", kit, "--name", "too-few", *given, expect=4)
    assert "2 of at least 3 hospitals connected within 1 s" in failed.stderr
    given = flags(settings(federation__rounds=1, federation__min_hospitals=2))
    done = sites.fedmm("coordinator", "run", kit, "--name", "two", *given)
    assert "round 1/1 | 2 of 2 hospitals" in done.stdout
    assert read_rounds(sites.kit().runs / "two")[0]["trained"] == ["north", "south"]
    shown = json.loads(sites.fedmm("runs", "show", kit, "two", "--format", "json").stdout)
    assert shown["phase"] == "done"
    site = json.loads(sites.fedmm("site", "status", sites.kit("north").folder, "--format", "json").stdout)
    assert site["budget"]["epsilon"] > 0
    assert {name: bool(one["pid"]) for name, one in site["processes"].items()} == {"supernode": True, "executor": True}
    for name in ("coordinator", "north"):
        port = sites.kit(name).config.ports.metrics
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
            assert b"fedmm_" in page.read()
    sites.fedmm("site", "stop", sites.kit("north").folder)
    assert sites.fedmm("site", "status", sites.kit("north").folder, expect=1).stdout.startswith("north is not up")
