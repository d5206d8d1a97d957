"""Int8: what the convolutions of a network get is measured once, then they compute in 8 bits.

Inputs of a convolution get 256 steps of one width, which oneDNN's kernels want. So that a channel of small values is
not lost beside one of large ones, channels are first brought to one range, and the weights to the inverse (Nagel et
al. 2019, arXiv 1906.04721, without their assumption on the activation: here the ranges are measured). Weights get 255
steps for each output channel. Sums are exact, norms and all else stay in the precision around.

First convolutions, which see the image itself, and those of one voxel, which make logits, keep their precision: they
cost little, and what they lose is not averaged away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.records.int8 import LayerRange

LEAST_CHANNELS = 8  # of the input
HEADROOM = 1.3  # for images that were not measured
STEPS = 255  # between the lowest and the highest value
WEIGHT_STEPS = 254  # as many on both sides of 0


@contextmanager
def watched(network: nn.Module) -> Iterator[dict[str, LayerRange]]:
    """Measure while the block runs; the ranges are there when it ends, of the convolutions that were computed."""
    extents: dict[str, tuple[Tensor, Tensor]] = {}
    ranges: dict[str, LayerRange] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            axes = (0, *range(2, x.ndim))
            low, high = x.amin(axes).float(), x.amax(axes).float()
            if name in extents:
                low, high = torch.minimum(low, extents[name][0]), torch.maximum(high, extents[name][1])
            extents[name] = low, high

        return module.register_forward_pre_hook(look)

    handles = [watch(name, module) for name, module in network.named_modules() if _quantisable(module)]
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()
    for name, (low, high) in extents.items():
        ranges[name] = LayerRange(low=tuple(low.tolist()), high=tuple(high.tolist()))


def _quantisable(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d | nn.Conv3d) or module.groups != 1:
        return False
    return module.in_channels >= LEAST_CHANNELS and any(size > 1 for size in module.kernel_size)


def steps_of(low: NDArray[np.floating], high: NDArray[np.floating]) -> tuple[int, NDArray[np.float32]]:
    """The step that stands for 0, of 0 to 255, and the width of a step in each channel, so that all values fit.

    The place of 0 is the same in all channels; it is where the squared widths, in shares of each channel's range, have
    the lowest mean.

    Args:
        low: lowest value of each channel, (C,).
        high: highest value of each channel, (C,).
    """
    low, high = np.minimum(low, 0.0) * HEADROOM, np.maximum(high, 0.0) * HEADROOM
    width = np.maximum(high - low, 1e-6 * max(1.0, float((high - low).max())))  # channels of zeros
    zeros = np.arange(1, STEPS)[:, None]
    widths = np.maximum(np.maximum(-low / zeros, high / (STEPS - zeros)), width / (4 * STEPS))
    best = int(np.argmin(np.mean((widths / width) ** 2, 1)))
    return int(zeros[best, 0]), widths[best].astype(np.float32)


def quantise(openvino: Any, graph: Any, network: nn.Module, ranges: Mapping[str, LayerRange]) -> int:
    """Let the convolutions of an OpenVINO graph compute in 8 bits; how many there are.

    Args:
        openvino: the package.
        graph: of ``network``, to be changed.
        network: the graph's convolutions are known by their weights.
        ranges: by the names of ``network``; convolutions without one stay as they are.

    Raises:
        ValueError: a range has another number of channels than its convolution.
    """
    ops = openvino.opset13
    known = {_bytes(module.weight): name for name, module in network.named_modules() if _quantisable(module)}
    found = 0
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Convolution":
            continue
        x, weight = (port.get_source_output() for port in node.inputs())
        values = _constant(weight.get_node())
        name = None if values is None else known.get(np.ascontiguousarray(values, np.float32).tobytes())
        if values is None or name is None or name not in ranges:
            continue
        low, high = (np.array(side) for side in (ranges[name].low, ranges[name].high))
        if len(low) != values.shape[1]:
            raise ValueError(f"{name}: a range of {len(low)} channels for {values.shape[1]}")
        zero, steps = steps_of(low, high)
        common = steps.mean(dtype=np.float32)
        each = [1, -1] + [1] * (values.ndim - 2)
        inside = [ops.constant((steps * end).reshape(each).astype(np.float32)) for end in (-zero, STEPS - zero)]
        outside = [ops.constant(np.float32(common * end)) for end in (-zero, STEPS - zero)]
        node.input(0).replace_source_output(ops.fake_quantize(x, *inside, *outside, STEPS + 1).output(0))
        scaled = values.astype(np.float32) * (steps / common).reshape(each)
        largest = np.abs(scaled).max(axis=tuple(range(1, values.ndim)), keepdims=True)
        most = ops.constant(np.maximum(largest, np.float32(1e-30)))
        least = ops.constant(-np.maximum(largest, np.float32(1e-30)))
        in_steps = ops.fake_quantize(ops.constant(scaled), least, most, least, most, WEIGHT_STEPS + 1)
        node.input(1).replace_source_output(in_steps.output(0))
        found += 1
    graph.validate_nodes_and_infer_types()
    return found


def _bytes(weight: Tensor) -> bytes:
    return weight.detach().float().cpu().contiguous().numpy().tobytes()


def _constant(node: Any) -> NDArray[Any] | None:
    """The values of a constant, or of what is made of one by changing its type; None of anything else."""
    while node.get_type_name() == "Convert":
        node = node.input(0).get_source_output().get_node()
    return node.data if node.get_type_name() == "Constant" else None
