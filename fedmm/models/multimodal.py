"""The model: an encoder per modality, fusion, head.

image  ─ encoder ─┐
report ─ encoder ─┼─ norm ─ where(seen) ─ (B, M, D) ─ fusion ─ (B, D) ─ head ─ (B, F + C)
audio  ─ encoder ─┘
A fusion that trains more than its answer gives several views, each with a head of its own: see `Fused` and `Output`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import import_module
from typing import cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedmm.config import ModelConfig
from fedmm.models import (  # noqa: F401  (encoders and fusions register themselves)
    audio_sequence,
    fusion_attention,
    fusion_decision,
    fusion_joint,
    image_backbones,
    image_fixed,
    image_transformer,
    text_sequence,
)
from fedmm.models.encoder import Encoder, FixedEncoder, encoders
from fedmm.models.fusion import Fused, fusions
from fedmm.models.heads import Head, Output
from fedmm.schema import MODALITIES, MODALITY, Frozen, InputSpec, Labels, fixed
from fedmm.seeds import seed_for

for _kind in MODALITY.values():
    import_module(f"fedmm.models.{_kind.module}")

# B studies, M modalities, D width, V views, O outputs

MAX_WEIGHTS = 2**24  # of one layer: a coordinator must not be able to fill a hospital's memory


class ModelSpec(Frozen):
    """All that is needed to build the model and to read files for it; stored as config.json beside the weights."""

    inputs: InputSpec = Field(description="How files become tensors.")
    model: ModelConfig = Field(description="Which leaves.")
    labels: Labels = Field(description="What it predicts.")

    @model_validator(mode="after")
    def _sane_size(self) -> ModelSpec:
        if self.model.width * self.inputs.report_buckets > MAX_WEIGHTS:
            raise ValueError(f"model.width x data.report_buckets is above {MAX_WEIGHTS:,}")
        return self

    def digest(self) -> str:
        """SHA-256 of this configuration, hexadecimal: what a hospital may list in `runs.models` of its site.toml."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def check_leaves(model: ModelConfig) -> None:
    """Raises: ConfigError for a leaf that is not registered, with those that are."""
    for name in MODALITIES:
        encoders[name].get(model.encoder(name))
    fusions.get(model.fusion)


class MultimodalModel(nn.Module):
    """Any subset of modalities, also none, gives finite logits and gradients.

    Every encoder runs on every row and absent rows are replaced after it (a skipped encoder breaks per-sample gradients:
    stale norms in ghost mode, an error with hooks). They are zeroed before it as well, so that even NaN in an absent
    slot reaches neither the result nor a gradient.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        leaf = spec.model
        self.encoders = nn.ModuleDict({m: _encoder(m, spec) for m in MODALITIES})
        self.norms = nn.ModuleDict({m: nn.LayerNorm(leaf.width) for m in MODALITIES})
        self.fusion = fusions.get(leaf.fusion)(leaf.width)
        self.head = Head(leaf.width, spec.labels)
        self.further = nn.ModuleList(Head(leaf.width, spec.labels) for _ in range(self.fusion.views - 1))

    def forward(self, inputs: Mapping[str, Tensor], seen_BM: Tensor) -> Tensor | Output:
        """(B, O) logits, or `Output` around them (`heads.answer` reads both). inputs: see `Batch`.  seen_BM: bool."""
        embedded = []
        for m, name in enumerate(MODALITIES):
            seen_B, encoder = seen_BM[:, m], cast(FixedEncoder, self.encoders[name])
            ready = inputs.get(fixed(name))
            made = encoder(present(inputs[name], seen_B)) if ready is None else encoder.finish(present(ready, seen_B))
            embedded.append(present(self.norms[name](made), seen_B))
        fused: Tensor | Fused = self.fusion(torch.stack(embedded, dim=1), seen_BM)
        return self._decide(fused) if isinstance(fused, Fused) else self._answer(fused)

    def fixed_parts(self) -> dict[str, FixedEncoder]:
        """By modality, the encoders with a fixed part: its result may stand under `fixed(name)` in the inputs."""
        return {name: e for name, e in self.encoders.items() if isinstance(e, FixedEncoder)}

    def trained(self) -> dict[str, nn.Parameter]:
        """What training changes, by name: all that travels, is averaged and is saved."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def load_trained(self, weights: Mapping[str, Tensor]) -> None:
        """Undo of `trained`. Raises: ValueError for other names or shapes, before anything is changed."""
        mine = self.trained()
        if set(mine) != set(weights) or any(mine[name].shape != weights[name].shape for name in mine):
            raise ValueError("the weights are not those of this model")
        with torch.no_grad():
            for name, value in weights.items():
                mine[name].copy_(value)

    def _answer(self, z_BD: Tensor) -> Tensor:
        out: Tensor = self.head(z_BD)
        return out

    def _decide(self, fused: Fused) -> Output:
        """A head for each view; the answer is the weighted sum of their logits."""
        heads = (self.head, *self.further)
        logits_BVO = torch.stack([head(fused.z_BVD[:, v]) for v, head in enumerate(heads)], dim=1)
        answer_BO = (fused.weight_BV.unsqueeze(-1) * logits_BVO).sum(1)
        return Output(answer_BO, logits_BVO, fused.trained_BV, fused.penalty_B)


def present(value: Tensor, seen_B: Tensor) -> Tensor:
    """`value` (B, ...), zeros where the modality is absent."""
    return torch.where(seen_B.view(-1, *[1] * (value.dim() - 1)), value, torch.zeros_like(value))


def _encoder(modality: str, spec: ModelSpec) -> Encoder:
    made = encoders[modality].get(spec.model.encoder(modality))
    return made(spec.inputs, spec.model.width)


def build_model(spec: ModelSpec, seed: int = 0) -> MultimodalModel:
    """A fresh model whose initial weights depend on `seed` alone. Leaves torch's global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "initial-weights"))
        return MultimodalModel(spec)
