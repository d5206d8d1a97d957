"""Networks: what each network that may be asked for is like on a topology."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from medseg.planning.memory import convs_per_stage, features_per_stage
from medseg.planning.presets import NetworkChoice, Preset
from medseg.planning.topology import Topology
from medseg.records.network import NetworkPlan, TransformerPlan
from medseg.records.plan import Plan
from medseg.records.training import ForegroundBy, LossName

RESENC_BLOCKS = (1, 3, 4, 6)  # per stage, the last for all deeper ones: nnU-Net's ResEnc presets
UNIFORM = 2  # convolutions per stage of all networks but the residual one


@dataclass(frozen=True, slots=True)
class Variant:
    """What may be asked for beside a preset; None leaves what it has."""

    network: NetworkChoice | None = None
    loss: LossName | None = None
    checkpointing: bool = False
    elastic: float | None = None
    foreground_by: ForegroundBy | None = None


def rules_with(preset: Preset, variant: Variant) -> Preset:
    """The preset with what the variant changes."""
    changes: dict[str, object] = {"checkpointing": variant.checkpointing or preset.checkpointing}
    asked = {"loss": variant.loss, "elastic": variant.elastic, "foreground_by": variant.foreground_by}
    changes |= {name: value for name, value in asked.items() if value is not None}
    if variant.network is not None and variant.network != preset.network:
        residual = variant.network == "residual"
        changes["network"] = variant.network
        changes["convs_encoder"] = RESENC_BLOCKS if residual else (UNIFORM,)
        changes["convs_decoder"] = 1 if residual else UNIFORM
    return preset.model_copy(update=changes)


def planned_network(found: Topology, preset: Preset) -> NetworkPlan:
    """The network that a preset builds on a topology."""
    network = NETWORK_PLANS[preset.network](found, preset)
    return network.model_copy(update={"checkpointing": True}) if preset.checkpointing else network


def choice_of(network: NetworkPlan) -> NetworkChoice:
    """The name by which a network like this is asked for."""
    if network.name == "unet2015":
        if network.padding == "valid":
            return "unet2015-valid"
        return "unet2015-linear" if network.up and set(network.up) == {"linear"} else "unet2015"
    if network.name == "resnet-unet":
        if network.block == "bottleneck":
            return "resnet50-unet"
        return "resnet18-unet" if network.convs_encoder[2:] == (2, 2, 2, 2) else "resnet-unet"
    return network.name


def variant_differences(plan: Plan, variant: Variant) -> list[str]:
    """What of a variant a plan was not made with, as options; nothing where nothing is asked for."""
    first = next(iter(plan.configurations.values()))
    there = choice_of(first.network)
    differences = []
    if variant.network not in (None, there):
        differences.append(f"--network {there}")
    if variant.loss not in (None, first.training.loss):
        differences.append(f"--loss {first.training.loss}")
    if variant.elastic not in (None, first.training.elastic):
        differences.append(f"--elastic {first.training.elastic:g}")
    if variant.foreground_by not in (None, first.training.foreground_by):
        differences.append(f"--foreground-by {first.training.foreground_by}")
    if variant.checkpointing and not first.network.checkpointing:
        differences.append("no --checkpointing")
    return differences


def input_patch(network: NetworkPlan, patch: tuple[int, ...]) -> tuple[int, ...]:
    """The patch a network must see to segment ``patch``: larger without padding, else the same."""
    if network.padding == "same":
        return patch
    return tuple(_valid_input(network, axis, size) for axis, size in enumerate(patch))


def _valid_input(network: NetworkPlan, axis: int, size: int) -> int:
    n = size
    while True:
        try:
            if network.valid_size(axis, n) >= size:
                return n
        except ValueError:
            pass
        n += 1


def _staged(found: Topology, preset: Preset) -> NetworkPlan:
    """``plain``, as nnU-Net: all else that follows the topology differs from it in some fields."""
    stages = len(found.strides)
    return NetworkPlan(
        features=features_per_stage(stages, preset.base_features, preset.scale(len(found.patch)).max_features),
        kernels=found.kernels,
        strides=found.strides,
        convs_encoder=convs_per_stage(preset.convs_encoder, stages),
        convs_decoder=(preset.convs_decoder,) * (stages - 1),
    )


def _residual(found: Topology, preset: Preset) -> NetworkPlan:
    return _staged(found, preset).model_copy(update={"name": "residual"})


def _attention(found: Topology, preset: Preset) -> NetworkPlan:
    return _staged(found, preset).model_copy(update={"name": "attention"})


def _unetpp(found: Topology, preset: Preset) -> NetworkPlan:
    """Five stages at most, as in the paper: the nodes grow with their square."""
    return _staged(_cut(found, 5), preset).model_copy(update={"name": "unetpp"})


def _transunet(found: Topology, preset: Preset) -> NetworkPlan:
    """Fewer and narrower layers than the paper's 12 of 768, which were trained on millions of photographs before."""
    return _staged(found, preset).model_copy(update={"name": "transunet", "transformer": TransformerPlan()})


def _unet2015(found: Topology, preset: Preset) -> NetworkPlan:
    """Five stages at most; 64 features at first in 2D (the paper), 32 in 3D (Çiçek et al. 2016, arXiv 1606.06650)."""
    cut = _cut(found, 5)
    base = 64 if len(cut.patch) == 2 else 32
    features = tuple(base * 2**stage for stage in range(len(cut.strides)))
    changes = {"name": "unet2015", "features": features, "norm": "batch", "deep_supervision": False}
    return _staged(cut, preset).model_copy(update=changes)


def _unet2015_linear(found: Topology, preset: Preset) -> NetworkPlan:
    network = _unet2015(found, preset)
    return network.model_copy(update={"up": ("linear",) * len(network.convs_decoder)})


def _unet2015_valid(found: Topology, preset: Preset) -> NetworkPlan:
    return _unet2015(found, preset).model_copy(update={"padding": "valid"})


def _resnet(
    blocks: tuple[int, int, int, int], block: Literal["basic", "bottleneck"]
) -> Callable[[Topology, Preset], NetworkPlan]:
    """A ResNet on the first strides of the topology; where there are less than five, its last layers have none."""

    def plan(found: Topology, preset: Preset) -> NetworkPlan:
        one, wide = (1,) * len(found.patch), 4 if block == "bottleneck" else 1
        return NetworkPlan(
            name="resnet-unet",
            features=(16, 64, *(64 * wide * 2**layer for layer in range(4))),
            kernels=(*found.kernels, *[found.kernels[-1]] * 6)[:6],
            strides=(*found.strides, *[one] * 6)[:6],
            convs_encoder=(1, 1, *blocks),
            convs_decoder=(2,) * 5,
            block=block,
        )

    return plan


def _swinunetr(found: Topology, preset: Preset) -> NetworkPlan:
    """Strides 1 to 32 along all axes; stages 1 to 4 are two transformer layers each."""
    dimensions = len(found.patch)
    return NetworkPlan(
        name="swinunetr",
        features=(24, 24, 48, 96, 192, 384),
        kernels=((3,) * dimensions,) * 6,
        strides=((1,) * dimensions, *[(2,) * dimensions] * 5),
        convs_encoder=(1, 2, 2, 2, 2, 1),
        convs_decoder=(2,) * 5,
        deep_supervision=False,
    )


def _unetr(found: Topology, preset: Preset) -> NetworkPlan:
    """Boxes of 16 voxels along all axes, 12 transformer layers of 768 features, for one size of input."""
    dimensions = len(found.patch)
    return NetworkPlan(
        name="unetr",
        features=(16, 32, 64, 128, 768),
        kernels=((3,) * dimensions,) * 5,
        strides=((1,) * dimensions, *[(2,) * dimensions] * 4),
        convs_encoder=(1, 1, 1, 1, 12),
        convs_decoder=(2,) * 4,
        deep_supervision=False,
        input_size=tuple(16 * math.ceil(n / 16) for n in found.patch),
    )


def _segresnet(found: Topology, preset: Preset) -> NetworkPlan:
    """Five stages at most; axes that the topology halves last are left alone in as many stages, with kernels of 1."""
    cut = _cut(found, 5)
    stages, dimensions = len(cut.strides), len(cut.patch)
    late = [next((i for i, s in enumerate(cut.strides[1:]) if s[axis] == 2), 0) for axis in range(dimensions)]
    latest = max(late)
    coarse = [latest > 0 and n == latest for n in late]
    steps = [tuple(1 if c and stage < latest else 2 for c in coarse) for stage in range(stages)]
    return NetworkPlan(
        name="segresnet",
        features=tuple(32 * 2**stage for stage in range(stages)),
        kernels=tuple(tuple(3 if s == 2 else 1 for s in step) for step in steps),
        strides=((1,) * dimensions, *steps[: stages - 1]),
        convs_encoder=(1, 2, 2, 4, 4)[:stages],
        convs_decoder=(1,) * (stages - 1),
    )


def _mednext(found: Topology, preset: Preset) -> NetworkPlan:
    """MedNeXt-S with kernels of 3; five stages at most, halved along all axes."""
    stages, dimensions = min(5, len(found.strides)), len(found.patch)
    return NetworkPlan(
        name="mednext",
        features=tuple(32 * 2**stage for stage in range(stages)),
        kernels=((3,) * dimensions,) * stages,
        strides=((1,) * dimensions, *[(2,) * dimensions] * (stages - 1)),
        convs_encoder=(2,) * stages,
        convs_decoder=(2,) * (stages - 1),
    )


def _cut(found: Topology, stages: int) -> Topology:
    """The first stages of a topology."""
    kernels, strides = found.kernels[:stages], found.strides[:stages]
    divisors = tuple(math.prod(stride[axis] for stride in strides) for axis in range(len(found.patch)))
    return Topology(found.patch, kernels, strides, divisors)


NETWORK_PLANS: dict[NetworkChoice, Callable[[Topology, Preset], NetworkPlan]] = {
    "plain": _staged,
    "residual": _residual,
    "unet2015": _unet2015,
    "unet2015-linear": _unet2015_linear,
    "unet2015-valid": _unet2015_valid,
    "attention": _attention,
    "unetpp": _unetpp,
    "resnet18-unet": _resnet((2, 2, 2, 2), "basic"),
    "resnet-unet": _resnet((3, 4, 6, 3), "basic"),
    "resnet50-unet": _resnet((3, 4, 6, 3), "bottleneck"),
    "transunet": _transunet,
    "swinunetr": _swinunetr,
    "unetr": _unetr,
    "segresnet": _segresnet,
    "mednext": _mednext,
}
