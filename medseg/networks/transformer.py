"""Transformer: self-attention over all voxels of a network's coarsest stage, as in TransUNet.

(Chen et al. 2021, arXiv 2102.04306; layers as in the vision transformer, Dosovitskiy et al. 2020, arXiv 2010.11929.)
Positions are told by sines and cosines, so that any size of image will do; TransUNet learns them for a fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.networks.blocks import conv_stage
from medseg.networks.residual import residual_encoder, silence_blocks
from medseg.networks.skip_unet import SkipUNet, Widths
from medseg.networks.unet import convolution
from medseg.records.network import NetworkPlan, TransformerPlan

LONGEST = 10_000.0  # wavelength of the slowest position code, in voxels over 2π


class TransformerLayer(nn.Module):
    """(B, tokens, width) → the same: attention, then a perceptron, each after a layer norm and added to its input."""

    def __init__(self, plan: TransformerPlan) -> None:
        super().__init__()
        self.heads = plan.heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(plan.width), nn.LayerNorm(plan.width)
        self.queries_keys_values = nn.Linear(plan.width, 3 * plan.width)
        self.merge = nn.Linear(plan.width, plan.width)
        self.mlp = nn.Sequential(nn.Linear(plan.width, plan.mlp), nn.GELU(), nn.Linear(plan.mlp, plan.width))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        batch, tokens, width = x.shape
        parts = self.queries_keys_values(self.norm_attention(x))
        parts = parts.view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = x + self.merge(attended.transpose(1, 2).reshape(batch, tokens, width))
        result: Tensor = x + self.mlp(self.norm_mlp(x))
        return result


class VoxelTransformer(nn.Module):
    """(B, features, ...) → the same: every voxel is a token, and all of them attend to one another."""

    def __init__(self, features: int, dimensions: int, network: NetworkPlan, plan: TransformerPlan) -> None:
        super().__init__()
        one = (1,) * dimensions
        self.embed = convolution(features, plan.width, one, one, bias=True)
        self.layers = nn.ModuleList(TransformerLayer(plan) for _ in range(plan.layers))
        self.norm = nn.LayerNorm(plan.width)
        self.back = conv_stage((plan.width, features), network.kernels[-1], network.norm)

    def forward(self, x: Tensor) -> Tensor:
        """Features that have seen the whole patch."""
        x = self.embed(x)
        size, width = x.shape[2:], x.shape[1]
        tokens = x.flatten(2).transpose(1, 2) + positions(size, width, x.device).to(x.dtype)
        for layer in self.layers:
            tokens = layer(tokens)
        grid = self.norm(tokens).transpose(1, 2).reshape(len(x), width, *size)
        result: Tensor = self.back(grid)
        return result


def positions(size: Sequence[int], width: int, device: torch.device) -> Tensor:
    """(1, voxels, width) float32: of each axis sines and cosines of its index, 0 in the features left over."""
    each = width // (2 * len(size))
    wavelengths = torch.exp(torch.arange(each, device=device) * (-math.log(LONGEST) / max(each, 1)))
    code = torch.zeros((*size, width), device=device)
    for axis, n in enumerate(size):
        angles = torch.arange(n, device=device)[:, None] * wavelengths
        waves = torch.cat((angles.sin(), angles.cos()), 1)
        first = axis * 2 * each
        code[..., first : first + 2 * each] = waves.view(*[n if a == axis else 1 for a in range(len(size))], -1)
    return code.view(1, -1, width)


def transunet(plan: NetworkPlan, channels: int, outputs: int) -> SkipUNet:
    """The plan's residual encoder, a transformer on its last stage, and a decoder that rises linearly."""
    assert plan.transformer is not None  # NetworkPlan
    encoder = residual_encoder(plan, channels)
    last, dimensions = plan.features[-1], len(plan.strides[0])
    encoder[-1] = nn.Sequential(encoder[-1], VoxelTransformer(last, dimensions, plan, plan.transformer))
    network = SkipUNet(plan, encoder, Widths(*[plan.features] * 3), outputs)
    silence_blocks(network)
    return network
