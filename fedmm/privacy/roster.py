"""Which patients are under a ledger: salted ids in a file beside it, so that a second ledger can only begin for other people.

A ledger's epsilon is a promise about each of its patients. Two ledgers for the same patients would each show half of what
was spent. So a ledger may be split off only for patients who are not under the first one, and from then on each of the two
refuses a patient of the other. The ids are HMAC-SHA256 under a random salt that never leaves the hospital; the file is
readable by its owner alone. It holds everybody who was ever in the folder, and only grows.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedmm.errors import HospitalInvalid, PolicyRefused
from fedmm.privacy import vault


@dataclass(frozen=True)
class Roster:
    """salt: shared by ledgers that were split from one another.  complete: begun with the ledger's first charge.

    apart_from: rosters whose patients may not be here.
    """

    salt: bytes
    ids: frozenset[str]
    complete: bool
    apart_from: tuple[str, ...] = ()

    def salted(self, keys: Iterable[int]) -> frozenset[str]:
        """keys: unsigned 64-bit numbers, one for each patient."""
        return frozenset(hmac.digest(self.salt, key.to_bytes(8, "big"), "sha256")[:16].hex() for key in keys)


def path_of(ledger: Path) -> Path:
    return ledger.absolute().with_suffix(vault.PATIENTS)


def cover(ledger: Path, keys: Sequence[int], *, first: bool, split_before: bool = False) -> None:
    """Note on disk that these patients are under this ledger, before anything is computed about them.

    ledger: its path.  first: nothing was settled before, so a roster that begins now is complete.
    split_before: the ledger says that there are others, so its list must be there.
    Raises: HospitalInvalid if one of them is under a ledger that was split off; PolicyRefused if a list is missing or
    cannot be read; LedgerUnusable if the disk refuses.
    """
    path = path_of(ledger)
    with vault.as_refusal(path), _locked([path]) as rosters:
        if path not in rosters and (split_before or not first):
            raise PolicyRefused(
                "the list of patients beside the ledger is missing",
                why="patients of earlier releases would be forgotten, and nobody may be under two ledgers",
                fix=f"restore {path} from the latest backup",
            )
        roster = rosters.get(path) or Roster(secrets.token_bytes(32), frozenset(), complete=first)
        ids = roster.salted(keys)
        if any(ids & other.ids for other in _siblings(roster, rosters).values()):
            raise HospitalInvalid(
                "the hospital folder fails its own check",  # crosses: no more than of any other fault of a folder
                why="a patient here is under another ledger of this hospital: each would show a part of what was spent",
                fix="remove from this folder's manifest whoever is in the other one's",
            )
        if not ids <= roster.ids:
            _write(path, replace(roster, ids=roster.ids | ids))


def split(ledger: Path, new: Path, keys: Sequence[int]) -> None:
    """Begin the roster of a new ledger for these patients, and make both keep apart. Twice is once.

    Raises: PolicyRefused if one of them is under `ledger` or one that is apart from it, or that cannot be known.
    """
    own, other = path_of(ledger), path_of(new)
    with vault.as_refusal(own), _locked([own, other]) as rosters:
        roster = rosters.get(own)
        if roster is None or not roster.complete:
            raise PolicyRefused(
                "it is not known who has been under this ledger",
                why="its list of patients is missing, or began after its first charge",
                fix=f"restore {own} from the latest backup",
            )
        ids = roster.salted(keys)
        siblings = _siblings(roster, rosters)
        others = {path: known for path, known in siblings.items() if path != other}
        if any(ids & known.ids for known in (roster, *others.values())):
            raise PolicyRefused(
                "a patient of the new folder is under this ledger, or under one that was split off before",
                why="two ledgers for one patient would each show a part of what was spent",
                fix="leave out of the new folder's manifest whoever was ever in the old one's",
            )
        begun = rosters.get(other) or Roster(roster.salt, frozenset(), complete=True)
        if begun.salt != roster.salt:
            raise PolicyRefused("the new folder has a list of patients of its own", fix=f"look at {other}")
        _write(other, _apart(replace(begun, ids=begun.ids | ids), from_=[own, *others]))
        for path, known in others.items():
            _write(path, _apart(known, from_=[other]))
        _write(own, _apart(roster, from_=[other]))


def _siblings(roster: Roster, rosters: Mapping[Path, Roster]) -> dict[Path, Roster]:
    """The rosters that this one keeps apart from. Raises: PolicyRefused if one of them cannot be known."""
    for path in map(Path, roster.apart_from):
        if path not in rosters or rosters[path].salt != roster.salt:
            raise PolicyRefused(
                "the patients of the ledger that was split off cannot be read",
                why="nobody may be under two ledgers, and that can no longer be checked",
                fix=f"restore {path} from the latest backup",
            )
    return {path: rosters[path] for path in map(Path, roster.apart_from)}


def _apart(roster: Roster, *, from_: Sequence[Path]) -> Roster:
    return replace(roster, apart_from=tuple(dict.fromkeys([*roster.apart_from, *map(str, from_)])))


@contextmanager
def _locked(paths: Sequence[Path]) -> Iterator[dict[Path, Roster]]:
    """These rosters and those they keep apart from, as far as they exist; nobody else reads or writes them meanwhile."""
    named = {name for path in paths if (known := _read(path)) for name in known.apart_from}
    every = {path.absolute() for path in paths} | {Path(name) for name in named}
    with ExitStack() as locks:
        for folder in sorted({path.parent for path in every if path.parent.is_dir()}):  # one order: no deadlock
            locks.enter_context(vault.alone_in(folder))
        yield {path: roster for path in every if (roster := _read(path)) is not None}


def _read(path: Path) -> Roster | None:
    try:
        content = json.loads(path.read_bytes())
        return Roster(
            bytes.fromhex(content["salt"]),
            frozenset(map(str, content["ids"])),
            complete=content["complete"] is True,
            apart_from=tuple(map(str, content["apart_from"])),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise PolicyRefused(
            "the list of patients beside the ledger is damaged", fix=f"restore {path} from the latest backup"
        ) from None


def _write(path: Path, roster: Roster) -> None:
    content = {
        "salt": roster.salt.hex(),
        "complete": roster.complete,
        "apart_from": list(roster.apart_from),
        "ids": sorted(roster.ids),
    }
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    vault.write_private(new, json.dumps(content).encode())
    os.replace(new, path)
    vault.sync_folder(path.parent)


def commitment(ledger: Path, nonce: bytes) -> str | None:
    """A fingerprint of who is under this ledger now: HMAC-SHA256 of the list under its salt; None where there is no list.

    nonce: fresh for each one that is shown, at least 16 bytes.
    Guarantee: without the salt, which stays here, it is a random number (HMAC is a pseudorandom function): it tells
    neither who nor how many, and for the nonce's sake two of them do not tell whether anybody came in between. It needs no
    epsilon for that reason, and only whoever holds the list can open it.
    Raises: PolicyRefused if the list is damaged, ValueError for a short nonce.
    """
    if len(nonce) < 16:
        raise ValueError("the nonce needs 16 bytes or more")
    roster = _read(path_of(ledger))
    if roster is None:
        return None
    listed = json.dumps(sorted(roster.ids)).encode()
    return hmac.digest(roster.salt, b"fedmm data fingerprint v1\n" + nonce + listed, "sha256").hex()
