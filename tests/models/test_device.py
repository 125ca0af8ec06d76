"""The models on a GPU that is not there: torch's fake tensors know their device and refuse to be mixed, as CUDA does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fedmm.config import ModelConfig
from fedmm.models.encoder import encoders
from fedmm.models.fusion import fusions
from fedmm.models.heads import Objective
from fedmm.models.multimodal import ModelSpec, MultimodalModel
from fedmm.schema import Batch, InputSpec
from fedmm.training.loop import made_up
from tests import tiny

INPUTS = InputSpec(image_size=32, report_tokens=16, report_buckets=64, audio_mels=16, audio_seconds=0.4)
# Their shapes hang on values, which a fake tensor has none of: read by eye, and run by `make gpu-check`.
BY_VALUE = {"report": ("gru", "lstm", "transformer"), "fusion": ("aligned", "timeline")}
LEAVES = [
    (kind, name)
    for kind, registry in (*encoders.items(), ("fusion", fusions))
    for name in registry.names()
    if name not in BY_VALUE.get(kind, ()) and not getattr(registry.get(name), "from_folder", False)
]


def on(device: str, value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=device)


def move(model: nn.Module, device: str) -> None:
    """As `model.to(device)`, which torch does not do with fake tensors."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(on(device, weight), requires_grad=weight.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = on(device, value)


def loss_of(model: Callable[..., Tensor], batch: Batch, device: str) -> Tensor:
    held = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved = {name: on(device, value) for name, value in held.items() if isinstance(value, Tensor)}
    inputs = {name: on(device, value) for name, value in batch.inputs.items()}
    there = replace(batch, inputs=inputs, **moved)
    return Objective(tiny.LABELS)(model(there.inputs, there.seen_BM, there.timeline), there)


@pytest.mark.parametrize(("kind", "name"), LEAVES)
def test_model_and_loss_make_no_tensor_on_another_device(kind: str, name: str) -> None:
    spec = ModelSpec(inputs=INPUTS, model=ModelConfig(width=4, **{kind: name}), labels=tiny.LABELS)
    batch = made_up(spec, [1, 2], 1)
    with FakeTensorMode(allow_non_fake_inputs=False):
        model = MultimodalModel(spec)
        move(model, "cuda")
        assert loss_of(model, batch, "cuda").device.type == "cuda"


def test_a_tensor_on_another_device_is_found() -> None:
    spec = ModelSpec(inputs=INPUTS, model=ModelConfig(width=4), labels=tiny.LABELS)
    batch = made_up(spec, [1, 2], 1)
    with FakeTensorMode(allow_non_fake_inputs=False):
        model = MultimodalModel(spec)
        move(model, "cuda")
        with pytest.raises(RuntimeError, match="two different devices"):
            loss_of(lambda *given: model(*given) + torch.zeros(3, 1), batch, "cuda")
