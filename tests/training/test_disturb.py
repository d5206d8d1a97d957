"""Disturbance of a first stage's labels: skimage's balls with scipy's morphology as oracle, nnU-Net's frequencies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage as ndi
from scipy import stats
from skimage.morphology import ball

from medseg.training.disturb import OPERATIONS, Disturbance, Morphology, Removal, disturb, draw_disturbance

SHAPE = (9, 21, 16)


def blobs(seed: int = 0) -> np.ndarray:
    """Three classes in pieces of different sizes."""
    smooth = ndi.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 1.5)
    return np.digitize(smooth, np.quantile(smooth, (0.6, 0.8, 0.92))).astype(np.int64)


def by_scipy(mask: np.ndarray, operation: str, radius: int) -> np.ndarray:
    """The patch's surroundings count as neither inside nor outside: dilation pads with 0, erosion with 1."""

    def grow(m):
        return ndi.binary_dilation(m, ball(radius))

    def shrink(m):
        return ndi.binary_erosion(m, ball(radius), border_value=1)

    return {
        "dilate": grow,
        "erode": shrink,
        "open": lambda m: grow(shrink(m)),
        "close": lambda m: shrink(grow(m)),
    }[operation](mask)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("radius", [1, 2, 4])
def test_operations_are_those_of_scipy_with_a_ball(operation, radius):
    mask = blobs() == 2
    assert np.array_equal(OPERATIONS[operation](mask, float(radius)), by_scipy(mask, operation, radius))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mask", [np.zeros(SHAPE, bool), np.ones(SHAPE, bool)], ids=["empty", "full"])
def test_operations_leave_empty_and_full_masks_as_they_are(operation, mask):
    assert np.array_equal(OPERATIONS[operation](mask, 3.0), mask)


def test_a_class_that_grows_takes_voxels_and_one_that_shrinks_leaves_background():
    labels = blobs()
    grown = disturb(labels, Disturbance((Morphology(3, "dilate", 2.0),)))
    assert np.array_equal(grown == 3, by_scipy(labels == 3, "dilate", 2))
    assert np.array_equal(grown[grown != 3], labels[grown != 3])
    shrunk = disturb(labels, Disturbance((Morphology(1, "erode", 1.0),)))
    lost = (labels == 1) & ~by_scipy(labels == 1, "erode", 1)
    assert lost.any()
    assert np.array_equal(shrunk, np.where(lost, 0, labels))


def test_one_component_goes_and_never_a_large_one():
    labels = np.zeros(SHAPE, np.int64)
    labels[0:9, 0:10, 0:9] = 1  # 27 % of the patch
    labels[2, 15, 3:7] = labels[5, 18, 11] = 1
    left = [disturb(labels, Disturbance((), (Removal(1, place),))) for place in (0.0, 0.499, 0.5, 0.999)]
    sizes = [int((labels != one).sum()) for one in left]
    assert sizes == [4, 4, 1, 1]
    only_large = np.where(np.arange(9)[:, None, None] >= 0, labels, 0)
    only_large[2, 15, 3:7] = only_large[5, 18, 11] = 0
    assert np.array_equal(disturb(only_large, Disturbance((), (Removal(1, 0.3),))), only_large)


def test_labels_that_are_not_there_are_no_trouble_and_the_input_stays():
    labels = blobs()
    kept = labels.copy()
    everything = Disturbance(tuple(Morphology(9, operation, 3.0) for operation in OPERATIONS), (Removal(9, 0.5),))
    assert np.array_equal(disturb(labels, everything), labels)
    disturb(labels, Disturbance((Morphology(1, "dilate", 3.0),), (Removal(2, 0.1),)))
    assert np.array_equal(labels, kept)


def test_disturbances_are_as_frequent_as_in_nnunet():
    rng = np.random.default_rng(5)
    drawn = [draw_disturbance(rng, 4) for _ in range(4000)]
    labels = [[step.label for step in one.morphology] for one in drawn]
    removed = [[step.label for step in one.removals] for one in drawn]
    for label in (1, 2, 3):
        assert stats.binomtest(sum(label in one for one in labels), 4000, 0.4 * 0.5).pvalue > 1e-4
        assert stats.binomtest(sum(label in one for one in removed), 4000, 0.2 * 0.5).pvalue > 1e-4
    steps = [step for one in drawn for step in one.morphology]
    assert {step.operation for step in steps} == set(OPERATIONS)
    assert stats.kstest([step.radius for step in steps], stats.uniform(1, 7).cdf).pvalue > 1e-4
    assert all(len(set(one)) == len(one) and 0 not in one for one in [*labels, *removed])


def test_equal_generators_draw_equally():
    draws = [draw_disturbance(np.random.default_rng(8), 5) for _ in range(2)]
    assert draws[0] == draws[1]
