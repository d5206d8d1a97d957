"""ResNet: the encoders ResNet-18, 34 and 50 (He et al. 2016, arXiv 1512.03385) in 2D and 3D, with a U-Net's decoder."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from medseg.networks.blocks import Norm, conv_stage, norm_activation, norm_layer
from medseg.networks.skip_unet import SkipUNet, Widths
from medseg.networks.unet import convolution
from medseg.records.network import NetworkPlan

STEM_KERNEL = 7  # along the axes where the plan's kernel is not 1
EXPANSION = {"basic": 1, "bottleneck": 4}  # features of a block's output over those of its 3 × 3 convolution


class Block(nn.Module):
    """(B, fan_in, ...) → (B, fan_out, ...) by two convolutions, or by a bottleneck of three, plus the shortcut.

    The stride is at the convolution that has the kernel, as in torchvision's ResNet.
    """

    def __init__(
        self, fan_in: int, fan_out: int, inner: int, kernel: tuple[int, ...], stride: tuple[int, ...], norm: Norm
    ) -> None:
        super().__init__()
        one, bias = (1,) * len(kernel), norm == "none"
        if inner == fan_out:
            self.first = conv_stage((fan_in, inner), kernel, norm, stride=stride)
            self.last = convolution(inner, fan_out, kernel, one, bias=bias)
        else:
            reduced = conv_stage((fan_in, inner), one, norm)
            self.first = nn.Sequential(*reduced, *conv_stage((inner, inner), kernel, norm, stride=stride))
            self.last = convolution(inner, fan_out, one, one, bias=bias)
        self.norm = norm_activation(norm, fan_out)
        self.shortcut = nn.Sequential()
        if fan_in != fan_out or set(stride) != {1}:
            project = convolution(fan_in, fan_out, one, stride, bias=bias)
            self.shortcut = nn.Sequential(project, norm_layer(norm, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        result: Tensor = self.norm(self.last(self.first(x)), self.shortcut(x))
        return result


class MaxPool3(nn.Module):
    """Maximum over 3 voxels along the axes of stride 2, over 1 along the others."""

    def __init__(self, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Each axis divided by its stride, rounded up."""
        if set(self.stride) == {1}:
            return x
        kernel = tuple(2 * s - 1 for s in self.stride)
        padding = tuple(k // 2 for k in kernel)
        if len(kernel) == 2:
            return F.max_pool2d(x, kernel, self.stride, padding)
        return F.max_pool3d(x, kernel, self.stride, padding)


def resnet_encoder(plan: NetworkPlan, channels: int) -> nn.ModuleList:
    """Stage 0 hands the image through, stage 1 is the stem, stages 2 to 5 are the ResNet's four layers."""
    stem_kernel = tuple(STEM_KERNEL if k > 1 else 1 for k in plan.kernels[1])
    stem = conv_stage((channels, plan.features[1]), stem_kernel, plan.norm, stride=plan.strides[1])
    stages: list[nn.Module] = [nn.Identity(), stem]
    for index, (fan_in, fan_out) in enumerate(pairwise(plan.features[1:]), start=2):
        inner, kernel = fan_out // EXPANSION[plan.block], plan.kernels[index]
        pooled = index == 2  # the first layer begins with a pooling in place of a stride
        blocks: list[nn.Module] = [MaxPool3(plan.strides[2])] if pooled else []
        for number in range(plan.convs_encoder[index]):
            stride = plan.strides[index] if number == 0 and not pooled else (1,) * len(kernel)
            blocks.append(Block(fan_in if number == 0 else fan_out, fan_out, inner, kernel, stride, plan.norm))
        stages.append(nn.Sequential(*blocks))
    return nn.ModuleList(stages)


def resnet_unet(plan: NetworkPlan, channels: int, outputs: int) -> SkipUNet:
    """A ResNet whose stem and layers are the skips; the decoder's levels have ``features[0]·2^level`` features."""
    features = plan.features
    decoder = tuple(features[0] * 2**level for level in range(len(features)))
    return SkipUNet(plan, resnet_encoder(plan, channels), Widths((0, *features[1:]), decoder, decoder), outputs)
