"""Export: labels equal the naive interpolation of whole logits with skimage and scipy, however small the slabs."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import ndimage as ndi
from skimage.transform import resize
from tiny_models import make_preparation, make_region_task, make_task
from torch._subclasses.fake_tensor import FakeTensorMode

from medseg.inference.export import (
    Ready,
    decide,
    decide_rows_there,
    interpolate,
    interpolation,
    labels_from_logits,
    labels_from_slabs,
    portions,
    ready_rows,
)
from medseg.records.plan import Resampling
from medseg.records.preparation import Preparation
from medseg.records.task import Task

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


def disagreements(labels: np.ndarray, logits: np.ndarray, task: Task, least: float = 0.9) -> int:
    """Voxels whose label differs from the naive decision although the logits leave no doubt."""
    doubt = 1e-5 * max(1.0, float(np.abs(logits).max()))
    if task.regions:
        expected = np.zeros(labels.shape, np.int16)
        for region, value in zip(logits, task.regions_order, strict=True):
            expected[region > 0] = task.values.index(value)
        clear = (np.abs(logits) > doubt).all(0)
    else:
        expected = logits.argmax(0)
        ranked = np.sort(logits, axis=0)
        clear = ranked[-1] - ranked[-2] > doubt
    assert clear.mean() > least - 1e-9
    return int((labels != expected)[clear].sum())


SPACINGS = [  # network, file, the axis that is interpolated on its own
    ((2.0, 1.0, 0.8), (1.7, 1.2, 0.9), None),
    ((5.0, 1.0, 0.8), (5.0, 1.2, 0.9), 0),
    ((1.0, 1.2, 6.0), (1.1, 1.0, 5.0), 2),
    ((1.5, 1.2, 1.0), (1.1, 7.0, 1.0), 1),
    ((6.0, 1.0, 1.0), (1.0, 1.0, 8.0), 0),  # the network's grid decides first
    ((5.0, 5.0, 1.0), (1.0, 1.0, 1.0), None),  # two coarse axes: together
]


def in_slabs(logits: np.ndarray, rng: np.random.Generator) -> list[torch.Tensor]:
    """The logits cut at random rows, as the sliding window gives them."""
    depth = logits.shape[1]
    cuts = [0, *np.unique(rng.integers(1, depth, 3)).tolist(), depth] if depth > 1 else [0, depth]
    return [torch.from_numpy(logits[:, a:b]) for a, b in itertools.pairwise(cuts)]


def fuzzed(seed: int) -> tuple[np.ndarray, Task, Preparation, Resampling, int | None]:
    """Logits of a random task between random grids, size-1 axes, separate axes and ties among them."""
    rng = np.random.default_rng(seed)
    target_spacing, spacing, axis = SPACINGS[seed % len(SPACINGS)]
    small, large = tuple(rng.integers(1, 9, 3).tolist()), tuple(rng.integers(1, 15, 3).tolist())
    if seed % 7 == 0:
        large = small
    if seed % 5 == 0:
        large = (large[0], *small[1:])
    task = REGION_TASK if seed % 4 == 0 else make_task(int(rng.integers(2, 14)))
    logits = rng.normal(size=(task.outputs, *small)).astype(np.float32)
    if seed % 3 == 0:
        logits = np.round(logits * (seed % 11) / 2)  # many equal ones
    elif seed % 3 == 1:
        logits += 30 * rng.normal(size=small)[None] + rng.integers(0, 2, logits.shape) * 1e-6  # all but equal
        logits = logits.astype(np.float32) if seed % 2 else np.sort(logits.astype(np.float32), axis=0)
    order, order_z = (int(rng.integers(0, 2)) for _ in range(2))
    resampling = Resampling(probability_order=order, probability_order_z=order_z)
    return logits, task, make_preparation(small, large, spacing, target_spacing), resampling, axis


def along(volume: np.ndarray, axis: int, m: int, order: int) -> np.ndarray:
    """One axis of (outputs, Z, Y, X) in float32: the sum of two neighbours times their weights, or the nearest."""
    n = volume.shape[axis]
    if n == m:
        return volume
    position = (np.arange(m) + 0.5) * (n / m) - 0.5
    if order == 0:
        return np.take(volume, np.clip(np.floor(position + 0.5).astype(int), 0, n - 1), axis)
    position = np.clip(position, 0, n - 1)
    low = np.floor(position).astype(int)
    share = (position - low).reshape([-1 if a == axis else 1 for a in range(4)])
    upper = np.take(volume, np.minimum(low + 1, n - 1), axis) * share.astype(np.float32)
    return np.take(volume, low, axis) * (1 - share).astype(np.float32) + upper


def check_to_the_bit(seed: int) -> None:
    """Labels equal those of all logits interpolated in float32 with the first of the largest, and in slabs too."""
    logits, task, preparation, resampling, axis = fuzzed(seed)
    full = logits
    for place, size in enumerate(preparation.cropped_shape):
        separate = axis == place and preparation.target_shape != preparation.cropped_shape
        order = resampling.probability_order_z if separate else resampling.probability_order
        full = along(full, 1 + place, size, order)
    assert full.dtype == np.float32
    expected = decide(torch.from_numpy(full)[None], task)[0].numpy()
    found = labels_from_logits(torch.from_numpy(logits), preparation, resampling, task)
    np.testing.assert_array_equal(found, expected, err_msg=f"seed {seed}")
    slabs = in_slabs(logits, np.random.default_rng(seed))
    found = labels_from_slabs(slabs, preparation, resampling, task)
    np.testing.assert_array_equal(found, expected, err_msg=f"seed {seed} in slabs")
    way, found = interpolation(preparation, resampling), np.empty_like(expected)
    for ready in ready_rows(slabs, way.axes[0]):
        decide_rows_there(ready, way, task, found[ready.rows])
    np.testing.assert_array_equal(found, expected, err_msg=f"seed {seed} as on a GPU")


@pytest.mark.parametrize("seed", range(40))
def test_labels_equal_the_naive_full_resolution_interpolation(seed):
    logits, task, preparation, resampling, axis = fuzzed(seed)
    labels = labels_from_logits(torch.from_numpy(logits), preparation, resampling, task)
    assert labels.shape == preparation.cropped_shape
    assert labels.dtype == np.int16
    orders = resampling.probability_order, resampling.probability_order_z
    expected = full_logits(logits, preparation.cropped_shape, axis, *orders)
    assert disagreements(labels, expected, task, least=0.0) == 0


@pytest.mark.parametrize("start", range(0, 120, 40))
def test_labels_equal_those_of_float32_interpolation_to_the_last_bit_ties_included(start):
    for seed in range(start, start + 40):
        check_to_the_bit(seed)


@pytest.mark.slow
def test_a_thousand_cases_equal_the_naive_way_to_the_last_bit():
    for seed in range(1000):
        check_to_the_bit(seed)


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


def test_every_row_is_decided_once_with_no_more_logits_than_it_needs():
    logits = np.random.default_rng(4).normal(size=(3, 9, 5, 6)).astype(np.float32)
    preparation = make_preparation((9, 5, 6), (23, 20, 30))
    slabs = [torch.from_numpy(logits[:, row : row + 1]) for row in range(9)]
    way = interpolation(preparation, Resampling())
    ready = list(ready_rows(slabs, way.axes[0]))
    assert [part.rows.start for part in ready] == [0, *(part.rows.stop for part in ready[:-1])]
    assert ready[-1].rows.stop == 23
    assert max(part.logits.shape[1] for part in ready) == 2
    whole = Ready(slice(0, 23), torch.from_numpy(logits), 0)
    expected = interpolate(whole, way, slice(0, 23))
    for part in ready:
        assert torch.equal(interpolate(part, way, part.rows), expected[:, part.rows])


def test_memory_does_not_grow_with_the_number_of_classes():
    """Beside the logits themselves: what numpy allocates for 4 and for 40 classes."""
    peaks = []
    for classes in (4, 40):
        logits = torch.randn(classes, 20, 30, 25, generator=torch.Generator().manual_seed(0))
        preparation = make_preparation((20, 30, 25), (40, 90, 70))
        labels_from_logits(logits, preparation, Resampling(), make_task(classes))
        tracemalloc.start()
        labels_from_logits(logits, preparation, Resampling(), make_task(classes))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] < 4e6


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


@pytest.mark.parametrize("task", [make_task(5), REGION_TASK], ids=["classes", "regions"])
def test_on_a_gpu_all_is_done_there(task):
    """Fake tensors refuse to mix devices; only the labels' number type is left to see."""
    preparation = make_preparation((4, 5, 6), (9, 8, 11), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0))
    way = interpolation(preparation, Resampling())
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty((task.outputs, 4, 5, 6), device=torch.device("cuda", 0))
        (ready,) = ready_rows([logits], way.axes[0])
        full = interpolate(ready, way, ready.rows)
        labels = decide(full.unsqueeze(0), task).squeeze(0)
    assert tuple(full.shape) == (task.outputs, 9, 8, 11)
    assert (labels.device.type, labels.dtype, tuple(labels.shape)) == ("cuda", torch.int16, (9, 8, 11))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_labels_made_on_a_gpu_are_those_made_on_the_cpu():
    for seed in range(40):
        logits, task, preparation, resampling, _ = fuzzed(seed)
        there = labels_from_logits(torch.from_numpy(logits).cuda(), preparation, resampling, task)
        here = labels_from_logits(torch.from_numpy(logits), preparation, resampling, task)
        np.testing.assert_array_equal(there, here, err_msg=f"seed {seed}")


def test_portions_keep_to_the_memory_given():
    way = interpolation(make_preparation((4, 5, 6), (9, 8, 11), (1.0,) * 3, (2.0,) * 3), Resampling())
    row = 4 * 3 * 8 * 11
    assert list(portions(slice(2, 9), 3 * row, 3, way)) == [slice(2, 5), slice(5, 8), slice(8, 9)]
    assert list(portions(slice(0, 2), 1, 3, way)) == [slice(0, 1), slice(1, 2)]
