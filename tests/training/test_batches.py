"""Batches: a pure function of seed and step, fair to cases and classes, inside the volume, honest about errors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import FLAT_KERNELS, TWO_D, make_configuration, make_task, store_blobs, store_case

from medseg.errors import IntegrityError
from medseg.training import batches
from medseg.training.augment import Augmentation, Box, Intensity, apply_spatial
from medseg.training.batches import Batch, Sampling, batch_threads, make_batch, stream
from medseg.training.warp import LARGEST_SPREAD, Elastic, Spatial

PATCH = (4, 8, 6)
SAMPLING = Sampling(PATCH, batch_size=3, foreground_share=1 / 3, mirror_axes=(0, 1, 2), seed=7, flat=False, jitter=0.25)
SHAPES = [(9, 14, 11), (7, 16, 10), (10, 12, 13), (8, 15, 12)]
NOTHING = Augmentation(None, Intensity(None, *[(None,)] * 6, noise_seed=0), ())


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return store_blobs(tmp_path_factory.mktemp("store"), SHAPES)


@pytest.fixture
def unchanged(monkeypatch):
    """No augmentation: patches are cut out as they are."""
    monkeypatch.setattr(batches, "draw", lambda rng, geometry, channels, mirror_axes: NOTHING)


def numbered_case(folder, labels: np.ndarray, case_id: str = "numbered", dimensions: int = 3):
    """A case whose voxels hold their own linear index plus 1, so that a patch tells where it was cut."""
    image = np.arange(1, labels.size + 1, dtype=np.float32).reshape(1, *labels.shape)
    return store_case(folder, case_id, image, labels.astype(np.int16), dimensions).load()


def starts_of(batch: Batch, shape: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """Where the patches of a numbered case were cut; their voxels must be those of the volume."""
    volume = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    found = []
    for image in batch.image[:, 0].numpy():
        start = tuple(int(n) for n in np.unravel_index(int(image[0, 0, 0]) - 1, shape))
        box = tuple(slice(s, s + p) for s, p in zip(start, image.shape, strict=True))
        assert np.array_equal(image, volume[box])
        found.append(start)
    return found


def equal(a: Batch, b: Batch) -> bool:
    return (a.step, a.cases) == (b.step, b.cases) and torch.equal(a.image, b.image) and torch.equal(a.labels, b.labels)


def test_a_stream_begun_at_a_step_gives_the_batches_of_one_begun_at_zero(cases):
    from_zero = list(islice(stream(cases, SAMPLING, 0), 9))
    from_five = list(islice(stream(cases, SAMPLING, 5), 4))
    assert [b.step for b in from_zero] == list(range(9))
    assert all(equal(a, b) for a, b in zip(from_zero[5:], from_five, strict=True))
    assert equal(from_zero[6], make_batch(cases, SAMPLING, 6))
    assert not torch.equal(from_zero[0].image, from_zero[1].image)


def test_cases_on_disk_and_in_memory_give_the_same_batches(tmp_path):
    loaded = store_blobs(tmp_path, SHAPES)
    on_disk = [type(case)(tmp_path, case.record) for case in loaded]
    assert all(equal(make_batch(loaded, SAMPLING, step), make_batch(on_disk, SAMPLING, step)) for step in range(6))


def test_the_number_of_threads_changes_nothing_and_stays_what_it_was(cases):
    before = torch.get_num_threads()
    found = []
    try:
        for of_torch, of_batches in ((1, 1), (2, 1), (1, 3), (2, 5)):
            torch.set_num_threads(of_torch)
            with_threads = stream(cases, replace(SAMPLING, patch=(8, 12, 10)), 0, of_batches)
            found.append([*islice(with_threads, 8), make_batch(cases, SAMPLING, 3)])
            with_threads.close()
            assert torch.get_num_threads() == of_torch
    finally:
        torch.set_num_threads(before)
    assert all(equal(first, other) for first, *others in zip(*found, strict=True) for other in others)


def test_another_seed_gives_other_batches(cases):
    assert not equal(make_batch(cases, SAMPLING, 0), make_batch(cases, replace(SAMPLING, seed=8), 0))


def test_global_generators_are_neither_used_nor_moved(cases):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before, torch_before = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    first = make_batch(cases, SAMPLING, 2)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    torch.manual_seed(2)
    assert equal(first, make_batch(cases, SAMPLING, 2))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
def test_every_case_comes_once_per_round_and_rounds_differ(cases, batch_size, unchanged):
    sampling = replace(SAMPLING, batch_size=batch_size)
    dealt = [case for step in range(60) for case in make_batch(cases, sampling, step).cases]
    rounds = [tuple(dealt[i : i + 4]) for i in range(0, len(dealt) - 3, 4)]
    assert all(sorted(r) == ["case_0", "case_1", "case_2", "case_3"] for r in rounds)
    assert len(set(rounds)) > 8


def test_shapes_and_types_are_those_of_a_batch(cases):
    batch = make_batch(cases, SAMPLING, 0)
    assert (batch.image.shape, batch.image.dtype) == ((3, 1, *PATCH), torch.float32)
    assert (batch.labels.shape, batch.labels.dtype) == ((3, *PATCH), torch.int64)
    assert batch.image.is_contiguous()
    assert batch.labels.is_contiguous()


def test_patches_that_are_not_forced_lie_anywhere_and_inside(tmp_path, unchanged):
    shape = (6, 10, 9)
    case = numbered_case(tmp_path, np.zeros(shape))
    found = [s for step in range(200) for s in starts_of(make_batch([case], SAMPLING, step), shape)]
    for axis in range(3):
        counts = Counter(start[axis] for start in found)
        assert sorted(counts) == list(range(shape[axis] - PATCH[axis] + 1))
        assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_forced_samples_hold_a_voxel_of_each_class_equally_often(tmp_path, unchanged):
    shape = (12, 20, 18)
    labels = np.zeros(shape)
    labels[1:5, 2:9, 3:12] = 1  # large
    labels[11, 19, 0] = 2  # one voxel, in a corner
    case = numbered_case(tmp_path, labels)
    sampling = replace(SAMPLING, foreground_share=1.0)
    held = Counter()
    for step in range(100):
        batch = make_batch([case], sampling, step)
        starts_of(batch, shape)  # inside
        for patch in batch.labels:
            assert patch.any()
            held[2 if (patch == 2).any() else 1] += 1
    assert stats.binomtest(held[2], 300, 0.5).pvalue > 1e-4


def test_a_forced_voxel_lies_near_the_middle_where_the_volume_has_room(tmp_path, unchanged):
    shape = (24, 40, 36)
    labels = np.zeros(shape)
    labels[12, 20, 18] = 1
    case = numbered_case(tmp_path, labels)
    places = []
    for step in range(60):
        for patch in make_batch([case], replace(SAMPLING, foreground_share=1.0), step).labels:
            ((z, y, x),) = patch.nonzero().tolist()
            places.append((z, y, x))
    low, high = np.min(places, axis=0), np.max(places, axis=0)
    middle, quarter = np.array(PATCH) / 2, np.array(PATCH) / 4
    assert (low >= middle - quarter).all()
    assert (high <= middle + quarter).all()
    assert (low < high).all()  # it wanders


@pytest.mark.parametrize(
    ("batch_size", "share", "forced"),
    [(2, 1 / 3, 1), (3, 1 / 3, 1), (7, 1 / 3, 2), (9, 1 / 3, 3), (4, 0, 0), (4, 1, 4)],
)
def test_the_last_samples_of_a_batch_are_forced(cases, monkeypatch, batch_size, share, forced):
    seen = []
    original = batches._patch_start

    def watch(rng, case, volume, patch, forced):
        seen.append(forced)
        return original(rng, case, volume, patch, forced)

    monkeypatch.setattr(batches, "_patch_start", watch)
    make_batch(cases, replace(SAMPLING, batch_size=batch_size, foreground_share=share), 0)
    assert seen == [False] * (batch_size - forced) + [True] * forced


def test_volumes_smaller_than_the_patch_are_centred_in_zeros(tmp_path, unchanged):
    shape = (3, 5, 20)
    labels = np.ones(shape)
    case = numbered_case(tmp_path, labels)
    batch = make_batch([case], SAMPLING, 0)
    volume = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    for image, label in zip(batch.image[:, 0].numpy(), batch.labels.numpy(), strict=True):
        inner = image[0:3, 1:6]  # one row of zeros below in z; one before and two after in y
        x = int(inner[0, 0, 0]) - 1
        expected = np.pad(volume[:, :, x : x + 6], ((0, 1), (1, 2), (0, 0)))
        assert np.array_equal(image, expected)
        assert np.array_equal(label, expected > 0)


def test_a_volume_of_one_voxel_gives_a_batch(tmp_path):
    case = store_case(tmp_path, "dot", np.full((1, 1, 1, 1), 2.5, np.float32), np.ones((1, 1, 1), np.int16)).load()
    for step in range(30):
        batch = make_batch([case], SAMPLING, step)
        assert torch.isfinite(batch.image).all()
        assert batch.labels.sum() <= np.prod(PATCH)


def test_a_case_without_foreground_is_sampled_anywhere(tmp_path, unchanged):
    shape = (6, 10, 9)
    case = numbered_case(tmp_path, np.zeros(shape))
    found = {
        s
        for step in range(60)
        for s in starts_of(make_batch([case], replace(SAMPLING, foreground_share=1), step), shape)
    }
    assert len(found) > 20


def test_sparse_labels_are_sampled_where_somebody_annotated(tmp_path, unchanged):
    shape = (16, 30, 28)
    labels = np.full(shape, -1)
    labels[9, 4:8, 20:23] = 0
    labels[3, 25, 2:5] = 1
    case = numbered_case(tmp_path, labels)
    seen = Counter()
    for step in range(60):
        batch = make_batch([case], replace(SAMPLING, foreground_share=0.0), step)
        starts_of(batch, shape)
        for patch in batch.labels:
            assert (patch >= 0).any()
            seen[(patch == 1).any().item()] += 1
    assert stats.binomtest(seen[True], 180, 3 / 15).pvalue > 1e-4  # 3 of the 15 annotated voxels


def test_forced_samples_of_sparse_labels_hold_foreground(tmp_path, unchanged):
    labels = np.full((16, 30, 28), -1)
    labels[9, 4:8, 20:23] = 0
    labels[3, 25, 2:5] = 1
    case = numbered_case(tmp_path, labels)
    for step in range(20):
        batch = make_batch([case], replace(SAMPLING, foreground_share=1.0), step)
        assert all((patch == 1).any() for patch in batch.labels)


def test_a_2d_configuration_gives_slices(tmp_path, unchanged):
    shape = (5, 12, 11)
    case = numbered_case(tmp_path, np.zeros(shape), dimensions=2)
    sampling = Sampling.of(make_configuration((8, 6), TWO_D, batch_size=4, mirror_axes=(0, 1)), make_task(2), seed=3)
    assert (sampling.patch, sampling.mirror_axes, sampling.flat) == ((1, 8, 6), (1, 2), True)
    slices = set()
    for step in range(20):
        batch = make_batch([case], sampling, step)
        assert (batch.image.shape, batch.labels.shape) == ((4, 1, 8, 6), (4, 8, 6))
        slices |= {z for z, _, _ in starts_of(replace(batch, image=batch.image.unsqueeze(2)), shape)}
    assert slices == set(range(5))


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(1, 1, 1), (2, 1, 1), (4, 1, 3), (16, 1, 6), (16, 4, 3), (4, 8, 1)]
)
def test_batches_for_a_gpu_are_made_on_the_cores_it_leaves_idle(monkeypatch, cores, processes, threads):
    monkeypatch.setattr(batches, "usable_cores", lambda: cores)
    assert batch_threads(torch.device("cuda", 0), processes) == threads
    assert batch_threads(torch.device("cpu"), processes) == 1


def test_everything_is_drawn_before_anything_is_read(cases, monkeypatch):
    """So that no more is read than the drawn map needs."""
    order = []
    for name in ("draw", "draw_disturbance", "_box"):
        original = getattr(batches, name)
        monkeypatch.setattr(batches, name, lambda *args, f=original, n=name: order.append(n) or f(*args))
    make_batch(cases, replace(SAMPLING, batch_size=6, previous_classes=0), 0)
    assert order == ["draw", "_box"] * 6


def test_no_more_is_read_than_the_patch_where_it_is_neither_turned_nor_scaled(cases, monkeypatch):
    sizes = []
    original = batches._box

    def watch(*arguments):
        image, labels = original(*arguments)
        sizes.append(image.shape[1:])
        return image, labels

    monkeypatch.setattr(batches, "_box", watch)
    for step in range(30):
        make_batch(cases, SAMPLING, step)
    assert sizes.count(PATCH) / len(sizes) == pytest.approx(0.64, abs=0.15)


def test_patches_chosen_at_both_borders_are_moved_inside(tmp_path, unchanged):
    """A voxel in the first corner and one in the last."""
    shape = (9, 17, 15)
    labels = np.zeros(shape)
    labels[0, 0, 0] = labels[-1, -1, -1] = 1
    case = numbered_case(tmp_path, labels)
    found = Counter()
    for step in range(30):
        found.update(starts_of(make_batch([case], replace(SAMPLING, foreground_share=1.0), step), shape))
    last = tuple(n - p for n, p in zip(shape, PATCH, strict=True))
    assert set(found) == {(0, 0, 0), last}


def test_a_3d_plan_becomes_a_sampling():
    configuration = make_configuration(PATCH, FLAT_KERNELS, 5, foreground_share=0.5, mirror_axes=(0, 2))
    assert Sampling.of(configuration, make_task(2), 9) == Sampling(PATCH, 5, 0.5, (0, 2), 9, False)


def test_flips_turn_image_and_labels_alike(tmp_path, monkeypatch):
    shape = (4, 8, 6)
    labels = np.arange(np.prod(shape)).reshape(shape) % 5
    case = numbered_case(tmp_path, labels)
    monkeypatch.setattr(batches, "draw", lambda *arguments: replace(NOTHING, flips=(0, 2)))
    batch = make_batch([case], replace(SAMPLING, batch_size=1), 0)
    assert np.array_equal(batch.image[0, 0].numpy(), np.asarray(case.image[0])[::-1, :, ::-1])
    assert np.array_equal(batch.labels[0].numpy(), labels[::-1, :, ::-1])


def test_what_lies_outside_the_mask_of_a_channel_stays_0_whatever_is_done_to_it(tmp_path, monkeypatch):
    shape = (4, 8, 6)
    image = np.random.default_rng(0).normal(2, 1, (2, *shape)).astype(np.float32)
    image[:, :, :3] = 0  # outside
    case = store_case(tmp_path, "case", image, np.zeros(shape, np.int16)).load()
    intensity = Intensity(0.1, ((1.0, 0.8, 0.6),) * 2, *[(v,) * 2 for v in (1.2, 0.8, 0.5, 1.4, 0.7)], noise_seed=3)
    monkeypatch.setattr(batches, "draw", lambda *arguments: replace(NOTHING, intensity=intensity))
    batch = make_batch([case], replace(SAMPLING, batch_size=1, masked=(1,)), 0)
    assert (batch.image[0, 0, :, :3] != 0).all()
    assert (batch.image[0, 1, :, :3] == 0).all()
    assert (batch.image[0, 1, :, 3:] != 0).all()


@pytest.mark.parametrize(
    "spatial",
    [
        Spatial((0.4, -0.5, 0.3), 1.4, False),
        Spatial((-0.5, 0.2, 0.5), 0.7, False),
        Spatial((2.0, 0, 0), 1.2, True),
        Spatial((0, 0, 0), 1.0, False, Elastic(LARGEST_SPREAD, 0)),
        Spatial((0.4, -0.5, 0.3), 1.4, False, Elastic(LARGEST_SPREAD, 1)),
        Spatial((2.0, 0, 0), 1.2, True, Elastic(LARGEST_SPREAD, 2)),
    ],
)
def test_reading_only_the_box_that_is_needed_equals_sampling_the_whole_volume(cases, monkeypatch, spatial):
    monkeypatch.setattr(batches, "draw", lambda *arguments: replace(NOTHING, spatial=spatial))
    starts = []
    original = batches._patch_start

    def watch(*arguments):
        starts.append(original(*arguments))
        return starts[-1]

    monkeypatch.setattr(batches, "_patch_start", watch)
    for step in range(8):
        batch = make_batch(cases, SAMPLING, step)
        for index, name in enumerate(batch.cases):
            case = next(c for c in cases if c.record.id == name)
            image, labels = torch.from_numpy(case.image[:]), torch.from_numpy(case.labels[:]).long()
            z, y, x = (s + (p - 1) / 2 for s, p in zip(starts[3 * step + index], PATCH, strict=True))
            values = tuple(value for value in labels.unique().tolist() if value)
            wanted, wanted_labels = apply_spatial(Box(image, labels[None], (values,), (z, y, x)), spatial, PATCH)
            torch.testing.assert_close(batch.image[index], wanted, rtol=1e-4, atol=1e-4)
            assert float((batch.labels[index] != wanted_labels[0]).float().mean()) < 0.01  # ties


@pytest.mark.parametrize("elastic", [0.0, 1.0])
def test_labels_stay_on_their_structures_under_any_spatial_map(tmp_path, monkeypatch, elastic):
    from medseg.training.augment import draw as original

    def spatial_only(*arguments):
        return replace(original(*arguments), intensity=NOTHING.intensity)

    sampling = replace(SAMPLING, elastic=elastic)
    monkeypatch.setattr(batches, "draw", spatial_only)
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 2, (4, 6, 5)).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    case = store_case(tmp_path, "twin", coarse[None].astype(np.float32), coarse.astype(np.int16)).load()
    for step in range(40):
        batch = make_batch([case], sampling, step)
        inside = (batch.image[:, 0] - 0.5).abs() > 1e-3
        assert torch.equal((batch.image[:, 0] > 0.5)[inside], (batch.labels == 1)[inside])


def test_an_error_while_making_a_batch_reaches_the_caller(tmp_path):
    case = store_blobs(tmp_path, SHAPES[:1])[0]
    on_disk = type(case)(tmp_path, case.record)
    (tmp_path / "case_0.image.b2nd").write_bytes(b"no array")
    running = stream([on_disk], SAMPLING, 0)
    with pytest.raises(IntegrityError, match=r"E0701.*case=case_0"):
        next(running)


def test_batches_before_an_error_are_still_given(cases):
    broken = SimpleNamespace(record=SimpleNamespace(id="broken"), foreground={})  # has no image
    order = [batches._case_index(5, replace(SAMPLING, batch_size=1), step, 0) for step in range(5)]
    running = stream([*cases, broken], replace(SAMPLING, batch_size=1), 0)
    for step in range(order.index(4)):
        assert next(running).step == step
    with pytest.raises(AttributeError, match="image"):
        next(running)


def test_a_stream_that_is_closed_leaves_no_thread_behind(cases):
    import threading

    running = stream(cases, SAMPLING, 0)
    next(running)
    assert any(t.name.startswith("medseg-batches") for t in threading.enumerate())
    running.close()
    assert not any(t.name.startswith("medseg-batches") for t in threading.enumerate())
