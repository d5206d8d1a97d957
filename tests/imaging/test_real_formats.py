"""Every real .nrrd, .mha, .mgz and .tif of the shared data: equal to an independent reader, or refused with a code."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK

from medseg.errors import InputError
from medseg.imaging.geometry import nifti_affine
from medseg.imaging.volumes import file_ending, read_volume, write_labels

ITK = (".nrrd", ".seg.nrrd", ".nhdr", ".mha", ".mhd")
FREESURFER = (".mgz", ".mgh")
PAGES = (".tif", ".tiff")


def independent(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(Z, Y, X) and the affine (i, j, k) → RAS, or None for pages."""
    if path.suffix in FREESURFER:
        image = nib.load(path)
        return np.asanyarray(image.dataobj).T, image.affine
    image = SimpleITK.ReadImage(str(path))
    array = SimpleITK.GetArrayFromImage(image)
    if path.suffix in PAGES:
        return array.reshape(-1, *array.shape[-2:]), None
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return array, np.diag([-1, -1, 1, 1]) @ affine


def test_every_real_file_reads_as_an_independent_reader_reads_it_or_is_refused(shared: Path, tmp_path: Path) -> None:
    compared, refused = 0, []
    for path in sorted((shared / "data").rglob("*")):
        if file_ending(path.name) not in (*ITK, *FREESURFER, *PAGES):
            continue
        try:
            volume = read_volume(path)
        except InputError as error:
            refused += error.problems
            continue
        array, affine = independent(path)
        assert volume.array.dtype == array.dtype, path
        assert np.array_equal(volume.array[0], array), path
        assert affine is None or np.allclose(nifti_affine(volume.grid), affine, rtol=0, atol=1e-6), path
        if array.dtype.kind in "iu" and array.min() >= 0 and array.max() < 256:
            out = tmp_path / f"out{file_ending(path.name)}"
            write_labels(out, volume.array[0], volume.grid, volume.source)
            assert np.array_equal(read_volume(out).grid.affine, volume.grid.affine)
            assert np.array_equal(independent(out)[0], array)
        compared += 1
    assert compared >= 23
    assert all(problem.code and problem.measured and problem.action for problem in refused)
