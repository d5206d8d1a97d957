"""The residual encoder of a plan: a stem, then stages of residual blocks.

The structure is that of nnU-Net's ``ResidualEncoderUNet``, with the basic blocks of ResNet-D (He et al. 2019, Bag of
tricks): a shortcut that cannot pass its input on unchanged averages over the stride, then changes the number of
features by a convolution of size 1.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from medseg.networks.instance_norm import InstanceNorm, InstanceNormLeakyReLU
from medseg.networks.unet import convolution, plain_stage
from medseg.records.network import NetworkPlan


class ResidualBlock(nn.Module):
    """(B, fan_in, ...) → (B, fan_out, ...), each axis divided by its stride.

    convolution → norm → leaky ReLU → convolution → norm, plus the shortcut, then leaky ReLU.
    """

    def __init__(self, fan_in: int, fan_out: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> None:
        super().__init__()
        one = (1,) * len(kernel)
        self.first = plain_stage(fan_in, fan_out, kernel, stride, 1)
        self.second = convolution(fan_out, fan_out, kernel, one, bias=False)
        self.norm = InstanceNormLeakyReLU(fan_out)
        self.stride = stride
        self.project = nn.Sequential()
        if fan_in != fan_out:
            self.project = nn.Sequential(convolution(fan_in, fan_out, one, one, bias=False), InstanceNorm(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        shortcut: Tensor = self.project(_average(x, self.stride))
        result: Tensor = self.norm(self.second(self.first(x)), shortcut)
        return result


def residual_encoder(plan: NetworkPlan, channels: int) -> nn.ModuleList:
    """Stages of ``convs_encoder`` blocks each, the first of them strided; the stem is part of the first stage."""
    features = plan.features
    stem = plain_stage(channels, features[0], plan.kernels[0], (1,) * len(plan.kernels[0]), 1)
    stages = nn.ModuleList()
    for index, (fan_in, fan_out) in enumerate(pairwise((features[0], *features))):
        kernel, stride = plan.kernels[index], plan.strides[index]
        one = (1,) * len(kernel)
        blocks = [ResidualBlock(fan_in, fan_out, kernel, stride)]
        blocks += [ResidualBlock(fan_out, fan_out, kernel, one) for _ in range(plan.convs_encoder[index] - 1)]
        stages.append(nn.Sequential(*([stem] if index == 0 else []), *blocks))
    return stages


def silence_blocks(network: nn.Module) -> None:
    """Let every residual block start as its shortcut, as nnU-Net does: the last norm of each scales by 0."""
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.norm.weight)


def _average(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Means over boxes of ``stride``; ``x`` itself where that is a single voxel."""
    if set(stride) == {1}:
        return x
    if len(stride) == 2:  # ceil_mode: as the strided convolution rounds
        return F.avg_pool2d(x, stride, ceil_mode=True)
    return F.avg_pool3d(x, stride, ceil_mode=True)
