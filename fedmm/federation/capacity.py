"""Does a model of this size fit: into one message, and into the coordinator's memory? Asked before anybody is charged."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from fedmm.config import ROBUST, RunConfig
from fedmm.data.dataset import blank
from fedmm.errors import ConfigError
from fedmm.federation.messages import BODY_JSON, HEADER_BYTES
from fedmm.models.multimodal import ModelSpec, MultimodalModel

# A message as one protobuf counts its bytes in 31 bits. Between processes of one machine arrays travel beside it (segments.py),
# across sites as pieces: more has been tried nowhere.
MOST_MESSAGE_BYTES = 2**31 - 1
# How often the coordinator holds the weights at once: as model, as the round's arrays, as momentum, the last two again in the
# checkpoint and in its bytes; replies as one sum, two, and the one that arrives, or then the mean and what Flower's strategy makes
# of it. For each hospital one ask on its way; its reply too, if a rule compares them; its control variate as it was, as it is
# learnt, as it is sent, and in the ask. And what it holds without any.
# measured: 10.9 times with two hospitals and 97 MB before replies were summed, beside 850 MiB; benchmarks/aggregate.py
COPIES, BASE_BYTES = 12, 850 * 2**20
COPIES_PER_HOSPITAL = {**dict.fromkeys(ROBUST, 2), "scaffold": 5}  # 1 where it says nothing
CGROUP_LIMIT, CGROUP_USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # container; Linux


def check_capacity(spec: ModelSpec, config: RunConfig, *, hospitals: int) -> None:
    """Nothing of the model's size is allocated or read. Raises: ConfigError with the numbers."""
    size, tensors = weights_of(spec)
    frames = 2 if config.federation.strategy == "scaffold" else 1  # an ask carries a correction of the same shapes
    message = frames * (size + tensors * HEADER_BYTES) + BODY_JSON
    fix = "a smaller model: model.width, data.report_buckets, another encoder; of a pretrained one model.tuning = lora or last"
    if message > MOST_MESSAGE_BYTES:
        raise ConfigError(
            f"the model has {_gb(size)} of weights that are trained: a round's message would have {_gb(message)}",
            why=f"a message may have {_gb(MOST_MESSAGE_BYTES)}"
            + (", and scaffold sends a correction as large as the weights" if frames > 1 else ""),
            fix=fix + (", or another federation.strategy" if frames > 1 else ""),
        )
    for_each = COPIES_PER_HOSPITAL.get(config.federation.strategy, 1)
    needed = BASE_BYTES + size * (COPIES + for_each * hospitals)
    if needed > (there := memory_bytes()):
        raise ConfigError(
            f"with {_gb(size)} of weights and {hospitals} hospitals the coordinator needs about {_gb(needed)} of memory",
            why=f"this machine has {_gb(there)}",
            fix=fix + ", or a larger machine",
        )


def weights_of(spec: ModelSpec) -> tuple[int, int]:
    """Bytes and number of the tensors that training changes, from their shapes alone. Raises: as building the model."""
    with torch.device("meta"):  # models/pretrained.py reads no weights there
        trained = MultimodalModel(spec).trained()
    return sum(4 * value.numel() for value in trained.values()), len(trained)


# What a worker needs: Python, torch and fedmm, and a step: so many times the inputs of the studies that are in memory at once.
# measured: 0.5 GB before the first step; 180 times for the default model, 365 for ResNet-18 at 224 (../shared/performance.md)
WORKER_BYTES, ACTIVATIONS = 2**30, 400
MEMINFO = Path("/proc/meminfo")


def auto_workers(config: RunConfig, *, hospitals: int) -> int:
    """How many worker processes this machine has cores and free memory for, at most one a hospital; 0: train in this process.

    On CUDA at most as many as fit into the GPUs, which they go round (`local.take_gpu`).
    """
    study = sum(value.nbytes for value in blank(1, config.data.inputs).values())
    step = ACTIVATIONS * study * config.training.physical_studies
    fit = free_bytes() // (WORKER_BYTES + step)
    if config.training.device != "cpu" and (gpus := torch.cuda.device_count()):
        free = (torch.cuda.mem_get_info(index)[0] for index in range(gpus))
        fit = min(fit, sum(max(1, room // (WORKER_BYTES + step)) for room in free))
    workers = min(hospitals, len(os.sched_getaffinity(0)), fit)
    return workers if workers > 1 else 0


def free_bytes() -> int:
    """Of this machine's memory what a new process could have; of a container's what is left of its limit."""
    free = memory_bytes()
    with contextlib.suppress(OSError, ValueError, IndexError):
        free = min(free, 1024 * int(MEMINFO.read_text(encoding="ascii").split("MemAvailable:")[1].split()[0]))
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int(file.read_text(encoding="ascii")) for file in (CGROUP_LIMIT, CGROUP_USED))
        free = min(free, limit - used)
    return max(0, free)


def memory_bytes() -> int:
    """Of this machine, or what its container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit: "max"
        total = min(total, int(CGROUP_LIMIT.read_text(encoding="ascii")))
    return total


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
