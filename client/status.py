"""HOSPITAL/.fedmm/status.json: what this hospital's client is doing, for its own people. Nothing of a patient, no counts."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
from pathlib import Path

import torch

from fedmm.privacy import vault

SECONDS = 1.0  # between two writings of the same phase


class Status:
    """run, round: of the work. Several works at once write over one another: the file shows the latest news.

    A file that cannot be written stops nobody.
    """

    def __init__(self, path: Path, *, run: str, round: int) -> None:
        self._path, self._run, self._round = path, run, round
        self._started, self._phase, self._written = vault.now(), "", 0.0
        self._began = time.monotonic()  # of the phase

    def say(self, phase: str, *, step: int = 0, steps: int = 0, code: int = 0) -> None:
        """phase: idle, waiting, loading, training, evaluating, settled, refused or failed.  code: of a refusal."""
        now = time.monotonic()
        if phase != self._phase:
            self._phase = phase
            self._began = self._began if step else now  # the first news of a phase may be that its first step is done
        elif now - self._written < SECONDS:
            return
        self._written = now
        facts = {
            "run": self._run,
            "round": self._round,
            "phase": phase,
            "step": step,
            "steps": steps,
            "step_seconds": round((now - self._began) / step, 6) if step else 0.0,
            "started": self._started,
            "updated": vault.now(),
            "code": code,
            "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            // 1024,  # the most so far; Linux counts KiB
            "gpu_memory_mb": torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else 0,
        }
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            beside.unlink(missing_ok=True)
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(facts, file)  # not forced to the disk: news, of which the next ones come soon
            os.replace(beside, self._path)
