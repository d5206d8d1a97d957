"""The laws of the whole pipeline: orientation changes nothing, results lie where their inputs lie, records survive."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk, anatomy, save_nifti
from run_records import SCHEMAS, check_records, refuse
from tiny_runs import CONFIGURATION, cpu, finished_run_2d, prepared_run

from medseg.dataset.fingerprint import measure
from medseg.dataset.layouts import read_dataset
from medseg.imaging.volumes import read_volume
from medseg.pipeline.predict import PredictOptions, predict_files
from medseg.pipeline.run_folder import RunFolder
from medseg.pipeline.train import TrainOptions, train_run
from medseg.planning.planner import make_plan
from medseg.preparation.prepare import class_indices, prepare, prepare_labels
from medseg.preparation.restore import restore_labels
from medseg.records.base import parse_record
from medseg.records.fingerprint import Fingerprint
from medseg.records.plan import Budget
from medseg.training.journal import StepLine, ValidationLine

ORIENTATIONS = [
    np.array([[axis, flip] for axis, flip in zip(order, flips, strict=True)])
    for order in itertools.permutations(range(3))
    for flips in itertools.product([1, -1], repeat=3)
]


def segment(run: Path, inputs: Path | list[Path], output: Path) -> dict[str, nib.Nifti1Image]:
    """Predicted label images by case."""
    manifest = predict_files(run, inputs, output, PredictOptions(device=cpu()))
    assert [case.problems for case in manifest.failed] == []
    return {case.id: nib.load(output / name) for case in manifest.cases for name in case.outputs}


def in_the_world(image: nib.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """Labels and affine along the axes of the patient, by nibabel."""
    closest = nib.as_closest_canonical(image)
    return np.asarray(closest.dataobj), closest.affine


def test_all_48_orders_and_directions_of_a_files_axes_give_the_same_segmentation_in_the_world(finished, tmp_path):
    image, _ = anatomy(np.random.default_rng(77))
    upright = nib.Nifti1Image(image, affine_ijk(degrees=(11, -7, 19)))
    for index, orientation in enumerate(ORIENTATIONS):
        turned = upright.as_reoriented(orientation)
        save_nifti(tmp_path / "in" / f"way_{index:02d}_0000.nii", np.asarray(turned.dataobj), turned.affine)
    segmented = segment(finished, tmp_path / "in", tmp_path / "out")
    assert len(segmented) == len(ORIENTATIONS) == 48
    assert len({image.shape for image in segmented.values()}) == 6
    first, affine = in_the_world(segmented["way_00"])
    assert set(np.unique(first)) == {0, 1, 2}
    for case, prediction in segmented.items():
        labels, where = in_the_world(prediction)
        np.testing.assert_array_equal(labels, first, err_msg=case)
        np.testing.assert_allclose(where, affine, atol=1e-4, err_msg=case)


def test_a_volume_that_is_moved_and_turned_as_a_whole_keeps_its_segmentation(finished, tmp_path):
    """The anatomy does not move within its axes, so only the header differs, up to 44 degrees of obliqueness."""
    image, _ = anatomy(np.random.default_rng(78))
    for index, degrees in enumerate([(0, 0, 0), (3, 2, -1), (-20, 15, 9), (30, -8, 12)]):
        affine = affine_ijk(degrees=degrees, origin=(50.0 * index, -300, 1000))
        save_nifti(tmp_path / "in" / f"at_{index}_0000.nii.gz", image, affine)
    labels = [np.asarray(image.dataobj) for image in segment(finished, tmp_path / "in", tmp_path / "out").values()]
    for moved in labels[1:]:
        np.testing.assert_array_equal(moved, labels[0])


def header_only(path: Path, array: np.ndarray, affine: np.ndarray, sform: int, qform: int) -> None:
    """A NIfTI file with the form codes as wanted; a code of 0 leaves the other form to say where voxels lie."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    nib.save(image, path)


def sheared_rounding(affine: np.ndarray) -> np.ndarray:
    """An affine with the rounding that scanners write: not exactly orthonormal in its last digits."""
    return np.round(affine, 3)


@pytest.fixture(scope="module")
def odd_inputs(tmp_path_factory) -> Path:
    """Images whose axes, spacing, depth, type, forms and endings differ."""
    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(5)
    image, _ = anatomy(rng)
    oblique = affine_ijk(degrees=(14, -9, 25))
    turned = nib.Nifti1Image(image, oblique).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    thick = affine_ijk(spacing=(0.7, 0.7, 6.5))
    for ending in (".nii", ".nii.gz"):
        header_only(folder / f"oblique_0000{ending}".replace("oblique", f"oblique{len(ending)}"), image, oblique, 2, 1)
    header_only(folder / "turned_0000.nii.gz", np.asarray(turned.dataobj), turned.affine, 1, 1)
    header_only(folder / "thick_0000.nii.gz", image[:, :, :5].astype(np.int16), thick, 1, 4)
    header_only(folder / "slice_0000.nii.gz", image[:, :, 9:10], oblique, 1, 1)
    header_only(folder / "sagittal_0000.nii", image[11:12], oblique, 1, 1)
    header_only(folder / "voxel_0000.nii.gz", image[15:16, 13:14, 9:10], oblique, 1, 1)
    header_only(folder / "flat_array_0000.nii.gz", image[:, :, 9], oblique, 1, 1)
    header_only(folder / "sform_only_0000.nii.gz", image, sheared_rounding(oblique), 3, 0)
    header_only(folder / "qform_only_0000.nii.gz", image.astype(np.uint8), oblique, 0, 1)
    header_only(folder / "left_handed_0000.nii.gz", image[::-1], oblique @ np.diag([-1, 1, 1, 1]), 1, 1)
    return folder


def test_predictions_have_the_shape_and_to_the_bit_the_position_of_their_inputs(finished, odd_inputs, tmp_path):
    segmented = segment(finished, odd_inputs, tmp_path / "out")
    inputs = sorted(odd_inputs.iterdir())
    assert len(segmented) == len(inputs)
    for path in inputs:
        name = path.name.replace("_0000", "")
        assert (tmp_path / "out" / name).is_file(), name
        given, predicted = nib.load(path), segmented[name.partition(".")[0]]
        assert predicted.shape == given.shape, name
        for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d"):
            assert predicted.header[field].tobytes() == given.header[field].tobytes(), (name, field)
        for field in ("qoffset_x", "qoffset_y", "qoffset_z"):
            assert predicted.header[field].tobytes() == given.header[field].tobytes(), (name, field)
        axes = 1 + given.ndim  # beyond, pixdim has no meaning
        assert predicted.header["pixdim"][:axes].tobytes() == given.header["pixdim"][:axes].tobytes(), name
        assert predicted.header.get_xyzt_units()[0] == given.header.get_xyzt_units()[0], name
        np.testing.assert_array_equal(predicted.affine, given.affine, err_msg=name)
        assert predicted.get_data_dtype() == np.uint8
        assert np.isin(np.asarray(predicted.dataobj), (0, 1, 2)).all()
        assert predicted.header["scl_slope"] in (0, 1) or np.isnan(predicted.header["scl_slope"])


def test_the_same_image_with_and_without_compression_is_segmented_equally(finished, odd_inputs, tmp_path):
    segmented = segment(finished, odd_inputs, tmp_path / "out")
    plain, packed = (np.asarray(segmented[name].dataobj) for name in ("oblique4", "oblique7"))
    np.testing.assert_array_equal(plain, packed)


def code(orientation: np.ndarray) -> str:
    return "".join(f"{'ijk'[axis]}{'+' if direction > 0 else '-'}" for axis, direction in orientation)


@pytest.mark.parametrize("orientation", ORIENTATIONS[::7], ids=code)
def test_restoring_what_was_prepared_gives_the_labels_back_on_the_files_own_axes(orientation, finished, tmp_path):
    """At the plan's own spacing nothing is lost; at another, only what resampling rounds at borders."""
    plan = RunFolder(finished).read_plan()
    configuration = plan.configurations[CONFIGURATION]
    z, y, x = configuration.spacing_mm
    image, labels = anatomy(np.random.default_rng(6))
    image[:4], labels[:4], image[:, -3:], labels[:, -3:] = 0, 0, 0, 0  # something to crop
    for spacing, least in (((x, y, z), 1.0), ((1.3, 0.8, 1.6), 0.93)):
        for name, array in (("image", image), ("labels", labels)):
            turned = nib.Nifti1Image(array, affine_ijk(spacing, (5, 21, -13))).as_reoriented(orientation)
            save_nifti(tmp_path / f"{name}.nii.gz", np.asarray(turned.dataobj), turned.affine)
        volume, truth = read_volume(tmp_path / "image.nii.gz"), read_volume(tmp_path / "labels.nii.gz")
        prepared = prepare(volume, plan, configuration)
        assert prepared.preparation.cropped_shape != prepared.preparation.uncropped_shape
        small = prepare_labels(truth, plan.task, prepared.preparation, configuration.resampling)
        assert small.shape == prepared.image.shape[1:]
        back = restore_labels(small, prepared.preparation, configuration.resampling)
        expected = class_indices(truth.array[0], plan.task)
        assert back.shape == expected.shape == volume.grid.shape
        assert back.dtype == small.dtype
        for value in (1, 2):
            a, b = back == value, expected == value
            assert 2 * (a & b).sum() / (a.sum() + b.sum()) >= least


def test_the_planner_is_a_function_of_its_arguments_alone(finished, monkeypatch, tmp_path):
    folder = RunFolder(finished)
    fingerprint, task = folder.read_fingerprint(), folder.read_plan().task
    before = fingerprint.to_json()
    once = make_plan(fingerprint, task, Budget(memory_gb=6))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail("the planner opens a file"))
    monkeypatch.setattr(Path, "open", lambda *a, **k: pytest.fail("the planner opens a file"))
    again = make_plan(Fingerprint.model_validate(before), task, Budget(memory_gb=6))
    monkeypatch.undo()
    assert again == once
    assert fingerprint.to_json() == before


def test_measuring_does_not_depend_on_the_number_of_workers(finished):
    dataset = read_dataset(finished.parent / "data")
    assert measure(dataset, 1).fingerprint == measure(dataset, 4).fingerprint == RunFolder(finished).read_fingerprint()


def test_every_record_of_a_run_reads_back_equal(finished, tmp_path):
    found = check_records(finished, tmp_path)
    elsewhere = {name for name in SCHEMAS if name.startswith("selection") or "previous" in name}  # tests/pipeline
    assert set(SCHEMAS) - found - elsewhere == {"models/*/fold_*/recipe.json"}  # only with a time budget


def test_every_record_of_a_run_on_pictures_and_of_a_time_budget_reads_back_equal(tmp_path, tmp_path_factory):
    pictures = finished_run_2d(tmp_path_factory.mktemp("pictures"))
    check_records(pictures, tmp_path)
    run = prepared_run(tmp_path_factory.mktemp("budget"), cases=3)
    train_run(run, CONFIGURATION, "all", TrainOptions(seconds=1, device=cpu()))
    assert "models/*/fold_*/recipe.json" in check_records(run, tmp_path)


def test_every_line_of_the_journal_reads_back_equal(finished):
    lines = (finished / "models" / CONFIGURATION / "fold_0" / "log.jsonl").read_text().splitlines()
    assert len(lines) > 60
    for line in lines:
        value = json.loads(line, parse_constant=refuse)
        record = parse_record(value, ValidationLine if "dice" in value else StepLine, "line")
        assert {key: v for key, v in record.to_json().items() if key in value or v is not None} == value


def test_a_run_that_was_moved_still_predicts(finished, tmp_path):
    moved = shutil.copytree(finished, tmp_path / "elsewhere")
    images = finished.parent / "data" / "imagesTs"
    segment(moved, images, tmp_path / "out")
    predictions = sorted((moved / "predictions").glob("*.nii.gz"))
    assert len(predictions) == 2
    for path in predictions:
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
