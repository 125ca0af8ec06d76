"""The doctor: a good kit passes, each broken one has its own line with a fix, and nothing is made by looking."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedmm.cli import main
from fedmm.config import load_site
from fedmm.errors import ConfigError
from fedmm.privacy.ledger import Ledger
from fedmm.sites import authority, doctor
from fedmm.sites.doctor import Check, examine
from fedmm.sites.tls import server_context
from tests.sites.federation import Listener, file_states, fill_in, office, opened

Move = Callable[[timedelta], None]


@pytest.fixture(autouse=True)
def another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with room, whatever this one has; and the seconds that torch takes, in one test only."""
    monkeypatch.setattr(doctor, "_available", lambda: 8 * doctor.GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * doctor.GIB))
    monkeypatch.setitem(doctor.HOSPITAL, "device", lambda _: ("ok", "not looked at", ""))


def free_ports(kit: Path) -> None:
    """Others may test on this machine too: ports that are free now."""
    text = (kit / "kit.toml").read_text()
    for name in ("node", "metrics", "link"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            text = re.sub(rf"(?m)^{name} = \d+", f"{name} = {probe.getsockname()[1]}", text)
    (kit / "kit.toml").write_text(text.replace("0.0.0.0", "127.0.0.1"))


@pytest.fixture
def north(kits: Path) -> Path:
    """A hospital's kit, filled in."""
    fill_in(kits / "north")
    free_ports(kits / "north")
    return kits / "north"


@pytest.fixture
def up(kits: Path, listener: Listener) -> Iterator[None]:
    """The coordinator answers."""
    with listener.answering(server_context(opened(kits / "coordinator"))):
        yield


def found(kit: Path, name: str) -> Check:
    """The check of this name, with a fix if it is not ok."""
    (check,) = [check for check in examine(kit) if check.name == name]
    assert bool(check.fix) is (check.state != "ok")
    return check


# --- good kits ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("up")
def test_a_good_kit_passes_and_looking_makes_nothing(north: Path) -> None:
    before = file_states(north)
    checks = examine(north)
    assert [(check.name, check.state, check.detail) for check in checks if check.state == "problem"] == []
    assert [check.name for check in checks] == ["versions", "kit", *doctor.HOSPITAL]
    assert file_states(north) == before


def test_a_coordinator_s_good_kit_passes(kits: Path, listener: Listener) -> None:
    free_ports(kits / "coordinator")
    listener.__exit__(None, None, None)  # its port is free again
    checks = examine(kits / "coordinator")
    assert [check for check in checks if check.state == "problem"] == []
    assert [check.name for check in checks] == ["versions", "kit", *doctor.COORDINATOR]


@pytest.mark.usefixtures("up")
def test_the_command_says_one_line_each_and_json_for_programs(north: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(north)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("ok ") and " kit " in line]
    shutil.rmtree(north / "hospital")
    assert main(["doctor", str(north), "--format", "json"]) == 1
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert not said["ok"]
    assert {tuple(check) for check in said["checks"]} == {("name", "state", "detail", "fix")}
    assert {check["name"] for check in said["checks"] if check["state"] == "problem"} == {"policy", "data", "ledger"}


@pytest.mark.usefixtures("up")
def test_no_word_of_a_patient_and_no_count_is_said(north: Path) -> None:
    manifest = north / "hospital/manifest.csv"
    manifest.write_text(manifest.read_text() + "secret_person,s2,,report/secret_name.txt,,7,odd_value,train\n" * 2)
    check = found(north, "data")
    assert check.state == "problem"
    assert "missing_file" in check.detail
    for word in ("secret", "odd_value", "s2", "7"):
        assert word not in check.detail


def test_the_device_is_the_one_that_training_would_use(kits: Path) -> None:
    from fedmm.training.loop import choose_device

    state, detail, _ = doctor._device(opened(kits / "north"))
    assert state == "ok"
    assert detail.startswith(choose_device("auto"))


# --- broken kits ----------------------------------------------------------------------------------------------------------


def test_what_is_no_kit_ends_the_list(tmp_path: Path) -> None:
    checks = examine(tmp_path)
    assert [check.name for check in checks] == ["versions", "kit"]
    assert "not a kit" in checks[1].detail


@pytest.mark.parametrize("name", ["client.key", "client.crt", "node.key", "node.pub", "ca.crt", "federation.sig"])
def test_a_missing_file_is_named(north: Path, name: str) -> None:
    (north / name).unlink()
    check = found(north, "kit")
    assert check.state == "problem"
    assert name in check.detail


def test_a_key_that_others_can_read_is_a_problem(north: Path) -> None:
    (north / "node.key").chmod(0o640)
    check = found(north, "kit")
    assert (check.state, "read by others" in check.detail, "chmod 600" in check.fix) == ("problem", True, True)


def test_a_certificate_of_another_hospital_key_or_ca_is_a_problem(kits: Path, north: Path) -> None:
    mine = {name: (north / name).read_bytes() for name in ("client.crt", "client.key")}
    shutil.copy(kits / "south/client.key", north)
    assert "do not belong together" in found(north, "certificate").detail
    shutil.copy(kits / "south/client.crt", north)
    assert "is that of 'south'" in found(north, "certificate").detail
    own = authority.new_key()
    foreign = authority.Authority(own, authority.make_authority("chest", own))
    public = authority.read_certificate(kits / "north/client.crt").public_key()
    (north / "client.crt").write_bytes(authority.certificate_pem(foreign.client("north", public, days=9)))
    assert "not made by ca.crt" in found(north, "certificate").detail
    for name, content in mine.items():
        (north / name).write_bytes(content)
    assert found(north, "certificate").state == "ok"


@pytest.mark.parametrize(
    ("days", "state", "said"),
    [
        (-400, "problem", "expired on"),
        (2, "problem", "not valid before"),
        (-350, "warning", "only"),
        (0, "ok", "until"),
    ],
)
def test_dates_are_told(kits: Path, north: Path, move_clock: Move, days: int, state: str, said: str) -> None:
    move_clock(timedelta(days=days))
    with office(kits, port=opened(north).federation.coordinator.port) as at_work:
        at_work.renew("north", new_keys=False)
    check = found(north, "certificate")
    assert (check.state, said in check.detail) == (state, True)


def test_a_node_key_that_the_federation_does_not_name_is_a_problem(kits: Path, north: Path) -> None:
    for name in ("node.pub", "node.key"):
        shutil.copy(kits / "south" / name, north)
        check = found(north, "node key")
        assert check.state == "problem"
    assert "is not the key" in check.detail


def test_a_server_certificate_without_the_public_name_is_a_problem(kits: Path) -> None:
    with office(kits, host="fl.example.org") as at_work:
        at_work.provision()
    check = found(kits / "coordinator", "certificate")
    assert (check.state, "does not name fl.example.org" in check.detail) == ("problem", True)
    assert "--renew coordinator" in check.fix


def test_a_damaged_or_foreign_revocation_list_is_a_problem(kits: Path) -> None:
    own = authority.new_key()
    foreign = authority.Authority(own, authority.make_authority("chest", own)).revocations({}, number=1)
    for content, said in ((b"x", "damaged"), (foreign, "not made by")):
        (kits / "coordinator/crl.pem").write_bytes(content)
        check = found(kits / "coordinator", "revocations")
        assert (check.state, said in check.detail) == ("problem", True)


def test_a_port_that_another_program_has_is_a_problem(north: Path) -> None:
    with socket.create_server(("127.0.0.1", opened(north).config.ports.node)):
        check = found(north, "ports")
    assert check.state == "problem"
    assert f":{opened(north).config.ports.node}" in check.detail
    assert found(north, "ports").state == "ok"


def test_a_coordinator_that_is_not_there_is_a_problem_with_its_own_fix(north: Path) -> None:
    check = found(north, "connection")
    assert check.state == "problem"
    assert "nothing listens" in check.detail


@pytest.mark.parametrize(
    ("ahead", "state"),
    # of the server; Flower refuses a SuperNode whose clock is 5 s ahead or 305 s behind
    [(0, "ok"), (-30, "problem"), (-3600, "problem"), (100, "ok"), (250, "warning"), (400, "problem")],
)
def test_a_clock_that_flower_would_refuse_is_a_problem(
    kits: Path, north: Path, listener: Listener, ahead: float, state: str
) -> None:
    with listener.answering(server_context(opened(kits / "coordinator")), ahead=ahead):
        check = found(north, "connection")
    assert check.state == state
    assert ("NTP" in check.fix) is (state != "ok")


def test_a_coordinator_that_is_ill_is_a_problem(kits: Path, north: Path, listener: Listener) -> None:
    with listener.answering(server_context(opened(kits / "coordinator")), status=502):
        check = found(north, "connection")
    assert (check.state, "502" in check.detail) == ("problem", True)


def test_a_policy_that_waits_for_decisions_says_which_lines(kits: Path) -> None:
    check = found(kits / "south", "policy")
    assert check.state == "problem"
    assert "DECIDE" in check.fix


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('name = "north"', 'name = "south"'), "site.toml is of south"),
        (('findings = ["effusion"]', 'findings = ["effusion", "icu"]'), "labels.findings"),
        (('["none", "mild", "severe"]', '["none", "severe", "mild"]'), "labels.class_values"),
        (("epsilon = 3.0", "epsilon = -1.0"), "privacy.epsilon"),
    ],
)
def test_a_policy_that_does_not_fit_is_a_problem(north: Path, change: tuple[str, str], said: str) -> None:
    site = north / "hospital/site.toml"
    assert change[0] in site.read_text()
    site.write_text(site.read_text().replace(*change))
    check = found(north, "policy")
    assert check.state == "problem"
    assert said in check.detail


def test_a_ledger_is_read_and_a_broken_one_is_a_problem(north: Path) -> None:
    site = load_site(north / "hospital")
    Ledger.open(north / "hospital", site).close()
    assert found(north, "ledger").detail.startswith("readable")
    (north / "hospital/ledger.key").unlink()
    check = found(north, "ledger")
    assert check.state == "problem"
    assert not (north / "hospital/ledger.key").exists()


def test_a_research_policy_is_pointed_out(north: Path) -> None:
    site = north / "hospital/site.toml"
    site.write_text(site.read_text().replace("allow_not_private = false", "allow_not_private = true"))
    check = found(north, "policy")
    assert (check.state, "without privacy" in check.detail) == ("warning", True)


def test_this_machine_has_some_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert doctor._available() > 2**20


def test_little_room_is_told(north: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [doctor._enough("disk", size, 1, 10, "make room")[0] for size in (0, 5, 10)]
    assert states == ["problem", "warning", "ok"]
    monkeypatch.setattr(doctor, "_available", lambda: doctor.GIB // 2)
    assert found(north, "memory").state == "problem"


def test_another_flower_is_a_problem(north: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda _: "1.29.0")
    assert found(north, "versions").state == "problem"


def test_a_check_that_fails_in_an_unforeseen_way_hides_no_other_and_says_no_value(
    north: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> doctor.Finding:
        raise KeyError("secret_person")

    monkeypatch.setitem(doctor.HOSPITAL, "data", broken)
    check = found(north, "data")
    assert "KeyError" in check.detail
    assert "secret" not in str(check)
    assert found(north, "ledger").state == "ok"


def test_a_withdrawn_hospital_is_told_by_its_own_kit(kits: Path, north: Path) -> None:
    with office(kits, port=opened(north).federation.coordinator.port) as at_work:
        at_work.revoke("north")
    for name in ("federation.json", "federation.sig"):
        shutil.copy(kits / "ca" / name, north)
    assert "withdrawn" in found(north, "kit").detail
    with pytest.raises(ConfigError):
        opened(north)
