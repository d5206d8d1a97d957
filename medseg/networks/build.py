"""Build: plan → network, with seeded weights. The one place that lists the networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from medseg.networks.checkpointing import checkpoint_stages
from medseg.networks.from_monai import mednext, segresnet, swinunetr, unetr
from medseg.networks.nested_unet import NestedUNet
from medseg.networks.residual import residual_encoder, silence_blocks
from medseg.networks.resnet import resnet_unet
from medseg.networks.skip_unet import attention_unet, unet2015
from medseg.networks.transformer import transunet
from medseg.networks.unet import UNet, plain_encoder
from medseg.records.network import NetworkPlan


class Network(Protocol):
    """What every network gives: logits per level, finest first, and the modules that checkpointing repeats."""

    def __call__(self, x: Tensor) -> list[Tensor]:
        """(B, channels, [Z,] Y, X) → logits, one level in evaluation mode."""

    def stages(self) -> list[nn.Module]:
        """Modules that do not overlap."""


def plain_unet(plan: NetworkPlan, channels: int, outputs: int) -> UNet:
    """Convolutions alone in encoder and decoder."""
    return UNet(plan, plain_encoder(plan, channels), outputs)


def residual_unet(plan: NetworkPlan, channels: int, outputs: int) -> UNet:
    """Residual blocks in the encoder, convolutions alone in the decoder."""
    network = UNet(plan, residual_encoder(plan, channels), outputs)
    silence_blocks(network)
    return network


NETWORKS: dict[str, Callable[[NetworkPlan, int, int], nn.Module]] = {
    "plain": plain_unet,
    "residual": residual_unet,
    "unet2015": unet2015,
    "attention": attention_unet,
    "unetpp": NestedUNet,
    "resnet-unet": resnet_unet,
    "transunet": transunet,
    "swinunetr": swinunetr,
    "unetr": unetr,
    "segresnet": segresnet,
    "mednext": mednext,
}


def build_network(plan: NetworkPlan, channels: int, outputs: int, seed: int = 0) -> nn.Module:
    """The network of ``plan`` for ``channels`` inputs and ``outputs`` logits; equal seeds give equal weights.

    It maps (B, channels, [Z,] Y, X) to a list of logits, finest level first.

    Raises:
        UsageError: E0001 the network is MONAI's, and MONAI is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[plan.name](plan, channels, outputs)
    if plan.checkpointing:
        checkpoint_stages(network.stages())  # type: ignore[operator]
    return network


def parameter_count(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
