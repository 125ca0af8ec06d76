"""Encoders that start from a pretrained folder: how it is read, and what of it is trained (model.tuning).

full   all of it                             lora   low-rank additions to the attention, nothing else
last   its last layer                        frozen nothing: its summary of a study is made once and kept (FixedEncoder)
The linear layer after it is always trained. What is not trained is neither sent nor saved: it comes from the folder,
whose digest every hospital compares.
"""

from __future__ import annotations

import abc
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedmm.config import ModelConfig
from fedmm.errors import ConfigError
from fedmm.models.encoder import Encoder, FixedEncoder
from fedmm.models.transformer import masked_mean
from fedmm.pretrained_folder import CONFIG, EXTRACTOR, WEIGHTS, verified
from fedmm.schema import InputSpec

# B studies, V windows, L steps of a window, T = V x L, W width of a step, X of the summary, D of the embedding
# A heads, N rows of V x B

ROWS = 16  # studies at a time through a frozen network: memory does not grow with the batch (guess)
WINDOWED = "fedmm_windows"  # name of our attention in transformers' table
NOTHING_AMISS: Mapping[str, Sequence[str]] = {"missing_keys": (), "mismatched_keys": (), "error_msgs": ()}


@dataclass(frozen=True)
class Source:
    """A folder that was compared with the coordinator's.

    tuning: as `model.tuning`.  rank: of lora.
    """

    folder: Path
    digest: str
    tuning: str
    rank: int

    def config(self) -> dict[str, Any]:
        """config.json. Raises: ConfigError."""
        return self._json(CONFIG)

    def extractor(self) -> dict[str, Any]:
        """preprocessor_config.json of a recording's model; empty where there is none. Raises: ConfigError."""
        return self._json(EXTRACTOR) if (self.folder / EXTRACTOR).exists() else {}

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise self.wrong(f"{name} is no JSON object")
        return content

    def weights(self) -> dict[str, Tensor]:
        """model.safetensors, on the CPU. Raises: ConfigError."""
        try:
            return load_file(self.folder / WEIGHTS)
        except (OSError, SafetensorError):
            raise self.wrong(f"{WEIGHTS} cannot be read") from None

    def wrong(self, what: str, *, why: str = "", fix: str = "") -> ConfigError:
        return ConfigError(f"pretrained folder {self.folder.name!r}: {what}", why=why, fix=fix)


# --- encoders that can start from a folder ------------------------------------------------------------------------------


class Pooled(Encoder, abc.ABC):
    """A network that may come from a folder, a summary of what it says of each study, one linear layer."""

    backbone: nn.Module
    project: nn.Linear
    projections: ClassVar[tuple[str, ...]] = ()  # names of the layers that lora adds to

    @abc.abstractmethod
    def summary(self, value: Tensor) -> Tensor:
        """(B, X), each row from its own study alone."""

    @abc.abstractmethod
    def last(self) -> Sequence[nn.Module]:
        """What tuning = last trains."""

    def start_from(self, source: Source) -> None:
        """Take the folder's weights: of encoders that can also be built without one."""
        raise NotImplementedError

    def forward(self, value: Tensor) -> Tensor:
        out: Tensor = self.project(self.summary(value))
        return out

    def train(self, mode: bool = True) -> Pooled:  # noqa: FBT001, FBT002  (torch's signature)
        """What is frozen stays in eval()."""
        super().train(mode)
        for module in self.modules():
            weights = list(module.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                module.training = False
        return self


class Frozen(FixedEncoder):
    """A network that nothing trains, then one linear layer. The network is no part of this module: it never travels."""

    def __init__(self, whole: Pooled, source: Source) -> None:
        super().__init__(whole.spec, whole.width)
        self.digest = source.digest
        self.project = whole.project
        del whole.project
        self._hidden = (whole.requires_grad_(False).eval(),)  # a tuple: torch does not look inside

    def features(self, value: Tensor) -> Tensor:
        (whole,) = self._hidden
        whole.to(value.device)
        return torch.cat([whole.summary(rows) for rows in torch.split(value, ROWS)]).float().contiguous()

    def finish(self, features: Tensor) -> Tensor:
        out: Tensor = self.project(features)
        return out

    def identity(self) -> str:
        of = f"{type(self._hidden[0]).__qualname__} {self.digest} {self.spec.model_dump_json()}"
        return hashlib.sha256(of.encode()).hexdigest()


def encoder_for(
    modality: str, kind: type[Encoder], model: ModelConfig, inputs: InputSpec, digests: Mapping[str, str]
) -> Encoder:
    """A modality's encoder, from its folder if one is named.

    digests: `ModelSpec.pretrained`.
    Raises: ConfigError for settings that do not fit together; PolicyRefused for a folder that is missing or another one.
    """
    name, folder = model.encoder(modality), model.pretrained(modality)
    _check_inputs(modality, name, kind, inputs)
    if not folder:
        if kind.from_folder:
            raise ConfigError(f"the {modality} encoder {name} needs {needs(modality)}", fix="docs/howto-pretrained.md")
        return kind(inputs, model.width)
    if not issubclass(kind, Pooled):
        raise ConfigError(
            f"the {modality} encoder {name} starts from random weights", fix=f"leave model.{modality}_from empty"
        )
    source = Source(verified(folder, digests), digests[folder], model.tuning, model.lora_rank)
    if kind.from_folder:
        encoder = cast(Any, kind)(inputs, model.width, source)
    else:
        encoder = kind(inputs, model.width)
        if not only_counted():
            encoder.start_from(source)
    return tuned(encoder, source)


def only_counted() -> bool:
    """Is this model built for its shapes alone, on torch's meta device? Then no weights are read for it."""
    return torch.get_default_device().type == "meta"


def needs(modality: str) -> str:
    return f"model.{modality}_from=NAME"


def _check_inputs(modality: str, name: str, kind: type[Encoder], inputs: InputSpec) -> None:
    """Raises: ConfigError where the files would not be read as this encoder wants them."""
    if modality == "audio":
        form = "waveform" if kind.from_folder else "log_mel"
        if inputs.audio_form != form:
            raise ConfigError(f"the audio encoder {name} reads another form of audio", fix=f"data.audio_form={form}")
    if modality == "report" and inputs.report_tokenizer and not kind.from_folder:
        raise ConfigError(
            f"the report encoder {name} reads hashed words", fix="leave data.report_tokenizer empty, or use bert"
        )


def tuned(encoder: Pooled, source: Source) -> Encoder:
    """The same encoder, of which only that part is trained which `source.tuning` says. Raises: ConfigError."""
    if source.tuning == "frozen":
        return Frozen(encoder, source)
    if source.tuning == "last":
        encoder.backbone.requires_grad_(False)
        for part in encoder.last():
            part.requires_grad_(True)
    if source.tuning == "lora":
        _add_lora(encoder, source.rank)
    return encoder.train()


def _add_lora(encoder: Pooled, rank: int) -> None:
    """W + B A with A, B of this rank; W is frozen. B starts at zero, so nothing changes at first (Hu et al. 2021)."""
    if not encoder.projections:
        raise ConfigError("model.tuning = lora is for encoders with attention", fix="model.tuning = last or frozen")
    from peft import LoraConfig, inject_adapter_in_model  # here: it takes seconds to import (measured)

    settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(encoder.projections))
    inject_adapter_in_model(settings, cast(Any, encoder.backbone))


# --- Transformers of Hugging Face ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """What goes through the layers: all windows of a study after one another, so that a row is a study.

    x_BTW: their steps.  mask_BVL: bool, steps that hold something; no window sees another one.  read_BVL: bool, steps
    that the summary is the mean of.
    """

    x_BTW: Tensor
    mask_BVL: Tensor
    read_BVL: Tensor


class PretrainedTransformer(Pooled, abc.ABC):
    """Steps of any length in windows, the layers of the folder's model, mean of what they say, one linear layer.

    Each layer is called once in a pass with one row for each study: both ways of clipping need it so. transformers' own
    forward() is not used: it knows no windows, and takes shared rows of position ids, masks in place or a fixed length.
    """

    from_folder = True
    model_type: ClassVar[str]  # in config.json
    network: ClassVar[str]  # class of transformers
    prefix: ClassVar[str] = ""  # of the weights that must be there
    settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, spec: InputSpec, width: int, source: Source) -> None:
        super().__init__(spec, width)
        whole = _network(type(self), source)
        self.config: Any = whole.config
        self.backbone = self.part(whole)
        for module in self.backbone.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # torch leaves its gradient out, clipping does not; padding is masked anyway
        self.hidden = int(self.config.hidden_size)
        self.project = nn.Linear(self.hidden, width)

    @abc.abstractmethod
    def steps(self, value: Tensor) -> Steps: ...

    @abc.abstractmethod
    def layers(self) -> Sequence[nn.Module]: ...

    def part(self, whole: Any) -> nn.Module:
        """What of the network is used."""
        return cast(nn.Module, whole)

    def after(self) -> nn.Module:
        """What follows the last layer."""
        return nn.Identity()

    def last(self) -> Sequence[nn.Module]:
        return (self.layers()[-1], self.after())

    def summary(self, value: Tensor) -> Tensor:
        if len(value) == 0:  # transformers' views and an FFT of nothing are errors
            return torch.zeros(0, self.hidden, device=value.device)
        steps = self.steps(value)
        x_BTW = steps.x_BTW
        for layer in self.layers():
            x_BTW = layer(x_BTW, steps.mask_BVL)
        x_BTW = self.after()(x_BTW)
        return masked_mean(x_BTW.reshape(*steps.read_BVL.shape, -1), steps.read_BVL)


def _network(kind: type[PretrainedTransformer], source: Source) -> Any:
    """The model of `transformers` with the folder's weights and our attention; no dropout, nothing random.

    Raises: ConfigError if the folder holds another model or not all of this one.
    """
    content = source.config()
    if content.get("model_type") != kind.model_type:
        raise source.wrong(
            f"config.json is not of a {kind.model_type} model", fix="name the encoder that the model is of"
        )
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; no path below leads to the network anyway
    import transformers

    made: Any = getattr(transformers, kind.network)
    # Code and other files that a config may name: never followed.
    content = {key: value for key, value in content.items() if key not in ("auto_map", "quantization_config")}
    with _quiet():
        try:
            config = made.config_class.from_dict(content)
            for key, value in config.to_dict().items():
                if "drop" in key and isinstance(value, float | int):
                    setattr(config, key, 0.0)
            config.mask_time_prob = config.mask_feature_prob = 0.0  # wav2vec2's own augmentation
            if only_counted():
                whole, found = made(config, **kind.settings), NOTHING_AMISS
            else:
                whole, found = made.from_pretrained(
                    None, config=config, state_dict=source.weights(), output_loading_info=True,
                    dtype=torch.float32, attn_implementation="eager", **kind.settings,
                )  # fmt: skip
        except ConfigError:
            raise
        except Exception as error:  # of any kind: a config.json is free text
            raise source.wrong(f"its files do not make a {kind.model_type} model ({type(error).__name__})") from None
    missing = [name for name in found["missing_keys"] if name.startswith(kind.prefix)]
    if missing or found["mismatched_keys"] or found["error_msgs"]:
        raise source.wrong(
            f"{WEIGHTS} lacks {len(missing)} tensors of a {kind.model_type} model",
            why=f"for example {sorted(missing)[0]}" if missing else "some have another shape",
            fix="get the whole model",
        )
    transformers.AttentionInterface.register(WINDOWED, windowed_attention)
    whole.config._attn_implementation = WINDOWED
    return whole


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports weights that are left over on stderr; we say what matters in errors."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def windowed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask_BVL: Tensor, **others: Any
) -> tuple[Tensor, None]:
    """Attention of transformers' form, (B, A, T, W / A) -> (B, T, A, W / A), in which each window sees itself alone."""
    studies, heads, steps, width = query.shape
    windows, length = mask_BVL.shape[1:]

    def cut(x: Tensor) -> Tensor:
        x = x.reshape(studies, heads, windows, length, width).transpose(1, 2)
        return x.reshape(studies * windows, heads, length, width)

    # Softmax over nothing would be NaN: where nothing is there, all is seen, and the summary leaves it out.
    mask_N = (mask_BVL | ~mask_BVL.any(-1, keepdim=True)).reshape(studies * windows, 1, 1, length)
    seen = nn.functional.scaled_dot_product_attention(
        cut(query), cut(key), cut(value), attn_mask=mask_N, scale=others.get("scaling")
    )
    out = seen.reshape(studies, windows, heads, length, width).transpose(2, 3)
    return out.reshape(studies, steps, heads, width), None
