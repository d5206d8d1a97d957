"""Augmentation: every operation against scipy, labels against their own indicators, frequencies by binomial tests."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage as ndi
from scipy import stats
from torch import Tensor

from medseg.training.augment import (
    Augmentation,
    Box,
    Geometry,
    Intensity,
    apply_intensity,
    apply_spatial,
    draw,
)
from medseg.training.warp import Spatial

PLAIN = Intensity(None, *[(None,)] * 6, noise_seed=0)
BOX = (7, 12, 10)
PATCH = (5, 8, 6)


def image_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels_of(shape: tuple[int, ...], values: tuple[int, ...] = (0, 1, 3), seed: int = 0) -> Tensor:
    """Blocks of 2 × 3 × 2 voxels of one value each."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(
        0, len(values), [math.ceil(n / b) for n, b in zip(shape, (2, 3, 2), strict=True)], generator=generator
    )
    fine = coarse.repeat_interleave(2, 0).repeat_interleave(3, 1).repeat_interleave(2, 2)
    return torch.tensor(values)[fine[: shape[0], : shape[1], : shape[2]]]


def offset_of(box: tuple[int, ...], shift: tuple[float, ...] = (0, 0, 0)) -> Tensor:
    """The middle of a box, moved."""
    return torch.tensor([(n - 1) / 2 + s for n, s in zip(box, shift, strict=True)], dtype=torch.float64)


def by_scipy(volume: np.ndarray, spatial: Spatial, offset: Tensor, patch: tuple[int, ...]) -> np.ndarray:
    """Order 1, zeros all around the box."""
    matrix = spatial.matrix()
    start = offset.numpy() - matrix @ ((np.array(patch) - 1) / 2)
    return ndi.affine_transform(
        volume.astype(np.float64), matrix, start, output_shape=patch, order=1, mode="grid-constant", cval=0
    )


def sampled(image, labels, offset, spatial, patch):
    """``apply_spatial`` for a single label map."""
    values = tuple(value for value in labels.unique().tolist() if value)
    z, y, x = offset.tolist()
    found, maps = apply_spatial(Box(image, labels[None], (values,), (z, y, x)), spatial, patch)
    return found, maps[0]


def test_the_identity_reproduces_the_patch():
    image, labels = image_of((2, *BOX)), labels_of(BOX)
    # box 7, 12, 10 about its middle: 1..5, 2..9, 2..7
    found, found_labels = sampled(image, labels, offset_of(BOX), Spatial((0, 0, 0), 1.0, False), PATCH)
    torch.testing.assert_close(found, image[:, 1:6, 2:10, 2:8], rtol=1e-5, atol=1e-5)
    assert torch.equal(found_labels, labels[1:6, 2:10, 2:8])


@pytest.mark.parametrize(
    ("axis", "plane", "patch"), [(0, (1, 2), (4, 7, 5)), (1, (0, 2), (7, 4, 5)), (2, (0, 1), (7, 5, 4))]
)
def test_a_quarter_turn_about_one_axis_turns_the_other_two(axis, plane, patch):
    turned_patch = list(patch)
    turned_patch[plane[0]], turned_patch[plane[1]] = patch[plane[1]], patch[plane[0]]
    image, labels = image_of((2, *patch)), labels_of(patch)
    angles = [0.0, 0.0, 0.0]
    angles[axis] = math.pi / 2
    spatial = Spatial((angles[0], angles[1], angles[2]), 1.0, False)
    found, found_labels = sampled(image, labels, offset_of(patch), spatial, tuple(turned_patch))
    turned = {turns: torch.rot90(image, turns, [p + 1 for p in plane]) for turns in (1, -1)}
    (turns,) = [turns for turns, expected in turned.items() if torch.allclose(found, expected, atol=1e-4)]
    assert torch.equal(found_labels, torch.rot90(labels, turns, plane))


@pytest.mark.parametrize(
    "spatial",
    [
        Spatial((0, 0, 0), 0.7, False),
        Spatial((0, 0, 0), 1.4, False),
        Spatial((0, 0, 0), 1.3, True),
        Spatial((0.5, -0.3, 0.2), 1.0, False),
        Spatial((2.5, 0, 0), 1.2, True),
        Spatial((0.4, 0.5, -0.5), 0.8, False),
    ],
)
@pytest.mark.parametrize("shift", [(0, 0, 0), (0.5, -2, 1), (-4, 5, 4)])
def test_any_map_samples_the_image_as_scipy_does(spatial, shift):
    image, labels = image_of((2, *BOX)), labels_of(BOX)
    offset = offset_of(BOX, shift)
    found, _ = sampled(image, labels, offset, spatial, PATCH)
    expected = np.stack([by_scipy(channel.numpy(), spatial, offset, PATCH) for channel in image])
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("values", [(0, 1), (0, 1, 3), (-1, 0, 2), (5, 6)])
def test_labels_are_the_largest_of_their_transformed_indicators(values):
    labels = labels_of(BOX, values)
    spatial, offset = Spatial((0.4, 0.3, -0.5), 1.1, False), offset_of(BOX, (1, -2, 0.5))
    _, found = sampled(image_of((1, *BOX)), labels, offset, spatial, PATCH)
    shares = {v: by_scipy((labels == v).numpy(), spatial, offset, PATCH) for v in values if v != 0}
    shares[0] = 1 - sum(shares.values())  # background is whatever is left, outside the box too
    order = list(shares)
    stacked = np.stack([shares[v] for v in order])
    ranked = np.sort(stacked, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-4
    assert clear.mean() > 0.9
    assert np.array_equal(found.numpy()[clear], np.array(order)[stacked.argmax(0)][clear])
    assert set(found.unique().tolist()) <= {0, *values}


def test_a_box_without_foreground_stays_without():
    _, found = sampled(
        image_of((1, *BOX)), torch.zeros(BOX, dtype=torch.int64), offset_of(BOX), Spatial((0.3, 0, 0), 1.2, True), PATCH
    )
    assert not found.any()


def test_a_flat_patch_is_turned_in_plane_only():
    box, patch = (1, 12, 10), (1, 8, 6)
    image, labels = image_of((2, *box)), labels_of(box)
    spatial, offset = Spatial((0.8, 0, 0), 1.2, True), offset_of(box)
    found, _ = sampled(image, labels, offset, spatial, patch)
    expected = np.stack([by_scipy(channel.numpy(), spatial, offset, patch) for channel in image])
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    assert float(found.abs().min()) > 0  # the slice itself, not a mixture with nothing


def test_rotations_keep_lengths_and_zoom_scales_them():
    for flat in (False, True):
        matrix = Spatial((0.3, 0.0 if flat else -0.2, 0.0 if flat else 0.5), 1.3, flat).matrix()
        scale = [1.0 if flat else 1.3, 1.3, 1.3]
        np.testing.assert_allclose(matrix.T @ matrix, np.diag(scale) ** 2, atol=1e-12)
        assert np.linalg.det(matrix) > 0


@pytest.mark.parametrize("sigmas", [(0.5, 0.73, 1.0), (1.0, 1.0, 1.0), (2.4, 0.6, 0.9)])
@pytest.mark.parametrize("shape", [(6, 9, 7), (1, 9, 7), (2, 3, 8)])
def test_blur_equals_scipy_with_replicated_borders(sigmas, shape):
    image = image_of((1, *shape))
    found = apply_intensity(image, replace(PLAIN, blur_sigma=(sigmas,)))
    sigmas = [sigma if n > 1 else 0 for sigma, n in zip(sigmas, shape, strict=True)]
    radius = [math.ceil(3 * sigma) for sigma in sigmas]
    expected = ndi.gaussian_filter(image[0].double().numpy(), sigmas, mode="nearest", radius=radius)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("gamma", [0.7, 1.5])
@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_bends_the_range_and_keeps_mean_and_spread(gamma, inverted):
    image = image_of((2, 4, 6, 5))
    drawn = replace(PLAIN, inverted_gamma=(gamma,) * 2) if inverted else replace(PLAIN, gamma=(gamma,) * 2)
    found = apply_intensity(image, drawn).double().numpy()
    for before, after in zip(image.double().numpy(), found, strict=True):
        x = -before if inverted else before
        unit = (x - x.min()) / (x.max() - x.min())
        bent = unit**gamma * (x.max() - x.min()) + x.min()
        bent = (bent - bent.mean()) / bent.std() * x.std() + x.mean()
        np.testing.assert_allclose(after, -bent if inverted else bent, atol=1e-5)


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_contrast_stretches_about_the_mean_within_the_range(factor):
    image = image_of((2, 4, 6, 5))
    found = apply_intensity(image, replace(PLAIN, contrast=(factor,) * 2))
    for before, after in zip(image.numpy(), found.numpy(), strict=True):
        expected = np.clip((before - before.mean()) * factor + before.mean(), before.min(), before.max())
        np.testing.assert_allclose(after, expected, atol=1e-6)


def test_brightness_multiplies():
    image = image_of((2, 4, 6, 5))
    torch.testing.assert_close(apply_intensity(image, replace(PLAIN, brightness=(1.2, 1.2))), image * 1.2)


def test_noise_is_normal_of_the_drawn_spread_and_follows_the_seed():
    image = image_of((2, 10, 40, 30))
    drawn = replace(PLAIN, noise_std=0.08, noise_seed=5)
    noise = (apply_intensity(image, drawn) - image).flatten().numpy()
    assert stats.kstest(noise[::3] / 0.08, "norm").pvalue > 1e-3
    assert torch.equal(apply_intensity(image, drawn), apply_intensity(image, drawn))
    assert not torch.equal(apply_intensity(image, drawn), apply_intensity(image, replace(drawn, noise_seed=6)))


def zoomed(volume: np.ndarray, shape: list[int], order: int) -> np.ndarray:
    """Resampling on voxel edges by scipy, borders replicated."""
    positions = np.meshgrid(
        *[(np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(volume.shape, shape, strict=True)], indexing="ij"
    )
    return ndi.map_coordinates(volume, positions, order=order, mode="nearest")


@pytest.mark.parametrize("zoom", [0.5, 0.63, 0.97])
@pytest.mark.parametrize("shape", [(7, 9, 12), (1, 9, 12)])
def test_low_resolution_is_nearest_down_and_linear_up(zoom, shape):
    image = image_of((1, *shape))
    found = apply_intensity(image, replace(PLAIN, low_resolution=(zoom,)))
    small = [max(1, round(n * zoom)) for n in shape]
    expected = zoomed(zoomed(image[0].double().numpy(), small, 0), list(shape), 1)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)


def test_low_resolution_of_thick_slices_stays_in_plane():
    image = image_of((1, 5, 24, 30))
    found = apply_intensity(image, replace(PLAIN, low_resolution=(0.5,), flat=True))
    expected = zoomed(zoomed(image[0].double().numpy(), [5, 12, 15], 0), [5, 24, 30], 1)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)


def test_channels_change_independently():
    drawn = [d.intensity for d in DRAWN if None not in d.intensity.contrast]
    first, second = np.array([d.contrast for d in drawn]).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_operations_of_single_channels_leave_the_others_alone():
    image = image_of((3, 4, 6, 5))
    drawn = replace(PLAIN, blur_sigma=(None, (0.8, 0.6, 1.0), None), low_resolution=(None, None, 0.5))
    found = apply_intensity(image, drawn)
    assert torch.equal(found[0], image[0])
    assert not torch.equal(found[1], image[1])
    assert not torch.equal(found[2], image[2])


EVERYTHING = Intensity(
    0.1, ((0.9, 0.6, 0.7),) * 2, *[(value,) * 2 for value in (1.2, 0.8, 0.6, 1.4, 0.8)], noise_seed=3
)


@pytest.mark.parametrize("field", ["noise_std", "blur_sigma", "brightness", "contrast", "low_resolution"])
def test_operations_do_not_change_their_input(field):
    image = image_of((2, 4, 6, 5))
    kept = image.clone()
    apply_intensity(image, replace(PLAIN, **{field: getattr(EVERYTHING, field)}))
    apply_intensity(image, EVERYTHING)
    assert torch.equal(image, kept)


def test_the_spatial_map_does_not_change_its_input():
    image, labels = image_of((2, *BOX)), labels_of(BOX)
    kept = image.clone(), labels.clone()
    sampled(image, labels, offset_of(BOX), Spatial((0.3, 0.2, 0.1), 0.9, False), PATCH)
    assert torch.equal(image, kept[0])
    assert torch.equal(labels, kept[1])


@pytest.mark.parametrize(
    "drawn",
    [
        replace(EVERYTHING, noise_std=None),
        replace(PLAIN, gamma=(0.7, 0.7)),
        replace(PLAIN, inverted_gamma=(1.5, 1.5)),
        replace(PLAIN, contrast=(1.25, 1.25)),
        replace(PLAIN, blur_sigma=((0.5,) * 3,) * 2),
    ],
)
@pytest.mark.parametrize("value", [0.0, -3.7, 1e6])
def test_a_constant_image_stays_finite_and_constant(drawn, value):
    found = apply_intensity(torch.full((2, 4, 6, 5), value), replace(drawn, brightness=(None, None)))
    torch.testing.assert_close(found, torch.full((2, 4, 6, 5), value), rtol=1e-5, atol=1e-5)


def draws(count: int, channels: int = 2, seed: int = 11) -> list[Augmentation]:
    rng = np.random.default_rng(seed)
    geometry = Geometry.of((24, 40, 32))
    return [draw(rng, geometry, channels, (0, 2)) for _ in range(count)]


DRAWN = draws(20_000)


@pytest.mark.parametrize(
    ("probability", "happened"),
    [
        pytest.param(0.2 + 0.2 - 0.04, lambda a: a.spatial is not None, id="spatial"),
        pytest.param(0.2, lambda a: a.spatial is not None and any(a.spatial.angles), id="rotation"),
        pytest.param(0.2, lambda a: a.spatial is not None and a.spatial.zoom != 1, id="scaling"),
        pytest.param(0.1, lambda a: a.spatial is not None and a.spatial.zoom > 1, id="scaling above 1"),
        pytest.param(0.1, lambda a: a.intensity.noise_std is not None, id="noise"),
        pytest.param(0.1, lambda a: a.intensity.blur_sigma[1] is not None, id="blur of a channel"),
        pytest.param(0.05, lambda a: None not in a.intensity.blur_sigma, id="blur of both channels"),
        pytest.param(0.15, lambda a: None not in a.intensity.brightness, id="brightness"),
        pytest.param(0.075, lambda a: (a.intensity.brightness[0] or 1) > 1, id="brighter"),
        pytest.param(0.15, lambda a: None not in a.intensity.contrast, id="contrast"),
        pytest.param(0.125, lambda a: a.intensity.low_resolution[0] is not None, id="low resolution of a channel"),
        pytest.param(0.1, lambda a: None not in a.intensity.inverted_gamma, id="inverted gamma"),
        pytest.param(0.3, lambda a: None not in a.intensity.gamma, id="gamma"),
        pytest.param(0.15, lambda a: (a.intensity.gamma[1] or 1) < 1, id="gamma below 1"),
        pytest.param(0.5, lambda a: 0 in a.flips, id="flip of z"),
        pytest.param(0.25, lambda a: a.flips == (0, 2), id="both flips"),
        pytest.param(0.0, lambda a: 1 in a.flips, id="flip of an axis that is not mirrored"),
    ],
)
def test_everything_happens_as_often_as_it_should(probability, happened):
    count = sum(map(happened, DRAWN))
    assert stats.binomtest(count, len(DRAWN), probability).pvalue > 1e-4


@pytest.mark.parametrize(
    ("low", "high", "values"),
    [
        pytest.param(0.7, 1.4, lambda a: [a.spatial.zoom] if a.spatial else [], id="zoom"),
        pytest.param(
            -math.pi / 6, math.pi / 6, lambda a: a.spatial.angles if a.spatial else [], id="angles within 30 degrees"
        ),
        pytest.param(0, 0.1, lambda a: [a.intensity.noise_std], id="noise"),
        pytest.param(0.5, 1, lambda a: [s for b in a.intensity.blur_sigma for s in b or ()], id="blur"),
        pytest.param(0.75, 1.25, lambda a: a.intensity.brightness, id="brightness"),
        pytest.param(0.75, 1.25, lambda a: a.intensity.contrast, id="contrast"),
        pytest.param(0.5, 1, lambda a: a.intensity.low_resolution, id="low resolution"),
        pytest.param(0.7, 1.5, lambda a: a.intensity.inverted_gamma, id="inverted gamma"),
        pytest.param(0.7, 1.5, lambda a: a.intensity.gamma, id="gamma"),
    ],
)
def test_everything_drawn_fills_its_range(low, high, values):
    drawn = [v for a in DRAWN for v in values(a) if v is not None]
    margin = 0.02 * (high - low)
    assert low <= min(drawn) < low + margin
    assert high - margin < max(drawn) <= high


@pytest.mark.parametrize(
    ("patch", "degrees"),
    [
        ((24, 40, 32), (30, 30, 30)),
        ((16, 48, 40), (30, 30, 30)),
        ((15, 48, 40), (180, 0, 0)),
        ((1, 64, 48), (180, 0, 0)),
        ((1, 96, 48), (15, 0, 0)),
    ],
)
def test_the_range_of_angles_follows_the_shape_of_the_patch(patch, degrees):
    assert np.rad2deg(Geometry.of(patch).angles) == pytest.approx(degrees)


def test_patches_of_few_slices_are_zoomed_in_plane_only():
    rng = np.random.default_rng(0)
    drawn = [draw(rng, Geometry.of((8, 40, 32)), 1, ()).spatial for _ in range(300)]
    zooms = [s for s in drawn if s is not None and s.zoom != 1]
    assert zooms
    for spatial in zooms:
        matrix = spatial.matrix()
        np.testing.assert_allclose(matrix[0], (1, 0, 0), atol=1e-12)
        np.testing.assert_allclose(matrix[:, 0], (1, 0, 0), atol=1e-12)


def test_equal_generators_draw_equal_augmentations():
    assert draws(50, seed=3) == draws(50, seed=3)
    assert draws(50, seed=3) != draws(50, seed=4)


@pytest.mark.parametrize("shift", [0, 1, -1, 3, -4, 6, 9, -9])
@pytest.mark.parametrize("box", [(7, 12, 10), (3, 12, 10)])
def test_slices_that_stay_slices_are_those_of_the_volume(box, shift):
    """Whole shifts take a way of their own; moved by next to nothing, the map takes the other."""
    image, labels = image_of((2, *box)), labels_of(box)
    spatial, offset = Spatial((1.2, 0, 0), 1.2, True), offset_of(box, (shift, 0.4, -0.7))
    found, found_labels = sampled(image, labels, offset, spatial, PATCH)
    other, other_labels = sampled(image, labels, offset + torch.tensor([1e-6, 0, 0]), spatial, PATCH)
    assert found.shape == other.shape
    torch.testing.assert_close(found, other, atol=2e-5, rtol=1e-4)
    assert float((found_labels != other_labels).float().mean()) < 0.01
