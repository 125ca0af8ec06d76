"""A round across sockets against the local engine: the same job, the same fixed noise, the same weights at the end.

here     LocalGrid in one process                 workers  LocalGrid with a process for each hospital
sockets  kits, TLS, proxy, SuperLink, SuperNodes and executors: the processes of `fedmm coordinator up` and `fedmm site up`

Few patients and small inputs, so that training does not hide what is compared. All on loopback of one machine: no network.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from fedmm.errors import FedmmError
from fedmm.report.status import status_json
from tests.e2e.sites import TINY, Sites, flags, until

CLIENT = (
    "tests.fixed_noise:app"  # as the executors of tests/e2e/sites.py: the noise repeats, so weights can be compared
)
SMALL = {
    **TINY,
    "model.image": "hog",
    "model.audio": "mfcc",
    "training.clipping": "ghost",
    "training.local_steps": 1,
    "privacy.evaluation_share": 0.0,
    "data.image_size": 64,
}
MODELS: Mapping[int, Mapping[str, Any]] = {  # MB of weights, about
    1: {"model.width": 64, "data.report_buckets": 2048},
    10: {"model.width": 256, "data.report_buckets": 8192},
    100: {"model.width": 1024, "data.report_buckets": 16384, "data.image_size": 96},
}
ENGINES = ("here", "workers", "sockets")
MIB = 2**20
IDLE_SECONDS, RUN_SECONDS = 20.0, 7200.0


def measure(*, quick: bool) -> dict[str, float]:
    """By size, hospitals and engine; `…_first_s` with the wait for data and model, `…_s` the median of later rounds."""
    found: dict[str, float] = {}
    plan = [(1, 2), (10, 2)] if quick else [(1, 2), (10, 2), (100, 2), (10, 3)]
    for size, hospitals in plan:
        found |= compare(size, hospitals, rounds=5 if quick else 8, repeats=1 if quick else 2)
    return found


def compare(size: int, hospitals: int, *, rounds: int, repeats: int) -> dict[str, float]:
    """Engines in turn, `repeats` times, each time on fresh hospitals and ledgers."""
    given = {**SMALL, **MODELS[size], "federation.rounds": rounds, "federation.min_hospitals": hospitals}
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    first: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    other: dict[str, float] = {}
    for _ in range(repeats):
        with (
            tempfile.TemporaryDirectory(prefix="fedmm-benchmark-") as place,
            Sites(Path(place), _names(hospitals)) as sites,
        ):
            runs = {engine: _local(sites, given, engine, other) for engine in ENGINES[:2]}
            runs["sockets"] = _sockets(sites, given, other)
            _equal(runs)
            for engine, run in runs.items():
                took = [record["seconds"] for record in _records(run)]
                first[engine].append(took[0])
                seconds[engine] += took[1:-1]  # the last one evaluates
            record = _records(runs["sockets"])[1]
            other |= {"up_mb": record["bytes_up"] / 1e6, "down_mb": record["bytes_down"] / 1e6}
            other["weights_mb"] = (runs["here"] / "model.safetensors").stat().st_size / 1e6
    found = dict(other)
    for engine in ENGINES:
        found[f"{engine}_first_s"] = statistics.median(first[engine])
        found[f"{engine}_s"] = statistics.median(seconds[engine])
        found[f"{engine}_s_spread"] = max(seconds[engine]) - min(seconds[engine])
    for engine in ENGINES[1:]:
        found[f"{engine}_to_here"] = found[f"{engine}_s"] / found["here_s"]
    found["sockets_overhead_s"] = found["sockets_s"] - found["here_s"]
    return {f"{size}mb_{hospitals}h_{name}": value for name, value in sorted(found.items())}


def _names(count: int) -> Sequence[str]:
    return ("north", "south", "middle")[:count]


def _records(run: Path) -> list[dict[str, Any]]:
    from fedmm.report.record import read_rounds

    return read_rounds(run)


def _equal(runs: Mapping[str, Path]) -> None:
    """Raises: SystemExit if the engines did not do the same."""
    bytes_of = {engine: (run / "model.safetensors").read_bytes() for engine, run in runs.items()}
    if len(set(bytes_of.values())) != 1:
        raise SystemExit(f"{' and '.join(bytes_of)} ended with different weights: nothing here can be compared")


# --- one machine ------------------------------------------------------------------------------------------------------


def _local(sites: Sites, given: Mapping[str, Any], engine: str, other: dict[str, float]) -> Path:
    folder = sites.folder / engine
    shutil.copytree(sites.folder / "made", folder / "hospitals")
    places = {"data.hospitals": str(folder / "hospitals"), "federation.out": str(folder / "run")}
    context = multiprocessing.get_context("spawn")  # a process of its own, so that its memory is its own
    workers = len(sites.hospitals) if engine == "workers" else 0
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        own, below = pool.submit(_simulate, {**given, **places}, workers).result()
    other[f"{engine}_mb"] = own
    if workers:
        other[f"{engine}_worker_mb"] = below
    return folder / "run"


def _simulate(given: Mapping[str, Any], workers: int) -> tuple[float, float]:
    """Peak memory in MiB of this process, and of the largest one below it."""
    import torch

    from fedmm.cli import simulate_here
    from fedmm.config import RunConfig

    torch.set_num_threads(1)  # as the executors at the hospitals: two may add up in another order
    with contextlib.redirect_stdout(io.StringIO()):
        simulate_here(RunConfig.from_flat(given), workers=workers, client=CLIENT)
    own, below = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own, below


# --- real processes ---------------------------------------------------------------------------------------------------


def _sockets(sites: Sites, given: Mapping[str, Any], other: dict[str, float]) -> Path:
    began = time.monotonic()
    sites.up("coordinator")
    until(lambda: " up: " in (sites.folder / "coordinator.txt").read_text(), what="the coordinator is up")
    other["coordinator_ready_s"] = time.monotonic() - began
    began = time.monotonic()
    sites.up(*sites.hospitals)
    until(lambda: sites.connected() == set(sites.hospitals), what="all hospitals connect")
    other["site_connected_s"] = time.monotonic() - began
    time.sleep(10)  # until the executors have their workers: they import torch
    processes = Processes([process.pid for process in sites.started.values()])
    with processes:
        before = processes.cpu()
        time.sleep(IDLE_SECONDS)
        idle = {
            role: (spent - before[role]) / IDLE_SECONDS for role, spent in processes.cpu().items() if role in before
        }
        began, before = time.monotonic(), processes.cpu()
        sites.fedmm("coordinator", "run", sites.kit().folder, "--name", "r", "--detach", *flags(given))
        ended = until(lambda: _ended(sites), what="the run ends", seconds=RUN_SECONDS)
        if ended != "done":
            raise SystemExit(f"the run {ended}" + sites.logs())
        other["sockets_whole_run_s"] = time.monotonic() - began
        spent = {role: now - before.get(role, 0.0) for role, now in processes.cpu().items()}
    for role, share in idle.items():
        other[f"idle_{role}_cpu_percent"] = 100 * share
    for role, seconds in spent.items():
        other[f"run_{role}_cpu_s"] = seconds
    for role, peak in processes.peak.items():
        other[f"sockets_{role}_mb"] = peak / MIB
    other["superlink_database_mb"] = processes.database / MIB
    sites.close()
    return sites.kit().runs / "r"


def _ended(sites: Sites) -> str:
    """done, failed or stopped; empty while it goes on. The model is written last but for the report."""
    try:
        phase = str(status_json(sites.kit().runs / "r")["phase"])
    except (OSError, ValueError, KeyError, FedmmError):
        return ""
    return phase if phase in ("done", "failed", "stopped") else ""


ROLES = (  # in a process' command line, the first that is found
    ("client.supernode", "supernode"),
    ("fixed_executor", "executor"),
    ("spawn_main", "worker"),
    ("flwr-serverapp", "serverapp"),
    ("flower-superexec", "superexec"),
    ("flower-superlink", "superlink"),
    ("server.proxy", "proxy"),
    ("operate import up", "supervisor"),
)


class Processes:
    """A context manager that looks at all processes below `roots` now and then. Linux: reads /proc.

    peak: by role the most resident bytes of one process.  database: most bytes of the SuperLink's database.
    """

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots, self.peak, self.database = set(roots), dict[str, float](), 0.0
        self._cpu: dict[int, tuple[str, float]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Processes:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def cpu(self) -> dict[str, float]:
        """By role, seconds of all its processes together, those included that are gone."""
        self._look()
        total: dict[str, float] = {}
        for role, seconds in self._cpu.values():
            total[role] = total.get(role, 0.0) + seconds
        return total

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self._look()

    def _look(self) -> None:
        for pid, role in self._tree():
            with contextlib.suppress(OSError, IndexError, ValueError):
                status = Path(f"/proc/{pid}/status").read_text()
                peak = 1024.0 * int(status.split("VmHWM:")[1].split()[0])
                parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self._cpu[pid] = (role, (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK"))
                self.peak[role] = max(self.peak.get(role, 0.0), peak)
                if role == "superlink":
                    self.database = max(self.database, float(_database_bytes(pid)))

    def _tree(self) -> Iterator[tuple[int, str]]:
        parent: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    parent[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        for pid in parent:
            above: int | None = pid
            while above and above not in self._roots:
                above = parent.get(above)
            if above:
                with contextlib.suppress(OSError):
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                    role = next((role for mark, role in ROLES if mark in line), "")
                    if role:
                        yield pid, role


def _database_bytes(superlink: int) -> int:
    line = Path(f"/proc/{superlink}/cmdline").read_bytes().decode().split("\0")
    if "--database" not in line:
        return 0
    database = Path(line[line.index("--database") + 1])
    return sum(file.stat().st_size for file in database.parent.glob(database.name + "*"))
