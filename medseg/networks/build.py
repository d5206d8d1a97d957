"""Build: plan → network, with seeded weights. The one place that lists the networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from medseg.networks.residual import residual_encoder, silence_blocks
from medseg.networks.unet import UNet, plain_encoder
from medseg.records.plan import NetworkPlan


def plain_unet(plan: NetworkPlan, channels: int, outputs: int) -> UNet:
    """Convolutions alone in encoder and decoder."""
    return UNet(plan, plain_encoder(plan, channels), outputs)


def residual_unet(plan: NetworkPlan, channels: int, outputs: int) -> UNet:
    """Residual blocks in the encoder, convolutions alone in the decoder."""
    network = UNet(plan, residual_encoder(plan, channels), outputs)
    silence_blocks(network)
    return network


NETWORKS: dict[str, Callable[[NetworkPlan, int, int], UNet]] = {"plain": plain_unet, "residual": residual_unet}


def build_network(plan: NetworkPlan, channels: int, outputs: int, seed: int = 0) -> nn.Module:
    """The network of ``plan`` for ``channels`` inputs and ``outputs`` logits; equal seeds give equal weights.

    It maps (B, channels, [Z,] Y, X) to a list of logits, finest level first.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[plan.name](plan, channels, outputs)


def parameter_count(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
