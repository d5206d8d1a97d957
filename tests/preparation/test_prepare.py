"""Preparing a case and restoring labels: the laws, and a naive computation on real data."""

from __future__ import annotations

import json
import logging
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import SHAPE_IJK, affine_ijk, anatomy
from prepared_phantoms import INTENSITY, make_plan, make_task
from skimage.transform import resize

from medseg.errors import InputError
from medseg.imaging.geometry import grid_from_nifti
from medseg.imaging.volumes import read_volume
from medseg.preparation.prepare import check_grids, class_indices, prepare, prepare_labels
from medseg.preparation.restore import paste_back, restore_labels
from medseg.records.grid import Volume
from medseg.records.plan import Normalisation

ORIENTATIONS = list(product(permutations(range(3)), product((False, True), repeat=3)))
KEEP = (2.0, 1.1, 0.9)  # the spacing of the phantoms, z y x: nothing is resampled


def phantom(seed: int = 0, affine: np.ndarray | None = None) -> tuple[Volume, Volume]:
    """Image and labels with an asymmetric margin of zeros, on an oblique grid."""
    image, labels = anatomy(np.random.default_rng(seed))
    margin = np.ones(SHAPE_IJK, bool)
    margin[3:-1, 2:-4, 1:-2] = False
    image[margin] = 0
    labels[margin] = 0
    grid = grid_from_nifti(affine_ijk() if affine is None else affine, SHAPE_IJK)
    return Volume(image.T[None], grid), Volume(labels.T[None], grid)


def turned(volume: Volume, order: tuple[int, ...], flips: tuple[bool, ...]) -> Volume:
    """The same voxels in the same places, stored along other axes."""
    ijk = volume.array[0].T
    to_file = np.zeros((4, 4))
    to_file[3, 3] = 1
    stored = ijk.transpose(order)
    for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
        to_file[old, new] = -1 if flip else 1
        to_file[old, 3] = ijk.shape[old] - 1 if flip else 0
    stored = stored[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    affine_ijk_of = volume.grid.affine[:, [2, 1, 0, 3]] @ to_file
    return Volume(np.ascontiguousarray(stored).T[None], grid_from_nifti(affine_ijk_of, stored.shape))


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize(("order", "flips"), ORIENTATIONS)
def test_restoring_undoes_preparing_in_every_orientation(order, flips, transpose):
    image, labels = (turned(v, order, flips) for v in phantom())
    plan, configuration = make_plan(spacing=tuple(KEEP[axis] for axis in transpose), transpose=transpose)
    prepared = prepare(image, plan, configuration)
    assert prepared.image.shape[1:] == prepared.preparation.cropped_shape
    indices = prepare_labels(labels, plan.task, prepared.preparation, configuration.resampling)
    restored = restore_labels(indices, prepared.preparation, configuration.resampling)
    np.testing.assert_array_equal(restored, labels.array[0])


@pytest.mark.parametrize(("order", "flips"), ORIENTATIONS)
def test_the_network_sees_the_same_whatever_the_axes_of_the_file(order, flips):
    plan, configuration = make_plan(normalisation=Normalisation(scheme="zscore", use_mask=True))
    image, labels = phantom()
    expected = prepare(image, plan, configuration)
    result = prepare(turned(image, order, flips), plan, configuration)
    np.testing.assert_array_equal(result.image, expected.image)
    np.testing.assert_array_equal(
        prepare_labels(turned(labels, order, flips), plan.task, result.preparation, configuration.resampling),
        prepare_labels(labels, plan.task, expected.preparation, configuration.resampling),
    )


@pytest.mark.parametrize("spacing", [(1.5, 1.0, 1.2), (2.0, 0.5, 0.5), (7.0, 1.5, 1.0), (1.5, 1.5)])
def test_restored_labels_are_close_to_the_original_after_resampling(spacing):
    image, labels = phantom()
    plan, configuration = make_plan(spacing=spacing)
    prepared = prepare(image, plan, configuration)
    indices = prepare_labels(labels, plan.task, prepared.preparation, configuration.resampling)
    assert prepared.image.shape[1:] == indices.shape == prepared.preparation.target_shape
    restored = restore_labels(indices, prepared.preparation, configuration.resampling)
    truth = labels.array[0]
    assert restored.shape == truth.shape
    overlap = 2 * ((restored == 1) & (truth == 1)).sum() / ((restored == 1).sum() + (truth == 1).sum())
    assert overlap > (0.75 if max(spacing) > 5 else 0.93)


def test_the_2d_configuration_keeps_slices_and_their_distance():
    image, _ = phantom()
    plan, configuration = make_plan(spacing=(1.5, 1.5))
    preparation = prepare(image, plan, configuration).preparation
    assert preparation.target_spacing_mm == pytest.approx((2.0, 1.5, 1.5))
    assert preparation.target_shape[0] == preparation.cropped_shape[0]


def test_an_anatomical_landmark_ends_where_the_record_says():
    image, _ = phantom()
    image.array[...] = 0
    image.array[0, 12, 9, 20] = 1000  # one voxel: the box closes around it
    plan, configuration = make_plan(spacing=KEEP, normalisation=Normalisation(scheme="none"))
    prepared = prepare(image, plan, configuration)
    assert prepared.image.shape == (1, 1, 1, 1)
    source = paste_back(prepared.image[0], prepared.preparation)
    assert source[12, 9, 20] == 1000


def test_file_orientation_leaves_the_axes_as_stored():
    image, _ = (turned(v, (2, 0, 1), (True, False, True)) for v in phantom())
    plan, configuration = make_plan(spacing=image.grid.spacing_mm)
    preparation = prepare(image, plan, configuration, orientation="file").preparation
    assert preparation.to_canonical == (0, 1, 2)
    assert preparation.flipped == (False, False, False)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (6, 1, 1)])
@pytest.mark.parametrize("fill", [0, 5])
def test_one_voxel_one_slice_and_empty_images_are_prepared(shape, fill):
    grid = grid_from_nifti(affine_ijk(), shape[::-1])
    image = Volume(np.full((1, *shape), fill, np.int16), grid)
    plan, configuration = make_plan(normalisation=Normalisation(scheme="zscore", use_mask=True))
    prepared = prepare(image, plan, configuration)
    assert not prepared.image.any()
    labels = prepare_labels(image, make_task(6), prepared.preparation, configuration.resampling)
    assert np.unique(labels) == fill


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_refused(bad):
    image, _ = phantom()
    image.array[0, 3, 4, 5] = bad
    plan, configuration = make_plan(normalisation=Normalisation(scheme="ct"))
    with pytest.raises(InputError, match=r"E0110.*1 voxels of channel 0"):
        prepare(image, plan, configuration)


def test_missing_channels_are_refused():
    plan, configuration = make_plan(make_task(channels=2))
    with pytest.raises(InputError, match=r"E0133.*1 channels vs 2 \(MRI0, MRI1\)"):
        prepare(phantom()[0], plan, configuration)


def label_volume(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).reshape(1, 2, -1)


def test_label_values_become_class_indices_and_the_ignore_value_minus_one():
    task = make_task(2).model_copy(update={"labels": make_task(6).labels[::5], "ignore_value": 9})
    for kind in (np.uint8, np.int32, np.float64):
        indices = class_indices(label_volume(np.array([0, 5, 9, 0], kind)), task)
        assert indices.dtype == np.int16
        np.testing.assert_array_equal(indices.ravel(), [0, 1, -1, 0])


@pytest.mark.parametrize(
    ("values", "code"),
    [
        (np.array([0, 1, 0.5, 1]), "E0130"),
        (np.array([0, 1, np.nan, 1]), "E0130"),
        (np.array([0, 1, 1j, 1]), "E0130"),
        (np.array([0, 1, 3, 3]), r"E0131.*3 \(2 voxels\) vs 0, 1, 2"),
        (np.array([0, -1, 0, 0], np.int8), r"E0131.*-1 \(1 voxels\)"),
        (np.array([0, 1, 1e12, 1]), r"E0131.*1e\+12 \(1 voxels\)"),
        (np.array([0, 1, 1, 2**63], np.uint64), "E0131"),
        (np.arange(40), r"E0131.*and 27 more values"),
    ],
)
def test_label_values_that_are_no_declared_integers_are_refused(values, code):
    with pytest.raises(InputError, match=code):
        class_indices(label_volume(values), make_task(3))


def test_labels_on_another_grid_are_refused():
    image, labels = phantom()
    check_grids(image.grid, labels.grid)
    moved = affine_ijk()
    moved[:3, 3] += (0, 0, 3)
    with pytest.raises(InputError, match="E0120"):
        check_grids(image.grid, grid_from_nifti(moved, SHAPE_IJK))
    with pytest.raises(InputError, match="E0119"):
        check_grids(image.grid, grid_from_nifti(affine_ijk(), (30, 26, 17)))
    plan, configuration = make_plan()
    preparation = prepare(image, plan, configuration).preparation
    short = Volume(labels.array[:, 1:], grid_from_nifti(affine_ijk(), (30, 26, 17)))
    with pytest.raises(InputError, match="E0119"):
        prepare_labels(short, plan.task, preparation, configuration.resampling)
    double = Volume(np.repeat(labels.array, 2, axis=0), labels.grid)
    with pytest.raises(InputError, match="E0111"):
        prepare_labels(double, plan.task, preparation, configuration.resampling)


def test_labels_where_the_image_is_empty_are_reported(caplog):
    image, labels = phantom()
    labels.array[0, 0, 0, 0] = 1
    plan, configuration = make_plan()
    with caplog.at_level(logging.WARNING):
        prepare_labels(labels, plan.task, prepare(image, plan, configuration).preparation, configuration.resampling)
    assert "1 labelled voxels lie where all images are zero" in caplog.text


def test_labels_of_the_wrong_shape_cannot_be_restored():
    image, _ = phantom()
    plan, configuration = make_plan()
    preparation = prepare(image, plan, configuration).preparation
    with pytest.raises(ValueError, match="target grid"):
        restore_labels(np.zeros((3, 3, 3), np.int16), preparation, configuration.resampling)
    with pytest.raises(ValueError, match="crop box"):
        paste_back(np.zeros((3, 3, 3), np.int16), preparation)


def naive(path: Path, spacing: tuple[float, ...], scheme: str) -> np.ndarray:
    """nibabel's closest canonical image, cropped, normalised and resampled in float64 with skimage."""
    nifti = nib.as_closest_canonical(nib.load(path))
    image = np.asarray(nifti.dataobj, np.float64).transpose(2, 1, 0)
    old = [float(zoom) for zoom in nifti.header.get_zooms()[::-1]]
    spacing = spacing if len(spacing) == 3 else (old[0], *spacing)
    nonzero = np.nonzero(image)
    image = image[tuple(slice(axis.min(), axis.max() + 1) for axis in nonzero)]
    if scheme == "ct":
        image = (np.clip(image, INTENSITY.percentile_00_5, INTENSITY.percentile_99_5) - 110) / 40
    else:
        image = (image - image.mean()) / image.std()
    shape = [round(s / t * n) for s, t, n in zip(old, spacing, image.shape, strict=True)]
    if max(old) / min(old) > 3:
        image = np.stack([resize(part, shape[1:], 3, mode="edge", anti_aliasing=False) for part in image])
        take = np.floor(len(image) / shape[0] * (np.arange(shape[0]) + 0.5)).astype(int)
        return image[take]
    return resize(image, shape, 3, mode="edge", anti_aliasing=False)


@pytest.mark.parametrize(
    ("name", "index", "spacing", "scheme"),
    [
        ("hippocampus", 0, (1.0, 1.0, 1.0), "zscore"),
        ("hippocampus", 7, (0.8, 1.3, 0.9), "zscore"),
        ("hippocampus", 11, (1.5, 1.5), "ct"),
        ("cardiac", 0, (7.0, 1.3, 1.4), "zscore"),
        ("cardiac", 5, (1.8, 1.8), "zscore"),
    ],
)
def test_real_images_are_prepared_as_a_naive_computation_does(shared, name, index, spacing, scheme):
    folder = shared / "data" / name
    path = sorted((folder / "imagesTr").glob("*.nii.gz"))[index]
    label = next((folder / "labelsTr").glob(path.name.replace("_0000", "")))
    values = json.loads((folder / "dataset.json").read_text())["labels"].values()
    plan, configuration = make_plan(make_task(max(values) + 1), spacing, normalisation=Normalisation(scheme=scheme))
    prepared = prepare(read_volume(path), plan, configuration)
    expected = naive(path, spacing, scheme)
    assert prepared.image.shape[1:] == expected.shape
    assert np.abs(prepared.image[0] - expected).max() < 2e-6 * np.ptp(expected)
    labels = read_volume(label)
    indices = prepare_labels(labels, plan.task, prepared.preparation, configuration.resampling)
    restored = restore_labels(indices, prepared.preparation, configuration.resampling)
    truth = labels.array[0].astype(int)
    assert 2 * ((restored > 0) & (truth > 0)).sum() / ((restored > 0).sum() + (truth > 0).sum()) > 0.9
