"""Image encoders with torchvision's architectures: (B, 1, H, W) -> (B, D). Random weights: nothing is ever downloaded.

Each is built by torchvision and then changed, so that a patient's gradient can be bounded:
- BatchNorm, which mixes patients, becomes GroupNorm (Wu and He 2018); what is changed in place is not any more.
- The first convolution takes one channel. A stem made for 224 pixels would leave less than a 2 x 2 map of an image
  below 64 pixels, so it halves less often there; no weight changes its shape by that.
- The classifier of 1000 classes becomes `project`, to D.

Weights are named as torchvision's, behind `backbone.`: those of a pretrained folder (model.image_from) are taken by name,
where the shape fits too, and of the first convolution the sum over the three colours. BatchNorm's statistics have no
place here, so what was trained with them is a start rather than the same network.
Sources: He et al. 2016; Huang et al. 2017; Simonyan and Zisserman 2015.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedmm.models.encoder import encoders
from fedmm.models.pretrained import Pooled, Source
from fedmm.schema import InputSpec

# B studies, C channels, H W pixels, h w of the last map, D width of the embedding

GROUPS = 32  # Wu and He 2018
HALVINGS = 5  # of all these architectures, from the image to the last map
LAST_MAP = 2  # least side of the last map: with one pixel, GroupNorm of few channels leaves signs alone
LAST_STAGE = 34  # index of VGG-16's last three convolutions and what follows them
VGG_GRID = 2  # side of the grid that VGG's small head sees


class Backbone(Pooled, abc.ABC):
    """A convolutional network, a mean over places, one linear layer."""

    architecture: ClassVar[str]  # in config.json, as "model_type" or "architecture"

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        # halvings that this size of image has no pixels for: 0 from 64 on, 1 from 32, 2 from 16 on
        self.too_many = max(0, HALVINGS - int(math.log2(spec.image_size / LAST_MAP)))

    @abc.abstractmethod
    def last_map(self, image_B1HW: Tensor) -> Tensor:
        """(B, C, h, w)"""

    def summary(self, image_B1HW: Tensor) -> Tensor:
        return self.last_map(image_B1HW).mean((2, 3))

    def start_from(self, source: Source) -> None:
        """The folder's weights where names and shapes fit; the rest stays fresh, which only tuning = full allows.

        Raises: ConfigError if the folder is of another architecture, or if what will never be trained is not in it.
        """
        content = source.config()
        if self.architecture not in (content.get("model_type"), content.get("architecture")):
            raise source.wrong(
                f"config.json is not of a {self.architecture}", fix=f'{{"model_type": "{self.architecture}"}}'
            )
        theirs, mine = source.weights(), dict(self.backbone.named_parameters())
        taken = {name: value for name, own in mine.items() if (value := _fitting(theirs.get(name), own)) is not None}
        missing = sorted(set(mine) - set(taken))
        if not taken or (missing and source.tuning != "full"):
            raise source.wrong(
                f"{len(missing)} of {len(mine)} tensors of {self.architecture} are not in it, or of another shape",
                why=f"for example {missing[0]}; what is not trained must come from the folder",
                fix="weights with torchvision's names",
            )
        with torch.no_grad():
            for name, value in taken.items():
                mine[name].copy_(value)


def _fitting(value: Tensor | None, own: Tensor) -> Tensor | None:
    """`value` in the shape of `own`, the colours of a first convolution added up; None if it does not fit."""
    if value is None or not value.is_floating_point():
        return None
    if value.dim() == 4 and value.shape[1] == 3 and own.shape[1] == 1:
        value = value.sum(1, keepdim=True)
    return value if value.shape == own.shape else None


class ResNet(Backbone):
    """torchvision's ResNet v1.5. The sum with the shortcut is taken here: torchvision takes it in place."""

    def __init__(self, spec: InputSpec, width: int, *, depth: int) -> None:
        super().__init__(spec, width)
        net: Any = _built(f"resnet{depth}")
        net.conv1 = _one_channel(net.conv1, stride=1 if self.too_many > 1 else 2)
        if self.too_many:
            net.maxpool = nn.Identity()
        self.project = nn.Linear(net.fc.in_features, width)
        net.fc = nn.Identity()
        self.backbone = net

    def last_map(self, image_B1HW: Tensor) -> Tensor:
        net: Any = self.backbone
        out: Tensor = net.maxpool(net.relu(net.bn1(net.conv1(image_B1HW))))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in stage:
                out = _residual(block, out)
        return out

    def last(self) -> Sequence[nn.Module]:
        net: Any = self.backbone
        return (net.layer4,)


@encoders["image"].register("resnet18")
class ResNet18(ResNet):
    """11 million weights: the smallest of the known architectures, for transfer."""

    architecture = "resnet18"

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width, depth=18)


@encoders["image"].register("resnet50")
class ResNet50(ResNet):
    """24 million weights, in bottlenecks."""

    architecture = "resnet50"

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width, depth=50)


@encoders["image"].register("densenet121")
class DenseNet121(Backbone):
    """7 million weights; the architecture of CheXNet (Rajpurkar et al. 2017), so of many weights for chest images."""

    architecture = "densenet121"

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        net: Any = _built("densenet121")
        net.features.conv0 = _one_channel(net.features.conv0, stride=1 if self.too_many > 1 else 2)
        if self.too_many:
            net.features.pool0 = nn.Identity()
        self.project = nn.Linear(net.classifier.in_features, width)
        net.classifier = nn.Identity()
        self.backbone = net

    def last_map(self, image_B1HW: Tensor) -> Tensor:
        net: Any = self.backbone
        out: Tensor = net.features(image_B1HW).relu()
        return out

    def last(self) -> Sequence[nn.Module]:
        net: Any = self.backbone
        return (net.features.denseblock4, net.features.norm5)


@encoders["image"].register("vgg16")
class VGG16(Backbone):
    """torchvision's `vgg16_bn` without its classifier: 15 million weights instead of 138.

    Nine tenths of VGG's weights are its head of two layers of 4096, made for 1000 classes. Privacy noise is added to
    each weight, so its length grows with the root of their number while the clipped gradient stays as long as it was;
    and a patient's gradient of that head alone takes half a gigabyte. Here: a 2 x 2 grid of means and one linear layer.
    """

    architecture = "vgg16"

    def __init__(self, spec: InputSpec, width: int) -> None:
        from torchvision.models.vgg import cfgs, make_layers

        super().__init__(spec, width)
        features: Any = _private(make_layers(cfgs["D"], batch_norm=True))
        features[0] = _one_channel(features[0], stride=1)
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's VGG
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        pools = [place for place, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
        for place in pools[HALVINGS - self.too_many :]:
            features[place] = nn.Identity()
        self.backbone = nn.ModuleDict({"features": features})
        self.pool = nn.AdaptiveAvgPool2d(VGG_GRID)
        self.project = nn.Linear(512 * VGG_GRID**2, width)

    def last_map(self, image_B1HW: Tensor) -> Tensor:
        out: Tensor = self.backbone["features"](image_B1HW)  # type: ignore[index]
        return out

    def summary(self, image_B1HW: Tensor) -> Tensor:
        out: Tensor = self.pool(self.last_map(image_B1HW)).flatten(1)
        return out

    def last(self) -> Sequence[nn.Module]:
        features: Any = self.backbone["features"]  # type: ignore[index]
        return tuple(features[LAST_STAGE:])


def _built(name: str) -> nn.Module:
    """torchvision's model of this name, with one class, ready for privacy. `weights=None`: never a download."""
    from torchvision import models  # here, because it takes 0.7 s that who uses no backbone need not wait (measured)

    return _private(getattr(models, name)(weights=None, num_classes=1))


def _private(net: nn.Module) -> nn.Module:
    """GroupNorm in place of BatchNorm under the same names, ReLU that keeps its input."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            channels = module.num_features
            net.set_submodule(name, nn.GroupNorm(math.gcd(GROUPS, channels), channels))
        elif isinstance(module, nn.ReLU):
            module.inplace = False
    return net


def _one_channel(conv: nn.Conv2d, *, stride: int) -> nn.Conv2d:
    """A fresh convolution of the same kernel for one channel."""
    first = nn.Conv2d(
        1,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=stride,
        padding=conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNet
    return first


def _residual(block: Any, x_BCHW: Tensor) -> Tensor:
    """torchvision's BasicBlock or Bottleneck, out of place: ghost clipping refuses outputs that change."""
    out: Tensor = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x_BCHW)))))
    if hasattr(block, "conv3"):
        out = block.bn3(block.conv3(block.relu(out)))
    shortcut = x_BCHW if block.downsample is None else block.downsample(x_BCHW)
    return (out + shortcut).relu()
