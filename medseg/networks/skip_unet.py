"""Skip U-Net: a decoder for any encoder, with transposed or linear steps up, attention gates, or no padding.

``unet2015`` (Ronneberger et al. 2015, arXiv 1505.04597), ``attention`` (Oktay et al. 2018, arXiv 1804.03999) and the
networks with a ResNet or a transformer in the encoder are all made of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.networks.blocks import (
    Norm,
    Pool,
    centre,
    conv_stage,
    fit,
    he_initialise,
    norm_layer,
    strided_encoder,
    up_step,
)
from medseg.networks.unet import convolution
from medseg.records.network import NetworkPlan, ways_up


@dataclass(frozen=True, slots=True)
class Widths:
    """Features by stage, finest first: from the encoder (0: nothing), within decoder stages, at their ends."""

    encoder: tuple[int, ...]
    inner: tuple[int, ...]
    decoder: tuple[int, ...]


class AttentionGate(nn.Module):
    """(B, C, ...) skip, multiplied by how much of each voxel the coarser features ask for, 0 to 1.

    Additive attention between the skip and the coarser features at the skip's resolution. The score has a norm of its
    own only with batch norm: instance norm would let half of every image pass.
    """

    def __init__(self, below: int, skip: int, dimensions: int, norm: Norm) -> None:
        super().__init__()
        inner, one = max(1, skip // 2), (1,) * dimensions
        self.signal = nn.Sequential(convolution(below, inner, one, one, bias=True), norm_layer(norm, inner))
        self.skip = nn.Sequential(convolution(skip, inner, one, one, bias=True), norm_layer(norm, inner))
        self.score = nn.Sequential(
            nn.ReLU(),
            convolution(inner, 1, one, one, bias=True),
            norm_layer("batch" if norm == "batch" else "none", 1),
            nn.Sigmoid(),
        )

    def forward(self, signal: Tensor, skip: Tensor) -> Tensor:
        """The skip, weighted; ``signal`` has its size."""
        weight: Tensor = self.score(self.signal(signal) + self.skip(skip))
        return skip * weight


class SkipUNet(nn.Module):
    """(B, C, [Z,] Y, X) of any size → logits per decoder level, finest first; only the finest unless supervised.

    Without padding the logits cover the patch's centre (``NetworkPlan.output_size``).
    """

    def __init__(self, plan: NetworkPlan, encoder: nn.ModuleList, widths: Widths, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.widths = widths
        self.supervised, self.padded = plan.deep_supervision, plan.padding == "same"
        gated, one = plan.name == "attention", (1,) * len(plan.strides[0])
        levels = range(len(plan.features) - 2, -1, -1)
        self.up, self.gates, self.decoder, self.heads = (nn.ModuleList() for _ in range(4))
        below = widths.encoder[-1]
        for level, convs, kind in zip(levels, plan.convs_decoder, ways_up(plan), strict=True):
            skip, middle, out = widths.encoder[level], widths.inner[level], widths.decoder[level]
            risen = middle if kind == "transposed" else below
            self.up.append(up_step(kind, below, middle, plan.strides[level + 1]))
            if gated:
                self.gates.append(AttentionGate(risen, skip, len(one), plan.norm))
            fans = (risen + skip, *[middle] * (convs - 1), out)
            self.decoder.append(conv_stage(fans, plan.kernels[level], plan.norm, padded=self.padded))
            if self.supervised or level == 0:
                self.heads.append(convolution(out, outputs, one, one, bias=True))
            below = out
        if not levels:
            self.heads.append(convolution(below, outputs, one, one, bias=True))
        self.apply(he_initialise)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits (B, outputs, ...) of every supervised level at its own resolution, finest first."""
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        logits = []
        levels = len(self.decoder)
        for index, (up, stage) in enumerate(zip(self.up, self.decoder, strict=True)):
            skip = skips[-2 - index]
            x = up(x)
            if self.padded:
                x = fit(x, skip.shape[2:])
            else:
                skip = centre(skip, x.shape[2:])
            if len(self.gates):
                skip = self.gates[index](x, skip)
            x = stage(torch.cat((x, skip), 1) if self.widths.encoder[-2 - index] else x)
            if self.supervised and self.training and index < levels - 1:
                logits.append(self.heads[index](x))
        logits.append(self.heads[-1](x))
        return logits[::-1]

    def stages(self) -> list[nn.Module]:
        """What gradient checkpointing computes again."""
        return [*self.encoder, *self.gates, *self.decoder]


def unet2015(plan: NetworkPlan, channels: int, outputs: int) -> SkipUNet:
    """The U-Net of 2015: convolutions, maximum pooling, steps up, skips that are concatenated.

    In front of a linear step, which cannot change the number of features, the level below ends with as many as the
    skip has: so both sides of the concatenation have the same width whichever way up is chosen.
    """
    ups, features = ways_up(plan), list(plan.features)
    last = len(features) - 1
    ends = [features[s - (s > 0 and ups[last - s] == "linear")] for s in range(last + 1)]
    stages = nn.ModuleList()
    before, padded = channels, plan.padding == "same"
    for index, convs in enumerate(plan.convs_encoder):
        width = ends[-1] if index == last else features[index]
        convolutions = conv_stage((before, *[width] * convs), plan.kernels[index], plan.norm, padded=padded)
        stages.append(nn.Sequential(Pool(plan.strides[index]), *convolutions))
        before = width
    return SkipUNet(plan, stages, Widths((*features[:-1], before), plan.features, tuple(ends)), outputs)


def attention_unet(plan: NetworkPlan, channels: int, outputs: int) -> SkipUNet:
    """The plan's U-Net with an attention gate on every skip."""
    encoder = strided_encoder(plan, channels)
    return SkipUNet(plan, encoder, Widths(*[plan.features] * 3), outputs)


def attention_maps(network: nn.Module, x: Tensor) -> list[Tensor]:
    """What the gates let pass for an input: (B, 1, ...) per gate, 0 to 1, finest first; [] without gates."""
    return _seen(network, x)[1]


class WithAttention(nn.Module):
    """A network's finest logits, and after them what each gate lets pass at the input's size, finest gate first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        """One level of (B, outputs + gates, ...)."""
        levels, gates = _seen(self.network, x)
        mode = "bilinear" if x.ndim == 4 else "trilinear"
        shown = [F.interpolate(gate.float(), x.shape[2:], mode=mode, align_corners=False) for gate in gates]
        return [torch.cat((levels[0].float(), *shown), 1)]


def _seen(network: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A network's levels and what its gates let pass."""
    found: list[Tensor] = []
    gates = [module for module in network.modules() if isinstance(module, AttentionGate)]
    hooks = [gate.score.register_forward_hook(lambda _m, _i, out: found.append(out.detach())) for gate in gates]
    try:
        levels = network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return levels, found[::-1]
