"""A setting that would do nothing is refused, with what it lacks; the same with what it lacks is accepted."""

from __future__ import annotations

from typing import Any

import pytest

from fedmm.config import RunConfig
from fedmm.errors import ConfigError
from fedmm.training.effect import check_effect

OPEN = {"privacy.enabled": False}
# What does nothing, what the error begins with, and what more it takes.
IDLE: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "proximal": ({"training.proximal": 0.1}, "training.proximal = 0.1", {"training.local_steps": 2}),
    "scaffold": ({"federation.strategy": "scaffold"}, "federation.strategy = scaffold", {"training.local_steps": 2}),
    "tuning": ({"model.tuning": "last"}, "model.tuning = last", {"model.image_from": "resnet18"}),
    "rank": ({"model.lora_rank": 8}, "model.lora_rank = 8", {"model.tuning": "lora", "model.report_from": "bert"}),
    "rank of frozen": (
        {"model.lora_rank": 8, "model.report_from": "bert"}, "model.lora_rank = 8", {"model.tuning": "lora"},
    ),
    "copies": (
        {"training.augment_copies": 2, "training.modality_dropout": 0}, "training.augment_copies = 2",
        {"training.augment": "audio"},
    ),
    "copies of all": (
        {"training.augment_copies": 2, "training.modality_dropout": 0}, "training.augment_copies = 2",
        {"training.modality_dropout": 0.1},
    ),
    "report": (
        {"training.augment": "audio,report", "data.report_tokenizer": "bert"}, "training.augment: report",
        {"training.augment": "audio"},
    ),
    "gamma": ({"training.focal_gamma": 1.0}, "training.focal_gamma = 1", {"training.loss": "focal"}),
    "rule": ({"training.clip_rule": "auto", **OPEN}, "training.clip_rule = auto", {"privacy.enabled": True}),
    "groups": ({"training.clip_groups": "modality", **OPEN}, "training.clip_groups = modality", {"privacy.enabled": True}),
    "liars": ({"federation.byzantine": 1}, "federation.byzantine = 1", {"federation.strategy": "krum"}),
    "step size of a median": (
        {"federation.strategy": "fedmedian", "federation.server_learning_rate": 0.5},
        "federation.server_learning_rate = 0.5", {"federation.strategy": "fedadam"},
    ),
    "momentum of a median": (
        {"federation.strategy": "geomedian", "federation.server_momentum": 0.5}, "federation.server_momentum = 0.5",
        {"federation.strategy": "fedavgm"},
    ),
    "weights of a median": (
        {"federation.strategy": "krum", "federation.weights": "declared"}, "federation.weights = declared",
        {"federation.strategy": "fedavg"},
    ),
    "long clip": ({"federation.clip_norm": 1000.0}, "federation.clip_norm = 1000", {"training.max_update_norm": 1001.0}),
    "noise": ({"privacy.noise_last": 0.5, **OPEN}, "privacy.noise_last = 0.5", {"privacy.enabled": True}),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "what", "needed"), IDLE.values(), ids=IDLE)
def test_what_would_do_nothing_is_refused_unless_it_has_what_it_needs(
    settings: dict[str, Any], what: str, needed: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="does nothing") as refused:
        check_effect(RunConfig.from_flat(settings))
    assert refused.value.what.startswith(what)
    assert refused.value.why
    assert refused.value.fix
    check_effect(RunConfig.from_flat({**settings, **needed}))


@pytest.mark.parametrize("settings", [{}, OPEN, {"training.local_steps": 2, "training.positive_weight": 3.0}], ids=str)
def test_defaults_do_something_or_say_nothing(settings: dict[str, Any]) -> None:
    check_effect(RunConfig.from_flat(settings))
