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
from medseg.networks.build import build_network
from medseg.records.plan import NetworkPlan

_MODULES = re.compile(r"\.all_modules\.(\d+)\.")
_SHOWN = 3

Layer = tuple[str, str]  # a module's name here and there


def from_nnunet(theirs: Mapping[str, Tensor], network: NetworkPlan, channels: int, outputs: int) -> dict[str, Tensor]:
    """nnU-Net's state dict → ours, for ``network`` with ``channels`` inputs and ``outputs`` logits.

    Nothing is allocated before names and shapes are known to fit.

    Raises:
        IncompatibleError: E0802 tensors are missing, unknown, of another shape, or stored twice and not the same.
    """
    tensors = _unaliased(theirs)
    sources = {ours: their for ours, their, _ in _tensors(network)}
    silent = {their for _, their in layers(network) if their.endswith(".conv")}
    known = {*sources.values(), *(f"{their}.bias" for their in silent)}
    optional = {f"{their}.bias" for _, their in layers(network) if "transpconvs" in their}  # conv_bias may be off
    _refuse("missing", sorted(set(sources.values()) - optional - set(tensors)))
    _refuse("unknown", sorted(set(tensors) - known))
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in build_network(network, channels, outputs).state_dict().items()}
    found: dict[str, Tensor] = {}
    for ours, their in sources.items():
        found[ours] = tensors[their] if their in tensors else torch.zeros(shapes[ours])
    different = [
        f"{sources[name]} {tuple(t.shape)} instead of {tuple(shapes[name])}"
        for name, t in found.items()
        if t.shape != shapes[name]
    ]
    _refuse("of another shape", different)
    _refuse("not of floating point", [sources[name] for name, t in found.items() if not t.is_floating_point()])
    return {name: tensor.float() for name, tensor in found.items()}


def to_nnunet(ours: Mapping[str, Tensor], network: NetworkPlan) -> dict[str, Tensor]:
    """Our state dict → nnU-Net's, under all the names that it insists on, biases that we do not have as zeros."""
    found: dict[str, Tensor] = {}
    for name, their, aliases in _tensors(network):
        for alias in (their, *aliases):
            found[alias] = ours[name]
    for name, their in layers(network):
        if their.endswith(".conv") and ".skip." not in their:
            zeros = torch.zeros(ours[f"{name}.weight"].shape[0])
            for alias in (f"{their}.bias", *_aliases(their, "bias")):
                found[alias] = zeros
    return found


def layers(network: NetworkPlan) -> Iterator[Layer]:
    """Every module that holds tensors."""
    for stage, convs in enumerate(network.convs_encoder):
        if network.name == "plain":
            yield from _stack(f"encoder.{stage}", f"encoder.stages.{stage}.0", convs)
        else:
            yield from _residual_stage(network, stage)
    for level, convs in enumerate(network.convs_decoder):
        yield f"up.{level}", f"decoder.transpconvs.{level}"
        yield from _stack(f"decoder.{level}", f"decoder.stages.{level}", convs)
        yield f"heads.{level}", f"decoder.seg_layers.{level}"


def _stack(ours: str, theirs: str, convs: int) -> Iterator[Layer]:
    for index in range(convs):
        yield f"{ours}.{2 * index}", f"{theirs}.convs.{index}.conv"
        yield f"{ours}.{2 * index + 1}", f"{theirs}.convs.{index}.norm"


def _residual_stage(network: NetworkPlan, stage: int) -> Iterator[Layer]:
    first = 1 if stage == 0 else 0  # our first stage begins with the stem
    if first:
        yield from _stack("encoder.0.0", "encoder.stem", 1)
    for block in range(network.convs_encoder[stage]):
        ours, theirs = f"encoder.{stage}.{first + block}", f"encoder.stages.{stage}.blocks.{block}"
        yield f"{ours}.first.0", f"{theirs}.conv1.conv"
        yield f"{ours}.first.1", f"{theirs}.conv1.norm"
        yield f"{ours}.second", f"{theirs}.conv2.conv"
        yield f"{ours}.norm", f"{theirs}.conv2.norm"
        if block == 0 and stage > 0 and network.features[stage] != network.features[stage - 1]:
            place = 0 if set(network.strides[stage]) == {1} else 1  # behind the pooling of a strided block
            yield f"{ours}.project.0", f"{theirs}.skip.{place}.conv"
            yield f"{ours}.project.1", f"{theirs}.skip.{place}.norm"


def _tensors(network: NetworkPlan) -> Iterator[tuple[str, str, list[str]]]:
    """Every tensor of ours: its name here, there, and its other names there."""
    for ours, theirs in layers(network):
        for leaf in ("weight",) if theirs.endswith(".conv") else ("weight", "bias"):
            yield f"{ours}.{leaf}", f"{theirs}.{leaf}", _aliases(theirs, leaf)


def _aliases(module: str, leaf: str) -> list[str]:
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
