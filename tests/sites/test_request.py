"""Keys that stay where they are made: request, answer, and everything that is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.cli import main
from fedmm.config import load_site
from fedmm.errors import ConfigError
from fedmm.privacy.ledger import Ledger
from fedmm.sites.authority import read_certificate, read_key
from fedmm.sites.kit import open_kit
from fedmm.sites.request import Answer, Request, accept_answer, make_request, read_message
from tests.sites.federation import fill_in, office, provision, secrets_of

OWN = {"own": ("north",)}


def admit(kits: Path, request: Request, *, again: bool = False) -> Answer:
    with office(kits, **OWN) as opened:
        opened.admit(request, again=again)
    return read_message(kits / "north.answer.json", Answer)


@pytest.fixture
def coordinator(tmp_path: Path) -> Path:
    """KITS of a federation whose north makes its own keys."""
    (tmp_path / "at_coordinator").mkdir()
    provision(tmp_path / "at_coordinator/kits", **OWN)
    return tmp_path / "at_coordinator/kits"


@pytest.fixture
def north(tmp_path: Path) -> Path:
    return tmp_path / "at_north/kit"


def test_a_kit_comes_about_and_no_private_key_is_ever_at_the_other_side(coordinator: Path, north: Path) -> None:
    assert not (coordinator / "north").exists()
    request = make_request("north", north)
    federation, _ = accept_answer(admit(coordinator, request), north)
    assert federation == open_kit(north, role="hospital").federation
    assert read_certificate(north / "client.crt").public_key() == read_key(north / "client.key").public_key()
    member = federation.member("north")
    assert member is not None
    assert member.node_key == (north / "node.pub").read_text().strip()
    fill_in(north)
    assert load_site(north / "hospital").hospital.name == "north"
    secrets = secrets_of(north)
    assert secrets
    for path in [path for path in coordinator.rglob("*") if path.is_file()] + [north / "request.json"]:
        content = path.read_bytes()
        assert not any(secret in content for secret in secrets), path
    assert not list(coordinator.glob("north/**/*.key"))
    theirs = [(coordinator / "ca/ca.key").read_bytes(), (coordinator / "coordinator/server.key").read_bytes()]
    for path in [path for path in north.rglob("*") if path.is_file()]:
        assert not any(key in path.read_bytes() for key in theirs), path


def test_asking_twice_is_asking_once(coordinator: Path, north: Path) -> None:
    first, second = make_request("north", north), make_request("north", north)
    assert first.csr == second.csr
    assert first.fingerprint() == second.fingerprint()
    answer = admit(coordinator, first)
    assert admit(coordinator, second) == answer
    accept_answer(answer, north)
    (north / "hospital/site.toml").write_text("# decided")
    accept_answer(answer, north)
    assert (north / "hospital/site.toml").read_text() == "# decided"


def test_a_second_request_with_other_keys_needs_a_person_who_says_so(
    coordinator: Path, north: Path, tmp_path: Path
) -> None:
    old = admit(coordinator, make_request("north", north))
    other = make_request("north", tmp_path / "stranger")
    with pytest.raises(ConfigError, match="already") as caught:
        admit(coordinator, other)
    assert "--renew north" in caught.value.fix
    accept_answer(admit(coordinator, other, again=True), tmp_path / "stranger")
    listed = x509.load_pem_x509_crl((coordinator / "coordinator/crl.pem").read_bytes())
    gone = x509.load_pem_x509_certificate(old.certificate.encode()).serial_number
    assert [entry.serial_number for entry in listed] == [gone]


def test_a_withdrawn_hospital_comes_back_with_new_keys_only(coordinator: Path, north: Path, tmp_path: Path) -> None:
    request = make_request("north", north)
    admit(coordinator, request)
    with office(coordinator, **OWN) as opened:
        opened.revoke("north")
    with pytest.raises(ConfigError, match="same keys"):
        admit(coordinator, request, again=True)
    accept_answer(admit(coordinator, make_request("north", tmp_path / "new"), again=True), tmp_path / "new")
    assert open_kit(tmp_path / "new").name == "north"


def test_renewal_without_new_keys_is_an_answer_to_the_same_request(coordinator: Path, north: Path) -> None:
    accept_answer(admit(coordinator, make_request("north", north)), north)
    before = read_certificate(north / "client.crt")
    with office(coordinator, **OWN) as opened:
        opened.renew("north", new_keys=False)
    accept_answer(read_message(coordinator / "north.answer.json", Answer), north)
    after = read_certificate(north / "client.crt")
    assert after.serial_number != before.serial_number
    assert after.public_key() == before.public_key()


def test_the_ledger_s_key_goes_with_it_and_is_proven(coordinator: Path, north: Path, tmp_path: Path) -> None:
    accept_answer(admit(coordinator, make_request("north", north)), north)
    fill_in(north)
    site = load_site(north / "hospital")
    with Ledger.open(north / "hospital", site) as ledger:
        key = ledger.public_key()
    request = make_request("north", tmp_path / "second", hospital=north / "hospital")
    assert request.ledger_key == key
    request.check()
    admit(coordinator, request, again=True)
    assert json.loads((coordinator / "ca/register.json").read_text())["ledgers"] == {"north": key}
    with pytest.raises(ConfigError, match="ledger's key"):
        request.model_copy(update={"ledger_proof": "0" * 128}).check()


def test_a_request_that_proves_nothing_is_refused(north: Path, tmp_path: Path) -> None:
    mine, other = make_request("north", north), make_request("south", tmp_path / "south")
    csr = mine.csr.splitlines()
    csr[2] = csr[2][::-1]
    for change, said in (
        ({"name": "south"}, "another name"),
        ({"csr": other.csr}, "another name"),
        ({"csr": "\n".join(csr)}, "certificate request|client key"),
        ({"csr": "nothing"}, "no certificate request"),
        ({"node_key": other.node_key}, "node key"),
        ({"node_key": "ssh-ed25519 AAAA"}, "P-384"),
        ({"node_proof": other.node_proof}, "node key"),
        ({"node_proof": "!"}, "node key"),
    ):
        with pytest.raises(ConfigError, match=said):
            mine.model_copy(update=change).check()


def test_nobody_gets_in_who_is_not_in_federation_toml_or_has_kits_made_here(coordinator: Path, tmp_path: Path) -> None:
    for name in ("west", "south"):
        with pytest.raises(ConfigError, match="its own keys") as caught:
            admit(coordinator, make_request(name, tmp_path / name))
        assert "own_keys = true" in caught.value.fix


def test_a_node_key_is_of_one_hospital(coordinator: Path, north: Path) -> None:
    north.mkdir(parents=True)
    (north / "node.key").write_bytes((coordinator / "south/node.key").read_bytes())
    with pytest.raises(ConfigError, match="same node key"):
        admit(coordinator, make_request("north", north))


def test_an_answer_that_does_not_fit_changes_nothing(coordinator: Path, north: Path, tmp_path: Path) -> None:
    answer = admit(coordinator, make_request("north", north))
    make_request("north", tmp_path / "other_keys")
    (tmp_path / "second").mkdir()
    provision(tmp_path / "second/kits", **OWN)
    foreign = admit(tmp_path / "second/kits", make_request("north", north))
    before = sorted(path.name for path in north.iterdir())
    changed = answer.federation.replace('"port": 9443', '"port": 9444')
    assert changed != answer.federation
    for bad, folder, said in (
        (answer, tmp_path / "nowhere", "holds no client.key"),
        (answer, tmp_path / "other_keys", "not for the client.key"),
        (answer.model_copy(update={"federation": changed}), north, "not signed"),
        (answer.model_copy(update={"ca": foreign.ca}), north, "not signed"),
        (answer.model_copy(update={"certificate": foreign.certificate}), north, "by its CA"),
        (answer.model_copy(update={"certificate": "x"}), north, "damaged"),
        (answer.model_copy(update={"name": "south"}), north, "not one of south"),
    ):
        with pytest.raises(ConfigError, match=said):
            accept_answer(bad, folder)
    assert sorted(path.name for path in north.iterdir()) == before
    accept_answer(answer, north)
    with pytest.raises(ConfigError, match="another CA"):
        accept_answer(foreign, north)
    with office(coordinator, own=("north",), names=("north", "south", "east")) as opened:
        opened.provision()
        opened.renew("north", new_keys=False)
    accept_answer(read_message(coordinator / "north.answer.json", Answer), north)
    with pytest.raises(ConfigError, match="older"):
        accept_answer(answer, north)


@settings(deadline=None)  # it writes files
@given(st.one_of(st.binary(), st.text().map(lambda text: json.dumps({"name": text, "csr": text}).encode())))
def test_no_message_ends_in_a_traceback(content: bytes) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.json"
        path.write_bytes(content)
        for kind in (Request, Answer):
            with pytest.raises(ConfigError):
                read_message(path, kind)


def test_the_three_commands(coordinator: Path, north: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = str(coordinator.parent / "federation.toml")
    assert main(["provision", "--csr", "north", "--out", str(north)]) == 0
    number = make_request("north", north).fingerprint()
    assert number in capsys.readouterr().out
    flags = ["--out", str(coordinator), "--request", str(north / "request.json")]
    assert main(["provision", toml, *flags]) == 0
    assert number in capsys.readouterr().out
    assert main(["provision", toml, *flags, "--renew", "south"]) == 2
    assert main(["provision", "--answer", str(coordinator / "north.answer.json"), "--out", str(north)]) == 0
    assert "compare" in capsys.readouterr().out
    assert open_kit(north).name == "north"
