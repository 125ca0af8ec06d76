"""RUN/status.json: what a run is doing now, hospital by hospital. Written by the server app, read by everybody else.

For people who wonder what the run waits for. run.jsonl is the record of what happened; nothing depends on this file, it
holds names, codes and sentences that are safe already, and a disk that refuses it ends no run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from fedmm.errors import REFUSALS, UNEXPECTED_CODE, ConfigError, FedmmError
from fedmm.federation.watch import Phase, Watch
from fedmm.report.record import CONFIG_FILE, format_seconds
from fedmm.schema import Frozen

if TYPE_CHECKING:
    from fedmm.federation.checks import Failure, Heard
    from fedmm.federation.members import Members

STATUS_FILE = "status.json"
ENDS = ("done", "failed", "stopped")
PAGE = "docs/errors.md"
MAX_ERROR = 600  # characters of why a run ended

HospitalPhase = Literal["connected", "asked", "answered", "refused", "failed", "invalid", "silent", "gone"]


class HospitalStatus(Frozen):
    """round: of the phase; 0 before the first.  last_seen: of its latest message, UTC; empty: never."""

    phase: HospitalPhase
    round: int = 0
    last_seen: str = ""
    code: int = 0
    reason: str = ""
    page: str = Field("", description="Where docs/errors.md says what to do.")


class Status(Frozen):
    """since: when this phase began, UTC.  seconds: in each phase, all rounds together.  replies: that came, of any kind.

    refusals: replies that were a hospital's own no.  error: why it ended, if it failed.
    """

    run: str = ""
    round: int = 0
    rounds: int
    phase: Phase = "introduce"
    since: str
    updated: str
    error: str = ""
    hospitals: dict[str, HospitalStatus] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    replies: int = 0
    refusals: int = 0


def page_of(kind: str, code: int) -> str:
    """Where the documentation says what to do about a hospital's failure."""
    if code in REFUSALS or code == UNEXPECTED_CODE:
        return f"{PAGE}#{code}"
    return f"{PAGE}#{kind}"


class StatusFile(Watch):
    """Keeps RUN/status.json up to date; a context manager around the run, which says at the end how it ended.

    A run that goes on adds to what its status says. A run that cannot start leaves nothing that it made itself.
    """

    def __init__(self, folder: Path, *, rounds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock, self._since = folder, clock, clock()
        self._made = not folder.exists()
        self._status = Status(rounds=rounds, since=_now(), updated=_now())
        with suppress(ConfigError):
            before = read_status(folder)
            kept = ("run", "round", "hospitals", "seconds", "bytes_up", "bytes_down", "replies", "refusals")
            self._status = self._status.model_copy(update={name: getattr(before, name) for name in kept})

    def __enter__(self) -> StatusFile:
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return self.phase("done")
        if not (self._folder / CONFIG_FILE).exists() and self._made:  # it never started
            with suppress(OSError):
                (self._folder / STATUS_FILE).unlink()
                self._folder.rmdir()
            return None
        if not isinstance(error, Exception):  # Ctrl-C, the system's wish
            return self.phase("stopped")
        self._status = self._status.model_copy(update={"error": _explain(error)})
        return self.phase("failed")

    # --- what the run tells -------------------------------------------------------------------------------------------

    def joined(self, members: Members, *, run: str, round: int) -> None:
        """Who takes part, and who said at once that it would not. round: the last one that is done."""
        self._status = self._status.model_copy(update={"run": run, "round": round})
        seen = _now()
        for name in members.names.values():
            self._note(name, HospitalStatus(phase="connected", round=round, last_seen=seen))
        self._count(members.failures, arrived=len(members.arrived), bytes_up=sum(a.bytes for a in members.arrived))
        self._write()

    def phase(self, name: Phase, *, round: int = 0) -> None:
        now, old = self._clock(), self._status
        seconds = dict(old.seconds)
        if old.phase not in ENDS:
            seconds[old.phase] = seconds.get(old.phase, 0.0) + now - self._since
        self._since = now
        changes = {"phase": name, "round": round or old.round, "since": _now(), "seconds": seconds}
        self._status = old.model_copy(update=changes)
        self._write()

    def gone(self, hospitals: Sequence[str]) -> None:
        for name in hospitals:
            seen = self._last_seen(name)
            gone = {"phase": "gone", "round": self._status.round, "reason": "not connected", "page": page_of("gone", 0)}
            self._note(name, HospitalStatus(**gone, last_seen=seen))
        if hospitals:
            self._write()

    def asked(self, hospitals: Iterable[str], *, bytes: int) -> None:
        """Written with the phase that begins now."""
        for name in hospitals:
            seen = self._last_seen(name)
            self._note(name, HospitalStatus(phase="asked", round=self._status.round, last_seen=seen))
        self._status = self._status.model_copy(update={"bytes_down": self._status.bytes_down + bytes})

    def answered(self, hospital: str, *, code: int) -> None:
        """Unchecked: what it was worth, and its sentence, come with `heard`."""
        known = code in REFUSALS
        kind: HospitalPhase = "answered" if code == 0 else "refused" if known else "failed"
        said = HospitalStatus(
            phase=kind,
            round=self._status.round,
            last_seen=_now(),
            code=code,
            page=page_of(kind, code) if code else "",
        )
        self._note(hospital, said)
        self._write()

    def heard(self, heard: Heard) -> None:
        """Written with the phase that begins now."""
        bytes_up = sum(arrival.bytes for arrival in heard.arrived)
        self._count(heard.failures, arrived=len(heard.arrived), bytes_up=bytes_up)

    # --- keeping ------------------------------------------------------------------------------------------------------

    def _count(self, failures: Sequence[Failure], *, arrived: int, bytes_up: int) -> None:
        for failure in failures:
            said = {"code": failure.code, "reason": failure.reason, "page": page_of(failure.kind, failure.code)}
            seen = self._last_seen(failure.hospital) if failure.kind == "silent" else _now()
            self._note(
                failure.hospital,
                HospitalStatus.model_validate(
                    {"phase": failure.kind, "round": self._status.round, "last_seen": seen, **said}
                ),
            )
        old, refused = self._status, sum(failure.kind == "refused" for failure in failures)
        more = {"replies": old.replies + arrived, "refusals": old.refusals + refused}
        self._status = old.model_copy(update={**more, "bytes_up": old.bytes_up + bytes_up})

    def _note(self, hospital: str, said: HospitalStatus) -> None:
        hospitals = {**self._status.hospitals, hospital: said}
        self._status = self._status.model_copy(update={"hospitals": dict(sorted(hospitals.items()))})

    def _last_seen(self, hospital: str) -> str:
        known = self._status.hospitals.get(hospital)
        return known.last_seen if known else ""

    def _write(self) -> None:
        """Whole or not at all, for readers; not synced: after a power cut run.jsonl says what was."""
        self._status = self._status.model_copy(update={"updated": _now()})
        new = self._folder / (STATUS_FILE + ".new")
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            new.write_text(self._status.model_dump_json(indent=1) + "\n", encoding="utf-8")
            os.replace(new, self._folder / STATUS_FILE)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_status(folder: Path) -> Status:
    """Raises: ConfigError if the folder has no status, or one that another version wrote."""
    path = folder / STATUS_FILE
    try:
        return Status.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {STATUS_FILE}", fix="give the folder of a run that was started") from None
    except (OSError, ValueError, ValidationError) as error:
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__})", fix="read it with the fedmm that runs it"
        ) from None


def status_json(folder: Path) -> dict[str, Any]:
    """The same for programs. Raises: ConfigError."""
    return read_status(folder).model_dump(mode="json")


def describe_status(folder: Path) -> str:
    """For people: the run, and a line a hospital: name, last seen, round, phase, code and page. Raises: ConfigError."""
    status = read_status(folder)
    age = format_seconds(max(0.0, _age(status.since)))
    doing = status.phase if status.phase in ENDS else f"{status.phase} for {age}"
    parts = [f"run {status.run or folder.name}", f"round {status.round}/{status.rounds}", doing]
    parts += [f"{status.replies} replies", f"{status.refusals} refusals"]
    parts += [f"{status.bytes_up / 1e6:.1f} MB up", f"{status.bytes_down / 1e6:.1f} MB down"]
    lines = [" | ".join(parts)]
    if status.error:
        lines.append(f"  {status.error}")
    if status.seconds:
        lines.append("seconds  " + ", ".join(f"{name} {value:.1f}" for name, value in status.seconds.items()))
    width = max((len(name) for name in status.hospitals), default=0)
    for name, hospital in status.hospitals.items():
        words = [f"{name:<{width}}", hospital.last_seen or "never seen", f"round {hospital.round}", hospital.phase]
        words += [str(hospital.code)] if hospital.code else []
        words += [part for part in (hospital.reason, hospital.page) if part]
        lines.append("  ".join(words))
    return "\n".join(lines)


def _explain(error: Exception) -> str:
    """Our own errors are safe to show; of another one only its type is."""
    if not isinstance(error, FedmmError):
        return type(error).__name__
    return ": ".join(part for part in (error.what, error.why) if part)[:MAX_ERROR]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _age(since: str) -> float:
    """Seconds. since: as `_now` writes it."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
