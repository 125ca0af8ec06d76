"""Messages outside of a Flower runtime, and hypothesis without a clock."""

from __future__ import annotations

import pytest
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import settings

# A slow machine is no failure, and nothing of a run is kept.
settings.register_profile("fedmm-federation", deadline=None, database=None)
settings.load_profile("fedmm-federation")


@pytest.fixture(autouse=True, scope="session")
def _coordinator() -> None:
    """Flower makes messages only where somebody is somebody."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
