"""Build: plan → network, with seeded weights. The one place that lists the networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from medseg.networks.unet import PlainUNet
from medseg.records.plan import NetworkPlan

NETWORKS: dict[str, Callable[[NetworkPlan, int, int], nn.Module]] = {"plain": PlainUNet}


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
