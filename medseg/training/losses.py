"""Losses: what one level may be trained with, by name. 0 is perfect; voxels with the ignore label count in none.

Softmax tasks leave the background out of overlaps, but for the generalised Dice. Where MONAI has the loss the numbers
are MONAI's, without ignored voxels; ``tests/training/test_losses.py`` compares them. Where several processes share a
batch, every sum is taken over all of it: the value is that of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.records.training import LossName
from medseg.training.border import signed_distances
from medseg.training.world import ALONE, World

SMOOTH = 1e-5
IGNORE = -1
FOCUS = 2.0  # γ of the focal loss (Lin et al. 2017, arXiv 1708.02002)
FALSE_POSITIVE, FALSE_NEGATIVE = 0.3, 0.7  # α and β of the Tversky loss (Salehi et al. 2017, arXiv 1706.05721)
HARDEST = 0.1  # share of the voxels that top-k looks at (nnU-Net: DC_and_topk_loss, k = 10)
BOUNDARY_SHARE = 0.1  # weight of the boundary term beside Dice

Spacing = tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Voxels:
    """One level, ready for every loss.

    ``logits`` (B, N, ...) float32; ``target`` (B, N, ...) bool, one-hot classes or regions, False where ignored;
    ``valid`` (B, 1, ...) bool; ``weight`` (B, 1, ...) float32 or None: of each voxel in ``weighted-ce``, ``border-ce``.
    ``world``: the processes that have the other samples of the batch.
    """

    logits: Tensor
    target: Tensor
    valid: Tensor
    sigmoid: bool
    weight: Tensor | None
    world: World = ALONE

    @classmethod
    def of(
        cls,
        logits: Tensor,
        labels: Tensor,
        regions: Tensor | None,
        class_weights: tuple[float, ...] | None,
        border: Tensor | None,
        world: World = ALONE,
    ) -> Voxels:
        """From logits of any float type and (B, ...) int64 class indices, -1 = ignored.

        Args:
            logits: (B, N, ...).
            labels: (B, ...).
            regions: (regions, classes) bool; None: softmax over classes.
            class_weights: one for each class.
            border: (B, ...) float32, added to the weight of the voxel's class.
            world: the processes that share the batch.
        """
        valid, known = labels != IGNORE, labels.clamp_min(0)
        if regions is None:
            target = known.unsqueeze(1) == torch.arange(logits.shape[1], device=labels.device).view(
                1, -1, *[1] * (labels.ndim - 1)
            )
        else:
            target = regions.to(labels.device)[:, known].movedim(0, 1)
        weight = None
        if class_weights is not None or border is not None:
            weight = torch.ones(labels.shape, device=labels.device)
            if class_weights is not None:
                weight = torch.tensor(class_weights, device=labels.device)[known]
            weight = (weight if border is None else weight + border).unsqueeze(1)
        there = valid.unsqueeze(1)
        return cls(logits.float(), target & there, there, regions is not None, weight, world)

    def probabilities(self) -> Tensor:
        """(B, N, ...), 0 where ignored."""
        return (self.logits.sigmoid() if self.sigmoid else self.logits.softmax(1)) * self.valid

    def overlaps(self, batch: bool, *, background: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """True positives, false positives and false negatives of classes or regions, soft.

        (B, N) of the own samples, or (N,) of the whole batch.
        """
        first = 0 if self.sigmoid or background else 1
        probabilities, target = self.probabilities()[:, first:], self.target[:, first:]
        axes = (0, *range(2, target.ndim)) if batch else tuple(range(2, target.ndim))
        hit, predicted, there = (probabilities * target).sum(axes), probabilities.sum(axes), target.sum(axes)
        if batch:
            hit, predicted, there = self.world.sums(hit, predicted, there)
        return hit, predicted - hit, there - hit

    def surprise(self) -> Tensor:
        """Cross-entropy of each voxel: (B, 1, ...) with softmax, (B, N, ...) with sigmoid; 0 where ignored."""
        if self.sigmoid:
            values = F.binary_cross_entropy_with_logits(self.logits, self.target.float(), reduction="none")
        else:
            values = -(self.logits.log_softmax(1) * self.target).sum(1, keepdim=True)
        return values * self.valid

    def mean(self, values: Tensor) -> Tensor:
        """Mean of (B, 1 or N, ...) values, 0 where ignored, over the voxels that are not."""
        total, count = self.world.sums(values.sum(), self.valid.sum() * values.shape[1])
        return total / count.clamp_min(1)

    def mean_overlap(self, values: Tensor, batch: bool) -> Tensor:
        """Mean of what ``overlaps`` gave, of the own samples or already of the whole batch."""
        return values.mean() if batch else self.world.mean(values)


def soft_dice(probabilities: Tensor, target: Tensor, batch_dice: bool, world: World = ALONE) -> Tensor:
    """Mean soft Dice of (B, N, ...) probabilities and bool targets, ignored voxels already 0 in both."""
    axes = tuple(range(2, target.ndim)) if not batch_dice else (0, *range(2, target.ndim))
    intersection = (probabilities * target).sum(axes)
    total = probabilities.sum(axes) + target.sum(axes)
    if batch_dice:
        intersection, total = world.sums(intersection, total)
    values = (2 * intersection + SMOOTH) / (total + SMOOTH).clamp_min(1e-8)
    return values.mean() if batch_dice else world.mean(values)


def dice(voxels: Voxels, batch: bool, spacing: Spacing = None) -> Tensor:
    """1 - soft Dice (Milletari et al. 2016, arXiv 1606.04797)."""
    hit, false_positive, false_negative = voxels.overlaps(batch)
    overlap = (2 * hit + SMOOTH) / (2 * hit + false_positive + false_negative + SMOOTH)
    return 1 - voxels.mean_overlap(overlap, batch)


def iou(voxels: Voxels, batch: bool, spacing: Spacing = None) -> Tensor:
    """1 - soft intersection over union (Jaccard)."""
    hit, false_positive, false_negative = voxels.overlaps(batch)
    return 1 - voxels.mean_overlap((hit + SMOOTH) / (hit + false_positive + false_negative + SMOOTH), batch)


def tversky(voxels: Voxels, batch: bool, spacing: Spacing = None) -> Tensor:
    """1 - soft Tversky index, in which what is missed costs more than what is too much."""
    hit, false_positive, false_negative = voxels.overlaps(batch)
    wrong = FALSE_POSITIVE * false_positive + FALSE_NEGATIVE * false_negative
    return 1 - voxels.mean_overlap((hit + SMOOTH) / (hit + wrong + SMOOTH), batch)


def generalised_dice(voxels: Voxels, batch: bool, spacing: Spacing = None) -> Tensor:
    """Dice of all classes together, each weighed by its squared size (Sudre et al. 2017, arXiv 1707.03237).

    A class that is absent weighs as much as the smallest that is there. Weights are divided by the largest, or the
    smoothing would outweigh large structures: so the numbers are MONAI's without smoothing.
    """
    hit, false_positive, false_negative = (v.reshape(-1, v.shape[-1]) for v in voxels.overlaps(batch, background=True))
    size = (hit + false_negative).detach()
    weight = torch.where(size > 0, 1 / size.clamp_min(1).square(), 0.0)
    most = weight.amax(1, keepdim=True)
    weight = torch.where(size > 0, weight / most.clamp_min(1e-30), 1.0)
    both = ((2 * hit + false_positive + false_negative) * weight).sum(1)
    return 1 - voxels.mean_overlap((2 * (hit * weight).sum(1) + SMOOTH) / (both + SMOOTH), batch)


def cross_entropy(voxels: Voxels, batch: bool, spacing: Spacing = None) -> Tensor:
    """Mean cross-entropy; of regions, and of one output for one region, binary cross-entropy."""
    return voxels.mean(voxels.surprise())


def weighted_cross_entropy(voxels: Voxels, batch: bool, spacing: Spacing = None) -> Tensor:
    """Mean cross-entropy in which each voxel counts by its weight."""
    if voxels.weight is None:
        return cross_entropy(voxels, batch)
    surprise, weight = voxels.surprise(), voxels.weight * voxels.valid
    total, count = voxels.world.sums((surprise * weight).sum(), weight.sum() * surprise.shape[1])
    return total / count.clamp_min(1e-8)


def border_cross_entropy(voxels: Voxels, batch: bool, spacing: Spacing = None) -> Tensor:
    """Mean over voxels of weight · cross-entropy, the weights being those of ``border_weights`` plus the class's.

    Unlike in ``weighted-ce`` the weights are not divided out: where objects touch, a step is larger.
    """
    assert voxels.weight is not None  # supervised_loss gives them
    return voxels.mean(voxels.surprise() * voxels.weight)


def focal(voxels: Voxels, batch: bool, spacing: Spacing = None) -> Tensor:
    """Mean of (1 - p)^γ · cross-entropy, p the probability of what is right: easy voxels hardly count."""
    surprise = voxels.surprise()
    return voxels.mean((-torch.expm1(-surprise)).clamp_min(0) ** FOCUS * surprise)


def dice_focal(voxels: Voxels, batch: bool, spacing: Spacing = None) -> Tensor:
    """Dice + focal."""
    return dice(voxels, batch) + focal(voxels, batch)


def dice_topk(voxels: Voxels, batch: bool, spacing: Spacing = None) -> Tensor:
    """Dice + mean cross-entropy of the hardest tenth of the voxels."""
    surprise = voxels.surprise()
    (valid,) = voxels.world.sums(voxels.valid.sum())
    count = max(1, int(HARDEST * int(valid) * surprise.shape[1]))
    return dice(voxels, batch) + mean_of_largest(surprise.flatten(), count, voxels.world)


def mean_of_largest(values: Tensor, count: int, world: World = ALONE) -> Tensor:
    """Mean of the ``count`` largest of the values of all processes; equal ones at the edge share what is left."""
    largest = values.topk(min(count, values.numel())).values
    if world.size == 1:
        return largest.mean()
    padding = largest.new_full((count - largest.numel(),), -torch.inf)
    edge = world.gather(torch.cat((largest, padding))).flatten().topk(count).values[-1]
    beyond, at_edge = values > edge, values == edge
    total, number, equal, equals = world.sums(
        (values * beyond).sum(), beyond.sum(), at_edge.sum(), (values * at_edge).sum()
    )
    return (total + (count - number) * equals / equal.clamp_min(1)) / count


def boundary_term(voxels: Voxels, spacing: Spacing = None) -> Tensor:
    """Mean of probability · signed distance to the border, negative inside (Kervadec et al. 2019, arXiv 1812.07032)."""
    first = 0 if voxels.sigmoid else 1
    distances = signed_distances(voxels.target[:, first:], voxels.valid, spacing)
    return voxels.mean(voxels.probabilities()[:, first:] * distances)


def dice_boundary(voxels: Voxels, batch: bool, spacing: Spacing = None) -> Tensor:
    """Dice + a tenth of the boundary term, which alone would be content with nothing; may fall below 0."""
    return dice(voxels, batch) + BOUNDARY_SHARE * boundary_term(voxels, spacing)


LOSSES: dict[LossName, Callable[[Voxels, bool, Spacing], Tensor]] = {  # "dice-ce" is in loss.py
    "dice": dice,
    "ce": cross_entropy,
    "weighted-ce": weighted_cross_entropy,
    "focal": focal,
    "dice-focal": dice_focal,
    "iou": iou,
    "tversky": tversky,
    "generalized-dice": generalised_dice,
    "dice-topk": dice_topk,
    "border-ce": border_cross_entropy,
    "boundary": dice_boundary,
}
