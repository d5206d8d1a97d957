"""Weights of nnU-Net's networks by our names, and back.

nnU-Net's modules (dynamic_network_architectures) hold most tensors under several names: a block's ``conv`` and
``norm`` once more in ``all_modules``, and the whole encoder once more below the decoder. Their convolutions in front
of an instance norm have a bias, ours have none: the norm subtracts the mean, and with it whatever was added to all
voxels of a channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from medseg.errors import IncompatibleError, Problem
from medseg.records.network import NetworkPlan

_MODULES = re.compile(r"\.all_modules\.(\d+)\.")
_SHOWN = 3

Layer = tuple[str, str, tuple[int, ...]]  # a module's name here and there, and the shape of its weight


def from_nnunet(theirs: Mapping[str, Tensor], network: NetworkPlan, channels: int, outputs: int) -> dict[str, Tensor]:
    """nnU-Net's state dict → ours, for ``network`` with ``channels`` inputs and ``outputs`` logits.

    Nothing is allocated before names and shapes are known to fit.

    Raises:
        IncompatibleError: E0802 tensors are missing, unknown, of another shape, or stored twice and not the same.
    """
    tensors = _unaliased(theirs)
    wanted = list(_tensors(network, channels, outputs))
    silent = {f"{their}.bias" for _, their, _ in layers(network, channels, outputs) if their.endswith(".conv")}
    optional = {their for _, their, _ in wanted if "transpconvs" in their and their.endswith(".bias")}  # conv_bias off
    names = {their for _, their, _ in wanted}
    _refuse("missing", sorted(names - optional - set(tensors)))
    _refuse("unknown", sorted(set(tensors) - names - silent))
    stored = [(their, tensors[their], shape) for _, their, shape in wanted if their in tensors]
    _refuse(
        "of another shape", [f"{n} {tuple(t.shape)} instead of {shape}" for n, t, shape in stored if t.shape != shape]
    )
    _refuse("not of floating point", [name for name, t, _ in stored if not t.is_floating_point()])
    return {ours: tensors[their].float() if their in tensors else torch.zeros(shape) for ours, their, shape in wanted}


def to_nnunet(ours: Mapping[str, Tensor], network: NetworkPlan) -> dict[str, Tensor]:
    """Our state dict → nnU-Net's, under all the names that it insists on, biases that we do not have as zeros."""
    found: dict[str, Tensor] = {}
    for name, their, _ in _tensors(network, 1, 1):
        found |= dict.fromkeys((their, *_aliases(their)), ours[name])
    for name, their, _ in layers(network, 1, 1):
        if their.endswith(".conv") and ".skip." not in their:
            bias = f"{their}.bias"
            found |= dict.fromkeys((bias, *_aliases(bias)), torch.zeros(ours[f"{name}.weight"].shape[0]))
    return found


def layers(network: NetworkPlan, channels: int, outputs: int) -> Iterator[Layer]:
    """Every module that holds tensors."""
    features, kernels, last = network.features, network.kernels, len(network.features) - 1
    for stage, convs in enumerate(network.convs_encoder):
        if network.name == "plain":
            widths = ((channels, *features)[stage], features[stage])
            yield from _stack(f"encoder.{stage}", f"encoder.stages.{stage}.0", convs, widths, kernels[stage])
        else:
            yield from _residual_stage(network, stage, channels)
    for level, convs in enumerate(network.convs_decoder):
        stage = last - 1 - level
        width, one = features[stage], (1,) * len(kernels[0])
        yield f"up.{level}", f"decoder.transpconvs.{level}", (features[stage + 1], width, *network.strides[stage + 1])
        yield from _stack(f"decoder.{level}", f"decoder.stages.{level}", convs, (2 * width, width), kernels[stage])
        yield f"heads.{level}", f"decoder.seg_layers.{level}", (outputs, width, *one)


def _stack(ours: str, theirs: str, convs: int, widths: tuple[int, int], kernel: tuple[int, ...]) -> Iterator[Layer]:
    fan_in, width = widths
    for index in range(convs):
        shape = (width, width if index else fan_in, *kernel)
        yield f"{ours}.{2 * index}", f"{theirs}.convs.{index}.conv", shape
        yield f"{ours}.{2 * index + 1}", f"{theirs}.convs.{index}.norm", (width,)


def _residual_stage(network: NetworkPlan, stage: int, channels: int) -> Iterator[Layer]:
    kernel, width = network.kernels[stage], network.features[stage]
    before = network.features[max(stage - 1, 0)]
    first = 1 if stage == 0 else 0  # our first stage begins with the stem
    if first:
        yield from _stack("encoder.0.0", "encoder.stem", 1, (channels, width), kernel)
    for block in range(network.convs_encoder[stage]):
        ours, theirs = f"encoder.{stage}.{first + block}", f"encoder.stages.{stage}.blocks.{block}"
        fan_in = width if block else before
        yield f"{ours}.first.0", f"{theirs}.conv1.conv", (width, fan_in, *kernel)
        yield f"{ours}.first.1", f"{theirs}.conv1.norm", (width,)
        yield f"{ours}.second", f"{theirs}.conv2.conv", (width, width, *kernel)
        yield f"{ours}.norm", f"{theirs}.conv2.norm", (width,)
        if fan_in != width:
            place = 0 if set(network.strides[stage]) == {1} else 1  # behind the pooling of a strided block
            yield f"{ours}.project.0", f"{theirs}.skip.{place}.conv", (width, fan_in, *(1,) * len(kernel))
            yield f"{ours}.project.1", f"{theirs}.skip.{place}.norm", (width,)


def _tensors(network: NetworkPlan, channels: int, outputs: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every tensor of ours: its name here, there, and its shape."""
    for ours, theirs, shape in layers(network, channels, outputs):
        yield f"{ours}.weight", f"{theirs}.weight", shape
        if not theirs.endswith(".conv"):
            yield f"{ours}.bias", f"{theirs}.bias", (shape[1 if "transpconvs" in theirs else 0],)


def _aliases(tensor: str) -> list[str]:
    """The other names of one of nnU-Net's tensors."""
    module, _, leaf = tensor.rpartition(".")
    parent, _, last = module.rpartition(".")
    names = [module]
    if last in ("conv", "norm"):
        names.append(f"{parent}.all_modules.{0 if last == 'conv' else 1}")
    if module.startswith("encoder."):
        names += [f"decoder.{name}" for name in names]
    return [f"{name}.{leaf}" for name in names[1:]]


def _unaliased(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by one name each."""
    found: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        plain = _MODULES.sub(lambda m: ".conv." if m[1] == "0" else ".norm.", name.removeprefix("decoder.encoder."))
        plain = f"encoder.{plain}" if name.startswith("decoder.encoder.") else plain
        known = found.setdefault(plain, tensor)
        if known is not tensor and (known.shape != tensor.shape or not torch.equal(known, tensor)):
            _refuse("stored twice and not the same", [name])
    return found


def _refuse(what: str, names: list[str]) -> None:
    if not names:
        return
    listed = ", ".join(name[:120] for name in names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
    action = "the trainer may have a network of its own: predict with nnU-Net itself"
    raise IncompatibleError(
        Problem("E0802", f"{len(names)} tensors of the checkpoint are {what}: {listed}", "those of the plans", action)
    )
