"""A hospital in memory, its cohorts of patients, and batches that never split a patient.

S studies of the hospital, B studies of a batch, M modalities, F findings, P patients.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fedmm.config import SITE_FILE
from fedmm.data.check import READERS, decode, files_of, read_folder, summarise
from fedmm.data.kept import FixedPart, Rows, row_key, stamp
from fedmm.data.manifest import GROUPS, MANIFESTS, FileProblem, Problem, Study
from fedmm.data.rows import Keys, rows_of, transform_of
from fedmm.errors import ConfigError, HospitalInvalid
from fedmm.schema import MODALITIES, MODALITY, SPLITS, Batch, InputSpec, Labels

CACHE_BYTES = 2 * 2**30  # guess: what of hospitals is in memory and not mapped


@dataclass(frozen=True)
class HospitalData:
    """All studies of one hospital, in the order of the manifest. Holds no patient's or study's name.

    inputs: as in Batch, with S studies; absent modalities are zeros; mapped from disk as far as possible (kept.py).
    seen_SM: bool.  finding_SF: NaN is missing.
    class_S: -1 is missing.  patient_S: whose study, 0 … P-1 in order of first appearance.  train_S: bool.
    further_SK, day_S: as in Batch.  group_S: "sex" and "age" band where the manifest has them, "" where it is not known.
    key_P: a hash of each patient's id; makes the draw of a patient's studies independent of all other patients.
    """

    name: str
    labels: Labels = field(repr=False)
    spec: InputSpec = field(repr=False)
    inputs: Mapping[str, Rows | torch.Tensor] = field(repr=False)
    seen_SM: torch.Tensor = field(repr=False)
    finding_SF: torch.Tensor = field(repr=False)
    class_S: torch.Tensor = field(repr=False)
    patient_S: torch.Tensor = field(repr=False)
    train_S: torch.Tensor = field(repr=False)
    further_SK: torch.Tensor = field(repr=False)
    day_S: torch.Tensor = field(repr=False)
    group_S: Mapping[str, tuple[str, ...]] = field(repr=False)
    key_P: tuple[int, ...] = field(repr=False)

    def cohort(self, split: str) -> Cohort:
        """Patients of "train", "test" or "all". Raises: ValueError."""
        if split not in (*SPLITS, "all"):
            raise ValueError(f"split must be train, test or all, not {split!r}")
        chosen_S = torch.ones_like(self.train_S) if split == "all" else self.train_S == (split == "train")
        return Cohort(self, chosen_S)

    @property
    def held(self) -> int:
        """Bytes of inputs in memory."""
        return sum(value.held if isinstance(value, Rows) else value.nbytes for value in self.inputs.values())


class Cohort:
    """Some patients of a hospital, by index 0 … patients-1, each with all studies.

    After `records` the units are single studies: what says "patient" here then means one of them.
    """

    def __init__(self, data: HospitalData, chosen_S: torch.Tensor) -> None:
        self.data = data
        rows_of: dict[int, list[int]] = {}
        for row in chosen_S.nonzero().flatten().tolist():
            rows_of.setdefault(int(data.patient_S[row]), []).append(row)
        self._rows_P = [np.array(rows, dtype=np.int64) for rows in rows_of.values()]
        self._key_P = [data.key_P[patient] for patient in rows_of]

    def __repr__(self) -> str:
        return f"Cohort(patients={self.patients}, studies={self.studies})"

    @property
    def patients(self) -> int:
        """P."""
        return len(self._rows_P)

    @property
    def studies(self) -> int:
        return sum(len(rows) for rows in self._rows_P)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """`group_S` of these studies, in the order of `batch(range(patients))`."""
        rows = [int(row) for rows in self._rows_P for row in rows]
        return {kind: tuple(value_S[row] for row in rows) for kind, value_S in self.data.group_S.items()}

    def batch(
        self, patients: Sequence[int], *, max_studies: int | None = None, rng: np.random.Generator | None = None
    ) -> Batch:
        """All studies of these patients, or `max_studies` drawn at random of those who have more.

        patients: distinct indices in any order; none gives B = 0.  patient_B follows this order; after a draw first those
        with one study, then those with two, and so on.
        Guarantee: which studies of a patient are drawn depends on that patient and on `rng`, not on who else is here;
        `rng` advances by the same amount whoever is here.
        Raises: ValueError for an unknown or repeated patient, max_studies < 1, or max_studies without rng.
        """
        return self._gather(self._choose(patients, max_studies, rng))

    def physical(
        self,
        patients: Sequence[int],
        *,
        limit: int,
        max_studies: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Iterator[Batch]:
        """The studies of `batch(patients, …)`, cut into batches of at most `limit` studies to fit in memory.

        Guarantee: order and draw are those of `batch`; nobody is dropped, no patient is split; one who alone has more
        than `limit` studies makes a batch of their own. No patients, no batches.
        Raises: ValueError as batch, or for limit < 1; before the first batch.
        """
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        rows_P = self._choose(patients, max_studies, rng)
        return (self._gather(part) for part in _cut(rows_P, limit))

    def records(self, most: int, rng: np.random.Generator) -> Cohort:
        """Every study a unit of its own, at most `most` of a patient, drawn at random of those who have more.

        Guarantee: as `batch`, which studies of a patient are drawn does not depend on anybody else.
        Raises: ValueError for most < 1.
        """
        rows_P = self._choose(range(self.patients), most, rng)
        view = copy.copy(self)
        view._rows_P = [rows[i : i + 1] for rows in rows_P for i in range(len(rows))]
        view._key_P = [key for key, rows in zip(self._key_P, rows_P, strict=True) for _ in rows]
        return view

    def _choose(
        self, patients: Sequence[int], max_studies: int | None, rng: np.random.Generator | None
    ) -> list[np.ndarray]:
        chosen = [int(patient) for patient in patients]
        if len(set(chosen)) != len(chosen):
            raise ValueError("a patient may be in a batch only once: twice would double the sensitivity")
        if any(not 0 <= patient < self.patients for patient in chosen):
            raise ValueError(f"patients are numbered 0 to {self.patients - 1}")
        if max_studies is None:
            return [self._rows_P[patient] for patient in chosen]
        if max_studies < 1 or rng is None:
            raise ValueError("max_studies must be at least 1 and needs rng for the draw")
        seed = int(rng.integers(2**63))
        drawn = (self._draw(patient, max_studies, seed) for patient in chosen)
        return sorted(drawn, key=len)  # patients of equally many studies side by side: what clips them copies nothing

    def _draw(self, patient: int, max_studies: int, seed: int) -> np.ndarray:
        rows = self._rows_P[patient]
        if len(rows) <= max_studies:
            return rows
        own = np.random.default_rng([seed, self._key_P[patient]])
        return np.sort(own.choice(rows, size=max_studies, replace=False))

    def _gather(self, rows_P: Sequence[np.ndarray]) -> Batch:
        lengths = torch.tensor([len(rows) for rows in rows_P], dtype=torch.int64)
        index_B = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *rows_P]))
        data = self.data
        return Batch(
            inputs={name: value[index_B] for name, value in data.inputs.items()},
            seen_BM=data.seen_SM[index_B],
            finding_BF=data.finding_SF[index_B],
            class_B=data.class_S[index_B],
            patient_B=torch.repeat_interleave(torch.arange(len(rows_P)), lengths),
            patients=len(rows_P),
            further_BK=data.further_SK[index_B],
            day_B=data.day_S[index_B],
            key_B=torch.tensor([data.key_P[p] % 2**63 for p in data.patient_S[index_B].tolist()], dtype=torch.int64),
        )


def _cut(rows_P: Sequence[np.ndarray], limit: int) -> Iterator[list[np.ndarray]]:
    part: list[np.ndarray] = []
    for rows in rows_P:
        if part and sum(len(other) for other in part) + len(rows) > limit:
            yield part
            part = []
        part.append(rows)
    if part:
        yield part


# --- from a folder ----------------------------------------------------------------------------------------------------


def load_hospital(
    hospital: Path,
    spec: InputSpec,
    *,
    parts: Mapping[str, FixedPart] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HospitalData:
    """Policy, manifest and every file. A file is decoded once, ever, on as many threads as this process has cores, and again
    when its size or time has changed or when what was made of it could not be kept.

    parts: by modality, what to keep of its files in their place, under `fixed(name)`; made once for these files, ever.
    progress: called with studies done and studies in all; not when nothing is to be decoded.
    Guarantee: the same bits from the files, from the disk, on any number of threads.
    Raises: HospitalInvalid whose `problems` are those of check_hospital. Its text holds no patient's value.
    ConfigError if `spec.report_tokenizer` is not here.
    """
    parts = parts or {}
    site, table = read_folder(hospital)
    studies, problems = table.studies, list(table.problems)
    if site is None or problems:
        # The list is to be as long as check's, so files are read even where the table is already known to be wrong.
        raise _invalid(studies, problems + [found for file in files_of(table) for found in decode(*file, spec)[1]])
    key = (str(hospital.resolve()), transform_of(spec), tuple((name, parts[name].identity) for name in sorted(parts)))
    keys = {name: [row_key(s.paths[name]) if name in s.paths else None for s in studies] for name in MODALITIES}
    before = _fingerprint(hospital, keys)
    if (known := _CACHE.get(key, before)) is not None:
        return known
    inputs, problems = rows_of(hospital, site, studies, keys=keys, spec=spec, parts=parts, progress=progress)
    if problems:
        raise _invalid(studies, problems)
    data = _assemble(site.hospital.name, site.labels, spec, studies, inputs)
    _CACHE.put(key, before, data)
    return data


def study_batch(spec: InputSpec, labels: Labels, paths: Mapping[str, Path]) -> Batch:
    """One study from loose files by modality, labels missing; B = 1. Raises: ConfigError for a missing or broken file."""
    inputs, seen_BM = blank(1, spec), torch.zeros(1, len(MODALITIES), dtype=torch.bool)
    for name, path in paths.items():
        try:
            inputs[name][0] = torch.from_numpy(np.ascontiguousarray(READERS[name](path, spec)))
        except FileProblem as problem:
            fix = problem.fix.replace("empty the cell", f"leave out --{name}")
            raise ConfigError(f"the {name} file cannot be used: {problem.message}", fix=fix) from None
        seen_BM[0, MODALITIES.index(name)] = True
    return Batch(
        inputs=inputs,
        seen_BM=seen_BM,
        finding_BF=torch.full((1, len(labels.findings)), torch.nan),
        class_B=torch.full((1,), -1, dtype=torch.int64),
        patient_B=torch.zeros(1, dtype=torch.int64),
        patients=1,
        further_BK=torch.full((1, len(labels.further)), torch.nan),
        day_B=torch.full((1,), torch.nan),
        key_B=torch.zeros(1, dtype=torch.int64),
    )


def blank(studies: int, spec: InputSpec) -> dict[str, torch.Tensor]:
    """Inputs of studies that have nothing."""
    kinds = {True: torch.int64, False: torch.float32}
    return {n: torch.zeros(studies, *shape, dtype=kinds[MODALITY[n].whole]) for n, shape in spec.shapes.items()}


def _assemble(
    name: str,
    labels: Labels,
    spec: InputSpec,
    studies: Sequence[Study],
    inputs: Mapping[str, Rows],
) -> HospitalData:
    numbers: dict[str, int] = {}
    patient_S = [numbers.setdefault(study.patient_id, len(numbers)) for study in studies]
    findings = [[torch.nan if value is None else value for value in study.findings] for study in studies]
    classes = [-1 if study.label_class is None else study.label_class for study in studies]
    return HospitalData(
        name=name,
        labels=labels,
        spec=spec,
        inputs=inputs,
        seen_SM=torch.tensor([[name in study.paths for name in MODALITIES] for study in studies]),
        finding_SF=torch.tensor(findings, dtype=torch.float32).reshape(len(studies), len(labels.findings)),
        class_S=torch.tensor(classes, dtype=torch.int64),
        patient_S=torch.tensor(patient_S, dtype=torch.int64),
        train_S=torch.tensor([study.split == "train" for study in studies], dtype=torch.bool),
        further_SK=torch.tensor(
            [[torch.nan if value is None else value for value in study.further] for study in studies],
            dtype=torch.float32,
        ).reshape(len(studies), len(labels.further)),
        day_S=torch.tensor([torch.nan if study.day is None else study.day for study in studies], dtype=torch.float32),
        group_S={name: tuple(study.groups.get(name, "") for study in studies) for name in GROUPS},
        key_P=_keys(numbers),
    )


def _keys(patients: Iterable[str]) -> tuple[int, ...]:
    return tuple(key_of(patient) for patient in patients)


def key_of(patient_id: str) -> int:
    """As in `key_P`."""
    return int.from_bytes(hashlib.sha256(patient_id.encode()).digest()[:8], "big")


def patient_keys(hospital: Path) -> tuple[int, ...]:
    """`key_P` of a folder, from its manifest alone. Raises: HospitalInvalid if the manifest cannot be read."""
    site, table = read_folder(hospital)
    if site is None or table.problems:
        raise _invalid(table.studies, list(table.problems))
    return _keys(dict.fromkeys(study.patient_id for study in table.studies))


def _invalid(studies: list[Study], problems: list[Problem]) -> HospitalInvalid:
    found = summarise(studies, problems).problems
    return HospitalInvalid(
        "the hospital folder fails its own check",  # crosses to the coordinator: no count of anything
        why="a model trained on half-read data would be wrong without anyone noticing",
        fix="fedmm check lists them all, each with its fix",
        problems=found,
    )


# --- the cache --------------------------------------------------------------------------------------------------------

Key = tuple[str, str, tuple[tuple[str, str], ...]]


class _Cache:
    """Hospitals by folder and spec, the least recently used dropped first; rounds do not look at the disk's shards again."""

    def __init__(self) -> None:
        self._held: OrderedDict[Key, tuple[str, HospitalData]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key, fingerprint: str) -> HospitalData | None:
        with self._lock:
            held = self._held.get(key)
            if held is None or held[0] != fingerprint:
                return None
            self._held.move_to_end(key)
            return held[1]

    def put(self, key: Key, fingerprint: str, data: HospitalData) -> None:
        with self._lock:
            self._held[key] = (fingerprint, data)
            self._held.move_to_end(key)
            while len(self._held) > 1 and sum(held.held for _, held in self._held.values()) > CACHE_BYTES:
                self._held.popitem(last=False)


_CACHE = _Cache()


def _fingerprint(hospital: Path, keys: Keys) -> str:
    """Changes when the manifest, the policy or a file changes, by size and times."""
    digest = hashlib.sha256("".join(stamp(hospital / name) for name in (*MANIFESTS, SITE_FILE)).encode())
    for key_S in keys.values():
        digest.update(b"".join(key or bytes(1) for key in key_S))
    return digest.hexdigest()
