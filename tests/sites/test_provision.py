"""Provisioning: what is in a kit, that running again keeps it, who is withdrawn and what is renewed."""

from __future__ import annotations

import json
import shutil
import stat
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedmm.cli import main
from fedmm.config import load_site
from fedmm.errors import ConfigError, PolicyRefused
from fedmm.schema import Labels
from fedmm.sites import provision as provisioning
from fedmm.sites.authority import read_certificate, read_key
from fedmm.sites.description import Proposal
from fedmm.sites.kit import FEDERATION, PRIVATE, SIGNATURE, open_kit
from fedmm.sites.papers import DECIDE, site_text
from tests.sites.federation import file_states, fill_in, office, opened, provision, written

COORDINATOR = {
    "README.txt", "ca.crt", "crl.pem", "federation.json", "federation.sig", "kit.toml", "runs", "server.crt", "server.key",
    "state", "superexec.secret",
}  # fmt: skip
HOSPITAL = {
    "README.txt", "ca.crt", "client.crt", "client.key", "federation.json", "federation.sig", "hospital", "hospital/site.toml",
    "kit.toml", "node.key", "node.pub", "state",
}  # fmt: skip
CA = {"ca.crt", "ca.key", "crl.pem", "federation.json", "federation.sig", "register.json"}


def test_kits_hold_what_the_readme_says_and_private_files_are_the_owner_s(kits: Path) -> None:
    assert {p.name for p in kits.iterdir()} == {"ca", "coordinator", "north", "south"}
    for name, content in (("ca", CA), ("coordinator", COORDINATOR), ("north", HOSPITAL), ("south", HOSPITAL)):
        assert {str(p.relative_to(kits / name)) for p in (kits / name).rglob("*")} == content
    for path in kits.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        private = path.name in (*PRIVATE, "ca.key", "register.json")
        assert mode == (0o700 if path.is_dir() else 0o600 if private else 0o644), path


def test_a_kit_opens_and_knows_its_federation(kits: Path) -> None:
    north, coordinator = open_kit(kits / "north", role="hospital"), open_kit(kits / "coordinator", role="coordinator")
    assert north.name == "north"
    assert coordinator.is_coordinator
    assert north.federation == coordinator.federation
    assert [member.name for member in north.federation.hospitals] == ["north", "south"]
    assert north.federation.serial == 1


def test_certificates_say_who_may_do_what(kits: Path) -> None:
    ca, server = read_certificate(kits / "coordinator/ca.crt"), read_certificate(kits / "coordinator/server.crt")
    client = read_certificate(kits / "north/client.crt")
    limits = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (limits.critical, limits.value.ca, limits.value.path_length) == (True, True, 0)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    for leaf, use in ((server, "serverAuth"), (client, "clientAuth")):
        leaf.verify_directly_issued_by(ca)
        assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert [each._name for each in leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value] == [use]
        assert 365 <= (leaf.not_valid_after_utc - leaf.not_valid_before_utc).days <= 366
        assert isinstance(leaf.public_key(), ec.EllipticCurvePublicKey)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert client.subject.rfc4514_string() == "CN=north"


def test_node_keys_and_the_secret_are_of_the_form_that_flower_reads(kits: Path) -> None:
    from flwr.supercore.auth import load_superexec_auth_secret

    private = load_ssh_private_key((kits / "north/node.key").read_bytes(), None)
    public = load_ssh_public_key((kits / "north/node.pub").read_bytes().strip())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.public_key() == public
    assert private.curve.name == "secp384r1"
    secret = load_superexec_auth_secret(str(kits / "coordinator/superexec.secret"))
    assert secret is not None
    assert len(secret) >= 48


def test_no_two_keys_are_the_same_and_no_kit_holds_another_s(kits: Path) -> None:
    paths = [path for path in kits.rglob("*.key")]
    assert len({path.read_bytes() for path in paths}) == len(paths) == 6
    keys = {path: read_key(path).private_numbers().private_value for path in paths}
    assert len(set(keys.values())) == 6


def test_the_policy_is_refused_until_the_hospital_has_decided(kits: Path) -> None:
    with pytest.raises(PolicyRefused, match=r"epsilon.*delta.*public_patients"):
        load_site(kits / "north/hospital")
    fill_in(kits / "north")
    site = load_site(kits / "north/hospital")
    assert site.hospital.name == "north"
    assert site.labels == opened(kits / "north").federation.labels
    assert not site.privacy.allow_not_private


def test_what_the_federation_proposes_is_written_and_still_not_in_force() -> None:
    text = site_text("north", Labels(findings=("effusion",)), Proposal(epsilon=2.5, max_sampling_rate=0.25))
    assert f"{DECIDE}epsilon = 2.5" in text
    settings = tomllib.loads(text)
    assert "epsilon" not in settings["privacy"]
    assert settings["privacy"]["max_sampling_rate"] == 0.25


@pytest.mark.parametrize(
    "labels",
    [
        Labels(findings=("Erguss 胸水 😀", 'a "quoted" \\ one'), class_name="grade", class_values=("1", "2")),
        Labels(value_name="risk", value_range=(-1e-7, 2.5e30)),
        Labels(time_name="t", event_name="e", time_edges=(0.5, 90.0)),
    ],
)
def test_labels_of_every_kind_come_back_from_site_toml(labels: Labels) -> None:
    assert Labels.model_validate(tomllib.loads(site_text("north", labels, Proposal()))["labels"]) == labels


# --- running again --------------------------------------------------------------------------------------------------------


def test_running_again_changes_nothing(kits: Path) -> None:
    before = file_states(kits)
    done = provision(kits, port=opened(kits / "north").federation.coordinator.port)
    assert file_states(kits) == before
    assert not done.news


def test_a_new_hospital_is_added_and_only_what_names_it_changes(kits: Path) -> None:
    port = opened(kits / "north").federation.coordinator.port
    (kits / "north/hospital/site.toml").write_text("# filled in\n")
    before = file_states(kits)
    done = provision(kits, port=port, names=("north", "south", "east"))
    after = file_states(kits)
    changed = {name for name in before if before[name] != after[name]}
    shared = {f"{kit}/{file}" for kit in ("ca", "coordinator", "north", "south") for file in (FEDERATION, SIGNATURE)}
    assert changed == shared | {"ca/register.json"}
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"east"}
    assert opened(kits / "north").federation.serial == 2
    assert [member.name for member in opened(kits / "east").federation.hospitals] == ["north", "south", "east"]
    assert any("coordinator: copy" in line and "restart" in line for line in done.todo)


def test_a_kit_that_was_handed_over_is_not_made_again(kits: Path) -> None:
    port = opened(kits / "north").federation.coordinator.port
    shutil.rmtree(kits / "north")
    shutil.rmtree(kits / "coordinator")
    provision(kits, port=port)
    assert {p.name for p in kits.iterdir()} == {"ca", "south"}
    with office(kits, port=port) as opened_office:
        opened_office.renew("coordinator", new_keys=False)
        opened_office.provision()
    assert [p.name for p in (kits / "coordinator").iterdir()] == ["server.crt"]


@pytest.mark.parametrize("after", range(0, 40, 3))
def test_a_kill_at_any_write_is_finished_by_the_same_command(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    left = [after]
    place = provisioning.authority.place

    def dying(path: Path, content: bytes, *, private: bool = False) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        place(path, content, private=private)

    monkeypatch.setattr(provisioning.authority, "place", dying)
    try:
        provision(tmp_path / "kits")
    except Killed:
        monkeypatch.setattr(provisioning.authority, "place", place)
        provision(tmp_path / "kits")
    for name in ("coordinator", "north", "south"):
        kit = opened(tmp_path / "kits" / name)
        assert len(kit.federation.hospitals) == 2
    for name in ("north", "south"):
        key, certificate = (read(tmp_path / "kits" / name / file)
                            for read, file in ((read_key, "client.key"), (read_certificate, "client.crt")))  # fmt: skip
        assert key.public_key() == certificate.public_key()
    assert not list((tmp_path / "kits").rglob(".*.new"))


def test_a_damaged_ca_folder_is_not_replaced_by_a_new_one(kits: Path) -> None:
    port = opened(kits / "north").federation.coordinator.port
    for name in ("ca.key", "register.json"):
        content = (kits / "ca" / name).read_bytes()
        (kits / "ca" / name).unlink()
        with pytest.raises(ConfigError, match="missing") as caught:
            provision(kits, port=port)
        assert "backup" in caught.value.fix
        (kits / "ca" / name).write_bytes(content)
    (kits / "ca/register.json").write_text('{"issued": [{"name": "north", "certificate": "x"}]}')
    with pytest.raises(ConfigError, match="not valid"):
        provision(kits, port=port)


def test_another_federation_does_not_get_into_the_same_folder(kits: Path) -> None:
    path = written(kits.parent)
    path.write_text(path.read_text().replace('"chest"', '"heart"'))
    with (
        pytest.raises(ConfigError, match="another federation"),
        provisioning.open_office(kits, provisioning.Description.model_validate(tomllib.loads(path.read_text()))),
    ):
        pass


# --- withdrawn, renewed ---------------------------------------------------------------------------------------------------


def revoked_serials(kits: Path) -> set[int]:
    return {entry.serial_number for entry in x509.load_pem_x509_crl((kits / "coordinator/crl.pem").read_bytes())}


def test_a_withdrawn_hospital_is_on_the_list_and_in_the_signed_description(kits: Path) -> None:
    certificate = read_certificate(kits / "north/client.crt")
    with office(kits) as opened_office:
        opened_office.revoke("north")
    assert revoked_serials(kits) == {certificate.serial_number}
    member = opened(kits / "coordinator").federation.member("north")
    assert member is not None
    assert member.revoked
    assert any("crl.pem" in line and "restart" in line for line in opened_office.todo)
    shutil.copy(kits / "ca" / FEDERATION, kits / "north")
    shutil.copy(kits / "ca" / SIGNATURE, kits / "north")
    with pytest.raises(ConfigError, match="withdrawn"):
        open_kit(kits / "north")
    with office(kits) as again:
        again.revoke("north")
        again.provision()
    assert not again.news


def test_the_list_holds_as_long_as_the_ca(kits: Path) -> None:
    listed = x509.load_pem_x509_crl((kits / "coordinator/crl.pem").read_bytes())
    assert listed.next_update_utc == read_certificate(kits / "ca/ca.crt").not_valid_after_utc


def test_a_renewed_certificate_is_for_the_same_key_and_the_old_one_still_holds(kits: Path) -> None:
    before = read_certificate(kits / "north/client.crt")
    key = (kits / "north/client.key").read_bytes()
    with office(kits) as opened_office:
        opened_office.renew("north", new_keys=False)
    after = read_certificate(kits / "north/client.crt")
    assert after.public_key() == before.public_key()
    assert after.serial_number != before.serial_number
    assert (kits / "north/client.key").read_bytes() == key
    assert not revoked_serials(kits)


def test_renewal_works_after_the_kit_was_handed_over_and_makes_no_private_key(kits: Path) -> None:
    before = read_certificate(kits / "north/client.crt")
    shutil.rmtree(kits / "north")
    with office(kits) as opened_office:
        opened_office.renew("north", new_keys=False)
    assert [p.name for p in (kits / "north").iterdir()] == ["client.crt"]
    assert read_certificate(kits / "north/client.crt").public_key() == before.public_key()


def test_new_keys_withdraw_the_old_certificates_and_bring_a_withdrawn_hospital_back(kits: Path) -> None:
    old, node = read_certificate(kits / "north/client.crt"), (kits / "north/node.pub").read_text()
    with office(kits) as opened_office:
        opened_office.revoke("north")
        with pytest.raises(ConfigError, match="withdrawn") as caught:
            opened_office.renew("north", new_keys=False)
        assert "--new-keys" in caught.value.fix
        opened_office.renew("north", new_keys=True)
    new = read_certificate(kits / "north/client.crt")
    assert revoked_serials(kits) == {old.serial_number}
    assert new.public_key() == read_key(kits / "north/client.key").public_key() != old.public_key()
    kit = opened(kits / "north")
    member = kit.federation.member("north")
    assert member is not None
    assert member.node_key == (kits / "north/node.pub").read_text().strip() != node.strip()


def test_a_coordinator_that_moves_is_told_to_renew_and_gets_its_new_name(kits: Path) -> None:
    with office(kits, host="fl.example.org") as opened_office:
        opened_office.provision()
        assert any("--renew coordinator" in line for line in opened_office.todo)
        secret = (kits / "coordinator/superexec.secret").read_bytes()
        opened_office.renew("coordinator", new_keys=True)
    names = read_certificate(kits / "coordinator/server.crt").extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert (kits / "coordinator/superexec.secret").read_bytes() != secret
    assert opened(kits / "north").federation.coordinator.host == "fl.example.org"


def test_nobody_is_withdrawn_or_renewed_who_never_was_a_member(kits: Path) -> None:
    with office(kits) as opened_office:
        for act in (lambda: opened_office.revoke("west"), lambda: opened_office.renew("west", new_keys=False)):
            with pytest.raises(ConfigError, match="no member") as caught:
                act()
            assert "north, south" in caught.value.why


# --- tampering ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [FEDERATION, SIGNATURE])
def test_a_changed_description_does_not_open(kits: Path, file: str) -> None:
    path = kits / "north" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not signed"):
        open_kit(kits / "north")


def test_a_description_signed_by_another_ca_does_not_open(kits: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    provision(tmp_path / "other/kits")
    for file in (FEDERATION, SIGNATURE):
        shutil.copy(tmp_path / "other/kits/north" / file, kits / "north")
    with pytest.raises(ConfigError, match="not signed"):
        open_kit(kits / "north")


# --- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_makes_kits_and_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(tmp_path), str(tmp_path / "kits")
    assert main(["provision", str(path), "--out", out]) == 0
    said = capsys.readouterr().out
    assert "hand" in said
    assert "offline" in said
    assert "BEGIN" not in said
    assert main(["provision", str(path), "--out", out, "--revoke", "south"]) == 0
    assert "withdrawn" in capsys.readouterr().out
    assert json.loads((tmp_path / "kits/coordinator/federation.json").read_text())["serial"] == 2


@pytest.mark.parametrize(
    "flags",
    [
        [], ["--csr", "north", "--answer", "x"], ["f.toml", "--csr", "north"], ["f.toml", "--new-keys"],
        ["f.toml", "--revoke", "north", "--renew", "north"], ["f.toml", "--hospital", "x"], ["--csr", "../north"],
        ["f.toml", "--renew", "north", "--new-keys", "--request", "r.json"], ["nowhere.toml"],
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together_are_wrong_use_with_a_fix(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["provision", *flags, "--out", str(tmp_path / "out")]) == 2
    assert "fix:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
