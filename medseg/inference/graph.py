"""Graph: a network written down for OpenVINO, from the functions that it calls on tensors without values.

``torch.export`` does the same for any network, and is loaded for it, which takes seconds. This takes hundredths of one,
for networks of convolutions: norms, pooling, steps up, skips, gates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class NotWrittenError(Exception):
    """The network calls something else."""


def write_graph(openvino: Any, network: nn.Module, shape: Sequence[int]) -> Any:
    """OpenVINO's model of a network for inputs (1, *shape), float32; nothing is computed.

    Args:
        openvino: the package.
        network: (B, C, ...) → (B, outputs, ...), in evaluation mode. Instance norms become MVN, scale and shift.
        shape: (C, ...) of one input.

    Raises:
        NotWrittenError: it calls functions that are not known here.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        bare, values = _without_values(network)
        x = torch.empty(1, *shape, device="meta")
        given = openvino.opset13.parameter([1, *shape], np.float32)
        with _Writer(openvino.opset13, values) as writer:
            writer.take(x, given.output(0))
            found = bare(x)
        return openvino.Model([writer.node(found)], [given])


def normed(ops: Any, x: Any, axes: int, scale: Any, shift: Any, eps: float) -> Any:
    """Instance norm as OpenVINO runs it together with what follows: MVN, scale and shift.

    OpenVINO's own group norm takes more passes, and compiling it beside shortcuts ended the process (2026.4.1).

    Args:
        ops: OpenVINO's operations.
        x: gives (B, C, ...).
        axes: of ``x``.
        scale: gives (1, C, 1, ...); None for 1.
        shift: the same; None for 0.
        eps: added to the variance.
    """
    node = ops.mvn(x, ops.constant(np.arange(2, axes, dtype=np.int64)), True, eps, "inside_sqrt")
    node = node if scale is None else ops.multiply(node, scale)
    return (node if shift is None else ops.add(node, shift)).output(0)


def _without_values(network: nn.Module) -> tuple[nn.Module, dict[int, tuple[Tensor, Tensor]]]:
    """A contiguous copy on the meta device; its parameters and buffers, by identity, with what they stand for."""
    bare: dict[int, Any] = {}
    values: dict[int, tuple[Tensor, Tensor]] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        empty = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
        bare[id(tensor)], values[id(empty)] = empty, (empty, tensor)
    return copy.deepcopy(network, bare), values


class _Writer(TorchFunctionMode):
    """Follows tensors by their identity; of those that other functions made nothing is known.

    They are kept, so that the identity of one is not given to another.
    """

    def __init__(self, ops: Any, values: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.ops, self._values = ops, values
        self._nodes: dict[int, tuple[Tensor, Any]] = {}
        self._shared: set[int] = set()  # tensors that have their memory from each other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Write down how the values come about; OpenVINO knows the shape. torch would load seconds of Python for it."""
        kwargs, name = kwargs or {}, func.__name__
        if name in WRITERS and any(self._follows(one) for one in args):
            try:
                node = WRITERS[name](self, *args, **kwargs)
            except TypeError as error:
                raise NotWrittenError(f"{name}: {error}") from error
            if id(args[0]) in self._nodes and self._nodes[id(args[0])][1] is node:  # in place
                return args[0]
            found = self.take(torch.empty(tuple(node.get_shape()), device="meta"), node)
            if name in VIEWS:
                self._shared |= {id(args[0]), id(found)}
            return found
        if name == "__setitem__" or "out" in kwargs or (name.endswith("_") and not name.endswith("__")):
            raise NotWrittenError(name)
        return func(*args, **kwargs)

    def _follows(self, value: Any) -> bool:
        return any(map(self._follows, value)) if isinstance(value, list | tuple) else id(value) in self._nodes

    def take(self, tensor: Tensor, node: Any) -> Tensor:
        """From now on, ``node`` gives the values of ``tensor``, which is returned."""
        self._nodes[id(tensor)] = tensor, node
        return tensor

    def replace(self, tensor: Tensor, node: Any) -> Any:
        """The same of a tensor that is changed in place; the node.

        Raises:
            NotWrittenError: others change with it.
        """
        if id(tensor) in self._shared:
            raise NotWrittenError("a part that is changed in place")
        self.take(tensor, node)
        return node

    def node(self, value: Tensor | float) -> Any:
        """What gives a value: of a tensor that is followed, of a parameter or of a number.

        Raises:
            NotWrittenError: of another tensor.
        """
        if not isinstance(value, Tensor):
            return self.ops.constant(np.float32(value)).output(0)
        if id(value) in self._nodes:
            return self._nodes[id(value)][1]
        return self.ops.constant(self.array(value)).output(0)

    def array(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        """The values of a parameter or buffer."""
        if id(tensor) not in self._values:
            raise NotWrittenError("a tensor made on the way")
        values = self._values[id(tensor)][1].detach().float().cpu().contiguous()
        return values.numpy()

    def each(self, tensor: Tensor | np.ndarray[Any, Any], axes: int) -> Any:
        """A parameter (C,) for tensors (B, C, ...) of so many axes."""
        values = self.array(tensor) if isinstance(tensor, Tensor) else tensor
        return self.ops.constant(values.reshape(1, -1, *[1] * (axes - 2)))


def _convolution(
    w: _Writer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    axes = x.ndim - 2
    if isinstance(padding, str):
        raise NotWrittenError("padding by name")
    sides = _sizes(padding, axes)
    how = (_sizes(stride, axes), sides, sides, _sizes(dilation, axes))
    if groups == 1:
        found = w.ops.convolution(w.node(x), w.node(weight), *how)
    else:
        found = w.ops.group_convolution(w.node(x), _grouped(w, weight, groups), *how)
    return _biased(w, found, bias, x.ndim)


def _transposed(
    w: _Writer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    axes = x.ndim - 2
    sides = _sizes(padding, axes)
    more = {"pads_begin": sides, "pads_end": sides, "dilations": _sizes(dilation, axes)}
    more["output_padding"] = _sizes(output_padding, axes)
    if groups == 1:
        found = w.ops.convolution_backprop_data(w.node(x), w.node(weight), _sizes(stride, axes), **more)
    else:
        kernel = _grouped(w, weight, groups)
        found = w.ops.group_convolution_backprop_data(w.node(x), kernel, _sizes(stride, axes), **more)
    return _biased(w, found, bias, x.ndim)


def _grouped(w: _Writer, weight: Tensor, groups: int) -> Any:
    values = w.array(weight)
    return w.ops.constant(values.reshape(groups, values.shape[0] // groups, *values.shape[1:]))


def _biased(w: _Writer, node: Any, bias: Tensor | None, axes: int) -> Any:
    return (node if bias is None else w.ops.add(node, w.each(bias, axes))).output(0)


def _sizes(value: Any, axes: int) -> list[int]:
    return [int(value)] * axes if isinstance(value, int) else [int(n) for n in value]


def _group_norm(
    w: _Writer,
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if groups != x.shape[1]:
        raise NotWrittenError("group norm over several channels")
    return _instance_norm(w, x, weight=weight, bias=bias, eps=eps)


def _instance_norm(
    w: _Writer,
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not use_input_stats:
        raise NotWrittenError("instance norm by kept statistics")
    scale, shift = (None if one is None else w.each(one, x.ndim) for one in (weight, bias))
    return normed(w.ops, w.node(x), x.ndim, scale, shift, eps)


def _batch_norm(
    w: _Writer,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or running_var is None:
        raise NotWrittenError("batch norm of the batch")
    scale = 1 / np.sqrt(w.array(running_var) + np.float32(eps))
    scale = scale if weight is None else scale * w.array(weight)
    shift = -w.array(running_mean) * scale
    shift = shift if bias is None else shift + w.array(bias)
    scaled = w.ops.multiply(w.node(x), w.each(scale, x.ndim))
    return w.ops.add(scaled, w.each(shift, x.ndim)).output(0)


def _leaky_relu(w: _Writer, x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    node = w.ops.prelu(w.node(x), w.ops.constant(np.array([negative_slope], np.float32))).output(0)
    return w.replace(x, node) if inplace else node


def _relu(w: _Writer, x: Tensor, inplace: bool = False) -> Any:
    node = w.ops.relu(w.node(x)).output(0)
    return w.replace(x, node) if inplace else node


def _sigmoid(w: _Writer, x: Tensor) -> Any:
    return w.ops.sigmoid(w.node(x)).output(0)


def _gelu(w: _Writer, x: Tensor, approximate: str = "none") -> Any:
    return w.ops.gelu(w.node(x), "erf" if approximate == "none" else "tanh").output(0)


def _cat(w: _Writer, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    return w.ops.concat([w.node(tensor) for tensor in tensors], dim).output(0)


def _add(w: _Writer, x: Tensor | float, y: Tensor | float, *, alpha: float = 1) -> Any:
    if alpha != 1:
        raise NotWrittenError("addition of a multiple")
    return w.ops.add(w.node(x), w.node(y)).output(0)


def _add_to(w: _Writer, x: Tensor, y: Tensor | float, *, alpha: float = 1) -> Any:
    return w.replace(x, _add(w, x, y, alpha=alpha))


def _multiply(w: _Writer, x: Tensor | float, y: Tensor | float) -> Any:
    return w.ops.multiply(w.node(x), w.node(y)).output(0)


def _max_pool(
    w: _Writer,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    axes = x.ndim - 2
    if ceil_mode or return_indices:
        raise NotWrittenError("maximum pooling of another kind")
    sides, kernel = _sizes(padding, axes), _sizes(kernel_size, axes)
    steps = kernel if stride is None else _sizes(stride, axes)
    return w.ops.max_pool(w.node(x), steps, _sizes(dilation, axes), sides, sides, kernel).output(0)


def _mean_pool(
    w: _Writer,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    axes = x.ndim - 2
    nothing, kernel = [0] * axes, _sizes(kernel_size, axes)
    if _sizes(padding, axes) != nothing or divisor_override is not None:
        raise NotWrittenError("mean pooling of another kind")
    steps = kernel if stride is None else _sizes(stride, axes)
    rounding = "ceil" if ceil_mode else "floor"  # beyond the end are no voxels: they are not counted
    return w.ops.avg_pool(w.node(x), steps, nothing, nothing, kernel, True, rounding).output(0)


def _interpolate(
    w: _Writer,
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    if size is None or mode not in ("bilinear", "trilinear") or align_corners or antialias:
        raise NotWrittenError("interpolation of another kind")
    axes = x.ndim - 2
    sizes = w.ops.constant(np.array(_sizes(size, axes), np.int64))
    along = w.ops.constant(np.arange(2, x.ndim, dtype=np.int64))
    how = {"mode": "linear_onnx", "shape_calculation_mode": "sizes", "coordinate_transformation_mode": "half_pixel"}
    return w.ops.interpolate(w.node(x), sizes, axes=along, **how).output(0)


def _pad(w: _Writer, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    if mode != "constant":
        raise NotWrittenError("padding of another kind")
    begin, end = [0] * x.ndim, [0] * x.ndim
    for place, (first, last) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        begin[-1 - place], end[-1 - place] = int(first), int(last)
    sides = [w.ops.constant(np.array(side, np.int64)) for side in (begin, end)]
    return w.ops.pad(w.node(x), *sides, "constant", w.ops.constant(np.float32(value or 0))).output(0)


def _narrow(w: _Writer, x: Tensor, dim: int, start: int, length: int) -> Any:
    begin, end, step, axis = (w.ops.constant(np.array([n], np.int64)) for n in (start, start + length, 1, dim))
    return w.ops.slice(w.node(x), begin, end, step, axis).output(0)


def _same(w: _Writer, x: Tensor, *_: Any, **__: Any) -> Any:
    return w.node(x)


def _cast(w: _Writer, x: Tensor, *to: Any, **more: Any) -> Any:
    if x.dtype not in (*to, *more.values()):
        raise NotWrittenError("another number type")
    return w.node(x)


WRITERS: dict[str, Callable[..., Any]] = {
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose2d": _transposed,
    "conv_transpose3d": _transposed,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "leaky_relu": _leaky_relu,
    "relu": _relu,
    "sigmoid": _sigmoid,
    "gelu": _gelu,
    "cat": _cat,
    "add": _add,
    "add_": _add_to,
    "mul": _multiply,
    "max_pool2d": _max_pool,
    "max_pool3d": _max_pool,
    "avg_pool2d": _mean_pool,
    "avg_pool3d": _mean_pool,
    "interpolate": _interpolate,
    "pad": _pad,
    "narrow": _narrow,
    "contiguous": _same,
    "float": _same,
    "to": _cast,
}
VIEWS = ("narrow",)
