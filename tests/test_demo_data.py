"""The demo data: made subjects that are still real anatomy in the right place, the same bytes for the same seed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

if importlib.util.find_spec("nilearn") is None:
    pytest.skip("nilearn, which carries the brain template, is not installed", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "make_demo_data.py"
COARSENESS = 2.5  # few voxels: the whole file in seconds


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_demo_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def folder(maker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo data")
    maker.make(folder, training=3, held_out=1, coarseness=COARSENESS)
    return folder


def images(folder):
    return sorted(folder.glob("images??/*.nii.gz"))


def label_of(image):
    name = image.name.replace("_0000", "")
    return nib.load(image.parent.parent / image.parent.name.replace("images", "labels") / name)


def test_the_layout_is_that_of_nnunet(folder):
    assert [p.name for p in sorted((folder / "imagesTr").iterdir())] == [f"subject_0{n}_0000.nii.gz" for n in (1, 2, 3)]
    assert [p.name for p in sorted((folder / "labelsTr").iterdir())] == [f"subject_0{n}.nii.gz" for n in (1, 2, 3)]
    assert [p.name for p in (folder / "imagesTs").iterdir()] == ["subject_04_0000.nii.gz"]
    assert [p.name for p in (folder / "labelsTs").iterdir()] == ["subject_04.nii.gz"]
    description = json.loads((folder / "dataset.json").read_text())
    assert description["numTraining"] == 3
    assert description["labels"]["background"] == 0
    assert description["channel_names"] == {"0": "T1"}


def test_images_and_labels_lie_on_one_grid_that_is_oblique_and_anisotropic(folder):
    for path in images(folder):
        image, label = nib.load(path), label_of(path)
        assert image.shape == label.shape
        assert len(set(image.shape)) == 3
        np.testing.assert_array_equal(image.affine, label.affine)
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)
        assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1
        spacing = np.array(image.header.get_zooms())
        assert spacing.max() / spacing.min() > 1.15
        direction = image.affine[:3, :3] / spacing
        np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-5)
        assert np.abs(direction).max() < 0.99999  # no axis runs along one of the patient's


def test_orientations_vary_and_reach_the_headers(folder, maker):
    found = ["".join(nib.aff2axcodes(nib.load(path).affine)) for path in images(folder)]
    assert found == list(maker.ORIENTATIONS[: len(found)])
    assert len({code.translate(str.maketrans("LPI", "RAS")) for code in found}) > 1  # permuted, not only flipped


def test_every_label_occurs_and_no_other(folder, maker):
    for path in images(folder):
        label = np.asarray(label_of(path).dataobj)
        assert set(np.unique(label)) == set(maker.LABELS.values())
        assert label.dtype == np.uint8


def test_white_matter_is_brighter_than_grey_and_grey_than_fluid(folder, maker):
    for path in images(folder):
        image, label = np.asarray(nib.load(path).dataobj), np.asarray(label_of(path).dataobj)
        fluid, grey, white = (np.median(image[label == n]) for n in (1, 2, 3))
        assert fluid < 0.9 * grey
        assert 1.1 * grey < white
        assert np.median(image[label == 0]) == 0  # skull stripped


def test_the_anatomy_is_upright_in_the_world_whatever_the_axes(folder):
    """In the brain, white matter lies above and in front of grey matter on average, neither left nor right of it."""
    for path in images(folder):
        label = label_of(path)
        values = np.asarray(label.dataobj)
        brain, grey, white = (
            nib.affines.apply_affine(label.affine, np.argwhere(mask)) for mask in (values > 0, values == 2, values == 3)
        )
        right, anterior, superior = np.ptp(brain, axis=0)
        assert anterior > right > superior > 70
        right, anterior, superior = white.mean(axis=0) - grey.mean(axis=0)
        assert superior > 5
        assert anterior > 1
        assert abs(right) < 5


def test_reorienting_moves_no_voxel_in_the_world(maker):
    rng = np.random.default_rng(4)
    array = rng.integers(1, 1000, (5, 7, 4)).astype(np.int16)
    affine = np.eye(4)
    affine[:3, :3] = maker.rotation(np.array([7.0, -11.0, 5.0])) @ np.diag([2.0, 2.2, 3.1])
    affine[:3, 3] = (-40, 12, 6)
    for codes in maker.ORIENTATIONS:
        turned = maker.reorient(array, affine, codes)
        assert nib.aff2axcodes(turned.affine) == tuple(codes)
        values = np.asarray(turned.dataobj)
        for index in ((0, 0, 0), (4, 2, 1), (1, 6, 3)):
            point = nib.affines.apply_affine(affine, index)
            there = np.rint(nib.affines.apply_affine(np.linalg.inv(turned.affine), point)).astype(int)
            assert values[tuple(there)] == array[index]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_subjects(folder, maker, tmp_path):
    def digests(root):
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in images(root) if "04" not in p.name}

    maker.make(tmp_path / "same", training=3, held_out=0, coarseness=COARSENESS)
    assert digests(tmp_path / "same") == digests(folder)
    maker.make(tmp_path / "other", training=1, held_out=0, seed=7, coarseness=COARSENESS)
    assert not set(digests(tmp_path / "other").values()) & set(digests(folder).values())


def test_the_deformation_is_smooth_and_does_not_fold(maker):
    rng = np.random.default_rng(1)
    field = maker.velocity(rng, np.array([180.0, 220.0, 190.0]))
    shape = (60, 70, 60)
    points = (np.indices(shape).reshape(3, -1) * 3.0).astype(np.float32)
    moved = maker.flow(points, field, np.zeros(3)).reshape(3, *shape)
    gradient = np.stack([np.stack(np.gradient(component, 3.0)) for component in moved])
    determinant = np.linalg.det(gradient.transpose(2, 3, 4, 0, 1))
    assert determinant.min() > 0.2
    assert np.abs(moved - points.reshape(3, *shape)).max() > 3
