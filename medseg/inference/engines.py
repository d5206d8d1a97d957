"""Engines: what stands for a network while tiles go through it — a copy in half precision, or one a GPU replays."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medseg.errors import first_line
from medseg.networks.device import Device

log = logging.getLogger(__name__)

SIZES_KEPT = 8  # sizes of input that a graph is kept for: groups of tiles are powers of two
WARM = 3  # runs before a capture: cuDNN chooses its kernels, libraries take their workspaces

CASTED = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear


class Finest(nn.Module):
    """The finest logits of a network alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) → (B, outputs, ...)."""
        found: Tensor = self.network(x)[0]
        return found


def in_half(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose convolutions hold ``dtype``: what autocast makes of them in every pass is made once."""
    halved = copy.deepcopy(network)
    for module in halved.modules():
        if isinstance(module, CASTED):
            module.to(dtype)
    return halved


class GraphNetwork(nn.Module):
    """A network on a GPU whose launches are recorded once for each size of input, and replayed as a CUDA graph.

    Where recording fails, and for more sizes than ``SIZES_KEPT``, its launches are issued one by one as ever.
    """

    def __init__(self, network: nn.Module, device: Device) -> None:
        super().__init__()
        self.network, self._finest, self.device = network, Finest(network), device
        self._recorded: dict[tuple[int, ...], Recorded] = {}
        self._pool: Any = None
        self._failed = False

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, ...) → [logits (B, outputs, ...)] float32."""
        key = tuple(x.shape)
        if key not in self._recorded and not self._failed and len(self._recorded) < SIZES_KEPT:
            try:
                self._recorded[key] = record(self._finest, x, self.device, self._pool)
                self._pool = self._recorded[key].pool
            except RuntimeError as error:  # too little memory among them
                log.warning("CUDA graphs are not used: %s", first_line(error))
                self._failed = True
                self._recorded.clear()
        if key not in self._recorded:
            return [self._finest(x).float()]
        recorded = self._recorded[key]
        recorded.given.copy_(x)
        recorded.replay()
        return [recorded.found.clone()]


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """A graph: ``replay`` computes ``found`` from what is in ``given``. ``pool`` is its memory, for more of them."""

    given: Tensor
    found: Tensor
    replay: Callable[[], None]
    pool: Any


def record(network: nn.Module, x: Tensor, device: Device, pool: Any) -> Recorded:
    """Capture the launches of a network for inputs like ``x``.

    Raises:
        RuntimeError: of torch; something waits for the GPU meanwhile, or there is too little memory.
    """
    given = torch.empty_like(x).copy_(x)
    graph = torch.cuda.CUDAGraph()
    beside = torch.cuda.Stream(device.torch_device)

    def run() -> Tensor:
        with torch.autocast("cuda", device.dtype, enabled=device.half, cache_enabled=False):
            return network(given).float()  # type: ignore[no-any-return]

    beside.wait_stream(torch.cuda.current_stream(device.torch_device))
    with torch.cuda.stream(beside):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream(device.torch_device).wait_stream(beside)
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads read and write
        found = run()
    return Recorded(given, found, graph.replay, graph.pool())
