"""A model on disk: config.json (a `ModelSpec`) and model.safetensors. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmm.errors import ConfigError
from fedmm.models.multimodal import ModelSpec, MultimodalModel

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = 1


def save_spec(spec: ModelSpec, folder: Path, *, extra: Mapping[str, object] | None = None) -> None:
    """Write config.json. extra: more top-level keys, for people and the report; loading a model ignores them."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, **spec.model_dump(mode="json"), **(extra or {})}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def save_model(model: MultimodalModel, folder: Path) -> None:
    """Write model.safetensors, and config.json where there is none yet."""
    if not (folder / CONFIG_FILE).exists():
        save_spec(model.spec, folder)
    weights: dict[str, Tensor] = {name: value.detach().cpu().contiguous() for name, value in model.trained().items()}
    save_file(weights, folder / WEIGHTS_FILE)


def load_spec(folder: Path) -> ModelSpec:
    """Raises: ConfigError if config.json is missing or not a model's."""
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise ConfigError(f"{path} has format {content.get('format')!r}, this fedmm reads {FORMAT}")
        return ModelSpec.model_validate({key: content[key] for key in ModelSpec.model_fields if key in content})
    except FileNotFoundError:
        raise ConfigError(
            f"no model in {folder}",
            why=f"{CONFIG_FILE} is missing",
            fix="give the folder that fedmm simulate --out wrote",
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, ValidationError) as error:
        raise ConfigError(f"{path} is not a model's config ({type(error).__name__})") from None


def load_model(folder: Path) -> MultimodalModel:
    """The model in evaluation mode, on the CPU. Raises: ConfigError if a file is missing or does not fit."""
    model = MultimodalModel(load_spec(folder))
    path = folder / WEIGHTS_FILE
    try:
        model.load_trained(load_file(path))
    except FileNotFoundError:
        raise ConfigError(
            f"no model in {folder}", why=f"{WEIGHTS_FILE} is missing", fix="has the run finished?"
        ) from None
    except (SafetensorError, ValueError, OSError) as error:
        raise ConfigError(f"{path} does not fit its {CONFIG_FILE} ({type(error).__name__})") from None
    return model.eval()
