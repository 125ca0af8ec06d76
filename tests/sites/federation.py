"""What the tests of real sites share: a federation.toml, its office, a coordinator's port, a hospital that is filled in."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from types import TracebackType

from fedmm.sites.authority import key_pem, key_ssh, new_key
from fedmm.sites.description import read_description
from fedmm.sites.kit import Kit, open_kit
from fedmm.sites.papers import DECIDE
from fedmm.sites.provision import Office, open_office

TEXT = """
[federation]
name = "chest"
[coordinator]
host = "{host}"
port = {port}
[labels]
findings = ["effusion"]
class_name = "severity"
class_values = ["none", "mild", "severe"]
{hospitals}
"""


def written(folder: Path, *, port: int = 9443, host: str = "localhost", own: tuple[str, ...] = (),
            names: tuple[str, ...] = ("north", "south")) -> Path:  # fmt: skip
    entries = [f'[[hospitals]]\nname = "{name}"\nown_keys = {str(name in own).lower()}' for name in names]
    path = folder / "federation.toml"
    path.write_text(TEXT.format(host=host, port=port, hospitals="\n".join(entries)))
    return path


@contextlib.contextmanager
def office(out: Path, **described: object) -> Iterator[Office]:
    """described: as for `written`."""
    with open_office(out, read_description(written(out.parent, **described))) as opened:  # type: ignore[arg-type]
        yield opened


def provision(out: Path, **described: object) -> Office:
    with office(out, **described) as opened:
        opened.provision()
    return opened


def fill_in(kit: Path) -> None:
    """Decide what site.toml leaves open, and put one patient's study there."""
    site = kit / "hospital/site.toml"
    text = site.read_text()
    text = re.sub(f"{DECIDE}public_patients = 1000", f"{DECIDE}public_patients = 100", text)
    site.write_text(text.replace(DECIDE, ""))
    (kit / "hospital/report").mkdir()
    (kit / "hospital/report/1.txt").write_text("clear")
    header = "patient_id,study_id,image,report,audio,effusion,severity,split"
    (kit / "hospital/manifest.csv").write_text(f"{header}\np1,s1,,report/1.txt,,0,none,train\n")


class Listener:
    """A port on loopback: closed until a `with answering(...)` is around it, then one thread answers GET /health."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.errors: list[Exception] = []  # of refused connections, as the coordinator saw them

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._socket.close()

    @contextlib.contextmanager
    def answering(
        self, context: ssl.SSLContext | None, *, ahead: float = 0.0, status: int = 200, silent: bool = False
    ) -> Iterator[None]:
        """context: None speaks plain HTTP.  ahead: seconds that the server's clock is ahead.  silent: accepts, says nothing."""
        self._socket.listen(4)
        self._socket.settimeout(0.05)
        stop = threading.Event()
        thread = threading.Thread(target=self._serve, args=(context,),
                                  kwargs={"stop": stop, "ahead": ahead, "status": status, "silent": silent})  # fmt: skip
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=10)

    def _serve(
        self, context: ssl.SSLContext | None, *, stop: threading.Event, ahead: float, status: int, silent: bool
    ) -> None:
        while not stop.is_set():
            try:
                plain, _ = self._socket.accept()
            except TimeoutError:
                continue
            with plain:
                plain.settimeout(5)
                if silent:
                    stop.wait(5)
                    continue
                try:
                    self._answer(context.wrap_socket(plain, server_side=True) if context else plain,
                                 formatdate(time.time() + ahead, usegmt=True), status)  # fmt: skip
                except OSError as error:
                    self.errors.append(error)

    @staticmethod
    def _answer(connection: socket.socket, date: str, status: int) -> None:
        with connection:
            asked = connection.recv(4096)
            if asked.startswith(b"GET /health"):
                head = f"HTTP/1.1 {status} X\r\nDate: {date}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                connection.sendall(head.encode())
            else:  # an HTTP server that is sent TLS
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def file_states(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of each file and folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mode & 0o777, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def secrets_of(kit: Path) -> list[bytes]:
    """Lines of private keys that must be nowhere else; those that every key of that form has are left out."""
    any_key = key_ssh(new_key()).splitlines() + key_pem(new_key()).splitlines()
    lines = [line for name in ("client.key", "node.key") for line in (kit / name).read_bytes().splitlines()]
    return [line for line in lines if line not in any_key and len(line) > 40]


def opened(kit: Path) -> Kit:
    return open_kit(kit)
