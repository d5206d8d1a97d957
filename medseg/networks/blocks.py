"""Blocks: the pieces that the networks of the U-Net family are put together from, for 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medseg.networks.instance_norm import InstanceNorm, InstanceNormLeakyReLU
from medseg.networks.unet import convolution, transposed
from medseg.records.network import NetworkPlan, Up

Norm = Literal["instance", "batch", "none"]


class BatchNorm(_BatchNorm):
    """Batch norm in any number of dimensions that takes what it learned where a batch holds a single value."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) normalised, scaled and shifted."""
        if self.training and input.numel() == input.shape[1]:
            mean, variance = self.running_mean, self.running_var
            return F.batch_norm(input, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(input)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""


class NormReLU(nn.Module):
    """A norm, plus a shortcut where there is one, then ReLU; instance norm has a faster form of its own."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Same shape."""
        normed: Tensor = self.norm(x)
        return F.relu(normed if shortcut is None else normed + shortcut)


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """The norm alone."""
    if norm == "none":
        return nn.Identity()
    return InstanceNorm(channels) if norm == "instance" else BatchNorm(channels)


def norm_activation(norm: Norm, channels: int) -> nn.Module:
    """Norm and activation: leaky ReLU after instance norm, as nnU-Net; else ReLU. Takes a shortcut to add."""
    return InstanceNormLeakyReLU(channels) if norm == "instance" else NormReLU(norm_layer(norm, channels))


def conv_stage(
    widths: Sequence[int],
    kernel: tuple[int, ...],
    norm: Norm,
    *,
    stride: tuple[int, ...] | None = None,
    padded: bool = True,
) -> nn.Sequential:
    """Convolution → norm → activation from each width to the next; the first convolution carries the stride."""
    layers: list[nn.Module] = []
    padding = None if padded else (0,) * len(kernel)
    for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
        step = stride if stride is not None and index == 0 else (1,) * len(kernel)
        layers += [convolution(fan_in, fan_out, kernel, step, bias=norm == "none", padding=padding)]
        layers += [norm_activation(norm, fan_out)]
    return nn.Sequential(*layers)


def strided_encoder(plan: NetworkPlan, channels: int) -> nn.ModuleList:
    """The plan's stages, each beginning with a convolution of its stride."""
    before = (channels, *plan.features)
    return nn.ModuleList(
        conv_stage((before[index], *[width] * convs), plan.kernels[index], plan.norm, stride=plan.strides[index])
        for index, (width, convs) in enumerate(zip(plan.features, plan.convs_encoder, strict=True))
    )


class Pool(nn.Module):
    """Maximum over boxes of ``stride``; an odd last voxel is left out."""

    def __init__(self, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Each axis divided by its stride."""
        if set(self.stride) == {1}:
            return x
        return F.max_pool2d(x, self.stride) if len(self.stride) == 2 else F.max_pool3d(x, self.stride)


class Interpolate(nn.Module):
    """Linear interpolation to ``stride`` times the size."""

    def __init__(self, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Each axis multiplied by its stride."""
        if set(self.stride) == {1}:
            return x
        size = [n * s for n, s in zip(x.shape[2:], self.stride, strict=True)]
        return F.interpolate(x, size, mode="bilinear" if len(size) == 2 else "trilinear", align_corners=False)


def up_step(kind: Up, below: int, here: int, stride: tuple[int, ...]) -> nn.Module:
    """One step up: a transposed convolution from ``below`` to ``here`` features, or interpolation, which keeps them."""
    return transposed(below, here, stride) if kind == "transposed" else Interpolate(stride)


def fit(x: Tensor, size: Sequence[int]) -> Tensor:
    """``x`` with zeros at the ends of axes that are too short, and without the ends of those that are too long."""
    missing = [wanted - n for n, wanted in zip(x.shape[2:], size, strict=True)]
    return F.pad(x, [side for m in reversed(missing) for side in (0, m)]) if any(missing) else x


def centre(x: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of ``x``: (B, C, ...) → (B, C, *size); of an odd margin the larger part is at the end."""
    for axis, (n, wanted) in enumerate(zip(x.shape[2:], size, strict=True), start=2):
        x = x.narrow(axis, (n - wanted) // 2, wanted)
    return x


def he_initialise(module: nn.Module) -> None:
    """He initialisation for the ReLU (He et al. 2015): variance 2 / fan in, biases 0; with ``network.apply``."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
