"""What others' tools show of a run, written beside run.jsonl: TensorBoard's event files always, MLflow where it is set up.

Scores, epsilon by hospital, bytes and seconds, round by round: the numbers of run.jsonl and no others.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fedmm.report.record import read_config

if TYPE_CHECKING:
    from fedmm.federation.rounds import RoundRecord

TENSORBOARD = "tensorboard"
MLFLOW_URI = "MLFLOW_TRACKING_URI"


class Trackers:
    """A context manager: leaving it closes what was opened. Nothing is opened before the first round is done.

    say: is told once, in a line, if MLflow is asked for and cannot be had. A tracker that fails ends no run.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._events: Any = None
        self._mlflow: Any = None
        self._opened = False

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._try("TensorBoard", self._events.close)
        if self._mlflow is not None:
            ending = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
            self._try("MLflow", lambda: self._mlflow.end_run(status=ending))

    def note(self, record: RoundRecord) -> None:
        """One round."""
        if not self._opened:
            self._opened = True
            self._try("TensorBoard", self._open_events)
            if os.environ.get(MLFLOW_URI):
                self._try("MLflow", self._open_mlflow)
        values = scalars(record)
        if self._events is not None:
            self._try("TensorBoard", lambda: self._write_events(values, record.round))
        if self._mlflow is not None:
            self._try("MLflow", lambda: self._mlflow.log_metrics(values, step=record.round))

    def _try(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except ImportError:
            self._say(f"{what}: not installed; the run goes on without it")
        except Exception as error:  # a full disk, a server that is away: the run's own files are what counts
            self._say(f"{what}: {type(error).__name__}; the run goes on without it")
            if what == "MLflow":
                self._mlflow = None
            else:
                self._events = None

    def _open_events(self) -> None:
        from tensorboardX import SummaryWriter  # here: it imports torch, which reading a run does not need

        self._events = SummaryWriter(logdir=str(self._folder / TENSORBOARD))

    def _write_events(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def _open_mlflow(self) -> None:
        mlflow = importlib.import_module("mlflow")
        content = read_config(self._folder)
        mlflow.set_experiment("fedmm")
        mlflow.start_run(run_name=str(content.get("run") or self._folder.name))
        # where folders lie says something about the machine and nothing about the run
        settings = {k: v for k, v in content["settings"].items() if k not in ("data.hospitals", "federation.out")}
        mlflow.log_params(settings)
        self._mlflow = mlflow


def scalars(record: RoundRecord) -> dict[str, float]:
    """Name to value; what is not known is left out.

    epsilon: spent by each hospital's ledger, all its runs.  seconds: of the round.  bytes: of the round.
    """
    values: dict[str, float] = {
        "round/seconds": record.seconds,
        "round/hospitals": len(record.trained),
        "round/failures": len({failure["hospital"] for failure in record.failures}),
        "bytes/up": record.bytes_up,
        "bytes/down": record.bytes_down,
    }
    for name, said in record.epsilon.items():
        values[f"epsilon/{name}"] = said["spent"]
    for name, scores in [*record.scores.items(), ("pooled", record.pooled or {})]:
        for kind in ("mean_auroc", "accuracy", "f1_macro"):
            value = scores.get(kind)
            if isinstance(value, int | float):
                values[f"{kind}/{name}"] = value
    return {name: float(value) for name, value in values.items()}
