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


def convs_per_stage(counts: Sequence[int], stages: int) -> tuple[int, ...]:
    """The first ``stages`` of ``counts``; the last of them holds for all deeper stages."""
    return tuple(counts[min(stage, len(counts) - 1)] for stage in range(stages))


def plain_maps(strides: Sequence[Sequence[int]], features: Sequence[int], convs: Sequence[int]) -> list[int]:
    """Feature maps per stage of a plain encoder: ``features`` from each of its convolutions."""
    return [n * count for n, count in zip(convs, features, strict=True)]


def residual_maps(strides: Sequence[Sequence[int]], features: Sequence[int], blocks: Sequence[int]) -> list[int]:
    """Feature maps per stage of a residual encoder: of two convolutions per block, of the stem, and of shortcuts.

    The shortcut of a stage's first block counts where it averages over a stride or changes the number of features,
    also if it has no convolution (``compute_conv_feature_map_size`` of dynamic_network_architectures' BasicBlockD).
    """
    maps = [2 * n * count for n, count in zip(blocks, features, strict=True)]
    maps[0] += features[0]
    for stage in range(1, len(features)):
        if features[stage] != features[stage - 1] or max(strides[stage]) > 1:
            maps[stage] += features[stage]
    return maps


def unet_values(
    patch: Sequence[int],
    strides: Sequence[Sequence[int]],
    features: Sequence[int],
    encoder_maps: Sequence[int],
    decoder_convs: int,
    classes: int,
) -> int:
    """Values in the feature maps of a U-Net for one patch.

    Per stage ``encoder_maps``; per decoder stage the maps of ``decoder_convs`` convolutions and of the transposed
    one, all with the features of the skip connection; and the ``classes`` of the output at full resolution. The
    outputs of deep supervision are not counted, as in dynamic_network_architectures'
    ``compute_conv_feature_map_size``.
    """
    size = list(patch)
    last = len(strides) - 1
    total = classes * math.prod(patch) if last else 0
    for stage, (stride, count, maps) in enumerate(zip(strides, features, encoder_maps, strict=True)):
        size = [n // s for n, s in zip(size, stride, strict=True)]
        decoder = (decoder_convs + 1) * count if stage < last else 0
        total += (maps + decoder) * math.prod(size)
    return total


def allowed_values(preset: Preset, budget: Budget, dimensions: int) -> float:
    """Values for the reference batch that fit the budget: the preset's reference, in proportion to the memory."""
    return preset.scale(dimensions).reference_values * (budget.memory_gb / preset.reference_memory_gb)


def counted_classes(task: Task) -> int:
    """Entries of nnU-Net's ``labels``: background, classes or regions, and the ignore label if there is one."""
    declared = 1 + len(task.regions) if task.regions else len(task.labels)
    return declared + (task.ignore_value is not None)
