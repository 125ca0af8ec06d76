"""NVFlare's simulator as an engine: its FedAvg, and an executor that trains a hospital's round with fedmm's loop.

A thread of the simulator is a process for one hospital. With a thread for each hospital they live as long as the job; with
fewer every task gets a process of its own, which imports and reads again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nvflare.apis.executor import Executor
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner
from safetensors.torch import load_file, save_file

from benchmarks.engine_run import Bare, Done
from fedmm.config import find_hospitals

if TYPE_CHECKING:
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.apis.signal import Signal

    from fedmm.data.dataset import Cohort

SITE = "site-"
TASK = "train"
ROUNDS, MODEL = "rounds.json", "model.safetensors"


def nvflare(settings: Mapping[str, Any], threads: int | None) -> Done:
    """Until the simulator has ended.  threads: hospitals that train at the same time; None: all of them."""
    folder = Path(settings["federation.out"])
    hospitals, rounds = len(find_hospitals(Path(settings["data.hospitals"]))), settings["federation.rounds"]
    _write(folder / "job", "meta.json", {"name": "job", "min_clients": hospitals, "deploy_map": {"app": ["@ALL"]}})
    _write(folder, "settings.json", settings)
    ours = [f"{__name__}.{one.__name__}" for one in (Averaging, Training)]
    allowed = {"class_allow_list": ours}  # these sites' policy; without it NVFlare refuses classes that are not its own
    _write(folder / "simulator/local", "resources.json", allowed)
    averaging = {"folder": str(folder), "num_clients": hospitals, "num_rounds": rounds}
    workflow = {"id": "fedavg", "path": ours[0], "args": averaging}
    _write(folder / "job/app/config", "config_fed_server.json", {"format_version": 2, "workflows": [workflow]})
    executor = {"path": ours[1], "args": {"folder": str(folder)}}
    executors = [{"tasks": [TASK], "executor": executor}]
    _write(folder / "job/app/config", "config_fed_client.json", {"format_version": 2, "executors": executors})
    simulator = SimulatorRunner(
        str(folder / "job"), str(folder / "simulator"), n_clients=hospitals, threads=threads or hospitals
    )
    if failed := simulator.run():
        raise SystemExit(f"NVFlare's simulator ended with {failed}")
    return Done(json.loads((folder / ROUNDS).read_text()), load_file(folder / MODEL))


def _write(folder: Path, name: str, what: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(what))


def _job(folder: Path) -> Bare:
    torch.set_num_threads(1)
    return Bare(json.loads((folder / "settings.json").read_text()))


class Averaging(FedAvg):
    """NVFlare's FedAvg, which leaves in `folder` the seconds of its rounds and the weights."""

    def __init__(self, folder: str, num_clients: int, num_rounds: int) -> None:
        super().__init__(num_clients=num_clients, num_rounds=num_rounds, task_name=TASK)
        self._folder, self._rounds = Path(folder), list[float]()

    def load_model(self) -> FLModel:
        start = _job(self._folder).start
        self._began = time.monotonic()
        return FLModel(params={name: value.numpy() for name, value in start.items()})

    def save_model(self, model: FLModel) -> None:
        """After each round."""
        ended = time.monotonic()
        self._rounds.append(ended - self._began)
        self._began = ended
        save_file({name: torch.from_numpy(value) for name, value in model.params.items()}, self._folder / MODEL)
        _write(self._folder, ROUNDS, self._rounds)


class Training(Executor):
    """A hospital's rounds: what is trained and how is the bare loop's."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._job: Bare | None = None
        self._cohort: Cohort | None = None

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        number = int(fl_ctx.get_identity_name().removeprefix(SITE)) - 1
        self._job = self._job or _job(self._folder)
        self._cohort = self._cohort or self._job.cohort(number)
        asked = FLModelUtils.from_shareable(shareable)
        weights = {name: torch.from_numpy(value) for name, value in asked.params.items()}
        trained = self._job.round(number, asked.current_round + 1, weights, self._cohort)
        return FLModelUtils.to_shareable(FLModel(params={name: value.numpy() for name, value in trained.items()}))
