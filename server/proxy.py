"""The coordinator's only open port: what hospitals may say to Flower's SuperLink, and nothing else.

    python -m server.proxy KIT

Flower serves its Control API (start a run, register a node: code at every hospital), its Runtime API and its Fleet API on one
port without a login. So the SuperLink listens on loopback, and this filter stands before it. A request passes if
- the connection shows a certificate of a hospital of this federation that is not revoked,
- it is a POST to one of the Fleet API's paths, with a body of known and bounded size,
- the SuperNode key in its headers is that hospital's, so that no hospital speaks for another,
- its signed time stamp was not seen before: Flower signs the time alone, so a captured header could be used again. The stamp
  is remembered and not the signature, of which anybody can make a second valid one (ECDSA),
- none of Flower's headers comes twice: of two, this filter and the SuperLink could read different ones.
GET /health is answered here. deploy/nginx.conf does the same with nginx, but for the last point.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import signal
import ssl
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from cryptography.x509.oid import NameOID

from fedmm.sites.kit import CA, CRL, FEDERATION, Kit, open_kit, read_federation
from fedmm.sites.logs import json_logs
from fedmm.sites.processes import LOGS, exits
from fedmm.sites.tls import server_context

log = logging.getLogger("fedmm.proxy")
FLEET = "/v1/fleet/"
CALLS = frozenset(
    f"{FLEET}{call}"
    for call in (
        *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages"),
        *("get-run", "get-fab", "push-object", "pull-object", "confirm-message-received"),
    )
)  # of flwr 1.41; registering a node is the coordinator's, on loopback
FLOWERS = b"flwr-"  # how the names of Flower's headers begin
KEY_HEADER, STAMP_HEADER = b"flwr-public-key", b"flwr-timestamp"
MAX_STAMP = 64  # bytes; Flower's have 32
MOST_STAMPS = 100_000  # of one hospital at once, 250 a second; a SuperNode makes a few
TOO_LONG = 413
MAX_BODY = 32 * 2**20  # Flower cuts arrays into pieces of 5 MiB
MAX_CONNECTIONS = 32  # of one hospital; a SuperNode needs three
HEAD_SECONDS, BODY_SECONDS, IDLE_SECONDS = 20.0, 60.0, 120.0  # guess: slower than that is a half-open socket
REMEMBER_SECONDS = 400.0  # Flower accepts a time stamp for 300 s and 5 s of skew on either side
PIECE = 2**18  # bytes read at once; with no task for each piece twice as fast as 2**16 was  # measured, bodies of 5 MiB


class Refused(Exception):
    """status: of the HTTP answer.  reason: said to the peer and written to the log."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Admission:
    """Who may say what. Reads the kit again when federation.json or crl.pem changes: a withdrawal needs no restart."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, dict[bytes, float]] = {}
        self._read: tuple[int, ...] = ()
        self._keys: dict[str, bytes] = {}
        self._revoked: set[int] = set()
        self._refresh()

    def _refresh(self) -> None:
        now = tuple((self._folder / name).stat().st_mtime_ns for name in (FEDERATION, CRL))
        if now == self._read:
            return
        members = read_federation(self._folder).hospitals
        self._keys = {member.name: header_of(member.node_key) for member in members if not member.revoked}
        revoked = x509.load_pem_x509_crl((self._folder / CRL).read_bytes())
        self._revoked = {entry.serial_number for entry in revoked}
        self._read = now

    def hospital(self, certificate: bytes | None) -> str:
        """Name of the hospital whose certificate (DER) this is. Raises: Refused."""
        self._refresh()
        if certificate is None:
            raise Refused(403, "no client certificate: connect with client.crt and client.key of the hospital's kit")
        shown = x509.load_der_x509_certificate(certificate)
        names = shown.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        name = str(names[0].value) if names else ""
        if shown.serial_number in self._revoked or name not in self._keys:
            raise Refused(403, "this certificate was withdrawn: ask the coordinator for a new kit")
        return name

    def check(self, hospital: str, request: h11.Request) -> None:
        """Raises: Refused."""
        method, target = request.method, request.target.decode("latin-1")
        headers = dict(request.headers)
        flowers = [name for name, _ in request.headers if name.startswith(FLOWERS)]
        if method != b"POST" or target not in CALLS:
            raise Refused(403, "only the Fleet API of a SuperNode passes here")
        size = headers.get(b"content-length", b"")
        if not size.isdigit() or b"transfer-encoding" in headers:
            raise Refused(411, "a body needs a content-length")
        if int(size) > MAX_BODY:
            raise Refused(TOO_LONG, f"a body may have {MAX_BODY} bytes")
        if len(flowers) != len(set(flowers)):
            raise Refused(403, "one of Flower's headers comes twice")
        if headers.get(KEY_HEADER) != self._keys[hospital]:
            raise Refused(403, "the SuperNode key is not the one of this hospital: take node.key from the same kit")
        self._once(hospital, headers.get(STAMP_HEADER, b""))

    def _once(self, hospital: str, stamp: bytes) -> None:
        if not 0 < len(stamp) <= MAX_STAMP:
            raise Refused(403, "a SuperNode sends the time that it signed")
        seen, now = self._seen.setdefault(hospital, {}), time.monotonic()
        while seen and (oldest := next(iter(seen.items())))[1] < now - REMEMBER_SECONDS:
            del seen[oldest[0]]
        if stamp in seen:
            raise Refused(403, "this signed time stamp was used before: a SuperNode signs each request anew")
        if len(seen) >= MOST_STAMPS:
            raise Refused(429, "too many requests of this hospital")
        seen[stamp] = now


def header_of(node_key: str) -> bytes:
    """What a SuperNode with this public key (an OpenSSH line) sends as KEY_HEADER."""
    key = load_ssh_public_key(node_key.encode())
    return base64.b64encode(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@dataclass
class Proxy:
    """Listens on `listen`, passes on to the SuperLink at 127.0.0.1:`link`."""

    admission: Admission
    server_tls: ssl.SSLContext
    link_tls: ssl.SSLContext
    link: int
    connections: dict[str, int] = field(default_factory=dict)

    async def serve(self, host: str, port: int, *, ready: asyncio.Event | None = None) -> None:
        """Until cancelled."""
        server = await asyncio.start_server(
            self._connection, host, port, ssl=self.server_tls, ssl_handshake_timeout=HEAD_SECONDS, limit=PIECE
        )
        log.info("listening on port %d", port)
        if ready is not None:
            ready.set()
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tls: ssl.SSLObject | None = writer.get_extra_info("ssl_object")
        peer = "?"
        try:
            peer = self.admission.hospital(tls.getpeercert(binary_form=True) if tls else None)
            if self.connections.get(peer, 0) >= MAX_CONNECTIONS:
                raise Refused(429, "too many connections of this hospital")
            self.connections[peer] = self.connections.get(peer, 0) + 1
            try:
                await self._requests(peer, reader, writer)
            finally:
                self.connections[peer] -= 1
        except Refused as refused:
            log.warning("refused %s: %s", peer, refused.reason)
            with contextlib.suppress(OSError, TimeoutError, h11.ProtocolError):
                await _answer(h11.Connection(h11.SERVER), writer, refused.status, {"detail": refused.reason})
        except (OSError, TimeoutError, h11.ProtocolError, asyncio.IncompleteReadError) as error:
            log.info("connection of %s ended: %s", peer, type(error).__name__)
        finally:
            writer.close()

    async def _requests(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection's requests, one after the other; the SuperLink gets one connection for them."""
        here = h11.Connection(h11.SERVER)
        link: _Link | None = None
        try:
            while True:
                request = await _next(here, reader, IDLE_SECONDS)
                if not isinstance(request, h11.Request):
                    return
                if request.method == b"GET" and request.target == b"/health":
                    await _drain(here, reader)
                    await _answer(here, writer, 200, {"status": "ok"})
                else:
                    try:
                        self.admission.hospital(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
                        self.admission.check(peer, request)
                        if link is None or link.reader.at_eof():
                            link = await _Link.open(self.link, self.link_tls)
                    except Refused as refused:
                        log.warning("refused %s: %s", peer, refused.reason)
                        if refused.status != TOO_LONG:
                            await _drain(here, reader)  # the reset of a half-read connection could overtake the answer
                        await _answer(here, writer, refused.status, {"detail": refused.reason})
                        if refused.status == TOO_LONG:
                            return
                    else:
                        if not await link.exchange(request, here, reader, writer):
                            return
                if here.our_state is h11.MUST_CLOSE or here.their_state is h11.MUST_CLOSE:
                    return
                here.start_next_cycle()
        finally:
            if link is not None:
                link.writer.close()


@dataclass
class _Link:
    """A connection to the SuperLink."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    state: h11.Connection

    @classmethod
    async def open(cls, port: int, tls: ssl.SSLContext) -> _Link:
        """Raises: Refused while the SuperLink is being started."""
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls, limit=PIECE)
        except (OSError, TimeoutError):
            raise Refused(503, "the coordinator's SuperLink is not running; it is being started again") from None
        return cls(reader, writer, h11.Connection(h11.CLIENT))

    async def exchange(
        self, request: h11.Request, here: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Pass the request on and its answer back. False when this was the last one of the connection."""
        headers = [(k, v) for k, v in request.headers if k not in (b"host", b"connection", b"expect")]
        host = (b"host", b"127.0.0.1")
        first = h11.Request(method=request.method, target=request.target, headers=[host, *headers])
        self.writer.write(self.state.send(first) or b"")
        while isinstance(piece := await _next(here, reader, BODY_SECONDS), h11.Data):
            self.writer.write(self.state.send(piece) or b"")
            async with asyncio.timeout(BODY_SECONDS):
                await self.writer.drain()
        self.writer.write(self.state.send(h11.EndOfMessage()) or b"")
        while True:
            answer = await _next(self.state, self.reader, BODY_SECONDS)
            if isinstance(answer, h11.Response):
                kept = [(k, v) for k, v in answer.headers if k not in (b"connection", b"server")]
                # After a 500 (a full disk) Flower's SuperNode never beats again, though it runs on; a 503 it waits out.
                status = 503 if answer.status_code == 500 else answer.status_code
                answer = h11.Response(status_code=status, headers=kept, reason=answer.reason)
            if isinstance(answer, h11.Response | h11.Data | h11.EndOfMessage):
                writer.write(here.send(answer) or b"")
                async with asyncio.timeout(BODY_SECONDS):
                    await writer.drain()
            if isinstance(answer, h11.EndOfMessage):
                break
            if isinstance(answer, h11.ConnectionClosed):
                return False
        if self.state.our_state is h11.MUST_CLOSE or self.state.their_state is h11.MUST_CLOSE:
            return False
        self.state.start_next_cycle()
        return True


async def _next(state: h11.Connection, reader: asyncio.StreamReader, seconds: float) -> Any:
    """The next event of a peer. Raises: TimeoutError, h11.RemoteProtocolError (also for a head that is too long)."""
    while True:
        event = state.next_event()
        if event is not h11.NEED_DATA:
            return event
        if state.they_are_waiting_for_100_continue:
            raise Refused(417, "no waiting for 100-continue")
        async with asyncio.timeout(seconds):  # wait_for would make a task for each piece
            piece = await reader.read(PIECE)
        state.receive_data(piece)


async def _drain(state: h11.Connection, reader: asyncio.StreamReader) -> None:
    """Read the rest of a request whose body is of no use. Raises: TimeoutError, h11.RemoteProtocolError for a long one."""
    read = 0
    while isinstance(piece := await _next(state, reader, BODY_SECONDS), h11.Data):
        read += len(piece.data)
        if read > MAX_BODY:
            raise h11.RemoteProtocolError("a body that is longer than allowed")


async def _answer(state: h11.Connection, writer: asyncio.StreamWriter, status: int, said: dict[str, str]) -> None:
    """An answer of our own. On a fresh `state` the request was not read to its end, so the connection closes after it."""
    body = json.dumps(said).encode()
    fresh = state.their_state is h11.IDLE
    if fresh:
        state.receive_data(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        state.next_event()
        state.next_event()
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("date", date)]
    events = (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage())
    writer.write(b"".join(state.send(event) or b"" for event in events))
    async with asyncio.timeout(BODY_SECONDS):
        await writer.drain()


def of_kit(kit: Kit) -> Proxy:
    link_tls = ssl.create_default_context(cafile=str(kit.file(CA)))
    return Proxy(Admission(kit.folder), server_context(kit), link_tls, kit.config.ports.link)


async def _run(kit: Kit) -> None:
    here = asyncio.current_task()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, here.cancel if here else sys.exit)
    with contextlib.suppress(asyncio.CancelledError):
        await of_kit(kit).serve(kit.config.ports.listen, kit.federation.coordinator.port)


def main() -> None:
    os.umask(0o077)
    kit = open_kit(Path(sys.argv[1]), role="coordinator")
    with json_logs(kit.make_state() / LOGS, "proxy"):
        asyncio.run(_run(kit))


if __name__ == "__main__":
    exits(main)
