"""How fast the proxy passes pieces of a model on: bodies of 5 MiB, as Flower cuts them, over TLS on both sides of it.

The SuperLink's stand-in answers a push with nothing and a pull with 5 MiB. `direct` asks it without the proxy between.
Proxy and stand-in are processes of their own; several connections share them, as the threads of a SuperNode do.
"""

from __future__ import annotations

import asyncio
import base64
import multiprocessing
import os
import ssl
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from fedmm.sites.kit import SERVER_CERT, SERVER_KEY, open_kit
from fedmm.sites.tls import client_context
from server.proxy import KEY_HEADER, SIGNATURE_HEADER, header_of, of_kit
from tests.e2e.sites import Sites, until

BODY = 5 * 2**20
PUSH, PULL = "/v1/fleet/push-object", "/v1/fleet/pull-object"


def measure(*, quick: bool) -> dict[str, float]:
    """MB/s of one and of two connections, median of several turns that alternate between the two ways."""
    bodies, turns = (20, 3) if quick else (40, 7)
    with tempfile.TemporaryDirectory() as name, Sites(Path(name), ("north",)) as sites:
        coordinator, hospital = sites.kit(), sites.kit("north")
        context = multiprocessing.get_context("spawn")
        served = [
            context.Process(target=serve, args=(coordinator.folder,), daemon=True) for serve in (_stand_in, _proxy)
        ]
        for process in served:
            process.start()
        key = next(member for member in coordinator.federation.hospitals if member.name == "north").node_key
        ways = {"proxy": coordinator.federation.coordinator.port, "direct": coordinator.config.ports.link}
        tls = client_context(hospital)
        for port in ways.values():
            until(lambda port=port: _answers(port, tls, key), what=f"port {port} answers")
        rates: dict[str, list[float]] = {}
        for _ in range(turns):
            for way, port in ways.items():
                for what, path, threads in (("push", PUSH, 1), ("pull", PULL, 1), ("push_2_connections", PUSH, 2)):
                    rates.setdefault(f"{way}_{what}", []).append(_rate(port, tls, key, path, bodies, threads))
        for process in served:
            process.terminate()
            process.join()
    found = {}
    for name, seen in rates.items():
        found[f"{name}_mb_per_s"] = statistics.median(seen)
        found[f"{name}_mb_per_s_spread"] = max(seen) - min(seen)
    return found


def _headers(key: str) -> dict[str, str]:
    fresh = base64.b64encode(os.urandom(96)).decode()  # the proxy lets each through once; the stand-in checks nothing
    return {KEY_HEADER.decode(): header_of(key).decode(), SIGNATURE_HEADER.decode(): fresh}


def _answers(port: int, tls: ssl.SSLContext, key: str) -> bool:
    try:
        with httpx.Client(verify=tls) as client:
            return client.post(f"https://localhost:{port}{PUSH}", headers=_headers(key), content=b"x").is_success
    except httpx.HTTPError:
        return False


def _rate(port: int, tls: ssl.SSLContext, key: str, path: str, bodies: int, threads: int) -> float:
    content = os.urandom(BODY) if path == PUSH else b"x"
    began = time.monotonic()
    _all(threads, lambda: _send(port, tls, key, path, content, bodies // threads))
    return bodies * BODY / 1e6 / (time.monotonic() - began)


def _all(count: int, work: Callable[[], None]) -> None:
    running: Sequence[threading.Thread] = [threading.Thread(target=work) for _ in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def _send(port: int, tls: ssl.SSLContext, key: str, path: str, content: bytes, bodies: int) -> None:
    """Raises: httpx.HTTPStatusError."""
    with httpx.Client(verify=tls, timeout=120) as client:
        for _ in range(bodies):
            client.post(f"https://localhost:{port}{path}", headers=_headers(key), content=content).raise_for_status()


# --- processes --------------------------------------------------------------------------------------------------------


def _proxy(folder: Path) -> None:
    kit = open_kit(folder, role="coordinator")
    asyncio.run(of_kit(kit).serve("127.0.0.1", kit.federation.coordinator.port))


def _stand_in(folder: Path) -> None:
    kit = open_kit(folder, role="coordinator")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(kit.file(SERVER_CERT), kit.file(SERVER_KEY))
    reply = os.urandom(BODY)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                left = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
                while left:
                    left -= len(await reader.read(left))
                body = reply if PULL.encode() in head else b""
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", kit.config.ports.link, ssl=tls, limit=2**20)
        await server.serve_forever()

    asyncio.run(serve())
