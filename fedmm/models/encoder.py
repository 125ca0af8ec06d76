"""What an encoder is, and the list of encoders of each modality."""

from __future__ import annotations

import abc
import hashlib

import torch
from torch import Tensor, nn

from fedmm.registry import Registry
from fedmm.schema import MODALITIES, InputSpec


class Encoder(nn.Module, abc.ABC):
    """One modality of B studies -> (B, D). Row b of the result depends on row b of the input alone."""

    from_folder = False  # whether it is built from a pretrained folder, as in models/pretrained.py

    def __init__(self, spec: InputSpec, width: int) -> None:
        """spec: form of the input.  width: D."""
        super().__init__()
        self.spec, self.width = spec, width

    @abc.abstractmethod
    def forward(self, value: Tensor) -> Tensor: ...


class FixedEncoder(Encoder):
    """A fixed part that nothing trains, then a trained one. The fixed part runs once for each study: its result is kept.

    Nothing of the fixed part is in the state dict: what is in one is averaged and released.
    """

    @abc.abstractmethod
    def features(self, value: Tensor) -> Tensor:
        """(B, ...) float32, contiguous, without a gradient; each row from its own study alone."""

    @abc.abstractmethod
    def finish(self, features: Tensor) -> Tensor:
        """(B, D) from `features`: the part that is trained."""

    def forward(self, value: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.features(value)
        return self.finish(features)

    def identity(self) -> str:
        """Hash of all that `features` depends on beside the study: a kept result of another one must not be used."""
        return hashlib.sha256(f"{type(self).__qualname__} {self.spec.model_dump_json()}".encode()).hexdigest()


encoders: dict[str, Registry[type[Encoder]]] = {name: Registry(f"{name} encoder") for name in MODALITIES}
