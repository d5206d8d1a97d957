"""Summary: the layers of a network for one patch, without any arithmetic on voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medseg.networks.build import build_network
from medseg.records.network import NetworkPlan

COUNTED = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One convolution or linear layer: its name, kind, kernel and stride, output (C, ...) and weights."""

    name: str
    kind: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    output: tuple[int, ...]
    parameters: int


@dataclass(frozen=True, slots=True)
class Summary:
    """A network for one sample: layers as they run, logits per level, weights, operations of a pass forward.

    ``kept_values`` are the outputs of all layers and norms: what a training step keeps, about.
    """

    layers: tuple[LayerRow, ...]
    outputs: tuple[tuple[int, ...], ...]
    parameters: int
    flop: int
    kept_values: int


def summarise(plan: NetworkPlan, patch: Sequence[int], channels: int, outputs: int) -> Summary:
    """Run a network on shapes alone (torch's meta device).

    Raises:
        UsageError: E0001 the network is MONAI's, and MONAI is not installed.
    """
    network = build_network(plan.model_copy(update={"checkpointing": False}), channels, outputs).to("meta").train()
    rows: list[LayerRow] = []
    kept = 0
    names = {module: name for name, module in network.named_modules()}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal kept
        if not isinstance(output, Tensor):
            return
        if not any(True for _ in module.children()) and any(True for _ in module.parameters()):
            kept += output.numel()
        if isinstance(module, COUNTED):
            rows.append(_row(names[module], module, output))

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        levels = network(torch.empty((1, channels, *patch), device="meta"))
    for hook in hooks:
        hook.remove()
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    shapes = tuple(tuple(level.shape[1:]) for level in levels)
    return Summary(tuple(rows), shapes, parameters, counter.get_total_flops(), kept)


def _row(name: str, module: nn.Module, output: Tensor) -> LayerRow:
    weights = sum(p.numel() for p in module.parameters())
    if isinstance(module, nn.Linear):
        return LayerRow(name, "linear", (), (), tuple(output.shape[1:]), weights)
    assert isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    kind = "up" if module.transposed else "convolution"
    return LayerRow(name, kind, tuple(module.kernel_size), tuple(module.stride), tuple(output.shape[1:]), weights)
