"""Backend: what computes a model's networks — torch, or OpenVINO where a test finds it right and faster — and why."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from medseg.errors import Problem, UsageError
from medseg.inference.passes import PLAIN, Passes
from medseg.inference.with_openvino import OpenVinoNetwork, first_line, half_precision, installed
from medseg.networks.device import Device

log = logging.getLogger(__name__)

BackendName = Literal["auto", "torch", "openvino"]

LOAD_S, RACE_TILES = 2.0, 5  # what a test takes: loading and converting, and tiles that are computed for it
TEST_SHARE = 0.1  # of the work at most: it gains little where both are nearly as fast
LEAST_PASSES = 6  # fewer than this do not even pay for the tile of torch that tells how much work there is
FASTER = 1.1
LITTLE = "too little work to look for a faster one"
CLEARLY_FASTER = 1.5  # at the first go, when nothing is warm yet
TRIES, TRIES_S = 5, 3.0
# How far OpenVINO's logits may lie from torch's, in shares of their norm: two results in bfloat16 differ by 0.01 to
# 0.05 (plain, residual, attention, 4 to 6 stages), two in float32 by 1e-6 to 1e-5; and how many voxels must agree.
TOLERANCE = {True: 0.1, False: 1e-4}
AGREEMENT = {True: 0.9, False: 0.999}


@dataclass(frozen=True, slots=True, eq=False)
class Backend:
    """The name, why it was chosen, and what stands for the networks that it computes; others stay with torch.

    ``tested`` says that OpenVINO was loaded, which takes memory for good.
    """

    name: str
    reason: str
    engines: Mapping[tuple[object, ...], OpenVinoNetwork] = field(default_factory=dict)
    tested: bool = False

    def engine(self, network: nn.Module) -> nn.Module:
        """What computes ``network`` in evaluation mode; the network itself where nothing else does."""
        return self.engines.get(_identity(network), network)

    @property
    def weight_bytes(self) -> int:
        """Memory that the engines hold beside the networks' own: the weights once more, in float32 at most."""
        return sum(4 * sum(p.numel() for p in engine.network.parameters()) for engine in self.engines.values())


TORCH = Backend("torch", "the default")


def choose_backend(
    name: BackendName, networks: Sequence[nn.Module], shape: tuple[int, ...], device: Device, passes: int
) -> Backend:
    """The backend asked for, or the faster one where it is left open.

    OpenVINO is compared with torch on noise in the shape of one tile, by the first network. Whatever fails on the way
    leaves torch, with a line in the log.

    Args:
        name: "openvino" is taken wherever its result is right, "auto" where it is faster too.
        networks: as tiles go through them, in evaluation mode on ``device``.
        shape: (C, *tile) of their input.
        device: where they are; OpenVINO is for the CPU. In float32 it computes in float32.
        passes: how many tiles and views will go through each network.

    Raises:
        UsageError: E0001 OpenVINO is asked for, and not installed or not for this device.
    """
    on_cpu = device.torch_device.type == "cpu"
    if name == "openvino" and not (on_cpu and installed()):
        measured = "--backend openvino: " + ("OpenVINO is not installed" if on_cpu else "it is for the CPU")
        action = 'pip install "medseg[openvino]"' if on_cpu else "use --device cpu"
        raise UsageError(Problem("E0001", measured, "", action))
    if name == "torch":
        return Backend("torch", "asked for")
    if not on_cpu:
        return Backend("torch", "on a GPU")
    if not installed():
        return Backend("torch", 'pip install "medseg[openvino]" may be faster')
    if passes < (LEAST_PASSES if name == "auto" else 1):
        return Backend("torch", LITTLE)
    race = _Race(networks[0], shape, device)
    if name == "auto" and LOAD_S + RACE_TILES * race.torch_s > TEST_SHARE * race.torch_s * passes:
        return Backend("torch", LITTLE)
    try:
        engine = OpenVinoNetwork(networks[0], shape, half=_half(device))
        refused, reason = race.judge(engine, asked=name == "openvino")
        if refused:
            return Backend("torch", reason, tested=True)
        others = [OpenVinoNetwork(network, shape, half=_half(device)) for network in networks[1:]]
    except Exception as error:  # of torch's exporter or of OpenVINO: any
        log.warning("OpenVINO cannot compute this network, going on with torch: %s", first_line(error))
        return Backend("torch", "OpenVINO failed", tested=True)
    return Backend("openvino", reason, {_identity(one.network): one for one in (engine, *others)}, tested=True)


class _Race:
    """Torch's result for one tile of noise and its time, which an engine is held against."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...], device: Device) -> None:
        self.half, self.network, self.device = device.half, network, device
        self.tile = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
        self.expected, self.torch_s = self._timed(network)

    def judge(self, engine: nn.Module, *, asked: bool) -> tuple[bool, str]:
        """Whether the engine is refused, and why or why not."""
        found, engine_s = self._timed(engine)
        error = float((found - self.expected).norm() / self.expected.norm())
        agreed = float((found.argmax(1) == self.expected.argmax(1)).float().mean())
        if not (error <= TOLERANCE[self.half] and agreed >= AGREEMENT[self.half]):  # NaN is refused
            return True, f"OpenVINO's result differs by {error:.1g}, {agreed:.2%} of voxels agree"
        if asked:
            return False, f"asked for; its result differs from torch's by {error:.1g}"
        torch_s, tries = self.torch_s, 0
        begin = time.perf_counter()
        while engine_s * CLEARLY_FASTER > torch_s and tries < TRIES and time.perf_counter() - begin < TRIES_S:
            torch_s = min(torch_s, self._timed(self.network)[1])
            engine_s = min(engine_s, self._timed(engine)[1])
            tries += 1
        words = f"{torch_s / engine_s:.1f} times as fast as torch on a tile, result differs by {error:.1g}"
        return engine_s * FASTER > torch_s, f"OpenVINO is {words}"

    @torch.inference_mode()
    def _timed(self, network: nn.Module) -> tuple[Tensor, float]:
        passes = Passes([network], self.device, PLAIN, self.tile.shape[1], prod(self.tile.shape[2:]))
        begin = time.perf_counter()
        found = passes(self.tile)
        return found, time.perf_counter() - begin


def _half(device: Device) -> bool:
    return device.half and half_precision()


def _identity(network: nn.Module) -> tuple[object, ...]:
    """Equal for modules of one kind that compute with the same weights: a network with and without head differ."""
    return (type(network), *(id(parameter) for parameter in network.parameters()))
