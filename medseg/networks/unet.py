"""The U-Net of a plan: an encoder, a decoder, and one head per decoder level; and the plain encoder.

The structure is nnU-Net's ``PlainConvUNet``: stages of convolution → instance norm → leaky ReLU, the first
convolution of a stage carries its stride, transposed convolutions go up, skips are concatenated, decoder stages use
the kernel of the skip's stage. The convolutions in front of a norm have no bias: the norm subtracts it again.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from medseg.networks.instance_norm import SLOPE, InstanceNormLeakyReLU
from medseg.records.network import NetworkPlan


class UNet(nn.Module):
    """(B, C, [Z,] Y, X) → logits per decoder level, finest first; only the finest unless ``supervised``.

    ``encoder`` holds one module per stage, finest first: stage s has ``features[s]`` channels and ``strides[s]``.
    """

    def __init__(self, plan: NetworkPlan, encoder: nn.ModuleList, outputs: int) -> None:
        super().__init__()
        dimensions = len(plan.strides[0])
        features = plan.features
        self.encoder = encoder
        levels = range(len(features) - 2, -1, -1)
        self.up = nn.ModuleList(
            transposed(features[level + 1], features[level], plan.strides[level + 1]) for level in levels
        )
        one = (1,) * dimensions
        self.decoder = nn.ModuleList(
            plain_stage(2 * features[level], features[level], plan.kernels[level], one, convs)
            for level, convs in zip(levels, plan.convs_decoder, strict=True)
        )
        self.heads = nn.ModuleList(convolution(features[level], outputs, one, one, bias=True) for level in levels)
        if not len(self.decoder):  # a single stage: the head stands on the encoder
            self.heads.append(convolution(features[0], outputs, one, one, bias=True))
        self.supervised = plan.deep_supervision
        self.apply(_initialise)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits (B, outputs, ...) of every supervised level at its own resolution, finest first."""
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        logits = []
        last = len(self.decoder) - 1
        for level, (up, stage, head) in enumerate(zip(self.up, self.decoder, self.heads, strict=False)):
            x = stage(torch.cat((up(x), skips[-2 - level]), 1))
            if level == last or (self.supervised and self.training):
                logits.append(head(x))
        if last < 0:
            logits.append(self.heads[0](x))
        return logits[::-1]

    def stages(self) -> list[nn.Module]:
        """What gradient checkpointing computes again."""
        return [*self.encoder, *self.decoder]


def plain_encoder(plan: NetworkPlan, channels: int) -> nn.ModuleList:
    """Stages of ``convs_encoder`` convolutions each, the first of them strided."""
    widths = pairwise((channels, *plan.features))
    return nn.ModuleList(
        plain_stage(fan_in, fan_out, kernel, stride, convs)
        for (fan_in, fan_out), kernel, stride, convs in zip(
            widths, plan.kernels, plan.strides, plan.convs_encoder, strict=True
        )
    )


def plain_stage(
    fan_in: int, fan_out: int, kernel: tuple[int, ...], stride: tuple[int, ...], convs: int
) -> nn.Sequential:
    """Convolution → instance norm → leaky ReLU, ``convs`` times; the first convolution is strided."""
    layers: list[nn.Module] = []
    for index in range(convs):
        step = stride if index == 0 else (1,) * len(stride)
        layers += [convolution(fan_in if index == 0 else fan_out, fan_out, kernel, step, bias=False)]
        layers += [InstanceNormLeakyReLU(fan_out)]
    return nn.Sequential(*layers)


def convolution(
    fan_in: int,
    fan_out: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    *,
    bias: bool,
    padding: tuple[int, ...] | None = None,
) -> nn.Module:
    """A convolution in as many dimensions as the kernel has, by default padded so that stride 1 keeps the size."""
    padding = tuple(k // 2 for k in kernel) if padding is None else padding
    if len(kernel) == 2:
        return nn.Conv2d(fan_in, fan_out, _two(kernel), _two(stride), _two(padding), bias=bias)
    return SafeConv3d(fan_in, fan_out, _three(kernel), _three(stride), _three(padding), bias=bias)


class SafeConv3d(nn.Conv3d):
    """A 3D convolution whose gradient is right in bfloat16 on the CPU too.

    Where the kernel is longer than the image along an axis, oneDNN leaves parts of the weights' gradient unwritten, or
    writes past its end (torch 2.13, AVX-512). Such images have few voxels, so that float32 costs nothing there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv3d``."""
        fits = all(size >= kernel for size, kernel in zip(input.shape[2:], self.kernel_size, strict=True))
        trained = torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        if fits or input.device.type != "cpu" or not trained:
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            exact = super().forward(input.float())
        return exact.to(torch.get_autocast_dtype("cpu"))


def transposed(fan_in: int, fan_out: int, stride: tuple[int, ...]) -> nn.Module:
    """A transposed convolution whose kernel is its stride: each voxel becomes a box."""
    if len(stride) == 2:
        return nn.ConvTranspose2d(fan_in, fan_out, _two(stride), _two(stride))
    return nn.ConvTranspose3d(fan_in, fan_out, _three(stride), _three(stride))


def _two(t: tuple[int, ...]) -> tuple[int, int]:
    return t[0], t[1]


def _three(t: tuple[int, ...]) -> tuple[int, int, int]:
    return t[0], t[1], t[2]


def _initialise(module: nn.Module) -> None:
    """He initialisation for the leaky ReLU (He et al. 2015), biases 0."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
