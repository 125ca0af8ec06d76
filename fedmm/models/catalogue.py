"""Every leaf that a config can choose, with its size: `fedmm models` and the tests that go over all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fedmm.config import ROBUST, ModelConfig
from fedmm.errors import ConfigError
from fedmm.models import multimodal  # noqa: F401  (its imports register the leaves)
from fedmm.models.encoder import Encoder, encoders
from fedmm.models.fusion import fusions
from fedmm.models.pretrained import needs
from fedmm.schema import InputSpec

HEADS = ("findings", "class", "ordinal", "regression", "survival", "multitask")
OBJECTIVES = ("cross_entropy", "focal", "smoothed", "weighted", "uncertainty")
# What is no leaf but chosen by a setting or a command: by kind, name to how. A test holds the settings to RunConfig.
CHOICES = {
    "tuning": {name: f"model.tuning={name}" for name in ("full", "frozen", "lora", "last")},
    "algorithms": {
        **{f: f"federation.strategy={f}" for f in ("fedavg", "fedavgm", "fedadam", "fedyogi", "scaffold", *ROBUST)},
        "norm bounding": "federation.clip_norm",
        "fedprox": "training.proximal",
    },
    "personalisation": {
        "fine-tuning": "fedmm personalise",
        "local head": "fedmm personalise --parts head",
        "local affine normalisation": "fedmm personalise --parts norms",
        "ditto": "fedmm personalise --proximal",
    },
    "levers": {
        "large public batch": "training.batch_size",
        "average of iterates": "federation.average",
        "augmentations averaged before clipping": "training.augment_copies",
        "normalised gradients": "training.clip_rule=auto",
        "clipping by modality": "training.clip_groups=modality",
        "noise over rounds": "privacy.noise_last",
    },
    "augmentation": {name: f"training.augment={name}" for name in ("image", "report", "audio")},
}


WayOf = Callable[[nn.Module], str]  # of clipping a layer: fedmm.privacy.layers.way_of, which this floor may not import


def catalogue(
    spec: InputSpec | None = None, width: int = ModelConfig().width, *, way_of: WayOf | None = None
) -> dict[str, Any]:
    """Names by kind, and under "details" for each leaf what it is and its weights at this size of input and width.

    trained: weights that training changes; None where the leaf cannot be built for this input.
    clipped: with `way_of`, by type of a trained layer how ghost clipping bounds it.
    """
    spec = spec or InputSpec()
    details: dict[str, dict[str, Any]] = {}
    for modality, registry in encoders.items():
        for name in registry.names():
            kind = registry.get(name)
            details[f"{modality} {name}"] = _detail(kind, partial(_built, modality, kind, spec, width), way_of)
    for name in fusions.names():
        made = fusions.get(name)
        details[f"fusion {name}"] = _detail(made, partial(made, width), way_of)
    return {
        "encoders": {modality: list(registry.names()) for modality, registry in encoders.items()},
        "fusions": list(fusions.names()),
        "heads": list(HEADS),
        "objectives": list(OBJECTIVES),
        **CHOICES,
        "details": details,
    }


def _built(modality: str, kind: type[Encoder], spec: InputSpec, width: int) -> Encoder:
    """Raises: ConfigError for one that cannot be built without a folder."""
    if kind.from_folder:
        raise ConfigError(f"needs {needs(modality)}")
    return kind(spec, width)


def _detail(kind: type[nn.Module], build: Callable[[], nn.Module], way_of: WayOf | None) -> dict[str, Any]:
    what = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
    try:
        made = build()
    except ConfigError as error:
        return {"what": what, "trained": None, "why": error.what}
    found = {"what": what, "trained": sum(p.numel() for p in made.parameters() if p.requires_grad)}
    if way_of is None:
        return found
    layers = [layer for layer in made.modules() if any(p.requires_grad for p in layer.parameters(recurse=False))]
    return {**found, "clipped": {type(layer).__name__: way_of(layer) for layer in layers}}
