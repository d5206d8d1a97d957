"""Passes: one group of tiles through all networks and all mirrored views, summed in float32.

What comes out is the mean of the logits, or, where that is fewer channels, the mean features in front of each
network's last layer: that layer is linear in them, so it can wait until tiles are blended.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import TypeVar

import torch
from torch import Tensor, nn

from medseg.networks.device import Device, place_batch
from medseg.networks.unet import UNet
from medseg.records.training import Swap

Item = TypeVar("Item")

# Of the tiles and views that go through a network at once. Small ones keep a GPU busy only in groups; the largest of
# nnU-Net's plans, 128³, go alone.
VOXELS_TOGETHER = {"cpu": 2**17, "cuda": 2**21}


def voxels_together(device: Device) -> int:
    """At most so many voxels go through a network at once, but for a tile that has more."""
    return VOXELS_TOGETHER[device.torch_device.type]


@dataclass(frozen=True, slots=True)
class Mirroring:
    """The axes of the tile (2D: y, x) to flip in all combinations, () for none, and what that does to labels."""

    axes: tuple[int, ...] = ()
    swap: Swap | None = None

    @property
    def views(self) -> list[tuple[int, ...]]:
        """The axes to flip of every view, the plain one first."""
        return list(chain.from_iterable(combinations(self.axes, n) for n in range(len(self.axes) + 1)))


PLAIN = Mirroring()


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The last layers of all networks as one: (outputs, features of all networks) and the mean bias, float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(features, ...) → (outputs, ...)."""
        logits = self.weight.to(features.device) @ features.flatten(1)
        return logits.add_(self.bias.to(features.device)[:, None]).view(-1, *features.shape[1:])


def split_heads(networks: Sequence[nn.Module], mirroring: Mirroring) -> tuple[list[nn.Module], Head] | None:
    """The networks up to their features, and their heads; None where there is no such head or it saves nothing.

    Where mirroring exchanges left and right, outputs of the views are put in another order: no common head.
    """
    if mirroring.swap is not None or not all(type(network) is UNet for network in networks):
        return None
    heads = [network.heads[-1] for network in networks if isinstance(network, UNet)]
    convolutions = [head for head in heads if isinstance(head, nn.Conv2d | nn.Conv3d)]
    if len(convolutions) < len(networks) or any(head.bias is None for head in convolutions):
        return None
    outputs, features = convolutions[0].out_channels, sum(head.in_channels for head in convolutions)
    if features >= outputs or any(set(head.kernel_size) != {1} for head in convolutions):
        return None
    weight = torch.cat([head.weight.detach().float().flatten(1) for head in convolutions], 1) / len(networks)
    bias = torch.stack([head.bias.detach().float() for head in convolutions if head.bias is not None]).mean(0)
    return [_without_head(network) for network in networks], Head(weight, bias)


def _without_head(network: nn.Module) -> nn.Module:
    """The same network, sharing its weights, that gives the features of its finest level."""
    body = copy.copy(network)
    body._modules = dict(network._modules)
    heads = network.heads
    assert isinstance(heads, nn.ModuleList)
    body.heads = nn.ModuleList([*heads[:-1], nn.Identity()])
    return body


@dataclass(frozen=True, slots=True, eq=False)
class Passes:
    """How tiles go through the networks.

    Args of the call: (B, C, [Z,] Y, X) of which the first ``images`` channels are intensities, the others labels of the
    stage before. At most ``voxels`` go through a network at once, views of a tile together where they fit. With
    ``separate`` the channels of the networks stand one after the other, else they are averaged. With ``disagreement``
    one more channel tells how far the networks' probabilities lie apart.
    """

    networks: Sequence[nn.Module]
    device: Device
    mirroring: Mirroring
    images: int
    voxels: int
    separate: bool = False
    disagreement: bool = False
    regions: bool = False

    def __call__(self, batch: Tensor) -> Tensor:
        """(B, channels, ...) float32 on the device."""
        plain = place_batch(batch, self.device)
        with torch.autocast(self.device.torch_device.type, self.device.dtype, enabled=self.device.half):
            means = [self._mean_of_views(network, plain) for network in self.networks]
        if self.separate:
            return torch.cat(means, 1) if len(means) > 1 else means[0]
        if self.disagreement:
            apart = disagreement(means, self.regions)
        total = means[0]
        for other in means[1:]:
            total += other
        if len(means) > 1:
            total /= len(means)
        return torch.cat((total, apart), 1) if self.disagreement else total

    def _mean_of_views(self, network: nn.Module, plain: Tensor) -> Tensor:
        """The mean over the views, in float32."""
        views = self.mirroring.views
        together = max(1, self.voxels // (len(plain) * plain[0, 0].numel()))
        total: Tensor | None = None
        for group in groups(views, together):
            seen = network(torch.cat([self._shown(plain, view) for view in group]))[0].float()
            for view, part in zip(group, seen.split(len(plain)), strict=True):
                back = self._turned_back(part, view)
                total = (back.clone() if len(group) > 1 else back) if total is None else total.add_(back)
        assert total is not None
        return total.div_(len(views)) if len(views) > 1 else total

    def _shown(self, plain: Tensor, view: tuple[int, ...]) -> Tensor:
        swap = self.mirroring.swap
        if swap is not None and swap.axis in view and plain.shape[1] > self.images:
            plain = plain[:, swapped_channels(swap, self.images)]
        return plain.flip([axis + 2 for axis in view]) if view else plain

    def _turned_back(self, seen: Tensor, view: tuple[int, ...]) -> Tensor:
        swap = self.mirroring.swap
        seen = seen.flip([axis + 2 for axis in view]) if view else seen
        if swap is None or swap.axis not in view:
            return seen
        more = range(len(swap.outputs), seen.shape[1])  # attention
        return seen[:, [*swap.outputs, *more]]


def swapped_channels(swap: Swap, images: int) -> list[int]:
    """The input's channels with left and right exchanged in the labels of the stage before."""
    return [*range(images), *(images + index - 1 for index in swap.classes[1:])]


def disagreement(logits: Sequence[Tensor], regions: bool) -> Tensor:
    """(B, 1, ...) Jensen-Shannon divergence between the networks' probabilities, in shares of its largest value.

    0 where all say the same, 1 where each is certain of something else (Lin 1991). Of regions, the mean over regions.
    """
    probabilities = [torch.sigmoid(one) if regions else torch.softmax(one, 1) for one in logits]
    mean = torch.stack(probabilities).mean(0)
    apart = entropy(mean, regions) - torch.stack([entropy(one, regions) for one in probabilities]).mean(0)
    largest = torch.tensor(float(min(len(logits), 2 if regions else mean.shape[1]))).log()
    return (apart / largest.to(apart.device)).clamp_(0, 1).unsqueeze(1)


def entropy(probabilities: Tensor, regions: bool) -> Tensor:
    """(B, outputs, ...) → (B, ...) entropy in nats; of regions, the mean of what each region's two outcomes have."""
    parts = -torch.xlogy(probabilities, probabilities)
    if not regions:
        return parts.sum(1)
    return (parts - torch.xlogy(1 - probabilities, 1 - probabilities)).mean(1)


def power_of_two(most: int) -> int:
    """The largest that is not above ``most``, a positive number."""
    return 1 << (most.bit_length() - 1)


def groups(items: Sequence[Item], most: int) -> Iterator[Sequence[Item]]:
    """Tiles, or views, that go together, in their order, at most so many of them.

    All groups are powers of two: so few sizes occur, for each of which a GPU chooses kernels, and records a graph.
    """
    first = 0
    while first < len(items):
        size = power_of_two(min(most, len(items) - first))
        yield items[first : first + size]
        first += size
