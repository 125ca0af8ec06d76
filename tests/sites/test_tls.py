"""The first connection: who gets in, and a message with a fix for everybody who does not, at both ends."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from fedmm.errors import ConfigError, FedmmError, RunFailed
from fedmm.sites import authority
from fedmm.sites.tls import (
    AT_BOTH,
    AT_COORDINATOR,
    AT_HOSPITAL,
    ask_health,
    client_context,
    explain_tls,
    server_context,
)
from tests.sites.federation import Listener, office, opened, provision

Move = Callable[[timedelta], None]


@pytest.fixture
def other(tmp_path: Path, listener: Listener) -> Path:
    """The kits of another federation of the same name and port."""
    (tmp_path / "other").mkdir()
    provision(tmp_path / "other/kits", port=listener.port)
    return tmp_path / "other/kits"


def refused(kits: Path, listener: Listener, *, server: ssl.SSLContext | None = None, name: str = "north") -> FedmmError:
    """What the hospital is told. server: the coordinator's context, if it is not that of its kit."""
    context = server or server_context(opened(kits / "coordinator"))
    with listener.answering(context), pytest.raises(FedmmError) as caught:
        ask_health(opened(kits / name), timeout=5)
    assert caught.value.fix
    return caught.value


def seen(kits: Path, listener: Listener) -> FedmmError:
    """What the coordinator says about the same attempt."""
    return explain_tls(listener.errors[0], opened(kits / "coordinator"))


def renew(kits: Path, name: str, **described: object) -> None:
    with office(kits, port=opened(kits / "north").federation.coordinator.port, **described) as at_work:
        at_work.renew(name, new_keys=False)


def test_a_hospital_of_the_federation_gets_in(kits: Path, listener: Listener) -> None:
    with listener.answering(server_context(opened(kits / "coordinator"))):
        for name in ("north", "south"):
            health = ask_health(opened(kits / name))
            assert health.status == 200
            assert health.ahead is not None
            assert abs(health.ahead) < 60  # this machine's own clock; 60 for one that is very busy
    assert not listener.errors


def test_both_sides_speak_tls_1_3_only(kits: Path) -> None:
    for context in (server_context(opened(kits / "coordinator")), client_context(opened(kits / "north"))):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED


def test_a_server_of_another_ca_is_not_believed(kits: Path, other: Path, listener: Listener) -> None:
    error = refused(kits, listener, server=server_context(opened(other / "coordinator")))
    assert "not of this federation" in error.what
    assert "does not know the CA" in seen(kits, listener).what


def test_a_hospital_of_another_ca_does_not_get_in(kits: Path, other: Path, listener: Listener) -> None:
    shutil.copy(kits / "north/ca.crt", other / "north")  # it believes the server, and is not believed
    for file in ("federation.json", "federation.sig"):
        shutil.copy(kits / "north" / file, other / "north")
    with listener.answering(server_context(opened(kits / "coordinator"))), pytest.raises(ConfigError) as caught:
        ask_health(opened(other / "north"))
    assert "does not know the CA of client.crt" in caught.value.what
    assert "another CA" in seen(kits, listener).what


def test_a_hospital_s_expired_certificate_is_named_at_both_ends(
    kits: Path, listener: Listener, move_clock: Move
) -> None:
    move_clock(timedelta(days=-400))
    renew(kits, "north")
    error = refused(kits, listener)
    assert "client.crt has expired" in error.what
    assert "--renew north" in error.fix
    assert "hospital's certificate has expired" in seen(kits, listener).what


def test_a_hospital_s_certificate_of_the_future_is_named_at_both_ends(
    kits: Path, listener: Listener, move_clock: Move
) -> None:
    move_clock(timedelta(days=2))
    renew(kits, "north")
    error = refused(kits, listener)
    assert "not valid yet by the coordinator's clock" in error.why
    assert "not valid yet" in seen(kits, listener).what


@pytest.mark.parametrize(("days", "said"), [(-400, "has expired"), (2, "not valid yet")])
def test_the_coordinator_s_dates_are_checked(
    kits: Path, listener: Listener, move_clock: Move, days: int, said: str
) -> None:
    move_clock(timedelta(days=days))
    renew(kits, "coordinator")
    error = refused(kits, listener)
    assert (
        f"the coordinator's certificate at localhost:{listener.port} {said}".replace("not valid", "is not valid")
        in error.what
    )
    assert "server.crt" in seen(kits, listener).what


def test_a_server_of_another_name_is_not_believed(
    kits: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority, "LOOPBACK", ())
    key = authority.read_key(kits / "coordinator/server.key").public_key()
    with office(kits, port=listener.port) as at_work:
        certificate = at_work.authority.server(["fl.example.org"], key, days=1)
    (kits / "coordinator/server.crt").write_bytes(authority.certificate_pem(certificate))
    error = refused(kits, listener)
    assert "certificate of another name" in error.what
    assert "--renew coordinator" in error.fix
    assert "reached under a name that is not in it" in seen(kits, listener).why


def test_a_withdrawn_hospital_is_told_so(kits: Path, listener: Listener) -> None:
    stale = {file: (kits / "north" / file).read_bytes() for file in ("federation.json", "federation.sig")}
    with office(kits, port=listener.port) as at_work:
        at_work.revoke("north")
    for file, content in stale.items():  # it has not heard of it yet
        (kits / "north" / file).write_bytes(content)
    error = refused(kits, listener)
    assert "north was withdrawn" in error.what
    assert "withdrawn" in seen(kits, listener).what
    with listener.answering(server_context(opened(kits / "coordinator"))):
        assert ask_health(opened(kits / "south")).status == 200


def test_who_shows_no_certificate_does_not_get_in(kits: Path, listener: Listener) -> None:
    bare = ssl.create_default_context(cafile=str(kits / "north/ca.crt"))
    with (
        listener.answering(server_context(opened(kits / "coordinator"))),
        socket.create_connection(("localhost", listener.port), timeout=5) as plain,
        bare.wrap_socket(plain, server_hostname="localhost") as wrapped,
        pytest.raises(ssl.SSLError) as caught,
    ):
        wrapped.recv(1)
    assert "got no certificate from us" in explain_tls(caught.value, opened(kits / "north")).what
    assert "without a certificate" in seen(kits, listener).what


def test_a_server_s_certificate_is_no_hospital_s(kits: Path, listener: Listener) -> None:
    for mine, theirs in (("client.crt", "server.crt"), ("client.key", "server.key")):
        shutil.copy(kits / "coordinator" / theirs, kits / "north" / mine)
    assert "does not take client.crt for a hospital's" in refused(kits, listener).what
    assert "not a hospital's" in seen(kits, listener).what


def test_a_hospital_cannot_play_the_coordinator(kits: Path, listener: Listener) -> None:
    for mine, theirs in (("server.crt", "client.crt"), ("server.key", "client.key")):
        shutil.copy(kits / "south" / theirs, kits / "coordinator" / mine)
    assert "not one of a server" in refused(kits, listener).what


def test_a_revocation_list_of_another_ca_lets_nobody_in(kits: Path, other: Path, listener: Listener) -> None:
    shutil.copy(other / "coordinator/crl.pem", kits / "coordinator")
    refused(kits, listener)
    assert "revocation list cannot be used" in seen(kits, listener).what


def test_a_closed_port_is_told_apart_from_a_refusal(kits: Path, listener: Listener) -> None:
    with pytest.raises(RunFailed, match="nothing listens") as caught:
        ask_health(opened(kits / "north"))
    assert "fedmm coordinator" in caught.value.fix


def test_plain_http_on_the_port_is_named(kits: Path, listener: Listener) -> None:
    with listener.answering(None), pytest.raises(RunFailed, match="does not speak TLS"):
        ask_health(opened(kits / "north"))


def test_plain_http_sent_to_the_coordinator_is_named(kits: Path, listener: Listener) -> None:
    with (
        listener.answering(server_context(opened(kits / "coordinator"))),
        socket.create_connection(("127.0.0.1", listener.port), timeout=5) as plain,
    ):
        plain.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            plain.recv(100)
    assert "does not speak TLS" in seen(kits, listener).what


def test_silence_is_named(kits: Path, listener: Listener) -> None:
    with listener.answering(None, silent=True), pytest.raises(RunFailed, match="does not answer in time"):
        ask_health(opened(kits / "north"), timeout=0.2)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (socket.gaierror(-2, "Name or service not known"), "not known here"),
        (OSError(113, "No route to host"), "cannot be reached"),
        (ConnectionResetError(104, "reset"), "closed the connection"),
        (ssl.SSLEOFError(8, "EOF occurred"), "closed the connection"),
        (ssl.SSLError(1, "[SSL: TLSV1_ALERT_PROTOCOL_VERSION] tlsv1 alert protocol version"), "no common TLS"),
        (ssl.SSLError(1, "[SSL: SOMETHING_NEW] new"), "failed (SSLError)"), (ValueError("x"), "failed (ValueError)"),
    ],
)  # fmt: skip
def test_every_other_error_has_its_own_message(kits: Path, error: Exception, said: str) -> None:
    for name in ("north", "coordinator"):
        explained = explain_tls(error, opened(kits / name))
        assert said in explained.what
        assert explained.fix


def test_an_error_that_a_library_has_wrapped_is_explained_too(kits: Path) -> None:
    wrapped = RuntimeError("all attempts failed")
    wrapped.__cause__ = ConnectionRefusedError(111, "refused")
    assert "nothing listens" in explain_tls(wrapped, opened(kits / "north")).what


def test_no_two_conditions_say_the_same_and_each_has_a_fix() -> None:
    for table in (AT_HOSPITAL, AT_COORDINATOR, AT_BOTH):
        assert len({what for what, _, _ in table.values()}) == len(table)
        assert all(fix for _, _, fix in table.values())


@pytest.mark.parametrize("file", ["client.crt", "client.key", "ca.crt"])
def test_a_damaged_or_missing_file_of_the_kit_is_named(kits: Path, file: str) -> None:
    kit = opened(kits / "north")
    (kits / "north" / file).write_text("damaged")
    with pytest.raises(ConfigError, match=file):
        client_context(kit)
    (kits / "north" / file).unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        client_context(kit)


def test_a_key_of_another_certificate_or_with_a_password_is_no_prompt(kits: Path) -> None:
    shutil.copy(kits / "south/client.key", kits / "north")
    with pytest.raises(ConfigError, match="do not belong together"):
        client_context(opened(kits / "north"))
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

    locked = authority.new_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (kits / "north/client.key").write_bytes(locked)
    with pytest.raises(ConfigError, match="damaged"):
        client_context(opened(kits / "north"))
