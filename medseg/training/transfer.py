"""Transfer: the weights of a network for one task carried into a network of the same plan for another.

What differs between the two are the weights that meet the input and those that give the outputs. They are not listed
for every network, but found: the axes whose size changes when the network is built for one more input, or output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medseg.artefacts import sha256_of
from medseg.errors import IncompatibleError, IntegrityError, Problem
from medseg.networks.build import build_network
from medseg.records.network import NetworkPlan

Tensors = Mapping[str, Tensor]
Axes = dict[str, int]


@dataclass(frozen=True, slots=True)
class Slots:
    """Inputs or outputs of a kind: for each of the new network its place among the ``known`` of the old, or None."""

    known: int
    places: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Initial:
    """The file with the old network's weights, its SHA-256, and what becomes of its inputs and outputs.

    ``inputs`` are the images' channels and, in the second stage of a cascade, the labels of the first.
    """

    path: Path
    sha256: str
    inputs: tuple[Slots, ...]
    outputs: Slots

    def to_json(self) -> dict[str, Any]:
        """All that the weights to begin from depend on; the path is not."""
        kinds = {"inputs": self.inputs, "outputs": (self.outputs,)}
        slots = {name: [[kind.known, *kind.places] for kind in found] for name, found in kinds.items()}
        return {"sha256": self.sha256, **slots}


def begin_from(network: nn.Module, plan: NetworkPlan, initial: Initial) -> None:
    """Give ``network``, built freshly by ``plan``, the weights of ``initial``.

    Inputs and outputs that are the old network's get its weights. Outputs that are new keep their fresh ones. Inputs
    that are new begin with weights of 0: the network computes at first exactly what the old one did, and learns what
    they tell (a weight's gradient does not depend on its own value). If none of a kind is known, each gets an equal
    part of the old ones' sum, so that an image repeated in all channels looks the same to both networks.

    Raises:
        IntegrityError: E0701 the file is missing, damaged or another one.
        IncompatibleError: E0802 its weights are not those of such a network.
    """
    old, fresh = _read(initial), network.state_dict()
    channels, outputs = sum(len(slots.places) for slots in initial.inputs), len(initial.outputs.places)
    first, last = changing_axes(plan, fresh, channels, outputs)
    _check(old, fresh, initial, first, last)
    carried = {name: tensor.to(fresh[name].dtype) for name, tensor in old.items()}
    for name, axis in first.items():
        carried[name] = _inputs(carried[name], axis, initial.inputs)
    for name, axis in last.items():
        carried[name] = _outputs(carried[name], fresh[name], axis, initial.outputs)
    network.load_state_dict(carried)


def changing_axes(plan: NetworkPlan, built: Tensors, channels: int, outputs: int) -> tuple[Axes, Axes]:
    """By the names of weights, the axis that counts inputs, and that which counts outputs.

    Args:
        plan: of the network.
        built: its weights.
        channels: inputs that it was built for.
        outputs: outputs that it was built for.

    Raises:
        IncompatibleError: E0802 the network changes in another way with its inputs or outputs.
    """
    more_channels = _another(channels)
    more_outputs = _another(outputs) + 2 * (_another(outputs) == more_channels)
    other = build_network(plan, more_channels, more_outputs).state_dict()
    first: Axes = {}
    last: Axes = {}
    for name in sorted(built.keys() | other.keys()):
        if name not in built or name not in other:
            raise _other_change(plan, f"{name} is there for some numbers of inputs and outputs only")
        a, b = built[name].shape, other[name].shape
        axes = [axis for axis, (n, m) in enumerate(zip(a, b, strict=True)) if n != m]
        found = [(a[axis], b[axis]) for axis in axes]
        if found == [(channels, more_channels)]:
            first[name] = axes[0]
        elif found == [(outputs, more_outputs)]:
            last[name] = axes[0]
        elif found:
            raise _other_change(plan, f"{name} is {tuple(a)} or {tuple(b)}, for other inputs and outputs")
    return first, last


def _another(count: int) -> int:
    """An odd number that is larger: features are even in number, and some networks leave out what they need not do."""
    return count + 2 if count % 2 else count + 1


def _other_change(plan: NetworkPlan, measured: str) -> IncompatibleError:
    expected = "one axis that counts them"
    return IncompatibleError(Problem("E0802", f"{plan.name}: {measured}", expected, "train without --from"))


def _read(initial: Initial) -> dict[str, Tensor]:
    path = initial.path
    action = "restore the file, or plan again with --from MODEL --overwrite"
    try:
        if sha256_of(path) != initial.sha256:
            raise IntegrityError(Problem("E0701", f"{path} is not the file that the plan names", "", action))
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise IntegrityError(Problem("E0701", f"{path}: {reason}", "", action)) from error
    return tensors


def _check(old: Tensors, fresh: Tensors, initial: Initial, first: Mapping[str, int], last: Mapping[str, int]) -> None:
    """Refuse weights with other names or shapes than the old network must have had."""
    known = sum(slots.known for slots in initial.inputs)
    for name in sorted(old.keys() | fresh.keys()):
        found = tuple(old[name].shape) if name in old else None
        wanted = list(fresh[name].shape) if name in fresh else None
        for axes, count in ((first, known), (last, initial.outputs.known)):
            if wanted is not None and name in axes:
                wanted[axes[name]] = count
        if wanted is None or found != tuple(wanted):
            measured = f"weights to begin from: {name} is {found or 'missing'}"
            expected = f"{tuple(wanted)}" if wanted is not None else "none of this name"
            action = "the plan's network must be that of the model: plan again with --from MODEL --overwrite"
            raise IncompatibleError(Problem("E0802", measured, expected, action))


def _inputs(old: Tensor, axis: int, kinds: Sequence[Slots]) -> Tensor:
    parts, start = [], 0
    for slots in kinds:
        parts.append(_one_kind(old.narrow(axis, start, slots.known), axis, slots))
        start += slots.known
    return torch.cat(parts, axis)


def _one_kind(old: Tensor, axis: int, slots: Slots) -> Tensor:
    if all(place is None for place in slots.places):
        share = old.sum(axis) / len(slots.places)
        return torch.stack([share] * len(slots.places), axis)
    zero = torch.zeros_like(old.select(axis, 0))
    return torch.stack([zero if place is None else old.select(axis, place) for place in slots.places], axis)


def _outputs(old: Tensor, fresh: Tensor, axis: int, slots: Slots) -> Tensor:
    new = fresh.clone()
    for index, place in enumerate(slots.places):
        if place is not None:
            new.select(axis, index).copy_(old.select(axis, place))
    return new
