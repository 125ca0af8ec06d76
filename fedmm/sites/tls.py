"""TLS between hospitals and coordinator: both ends show a certificate of the federation's CA, and each failure is explained.

TLS 1.3 only: both ends are fedmm's, on a Python whose OpenSSL has it. There the coordinator judges a hospital's certificate
after the hospital believes to be connected: its refusal comes with the first bytes that are read (`ask_health` waits for them).
"""

from __future__ import annotations

import http.client
import select
import socket
import ssl
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from fedmm.errors import ConfigError, FedmmError, RunFailed
from fedmm.sites import authority, kit
from fedmm.sites.kit import Kit

CONNECT_SECONDS = 10.0
VERDICT_SECONDS = (
    2.0  # for the first bytes after the handshake; a server that sends none (no session tickets) costs this wait
)


def server_context(opened: Kit) -> ssl.SSLContext:
    """For the coordinator: who has no valid certificate of the CA, or a withdrawn one, does not get in. Raises: ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    _load(context, opened, kit.SERVER_CERT, kit.SERVER_KEY)
    try:
        context.load_verify_locations(opened.file(kit.CRL))
    except (OSError, ssl.SSLError):
        raise ConfigError(f"{opened.file(kit.CRL)} cannot be read", fix="copy KITS/ca/crl.pem into the kit") from None
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def client_context(opened: Kit) -> ssl.SSLContext:
    """For a hospital: nobody but the coordinator under its own name, by this CA alone. Raises: ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the host's name
    _load(context, opened, kit.CLIENT_CERT, kit.CLIENT_KEY)
    return context


def _load(context: ssl.SSLContext, opened: Kit, certificate: str, key: str) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        # a key with a password would ask for it on the terminal: a service has none
        context.load_cert_chain(opened.file(certificate), opened.file(key), password="")
        context.load_verify_locations(opened.file(kit.CA))
    except ssl.SSLError as error:
        mixed = "VALUES_MISMATCH" in str(error)
        raise ConfigError(
            f"{certificate} and {key} of {opened.folder} do not belong together" if mixed else
            f"{certificate}, {key} or {kit.CA} of {opened.folder} is damaged",
            fix="take them from the same kit; the coordinator renews it: fedmm provision --renew",
        ) from None  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"{certificate}, {key} or {kit.CA} of {opened.folder} cannot be read ({error.strerror})",
            fix="take it from the kit again",
        ) from None


# --- one question to the coordinator ----------------------------------------------------------------------------------


class Health(NamedTuple):
    """status: of HTTP.  ahead: seconds that this clock is ahead of the coordinator's, to a second; None if it said nothing."""

    status: int
    ahead: float | None


def ask_health(opened: Kit, *, timeout: float = CONNECT_SECONDS) -> Health:
    """GET /health at the coordinator, as the hospital of this kit. Raises: FedmmError that says why it failed."""
    context, there = client_context(opened), opened.federation.coordinator
    try:
        with (
            socket.create_connection((there.host, there.port), timeout=timeout) as plain,
            context.wrap_socket(plain, server_hostname=there.host) as wrapped,
        ):
            _await_verdict(wrapped, timeout)
            began = time.time()
            host = f"[{there.host}]" if ":" in there.host else there.host
            wrapped.sendall(f"GET /health HTTP/1.1\r\nHost: {host}:{there.port}\r\nConnection: close\r\n\r\n".encode())
            reply = http.client.HTTPResponse(wrapped)
            reply.begin()
            now = (began + time.time()) / 2
            return Health(reply.status, _ahead(reply.getheader("Date"), now))
    except (OSError, http.client.HTTPException) as error:
        raise explain_tls(error, opened) from None


def _await_verdict(wrapped: ssl.SSLSocket, timeout: float) -> None:
    """Wait until the server has judged our certificate: it then sends session tickets, or an alert, which raises SSLError.

    Before the request: a server that hangs up on unread bytes sends a reset, and a reset swallows the alert.
    """
    if not select.select([wrapped], [], [], min(VERDICT_SECONDS, timeout))[0]:
        return
    wrapped.setblocking(False)
    try:
        if wrapped.recv(1) == b"":
            raise ConnectionResetError
        raise http.client.BadStatusLine("bytes before the question")
    except ssl.SSLWantReadError:  # tickets only
        wrapped.settimeout(timeout)


def _ahead(date: str | None, now: float) -> float | None:
    try:
        said = parsedate_to_datetime(date or "")
    except ValueError:
        return None
    return now - (said if said.tzinfo else said.replace(tzinfo=UTC)).timestamp()


# --- what an error means ----------------------------------------------------------------------------------------------

# X509_V_ERR_… of OpenSSL (x509_vfy.h): what we found wrong with the other side's certificate
FOUND = {
    2: "stranger", 7: "stranger", 18: "stranger", 19: "stranger", 20: "stranger", 21: "stranger", 30: "stranger",
    9: "early", 10: "expired", 23: "revoked", 26: "purpose", 62: "name", 64: "name",
    3: "list", 11: "list", 12: "list", 33: "list",
}  # fmt: skip
# in OpenSSL's name of an alert: what the other side found wrong with ours
TOLD = {
    "UNKNOWN_CA": "stranger", "DECRYPT_ERROR": "stranger", "CERTIFICATE_EXPIRED": "expired", "CERTIFICATE_REVOKED": "revoked",
    "CERTIFICATE_REQUIRED": "none", "UNSUPPORTED_CERTIFICATE": "purpose", "BAD_CERTIFICATE": "bad", "CERTIFICATE_UNKNOWN": "bad",
    "PROTOCOL_VERSION": "version", "HANDSHAKE_FAILURE": "version",
}  # fmt: skip
NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH", "UNKNOWN_PROTOCOL")
Said = tuple[str, str, str]

RENEW = "at the coordinator: fedmm provision federation.toml --out KITS --renew {name}; then copy {cert} into {here}"
AT_HOSPITAL: Mapping[str, Said] = {
    "found stranger": (
        "the server at {there} is not of this federation",
        "its certificate comes from another CA than ca.crt of this kit, or something on the way opens TLS",
        "compare ca.crt of both kits; no TLS inspection between hospital and coordinator",
    ),
    "found expired": (
        "the coordinator's certificate at {there} has expired",
        "by this machine's clock, {now}",
        "at the coordinator: --renew coordinator; first see that the clock here is right",
    ),
    "found early": (
        "the coordinator's certificate at {there} is not valid yet",
        "by this machine's clock, {now}",
        "set the clock here (NTP); or the coordinator's certificate was made with a wrong one: --renew coordinator",
    ),
    "found name": (
        "the server at {there} has a certificate of another name",
        "federation.json names {host}, the certificate does not",
        "at the coordinator: host in federation.toml, then --renew coordinator; or the address leads to another machine",
    ),
    "found purpose": (
        "the certificate at {there} is not one of a server",
        "a hospital's certificate is used there",
        "at the coordinator: server.crt of its own kit",
    ),
    "told stranger": (
        "the coordinator at {there} does not know the CA of {cert}",
        "the kit comes from another federation or an older CA; or the coordinator's crl.pem does not fit its ca.crt",
        "compare ca.crt of both kits; take {cert}, ca.crt and federation.json from the same provisioning",
    ),
    "told expired": (
        "the coordinator at {there} says that {cert} has expired",
        "it holds until {until}; the clock here says {now}, and the coordinator's may differ",
        RENEW + "; or set the coordinator's clock",
    ),
    "told revoked": (
        "{name} was withdrawn: the coordinator at {there} refuses {cert}",
        "it stands on the revocation list of the federation",
        "ask the coordinator why; to come back: --renew {name} --new-keys there, and a new kit here",
    ),
    "told none": (
        "the coordinator at {there} got no certificate from us",
        "something on the way ends TLS, or this program does not send {cert}",
        "connect without a proxy that opens TLS; take part with: fedmm site up {here}",
    ),
    "told purpose": (
        "the coordinator at {there} does not take {cert} for a hospital's",
        "a server's certificate is used here",
        "take client.crt of this hospital's own kit",
    ),
    "told bad": (
        "the coordinator at {there} refuses {cert}",
        "it is not valid yet by the coordinator's clock, or damaged; it holds from {since}, the clock here says {now}",
        "see that both clocks are right (NTP); else: " + RENEW,
    ),
}
AT_COORDINATOR: Mapping[str, Said] = {
    "found stranger": (
        "a hospital's certificate comes from another CA",
        "its kit is of another federation or of an older CA",
        "give it a kit of this one: fedmm provision federation.toml --out KITS",
    ),
    "found expired": (
        "a hospital's certificate has expired",
        "by this machine's clock, {now}",
        "fedmm provision federation.toml --out KITS --renew HOSPITAL; first see that the clock here is right",
    ),
    "found early": (
        "a hospital's certificate is not valid yet",
        "by this machine's clock, {now}",
        "set the clock here (NTP)",
    ),
    "found revoked": (
        "a hospital that was withdrawn tried to connect",
        "its certificate stands in crl.pem",
        "nothing; to take it back: --renew HOSPITAL --new-keys",
    ),
    "found none": (
        "somebody without a certificate tried to connect",
        "only hospitals with a kit get in",
        "nothing, if it was a browser or a scanner; else: take part with fedmm site up KIT",
    ),
    "found purpose": (
        "a hospital showed a certificate that is not a hospital's",
        "a server's certificate is used there",
        "give it its own client.crt",
    ),
    "found list": (
        "the revocation list cannot be used, so nobody gets in",
        "crl.pem has run out, or is of another CA than ca.crt",
        "copy KITS/ca/crl.pem into {here}, and restart",
    ),
    "told stranger": (
        "a hospital does not know the CA of {cert}",
        "its kit is of another federation or of an older CA",
        "give it a kit of this one",
    ),
    "told expired": (
        "a hospital says that {cert} has expired",
        "it holds until {until}; the clock here says {now}",
        RENEW + "; or set the hospital's clock",
    ),
    "told bad": (
        "a hospital refuses {cert}",
        "it was reached under a name that is not in it, or its clock is before {since}",
        "hospitals use {host}; a further name: [coordinator] names in federation.toml, then --renew coordinator",
    ),
}
AT_BOTH: Mapping[str, Said] = {
    "refused": (
        "nothing listens at {there}",
        "the connection was refused",
        "start the coordinator (fedmm coordinator up KIT); check host and port in federation.toml, and the firewall",
    ),
    "unresolved": (
        "the name {host} is not known here",
        "it could not be resolved to an address",
        "check [coordinator] host in federation.toml and this machine's DNS",
    ),
    "timeout": (
        "{there} does not answer in time",
        "a firewall drops the packets, or the machine is down",
        "open port {port} from here to the coordinator, outgoing only",
    ),
    "unreachable": (
        "{host} cannot be reached from here",
        "there is no route to it",
        "check this machine's network and its firewall",
    ),
    "not tls": (
        "the other side at {there} does not speak TLS",
        "it speaks plain HTTP or something else: another program has the port, or an end was started without its kit",
        "start it with fedmm coordinator up KIT, which speaks TLS only; check the port",
    ),
    "version": (
        "both sides at {there} find no common TLS",
        "fedmm speaks TLS 1.3 only",
        "connect directly to the coordinator, without a proxy that opens TLS; update OpenSSL",
    ),
    "closed": (
        "{there} closed the connection without a word",
        "a firewall or proxy cut it, the coordinator is stopping, or it refused {cert} and the reason was lost",
        "look into the coordinator's log; try again",
    ),
    "not fedmm": (
        "the server at {there} does not answer as a coordinator",
        "its answer is no HTTP",
        "check host and port in federation.toml",
    ),
    "unknown": ("the connection to {there} failed ({kind})", "", "run fedmm doctor at both ends"),
}
WRONG_KIT = ("found", "told")  # somebody has to change a file; all else may pass by itself


def explain_tls(error: BaseException, opened: Kit) -> FedmmError:
    """What an error of a connection attempt means for whoever has this kit, why, and how to mend it.

    Returns, for the caller to raise or to log: ConfigError where a certificate, key or clock must change, else RunFailed.
    """
    error = _root(error)
    what = condition(error)
    mine = AT_COORDINATOR if opened.is_coordinator else AT_HOSPITAL
    said = mine.get(what) or AT_BOTH.get(what.removeprefix("told ")) or AT_BOTH["unknown"]
    facts = _facts(error, opened)
    kind = ConfigError if what in mine else RunFailed
    message, why, fix = (text.format(**facts) for text in said)
    return kind(message, why=why, fix=fix)


def _root(error: BaseException) -> BaseException:
    """HTTP libraries wrap what the socket said: the first error of the system's in the chain, or the error itself."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError | http.client.HTTPException):
        inner = inner.__cause__ or inner.__context__
    return inner or error


def condition(error: BaseException) -> str:
    """A key of the tables above. found …: what we found wrong with the other side; told …: what it found wrong with us."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"found {FOUND.get(error.verify_code, 'stranger')}"
    if isinstance(error, ssl.SSLError):
        text = str(error).upper()  # has the reason in brackets; the attribute is not always there
        if "DID_NOT_RETURN_A_CERTIFICATE" in text:
            return "found none"
        if any(mark in text for mark in NOT_TLS):
            return "not tls"
        if "ALERT" in text:
            return "told " + next((kind for mark, kind in TOLD.items() if mark in text), "unknown")
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError) or "EOF" in text:
            return "closed"
        return "version" if "PROTOCOL" in text or "NO_SHARED" in text else "unknown"
    for kinds, name in (
        (socket.gaierror, "unresolved"),
        (TimeoutError, "timeout"),
        (ConnectionRefusedError, "refused"),
        ((ConnectionError, http.client.RemoteDisconnected), "closed"),
        (http.client.HTTPException, "not fedmm"),
    ):
        if isinstance(error, kinds):
            return name
    return "unreachable" if isinstance(error, OSError) and error.errno else "unknown"


def _facts(error: BaseException, opened: Kit) -> dict[str, object]:
    there, own = opened.federation.coordinator, kit.SERVER_CERT if opened.is_coordinator else kit.CLIENT_CERT
    try:
        certificate = authority.read_certificate(opened.file(own))
        since, until = (
            f"{when:%Y-%m-%d %H:%M} UTC" for when in (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
        )
    except ConfigError:
        since = until = "unknown"  # it is what is wrong, perhaps
    return {
        "there": f"{there.host}:{there.port}",
        "host": there.host,
        "port": there.port,
        "name": opened.name,
        "cert": own,
        "here": opened.folder,
        "now": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "since": since,
        "until": until,
        "kind": type(error).__name__,
    }
