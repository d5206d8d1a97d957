"""Metrics against MONAI and SimpleITK on anisotropic blobs, and drawn by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from medseg.evaluation import nearest
from medseg.evaluation.groups import masks_as_groups
from medseg.evaluation.measurement import border_distances, measure
from medseg.evaluation.metrics import Overlap, average_distance, hausdorff_95, surface_dice, volume_ml

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

SPACING = (2.7, 0.9, 1.3)


def overlap(prediction: np.ndarray, reference: np.ndarray) -> Overlap:
    return measure(masks_as_groups(prediction, reference), (1.0, 1.0, 1.0))[0].overlap


def border_voxels(mask: np.ndarray) -> int:
    return len(border_distances(mask, mask, (1.0, 1.0, 1.0)).from_prediction_mm)


def drawing(*rows: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in rows])[None]


def blob_pair(seed: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping irregular shapes that run out of the volume in places."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=shape), [min(2.0, n / 6) for n in shape])
    other = field + 0.6 * ndimage.gaussian_filter(rng.normal(size=shape), [min(2.0, n / 6) for n in shape])
    return field > np.quantile(field, 0.8), other > np.quantile(other, 0.83)


def monai(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> list[float]:
    """HD95, ASSD and NSD of MONAI; axes of length 1 are dropped, as MONAI's 2D images have none."""
    flat = tuple(i for i, n in enumerate(prediction.shape) if n == 1)
    a, b = (torch.from_numpy(np.squeeze(m, flat).astype(np.float32))[None, None] for m in (prediction, reference))
    spacing = [s for i, s in enumerate(spacing) if i not in flat]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            float(compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing)),
            float(compute_average_surface_distance(a, b, include_background=True, symmetric=True, spacing=spacing)),
            float(compute_surface_dice(a, b, [tolerance], include_background=True, spacing=spacing)),
        ]


def ours(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> list[float]:
    distances = border_distances(prediction, reference, spacing)
    return [hausdorff_95(distances), average_distance(distances), surface_dice(distances, tolerance)]


@pytest.mark.parametrize("shape", [(14, 25, 33), (9, 10, 61), (1, 40, 57), (23, 1, 31), (19, 28, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_border_distances_give_monais_numbers_with_anisotropic_spacing(shape, seed):
    prediction, reference = blob_pair(seed, shape)
    for tolerance in (0.5, 1.75, 3.1):
        expected = monai(prediction, reference, SPACING, tolerance)
        np.testing.assert_allclose(ours(prediction, reference, SPACING, tolerance), expected, rtol=1e-5)


def test_masks_that_fill_the_volume_to_its_edge_agree_with_monai():
    prediction, reference = np.zeros((2, 8, 12, 15), dtype=bool)
    prediction[:, 3:, :9] = True
    reference[:, 2:, :] = True
    np.testing.assert_allclose(ours(prediction, reference, SPACING, 1.0), monai(prediction, reference, SPACING, 1.0))
    everything = np.ones_like(reference)
    np.testing.assert_allclose(ours(everything, reference, SPACING, 1.0), monai(everything, reference, SPACING, 1.0))


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(bool, st.tuples(st.just(2), st.integers(1, 4), st.integers(1, 6), st.integers(1, 7))),
    st.tuples(*[st.floats(0.1, 8)] * 3),
)
def test_any_two_masks_agree_with_all_pairs_of_their_border_voxels(masks, spacing):
    prediction, reference = masks

    def points(mask: np.ndarray) -> np.ndarray:
        """Border by definition: a face neighbour, along an axis longer than 1, is outside or beyond the volume."""
        padded = np.pad(mask, 1)
        found = []
        for index in np.argwhere(mask):
            steps = [np.eye(3, dtype=int)[a] * s for a in range(3) if mask.shape[a] > 1 for s in (-1, 1)]
            if any(not padded[tuple(index + 1 + step)] for step in steps):
                found.append(index * spacing)
        return np.array(found).reshape(-1, 3)

    a, b = points(prediction), points(reference)
    distances = border_distances(prediction, reference, spacing)
    if len(a) and len(b):
        table = np.linalg.norm(a[:, None] - b[None], axis=-1)
        np.testing.assert_allclose(np.sort(distances.from_prediction_mm), np.sort(table.min(1)), atol=1e-9)
        np.testing.assert_allclose(np.sort(distances.from_reference_mm), np.sort(table.min(0)), atol=1e-9)
    else:
        assert (len(distances.from_prediction_mm), len(distances.from_reference_mm)) == (len(a), len(b))


def test_neighbourhood_tree_and_distance_transform_give_the_same_distances(monkeypatch):
    prediction, reference = blob_pair(5, (20, 31, 27))
    results = []
    for offsets, voxels_per_query in ((250, 20), (1, 0), (1, 10**9), (7, 20)):
        monkeypatch.setattr(nearest, "MOST_OFFSETS", offsets)
        monkeypatch.setattr(nearest, "_VOXELS_PER_QUERY", voxels_per_query)
        nearest.neighbourhood.cache_clear()
        found = border_distances(prediction, reference, SPACING)
        results.append([np.sort(found.from_prediction_mm), np.sort(found.from_reference_mm)])
    nearest.neighbourhood.cache_clear()
    for other in results[1:]:
        np.testing.assert_allclose(results[0][0], other[0], atol=1e-9)
        np.testing.assert_allclose(results[0][1], other[1], atol=1e-9)


def test_simpleitk_measures_the_same_overlap_and_volume():
    prediction, reference = blob_pair(1, (14, 25, 33))
    images = [SimpleITK.GetImageFromArray(m.astype(np.uint8)) for m in (prediction, reference)]
    for image in images:
        image.SetSpacing(SPACING[::-1])
    measured = SimpleITK.LabelOverlapMeasuresImageFilter()
    measured.Execute(images[1], images[0])
    counts = overlap(prediction, reference)
    assert counts.dice == pytest.approx(measured.GetDiceCoefficient())
    assert counts.iou == pytest.approx(measured.GetJaccardCoefficient())
    shape = SimpleITK.LabelShapeStatisticsImageFilter()
    shape.Execute(images[0])
    assert volume_ml(counts.predicted, SPACING) == pytest.approx(shape.GetPhysicalSize(1) / 1000)
    assert counts.precision == pytest.approx((prediction & reference).sum() / prediction.sum())
    assert counts.recall == pytest.approx((prediction & reference).sum() / reference.sum())
    assert counts.expected == reference.sum()


def test_a_drawn_square_loses_one_column():
    # spacing y 2 mm, x 3 mm; border voxels of a filled 3 × 4 rectangle: all but the 2 in its middle row
    reference = drawing("......", ".####.", ".####.", ".####.", "......")
    prediction = drawing("......", ".###..", ".###..", ".###..", "......")
    assert border_voxels(reference) == 10
    assert border_voxels(prediction) == 8
    distances = border_distances(prediction, reference, (99.0, 2.0, 3.0))
    # prediction → reference: its middle voxel of column 3 lies 2 mm (one row) from a border voxel, the rest at 0
    assert sorted(distances.from_prediction_mm) == [0] * 7 + [2]
    # reference → prediction: the three voxels of column 4 lie 3 mm from column 3, the rest at 0
    assert sorted(distances.from_reference_mm) == [0] * 7 + [3] * 3
    # ranks 0 … 9 and 0 … 7: the 95th percentile lies at rank 8.55 → 3 mm, and at rank 6.65 → 0.65 × 2 mm
    assert hausdorff_95(distances) == pytest.approx(3.0)
    assert average_distance(distances) == pytest.approx((2 + 9) / 18)
    assert surface_dice(distances, 2.0) == pytest.approx(15 / 18)
    assert surface_dice(distances, 1.9) == pytest.approx(14 / 18)
    assert surface_dice(distances, 3.0) == 1
    counts = overlap(prediction, reference)
    assert counts.dice == pytest.approx(18 / 21)
    assert counts.iou == pytest.approx(9 / 12)


def test_one_slice_of_a_volume_is_all_border_but_a_flat_image_is_not():
    disc = drawing(".###.", "#####", "#####", "#####", ".###.")
    volume = np.concatenate([np.zeros_like(disc), disc])
    assert border_voxels(volume) == disc.sum()
    assert border_voxels(disc) == disc.sum() - 9


def test_a_tolerance_of_three_voxels_of_float32_spacing_includes_the_third_voxel():
    spacing = float(np.float32(0.3))
    prediction, reference = drawing("#...."), drawing("...#.")
    assert surface_dice(border_distances(prediction, reference, (1.0, 1.0, spacing)), 0.9) == 1
    assert surface_dice(border_distances(prediction, reference, (1.0, 1.0, 0.3)), 0.9) == 1


@pytest.mark.parametrize(
    ("prediction", "reference", "dice", "precision", "recall", "hd95", "nsd"),
    [
        ("..", "..", math.nan, math.nan, math.nan, math.nan, math.nan),
        ("..", "#.", 0.0, math.nan, 0.0, math.inf, 0.0),
        ("#.", "..", 0.0, 0.0, math.nan, math.inf, 0.0),
        (".#", "#.", 0.0, 0.0, 0.0, 4.0, 0.0),
        ("#.", "#.", 1.0, 1.0, 1.0, 0.0, 1.0),
    ],
)
def test_absent_structures_are_infinitely_far_and_never_left_out(
    prediction, reference, dice, precision, recall, hd95, nsd
):
    prediction, reference = drawing(prediction), drawing(reference)
    counts, distances = overlap(prediction, reference), border_distances(prediction, reference, (1.0, 1.0, 4.0))
    found = [counts.dice, counts.iou, counts.precision, counts.recall]
    np.testing.assert_equal(found, [dice, dice, precision, recall])
    np.testing.assert_equal([hausdorff_95(distances), average_distance(distances)], [hd95, hd95])
    np.testing.assert_equal(surface_dice(distances, 1.0), nsd)


def test_nonsense_is_refused():
    mask = drawing("##.")
    with pytest.raises(ValueError, match="spacing_mm"):
        border_distances(mask, mask, (1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="spacing_mm"):
        border_distances(mask, mask, (1.0, math.nan, 1.0))
    with pytest.raises(ValueError, match="shape"):
        border_distances(mask, mask[..., :2], (1.0, 1.0, 1.0))
    for tolerance in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="tolerance_mm"):
            surface_dice(border_distances(mask, mask, (1.0, 1.0, 1.0)), tolerance)
