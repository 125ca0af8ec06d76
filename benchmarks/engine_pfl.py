"""pfl-research as an engine: its FederatedAveraging in one process, a hospital's round trained with fedmm's loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.context import CentralContext
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.stats import MappedVectorStatistics

from benchmarks.engine_run import Bare, Done


def pfl(settings: Mapping[str, Any]) -> Done:
    torch.set_num_threads(1)
    job, clock = Bare(settings), Clock()
    hospitals = range(len(job.folders))

    @cache
    def hospital(number: int) -> Dataset:
        cohort = job.cohort(number)
        return Dataset((np.arange(cohort.patients),), metadata={"number": number, "cohort": cohort})

    job.bench.load(job.start)
    model = job.bench.model
    model.loss = model.metrics = None  # which pfl asks for, and which are for its own training
    server = torch.optim.SGD(model.parameters(), lr=1.0)  # one step against the mean change: the mean of the weights
    data = FederatedDataset(hospital, get_user_sampler("minimize_reuse", hospitals))
    Averaging(job).run(
        backend=SimulatedBackend(data, data, postprocessors=[WeightByUser()]),
        model=Model(model, torch.optim.SGD, server),
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job.config.federation.rounds,
            evaluation_frequency=job.config.federation.rounds,
            train_cohort_size=len(hospitals),
            val_cohort_size=0,
        ),
        model_train_params=NNTrainHyperParams(local_batch_size=None, local_num_epochs=1, local_learning_rate=1.0),
        callbacks=[clock],
    )
    return Done(clock.rounds, job.bench.weights())


class Averaging(FederatedAveraging):
    """pfl's, with the bare loop's training of one hospital."""

    def __init__(self, job: Bare) -> None:
        super().__init__()
        self._job = job

    def train_one_user(
        self,
        initial_model_state: MappedVectorStatistics,
        model: Model,
        user_dataset: Dataset,
        central_context: CentralContext,
    ) -> tuple[MappedVectorStatistics, Metrics]:
        number, cohort = user_dataset.metadata["number"], user_dataset.metadata["cohort"]
        self._job.train(number, central_context.current_central_iteration + 1, cohort)
        return model.get_model_difference(initial_model_state), Metrics()


class Model(PyTorchModel):
    def evaluate(self, *_: object, **__: object) -> Metrics:
        """Nothing: pfl always asks in the first round."""
        return Metrics()


class Clock(TrainingProcessCallback):
    """Seconds of each round."""

    def __init__(self) -> None:
        self.rounds = list[float]()

    def on_train_begin(self, *, model: Model) -> Metrics:
        self._began = time.monotonic()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Model, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        ended = time.monotonic()
        self.rounds.append(ended - self._began)
        self._began = ended
        return False, Metrics()
