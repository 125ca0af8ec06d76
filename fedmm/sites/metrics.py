"""Prometheus metrics, on loopback only: what a coordinator and a hospital show to their own people.

    coordinator   RUN/status.json and run.jsonl of the newest run      rounds, replies, refusals, bytes, epsilon that was told
    hospital      its ledger and HOSPITAL/.fedmm/status.json           epsilon, releases, refusals, step time, memory

A hospital's numbers are for the hospital: how long a step takes and how much memory it needs depends on its patients, so
nobody outside may scrape them. What the coordinator shows is what hospitals have told it anyway.
Nothing here writes, and a scrape reads what is new since the last one. Files are read as they are, without the classes that
wrote them: another version of fedmm may be running.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from fedmm.config import load_site
from fedmm.errors import ConfigError, FedmmError, LedgerUnusable
from fedmm.privacy.ledger import Ledger, Spent
from fedmm.sites.kit import KIT_FILE, Kit

STATUS, ROUNDS, CONFIG = "status.json", "run.jsonl", "config.json"  # of a run folder (fedmm.report)
SITE_STATUS = Path(".fedmm") / "status.json"
RUN_PHASES = ("introduce", "ask", "collect", "check", "aggregate", "evaluate", "done", "failed", "stopped")
SITE_PHASES = ("idle", "waiting", "loading", "training", "evaluating", "settled", "refused", "failed")
CONNECTED = ("connected", "asked", "answered", "refused", "failed", "invalid")  # it spoke in this round, or may still
LOOPBACK = "127.0.0.1"
LEDGER_SECONDS = 60.0  # guess: epsilon is computed again after a change, but not more often: up to 4 s of a core


# --- serving ----------------------------------------------------------------------------------------------------------


class Served:
    """A server that answers scrapes. port: where.  A context manager; closing twice is closing once."""

    def __init__(self, server: Any, thread: threading.Thread) -> None:
        self._server, self._thread, self._closed = server, thread, False
        self.port = int(server.server_port)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(registry: CollectorRegistry, port: int) -> Served:
    """Answer scrapes of `registry` on loopback, whoever asks on this machine. port: 0 takes a free one.

    Raises: OSError if the port is taken.
    """
    return Served(*start_http_server(port, addr=LOOPBACK, registry=registry))


def metrics(kit: Kit, registry: CollectorRegistry) -> AbstractContextManager[object]:
    """Served while a kit is up, on the port that it names; 0 there: not at all. Raises: ConfigError if the port is taken."""
    port = kit.config.ports.metrics
    if not port:
        return nullcontext()
    try:
        return serve(registry, port)
    except OSError as error:
        raise ConfigError(
            f"metrics cannot be served on port {port} ({error.strerror})",
            fix=f"another metrics in [ports] of {kit.folder / KIT_FILE}, or 0 for none",
        ) from None


def coordinator_registry(runs: Path) -> CollectorRegistry:
    """Of the newest run in the folder `runs`."""
    return _registry(CoordinatorMetrics(runs))


def hospital_registry(hospital: Path) -> CollectorRegistry:
    """Of one hospital folder."""
    return _registry(HospitalMetrics(hospital))


def _registry(collector: Collector) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return registry


# --- coordinator ------------------------------------------------------------------------------------------------------


@dataclass
class Tail:
    """What the rounds of one run add up to, read as far as `offset`."""

    path: Path
    offset: int = 0
    rounds: int = 0
    seconds: float = 0.0
    replies: Counter[str] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    epsilon: dict[str, dict[str, Any]] = field(default_factory=dict)

    def catch_up(self) -> None:
        """Read what was added, whole lines only."""
        with suppress(OSError), self.path.open("rb") as file:
            file.seek(self.offset)
            added = file.read()
            whole = added[: added.rfind(b"\n") + 1]
            self.offset += len(whole)
            for line in whole.splitlines():
                with suppress(ValueError, KeyError, TypeError, AttributeError):
                    self._add(json.loads(line))

    def _add(self, record: dict[str, Any]) -> None:
        self.rounds += 1
        self.seconds += float(record["seconds"])
        self.replies.update(arrival["hospital"] for arrival in record["arrived"])
        self.refusals.update((f["hospital"], f["kind"], int(f["code"])) for f in record["failures"])
        self.epsilon.update(record["epsilon"])


class CoordinatorMetrics(Collector):
    """Reads the newest run at each scrape."""

    def __init__(self, runs: Path) -> None:
        self._runs, self._lock = runs, threading.Lock()
        self._tail = Tail(Path())

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            run = newest_run(self._runs)
            if run is None:
                return
            if self._tail.path != run / ROUNDS:
                self._tail = Tail(run / ROUNDS)
            self._tail.catch_up()
            yield from _of_status(_read(run / STATUS))
            yield from _of_rounds(self._tail)


def newest_run(runs: Path) -> Path | None:
    """The run folder whose status or record changed last."""
    found: list[tuple[float, Path]] = []
    for folder in _folders(runs):
        for name in (STATUS, ROUNDS, CONFIG):
            with suppress(OSError):
                found.append(((folder / name).stat().st_mtime, folder))
    return max(found)[1] if found else None


def _folders(runs: Path) -> list[Path]:
    try:
        return [path for path in runs.iterdir() if path.is_dir()]
    except OSError:
        return []


def _of_status(status: dict[str, Any]) -> Iterator[Metric]:
    yield InfoMetricFamily("fedmm_run", "The newest run.", value={"run": str(status.get("run", ""))})
    yield _one("fedmm_run_round", "Round that the run is in; 0 before the first.", status.get("round"))
    yield _one("fedmm_run_rounds", "Rounds that the run will have.", status.get("rounds"))
    yield _state("fedmm_run_phase", "1 for what the run is doing.", RUN_PHASES, status.get("phase"))
    yield _counted("fedmm_bytes_received", "From hospitals, contents of messages.", status.get("bytes_up"))
    yield _counted("fedmm_bytes_sent", "To hospitals, contents of messages.", status.get("bytes_down"))
    spent = CounterMetricFamily("fedmm_phase_seconds", "Spent in each phase, all rounds.", labels=["phase"])
    for phase, seconds in _items(status.get("seconds")):
        if phase in RUN_PHASES and _is_number(seconds):
            spent.add_metric([phase], seconds)
    yield spent
    phases = [said.get("phase") for _, said in _items(status.get("hospitals")) if isinstance(said, dict)]
    connected = sum(phase in CONNECTED for phase in phases)
    yield _one("fedmm_hospitals_connected", "Hospitals that are there.", connected)
    yield _one("fedmm_hospitals_known", "Hospitals that the run has heard of.", len(phases))


def _of_rounds(tail: Tail) -> Iterator[Metric]:
    yield _counted("fedmm_rounds", "Rounds that are done.", tail.rounds)
    yield _counted("fedmm_round_seconds", "Spent in rounds that are done.", tail.seconds)
    replies = CounterMetricFamily("fedmm_replies", "Replies that came, of any kind.", labels=["hospital"])
    for hospital, count in sorted(tail.replies.items()):
        replies.add_metric([hospital], count)
    yield replies
    labels = ["hospital", "kind", "code"]
    refusals = CounterMetricFamily("fedmm_refusals", "Times without a usable reply; docs/errors.md.", labels=labels)
    for (hospital, kind, code), count in sorted(tail.refusals.items()):
        refusals.add_metric([hospital, kind, str(code)], count)
    yield refusals
    for name, key, what in (
        ("fedmm_told_epsilon", "spent", "Epsilon that the hospital's ledger last told, all its runs."),
        ("fedmm_told_epsilon_ceiling", "ceiling", "Ceiling that it told."),
    ):
        told = GaugeMetricFamily(name, what, labels=["hospital"])
        for hospital, said in sorted(tail.epsilon.items()):
            if _is_number(said.get(key)):
                told.add_metric([hospital], said[key])
        yield told


# --- hospital ---------------------------------------------------------------------------------------------------------


class HospitalMetrics(Collector):
    """Ledger and status of one hospital.

    The ledger is opened only if it is there, and epsilon computed at most once in LEDGER_SECONDS.
    """

    def __init__(self, hospital: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._hospital, self._clock, self._lock = hospital, clock, threading.Lock()
        self._seen: tuple[Any, ...] = ()
        self._next = 0.0
        self._spent: Spent | None = None
        self._usable = True

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            self._look()
            if self._spent is not None:
                yield from _of_ledger(self._spent)
            yield _one("fedmm_ledger_usable", "0 if the ledger cannot be read or trusted.", int(self._usable))
            yield from _of_site(_read(self._hospital / SITE_STATUS))

    def _look(self) -> None:
        """Read the ledger if it has changed and was not read just now."""
        try:
            site = load_site(self._hospital)
        except FedmmError:
            self._usable, self._spent = False, None
            return
        path = self._hospital / site.ledger.path
        files = [self._hospital / "site.toml", path, path.with_name(path.name + "-wal"), path.with_suffix(".key")]
        seen, now = tuple(_stamp(file) for file in files), self._clock()
        if seen == self._seen or (now < self._next and self._spent is not None):
            return
        self._seen, self._next = seen, now + LEDGER_SECONDS
        self._spent, self._usable = None, True
        if not path.exists() and not path.with_suffix(".key").exists():
            return  # it has never trained
        try:
            if not path.exists() or not path.with_suffix(".key").exists():
                raise LedgerUnusable("ledger or key alone")  # opening would repair or refuse; not ours to do
            with Ledger.open(self._hospital, site, create=False) as ledger:
                self._spent = ledger.spent()
        except FedmmError:
            self._usable = False


def _of_ledger(spent: Spent) -> Iterator[Metric]:
    yield _one("fedmm_epsilon_spent", "Of all that ever left, by PLD.", spent.epsilon)
    yield _one("fedmm_epsilon_ceiling", "Of site.toml.", spent.ceiling)
    yield _one("fedmm_epsilon_left", "Ceiling less spent, at least 0.", max(0.0, spent.ceiling - spent.epsilon))
    yield _one("fedmm_delta", "At which epsilon is read.", spent.delta)
    yield _one("fedmm_ledger_reserved", "Charges that were never settled; they count as spent.", spent.reserved)
    yield _counted("fedmm_ledger_releases", "Charges that epsilon covers.", spent.releases)
    yield _counted("fedmm_ledger_unprotected", "Releases that no epsilon covers.", spent.not_private)
    yield _counted("fedmm_ledger_refusals", "Requests that the ledger refused.", spent.refusals)


def _of_site(status: dict[str, Any]) -> Iterator[Metric]:
    yield _state("fedmm_site_phase", "1 for what the hospital is doing.", SITE_PHASES, status.get("phase"))
    for name, key, scale, what in (
        ("fedmm_site_round", "round", 1, "Round that it works on."),
        ("fedmm_site_step", "step", 1, "Step of the round."),
        ("fedmm_site_steps", "steps", 1, "Steps that the round has."),
        ("fedmm_site_step_seconds", "step_seconds", 1, "Time of a step."),
        ("fedmm_site_memory_bytes", "memory_mb", 10**6, "Memory of the process that trains."),
        ("fedmm_site_gpu_memory_bytes", "gpu_memory_mb", 10**6, "Memory on the GPU."),
        ("fedmm_site_refusal_code", "code", 1, "Code of its last refusal; 0: none."),
    ):
        value = status.get(key)
        yield _one(name, what, value * scale if _is_number(value) else None)


# --- reading and writing down -----------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size)


def _items(value: object) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, dict) else ()


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def _one(name: str, what: str, value: Any) -> Metric:
    """A gauge; without a sample if the value is not known."""
    metric = GaugeMetricFamily(name, what)
    if _is_number(value):
        metric.add_metric([], value)
    return metric


def _counted(name: str, what: str, value: Any) -> Metric:
    """A counter: `_total` is added to its name."""
    metric = CounterMetricFamily(name, what)
    if _is_number(value):
        metric.add_metric([], value)
    return metric


def _state(name: str, what: str, states: Iterable[str], now: Any) -> Metric:
    metric = GaugeMetricFamily(name, what, labels=["phase"])
    if now is not None:
        for state in states:
            metric.add_metric([state], int(state == now))
    return metric
