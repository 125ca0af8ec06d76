"""nginx with the template filled in for a kit: asked by real connections, what passes and what is 403."""

from __future__ import annotations

import base64
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedmm.errors import ConfigError
from fedmm.sites.kit import open_kit
from fedmm.sites.nginx import nginx_conf, node_key_header
from tests.deploy.paper import make_kit

TEMPLATE = Path(__file__).resolve().parents[2] / "deploy/nginx.conf.template"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx here: apt-get install nginx-light")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Front:
    """nginx before a SuperLink that answers 200 to everything. passed: request lines and keys that got through to it."""

    folder: Path
    port: int
    passed: list[tuple[str, str]] = field(default_factory=list)

    def key(self, name: str) -> str:
        return base64.b64encode((self.folder / f"{name}.pub").read_bytes()).decode()

    def ask(self, line: str, *, member: str | None = "north", keys: tuple[str, ...] = (), body: bytes = b"") -> int:
        """The status of a request; 0 if the connection was refused or cut. keys: a flwr-public-key header for each."""
        context = ssl.create_default_context(cafile=str(self.folder / "coordinator" / "ca.crt"))
        if member:
            context.load_cert_chain(self.folder / f"{member}.crt", self.folder / f"{member}.key")
        headers = "".join(f"flwr-public-key: {key}\r\n" for key in keys)
        head = (
            f"{line} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        try:
            with (
                socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as secure,
            ):
                secure.sendall(head.encode() + body)
                answer = secure.recv(4096)
        except (ssl.SSLError, ConnectionError):
            return 0
        return int(answer.split()[1]) if answer else 0


def superlink(front: Front, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            front.passed.append((self.requestline, ", ".join(self.headers.get_all("flwr-public-key", []))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_DELETE = do_POST

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(front.folder / "coordinator/server.crt", front.folder / "coordinator/server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server


@pytest.fixture(scope="module")
def _front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    assert NGINX
    folder = tmp_path_factory.mktemp("nginx")
    front, link = Front(folder, free_port()), free_port()
    kit = open_kit(make_kit(folder, port=front.port, link=link))
    (kit.make_state() / "logs").mkdir()
    conf = folder / "nginx.conf"
    conf.write_text(nginx_conf(kit, TEMPLATE.read_text(encoding="utf-8"), listen="127.0.0.1"), encoding="utf-8")
    command = [NGINX, "-e", str(folder / "error.log"), "-c", str(conf)]
    tested = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stderr
    assert "warn" not in tested.stderr
    server = superlink(front, link)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    process = subprocess.Popen([*command, "-g", "daemon off;"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while front.ask("GET /health") != 200:
            assert process.poll() is None, (folder / "error.log").read_text()
            assert time.monotonic() < end, "nginx does not answer"
            time.sleep(0.1)
        yield front
    finally:
        process.terminate()
        process.wait(20)
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def front(_front: Front) -> Front:
    _front.passed.clear()
    return _front


@needs_nginx
@pytest.mark.parametrize("name", ["pull-messages", "push-object", "register-node"])
def test_a_member_reaches_the_fleet_with_its_own_key(front: Front, name: str) -> None:
    key = front.key("north")
    assert front.ask(f"POST /v1/fleet/{name}", keys=(key,), body=b"x" * 100_000) == 200
    assert front.passed == [(f"POST /v1/fleet/{name} HTTP/1.1", key)]


@needs_nginx
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_needs_no_key_but_a_certificate(front: Front, method: str) -> None:
    assert front.ask(f"{method} /health") == 200
    assert front.ask(f"{method} /health", member=None) in (0, 400)


@needs_nginx
@pytest.mark.parametrize(
    "line",
    [
        "POST /v1/control/start-run", "POST /v1/control/list-nodes", "POST /v1/runtime/pull-task", "GET /docs",
        "GET /openapi.json", "GET /", "POST /", "POST /v1/fleet/", "POST /v1/fleet", "GET /v1/fleet/pull-messages",
        "PUT /v1/fleet/push-object", "DELETE /v1/fleet/get-run", "POST /health", "OPTIONS *", "POST /V1/FLEET/get-run",
        "POST /v1/fleet/../control/start-run", "POST /v1/fleet/%2e%2e/control/start-run", "POST //v1/fleet/get-run",
        "POST /v1/fleet/get-run/../../control/start-run", "POST /v1/fleet/get-run?x=1", "POST /v1/fleet/get-run%00",
        "POST /v1/fleet%2fget-run", "POST /v1/control/..;/fleet/get-run", "POST /v1/fleet/get-run;x=/v1/control",
        "POST https://localhost/v1/control/start-run", "CONNECT localhost:9091", "GET /health/../v1/control/x",
        "GET /health?x", "TRACE /health",
    ],
)  # fmt: skip
def test_everything_else_is_refused_and_never_reaches_the_superlink(front: Front, line: str) -> None:
    assert front.ask(line, keys=(front.key("north"),)) in (400, 403, 405)
    assert front.passed == []


@needs_nginx
def test_control_paths_are_403(front: Front) -> None:
    for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/pull-task", "/docs"):
        assert front.ask(f"POST {path}", keys=(front.key("north"),)) == 403


@needs_nginx
def test_one_hospital_cannot_speak_as_another(front: Front) -> None:
    north, south = front.key("north"), front.key("south")
    line = "POST /v1/fleet/pull-messages"
    assert front.ask(line, member="south", keys=(north,)) == 403
    assert front.ask(line, member="north", keys=()) == 403
    assert front.ask(line, member="north", keys=(south, north)) == 403
    assert front.ask(line, member="north", keys=(north.swapcase(),)) == 403
    assert front.passed == []
    front.ask(line, member="north", keys=(north, south))
    assert front.passed in ([], [(f"{line} HTTP/1.1", north)])  # what reaches the SuperLink is one key, and its own


@needs_nginx
@pytest.mark.parametrize("member", ["gone", "stranger", None])
def test_a_certificate_that_is_withdrawn_foreign_or_missing_opens_nothing(front: Front, member: str | None) -> None:
    name = member if member == "gone" else "north"
    assert front.ask("POST /v1/fleet/pull-messages", member=member, keys=(front.key(name),)) in (0, 400)
    assert front.ask("GET /health", member=member) in (0, 400)
    assert front.passed == []


@needs_nginx
def test_a_body_above_the_limit_is_refused_before_it_is_read(front: Front) -> None:
    line = "POST /v1/fleet/push-object HTTP/1.1\r\nContent-Length: 99999999999\r\nX-Rest:"
    assert front.ask(line, keys=(front.key("north"),)) in (400, 413)
    assert front.passed == []


@needs_nginx
def test_the_log_names_the_hospital_and_no_key(front: Front) -> None:
    front.ask("POST /v1/control/start-run", member="south", keys=(front.key("south"),))
    logged = (front.folder / "coordinator/state/logs/nginx-access.jsonl").read_text(encoding="utf-8")
    assert '"hospital":"south"' in logged
    assert front.key("south") not in logged


# --- filling in the template ------------------------------------------------------------------------------------------


def test_what_was_withdrawn_has_no_line_and_nothing_is_left_to_fill_in(tmp_path: Path) -> None:
    kit = open_kit(make_kit(tmp_path, port=9443, link=9091))
    conf = nginx_conf(kit, TEMPLATE.read_text(encoding="utf-8"), listen="[::1]")
    names = [
        line.split('"')[1] for line in conf.splitlines() if '"~^north' in line or '"~^south' in line or "gone" in line
    ]
    assert names == ["~^north$", "~^south$"]
    assert "listen [::1]:9443 ssl;" in conf
    assert "@" not in conf.partition("worker_processes")[2]


@pytest.mark.parametrize("listen", ["", "localhost", "0.0.0.0; }", "1.2.3.4:80 ssl"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match="no IP address"):
        nginx_conf(open_kit(make_kit(tmp_path, port=9443, link=9091)), "", listen=listen)


def test_a_folder_that_nginx_would_misread_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nginx"):
        nginx_conf(open_kit(make_kit(tmp_path / "a; b", port=9443, link=9091)), "")


def test_a_node_key_that_is_none_is_an_error_with_a_fix() -> None:
    with pytest.raises(ConfigError, match="no OpenSSH key"):
        node_key_header("ssh-rsa nonsense")
