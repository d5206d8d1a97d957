"""Loss: soft Dice + cross-entropy with nnU-Net's semantics, over the levels of deep supervision.

Softmax tasks: CE is the mean over all voxels that are not ignored; Dice leaves the background out, adds 1e-5 to
numerator and denominator, and takes its sums per sample or, with batch Dice, over the whole batch. Tasks with regions:
one sigmoid per region, binary CE, Dice over all regions. The loss is CE - Dice: -1 is perfect.
(Source of the rules: nnU-Net v2, ``DC_and_CE_loss``, ``DC_and_BCE_loss`` and ``MemoryEfficientSoftDiceLoss``.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.records.task import Task

SMOOTH = 1e-5
IGNORE = -1


def dice_ce_loss(logits: Tensor, labels: Tensor, *, batch_dice: bool) -> Tensor:
    """Softmax loss of one level.

    Args:
        logits: (B, classes, [Z,] Y, X), any float type; computed in float32.
        labels: (B, [Z,] Y, X) int64 class indices, -1 = ignored.
        batch_dice: sum over the batch before the quotient.

    Returns:
        Scalar float32; -1 with a gradient of 0 if every voxel is ignored: there is nothing to get wrong.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    valid = labels != IGNORE
    target = labels.clamp_min(0).unsqueeze(1)
    picked = log_probabilities.gather(1, target).squeeze(1)
    cross_entropy = -(picked * valid).sum() / valid.sum().clamp_min(1)
    probabilities = log_probabilities[:, 1:].exp() * valid.unsqueeze(1)
    classes = torch.arange(1, logits.shape[1], device=labels.device).view(1, -1, *[1] * (labels.ndim - 1))
    return cross_entropy - _soft_dice(probabilities, (labels.unsqueeze(1) == classes), batch_dice)


def dice_bce_loss(logits: Tensor, labels: Tensor, *, batch_dice: bool, regions: Tensor) -> Tensor:
    """Sigmoid loss of one level. ``regions`` (regions, classes) bool tells which class belongs to which region."""
    valid = (labels != IGNORE).unsqueeze(1)
    target = regions.to(labels.device)[:, labels.clamp_min(0)].movedim(0, 1)
    logits = logits.float()
    elementwise = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    cross_entropy = (elementwise * valid).sum() / (valid.sum() * target.shape[1]).clamp_min(1)
    return cross_entropy - _soft_dice(logits.sigmoid() * valid, target & valid, batch_dice)


def _soft_dice(probabilities: Tensor, target: Tensor, batch_dice: bool) -> Tensor:
    """Mean soft Dice of (B, N, ...) probabilities and bool targets, ignored voxels already 0 in both."""
    axes = tuple(range(2, target.ndim)) if not batch_dice else (0, *range(2, target.ndim))
    intersection = (probabilities * target).sum(axes)
    total = probabilities.sum(axes) + target.sum(axes)
    return ((2 * intersection + SMOOTH) / (total + SMOOTH).clamp_min(1e-8)).mean()


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


def supervised_loss(outputs: list[Tensor], labels: Tensor, *, batch_dice: bool, regions: Tensor | None) -> Tensor:
    """Weighted loss over the levels of deep supervision; labels are taken by nearest neighbour for coarser levels."""
    loss = outputs[0].new_zeros((), dtype=torch.float32)
    for logits, weight in zip(outputs, level_weights(len(outputs)), strict=True):
        if weight == 0:
            continue
        level_labels = _nearest(labels, logits.shape[2:])
        if regions is None:
            loss = loss + weight * dice_ce_loss(logits, level_labels, batch_dice=batch_dice)
        else:
            loss = loss + weight * dice_bce_loss(logits, level_labels, batch_dice=batch_dice, regions=regions)
    return loss


def _nearest(labels: Tensor, shape: torch.Size) -> Tensor:
    """Labels (B, ...) at another resolution, by index: exact for every integer value."""
    for axis, (size, wanted) in enumerate(zip(labels.shape[1:], shape, strict=True), start=1):
        if size != wanted:
            centres = (torch.arange(wanted, dtype=torch.float64) + 0.5) * size / wanted
            labels = labels.index_select(axis, centres.floor().long().to(labels.device))
    return labels
