"""Flower strategies by name, and their state, so that a resumed run goes on as if it had not stopped."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi, Strategy

from fedmm.config import FederationConfig
from fedmm.federation.robust import GeometricMedian, Krum, Median, TrimmedMean

ADAPTIVITY = 1e-3  # tau of Reddi et al. 2021, their default


def make_strategy(config: FederationConfig) -> Strategy:
    """The strategy of `federation.strategy`, asking all hospitals in each round (sampling hospitals buys no privacy).

    It asks for one node at least and never waits for more: a strategy would wait for ever for a hospital that has left.
    How few may go on is decided in rounds.py.
    """
    common: dict[str, Any] = {
        "fraction_train": 1.0,
        "fraction_evaluate": 1.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
    }
    rate, momentum = config.server_learning_rate, config.server_momentum
    if config.strategy == "fedavgm":
        return FedAvgM(**common, server_learning_rate=rate, server_momentum=momentum)
    if config.strategy == "scaffold":  # what makes it SCAFFOLD is around it, in scaffold.py
        return FedAvgM(**common, server_learning_rate=rate, server_momentum=0.0)
    if config.strategy in ("fedadam", "fedyogi"):
        kind = FedAdam if config.strategy == "fedadam" else FedYogi
        return kind(**common, eta=rate, beta_1=momentum, beta_2=0.99, tau=ADAPTIVITY)
    if config.strategy in ("krum", "multikrum"):
        return Krum(**common, byzantine=config.byzantine, many=config.strategy == "multikrum")
    if config.strategy == "fedtrimmedavg":
        return TrimmedMean(**common, byzantine=config.byzantine)
    return {"fedmedian": Median, "geomedian": GeometricMedian}.get(config.strategy, FedAvg)(**common)


def strategy_state(strategy: Strategy) -> dict[str, torch.Tensor]:
    """Named tensors of what a strategy remembers between rounds; empty for FedAvg and the robust ones."""
    state: dict[str, torch.Tensor] = {}
    momentum = getattr(strategy, "momentum_vector", None)
    for i, value in enumerate(momentum or []):
        state[f"momentum.{i}"] = torch.from_numpy(np.array(value))
    for slot in ("m_t", "v_t"):
        for name, value in (getattr(strategy, slot, None) or {}).items():
            state[f"{slot}.{name}"] = torch.from_numpy(np.array(value))
    return state


def restore_strategy(strategy: Strategy, state: dict[str, torch.Tensor], arrays: ArrayRecord) -> None:
    """Undo of `strategy_state`; arrays: the global weights at that point."""
    if isinstance(strategy, FedAvgM):
        strategy.current_arrays = ArrayRecord({name: Array(arrays[name].numpy()) for name in arrays})
        found = sorted((int(k.split(".")[1]), v.numpy()) for k, v in state.items() if k.startswith("momentum."))
        strategy.momentum_vector = [value for _, value in found] or None
    for slot in ("m_t", "v_t"):
        if hasattr(strategy, slot):
            values = {k.split(".", 1)[1]: v.numpy() for k, v in state.items() if k.startswith(slot + ".")}
            setattr(strategy, slot, values or None)
