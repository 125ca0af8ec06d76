"""A hospital's files become rows: decoded, or what an encoder's fixed part made of that; each file once, ever (kept.py).

S studies.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from fedmm.config import SiteConfig
from fedmm.data.check import decode
from fedmm.data.kept import FixedPart, Kept, Rows, Table, table_name
from fedmm.data.manifest import Problem, Study
from fedmm.pretrained_folder import digest, find
from fedmm.schema import MODALITY, InputSpec, fixed

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 4  # studies decoded for each thread before the first of them was taken; guess
AT_ONCE = 32  # studies whose decoded rows are copied together for a fixed part

Keys = Mapping[str, Sequence[bytes | None]]
Progress = Callable[[int, int], None]


def transform_of(spec: InputSpec) -> str:
    """All that a decoded row depends on beside its file and the code. Raises: ConfigError if the tokeniser is not here."""
    # A DataConfig is an InputSpec too: the fields of InputSpec alone.
    settings = {name: getattr(spec, name) for name in InputSpec.model_fields}
    return f"{settings} {digest(find(spec.report_tokenizer)) if spec.report_tokenizer else ''}"


def rows_of(
    hospital: Path,
    site: SiteConfig,
    studies: Sequence[Study],
    *,
    keys: Keys,
    spec: InputSpec,
    parts: Mapping[str, FixedPart],
    progress: Progress | None,
) -> tuple[dict[str, Rows], list[Problem]]:
    """The inputs of all studies, under `fixed(name)` for a modality of which only its fixed part is wanted.

    keys: by modality, the row of each study, None where it is absent.  progress: not called if nothing is to be decoded.
    The second is what is wrong with the files that were read now; if there is anything, the first is empty.
    """
    kept = Kept(hospital, site, {key for key_S in keys.values() for key in key_S if key})
    making = _Making(kept, keys, transform_of(spec), parts)
    if making.done and kept.tidy:
        return making.rows(spec), []
    with kept.alone():
        kept.clean()
        making = _Making(kept, keys, making.transform, parts)  # another process may have made them since
        threads = site.limits.threads or len(os.sched_getaffinity(0))
        problems = making.decode(studies, spec, threads=threads, progress=progress)
        if not problems:
            making.compute()
        kept.shrink()
    return ({} if problems else making.rows(spec)), problems


class _Making:
    """The tables of one load, and what is missing in them."""

    def __init__(self, kept: Kept, keys: Keys, transform: str, parts: Mapping[str, FixedPart]) -> None:
        self.kept, self.keys, self.transform, self.parts = kept, keys, transform, parts
        self.made = {n: kept.table(table_name(n, f"{transform} {part.identity}")) for n, part in parts.items()}
        # what a fixed part was made of is not even looked at where all of it is made
        needed = [name for name in keys if name not in parts or self._missing(name, self.made)]
        self.decoded = {name: kept.table(table_name(name, transform)) for name in needed}

    @property
    def done(self) -> bool:
        return not any(self._missing(name, self.made if name in self.made else self.decoded) for name in self.keys)

    def _missing(self, name: str, tables: Mapping[str, Table]) -> list[bytes]:
        return list(dict.fromkeys(key for key in self.keys[name] if key and key not in tables[name]))

    def decode(
        self, studies: Sequence[Study], spec: InputSpec, *, threads: int, progress: Progress | None
    ) -> list[Problem]:
        """Every file that a row is missing of, and nothing else. Raises: ConfigError, as `subwords`."""
        wanted = {name: set(self._missing(name, self.decoded)) for name in self.decoded}
        for name in wanted.keys() & self.made.keys():
            wanted[name] &= set(self._missing(name, self.made))
        jobs = [
            (s.row, {name: path for name, path in s.paths.items() if self.keys[name][at] in wanted.get(name, ())})
            for at, s in enumerate(studies)
        ]
        problems: list[Problem] = []
        if not any(files for _, files in jobs):
            return problems
        with ThreadPoolExecutor(threads) as pool:
            for at, (arrays, found) in enumerate(
                _in_order(pool, lambda job: decode(*job, spec), jobs, AHEAD * threads)
            ):
                problems += found
                for name, array in arrays.items():
                    self.decoded[name].add(self.keys[name][at] or b"", np.ascontiguousarray(array, _dtype(name)))
                if progress:
                    progress(at + 1, len(studies))
        for table in self.decoded.values():
            table.flush()
        return problems

    def compute(self) -> None:
        """What fixed parts make of decoded rows, where it is missing. Those make room for it: they are not needed again."""
        for name, part in self.parts.items():
            missing, table = self._missing(name, self.made), self.made[name]
            if missing:
                self.kept.release(self.decoded[name])
            for start in range(0, len(missing), AT_ONCE):
                some = missing[start : start + AT_ONCE]
                value = torch.from_numpy(np.stack([self.decoded[name][key] for key in some]))
                for key, row in zip(some, part.compute(value).float().cpu().numpy(), strict=True):
                    table.add(key, row)
            table.flush()

    def rows(self, spec: InputSpec) -> dict[str, Rows]:
        """Everything must have been made."""
        found = {}
        for name, shape in spec.shapes.items():
            table = self.made[name] if name in self.made else self.decoded[name]
            row_S = [None if key is None else table[key] for key in self.keys[name]]
            nothing = np.zeros((0, *shape), _dtype(name))
            if name in self.parts:  # as large as it makes of one
                nothing = self.parts[name].compute(torch.from_numpy(nothing)).float().cpu().numpy()
            found[fixed(name) if name in self.made else name] = Rows(row_S, nothing, table.held)
        return found


def _dtype(name: str) -> type[np.generic]:
    return np.int64 if MODALITY[name].whole else np.float32


def _in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """As `map`, with no more than `ahead` results waiting in memory."""
    rest = iter(items)
    running: deque[Future[R]] = deque(pool.submit(work, item) for item in islice(rest, ahead))
    while running:
        done = running.popleft().result()
        running.extend(pool.submit(work, item) for item in islice(rest, 1))
        yield done
