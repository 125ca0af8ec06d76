"""The coordinator's open port: a SuperNode's words pass, everything else is told why not."""

from __future__ import annotations

import asyncio
import base64
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h11
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.supernode import node_key
from fedmm.sites.kit import CA, SERVER_CERT, SERVER_KEY, Kit, open_kit
from fedmm.sites.tls import client_context
from server import proxy
from server.proxy import KEY_HEADER, MAX_BODY, MAX_STAMP, STAMP_HEADER, Admission, Proxy, Refused, header_of, of_kit
from tests.sites.federation import office, provision

P384_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
PULL = "/v1/fleet/pull-messages"
SIGNATURE = "flwr-signature"
FULL = b"no space left"  # to which the stand-in answers as a SuperLink whose disk is full


class _SuperLink(http.server.BaseHTTPRequestHandler):
    """Says back what it was sent."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(500 if body == FULL else 200)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-path", self.path)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_: object) -> None: ...


class Link:
    """A SuperLink's stand-in on loopback, with the coordinator's certificate."""

    def __init__(self, kit: Kit, port: int) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _SuperLink)
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(kit.file(SERVER_CERT), kit.file(SERVER_KEY))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Running:
    """The proxy, in a thread with a loop of its own."""

    def __init__(self, made: Proxy, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def serve() -> None:
            here = asyncio.Event()
            task = asyncio.ensure_future(made.serve("127.0.0.1", port, ready=here))
            await here.wait()
            ready.set()
            await task

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._task = self._loop.create_task(serve())
            try:
                self._loop.run_until_complete(self._task)
            except asyncio.CancelledError:
                rest = asyncio.all_tasks(self._loop)
                for task in rest:
                    task.cancel()
                self._loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
                self._loop.run_until_complete(asyncio.sleep(0.05))  # transports close
            finally:
                self._loop.close()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)
        assert not self._thread.is_alive()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    provision(tmp_path / "kits", port=free_port())
    coordinator = tmp_path / "kits/coordinator/kit.toml"
    coordinator.write_text(coordinator.read_text().partition("[ports]")[0] + f"[ports]\nlink = {free_port()}\n")
    return tmp_path / "kits"


@pytest.fixture
def coordinator(federation: Path) -> Kit:
    return open_kit(federation / "coordinator")


@pytest.fixture
def link(coordinator: Kit) -> Iterator[Link]:
    running = Link(coordinator, coordinator.config.ports.link)
    yield running
    running.stop()


@pytest.fixture
def port(coordinator: Kit, link: Link) -> Iterator[int]:
    port = coordinator.federation.coordinator.port
    running = Running(of_kit(coordinator), port)
    yield port
    running.stop()


def hospital(federation: Path, name: str, port: int) -> httpx.Client:
    return httpx.Client(base_url=f"https://localhost:{port}", verify=client_context(open_kit(federation / name)))


def signed(federation: Path, name: str) -> dict[str, str]:
    """Headers as flwr's NodeAuthHttpInterceptor makes them."""
    kit = open_kit(federation / name)
    member = kit.federation.member(name)
    assert member is not None
    stamp = repr(time.time_ns())
    signature = node_key(kit).sign(stamp.encode(), ec.ECDSA(SHA256()))
    return {
        KEY_HEADER.decode(): header_of(member.node_key).decode(),
        SIGNATURE: base64.b64encode(signature).decode(),
        STAMP_HEADER.decode(): stamp,
    }


def test_what_a_supernode_says_passes_and_the_answer_comes_back(federation: Path, port: int) -> None:
    with hospital(federation, "north", port) as north:
        for body in (b"", b"x", bytes(range(256)) * 4096 * 6):
            said = north.post(PULL, content=body, headers=signed(federation, "north"))
            assert (said.status_code, said.content, said.headers["x-path"]) == (200, body, PULL)


def test_health_is_answered_here_with_the_date(federation: Path, port: int) -> None:
    with hospital(federation, "north", port) as north:
        said = north.get("/health")
    assert said.status_code == 200
    assert said.json() == {"status": "ok"}
    assert said.headers["date"].endswith("GMT")


CLOSED = """
/v1/control/start-run /v1/control/register-node /v1/runtime/acquire-task /v1/runtime/pull-task-input /v1/fleet/register-node
/v1/fleet/unregister-node /v1/fleet/../control/start-run /v1/fleet/%2e%2e/docs /docs /openapi.json / //v1/fleet/pull-messages
/v1/fleet/pull-messages?x=1 /v1/fleet/pull-messages/
"""


@pytest.mark.parametrize("path", CLOSED.split())
def test_a_hospital_reaches_nothing_but_the_fleet_api(federation: Path, port: int, path: str) -> None:
    context = client_context(open_kit(federation / "north"))
    with socket.create_connection(("localhost", port), timeout=10) as plain:
        wrapped = context.wrap_socket(plain, server_hostname="localhost")
        with wrapped:
            head = "".join(f"{k}: {v}\r\n" for k, v in signed(federation, "north").items())
            wrapped.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n{head}\r\nx".encode())
            said = wrapped.recv(65536)
    assert said.startswith(b"HTTP/1.1 403 "), said
    assert b"only the Fleet API" in said


def test_getting_is_not_posting(federation: Path, port: int) -> None:
    with hospital(federation, "north", port) as north:
        assert north.get(PULL, headers=signed(federation, "north")).status_code == 403


def test_a_stranger_with_the_public_ca_certificate_alone_says_nothing(federation: Path, port: int) -> None:
    public = ssl.create_default_context(cafile=str(federation / "coordinator" / CA))
    with httpx.Client(base_url=f"https://localhost:{port}", verify=public) as stranger:
        for method, path in (("GET", "/health"), ("POST", PULL), ("POST", "/v1/control/start-run")):
            with pytest.raises(httpx.TransportError):
                stranger.request(method, path)


def test_one_hospital_cannot_speak_for_another(federation: Path, port: int) -> None:
    with hospital(federation, "north", port) as north:
        said = north.post(PULL, content=b"x", headers=signed(federation, "south"))
    assert said.status_code == 403
    assert "node.key from the same kit" in said.json()["detail"]


def test_a_captured_header_is_not_taken_twice(federation: Path, port: int) -> None:
    captured = signed(federation, "north")
    with hospital(federation, "north", port) as north:
        assert north.post(PULL, content=b"x", headers=captured).status_code == 200
        for _ in range(2):
            again = north.post(PULL, content=b"x", headers=captured)
            assert again.status_code == 403
            assert "used before" in again.json()["detail"]
        assert north.post(PULL, content=b"x", headers=signed(federation, "north")).status_code == 200


def asks(headers: list[tuple[str, str]]) -> h11.Request:
    return h11.Request(method="POST", target=PULL, headers=[("host", "x"), ("content-length", "1"), *headers])


def refusal(admission: Admission, headers: list[tuple[str, str]], *, name: str = "north") -> str:
    """Why the hospital's request does not pass; empty if it does."""
    try:
        admission.check(name, asks(headers))
    except Refused as refused:
        return refused.reason
    return ""


def test_another_signature_under_a_captured_time_stamp_is_no_other_time_stamp(federation: Path) -> None:
    """Whoever has (r, s) has (r, n - s), and both are valid: nobody needs the key for the second."""
    admission, captured = Admission(federation / "coordinator"), signed(federation, "north")
    r, s = decode_dss_signature(base64.b64decode(captured[SIGNATURE]))
    twin = encode_dss_signature(r, P384_ORDER - s)
    key = node_key(open_kit(federation / "north")).public_key()
    key.verify(twin, captured[STAMP_HEADER.decode()].encode(), ec.ECDSA(SHA256()))
    assert refusal(admission, list(captured.items())) == ""
    again = {**captured, SIGNATURE: base64.b64encode(twin).decode()}
    assert "used before" in refusal(admission, list(again.items()))
    other = {**signed(federation, "south"), STAMP_HEADER.decode(): captured[STAMP_HEADER.decode()]}
    assert refusal(admission, list(other.items()), name="south") == "", "another hospital may sign in the same instant"


@pytest.mark.parametrize("first", ["north", "south"])
@pytest.mark.parametrize("case", [str.lower, str.title])
def test_a_header_of_flowers_that_comes_twice_does_not_pass(
    federation: Path, first: str, case: Callable[[str], str]
) -> None:
    """Of two this filter took the last and the SuperLink the first: north's words under south's certificate."""
    admission = Admission(federation / "coordinator")
    second = {"north": "south", "south": "north"}[first]
    both = [*signed(federation, first).items(), *((case(k), v) for k, v in signed(federation, second).items())]
    for name in ("north", "south"):
        assert "comes twice" in refusal(admission, both, name=name)
    twice = [*signed(federation, "north").items(), (case(SIGNATURE), "x")]
    assert "comes twice" in refusal(admission, twice)


def test_what_is_remembered_of_a_hospital_is_bounded(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    admission = Admission(federation / "coordinator")
    for stamp in ("", "9" * (MAX_STAMP + 1)):
        headers = {**signed(federation, "north"), STAMP_HEADER.decode(): stamp}
        assert "the time that it signed" in refusal(admission, list(headers.items()))
    monkeypatch.setattr(proxy, "MOST_STAMPS", 2)
    assert [refusal(admission, list(signed(federation, "north").items())) for _ in range(2)] == ["", ""]
    assert "too many requests" in refusal(admission, list(signed(federation, "north").items()))
    assert refusal(admission, list(signed(federation, "south").items()), name="south") == ""
    monkeypatch.setattr(proxy, "REMEMBER_SECONDS", 0.0)
    assert refusal(admission, list(signed(federation, "north").items())) == "", "what is too old is forgotten"


def test_a_body_has_a_known_and_bounded_size(federation: Path, port: int) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x"

    with hospital(federation, "north", port) as north:
        assert north.post(PULL, content=pieces(), headers=signed(federation, "north")).status_code == 411
        north.close()
    with socket.create_connection(("localhost", port), timeout=10) as plain:
        context = client_context(open_kit(federation / "north"))
        with context.wrap_socket(plain, server_hostname="localhost") as wrapped:
            head = "".join(f"{k}: {v}\r\n" for k, v in signed(federation, "north").items())
            long = f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: {MAX_BODY + 1}\r\n{head}\r\n"
            wrapped.sendall(long.encode())
            assert wrapped.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_withdrawal_ends_open_connections_without_a_restart(federation: Path, port: int) -> None:
    with hospital(federation, "north", port) as north, hospital(federation, "south", port) as south:
        for name, client in (("north", north), ("south", south)):
            assert client.post(PULL, content=b"x", headers=signed(federation, name)).status_code == 200
        headers = signed(federation, "north")
        with office(federation, port=port) as opened:
            opened.revoke("north")
        said = north.post(PULL, content=b"x", headers=headers)
        assert said.status_code == 403
        assert "withdrawn" in said.json()["detail"]
        assert south.post(PULL, content=b"x", headers=signed(federation, "south")).status_code == 200


def test_while_the_superlink_is_down_hospitals_are_told_to_come_back(federation: Path, coordinator: Kit) -> None:
    port = coordinator.federation.coordinator.port
    running = Running(of_kit(coordinator), port)
    try:
        with hospital(federation, "north", port) as north:
            assert north.post(PULL, content=b"x", headers=signed(federation, "north")).status_code == 503
            link = Link(coordinator, coordinator.config.ports.link)
            assert north.post(PULL, content=b"x", headers=signed(federation, "north")).status_code == 200
            link.stop()
    finally:
        running.stop()


def test_a_superlink_that_fails_is_waited_for_as_one_that_is_down(federation: Path, port: int) -> None:
    with hospital(federation, "north", port) as north:
        said = north.post(PULL, content=FULL, headers=signed(federation, "north"))
        assert (said.status_code, said.content) == (503, FULL)
        assert north.post(PULL, content=b"x", headers=signed(federation, "north")).status_code == 200


def test_one_hospital_cannot_take_all_connections(federation: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "MAX_CONNECTIONS", 2)
    context = client_context(open_kit(federation / "north"))
    held = []
    for _ in range(2):
        held.append(context.wrap_socket(socket.create_connection(("localhost", port)), server_hostname="localhost"))
        held[-1].sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert held[-1].recv(4096).startswith(b"HTTP/1.1 200")
    with hospital(federation, "north", port) as north:
        assert north.get("/health").status_code == 429
    with hospital(federation, "south", port) as south:
        assert south.get("/health").status_code == 200
    for connection in held:
        connection.close()


def test_a_half_open_connection_is_closed(federation: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "IDLE_SECONDS", 0.2)
    context = client_context(open_kit(federation / "north"))
    with context.wrap_socket(socket.create_connection(("localhost", port)), server_hostname="localhost") as half:
        half.settimeout(10)
        half.sendall(b"POST /v1/fleet/pull-mess")
        assert half.recv(4096) == b""


def test_many_at_once_get_their_own_answers(federation: Path, port: int) -> None:
    def talk(number: int) -> bool:
        name = ("north", "south")[number % 2]
        with hospital(federation, name, port) as client:
            bodies = [f"{name} {number} {i}".encode() * 1000 for i in range(5)]
            said = [client.post(PULL, content=body, headers=signed(federation, name)) for body in bodies]
        return [one.content for one in said] == bodies

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(talk, range(16)))


WORDS = st.from_regex(r"(GET|POST) /[a-z/]{0,20} HTTP/1\.[01]\r\n", fullmatch=True).map(str.encode)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(min_size=1, max_size=400) | WORDS)
def test_garbage_ends_its_own_connection_only(federation: Path, port: int, garbage: bytes) -> None:
    context = client_context(open_kit(federation / "north"))
    with context.wrap_socket(socket.create_connection(("localhost", port)), server_hostname="localhost") as hostile:
        hostile.sendall(garbage)
    with hospital(federation, "south", port) as south:
        assert south.get("/health").status_code == 200
