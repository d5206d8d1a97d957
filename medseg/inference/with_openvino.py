"""OpenVINO network: a network converted in memory for one size of input, and run on the CPU by Intel's library."""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg.errors import first_line
from medseg.inference.engines import Finest
from medseg.inference.graph import NotWrittenError, normed, write_graph
from medseg.inference.int8 import quantise
from medseg.machine import usable_cores
from medseg.records.int8 import LayerRange

log = logging.getLogger(__name__)


def installed() -> bool:
    """Whether ``medseg[openvino]`` is."""
    return importlib.util.find_spec("openvino") is not None


class OpenVinoNetwork(nn.Module):
    """(B, C, *size) → [logits (B, outputs, ...)] float32 on the CPU, as the network in evaluation mode gives them.

    They are channels-last in memory.

    Inputs of another size, and all inputs once OpenVINO has failed, go through that network. In int8, whose labels are
    others, a failure is raised.

    Args of the constructor: the network, on the CPU; ``shape`` (C, *size) of one input; ``half`` for bfloat16 inside;
    ``ranges`` of the convolutions that compute in int8.

    Raises:
        Exception: of any kind; what cannot be converted fails in torch or in OpenVINO, in many ways.
    """

    def __init__(
        self, network: nn.Module, shape: Sequence[int], *, half: bool, ranges: Mapping[str, LayerRange] | None = None
    ) -> None:
        super().__init__()
        self.network, self.shape, self._int8 = network, tuple(shape), bool(ranges)
        self._requests = [_compiled(network, self.shape, half, ranges or {}).create_infer_request()]

    def forward(self, x: Tensor) -> list[Tensor]:
        """One input after the other, each on all cores."""
        if tuple(x.shape[1:]) == self.shape and self._requests:
            try:
                found = [self._run(one) for one in x.float().split(1)]
                return [torch.cat(found) if len(found) > 1 else found[0]]
            except RuntimeError as error:
                if self._int8:
                    raise
                log.warning("OpenVINO failed, going on with torch: %s", first_line(error))
                self._requests = []
        with_torch: list[Tensor] = self.network(x)
        return with_torch

    def _run(self, one: Tensor) -> Tensor:
        (request,) = self._requests
        found = request.infer([one.contiguous().numpy()], share_inputs=True, share_outputs=False)
        return torch.from_numpy(next(iter(found.values()))).movedim(-1, 1)


def half_precision() -> bool:
    """Whether OpenVINO has bfloat16 kernels for this CPU."""
    return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def exact_in_int8() -> bool:
    """Whether the processor has VNNI, which adds products of bytes in 32 bits; older ones overflow in 16."""
    if hasattr(torch.cpu, "get_capabilities"):  # not in torch 2.10
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_vnni") or known.get("avx_vnni"))
    return bool(torch.cpu._is_vnni_supported())


def _openvino() -> Any:
    """The package, kept from telling its maker about its use: ``openvino_telemetry`` is as if not installed."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _compiled(network: nn.Module, shape: tuple[int, ...], half: bool, ranges: Mapping[str, LayerRange]) -> Any:
    """A compiled model for (1, *shape) on as many threads as torch has, at most the cores that may be used."""
    openvino = _openvino()
    graph = _graph(openvino, network, shape)
    _give_channels_last(openvino, graph)
    if ranges and not quantise(openvino, graph, network, ranges):
        raise ValueError("none of its convolutions can compute in int8")
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "INFERENCE_NUM_THREADS": max(1, min(usable_cores(), torch.get_num_threads())),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # other processes, and our reader and writer, use the same cores
    }
    return openvino.Core().compile_model(graph, "CPU", settings)


def _graph(openvino: Any, network: nn.Module, shape: tuple[int, ...]) -> Any:
    """OpenVINO's graph of the finest logits of a network: nothing is computed."""
    try:
        return write_graph(openvino, Finest(network), shape)
    except NotWrittenError as error:
        log.debug("exported by torch: %s", first_line(error))
    graph = _exported(openvino, network, shape)
    _fuse_instance_norms(openvino, graph)
    return graph


def _exported(openvino: Any, network: nn.Module, shape: tuple[int, ...]) -> Any:
    """The same by torch's exporter, which takes seconds, of any network.

    A copy is exported whose weights are not channels-last: there, instance norm is torch's group norm.
    """
    plain = Finest(copy.deepcopy(network)).eval()
    plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        with torch.autocast("cpu", enabled=False):
            program = torch.export.export(plain, (torch.zeros(1, *shape),), strict=False)
        with _logging_kept():
            graph = openvino.convert_model(program)
    graph.reshape(openvino.PartialShape([1, *shape]))
    return graph


@contextmanager
def _logging_kept() -> Iterator[None]:
    """A conversion that fails leaves the root logger at errors alone."""
    root = logging.getLogger()
    level, filters, handlers = root.level, list(root.filters), list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers


def _give_channels_last(openvino: Any, graph: Any) -> None:
    """Let the output be (1, ..., channels), as it is computed: to turn that of a 128³ tile took a tenth of its time."""
    ops = openvino.opset13
    for result in graph.get_results():
        found = result.input(0).get_source_output()
        order = np.array([0, *range(2, len(found.get_partial_shape())), 1], np.int64)
        result.input(0).replace_source_output(ops.transpose(found, ops.constant(order)).output(0))
    graph.validate_nodes_and_infer_types()


def _fuse_instance_norms(openvino: Any, graph: Any) -> None:
    """Replace instance norms, which torch exports as group norms, by what ``normed`` makes of them.

    Raises:
        ValueError: a group norm of another kind.
    """
    ops = openvino.opset13
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "GroupNormalization":
            continue
        x, scale, shift = (port.get_source_output() for port in node.inputs())
        rank = len(x.get_partial_shape())
        channels, attributes = x.get_partial_shape()[1].get_length(), node.get_attributes()
        if attributes["num_groups"] != channels:
            raise ValueError("group norm is not converted")
        each = ops.constant(np.array([1, channels] + [1] * (rank - 2), np.int64))
        scale, shift = (ops.reshape(one, each, False) for one in (scale, shift))
        node.output(0).replace(normed(ops, x, rank, scale, shift, float(attributes["epsilon"])))
    graph.validate_nodes_and_infer_types()
