"""Metrics against MONAI, SimpleITK and DeepMind's surface-distance on real label maps with anisotropic spacing."""

from __future__ import annotations

import warnings

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

from medseg.evaluation.groups import masks_as_groups
from medseg.evaluation.measurement import border_distances, measure
from medseg.evaluation.metrics import average_distance, hausdorff, hausdorff_95, surface_dice, volume_ml

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice


def load(path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Labels (Z, Y, X) and spacing in mm of a NIfTI file."""
    image = nib.load(path)
    return np.asarray(image.dataobj).T.astype(np.int16), tuple(float(s) for s in image.header.get_zooms()[2::-1])


def cropped(*labels: np.ndarray, margin: int = 3) -> list[np.ndarray]:
    (box,) = ndimage.find_objects(np.any([a > 0 for a in labels], axis=0).astype(np.uint8))
    box = tuple(slice(max(0, s.start - margin), s.stop + margin) for s in box)
    return [a[box] for a in labels]


def real_pairs(shared) -> dict[str, tuple[np.ndarray, np.ndarray, tuple[float, float, float], list[int]]]:
    """Real references, what stands for a prediction, a spacing (of two not the file's, but thick slices), labels."""
    data = shared / "data"
    brains = [load(data / "brain_labelmaps" / f"training_seg_0{i}.nii.gz")[0][::4, ::2, ::2] for i in (1, 2)]
    thorax, _ = load(data / "ct_thorax" / "labels25.nii.gz")
    bent = ndimage.shift(thorax, (1, -2, 1), order=0)
    name = sorted((data / "cardiac" / "labelsTr").iterdir())[0]
    heart, spacing = load(name)
    beaten = np.roll(ndimage.grey_erosion(heart, (1, 3, 3)), 1, axis=2)
    return {
        "brain": (*cropped(brains[0], brains[1]), (4.0, 2.0, 2.0), [3, 10, 17, 53]),  # two subjects, one frame
        "thorax": (bent, thorax, (5.0, 1.3, 0.9), [1, 7, 13, 20]),
        "heart": (beaten, heart, spacing, [1, 2, 3]),
    }


def each_mask(shared):
    for name, (prediction, reference, spacing, labels) in real_pairs(shared).items():
        for label in labels:
            masks = prediction == label, reference == label
            if all(m.any() for m in masks):
                yield f"{name} {label}", *cropped(*masks), spacing


def monai(prediction, reference, spacing, tolerance) -> list[float]:
    a, b = (torch.from_numpy(np.ascontiguousarray(m, np.float32))[None, None] for m in (prediction, reference))
    given = {"include_background": True, "spacing": list(spacing)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            float(compute_hausdorff_distance(a, b, **given)),
            float(compute_hausdorff_distance(a, b, percentile=95, **given)),
            float(compute_average_surface_distance(a, b, symmetric=True, **given)),
            float(compute_surface_dice(a, b, [tolerance], **given)),
        ]


def image_of(mask: np.ndarray, spacing) -> SimpleITK.Image:
    """With a rim of background, so that ITK too sees a border where the array ends."""
    image = SimpleITK.GetImageFromArray(np.pad(mask, 1).astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    return image


def test_real_organs_have_monais_distances(shared):
    seen = 0
    for name, prediction, reference, spacing in each_mask(shared):
        distances = border_distances(prediction, reference, spacing)
        found = [
            hausdorff(distances),
            hausdorff_95(distances),
            average_distance(distances),
            surface_dice(distances, 2.5),
        ]
        np.testing.assert_allclose(found, monai(prediction, reference, spacing, 2.5), rtol=1e-5, err_msg=name)
        seen += 1
    assert seen >= 9


def test_real_organs_have_simpleitks_overlap_volume_and_hausdorff_distance_of_contours(shared):
    for name, prediction, reference, spacing in each_mask(shared):
        images = [image_of(m, spacing) for m in (prediction, reference)]
        measured = SimpleITK.LabelOverlapMeasuresImageFilter()
        measured.Execute(images[0], images[1])
        counts = measure(masks_as_groups(prediction, reference), spacing)[0].overlap
        assert counts.dice == pytest.approx(measured.GetDiceCoefficient(), rel=1e-9), name
        assert counts.iou == pytest.approx(measured.GetJaccardCoefficient(), rel=1e-9), name
        assert 1 - counts.recall == pytest.approx(measured.GetFalseNegativeError(1), abs=1e-9), name
        shape = SimpleITK.LabelShapeStatisticsImageFilter()
        shape.Execute(images[0])
        assert volume_ml(counts.predicted, spacing) == pytest.approx(shape.GetPhysicalSize(1) / 1000, rel=1e-6), name
        contours = [SimpleITK.LabelContour(image) for image in images]
        furthest = SimpleITK.HausdorffDistanceImageFilter()
        furthest.Execute(*contours)
        distances = border_distances(prediction, reference, spacing)
        assert hausdorff(distances) == pytest.approx(furthest.GetHausdorffDistance(), rel=1e-5), name
        directed = [float(d.mean()) for d in (distances.from_prediction_mm, distances.from_reference_mm)]
        assert np.mean(directed) == pytest.approx(furthest.GetAverageHausdorffDistance(), rel=1e-5), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SciPy's older names, which it uses
def test_distances_are_surface_distances_within_a_voxel(shared):
    """DeepMind's border runs between voxels: no number is the same, none may be further off than a voxel."""
    surface_distance = pytest.importorskip("surface_distance")
    for name, prediction, reference, spacing in each_mask(shared):
        theirs = surface_distance.compute_surface_distances(reference, prediction, spacing)
        distances = border_distances(prediction, reference, spacing)
        voxel = float(np.linalg.norm(spacing))
        assert hausdorff(distances) == pytest.approx(
            surface_distance.compute_robust_hausdorff(theirs, 100), abs=voxel
        ), name
        assert hausdorff_95(distances) == pytest.approx(
            surface_distance.compute_robust_hausdorff(theirs, 95), abs=voxel
        ), name
        average = np.mean(surface_distance.compute_average_surface_distance(theirs))
        assert average_distance(distances) == pytest.approx(average, abs=voxel / 2), name
        dice = surface_distance.compute_dice_coefficient(reference, prediction)
        overlap = measure(masks_as_groups(prediction, reference), spacing)[0].overlap
        assert overlap.dice == pytest.approx(dice, rel=1e-12), name
