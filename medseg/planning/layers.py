"""Layers: the convolutions of a planned U-Net with their sizes, in closed form; no network is built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from medseg.records.network import NetworkName, NetworkPlan

# Memory of a training step over that of a plain network of the same stages: 3D, patch 40 × 56 × 40, batch 2, float32
# (scripts/bench/network_cost.py).
VOXELS: dict[NetworkName, float] = {
    "unet2015": 1.05,
    "attention": 1.3,
    "unetpp": 1.9,
    "resnet-unet": 1.5,
    "transunet": 1.7,
    "swinunetr": 12.0,  # from the tensors kept for the backward pass, padding included
    "unetr": 0.65,
    "segresnet": 1.8,
    "mednext": 3.2,
}
Kind = Literal["conv", "again", "project", "up", "head"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution: features in and out, voxels of its kernel and of its output for one patch.

    ``conv`` is followed by a norm and an activation; ``again`` is one that gradient checkpointing computes twice and
    does not keep; ``project`` (a residual shortcut) is followed by a norm; ``up`` is a
    transposed convolution whose output is joined to a skip connection of as many features; ``head`` gives logits.
    """

    kind: Kind
    fan_in: int
    fan_out: int
    kernel: int
    voxels: int

    @property
    def parameters(self) -> int:
        """Weights, with the scale and shift of a norm, or the bias where there is no norm."""
        others = 2 * self.fan_out if self.kind in ("conv", "again", "project") else self.fan_out
        return self.fan_in * self.fan_out * self.kernel + others

    @property
    def flop(self) -> int:
        """Floating point operations forward for one patch: two for each weight and voxel it is used at."""
        kernel = 1 if self.kind == "up" else self.kernel  # every output voxel of "up" comes from one input voxel
        return 2 * self.fan_in * self.fan_out * kernel * self.voxels

    @property
    def values(self) -> int:
        """Values of the output for one patch."""
        return self.fan_out * self.voxels


def layers_of(network: NetworkPlan, patch: Sequence[int], channels: int, outputs: int) -> list[Layer]:
    """The layers in the order in which data pass them.

    Args:
        network: exact for ``plain`` and ``residual``; for the others those of a plain network of the same stages,
            on more or fewer voxels (``VOXELS``).
        patch: its input's size.
        channels: of the input.
        outputs: logits.
    """
    if network.block == "bottleneck":  # its wide outputs come from convolutions of 1 on a fourth of the features
        narrow = tuple(n // 4 for n in network.features[2:])
        network = network.model_copy(update={"features": (*network.features[:2], *narrow)})
    voxels = _voxels(patch, network.strides)
    found = (_residual if network.name == "residual" else _plain)(network, voxels, channels)
    levels = list(range(len(network.features) - 2, -1, -1))
    for level, convs in zip(levels, network.convs_decoder, strict=True):
        below, here = network.features[level + 1], network.features[level]
        kernel, size = math.prod(network.kernels[level]), voxels[level]
        found.append(Layer("up", below, here, math.prod(network.strides[level + 1]), size))
        found += [Layer("conv", 2 * here if index == 0 else here, here, kernel, size) for index in range(convs)]
        found.append(Layer("head", here, outputs, 1, size))
    if not levels:
        found.append(Layer("head", network.features[0], outputs, 1, voxels[0]))
    if network.name in VOXELS:
        factor = VOXELS[network.name]
        found = [replace(layer, voxels=math.ceil(layer.voxels * factor)) for layer in found]
    return _repeated(found) if network.checkpointing else found


def _repeated(layers: Sequence[Layer]) -> list[Layer]:
    """With gradient checkpointing: of each stage only the output is kept, the last of the convolutions in a row."""
    ends = [*(later.kind == "up" or later.voxels != layer.voxels for layer, later in pairwise(layers)), True]
    return [
        replace(layer, kind="again") if layer.kind in ("conv", "project") and not end else layer
        for layer, end in zip(layers, ends, strict=True)
    ]


def _voxels(patch: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    size, found = list(patch), []
    for stride in strides:
        size = [math.ceil(n / s) for n, s in zip(size, stride, strict=True)]
        found.append(math.prod(size))
    return found


def _plain(network: NetworkPlan, voxels: Sequence[int], channels: int) -> list[Layer]:
    found = []
    for stage, (fan_in, fan_out) in enumerate(pairwise((channels, *network.features))):
        kernel = math.prod(network.kernels[stage])
        before = (fan_in, *[fan_out] * (network.convs_encoder[stage] - 1))
        found += [Layer("conv", n, fan_out, kernel, voxels[stage]) for n in before]
    return found


def _residual(network: NetworkPlan, voxels: Sequence[int], channels: int) -> list[Layer]:
    first = network.features[0]
    found = [Layer("conv", channels, first, math.prod(network.kernels[0]), voxels[0])]
    for stage, (fan_in, fan_out) in enumerate(pairwise((first, *network.features))):
        kernel, size = math.prod(network.kernels[stage]), voxels[stage]
        for index in range(network.convs_encoder[stage]):
            before = fan_in if index == 0 else fan_out
            found += [Layer("conv", before, fan_out, kernel, size), Layer("conv", fan_out, fan_out, kernel, size)]
            if before != fan_out:
                found.append(Layer("project", before, fan_out, 1, size))
    return found
