"""The loss against MONAI's DiceCELoss set up like nnU-Net's, and regions and ignored voxels against hand counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage as ndi
from tiny_models import make_region_task, make_task
from torch import Tensor

from medseg.training.loss import (
    Choice,
    dice_bce_loss,
    dice_ce_loss,
    level_weights,
    region_table,
    supervised_loss,
    supervised_parts,
)

SHAPES = [(2, 3, 5, 4), (3, 6, 5)]
REGIONS = torch.tensor([[False, True, True, True], [False, False, True, True], [False, False, True, False]])


def sample(shape: tuple[int, ...], classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that follow the labels a little, of a batch of ``shape``, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, shape, generator=generator)
    logits = torch.randn((shape[0], classes, *shape[1:]), generator=generator)
    return logits + 1.5 * F.one_hot(labels, classes).movedim(-1, 1), labels


def monai_loss(logits: Tensor, labels: Tensor, batch_dice: bool) -> Tensor:
    from monai.losses import DiceCELoss

    loss = DiceCELoss(
        include_background=False, softmax=True, to_onehot_y=True, batch=batch_dice, smooth_nr=1e-5, smooth_dr=1e-5
    )
    return loss(logits, labels.unsqueeze(1)) - 1  # MONAI counts 1 - Dice


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [2, 4])
def test_softmax_loss_and_gradient_equal_those_of_monai(shape, classes, batch_dice):
    logits, labels = sample(shape, classes)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, expected = dice_ce_loss(ours, labels, batch_dice=batch_dice), monai_loss(theirs, labels, batch_dice)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_classes_that_are_absent_count_as_in_monai(batch_dice):
    logits, labels = sample((2, 3, 5, 4), 4)
    labels[labels == 2] = 0  # nowhere
    labels[1][labels[1] == 3] = 1  # in one sample only
    found = dice_ce_loss(logits, labels, batch_dice=batch_dice)
    torch.testing.assert_close(found, monai_loss(logits, labels, batch_dice), rtol=1e-6, atol=1e-6)


def test_batch_dice_differs_from_the_dice_of_single_samples():
    logits, labels = sample((2, 3, 5, 4), 3)
    labels[0] = 0
    assert dice_ce_loss(logits, labels, batch_dice=True) != dice_ce_loss(logits, labels, batch_dice=False)


def test_a_perfect_segmentation_costs_minus_one():
    _, labels = sample((2, 3, 5, 4), 3)
    logits = 100.0 * F.one_hot(labels, 3).movedim(-1, 1)
    assert float(dice_ce_loss(logits, labels, batch_dice=True)) == pytest.approx(-1, abs=1e-6)


def test_half_precision_logits_are_computed_in_float32():
    logits, labels = sample((2, 3, 5, 4), 3)
    half = logits.bfloat16()
    found = dice_ce_loss(half, labels, batch_dice=True)
    assert found.dtype == torch.float32
    assert torch.equal(found, dice_ce_loss(half.float(), labels, batch_dice=True))


def region_loss_by_hand(logits: Tensor, labels: Tensor, batch_dice: bool) -> float:
    """Voxel by voxel in Python floats: mean binary cross-entropy minus the mean Dice of the regions."""
    probabilities = torch.sigmoid(logits.double()).numpy()
    targets = REGIONS.numpy()[:, np.maximum(labels.numpy(), 0)]
    valid = labels.numpy() >= 0
    entropy, count = 0.0, 0
    dice = []
    groups = [range(len(labels))] if batch_dice else [[b] for b in range(len(labels))]
    for region in range(len(REGIONS)):
        for group in groups:
            overlap = total = 0.0
            for b in group:
                p, t = probabilities[b, region][valid[b]], targets[region, b][valid[b]]
                entropy -= np.log(np.where(t, p, 1 - p)).sum()
                count += t.size
                overlap += p[t].sum()
                total += p.sum() + t.sum()
            dice.append((2 * overlap + 1e-5) / (total + 1e-5))
    return entropy / count - float(np.mean(dice))


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_region_loss_equals_a_count_by_hand(shape, batch_dice, ignored):
    logits, labels = sample(shape, 4)
    logits = logits[:, :3]
    if ignored:
        labels[0, :2] = -1
    found = dice_bce_loss(logits, labels, batch_dice=batch_dice, regions=REGIONS)
    assert float(found) == pytest.approx(region_loss_by_hand(logits, labels, batch_dice), rel=1e-5)


def test_the_region_table_tells_which_class_belongs_to_which_region():
    table = region_table(make_region_task())
    assert table is not None
    assert torch.equal(table, REGIONS)
    assert region_table(make_task(3)) is None


def loss_of(kind: str, logits: Tensor, labels: Tensor, batch_dice: bool) -> Tensor:
    if kind == "classes":
        return dice_ce_loss(logits, labels, batch_dice=batch_dice)
    return dice_bce_loss(logits[:, :3], labels, batch_dice=batch_dice, regions=REGIONS)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("kind", ["classes", "regions"])
def test_ignored_voxels_have_no_gradient_and_do_not_change_the_loss(kind, batch_dice):
    logits, labels = sample((2, 3, 5, 4), 4)
    ignored = torch.rand(labels.shape, generator=torch.Generator().manual_seed(7)) < 0.4
    labels[ignored] = -1
    logits.requires_grad_()
    loss = loss_of(kind, logits, labels, batch_dice)
    loss.backward()
    assert not logits.grad.movedim(1, -1)[ignored].any()
    assert logits.grad.movedim(1, -1)[~ignored][:, :3].all()
    other = logits.detach().clone()
    other.movedim(1, -1)[ignored] = 30 * torch.randn(int(ignored.sum()), 4, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(loss_of(kind, other, labels, batch_dice), loss.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_ignoring_voxels_equals_a_batch_that_never_had_them(batch_dice):
    logits, labels = sample((2, 3, 5, 4), 4)
    labels[:, :, 3:] = -1
    found = dice_ce_loss(logits, labels, batch_dice=batch_dice)
    expected = monai_loss(logits[:, :, :, :3], labels[:, :, :3], batch_dice)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("kind", ["classes", "regions"])
def test_a_batch_that_is_ignored_whole_counts_as_perfect_and_teaches_nothing(kind, batch_dice):
    logits, labels = sample((2, 3, 5, 4), 4)
    logits.requires_grad_()
    loss = loss_of(kind, logits, torch.full_like(labels, -1), batch_dice)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-1)
    assert not logits.grad.any()


@pytest.mark.parametrize("kind", ["classes", "regions"])
def test_huge_logits_keep_loss_and_gradient_finite(kind):
    logits, labels = sample((2, 3, 5, 4), 4)
    logits = (logits * 1e4).requires_grad_()
    loss = loss_of(kind, logits, labels, True)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    ("levels", "weights"),
    [(1, [1]), (2, [1, 0]), (3, [2 / 3, 1 / 3, 0]), (5, [8 / 15, 4 / 15, 2 / 15, 1 / 15, 0])],
)
def test_levels_weigh_half_of_the_finer_one_and_the_coarsest_nothing(levels, weights):
    assert level_weights(levels) == pytest.approx(weights)


def downsampled(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Nearest neighbour by scipy, at the centres of the coarser voxels."""
    zoomed = [
        ndi.zoom(one, [m / n for m, n in zip(shape, one.shape, strict=True)], order=0, mode="nearest", grid_mode=True)
        for one in labels.numpy()
    ]
    return torch.from_numpy(np.stack(zoomed))


@pytest.mark.parametrize("sizes", [[(6, 8, 4), (6, 4, 2), (3, 2, 2)], [(9, 6), (3, 6), (3, 2)]])
def test_deep_supervision_adds_the_levels_with_labels_taken_by_nearest_neighbour(sizes):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (2, *sizes[0]), generator=generator)
    outputs = [torch.randn(2, 3, *size, generator=generator) for size in sizes]
    found = supervised_loss(outputs, labels, batch_dice=True, regions=None)
    expected = 2 / 3 * monai_loss(outputs[0], labels, True)
    expected += 1 / 3 * monai_loss(outputs[1], downsampled(labels, sizes[1]), True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_coarser_labels_are_those_of_torch_nearest_exact_and_keep_ignored_voxels():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(-1, 4, (2, 6, 8, 10), generator=generator)
    coarse = torch.randn(2, 4, 3, 8, 5, generator=generator)
    nearest = F.interpolate(labels[:, None].float(), (3, 8, 5), mode="nearest-exact")[:, 0].long()
    outputs = [torch.zeros(2, 4, 6, 8, 10), coarse, torch.zeros(2, 4, 3, 4, 5)]
    found = supervised_loss(outputs, labels, batch_dice=False, regions=None)
    expected = 2 / 3 * dice_ce_loss(outputs[0], labels, batch_dice=False)
    expected += 1 / 3 * dice_ce_loss(coarse, nearest, batch_dice=False)
    torch.testing.assert_close(found, expected)


def test_deep_supervision_uses_the_regions_of_the_task():
    logits, labels = sample((2, 3, 5, 4), 4)
    found = supervised_loss([logits[:, :3]], labels, batch_dice=True, regions=REGIONS)
    assert torch.equal(found, dice_bce_loss(logits[:, :3], labels, batch_dice=True, regions=REGIONS))


def test_the_parts_of_the_loss_are_cross_entropy_and_dice_and_add_up_to_it():
    logits, labels = sample((2, 3, 5, 4), 3)
    parts = supervised_parts([logits], labels, batch_dice=True, regions=None)
    assert parts["CE"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert (parts["CE"] + parts["Dice"]).item() == pytest.approx(dice_ce_loss(logits, labels, batch_dice=True).item())
    assert -1 < parts["Dice"].item() < 0
    levels = [logits, logits[:, :, ::2, ::2, ::2]]
    whole = supervised_loss(levels, labels, batch_dice=True, regions=None)
    parts = supervised_parts(levels, labels, batch_dice=True, regions=None)
    assert sum(part.item() for part in parts.values()) == pytest.approx(whole.item(), rel=1e-6)


def test_a_loss_of_one_piece_has_one_part():
    logits, labels = sample((2, 3, 5, 4), 3)
    parts = supervised_parts([logits], labels, batch_dice=True, regions=None, choice=Choice("iou"))
    assert list(parts) == ["iou"]
