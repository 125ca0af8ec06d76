"""One piece of work at a hospital: alone with its patients, in time, within the machine's limits, told in status.json."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from client.site import Site
from client.status import Status
from fedmm.config import RunConfig, SiteLimits
from fedmm.errors import UNEXPECTED_CODE, ConfigError, HospitalBusy, Refusal
from fedmm.privacy import vault
from fedmm.training.loop import choose_device
from fedmm.training.watch import Watch

log = logging.getLogger("fedmm.client")
POLL_SECONDS = 0.1  # guess: how often to ask whether the one before has ended


@dataclass(frozen=True)
class Work:
    """watch: to be called between steps.  status: what the hospital's own people see."""

    watch: Watch
    status: Status

    def progress(self, phase: str) -> Callable[[int, int], None]:
        def tell(step: int, steps: int) -> None:
            self.status.say(phase, step=step, steps=steps)

        return tell


@contextlib.contextmanager
def at_work(site: Site, config: RunConfig, *, run: str, round: int, timeout: float = 0.0) -> Iterator[Work]:
    """The hospital's patients, for one run at a time; whoever comes meanwhile waits.

    config: with what this hospital allows (`allowed`).  timeout: seconds from now, 0: none; limits.seconds counts as well.
    Guarantee: two processes never work on one run's question at once, here; when a process dies the system lets go.
    Raises: HospitalBusy, RunStopped, LedgerUnusable if there can be no lock; what is raised inside.
    """
    limits = site.config.limits
    watch = Watch(min((seconds for seconds in (limits.seconds, timeout) if seconds), default=0.0))
    status = Status(site.state / "status.json", run=run, round=round)
    try:
        status.say("waiting")
        with _alone(site, _slot(run, limits.trainings), watch), _within(limits, config):
            status.say("loading")
            yield Work(watch, status)
    except Refusal as refusal:
        status.say("refused", code=refusal.code)
        raise
    except Exception:
        status.say("failed", code=UNEXPECTED_CODE)
        raise
    status.say("settled")


def allowed(config: RunConfig, site: Site) -> RunConfig:
    """The run's settings within what site.toml says of this machine and of patients beside one another.

    isolate_patients: how a sum is rounded depends on the shape of the batch, so on who else is in it, by 1e-7 for honest
    weights. Weights that were made to blow up rounding could turn that into more than C.
    """
    limits, most = site.config.limits, config.training.physical_studies
    most = 1 if site.config.privacy.isolate_patients else min(most, limits.physical_studies or most)
    device = limits.device or config.training.device
    return config.replace(**{"training.physical_studies": most, "training.device": device})


@contextlib.contextmanager
def buying(site: Site, watch: Watch) -> Iterator[None]:
    """What is bought once for all runs is bought by one of them. Raises: as at_work."""
    with _alone(site, "purchase", watch):
        yield


def _slot(run: str, trainings: int) -> str:
    """A run has one place, whichever process works for it; others that fall on the same one wait for it."""
    return f"training-{int(hashlib.sha256(run.encode()).hexdigest(), 16) % trainings}"


@contextlib.contextmanager
def _alone(site: Site, name: str, watch: Watch) -> Iterator[None]:
    path = site.state / f"{name}.lock"
    with vault.as_refusal(path):
        site.state.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _take(handle, path, watch)
        watch.stopped()
        yield
    finally:
        os.close(handle)


def _take(handle: int, path: Path, watch: Watch) -> None:
    told = False
    while not _free(handle, path):
        if not told:
            log.warning("another training works on this hospital's patients: waiting for it")
            told = True
        if watch.late:
            raise HospitalBusy(
                "another training had this hospital for longer than this one may wait",
                why="two trainings at once would work on the same patients and race for the same memory",
                fix="ask again later; if its process hangs, the hospital ends it",
            )
        watch.stopped()
        time.sleep(POLL_SECONDS)


def _free(handle: int, path: Path) -> bool:
    with vault.as_refusal(path):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@contextlib.contextmanager
def _within(limits: SiteLimits, config: RunConfig) -> Iterator[None]:
    """Threads and memory of this process while it works, and as they were afterwards: on one machine a process may work for
    several hospitals. On CUDA the limit is a part of the GPU, on the CPU it is RLIMIT_DATA, all that this process has
    allocated; what does not fit is split, and what cannot be split fails as any want of memory."""
    with contextlib.ExitStack() as after:
        if limits.threads:
            after.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(limits.threads)
        if limits.memory_mb:
            with contextlib.suppress(ConfigError):  # a device that is not there is refused where the model is made
                _limit_memory(limits.memory_mb * 2**20, torch.device(choose_device(config.training.device)), after)
        yield


def _limit_memory(most: int, device: torch.device, after: contextlib.ExitStack) -> None:
    if device.type == "cuda":
        number = device.index or 0  # "cuda" alone is refused by the setter
        whole = torch.cuda.get_device_properties(number).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / whole), number)
        after.callback(torch.cuda.set_per_process_memory_fraction, 1.0, number)
    else:
        before = resource.getrlimit(resource.RLIMIT_DATA)
        most = most if before[1] == resource.RLIM_INFINITY else min(most, before[1])
        resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
        after.callback(resource.setrlimit, resource.RLIMIT_DATA, before)
