"""What an encoder is, and the list of encoders of each modality."""

from __future__ import annotations

import abc

from torch import Tensor, nn

from fedmm.registry import Registry
from fedmm.schema import MODALITIES, InputSpec


class Encoder(nn.Module, abc.ABC):
    """One modality of B studies -> (B, D). Row b of the result depends on row b of the input alone."""

    def __init__(self, spec: InputSpec, width: int) -> None:
        """spec: form of the input.  width: D."""
        super().__init__()
        self.spec, self.width = spec, width

    @abc.abstractmethod
    def forward(self, value: Tensor) -> Tensor: ...


encoders: dict[str, Registry[type[Encoder]]] = {name: Registry(f"{name} encoder") for name in MODALITIES}
