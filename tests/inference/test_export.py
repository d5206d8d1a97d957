"""Export: labels equal the naive interpolation of whole logits with skimage and scipy, however small the slabs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage as ndi
from skimage.transform import resize
from tiny_models import make_preparation, make_region_task, make_task

from medseg.inference import export
from medseg.inference.export import decide, labels_from_logits
from medseg.records.plan import Resampling

REGION_TASK = make_region_task()


def full_logits(
    logits: np.ndarray, shape: tuple[int, ...], axis: int | None, order: int = 1, order_z: int = 0
) -> np.ndarray:
    """Every logit on the full grid: all axes together, or slice by slice and then along ``axis``."""
    if logits.shape[1:] == shape:
        return logits
    return np.stack([_full(channel, shape, axis, order, order_z) for channel in logits.astype(np.float64)])


def _full(volume: np.ndarray, shape: tuple[int, ...], axis: int | None, order: int, order_z: int) -> np.ndarray:
    if axis is None:
        return resize(volume, shape, order=order, mode="edge", anti_aliasing=False, preserve_range=True, clip=False)
    plane = tuple(n for a, n in enumerate(shape) if a != axis)
    slices = np.stack(
        [
            resize(s, plane, order=order, mode="edge", anti_aliasing=False, preserve_range=True, clip=False)
            for s in np.moveaxis(volume, axis, 0)
        ]
    )
    n, m = volume.shape[axis], shape[axis]
    positions = np.meshgrid((np.arange(m) + 0.5) * n / m - 0.5, *map(np.arange, plane), indexing="ij")
    return np.moveaxis(ndi.map_coordinates(slices, positions, order=order_z, mode="nearest"), 0, axis)


def disagreements(labels: np.ndarray, logits: np.ndarray, task, doubt: float = 1e-5) -> int:
    """Voxels whose label differs from the naive decision although the logits leave no doubt."""
    if task.regions:
        expected = np.zeros(labels.shape, np.int16)
        for region, value in zip(logits, task.regions_order, strict=True):
            expected[region > 0] = task.values.index(value)
        clear = (np.abs(logits) > doubt).all(0)
    else:
        expected = logits.argmax(0)
        ranked = np.sort(logits, axis=0)
        clear = ranked[-1] - ranked[-2] > doubt
    assert clear.mean() > 0.9
    return int((labels != expected)[clear].sum())


SPACINGS = [  # network, file, the axis that is interpolated on its own
    ((2.0, 1.0, 0.8), (1.7, 1.2, 0.9), None),
    ((5.0, 1.0, 0.8), (5.0, 1.2, 0.9), 0),
    ((1.0, 1.2, 6.0), (1.1, 1.0, 5.0), 2),
    ((1.5, 1.2, 1.0), (1.1, 7.0, 1.0), 1),
    ((6.0, 1.0, 1.0), (1.0, 1.0, 8.0), 0),  # the network's grid decides first
    ((5.0, 5.0, 1.0), (1.0, 1.0, 1.0), None),  # two coarse axes: together
]


@pytest.mark.parametrize("seed", range(50))
def test_labels_equal_the_naive_full_resolution_interpolation(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    target_spacing, spacing, axis = SPACINGS[seed % len(SPACINGS)]
    small, large = tuple(rng.integers(1, 9, 3).tolist()), tuple(rng.integers(1, 15, 3).tolist())
    if seed % 7 == 0:
        large = small
    if seed % 5 == 0:
        large = (large[0], *small[1:])
    task = REGION_TASK if seed % 4 == 0 else make_task(int(rng.integers(2, 6)))
    logits = rng.normal(size=(task.outputs, *small)).astype(np.float32)
    order, order_z = (int(rng.integers(0, 2)) for _ in range(2))
    resampling = Resampling(probability_order=order, probability_order_z=order_z)
    monkeypatch.setattr(export, "SLAB_BYTES", int(rng.choice([1, 4 * task.outputs * large[1] * large[2] * 2, 10**9])))
    labels = labels_from_logits(
        torch.from_numpy(logits), make_preparation(small, large, spacing, target_spacing), resampling, task
    )
    assert labels.shape == large
    assert labels.dtype == np.int16
    expected = full_logits(logits, large, axis, order, order_z)
    assert disagreements(labels, expected, task) == 0


@pytest.mark.parametrize(("force", "axis"), [(True, 1), (False, None)])
def test_the_separate_axis_can_be_forced_or_forbidden(force, axis):
    rng = np.random.default_rng(1)
    small, large = (4, 5, 6), (7, 9, 8)
    spacing, target_spacing = ((4.0, 1.0, 1.0), (1.0, 2.0, 1.0)) if force else ((5.0, 1.0, 1.0), (5.0, 1.0, 1.2))
    logits = rng.normal(size=(3, *small)).astype(np.float32)
    labels = labels_from_logits(
        torch.from_numpy(logits),
        make_preparation(small, large, spacing, target_spacing),
        Resampling(force_separate_z=force),
        make_task(3),
    )
    assert disagreements(labels, full_logits(logits, large, axis), make_task(3)) == 0


@pytest.mark.parametrize("outputs", [2, 3])
def test_a_larger_volume_agrees_too(outputs):
    rng = np.random.default_rng(2)
    small, large = (9, 61, 47), (13, 213, 181)
    logits = ndi.gaussian_filter(rng.normal(size=(outputs, *small)), (0, 0.5, 1, 1)).astype(np.float32)
    labels = labels_from_logits(
        torch.from_numpy(logits), make_preparation(small, large), Resampling(), make_task(outputs)
    )
    assert disagreements(labels, full_logits(logits, large, None), make_task(outputs)) == 0


def test_logits_on_the_grid_of_the_file_are_only_decided():
    logits = np.random.default_rng(3).normal(size=(4, 5, 3, 7)).astype(np.float32)
    preparation = make_preparation((5, 3, 7), None, (5.0, 1.0, 1.0), (5.0, 1.0, 1.0))
    labels = labels_from_logits(torch.from_numpy(logits), preparation, Resampling(), make_task(4))
    assert np.array_equal(labels, logits.argmax(0))


def test_logits_are_not_changed():
    logits = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    kept = logits.clone()
    labels_from_logits(logits, make_preparation((4, 5, 6), (7, 9, 8)), Resampling(), make_task(3))
    assert torch.equal(logits, kept)


def test_never_more_than_a_slab_is_on_the_resolution_of_the_file(monkeypatch):
    sizes = []
    original = export.decide

    def watch(logits, task):
        sizes.append(logits.numel() * 4)
        return original(logits, task)

    monkeypatch.setattr(export, "decide", watch)
    monkeypatch.setattr(export, "SLAB_BYTES", 4 * 3 * 20 * 30 * 5)
    labels_from_logits(torch.zeros(3, 4, 5, 6), make_preparation((4, 5, 6), (23, 20, 30)), Resampling(), make_task(3))
    assert sizes == [4 * 3 * 20 * 30 * rows for rows in (5, 5, 5, 5, 3)]


def test_the_largest_logit_is_the_class_and_the_first_of_equal_ones():
    logits = torch.tensor([[0.1, 2.0, -1.0, 5.0], [0.3, 2.0, -3.0, 4.0], [0.2, 1.0, -1.0, 6.0]]).view(1, 3, 2, 2)
    assert decide(logits, make_task(3)).tolist() == [[[1, 0], [0, 2]]]


def test_regions_are_painted_in_order_where_they_are_likelier_than_not():
    """Classes 0, 2, 4, 7 have the indices 0 to 3; the regions are painted with 2, 7 and 4."""
    cases = {
        (-1.0, -1.0, -1.0): 0,
        (1.0, -1.0, -1.0): 1,
        (1.0, 1.0, -1.0): 3,
        (1.0, 1.0, 1.0): 2,
        (-1.0, 1.0, -1.0): 3,  # core without whole
        (1.0, -1.0, 1.0): 2,
        (9.0, 0.1, -9.0): 3,  # how likely does not matter, only the order
        (0.0, 0.0, 0.0): 0,  # one half is not more than one half
    }
    logits = torch.tensor(list(cases)).T.reshape(1, 3, 1, 2, 4)
    found = decide(logits, REGION_TASK)
    assert found.dtype == torch.int16
    assert found.flatten().tolist() == list(cases.values())
