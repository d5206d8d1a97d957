"""Every loss against MONAI's, against a count by hand, and at the edges: empty, full and ignored patches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_configuration
from torch import Tensor

from medseg.records.network import NetworkPlan
from medseg.records.training import LOSS_NAMES
from medseg.training.border import SIGMA, W0, border_weights, signed_distances
from medseg.training.loss import DICE_CE, Choice, dice_ce_loss, supervised_loss
from medseg.training.losses import LOSSES, Voxels, boundary_term

SHAPES = [(2, 3, 5, 4), (3, 6, 5)]
REGIONS = torch.tensor([[False, True, True, True], [False, False, True, True], [False, False, True, False]])
WEIGHTS = (0.2, 1.0, 0.7, 2.1)
OTHERS = [name for name in LOSS_NAMES if name != "dice-ce"]


def sample(shape: tuple[int, ...], classes: int = 4) -> tuple[Tensor, Tensor]:
    """Logits that follow the labels a little, and labels."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, classes, shape, generator=generator)
    logits = torch.randn((shape[0], classes, *shape[1:]), generator=generator)
    return logits + 1.5 * F.one_hot(labels, classes).movedim(-1, 1), labels


def loss(name: str, logits: Tensor, labels: Tensor, *, batch: bool = True, regions: Tensor | None = None) -> Tensor:
    choice = Choice(name, WEIGHTS, (1.0,) * (labels.ndim - 1))
    return supervised_loss([logits], labels, batch_dice=batch, regions=regions, choice=choice)


def monais(name: str, batch: bool, sigmoid: bool):
    from monai import losses

    kind = {"sigmoid": True} if sigmoid else {"softmax": True, "to_onehot_y": True}
    overlap = {"include_background": sigmoid, "batch": batch, "smooth_nr": 1e-5, "smooth_dr": 1e-5, **kind}
    exact = {"include_background": True, "batch": batch, "smooth_nr": 0, "smooth_dr": 0, **kind}
    return {
        "dice": lambda: losses.DiceLoss(**overlap),
        "iou": lambda: losses.DiceLoss(jaccard=True, **overlap),
        "tversky": lambda: losses.TverskyLoss(alpha=0.3, beta=0.7, **overlap),
        "generalized-dice": lambda: losses.GeneralizedDiceLoss(**exact),
    }[name]()


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["dice", "iou", "tversky", "generalized-dice"])
def test_overlaps_equal_those_of_monai(name, shape, batch, sigmoid):
    logits, labels = sample(shape)
    ours = (logits[:, :3] if sigmoid else logits).clone().requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    target = REGIONS[:, labels].movedim(0, 1).float() if sigmoid else labels.unsqueeze(1)
    found = loss(name, ours, labels, batch=batch, regions=REGIONS if sigmoid else None)
    expected = monais(name, batch, sigmoid)(theirs, target)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropies_equal_those_of_torch(shape):
    logits, labels = sample(shape)
    labels[0, :2] = -1
    weights = torch.tensor(WEIGHTS)
    torch.testing.assert_close(loss("ce", logits, labels), F.cross_entropy(logits, labels, ignore_index=-1))
    expected = F.cross_entropy(logits, labels, weights, ignore_index=-1)
    torch.testing.assert_close(loss("weighted-ce", logits, labels), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_focal_loss_is_monais_summed_over_classes(shape):
    from monai.losses import FocalLoss

    logits, labels = sample(shape)
    monai = FocalLoss(gamma=2.0, use_softmax=True, to_onehot_y=True, reduction="sum")
    expected = monai(logits, labels.unsqueeze(1)) / len(labels)  # it takes the mean over space before
    torch.testing.assert_close(loss("focal", logits, labels), expected)
    both = expected + monais("dice", True, False)(logits, labels.unsqueeze(1))
    torch.testing.assert_close(loss("dice-focal", logits, labels), both)
    sigmoid = FocalLoss(gamma=2.0)(logits[:, :3], REGIONS[:, labels].movedim(0, 1).float())
    torch.testing.assert_close(loss("focal", logits[:, :3], labels, regions=REGIONS), sigmoid)


@pytest.mark.parametrize("regions", [None, REGIONS])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_boundary_term_equals_that_of_monai(shape, regions):
    from monai.losses import BoundaryLoss

    logits, labels = sample(shape)
    labels[1] = 0  # absent classes have no border
    if regions is None:
        expected = BoundaryLoss(include_background=False, softmax=True, to_onehot_y=True)(logits, labels.unsqueeze(1))
    else:
        logits = logits[:, :3]
        expected = BoundaryLoss(sigmoid=True)(logits, REGIONS[:, labels].movedim(0, 1).float())
    found = boundary_term(Voxels.of(logits, labels, regions, None, None))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_top_k_is_the_mean_of_the_hardest_tenth_of_the_voxels():
    logits, labels = sample((2, 3, 5, 4))
    labels[0, 0] = -1
    hardest = np.sort(F.cross_entropy(logits, labels, ignore_index=-1, reduction="none").numpy().ravel())[::-1]
    count = int(0.1 * int((labels >= 0).sum()))
    expected = hardest[:count].mean() + float(loss("dice", logits, labels))
    assert float(loss("dice-topk", logits, labels)) == pytest.approx(expected, rel=1e-5)


def test_one_output_for_one_region_is_trained_by_binary_cross_entropy():
    logits, labels = sample((2, 6, 5), classes=2)
    single, region = logits[:, :1], torch.tensor([[False, True]])
    choice = Choice("ce")
    found = supervised_loss([single], labels, batch_dice=True, regions=region, choice=choice)
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(single[:, 0], labels.float()))


def border_by_hand(labels: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """For each background voxel the distances to all voxels of all objects, one by one."""
    from skimage.measure import label

    objects = []
    for value in np.unique(labels[labels > 0]):
        numbered = label(labels == value, connectivity=1)
        objects += [np.argwhere(numbered == n) * spacing for n in range(1, numbered.max() + 1)]
    weights = np.zeros(labels.shape)
    for place in np.argwhere(labels == 0):
        distances = sorted(float(np.linalg.norm(o - place * spacing, axis=1).min()) for o in objects)
        if len(distances) > 1:
            weights[tuple(place)] = W0 * math.exp(-((distances[0] + distances[1]) ** 2) / (2 * SIGMA**2))
    return weights


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (2.5, 1.0)])
def test_background_between_objects_weighs_as_a_search_through_all_distances_says(spacing):
    labels = np.zeros((23, 40), np.int64)
    labels[3:9, 4:12], labels[5:12, 14:20], labels[15:21, 30:38] = 1, 2, 1
    labels[0, :3] = -1
    found = border_weights(torch.from_numpy(labels)[None], spacing)[0].numpy()
    np.testing.assert_allclose(found, border_by_hand(labels, spacing), atol=0.004)
    assert found[6, 13] > 5  # between two that nearly touch
    assert not found[labels != 0].any()


def test_patches_without_a_second_object_have_no_border():
    labels = torch.zeros((2, 5, 6, 7), dtype=torch.int64)
    labels[1, 2:4, 3:5, 1:3] = 1
    assert not border_weights(labels).any()


def test_distances_respect_the_spacing_and_ignored_voxels():
    target = torch.zeros((1, 1, 4, 6), dtype=torch.bool)
    target[0, 0, 2, 2:5] = True
    valid = torch.ones_like(target)
    valid[..., 5] = False
    found = signed_distances(target, valid, (3.0, 1.0))[0, 0]
    assert found[0, 3] == 6
    assert found[2, 0] == 2
    assert found[2, 2] == 0
    assert not found[:, 5].any()


@pytest.mark.parametrize("regions", [None, REGIONS])
@pytest.mark.parametrize("name", OTHERS)
def test_empty_full_and_ignored_patches_have_finite_gradients(name, regions):
    logits, labels = sample((2, 3, 5, 4))
    logits = logits if regions is None else logits[:, :3]
    for fill in (0, 2, -1):
        for scale in (1, 1e4):
            given = (logits * scale).detach().requires_grad_()
            value = loss(name, given, torch.full_like(labels, fill), regions=regions)
            value.backward()
            assert torch.isfinite(value)
            assert torch.isfinite(given.grad).all()
            if fill == -1:
                assert not given.grad.any()


@pytest.mark.parametrize("regions", [None, REGIONS])
@pytest.mark.parametrize("name", OTHERS)
def test_ignored_voxels_have_no_gradient_and_do_not_change_the_loss(name, regions):
    logits, labels = sample((2, 3, 5, 4))
    logits = logits if regions is None else logits[:, :3]
    ignored = torch.rand(labels.shape, generator=torch.Generator().manual_seed(7)) < 0.4
    labels[ignored] = -1
    given = logits.clone().requires_grad_()
    value = loss(name, given, labels, regions=regions)
    value.backward()
    assert not given.grad.movedim(1, -1)[ignored].any()
    assert given.grad.any()
    other = logits.clone()
    other.movedim(1, -1)[ignored] += 20
    torch.testing.assert_close(loss(name, other, labels, regions=regions), value.detach())


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "boundary"])
def test_a_perfect_segmentation_costs_nothing(name):
    _, labels = sample((2, 3, 5, 4))
    logits = 60.0 * F.one_hot(labels, 4).movedim(-1, 1)
    assert float(loss(name, logits, labels)) == pytest.approx(0, abs=1e-5)


def test_the_default_is_dice_and_cross_entropy_to_the_last_bit():
    logits, labels = sample((2, 3, 5, 4))
    found = supervised_loss([logits], labels, batch_dice=True, regions=None)
    assert torch.equal(found, dice_ce_loss(logits, labels, batch_dice=True))
    assert DICE_CE.name == "dice-ce"
    assert set(LOSSES) == set(OTHERS)


def test_heads_of_one_size_weigh_the_same():
    logits, labels = sample((2, 6, 5))
    outputs = [logits, 2 * logits, 3 * logits]
    expected = sum(dice_ce_loss(one, labels, batch_dice=True) for one in outputs) / 3
    torch.testing.assert_close(supervised_loss(outputs, labels, batch_dice=True, regions=None), expected)


def test_logits_of_the_centre_are_compared_with_the_labels_of_the_centre():
    logits, labels = sample((2, 6, 5))
    around = torch.zeros((2, 11, 8), dtype=torch.int64)
    around[:, 2:8, 1:6] = labels
    found = supervised_loss([logits], around, batch_dice=True, regions=None)
    torch.testing.assert_close(found, dice_ce_loss(logits, labels, batch_dice=True))


def test_a_plan_names_its_loss_and_the_spacing_is_relative():
    network = NetworkPlan(
        features=(2,), kernels=((3, 3, 3),), strides=((1, 1, 1),), convs_encoder=(1,), convs_decoder=()
    )
    configuration = make_configuration((4, 4, 4), network, loss="border-ce", class_weights=(0.5, 1.5, 1.0))
    assert Choice.of(configuration) == Choice("border-ce", (0.5, 1.5, 1.0), (2.5, 1.25, 1.0))
    assert "loss" not in make_configuration((4, 4, 4), network).to_json()["training"]
