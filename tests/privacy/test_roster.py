"""Nobody is under two ledgers: who was covered is never lost, and what cannot be known is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedmm.data.dataset import patient_keys
from fedmm.errors import HospitalInvalid, LedgerUnusable, PolicyRefused
from fedmm.privacy import roster, vault
from fedmm.privacy.roster import Roster, cover, path_of, split
from tests.e2e.conftest import PATIENT, write_hospital
from tests.privacy.faults import ROOT, WORKER

OLD, NEW = range(1, 6), range(100, 104)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """The path of a ledger that covers OLD since its first charge; `roster` never opens the ledger itself."""
    path = folder(tmp_path, "old")
    cover(path, list(OLD), first=True)
    return path


def folder(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name / "ledger.sqlite"


def read(ledger: Path) -> Roster:
    known = roster._read(path_of(ledger))
    assert known is not None
    return known


def covers(ledger: Path, keys: range) -> bool:
    known = read(ledger)
    return known.salted(keys) <= known.ids


# --- the list ---------------------------------------------------------------------------------------------------------


def test_who_was_covered_stays_covered(ledger: Path) -> None:
    cover(ledger, [77], first=False)
    cover(ledger, [1, 2], first=True)  # `first` counts only for a list that begins
    known = read(ledger)
    assert covers(ledger, OLD)
    assert (len(known.ids), known.complete, known.apart_from) == (len(OLD) + 1, True, ())


def test_after_a_split_a_list_that_was_lost_is_not_begun_again(ledger: Path, tmp_path: Path) -> None:
    """Begun again it would not know from whom to keep apart."""
    split(ledger, folder(tmp_path, "new"), list(NEW))
    path_of(ledger).unlink()
    with pytest.raises(PolicyRefused, match="is missing"):
        cover(ledger, list(NEW), first=False, split_before=True)
    assert not path_of(ledger).exists()


def test_nobody_new_writes_nothing(ledger: Path) -> None:
    before = path_of(ledger).stat()
    cover(ledger, list(OLD), first=False)
    cover(ledger, [], first=False)
    assert path_of(ledger).stat().st_ino == before.st_ino


def test_nobody_at_all_leaves_no_list(tmp_path: Path) -> None:
    cover(path := folder(tmp_path, "old"), [], first=True)
    assert not path_of(path).exists()


def test_only_the_owner_may_read_it(ledger: Path) -> None:
    assert [file.stat().st_mode & 0o777 for file in ledger.parent.iterdir()] == [0o600]
    cover(ledger, [77], first=False)
    assert [file.stat().st_mode & 0o777 for file in ledger.parent.iterdir()] == [0o600]


def test_no_patient_can_be_found_in_it_without_the_salt(tmp_path: Path) -> None:
    hospital = write_hospital(tmp_path / "north")
    keys = patient_keys(hospital)
    cover(hospital / "ledger.sqlite", keys, first=True)
    content = path_of(hospital / "ledger.sqlite").read_text()
    ids = [f"{PATIENT}-{number}" for number in range(6)]
    assert len(keys) == len(ids)
    plain = [hashlib.new(name, text.encode()).hexdigest() for text in ids for name in ("md5", "sha1", "sha256")]
    plain += [hashlib.sha256(key.to_bytes(8, order)).hexdigest() for key in keys for order in ("big", "little")]
    numbers = [form for key in keys for form in (str(key), f"{key:x}", f"{key:016x}")]
    assert not [text for text in (PATIENT, *ids, *numbers) if text in content]
    assert not [digest for digest in plain if digest[:16] in content]


def test_two_hospitals_write_the_same_patient_differently(tmp_path: Path) -> None:
    one, two = folder(tmp_path, "one"), folder(tmp_path, "two")
    for path in (one, two):
        cover(path, list(OLD), first=True)
    assert read(one).salt != read(two).salt
    assert not read(one).ids & read(two).ids


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b'{"salt": "zz"}', b"\xff\xfe", b'{"salt": 1, "ids": []}']
)
def test_a_damaged_list_refuses(ledger: Path, content: bytes) -> None:
    path_of(ledger).write_bytes(content)
    with pytest.raises(PolicyRefused, match="damaged"):
        cover(ledger, [1], first=False)
    with pytest.raises(PolicyRefused, match="damaged"):
        split(ledger, folder(ledger.parents[1], "new"), list(NEW))
    assert path_of(ledger).read_bytes() == content


def test_a_cut_list_refuses_at_every_length(ledger: Path) -> None:
    whole = path_of(ledger).read_bytes()
    for length in range(len(whole)):
        path_of(ledger).write_bytes(whole[:length])
        with pytest.raises(PolicyRefused, match="damaged"):
            cover(ledger, [1], first=False)


def test_a_disk_that_refuses_leaves_the_list_as_it_was(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = path_of(ledger).read_bytes()
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, no_space)
            with pytest.raises(LedgerUnusable, match="No space left"):
                cover(ledger, [77], first=False)
        assert path_of(ledger).read_bytes() == before
    cover(ledger, [77], first=False)  # the half that was left is in nobody's way
    assert covers(ledger, OLD)


def test_processes_that_cover_at_once_lose_nobody(ledger: Path) -> None:
    starts = (1000, 2000, 3000)
    command = [*WORKER, "cover", str(ledger.parent)]
    begun = [subprocess.Popen([*command, str(start)], cwd=ROOT) for start in starts]
    assert [process.wait(timeout=600) for process in begun] == [0] * 3
    assert covers(ledger, OLD)
    assert all(covers(ledger, range(start, start + 10)) for start in starts)
    assert len(read(ledger).ids) == len(OLD) + 30


# --- split ------------------------------------------------------------------------------------------------------------


def test_after_a_split_each_refuses_the_patients_of_the_other(ledger: Path, tmp_path: Path) -> None:
    split(ledger, new := folder(tmp_path, "new"), list(NEW))
    assert (covers(ledger, OLD), covers(new, NEW)) == (True, True)
    assert read(new).complete
    for path, own, other in ((ledger, OLD, NEW), (new, NEW, OLD)):
        before = path_of(path).read_bytes()
        with pytest.raises(HospitalInvalid, match="under another ledger"):
            cover(path, [*own, other[0]], first=False)
        assert path_of(path).read_bytes() == before
        cover(path, list(own), first=False)
    cover(new, [500], first=False)
    with pytest.raises(HospitalInvalid, match="under another ledger"):
        cover(ledger, [500], first=False)  # who joined one later is known to the other too


@pytest.mark.parametrize("shared", [[1], [100, 3], list(OLD)])
def test_a_patient_who_was_ever_covered_cannot_get_a_second_ledger(
    ledger: Path, tmp_path: Path, shared: list[int]
) -> None:
    with pytest.raises(PolicyRefused, match="is under this ledger"):
        split(ledger, new := folder(tmp_path, "new"), shared)
    assert not path_of(new).exists()
    assert read(ledger).apart_from == ()


def test_a_split_twice_is_once_and_with_others_is_another(ledger: Path, tmp_path: Path) -> None:
    new = folder(tmp_path, "new")
    for _ in range(2):
        split(ledger, new, list(NEW))
    assert read(ledger).apart_from == (str(path_of(new)),)
    assert read(new).apart_from == (str(path_of(ledger)),)
    assert covers(new, NEW)


def test_three_ledgers_keep_apart_each_from_each(ledger: Path, tmp_path: Path) -> None:
    second, third = folder(tmp_path, "second"), folder(tmp_path, "third")
    split(ledger, second, list(NEW))
    with pytest.raises(PolicyRefused, match="split off before"):
        split(ledger, third, [NEW[0]])
    split(ledger, third, [900])
    split(second, fourth := folder(tmp_path, "fourth"), [950])
    own = {ledger: OLD[0], second: NEW[0], third: 900, fourth: 950}
    for path in own:
        for other, key in own.items():
            if path != other:
                with pytest.raises(HospitalInvalid, match="under another ledger"):
                    cover(path, [key], first=False)
    for path in own:
        cover(path, [own[path]], first=False)


def test_a_list_that_is_missing_is_not_begun_late_and_cannot_be_split(tmp_path: Path) -> None:
    late, new = folder(tmp_path, "late"), folder(tmp_path, "new")
    with pytest.raises(PolicyRefused, match="not known who"):
        split(late, new, list(NEW))
    with pytest.raises(PolicyRefused, match="is missing"):
        cover(late, list(OLD), first=False)
    assert not path_of(late).exists()
    cover(late, list(OLD), first=True)
    known = path_of(late).read_text(encoding="utf-8")
    path_of(late).write_text(known.replace('"complete": true', '"complete": false'), encoding="utf-8")
    with pytest.raises(PolicyRefused, match="not known who"):
        split(late, new, list(NEW))
    assert not path_of(new).exists()


def test_a_split_that_is_repeated_keeps_who_joined_meanwhile(ledger: Path, tmp_path: Path) -> None:
    split(ledger, new := folder(tmp_path, "new"), list(NEW))
    cover(new, [500], first=False)
    split(ledger, new, list(NEW))
    with pytest.raises(HospitalInvalid, match="under another ledger"):
        cover(ledger, [500], first=False)


@pytest.mark.parametrize("damage", ["missing", "damaged", "of another salt", "folder gone"])
def test_without_the_other_list_nobody_is_covered(ledger: Path, tmp_path: Path, damage: str) -> None:
    split(ledger, new := folder(tmp_path, "new"), list(NEW))
    if damage == "damaged":
        path_of(new).write_bytes(b"{")
    else:
        path_of(new).unlink()
    if damage == "of another salt":
        cover(new, list(NEW), first=True)
    if damage == "folder gone":
        new.parent.rmdir()
    with pytest.raises(PolicyRefused, match=r"cannot be read|damaged"):
        cover(ledger, [1], first=False)
    for again in (folder(tmp_path, "third"), new):
        with pytest.raises(PolicyRefused, match=r"cannot be read|damaged"):
            split(ledger, again, [NEW[0]])


def test_a_folder_with_a_list_of_its_own_is_not_split_off(ledger: Path, tmp_path: Path) -> None:
    cover(new := folder(tmp_path, "new"), list(NEW), first=True)
    before = path_of(new).read_bytes()
    with pytest.raises(PolicyRefused, match="list of patients of its own"):
        split(ledger, new, list(NEW))
    assert path_of(new).read_bytes() == before


def test_a_split_that_was_cut_short_is_finished_by_doing_it_again(
    ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new list is written first: until the old one knows of it, the new one refuses the old one's patients already."""
    new, write, written = folder(tmp_path, "new"), roster._write, []

    def once(path: Path, content: Roster) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(roster, "_write", once)
        with pytest.raises(KeyboardInterrupt):
            split(ledger, new, list(NEW))
    with pytest.raises(HospitalInvalid, match="under another ledger"):
        cover(new, [1], first=False)
    split(ledger, new, list(NEW))
    with pytest.raises(HospitalInvalid, match="under another ledger"):
        cover(ledger, [NEW[0]], first=False)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert not (tmp_path / "no").exists()
    with pytest.raises(LedgerUnusable):
        cover(tmp_path / "no" / "ledger.sqlite", [1], first=True)
    assert vault.RESTORE


def test_the_file_says_what_it_is(ledger: Path) -> None:
    content = json.loads(path_of(ledger).read_bytes())
    assert set(content) == {"salt", "complete", "apart_from", "ids"}
    assert content["ids"] == sorted(content["ids"])
    assert len(bytes.fromhex(content["salt"])) == 32


def test_a_fingerprint_is_opened_with_the_list_alone_and_says_nothing_of_how_many(ledger: Path, tmp_path: Path) -> None:
    nonce = b"n" * 16
    found = roster.commitment(ledger, nonce)
    assert found == roster.commitment(ledger, nonce), "whoever holds the list can open it"
    assert found != roster.commitment(ledger, b"m" * 16), "two of them do not show that nobody came in between"
    cover(ledger, [max(OLD) + 1], first=False)
    assert found != roster.commitment(ledger, nonce)
    other = folder(tmp_path, "same patients, other salt")
    cover(other, list(OLD), first=True)
    assert found != roster.commitment(other, nonce), "without the salt it cannot be computed from guessed patients"
    assert found is not None
    assert len(bytes.fromhex(found)) == 32
    assert roster.commitment(folder(tmp_path, "nobody"), nonce) is None
    with pytest.raises(ValueError, match="16 bytes"):
        roster.commitment(ledger, b"short")
