"""A model that cannot travel, or that the coordinator cannot hold, is refused before anybody is asked to train."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch.utils._device import _device_constructors

from fedmm.config import RunConfig
from fedmm.errors import ConfigError
from fedmm.federation import capacity
from fedmm.federation.capacity import check_capacity, memory_bytes, weights_of
from fedmm.federation.local import LocalGrid
from fedmm.federation.messages import TrainAsk, array_record, encode, fresh_nonce, size_bytes
from fedmm.models.encoder import encoders
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.pretrained_folder import VARIABLE
from fedmm.privacy.plan import make_plan
from fedmm.schema import InputSpec
from server import app
from tests import tiny
from tests.pretrained_folders import MODALITY, folder_spec, write_tokenizer

GB = 10**9
RANDOM = [
    (modality, name)
    for modality, registry in encoders.items()
    for name in registry.names()
    if not registry.get(name).from_folder
]
# A BERT of 2.5 GB: 32 layers of 12 x 1280 x 1280 weights.
LARGE = {
    "model_type": "bert", "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 16, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip


def built(spec: ModelSpec) -> tuple[int, int]:
    trained = build_model(spec).trained().values()
    return sum(value.nbytes for value in trained), len(trained)


@pytest.mark.parametrize(("modality", "name"), RANDOM)
def test_weights_are_counted_without_being_made(modality: str, name: str) -> None:
    inputs = InputSpec(**{**tiny.INPUTS.model_dump(), "image_size": 32})
    spec = ModelSpec(inputs=inputs, model=tiny.leaves(**{modality: name}), labels=tiny.LABELS)
    before = torch.get_rng_state()
    assert weights_of(spec) == built(spec)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("pretrained")
@pytest.mark.parametrize("tuning", ["full", "frozen", "lora", "last"])
@pytest.mark.parametrize("name", MODALITY)
def test_of_a_pretrained_model_those_are_counted_that_are_trained(name: str, tuning: str) -> None:
    if name == "resnet18" and tuning == "lora":
        pytest.skip("no attention")
    spec = folder_spec(name, tuning, InputSpec(**{**tiny.INPUTS.model_dump(), "image_size": 32}))
    assert weights_of(spec) == built(spec)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings of a run whose model has 2.5 GB; there is no file of that size."""
    folder = tmp_path / "pretrained" / "large"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LARGE))
    (folder / "model.safetensors").write_bytes(b"never read")
    write_tokenizer(folder)
    monkeypatch.setenv(VARIABLE, str(folder.parent))
    return {
        "model.report": "bert", "model.report_from": "large", "data.report_tokenizer": "large", "model.tuning": "full",
        "federation.out": str(tmp_path / "run"), "federation.min_hospitals": "2",
    }  # fmt: skip


class Listening(LocalGrid):
    """Notes what kinds of messages leave the coordinator."""

    kinds: list[str]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        messages = list(messages)
        self.kinds += [message.metadata.message_type for message in messages]
        return super().send_and_receive(messages, timeout=timeout)


def test_a_run_of_2_5_gb_is_refused_before_anybody_is_asked_to_train(large: dict[str, str]) -> None:
    grid = Listening("tests.federation.scripted:app", [{"name": f"h{i}", "metrics": "no"} for i in range(2)])
    grid.kinds = []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"2\.5\d GB of weights that are trained") as refused:
        app.coordinate(grid, RunConfig.from_flat(large))
    assert "a message may have 2.15 GB" in refused.value.why
    assert "model.tuning" in refused.value.fix
    assert set(grid.kinds) == {"query"}, "hospitals have said who they are, nothing else"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1e6, "KiB"
    assert not (Path(large["federation.out"]) / "config.json").exists()


def test_with_low_rank_additions_the_same_model_fits(large: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is at every hospital: what is not trained does not travel."""
    config = RunConfig.from_flat({**large, "model.tuning": "lora"})
    digest = {"large": "0" * 64}
    monkeypatch.setattr(
        "fedmm.models.pretrained.verified", lambda name, _: Path(large["federation.out"]).parent / "pretrained" / name
    )
    spec = ModelSpec(inputs=config.data.inputs, model=config.model, labels=tiny.LABELS, pretrained=digest)
    check_capacity(spec, config, hospitals=100)


def machine(patch: pytest.MonkeyPatch, *, cores: int, free: float, gpus: Sequence[float] = ()) -> None:
    patch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    patch.setattr(capacity, "free_bytes", lambda: int(free * GB))
    patch.setattr("torch.cuda.device_count", lambda: len(gpus))
    patch.setattr("torch.cuda.mem_get_info", lambda index: (int(gpus[index] * GB), 80 * GB))


def workers(hospitals: int = 16, **settings: Any) -> int:
    return capacity.auto_workers(RunConfig.from_flat(settings), hospitals=hospitals)


def test_there_are_as_many_workers_as_cores_hospitals_and_free_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cores=8, free=100)
    assert workers() == 8
    assert workers(hospitals=3) == 3
    machine(monkeypatch, cores=8, free=13)
    assert 2 <= workers() < 8
    assert workers(**{"training.physical_studies": 8}) == 8, "smaller batches leave room for more"
    assert workers(**{"data.image_size": 224}) == 0, "larger images do not"
    machine(monkeypatch, cores=8, free=0.5)
    assert workers() == 0
    machine(monkeypatch, cores=1, free=100)
    assert workers() == 0, "one is no better than this process"


def test_workers_share_the_gpus_that_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cores=16, free=1000, gpus=[80, 80])
    assert workers() == 16
    machine(monkeypatch, cores=16, free=1000, gpus=[7, 4])
    assert workers() == 3
    assert workers(**{"training.device": "cpu"}) == 16
    machine(monkeypatch, cores=16, free=1000, gpus=[0.1, 0.1])
    assert workers() == 2, "one for each all the same: what does not fit is split"


def test_free_memory_is_what_the_machine_or_its_container_has_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in (("MEMINFO", "MemTotal: 9 kB\nMemAvailable:    5000 kB\n"), ("CGROUP_LIMIT", "max\n")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(capacity, name, tmp_path / name)
    assert capacity.free_bytes() == 5000 * 1024
    (tmp_path / "CGROUP_LIMIT").write_text("4000000\n")
    (tmp_path / "used").write_text("1500000\n")
    monkeypatch.setattr(capacity, "CGROUP_USED", tmp_path / "used")
    assert capacity.free_bytes() == 2_500_000
    (tmp_path / "used").write_text("5000000\n")
    assert capacity.free_bytes() == 0


def small(**settings: Any) -> tuple[ModelSpec, RunConfig]:
    config = RunConfig.from_flat(settings)
    return ModelSpec(inputs=config.data.inputs, model=config.model, labels=tiny.LABELS), config


@pytest.mark.parametrize("strategy", ["fedavgm", "scaffold"])
def test_a_message_is_never_larger_than_was_reckoned(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is set to what an honest ask of this model has, less one byte, and then a little above the reckoning."""
    spec, config = small(**{"federation.strategy": strategy})
    arrays = array_record(build_model(spec).trained())
    ask = TrainAsk(
        run="r", round=1, nonce=fresh_nonce(), settings=config.flat(), spec=spec, plan=make_plan(config).to_flat()
    )
    content = encode(ask, arrays=arrays, correction=arrays if strategy == "scaffold" else None)
    honest = size_bytes(Message(content, 2, "train"))
    monkeypatch.setattr(capacity, "MOST_MESSAGE_BYTES", honest - 1)
    with pytest.raises(ConfigError, match="a round's message would have"):
        check_capacity(spec, config, hospitals=1)
    monkeypatch.setattr(capacity, "MOST_MESSAGE_BYTES", honest + 2 * capacity.BODY_JSON)
    check_capacity(spec, config, hospitals=1)


def test_scaffold_sends_twice_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, config = small()
    monkeypatch.setattr(capacity, "MOST_MESSAGE_BYTES", int(1.5 * weights_of(spec)[0]) + capacity.BODY_JSON)
    check_capacity(spec, config, hospitals=1)
    with pytest.raises(ConfigError, match="a round's message would have") as refused:
        check_capacity(spec, config.replace(**{"federation.strategy": "scaffold"}), hospitals=1)
    assert "scaffold sends a correction" in refused.value.why
    assert "another federation.strategy" in refused.value.fix


def test_more_hospitals_than_memory_holds_are_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, config = small(**{"model.width": 1024, "data.report_buckets": 16384})
    monkeypatch.setattr(capacity, "memory_bytes", lambda: 8 * GB)
    check_capacity(spec, config, hospitals=4)
    with pytest.raises(ConfigError, match="and 400 hospitals the coordinator needs about") as refused:
        check_capacity(spec, config, hospitals=400)
    assert refused.value.why == "this machine has 8 GB"


def test_a_containers_limit_counts_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(capacity, "CGROUP_LIMIT", limit)
    machine = memory_bytes()
    assert machine > GB // 2
    for text, expected in (("max\n", machine), ("1000000\n", 10**6), (f"{10 * machine}\n", machine)):
        limit.write_text(text)
        assert memory_bytes() == expected


def test_a_model_is_counted_although_transformers_was_here_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces torch.linspace while it builds, and torch keeps a list of what makes tensors from its first use on."""
    honest = torch.linspace
    _device_constructors.cache_clear()
    monkeypatch.setattr(torch, "linspace", lambda *args, **kwargs: honest(*args, **kwargs))
    with torch.device("meta"):
        torch.zeros(1)
    monkeypatch.undo()
    try:
        size, _ = weights_of(tiny.spec().model_copy(update={"model": tiny.leaves(image="scattering")}))
    finally:
        _device_constructors.cache_clear()
    assert size > 0
