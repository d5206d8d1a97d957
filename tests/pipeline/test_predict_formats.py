"""Formats of predictions: as the input, as asked for, and the same voxels in each."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import slicerio
from phantoms import affine_ijk, anatomy
from tiny_runs import cpu

from medseg.cli.main import main
from medseg.errors import UsageError
from medseg.imaging.geometry import grid_from_nifti
from medseg.imaging.nrrd import write_nrrd
from medseg.imaging.volumes import read_volume
from medseg.pipeline.predict import PredictOptions, predict_files
from medseg.records.grid import Source


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """The same image in four formats."""
    folder = tmp_path_factory.mktemp("formats")
    image, _ = anatomy(np.random.default_rng(3))
    counts = np.clip(image, 0, None).astype(np.uint16)
    write_nrrd(folder / "a.nrrd", counts.T, grid_from_nifti(affine_ijk(), counts.shape), Source("", ""))
    itk = SimpleITK.ReadImage(str(folder / "a.nrrd"))
    SimpleITK.WriteImage(itk, str(folder / "b.mhd"))
    SimpleITK.WriteImage(itk, str(folder / "c.nii.gz"))
    nib.save(nib.MGHImage(counts.astype(np.float32), affine_ijk()), folder / "d.mgz")
    return folder


def test_predictions_have_the_format_of_their_input_or_the_nearest_that_is_written(finished, images, tmp_path):
    files = [images / name for name in ("a.nrrd", "b.mhd", "c.nii.gz", "d.mgz")]
    manifest = predict_files(finished, files, tmp_path, PredictOptions(device=cpu()))
    written = sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".json"))
    assert written == ["a.nrrd", "b.mha", "c.nii.gz", "d.nii.gz"]
    assert not manifest.failed
    volumes = [read_volume(tmp_path / name) for name in written]
    assert all(np.array_equal(volume.array, volumes[0].array) for volume in volumes)
    assert all(volumes[0].grid.corner_displacement_voxels(volume.grid) < 1e-3 for volume in volumes)
    for name, source in (("a.nrrd", "a.nrrd"), ("b.mha", "b.mhd"), ("c.nii.gz", "c.nii.gz")):
        assert np.array_equal(read_volume(tmp_path / name).grid.affine, read_volume(images / source).grid.affine)


def test_another_format_is_chosen_on_the_command_line_and_does_all_again(finished, images, tmp_path, capsys):
    command = ["predict", "--model", str(finished), "-i", str(images / "c.nii.gz"), "-o", str(tmp_path)]
    command += ["--device", "cpu", "--progress", "none"]
    assert main(command) == 0
    assert main([*command, "--format", ".seg.nrrd"]) == 0
    assert main([*command, "--format", ".seg.nrrd"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "1 segmented",
        "1 segmented",
        "0 segmented",
    ]
    found = slicerio.read_segmentation(str(tmp_path / "c.seg.nrrd"))
    assert [(s["name"], s["labelValue"]) for s in found["segments"]] == [("outer", 1), ("inner", 2)]
    assert np.array_equal(found["voxels"].T, read_volume(tmp_path / "c.nii.gz").array[0])
    (extension,) = nib.load(tmp_path / "c.nii.gz").header.extensions
    assert b"outer" in extension.content


def test_a_format_that_is_not_written_is_a_wrong_argument(finished, images, tmp_path):
    with pytest.raises(UsageError) as error:
        predict_files(finished, images, tmp_path / "out", PredictOptions(device=cpu(), ending=".mgz"))
    assert ".seg.nrrd" in str(error.value)
    assert not (tmp_path / "out").exists()
