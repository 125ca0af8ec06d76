"""A thousand things by which a patient could be found, for tests that look for them where they must not be."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

FIRST = ("wilhelmina", "thaddaeus", "xanthippe", "bartholomew", "gwendolyn", "leopoldine", "ferdinanda", "zebediah")
LAST = (
    "overduin",
    "zdrojewski",
    "quattlebaum",
    "vandersloot",
    "krzyzanowski",
    "abernethysson",
    "oyelaran",
    "ishiguroda",
)
ROOT = "1.2.826.0.1.3680043."
GROUPS = ("name", "number", "path", "uid", "word")


@dataclass(frozen=True)
class Planted:
    """Identifiers by kind, all different, none of them likely by chance."""

    name: tuple[str, ...]
    number: tuple[str, ...]
    path: tuple[str, ...]
    uid: tuple[str, ...]
    word: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(value for group in GROUPS for value in getattr(self, group))

    def found_in(self, *texts: bytes | str) -> set[str]:
        """Those of which the telling part is in any of the texts; capitals and other separators hide none."""
        lowered = [(t if isinstance(t, bytes) else t.encode("utf-8", "surrogateescape")).lower() for t in texts]
        everything = b"\0".join(lowered)
        return {value for value in self.all if telling(value).encode() in everything}


def telling(value: str) -> str:
    """What is left of an identifier without what many have in common: a name's and a file's code, a UID's tail."""
    return re.split(r"[/^-]", value)[-1].removesuffix(".dcm").removeprefix(ROOT).lower()


def plant(count: int = 1000, *, seed: int = 7) -> Planted:
    """count: of all kinds together, a multiple of five."""
    rng = np.random.default_rng(seed)
    each = count // len(GROUPS)
    number = [str(n) for n in rng.choice(9 * 10**9, each, replace=False) + 10**9]  # ten digits
    tail = _codes(rng, each)
    name = [f"{FIRST[i % 8]}^{LAST[i // 8 % 8]}-{code}" for i, code in enumerate(_codes(rng, each))]
    path = [f"/srv/{LAST[i % 8]}/{code}.dcm" for i, code in enumerate(tail)]
    uid = [f"{ROOT}{a}.{b}" for a, b in rng.integers(10**8, 10**9, (each, 2)).tolist()]
    word = [f"qwyx{code}oma" for code in _codes(rng, each)]
    return Planted(*map(tuple, (name, number, path, uid, word)))


def _codes(rng: np.random.Generator, count: int) -> list[str]:
    letters = np.array(list("bcdfghjklmnpqrstvwxz"))
    codes: set[str] = set()
    while len(codes) < count:
        codes.add("".join(rng.choice(letters, 8)))
    return sorted(codes)
