"""The ledger against somebody with a hex editor, SQL and patience, but without the key: every change is seen."""

from __future__ import annotations

import sqlite3
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmm.errors import LedgerTampered, LedgerUnusable
from fedmm.privacy import chain, vault
from fedmm.privacy.chain import Row
from fedmm.privacy.ledger import Ledger
from tests.privacy.edits import Snapshot, cut_everywhere, edit_many, judge, missed, put, snapshot, snapshots
from tests.privacy.faults import copy
from tests.privacy.ledger_worker import EVENT, site

NAMES = ("ledger.sqlite", "ledger.key")


def refuses(folder: Path) -> bool:
    try:
        with Ledger.open(folder, site()) as ledger:
            ledger.verify()
    except LedgerUnusable:
        return True
    return False


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ledger of every kind of row."""
    folder = tmp_path_factory.mktemp("filled")
    snapshot(folder)
    return folder


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> list[Snapshot]:
    return snapshots(tmp_path_factory.mktemp("intact"))


# --- edits ------------------------------------------------------------------------------------------------------------


def test_an_intact_ledger_is_not_accused(intact: list[Snapshot], tmp_path: Path) -> None:
    for one in intact:
        one.write(tmp_path)
        assert not refuses(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_every_edit_is_seen(intact: list[Snapshot], tmp_path: Path, seed: int) -> None:
    verdicts = edit_many(intact, tmp_path, edits=100, seed=seed)
    assert (missed(verdicts), verdicts.total()) == (0, 100), verdicts
    assert verdicts["seen"] > 60


@pytest.mark.slow
def test_every_one_of_ten_thousand_edits_is_seen(intact: list[Snapshot], tmp_path: Path) -> None:
    verdicts = edit_many(intact, tmp_path, edits=10_000, seed=1000)
    print(dict(verdicts))
    assert (missed(verdicts), verdicts.total()) == (0, 10_000), verdicts


def test_rows_that_differ_and_are_accepted_would_be_counted_as_missed(
    intact: list[Snapshot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurement can fail: without the chain of hashes and the comparison of bytes, edits get through."""
    monkeypatch.setattr(Row, "digest", lambda row: row.hash)
    monkeypatch.setattr(vault, "check_file", lambda *_: None)
    assert missed(edit_many(intact, tmp_path, edits=100, seed=1)) > 0


@pytest.mark.parametrize("column", chain.Row._fields)
def test_every_edited_cell_is_seen_and_its_row_named(filled: Path, tmp_path: Path, column: str) -> None:
    copy(filled, tmp_path)
    with sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None) as db:
        db.execute("DROP TRIGGER no_update")
        (old,) = db.execute(f"SELECT {column} FROM ledger WHERE seq = 4").fetchone()
        new = old + "0" if isinstance(old, str) else old + 100
        db.execute(f"UPDATE ledger SET {column} = ? WHERE seq = 4", (new,))
        db.execute(vault.SCHEMA["no_update"])
    db.close()
    with pytest.raises(LedgerUnusable, match="row 4 "), Ledger.open(tmp_path, site()) as ledger:
        ledger.verify()


def test_rows_cannot_be_changed_or_deleted_through_sql(filled: Path, tmp_path: Path) -> None:
    copy(filled, tmp_path)
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    for statement in ("UPDATE ledger SET steps = 0", "DELETE FROM ledger"):
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            db.execute(statement)
    db.close()


# --- truncation and replacement: authentic in every byte, so that only a head kept elsewhere gives them away ----------


def test_a_ledger_cut_by_any_number_of_rows_is_seen_against_every_later_head(tmp_path: Path) -> None:
    intact = snapshot(tmp_path, rotate=False)
    assert cut_everywhere(intact, tmp_path) == {"seen": len(intact.rows) * (len(intact.rows) - 1) // 2}


def test_a_log_cut_after_any_frame_is_seen_against_the_last_head(intact: list[Snapshot], tmp_path: Path) -> None:
    logged = next(one for one in intact if "ledger.sqlite-wal" in one.files)
    log = logged.files["ledger.sqlite-wal"]
    for size in (0, *range(32, len(log), 24 + 4096)):
        logged.write(tmp_path)
        put(tmp_path / "ledger.sqlite-wal", log[:size])
        assert judge(tmp_path, logged) in ("cut", "seen")


@pytest.mark.parametrize("lost", [1, 2, 5])
def test_a_backup_put_back_is_seen_against_a_kept_head(filled: Path, tmp_path: Path, lost: int) -> None:
    copy(filled, tmp_path)
    with Ledger.open(tmp_path, site()) as ledger:
        kept = [ledger.head()]
        for number in range(lost):
            ledger.reserve(EVENT, run="later", round=number)
            kept.append(ledger.head())
        ledger.verify(against=kept)
    copy(filled, tmp_path)
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.verify(against=kept[:1])
        with pytest.raises(LedgerUnusable, match=f"row {kept[1].seq} "):
            ledger.verify(against=kept)


def test_a_key_from_before_a_rotation_is_refused(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.reserve(EVENT, run="r", round=0)
        old = (tmp_path / "ledger.key").read_bytes()
        ledger.rotate()
        kept = ledger.head()
        rows = tuple(vault.rows(ledger._db, after=0))
    new = (tmp_path / "ledger.key").read_bytes()
    put(tmp_path / "ledger.key", old)
    with pytest.raises(LedgerUnusable, match="not the ledger's"):
        Ledger.open(tmp_path, site())
    thief = chain.key_from_pem(old)  # who has a copy of it cannot go on after the rotation either
    late = rows[-1]._replace(seq=len(rows) + 1, type="refuse", prev_hash=rows[-1].hash, note="", kind="train", steps=1)
    late = late._replace(noise_multiplier=1.0, sampling_rate=0.5).signed(thief)
    put(tmp_path / "ledger.key", new)
    with sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None) as db:
        db.execute(vault.INSERT, late)
    db.close()
    with pytest.raises(LedgerTampered, match=f"row {late.seq} "):
        Ledger.open(tmp_path, site())
    assert kept.seq == len(rows)


def test_a_ledger_begun_anew_with_a_key_of_its_own_is_seen_against_a_kept_head(filled: Path, tmp_path: Path) -> None:
    """Nothing inside the folder can show it: that is what heads kept by the coordinator are for."""
    with Ledger.open(copy(filled, tmp_path), site()) as ledger:
        kept = ledger.head()
    for name in NAMES:
        (tmp_path / name).unlink()
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.verify()
        with pytest.raises(LedgerTampered, match="kept elsewhere"):
            ledger.verify(against=[kept])


# --- rows that the true key signed and that make no sense ---------------------------------------------------------------


def append(folder: Path, **changed: Any) -> None:
    """A row that is well signed by the true key and wrong in one thing: a bug or a thief of the key."""
    with Ledger.open(folder, site()) as ledger:
        last, key = ledger._book.last, ledger._key
    assert last is not None
    cost = {"kind": "train", "noise_multiplier": 2.0, "sampling_rate": 0.1, "steps": 4}
    row = last._replace(**{"seq": last.seq + 1, "prev_hash": last.hash, "note": "", **cost, **changed}).signed(key)
    with sqlite3.connect(folder / "ledger.sqlite", isolation_level=None) as db:
        db.execute(vault.INSERT, row)
    db.close()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"type": "settle", "ref": 1}, "not a charge that is reserved"),
        ({"type": "settle", "ref": 2}, "not a charge that is reserved"),
        ({"type": "void", "ref": 99}, "not a charge that is reserved"),
        ({"type": "settle", "ref": 3}, "not a charge that is reserved"),
        ({"type": "settle", "ref": 14, "note": '{"b":1, "a":2}'}, "not in canonical form"),
        ({"type": "settle", "ref": 14, "note": "[1]"}, "cannot convert"),
        ({"type": "sent", "ref": 5, "note": "{}"}, "not a charge that is settled"),
        ({"type": "sent", "ref": 7, "note": "{}"}, "not a charge that is settled"),
        ({"type": "sent", "ref": 2, "note": '{"bytes":1,"sha256":"00","what":"x"}'}, "does not pay for it"),
        ({"type": "sent", "note": '{"what":"x"}'}, "bytes"),
        ({"type": "sent"}, "Expecting value"),
        ({"type": "rotate", "note": '{"public_key":"ab"}'}, "32 bytes"),
        ({"type": "rotate", "note": "{}"}, "public_key"),
        ({"type": "split", "note": '{"public_key":"no"}'}, "hexadecimal"),
        ({"type": "refund"}, "unknown"),
        ({"type": "genesis"}, "one genesis"),
        ({"type": "reserve", "noise_multiplier": -1.0}, "does not fit"),
        ({"type": "refuse", "kind": "tune"}, "unknown"),
    ],
)
def test_illegal_transitions_are_seen(filled: Path, tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    copy(filled, tmp_path)
    append(tmp_path, **changed)
    with pytest.raises(LedgerUnusable, match="cannot be trusted") as caught:
        Ledger.open(tmp_path, site())
    assert why in caught.value.why


@pytest.mark.parametrize(
    "facts", ['{"format":2}', '{"format":1,"relation":"replace_one","unit":"patient"}', "[]", "{}", "not json"]
)
def test_a_foreign_first_row_is_refused(facts: str) -> None:
    key = chain.Ed25519PrivateKey.generate()
    row = chain.genesis_row(key, hospital="north", code="", at="")._replace(note=facts).signed(key)
    with pytest.raises(LedgerUnusable, match="row 1 "):
        chain.Book().add(row)


# --- files that are not as they should be -----------------------------------------------------------------------------


def test_a_missing_key_or_ledger_fails_closed(filled: Path, tmp_path: Path) -> None:
    for name, what in zip(NAMES, ("ledger is missing", "key is missing"), strict=True):
        copy(filled, tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(LedgerUnusable, match=what) as caught:
            Ledger.open(tmp_path, site())
        assert "backup" in caught.value.fix
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content", [b"", b"\0" * 5000, b"SQLite format 3\0" + b"\xff" * 5000, b"-----BEGIN PRIVATE KEY-----\n"]
)
def test_rubbish_files_are_refused(filled: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (copy(filled, tmp_path) / name).write_bytes(content)
    with pytest.raises(LedgerUnusable):
        Ledger.open(tmp_path, site())


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_or_link_or_open_permissions_are_refused(filled: Path, tmp_path: Path, name: str) -> None:
    file = copy(filled, tmp_path) / name
    file.chmod(0o644)
    with pytest.raises(LedgerUnusable, match="read by others"):
        Ledger.open(tmp_path, site())
    file.unlink()
    file.symlink_to(filled / name)
    with pytest.raises(LedgerUnusable, match="plain file"):
        Ledger.open(tmp_path, site())
    file.unlink()
    file.mkdir()
    with pytest.raises(LedgerUnusable, match="plain file"):
        Ledger.open(tmp_path, site())


def test_another_hospitals_ledger_or_key_is_refused(filled: Path, tmp_path: Path) -> None:
    copy(filled, tmp_path)
    elsewhere = site().model_copy(update={"hospital": site().hospital.model_copy(update={"name": "south"})})
    with pytest.raises(LedgerUnusable, match="another hospital"):
        Ledger.open(tmp_path, elsewhere)
    (tmp_path / "ledger.key").write_bytes(chain.key_to_pem(chain.Ed25519PrivateKey.generate()))
    with pytest.raises(LedgerUnusable):
        Ledger.open(tmp_path, site())


def test_a_foreign_database_is_not_taken_for_a_ledger(filled: Path, tmp_path: Path) -> None:
    copy(filled, tmp_path)
    (tmp_path / "ledger.sqlite").unlink()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("CREATE TABLE patients (id)")
    db.commit()
    db.close()
    (tmp_path / "ledger.sqlite").chmod(0o600)
    with pytest.raises(LedgerUnusable, match="is no"):
        Ledger.open(tmp_path, site())


def test_a_path_that_cannot_hold_a_ledger_is_refused(tmp_path: Path) -> None:
    for path, what in (("ledger.key", "must not end"), ("no/such/ledger.sqlite", "folder does not exist")):
        where = site().model_copy(update={"ledger": site().ledger.model_copy(update={"path": path})})
        with pytest.raises(LedgerUnusable, match=what):
            Ledger.open(tmp_path, where)


def test_appended_bytes_are_seen(filled: Path, tmp_path: Path) -> None:
    with (copy(filled, tmp_path) / "ledger.sqlite").open("ab") as file:
        file.write(b"\0" * 4096)
    assert refuses(tmp_path)


@pytest.mark.parametrize("key", [X25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())])
def test_a_key_of_another_kind_is_refused(filled: Path, tmp_path: Path, key: Any) -> None:
    put(copy(filled, tmp_path) / "ledger.key", chain.key_to_pem(key))
    with pytest.raises(LedgerUnusable, match="key cannot be read"):
        Ledger.open(tmp_path, site())


def test_an_emptied_ledger_is_refused(filled: Path, tmp_path: Path) -> None:
    edit(copy(filled, tmp_path), "DROP TRIGGER no_delete", "DELETE FROM ledger", vault.SCHEMA["no_delete"])
    with pytest.raises(LedgerTampered, match="row 1 "):
        Ledger.open(tmp_path, site())


def edit(folder: Path, *statements: str) -> None:
    db = sqlite3.connect(folder / "ledger.sqlite", isolation_level=None)
    for statement in statements:
        db.execute(statement)
    db.close()


def test_a_schema_that_changes_while_the_ledger_is_open_is_seen(filled: Path, tmp_path: Path) -> None:
    with Ledger.open(copy(filled, tmp_path), site()) as ledger:
        edit(tmp_path, "DROP TRIGGER no_update")
        with pytest.raises(LedgerUnusable, match="schema was changed"):
            ledger.verify()


def test_a_ledger_of_two_versions_of_sqlite_is_checked_without_the_comparison_of_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(vault, "code_version", lambda: "0.1 sqlite 3.0.0")
        with Ledger.open(tmp_path, site()) as ledger:
            ledger.reserve(EVENT, run="r", round=0)
    with Ledger.open(tmp_path, site()) as ledger:
        for number in range(40):
            ledger.reserve(EVENT, run="r", round=number)
        ledger.verify()
    file = bytearray((tmp_path / "ledger.sqlite").read_bytes())
    file[36:40] = (99).to_bytes(4, "big")  # pages that are free: what SQLite checks itself
    put(tmp_path / "ledger.sqlite", bytes(file))
    with Ledger.open(tmp_path, site()) as ledger, pytest.raises(LedgerUnusable, match="file is damaged"):
        ledger.verify()


def test_the_code_has_a_version_where_fedmm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(vault, "version", missing)
    assert vault.code_version.__wrapped__().startswith("unknown+")


@pytest.mark.parametrize("error", ["SQLITE_BUSY", "SQLITE_IOERR_READ", "SQLITE_CORRUPT"])
def test_a_disk_that_fails_while_reading_is_no_tampering_and_damage_is(error: str) -> None:
    class Failing:
        def execute(self, *_: Any) -> Any:
            failure = sqlite3.OperationalError("failed")
            failure.sqlite_errorname = error
            raise failure

    with pytest.raises(LedgerTampered if error == "SQLITE_CORRUPT" else sqlite3.OperationalError):
        list(vault.rows(Failing(), after=0))  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [(), (2,), tuple(Row(*range(16))), tuple(Row(*"abcdefghijklmnop"))])
def test_a_row_of_the_wrong_shape_is_named(values: tuple[Any, ...]) -> None:
    class Odd:
        def execute(self, *_: Any) -> Any:
            return [values]

    with pytest.raises(LedgerTampered, match="row 2 "):
        list(vault.rows(Odd(), after=1))  # type: ignore[arg-type]


def test_without_leave_to_make_one_there_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnusable, match="no ledger here"):
        Ledger.open(tmp_path, site(), create=False)
    assert not list(tmp_path.iterdir())
