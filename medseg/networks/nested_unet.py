"""Nested U-Net: U-Net++, whose skips pass through convolutions of their own (Zhou et al. 2018, arXiv 1807.10165)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medseg.networks.blocks import conv_stage, fit, he_initialise, strided_encoder, up_step
from medseg.networks.unet import convolution
from medseg.records.network import NetworkPlan, ways_up


class NestedUNet(nn.Module):
    """(B, C, [Z,] Y, X) of any size → full-size logits of every depth, deepest first; one of them unless supervised.

    Node (i, j) is on stage i and sees nodes (i, 0) to (i, j - 1) and the risen (i + 1, j - 1); column 0 is the encoder.
    Node (0, j) is the output of a U-Net of depth j, which has a head: the network can be cut there (``prune``).
    """

    def __init__(self, plan: NetworkPlan, channels: int, outputs: int) -> None:
        super().__init__()
        features, last, one = plan.features, len(plan.features) - 1, (1,) * len(plan.strides[0])
        self.encoder = strided_encoder(plan, channels)
        self.up, self.nodes, self.heads = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleList()
        kinds, convs = ways_up(plan)[::-1], plan.convs_decoder[::-1]
        for column in range(1, last + 1):
            for stage in range(last - column + 1):
                here, below, name = features[stage], features[stage + 1], f"{stage}_{column}"
                self.up[name] = up_step(kinds[stage], below, here, plan.strides[stage + 1])
                risen = here if kinds[stage] == "transposed" else below
                widths = (column * here + risen, *[here] * convs[stage])
                self.nodes[name] = conv_stage(widths, plan.kernels[stage], plan.norm)
            self.heads.append(convolution(features[0], outputs, one, one, bias=True))
        if not last:  # a single stage: the head stands on the encoder
            self.heads.append(convolution(features[0], outputs, one, one, bias=True))
        self.supervised, self.depth = plan.deep_supervision, last
        self.apply(he_initialise)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits (B, outputs, ...) at the input's size: of all depths, deepest first, or of the chosen one alone."""
        columns: list[list[Tensor]] = []  # per stage the nodes so far
        for module in self.encoder[: self.depth + 1]:
            x = module(x)
            columns.append([x])
        for column in range(1, self.depth + 1):
            for stage in range(self.depth - column + 1):
                name, skips = f"{stage}_{column}", columns[stage]
                risen = fit(self.up[name](columns[stage + 1][column - 1]), skips[0].shape[2:])
                skips.append(self.nodes[name](torch.cat((*skips, risen), 1)))
        depths = range(self.depth, 0, -1) if self.supervised and self.training else (self.depth,)
        return [self.heads[depth - 1](columns[0][depth]) for depth in depths]

    def prune(self, depth: int) -> None:
        """Compute the U-Net of ``depth`` steps alone from now on: faster, and as good where deep features add little.

        Raises:
            ValueError: the network has no such depth, or was trained without supervision of its heads.
        """
        deepest = len(self.heads)
        if not 1 <= depth <= deepest or (depth < deepest and not self.supervised):
            raise ValueError(f"cannot cut at depth {depth}: supervised depths are 1 to {deepest}")
        self.depth = depth

    def stages(self) -> list[nn.Module]:
        """What gradient checkpointing computes again."""
        return [*self.encoder, *self.nodes.values()]
