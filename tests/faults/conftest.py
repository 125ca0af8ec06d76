"""The federation that faults happen to: started once, since that costs most."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.e2e.sites import Sites, simulated, until
from tests.faults.federation import GIVEN, NAMES, Faulty


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """Nothing is left of it afterwards."""
    from safetensors.torch import load_file

    with Sites(tmp_path_factory.mktemp("faults"), NAMES, executor="tests.faults.staged_executor") as sites:
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # as a hospital: two may add up in another order
        model = load_file(simulated(sites, GIVEN) / "model.safetensors")
        torch.set_num_threads(before)
        found = Faulty(sites, expected={name: value.numpy().tobytes() for name, value in model.items()})
        sites.up()
        found.connected()
        yield found
        sites.close()
        until(
            lambda: not any(found.processes(name) for name in ("coordinator", *NAMES)),
            what="every process of the federation ends",
            seconds=90,
        )


@pytest.fixture
def faulty(federation: Faulty) -> Iterator[Faulty]:
    federation.calm()
    yield federation
    federation.calm()
