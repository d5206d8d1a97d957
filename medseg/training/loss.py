"""Loss: the loss of a task over the levels of deep supervision; soft Dice + cross-entropy unless the plan says other.

Softmax tasks: CE is the mean over all voxels that are not ignored; Dice leaves the background out, adds 1e-5 to
numerator and denominator, and takes its sums per sample or, with batch Dice, over the whole batch. Tasks with regions:
one sigmoid per region, binary CE, Dice over all regions. The loss is CE - Dice: -1 is perfect.
(Source of the rules: nnU-Net v2, ``DC_and_CE_loss``, ``DC_and_BCE_loss`` and ``MemoryEfficientSoftDiceLoss``.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.records.plan import ConfigurationPlan
from medseg.records.task import Task
from medseg.records.training import LossName
from medseg.training.border import border_weights
from medseg.training.losses import IGNORE, LOSSES, SMOOTH, Voxels, soft_dice
from medseg.training.world import ALONE, World

__all__ = ["IGNORE", "SMOOTH"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The loss of a plan: its name, the weights of the classes, and the spacing in shares of the finest axis."""

    name: LossName = "dice-ce"
    class_weights: tuple[float, ...] | None = None
    spacing: tuple[float, ...] | None = None

    @classmethod
    def of(cls, configuration: ConfigurationPlan) -> Choice:
        """What a configuration is trained with."""
        finest = min(configuration.spacing_mm)
        spacing = tuple(s / finest for s in configuration.spacing_mm)
        return cls(configuration.training.loss, configuration.training.class_weights, spacing)


DICE_CE = Choice()


def dice_ce_loss(logits: Tensor, labels: Tensor, *, batch_dice: bool, world: World = ALONE) -> Tensor:
    """Softmax loss of one level: the sum of ``dice_ce_parts``."""
    cross_entropy, overlap = dice_ce_parts(logits, labels, batch_dice=batch_dice, world=world)
    return cross_entropy + overlap


def dice_ce_parts(logits: Tensor, labels: Tensor, *, batch_dice: bool, world: World = ALONE) -> tuple[Tensor, Tensor]:
    """Cross-entropy and negative soft Dice of a softmax task at one level.

    Args:
        logits: (B, classes, [Z,] Y, X), any float type; computed in float32.
        labels: (B, [Z,] Y, X) int64 class indices, -1 = ignored.
        batch_dice: sum over the batch before the quotient.
        world: the processes that share the batch.

    Returns:
        Two scalars, float32; 0 and -1 with a gradient of 0 if every voxel is ignored: there is nothing to get wrong.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    valid = labels != IGNORE
    target = labels.clamp_min(0).unsqueeze(1)
    picked = log_probabilities.gather(1, target).squeeze(1)
    total, count = world.sums(-(picked * valid).sum(), valid.sum())
    cross_entropy = total / count.clamp_min(1)
    probabilities = log_probabilities[:, 1:].exp() * valid.unsqueeze(1)
    classes = torch.arange(1, logits.shape[1], device=labels.device).view(1, -1, *[1] * (labels.ndim - 1))
    return cross_entropy, -soft_dice(probabilities, (labels.unsqueeze(1) == classes), batch_dice, world)


def dice_bce_loss(logits: Tensor, labels: Tensor, *, batch_dice: bool, regions: Tensor, world: World = ALONE) -> Tensor:
    """Sigmoid loss of one level: the sum of ``dice_bce_parts``."""
    cross_entropy, overlap = dice_bce_parts(logits, labels, batch_dice=batch_dice, regions=regions, world=world)
    return cross_entropy + overlap


def dice_bce_parts(
    logits: Tensor, labels: Tensor, *, batch_dice: bool, regions: Tensor, world: World = ALONE
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and negative soft Dice at one level.

    ``regions`` (regions, classes) bool tells which class belongs to which region.
    """
    valid = (labels != IGNORE).unsqueeze(1)
    target = regions.to(labels.device)[:, labels.clamp_min(0)].movedim(0, 1)
    logits = logits.float()
    elementwise = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    total, count = world.sums((elementwise * valid).sum(), valid.sum() * target.shape[1])
    cross_entropy = total / count.clamp_min(1)
    return cross_entropy, -soft_dice(logits.sigmoid() * valid, target & valid, batch_dice, world)


def region_table(task: Task) -> Tensor | None:
    """(regions, classes) bool table of a task with regions, else None."""
    if not task.regions:
        return None
    return torch.tensor([[value in region.values for value in task.values] for region in task.regions])


def level_weights(levels: int) -> list[float]:
    """Weights 1, 1/2, 1/4 … of the supervised levels, the coarsest 0, summing to 1 (nnU-Net's deep supervision)."""
    weights = [0.5**level for level in range(levels)]
    if levels > 1:
        weights[-1] = 0.0
    return [w / sum(weights) for w in weights]


def supervised_loss(
    outputs: list[Tensor],
    labels: Tensor,
    *,
    batch_dice: bool,
    regions: Tensor | None,
    choice: Choice = DICE_CE,
    world: World = ALONE,
) -> Tensor:
    """The sum of ``supervised_parts``: what training makes small."""
    parts = supervised_parts(outputs, labels, batch_dice=batch_dice, regions=regions, choice=choice, world=world)
    return torch.stack(list(parts.values())).sum()


def supervised_parts(
    outputs: list[Tensor],
    labels: Tensor,
    *,
    batch_dice: bool,
    regions: Tensor | None,
    choice: Choice = DICE_CE,
    world: World = ALONE,
) -> dict[str, Tensor]:
    """Weighted parts of the loss over the levels of deep supervision, by name: "CE" and "Dice", or the loss's name.

    Labels are taken by nearest neighbour for coarser levels.

    Outputs that are all of one size are those of U-Net++: each of them may be what is used, so they weigh the same.
    The finest logits may be smaller than the labels: those of convolutions without padding, of the patch's centre.
    Outputs and labels are the own share of a batch that the processes of ``world`` share; the loss is that of all.
    """
    labels = _centre(labels, outputs[0].shape[2:])
    one_size = len(outputs) > 1 and all(logits.shape == outputs[0].shape for logits in outputs)
    weights = [1 / len(outputs)] * len(outputs) if one_size else level_weights(len(outputs))
    border = border_weights(labels, choice.spacing) if choice.name == "border-ce" else None
    zero = outputs[0].new_zeros((), dtype=torch.float32)
    parts = dict.fromkeys(("CE", "Dice") if choice.name == "dice-ce" else (choice.name,), zero)
    for logits, weight in zip(outputs, weights, strict=True):
        if weight == 0:
            continue
        level_labels = _nearest(labels, logits.shape[2:])
        if choice.name != "dice-ce":
            level_border = None if border is None else _nearest(border, logits.shape[2:])
            voxels = Voxels.of(logits, level_labels, regions, choice.class_weights, level_border, world)
            values: tuple[Tensor, ...] = (LOSSES[choice.name](voxels, batch_dice, choice.spacing),)
        elif regions is None:
            values = dice_ce_parts(logits, level_labels, batch_dice=batch_dice, world=world)
        else:
            values = dice_bce_parts(logits, level_labels, batch_dice=batch_dice, regions=regions, world=world)
        parts = {name: part + weight * value for (name, part), value in zip(parts.items(), values, strict=True)}
    return parts


def _centre(labels: Tensor, shape: torch.Size) -> Tensor:
    """The middle of (B, ...) labels; of an odd margin the larger part is at the end."""
    for axis, (size, wanted) in enumerate(zip(labels.shape[1:], shape, strict=True), start=1):
        labels = labels.narrow(axis, (size - wanted) // 2, wanted)
    return labels


def _nearest(labels: Tensor, shape: torch.Size) -> Tensor:
    """Values (B, ...) at another resolution, by index: exact for every label."""
    for axis, (size, wanted) in enumerate(zip(labels.shape[1:], shape, strict=True), start=1):
        if size != wanted:
            centres = (torch.arange(wanted, dtype=torch.float64) + 0.5) * size / wanted
            labels = labels.index_select(axis, centres.floor().long().to(labels.device))
    return labels
