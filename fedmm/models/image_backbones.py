"""Image encoders with torchvision's architectures: (B, 1, H, W) -> (B, D). Random weights: nothing is ever downloaded.

Each is built by torchvision and then changed, so that a patient's gradient can be bounded:
- BatchNorm, which mixes patients, becomes GroupNorm (Wu and He 2018); what is changed in place is not any more.
- The first convolution takes one channel. A stem made for 224 pixels would leave less than a 2 x 2 map of an image
  below 64 pixels, so it halves less often there; no weight changes its shape by that.
- The classifier of 1000 classes becomes `project`, to D.

Weights are named as torchvision's, behind `backbone.`: convolutions of a local file fit as they are, but for the first,
which sums over the three colours. Sources: He et al. 2016; Huang et al. 2017; Simonyan and Zisserman 2015.
"""

from __future__ import annotations

import abc
import math
from typing import Any

from torch import Tensor, nn

from fedmm.models.encoder import Encoder, encoders
from fedmm.schema import InputSpec

# B studies, C channels, H W pixels, h w of the last map, D width of the embedding

GROUPS = 32  # Wu and He 2018
HALVINGS = 5  # of all these architectures, from the image to the last map
LAST_MAP = 2  # least side of the last map: with one pixel, GroupNorm of few channels leaves signs alone
VGG_GRID = 2  # side of the grid that VGG's small head sees


class Backbone(Encoder, abc.ABC):
    """A convolutional network, a mean over places, one linear layer."""

    backbone: nn.Module
    project: nn.Linear

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width)
        # halvings that this size of image has no pixels for: 0 from 64 on, 1 from 32, 2 from 16 on
        self.too_many = max(0, HALVINGS - int(math.log2(spec.image_size / LAST_MAP)))

    @abc.abstractmethod
    def last_map(self, image_B1HW: Tensor) -> Tensor:
        """(B, C, h, w)"""

    def forward(self, image_B1HW: Tensor) -> Tensor:
        out: Tensor = self.project(self.last_map(image_B1HW).mean((2, 3)))
        return out


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


@encoders["image"].register("resnet18")
class ResNet18(ResNet):
    """11 million weights: the smallest of the known architectures, for transfer."""

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width, depth=18)


@encoders["image"].register("resnet50")
class ResNet50(ResNet):
    """24 million weights, in bottlenecks."""

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__(spec, width, depth=50)


@encoders["image"].register("densenet121")
class DenseNet121(Backbone):
    """7 million weights; the architecture of CheXNet (Rajpurkar et al. 2017), so of many weights for chest images."""

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


@encoders["image"].register("vgg16")
class VGG16(Backbone):
    """torchvision's `vgg16_bn` without its classifier: 15 million weights instead of 138.

    Nine tenths of VGG's weights are its head of two layers of 4096, made for 1000 classes. Privacy noise is added to
    each weight, so its length grows with the root of their number while the clipped gradient stays as long as it was;
    and a patient's gradient of that head alone takes half a gigabyte. Here: a 2 x 2 grid of means and one linear layer.
    """

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

    def forward(self, image_B1HW: Tensor) -> Tensor:
        out: Tensor = self.project(self.pool(self.last_map(image_B1HW)).flatten(1))
        return out


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
