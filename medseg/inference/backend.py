"""Backend: what computes a model's networks, and why: torch, or what a test finds right and faster on the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from medseg.artefacts import sha256_of_json
from medseg.errors import Problem, UsageError, first_line
from medseg.inference.engines import GraphNetwork, in_half
from medseg.inference.passes import PLAIN, Passes
from medseg.inference.with_openvino import OpenVinoNetwork, exact_in_int8, half_precision, installed
from medseg.networks.device import Device
from medseg.records.int8 import Int8Ranges

log = logging.getLogger(__name__)

BackendName = Literal["auto", "torch", "openvino", "int8", "graphs"]
KIND = {"openvino": "cpu", "int8": "cpu", "graphs": "cuda"}  # of device that a backend is for

RACE_GROUPS = 5  # what a test takes beside loading and converting: groups of tiles that are computed for it
TEST_SHARE = 0.1  # of the work at most: it gains little where both are nearly as fast
LEAST_PASSES = 6  # fewer than this do not even pay for the tile of torch that tells how much work there is
FASTER = 1.1
LITTLE = "too little work to look for a faster one"
CLEARLY_FASTER = 1.5  # at the first go, when nothing is warm yet
TRIES, TRIES_S = 5, 3.0
# How far a rival's logits may lie from torch's, in shares of their norm: two results in bfloat16 differ by 0.01 to
# 0.05 (plain, residual, attention, 4 to 6 stages), two in float32 by 1e-6 to 1e-5; and how many voxels must agree.
TOLERANCE = {True: 0.1, False: 1e-4}
AGREEMENT = {True: 0.9, False: 0.999}


@dataclass(frozen=True, slots=True, eq=False)
class Backend:
    """The name, why it was chosen, and what stands for the networks that it computes; others stay with torch.

    ``tested`` says that OpenVINO was loaded, which takes memory for good. ``labels`` is a hash of what makes its labels
    others than torch's, beyond rounding; "" where nothing does.
    """

    name: str
    reason: str
    engines: Mapping[tuple[object, ...], nn.Module] = field(default_factory=dict)
    tested: bool = False
    labels: str = ""

    def engine(self, network: nn.Module) -> nn.Module:
        """What computes ``network`` in evaluation mode; the network itself where nothing else does."""
        return self.engines.get(_identity(network), network)

    @property
    def weight_bytes(self) -> int:
        """Memory that the engines hold beside the networks' own: the weights once more, in float32 at most."""
        return sum(parameter.nbytes for engine in self.engines.values() for parameter in engine.parameters())


TORCH = Backend("torch", "the default")


@dataclass(frozen=True, slots=True)
class _Rival:
    """What may be faster than torch on one kind of device, and the seconds that loading and converting take (networks
    that torch must export take 3 s more).

    ``build`` gets a network, the shape of one input and the device; any exception of its means that it cannot.
    """

    name: BackendName
    title: str
    load_s: float
    build: Callable[[nn.Module, tuple[int, ...], Device], nn.Module]


def _with_openvino(network: nn.Module, shape: tuple[int, ...], device: Device) -> nn.Module:
    return OpenVinoNetwork(network, shape, half=device.half and half_precision())


def _with_graphs(network: nn.Module, _: tuple[int, ...], device: Device) -> nn.Module:
    return GraphNetwork(_plain(network, device), device)


RIVALS = {
    "cpu": _Rival("openvino", "OpenVINO", 0.5, _with_openvino),
    "cuda": _Rival("graphs", "CUDA graphs", 0.5, _with_graphs),
}


def choose_backend(
    name: BackendName,
    networks: Sequence[nn.Module],
    shape: tuple[int, ...],
    device: Device,
    passes: int,
    group: int = 1,
    ranges: Sequence[Int8Ranges] = (),
) -> Backend:
    """The backend asked for, or the faster one where it is left open.

    OpenVINO, or on a GPU CUDA graphs, are compared with torch on a group of tiles of noise, by the first network.
    Whatever fails on the way leaves torch, with a line in the log. In half precision torch computes with copies whose
    weights are rounded once.

    Args:
        name: "openvino" and "graphs" are taken wherever their result is right, "auto" where it is faster too; "int8"
            wherever it can compute the networks.
        networks: as tiles go through them, in evaluation mode on ``device``.
        shape: (C, *tile) of their input.
        device: where they are; OpenVINO is for the CPU. In float32 it computes in float32.
        passes: how many tiles and views will go through each network.
        group: how many of them at once.
        ranges: of each network, for "int8".

    Raises:
        UsageError: E0001 OpenVINO is asked for, and not installed; or what is asked for is not for this device.
    """
    kind = device.torch_device.type
    rival = RIVALS[kind]
    check_backend(name, device)
    if name == "torch":
        return _torch(networks, device, "asked for")
    if name == "int8":
        return _int8(networks, shape, device, ranges)
    if kind == "cpu" and not installed():
        return _torch(networks, device, 'pip install "medseg[openvino]" may be faster')
    if passes < (LEAST_PASSES if name == "auto" else 1):
        return _torch(networks, device, LITTLE)
    tested = kind == "cpu"
    try:
        race = _Race(_plain(networks[0], device), (group, *shape), device, rival.title)
        if name == "auto" and rival.load_s + RACE_GROUPS * race.torch_s > TEST_SHARE * race.torch_s * passes / group:
            return _torch(networks, device, LITTLE)
        engine = rival.build(networks[0], shape, device)
        refused, reason = race.judge(engine, asked=name != "auto")
        if refused:
            return _torch(networks, device, reason, tested=tested)
        engines = [engine, *(rival.build(network, shape, device) for network in networks[1:])]
    except Exception as error:  # of torch's exporter or of OpenVINO: any
        log.warning("%s cannot compute this network, going on with torch: %s", rival.title, first_line(error))
        return _torch(networks, device, f"{rival.title} failed", tested=tested)
    return Backend(rival.name, reason, _by_identity(networks, engines), tested)


def check_backend(name: BackendName, device: Device) -> None:
    """Refuse a backend that is not for this kind of device or this processor, or not installed.

    Raises:
        UsageError: E0001.
    """
    kind = device.torch_device.type
    own = KIND.get(name, kind)
    if own != kind:
        measured = f"--backend {name}: it is for {'the CPU' if own == 'cpu' else 'a GPU'}"
        raise UsageError(Problem("E0001", measured, "", f"use --device {own}"))
    if name in KIND and own == "cpu" and not installed():
        measured, action = f"--backend {name}: OpenVINO is not installed", 'pip install "medseg[openvino]"'
        raise UsageError(Problem("E0001", measured, "", action))
    if name == "int8" and not exact_in_int8():
        measured = "--backend int8: this processor has no VNNI, without which sums of bytes overflow"
        raise UsageError(Problem("E0001", measured, "", "use --backend auto"))


def _int8(
    networks: Sequence[nn.Module], shape: tuple[int, ...], device: Device, ranges: Sequence[Int8Ranges]
) -> Backend:
    """OpenVINO in 8 bits, which is not tested on noise, as that is no image: ``medseg quantise`` compared labels."""
    half = device.half and half_precision()
    try:
        engines = [
            OpenVinoNetwork(network, shape, half=half, ranges=one.layers)
            for network, one in zip(networks, ranges, strict=True)
        ]
    except Exception as error:  # of torch's exporter or of OpenVINO: any
        log.warning("OpenVINO cannot compute this network in int8, going on with torch: %s", first_line(error))
        return _torch(networks, device, "int8 failed", tested=True)
    labels = sha256_of_json([one.to_json() for one in ranges])
    cases = len(set().union(*(one.cases for one in ranges)))
    reason = f"asked for; ranges measured on {cases} case{'s' * (cases > 1)}"
    return Backend("int8", reason, _by_identity(networks, engines), tested=True, labels=labels)


def _torch(networks: Sequence[nn.Module], device: Device, reason: str, *, tested: bool = False) -> Backend:
    """Torch, in half precision by copies."""
    copies = [_plain(network, device) for network in networks] if device.half else []
    return Backend("torch", reason, _by_identity(networks[: len(copies)], copies), tested)


def _plain(network: nn.Module, device: Device) -> nn.Module:
    """As torch computes it."""
    return in_half(network, device.dtype) if device.half else network


def _by_identity(networks: Sequence[nn.Module], engines: Sequence[nn.Module]) -> dict[tuple[object, ...], nn.Module]:
    return {_identity(network): engine for network, engine in zip(networks, engines, strict=True)}


class _Race:
    """Torch's result for tiles of noise and its time, which an engine is held against."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...], device: Device, title: str) -> None:
        self.network, self.device, self.title = network, device, title
        self.tiles = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if device.torch_device.type == "cuda":
            self._timed(network)  # cuDNN chooses its kernels
        self.expected, self.torch_s = self._timed(network)

    def judge(self, engine: nn.Module, *, asked: bool) -> tuple[bool, str]:
        """Whether the engine is refused, and why or why not."""
        found, engine_s = self._timed(engine)
        error = float((found - self.expected).norm() / self.expected.norm())
        agreed = float((found.argmax(1) == self.expected.argmax(1)).float().mean())
        half = self.device.half
        if not (error <= TOLERANCE[half] and agreed >= AGREEMENT[half]):  # NaN is refused
            return True, f"the result of {self.title} differs by {error:.1g}, {agreed:.2%} of voxels agree"
        if asked:
            return False, f"asked for; its result differs from torch's by {error:.1g}"
        torch_s, tries = self.torch_s, 0
        begin = time.perf_counter()
        while engine_s * CLEARLY_FASTER > torch_s and tries < TRIES and time.perf_counter() - begin < TRIES_S:
            torch_s = min(torch_s, self._timed(self.network)[1])
            engine_s = min(engine_s, self._timed(engine)[1])
            tries += 1
        words = f"{torch_s / engine_s:.1f} times as fast as torch on a tile, result differs by {error:.1g}"
        return engine_s * FASTER > torch_s, f"{self.title}: {words}"

    @torch.inference_mode()
    def _timed(self, network: nn.Module) -> tuple[Tensor, float]:
        passes = Passes([network], self.device, PLAIN, self.tiles.shape[1], prod(self.tiles.shape[2:]))
        begin = time.perf_counter()
        found = passes(self.tiles).cpu()
        return found, time.perf_counter() - begin


def _identity(network: nn.Module) -> tuple[object, ...]:
    """Equal for modules of one kind that compute with the same weights: a network with and without head differ."""
    return (type(network), *(id(parameter) for parameter in network.parameters()))
