"""The model: an encoder per modality, fusion, head.

image  ─ encoder ─┐
report ─ encoder ─┼─ norm ─ where(seen) ─ (B, M, D) ─ fusion ─ (B, D) ─ head ─ (B, F + C)
audio  ─ encoder ─┘
A fusion that trains more than its answer gives several views, each with a head of its own: see `Fused` and `Output`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib import import_module
from typing import cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from fedmm.config import ModelConfig
from fedmm.errors import ConfigError
from fedmm.models import (  # noqa: F401  (encoders and fusions register themselves)
    audio_pretrained,
    audio_sequence,
    fusion_attention,
    fusion_decision,
    fusion_joint,
    fusion_time,
    image_backbones,
    image_fixed,
    image_transformer,
    text_pretrained,
    text_sequence,
)
from fedmm.models.encoder import Encoder, FixedEncoder, encoders
from fedmm.models.fusion import Fused, fusions
from fedmm.models.heads import Doubt, Head, Output
from fedmm.models.pretrained import encoder_for
from fedmm.models.sequence import Sequence, SequenceEncoder
from fedmm.schema import MODALITIES, MODALITY, PRETRAINED_NAME, Frozen, InputSpec, Labels, Timeline, fixed
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
    pretrained: dict[str, str] = Field(
        default={}, max_length=len(MODALITIES) + 1, description="Digest of each pretrained folder that it starts from."
    )

    @field_validator("pretrained")
    @classmethod
    def _digests(cls, folders: dict[str, str]) -> dict[str, str]:
        if not all(re.fullmatch(PRETRAINED_NAME, n) and re.fullmatch("[0-9a-f]{64}", d) for n, d in folders.items()):
            raise ValueError("names of folders to SHA-256 digests, hexadecimal")
        return dict(sorted(folders.items()))

    def __hash__(self) -> int:
        return hash(self.digest())

    @model_validator(mode="after")
    def _sane_size(self) -> ModelSpec:
        if self.model.width * self.inputs.report_buckets > MAX_WEIGHTS:
            raise ValueError(f"model.width x data.report_buckets is above {MAX_WEIGHTS:,}")
        return self

    def digest(self) -> str:
        """SHA-256 of this configuration, hexadecimal: what a hospital may list in `runs.models` of its site.toml."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def check_leaves(model: ModelConfig) -> None:
    """Raises: ConfigError for a leaf that is not registered, or that this fusion cannot use, with those that may be."""
    for name in MODALITIES:
        encoders[name].get(model.encoder(name))
    for name in fusions.get(model.fusion).sequences:
        able = [known for known in encoders[name].names() if issubclass(encoders[name].get(known), SequenceEncoder)]
        if model.encoder(name) not in able:
            raise ConfigError(
                f"model.fusion = {model.fusion} cannot use model.{name} = {model.encoder(name)}",
                why=f"it aligns the {name} step by step, and this encoder gives no steps",
                fix=f"choose model.{name} as one of {', '.join(able)}, or another fusion",
            )


class MultimodalModel(nn.Module):
    """Any subset of modalities, also none, gives finite logits and gradients.

    Every encoder runs on every row and absent rows are replaced after it (a skipped encoder breaks per-sample gradients:
    stale norms in ghost mode, an error with hooks). They are zeroed before it as well, so that even NaN in an absent
    slot reaches neither the result nor a gradient.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        check_leaves(spec.model)
        self.spec = spec
        leaf = spec.model
        self.encoders = nn.ModuleDict({m: _encoder(m, spec) for m in MODALITIES})
        self.norms = nn.ModuleDict({m: nn.LayerNorm(leaf.width) for m in MODALITIES})
        self.fusion = fusions.get(leaf.fusion)(leaf.width)
        self.head = Head(leaf.width, spec.labels)
        self.further = nn.ModuleList(Head(leaf.width, spec.labels) for _ in range(self.fusion.views - 1))
        self.doubt = Doubt(spec.labels) if leaf.task_weights == "uncertainty" else None

    def forward(
        self, inputs: Mapping[str, Tensor], seen_BM: Tensor, timeline: Timeline | None = None
    ) -> Tensor | Output:
        """(B, O) logits, or `Output` around them (`heads.answer` reads both). inputs: see `Batch`.  seen_BM: bool.

        timeline: for a fusion over time; without it every study stands alone.
        """
        return self.fuse(self.encode(inputs, seen_BM), seen_BM, timeline)

    def encode(self, inputs: Mapping[str, Tensor], seen_BM: Tensor) -> dict[str, Tensor | Sequence]:
        """By modality what its encoder makes, (B, D) or a sequence: to `fuse` once, or again with less that is seen."""
        made: dict[str, Tensor | Sequence] = {}
        for m, name in enumerate(MODALITIES):
            if name in self.fusion.sequences:
                encoder = cast(SequenceEncoder, self.encoders[name])
                made[name] = encoder.sequence(present(inputs[name], seen_BM[:, m]))
            else:
                made[name] = self._encode(name, inputs, seen_BM[:, m])
        return made

    def fuse(
        self, made: Mapping[str, Tensor | Sequence], seen_BM: Tensor, timeline: Timeline | None = None
    ) -> Tensor | Output:
        """`forward` after `encode`. seen_BM: what may be used; that or more was seen by `encode`."""
        embedded = []
        sequences: dict[str, Sequence] = {}
        for m, name in enumerate(MODALITIES):
            seen_B, one = seen_BM[:, m], made[name]
            if isinstance(one, Sequence):
                sequences[name] = one.where(seen_B)
                one = sequences[name].mean()
            embedded.append(present(self.norms[name](one), seen_B))
        further = [timeline] if self.fusion.over_time else [sequences] if self.fusion.sequences else []
        fused: Tensor | Fused = self.fusion(torch.stack(embedded, dim=1), seen_BM, *further)
        output = self._decide(fused) if isinstance(fused, Fused) else self._answer(fused)
        return output if self.doubt is None else self.doubt(output)

    def _encode(self, name: str, inputs: Mapping[str, Tensor], seen_B: Tensor) -> Tensor:
        """(B, D) by the encoder, or by its trained part alone where the fixed part's result is given."""
        encoder, ready = cast(FixedEncoder, self.encoders[name]), inputs.get(fixed(name))
        run, value = (encoder, inputs[name]) if ready is None else (encoder.finish, ready)
        out: Tensor = run(present(value, seen_B))
        return out

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
    kind = encoders[modality].get(spec.model.encoder(modality))
    return encoder_for(modality, kind, spec.model, spec.inputs, spec.pretrained)


def build_model(spec: ModelSpec, seed: int = 0) -> MultimodalModel:
    """A fresh model whose initial weights depend on `seed` alone. Leaves torch's global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "initial-weights"))
        return MultimodalModel(spec)
