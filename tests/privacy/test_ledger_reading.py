"""A ledger that this process has read before: quick to open again, and never taken for another one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmm.errors import LedgerTampered
from fedmm.privacy import chain, vault
from fedmm.privacy.chain import Row
from fedmm.privacy.ledger import Ledger
from tests.privacy.ledger_worker import EVENT, site

SHA = "ab" * 32


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    vault._KEPT.clear()
    with Ledger.open(tmp_path, site()) as ledger:
        for number in range(3):
            with ledger.reserve(EVENT, run="r", round=number) as charge:
                charge.start()
                charge.settle(sha256=SHA)
    with Ledger.open(tmp_path, site()):
        return tmp_path


def new_rows_only(_: object, *, after: int) -> Iterator[Row]:
    assert after, "all rows are read"
    return iter(())


def test_the_same_bytes_are_not_read_twice(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "rows", new_rows_only)
    with Ledger.open(filled, site()) as ledger:
        monkeypatch.undo()
        spent = ledger.spent()
        ledger.verify()
    vault._KEPT.clear()
    with Ledger.open(filled, site()) as ledger:
        assert ledger.spent() == spent
        assert spent.releases == 3


def test_a_ledger_too_long_to_keep_is_read_each_time(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "MOST_KEPT", 1)
    monkeypatch.setattr(vault, "rows", new_rows_only)
    with pytest.raises(AssertionError, match="all rows are read"):
        Ledger.open(filled, site())


def test_two_open_ledgers_of_the_same_bytes_do_not_share_what_they_add(filled: Path) -> None:
    with Ledger.open(filled, site()) as one, Ledger.open(filled, site()) as other:
        charge = one.reserve(EVENT, run="r", round=3)
        resumed = other.resume(EVENT, run="r", round=3)
        assert resumed is not None
        assert [c.attempts for c in one.charges_of("r")] == [1, 1, 1, 2]
        charge.start()
        charge.settle(sha256=SHA)
        one.record_sent("update", run="r", round=3, size=1, sha256=SHA, charge=charge.seq)
        assert [(c.state, c.sent) for c in other.charges_of("r")] == [*[("settled", 0)] * 3, ("settled", 1)]
    known = vault._KEPT[filled / "ledger.sqlite"][1]
    assert [(c.attempts, c.sent) for c in known.charges.values()] == [(1, 0)] * 3, "what is kept was changed"


@pytest.mark.parametrize("column", ["steps", "note", "signature"])
def test_an_edit_of_an_old_row_is_seen_although_the_ledger_was_read_before(filled: Path, column: str) -> None:
    """The last row, which is signed for all, stays as it is."""
    db = sqlite3.connect(filled / "ledger.sqlite", isolation_level=None)
    (trigger,) = db.execute("SELECT sql FROM sqlite_master WHERE name = 'no_update'").fetchone()
    db.execute("DROP TRIGGER no_update")
    db.execute(f"UPDATE ledger SET {column} = ? WHERE seq = 2", (1 if column == "steps" else "00",))
    db.execute(trigger)
    db.close()
    with pytest.raises(LedgerTampered), Ledger.open(filled, site()) as ledger:
        ledger.verify()


def test_an_older_copy_of_the_ledger_shows_what_it_holds_itself(filled: Path) -> None:
    """Which is all that one can know without a head that was kept elsewhere; and never what the longer one held."""
    old = (filled / "ledger.sqlite").read_bytes()
    with Ledger.open(filled, site()) as ledger:
        ledger.reserve(EVENT, run="r", round=3)
    with Ledger.open(filled, site()) as ledger:
        assert ledger.spent().releases == 4
    (filled / "ledger.sqlite").write_bytes(old)
    with Ledger.open(filled, site()) as ledger:
        assert ledger.spent().releases == 3


def test_a_rotation_that_another_process_finishes_meanwhile_is_no_error(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is read once without the folder's lock, when it may still be the old one, and again with it."""
    with Ledger.open(filled, site()) as ledger:
        public = ledger.public_key()
    read, old = vault._read_key, [Ed25519PrivateKey.generate()]
    monkeypatch.setattr(vault, "_read_key", lambda path: old.pop() if old else read(path))
    assert chain.public_hex(vault.key_of(filled / "ledger.sqlite", public).public_key()) == public
