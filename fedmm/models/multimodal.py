"""The model: an encoder per modality, fusion, head.

image  ─ encoder ─┐
report ─ encoder ─┼─ norm ─ where(seen) ─ (B, M, D) ─ fusion ─ (B, D) ─ head ─ (B, F + C)
audio  ─ encoder ─┘
A fusion that trains more than its answer gives several views, each with a head of its own: see `Fused` and `Output`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedmm.config import ModelConfig
from fedmm.models import (  # noqa: F401  (encoders and fusions register themselves)
    audio,
    audio_sequence,
    fusion_attention,
    fusion_decision,
    fusion_joint,
    image,
    image_backbones,
    image_fixed,
    image_transformer,
    text,
    text_sequence,
)
from fedmm.models.encoder import encoders
from fedmm.models.fusion import Fused, fusions
from fedmm.models.heads import Head, Output
from fedmm.schema import MODALITIES, Frozen, InputSpec, Labels
from fedmm.seeds import seed_for

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
    for name, leaf in (("image", model.image), ("report", model.report), ("audio", model.audio)):
        encoders[name].get(leaf)
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
        names = {"image": leaf.image, "report": leaf.report, "audio": leaf.audio}
        self.encoders = nn.ModuleDict({m: encoders[m].get(names[m])(spec.inputs, leaf.width) for m in MODALITIES})
        self.norms = nn.ModuleDict({m: nn.LayerNorm(leaf.width) for m in MODALITIES})
        self.fusion = fusions.get(leaf.fusion)(leaf.width)
        self.head = Head(leaf.width, spec.labels)
        self.further = nn.ModuleList(Head(leaf.width, spec.labels) for _ in range(self.fusion.views - 1))

    def forward(self, inputs: Mapping[str, Tensor], seen_BM: Tensor) -> Tensor | Output:
        """(B, O) logits, or `Output` around them (`heads.answer` reads both). inputs: see `Batch`.  seen_BM: bool."""
        embedded = []
        for m, name in enumerate(MODALITIES):
            value = inputs[name]
            seen_B = seen_BM[:, m]
            seen = seen_B.view(-1, *[1] * (value.dim() - 1))
            z_BD = self.norms[name](self.encoders[name](torch.where(seen, value, torch.zeros_like(value))))
            embedded.append(torch.where(seen_B.unsqueeze(1), z_BD, torch.zeros_like(z_BD)))
        fused: Tensor | Fused = self.fusion(torch.stack(embedded, dim=1), seen_BM)
        return self._decide(fused) if isinstance(fused, Fused) else self._answer(fused)

    def _answer(self, z_BD: Tensor) -> Tensor:
        out: Tensor = self.head(z_BD)
        return out

    def _decide(self, fused: Fused) -> Output:
        """A head for each view; the answer is the weighted sum of their logits."""
        heads = (self.head, *self.further)
        logits_BVO = torch.stack([head(fused.z_BVD[:, v]) for v, head in enumerate(heads)], dim=1)
        answer_BO = (fused.weight_BV.unsqueeze(-1) * logits_BVO).sum(1)
        return Output(answer_BO, logits_BVO, fused.trained_BV, fused.penalty_B)


def build_model(spec: ModelSpec, seed: int = 0) -> MultimodalModel:
    """A fresh model whose initial weights depend on `seed` alone. Leaves torch's global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "initial-weights"))
        return MultimodalModel(spec)
