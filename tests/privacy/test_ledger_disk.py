"""A disk that is full, read-only or broken: refused before the patients are read, also through the hospital's app."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, MessageType

import client.site
from fedmm.config import RunConfig, load_site
from fedmm.errors import LedgerUnusable
from fedmm.federation.local import LocalGrid
from fedmm.federation.messages import TrainAsk, array_record, encode
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.privacy import roster, vault
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.plan import make_plan
from tests.e2e.conftest import SETTINGS, write_hospital
from tests.privacy.ledger_worker import EVENT, site

NOBODY = 65534

# --- full and read-only disks -----------------------------------------------------------------------------------------


def test_a_full_disk_refuses_before_anything_exists(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.reserve(EVENT, run="r", round=0).settle()
        ledger._db.execute("PRAGMA max_page_count = 1")  # SQLite takes the present size: not a page more

        def fill_the_disk() -> None:
            for number in range(1000):
                ledger.reserve(EVENT, run="r" * 200, round=number).void()

        with pytest.raises(LedgerUnusable, match="SQLITE_FULL"):
            fill_the_disk()
        assert ledger.spent().releases in (1, 2)  # 2: there was room for the charge and not for giving it back
        ledger.verify()


@pytest.fixture
def no_space() -> Iterator[Callable[[int], None]]:
    """no_space(100): from now on no file of this process may grow past 100 bytes; -1: as before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size < 0 else (size, before[1]))

    yield limit
    limit(-1)
    signal.signal(signal.SIGXFSZ, handler)


def use_all(ledger: Ledger, path: Path) -> list[Callable[[], object]]:
    """One call for each way to write; the first charge is settled, the second open."""
    settled, opened = (ledger.reserve(EVENT, run="r", round=number) for number in range(2))
    settled.settle(sha256="ab" * 32)
    return [
        lambda: ledger.reserve(EVENT, run="r", round=9),
        lambda: opened.settle(sha256="cd" * 32),
        opened.void,
        lambda: ledger.record_sent("update", run="r", round=0, size=1, sha256="ab" * 32, charge=settled.seq),
        lambda: ledger.record_split("south", ledger.public_key()),
        ledger.rotate,
        lambda: roster.cover(path, [1, 2, 3], first=True),
    ]


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_disk_without_room_refuses_every_write_and_the_ledger_recovers(
    tmp_path: Path, no_space: Callable[[int], None], room: int
) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(tmp_path, site()) as ledger:
        roster.cover(path, list(range(10, 99)), first=True)
        calls = use_all(ledger, path)
        before, known = ledger.head(), roster.path_of(path).read_bytes()
        for call in calls:
            no_space(room)
            with pytest.raises(LedgerUnusable):
                call()
            no_space(-1)
            assert (ledger.head(), roster.path_of(path).read_bytes()) == (before, known)
        ledger.verify(against=[before])
        calls[1]()
        for call in (calls[0], *calls[3:]):
            call()
        ledger.verify(against=[before])
    with Ledger.open(tmp_path, site(), create=False) as ledger:
        assert ledger.spent().releases == 3


def test_a_ledger_that_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path, no_space: Callable[[int], None]) -> None:
    no_space(50)
    with pytest.raises(LedgerUnusable):
        Ledger.open(tmp_path, site())
    no_space(-1)
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.verify()


def test_a_database_that_only_reads_refuses_every_write(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(tmp_path, site()) as ledger:
        calls = use_all(ledger, path)
        before = ledger.head()
        ledger._db.execute("PRAGMA query_only = ON")
        for call in calls[:-1]:
            with pytest.raises(LedgerUnusable, match="READONLY"):
                call()
        assert ledger.head() == before
        ledger.verify()


def test_a_file_system_error_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(LedgerUnusable, match="No space left"):
        Ledger.open(tmp_path, site())


def test_a_disk_without_write_ahead_log_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger.open(tmp_path, site()).close()
    connect = sqlite3.connect

    class Remote(sqlite3.Connection):
        def execute(self, statement: str, *args: Any) -> Any:
            return super().execute("SELECT 'delete'" if "journal_mode" in statement else statement, *args)

    monkeypatch.setattr(sqlite3, "connect", lambda *args, **keys: connect(*args, factory=Remote, **keys))
    with pytest.raises(LedgerUnusable, match="does not support"):
        Ledger.open(tmp_path, site())


# --- through the hospital's app: refused before the patients are read -------------------------------------------------


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    return write_hospital(tmp_path / "north")


def ask(hospital: Path, *, round: int = 1) -> Message:
    """The answer to a round of training, through Flower's wire format."""
    config = RunConfig.from_flat({key: str(value) for key, value in SETTINGS.items()})
    labels = load_site(hospital).labels
    spec = ModelSpec(inputs=config.data.inputs, model=config.model, labels=labels)
    question = TrainAsk(
        run="run1", round=round, nonce="0f" * 16, settings=config.flat(), spec=spec, plan=make_plan(config).to_flat()
    )
    content = encode(question, arrays=array_record(dict(build_model(spec, 1).state_dict())))
    grid = LocalGrid("client.app:app", [{"site": str(hospital)}])
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(content, node, MessageType.TRAIN)])
    return reply


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders whose patients were read."""
    seen: list[Path] = []
    load = client.site.load_hospital

    def spy(folder: Path, *args: Any, **keys: Any) -> Any:
        seen.append(folder)
        return load(folder, *args, **keys)

    monkeypatch.setattr(client.site, "load_hospital", spy)
    return seen


def test_a_round_reads_the_patients_after_it_has_paid(hospital: Path, read: list[Path]) -> None:
    assert not ask(hospital).has_error()
    assert read == [hospital]


@pytest.mark.parametrize("begun", [True, False], ids=["with a ledger", "without"])
def test_with_a_full_disk_nobody_reads_a_patient(
    hospital: Path, read: list[Path], no_space: Callable[[int], None], *, begun: bool
) -> None:
    if begun:
        Ledger.open(hospital, load_site(hospital)).close()
    no_space(50)
    reply = ask(hospital)
    no_space(-1)
    assert (reply.error.code, read) == (1005, [])
    assert not ask(hospital).has_error()  # once there is room again
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        ledger.verify()
        assert ledger.spent().releases == 1


@pytest.mark.parametrize("fault", ["open to others", "edited", "key lost", "ledger lost", "folder instead"])
def test_with_a_ledger_that_cannot_be_used_nobody_reads_a_patient(hospital: Path, read: list[Path], fault: str) -> None:
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        ledger.reserve(EVENT, run="r", round=0)
    path, key = hospital / "ledger.sqlite", hospital / "ledger.key"
    if fault == "open to others":
        path.chmod(0o444)
    elif fault == "edited":
        path.write_bytes(path.read_bytes().replace(b"reserve", b"refuses"))
    else:
        (path if fault == "ledger lost" else key).unlink()
        if fault == "folder instead":
            key.mkdir()
    reply = ask(hospital)
    assert (reply.error.code, read) == (1007 if fault == "edited" else 1005, [])


@pytest.fixture
def nobody(hospital: Path) -> Iterator[Path]:
    """The hospital's folder as seen by a user whom permissions bind, which they do not root."""
    root = os.getuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(hospital, Path(name) / "north"))
        for path in (folder.parent, folder, *folder.iterdir()):
            if root:
                os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY if root else os.getuid())
        yield folder
        folder.chmod(0o755)
        os.seteuid(os.getuid())


@pytest.mark.parametrize("fault", ["folder", "ledger", "folder of no ledger yet"])
def test_on_a_read_only_disk_nobody_reads_a_patient(nobody: Path, read: list[Path], fault: str) -> None:
    if fault != "folder of no ledger yet":
        with Ledger.open(nobody, load_site(nobody)) as ledger:
            ledger.reserve(EVENT, run="r", round=0)
            head = ledger.head()
    if fault == "ledger":
        (nobody / "ledger.sqlite").chmod(0o400)
    else:
        nobody.chmod(0o555)
    reply = ask(nobody)
    assert (reply.error.code, read) == (1005, [])
    nobody.chmod(0o755)
    if fault != "folder of no ledger yet":
        (nobody / "ledger.sqlite").chmod(0o600)
        with Ledger.open(nobody, load_site(nobody), create=False) as ledger:
            ledger.verify(against=[head])
            assert ledger.spent().releases == 1


def test_a_clock_before_the_last_row_does_not_stop_a_round(
    hospital: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, at in enumerate(("2036-01-01T00:00:00+00:00", "2016-01-01T00:00:00+00:00"), start=1):
        monkeypatch.setattr(vault, "now", lambda at=at: at)
        assert not ask(hospital, round=number).has_error()
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        ledger.verify()
        assert [event["state"] for event in ledger.events()] == ["settled", "settled"]
