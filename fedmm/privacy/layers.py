"""Gradients of single layers by study or by patient, from a layer's input a and the gradient b at its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedmm.privacy.parts import Groups

# S studies, P patients, T positions of a sequence, I inputs, O outputs of a layer; k studies of each of n patients

# Values of all studies' gradients of a linear layer, up to which one product beats one for each k  # measured
FEW = 2**17
# What the kernel sees at each position, in values: so many in all, or at a time where there are more  # measured
UNFOLDED, IN_CACHE = 2**23, 2**20


def trains(layer: nn.Module, name: str) -> bool:
    weight = getattr(layer, name, None)
    return weight is not None and bool(weight.requires_grad)


def products(a_STI: Tensor, b_STO: Tensor, groups: Groups) -> Tensor:
    """(P, O, I): sums of b aᵀ."""
    if len(a_STI) * a_STI.shape[2] * b_STO.shape[2] <= FEW:
        if a_STI.shape[1] == 1:
            return groups.sums(b_STO.transpose(1, 2) * a_STI)
        return groups.sums(torch.bmm(b_STO.transpose(1, 2), a_STI))
    return groups.products(b_STO, a_STI)


def _layer_norm(layer: nn.LayerNorm, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(S, ...) gradients of weight and bias."""
    standard = nn.functional.layer_norm(a, layer.normalized_shape, None, None, layer.eps).mul_(b)
    between = list(range(1, b.dim() - len(layer.normalized_shape)))
    return (standard.sum(between), b.sum(between)) if between else (standard, b)


def _group_norm(layer: nn.GroupNorm, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(S, C) gradients of weight and bias."""
    standard_SCX = nn.functional.group_norm(a, layer.num_groups, eps=layer.eps).flatten(2)
    b_SCX = b.reshape(standard_SCX.shape)
    return standard_SCX.mul_(b_SCX).sum(2), b_SCX.sum(2)


NORMS: Mapping[type[nn.Module], Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}
Convolution = nn.Conv1d | nn.Conv2d


def as_2d(layer: Convolution, value: Tensor) -> Tensor:
    """A map (S, C, H, W) whatever the convolution."""
    return value if isinstance(layer, nn.Conv2d) else value.unsqueeze(2)


def in_2d(layer: Convolution) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, stride, padding and dilation in two dimensions."""
    lead = {1: ([1], [1], [0], [1]), 2: ([], [], [], [])}[len(layer.kernel_size)]
    own = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    kernel, stride, padding, dilation = ([*first, *map(int, rest)] for first, rest in zip(lead, own, strict=True))
    return kernel, stride, padding, dilation


def unfolded(layer: Convolution, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(S, T, I), (S, T, O): what the kernel sees at each position, and the gradient there."""
    kernel, stride, padding, dilation = in_2d(layer)
    a, b = as_2d(layer, a), as_2d(layer, b)
    padded = nn.functional.pad(a, (padding[1], padding[1], padding[0], padding[0])).contiguous()
    s, c, h, w = padded.stride()
    size = (len(a), a.shape[1], *kernel, b.shape[2], b.shape[3])
    seen = padded.as_strided(size, (s, c, h * dilation[0], w * dilation[1], h * stride[0], w * stride[1]))
    return seen.reshape(len(a), -1, b[0, 0].numel()).transpose(1, 2), b.flatten(2).transpose(1, 2)


def unfolded_products(layer: Convolution, a: Tensor, b: Tensor, groups: Groups) -> Tensor:
    """(P, O, I) the weight's gradients by patient; of large maps from a few studies at a time, which stay in the cache."""
    seen = b[0, 0].numel() * layer.weight[0].numel()
    if len(a) * seen <= UNFOLDED:
        return products(*unfolded(layer, a, b), groups)
    portion = max(1, IN_CACHE // seen)
    parts = zip(a.split(portion), b.split(portion), strict=True)  # type: ignore[no-untyped-call]
    pairs = (unfolded(layer, *part) for part in parts)
    return groups.sums(torch.cat([torch.bmm(b_STO.transpose(1, 2), a_STI) for a_STI, b_STO in pairs]))


def weight_gradient(layer: Convolution, a: Tensor, b: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """torch's own. shape: of the weight in two dimensions."""
    _, stride, padding, dilation = in_2d(layer)
    weight = b.new_zeros(()).expand(shape)  # not read
    made = torch.ops.aten.convolution_backward(
        b, a, weight, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )
    out: Tensor = made[1]
    return out


def side_by_side(layer: Convolution, a: Tensor, b: Tensor) -> Tensor:
    """(S, O, I, ...) the weight's gradients by study, by one convolution in which each study is a group."""
    a_SCHW, b_SOHW = as_2d(layer, a), as_2d(layer, b)
    studies = len(a)
    a_1CHW, b_1OHW = (value.reshape(1, -1, *value.shape[2:]) for value in (a_SCHW, b_SOHW))
    shape = (studies * layer.out_channels, layer.in_channels // layer.groups, *in_2d(layer)[0])
    made = weight_gradient(layer, a_1CHW, b_1OHW, shape, studies * layer.groups)
    return made.view(studies, *layer.weight.shape)


def way_of(layer: nn.Module) -> str:
    """How a layer's weights are clipped under training.clipping = ghost: "book-keeping" or "Opacus' sampler"."""
    own = type(layer) in (nn.Linear, nn.Embedding, *NORMS) or is_plain_convolution(layer)
    return "book-keeping" if own else "Opacus' sampler"


def is_plain_convolution(layer: nn.Module) -> bool:
    return (
        type(layer) in (nn.Conv1d, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def as_sequence(value: Tensor) -> Tensor:
    """(S, T, ·), whatever lies between."""
    return value.reshape(len(value), -1, value.shape[-1])


def trained(layer: nn.Module) -> list[nn.Parameter]:
    """The layer's own, without those of layers in it."""
    return [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
