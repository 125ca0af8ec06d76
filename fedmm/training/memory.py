"""A batch that does not fit into memory is worked on in halves, by patients: each one counts alone, so the sum is the same."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import TypeVar

import torch

from fedmm.schema import Batch

Made = TypeVar("Made")
CPU_ALLOCATOR = (
    "DefaultCPUAllocator",
    "alloc_cpu.cpp",
)  # how torch names it in a RuntimeError without a type of its own


# glibc's mallopt: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, and bytes  # measured: steps take half to nine tenths
KEPT_PAGES = ((-1, 512 * 2**20), (-2, 64 * 2**20), (-3, 32 * 2**20))


def keep_pages() -> None:
    """What a step frees stays with the process for the next one: to get each page anew costs more than to fill it."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        for name, value in KEPT_PAGES:
            libc.mallopt(name, value)


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in CPU_ALLOCATOR)


def in_parts(batch: Batch, work: Callable[[Batch], Made], keep: Callable[[], Callable[[], None]]) -> list[Made]:
    """What `work` makes of the batch, or of its halves and theirs, in order, where memory runs out; down to one patient.

    keep: called before a try; what it returns undoes what a try that failed has done, so that nobody counts twice.
    Raises: what `work` raises, of one patient also for want of memory.
    """
    undo = keep()
    try:
        return [work(batch)]
    except Exception as error:
        if batch.patients < 2 or not is_out_of_memory(error):
            raise
    # behind the handler: the error holds the frames, and they hold what fills the memory
    undo()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [made for half in halves(batch) for made in in_parts(half, work, keep)]


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The first half of the patients and the others, each with all of their studies."""
    first = batch.patients // 2
    return _part(batch, 0, first), _part(batch, first, batch.patients)


def _part(batch: Batch, start: int, end: int) -> Batch:
    """Patients start … end-1, numbered from 0."""
    rows = (batch.patient_B >= start) & (batch.patient_B < end)
    return Batch(
        inputs={name: value[rows] for name, value in batch.inputs.items()},
        seen_BM=batch.seen_BM[rows],
        finding_BF=batch.finding_BF[rows],
        class_B=batch.class_B[rows],
        patient_B=batch.patient_B[rows] - start,
        patients=end - start,
        further_BK=batch.further_BK[rows],
        day_B=batch.day_B[rows],
        key_B=batch.key_B[rows],
        copies=batch.copies,
    )
