"""Memory: the size of a network's feature maps, in closed form, and what a budget allows.

The proxy is nnU-Net's: values held by the outputs of all convolutions for one sample. It is proportional to the
memory of training, not equal to it, and it is what the reference values of the presets were calibrated with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from medseg.planning.presets import Preset
from medseg.records.plan import Budget
from medseg.records.task import Task


def features_per_stage(stages: int, base: int, cap: int) -> tuple[int, ...]:
    """``base·2^i``, at most ``cap``."""
    return tuple(min(cap, base * 2**stage) for stage in range(stages))


def plain_unet_values(
    patch: Sequence[int],
    strides: Sequence[Sequence[int]],
    features: Sequence[int],
    convs: tuple[int, int],
    classes: int,
) -> int:
    """Values in the feature maps of a plain U-Net for one patch.

    Per encoder stage ``convs[0]`` maps; per decoder stage ``convs[1]`` and the transposed convolution's, all with
    the features of the skip connection; and the ``classes`` of the output at full resolution. The outputs of deep
    supervision are not counted, as in dynamic_network_architectures' ``compute_conv_feature_map_size``.
    """
    in_encoder, in_decoder = convs
    size = list(patch)
    total = 0
    for stage, (stride, count) in enumerate(zip(strides, features, strict=True)):
        size = [n // s for n, s in zip(size, stride, strict=True)]
        decoder = in_decoder + 1 if stage < len(strides) - 1 else 0
        total += (in_encoder + decoder) * count * math.prod(size)
    return total + (classes * math.prod(patch) if len(strides) > 1 else 0)


def allowed_values(preset: Preset, budget: Budget, dimensions: int) -> float:
    """Values for the reference batch that fit the budget: the preset's reference, in proportion to the memory."""
    return preset.scale(dimensions).reference_values * (budget.memory_gb / preset.reference_memory_gb)


def counted_classes(task: Task) -> int:
    """Entries of nnU-Net's ``labels``: background, classes or regions, and the ignore label if there is one."""
    declared = 1 + len(task.regions) if task.regions else len(task.labels)
    return declared + (task.ignore_value is not None)
