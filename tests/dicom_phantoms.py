"""DICOM series written with pydicom for the tests: oblique, anisotropic, with faults on request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from phantoms import rotation
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

ROWS, COLUMNS, SLICES = 14, 11, 7
SPACING = (3.0, 0.7, 0.9)  # z, y, x
DIRECTIONS = rotation((12, -7, 25))  # columns x, y, z in LPS
ORIGIN = np.array([-31.5, 12.25, 207.0])


def voxels(slices: int = SLICES, seed: int = 3) -> np.ndarray:
    """(Z, Y, X) uint16 of 12 bits."""
    return np.random.default_rng(seed).integers(0, 4096, (slices, ROWS, COLUMNS)).astype(np.uint16)


def affine_ras(spacing=SPACING, directions=DIRECTIONS, origin=ORIGIN) -> np.ndarray:
    """Voxel (z, y, x) → RAS mm of the series."""
    affine = np.eye(4)
    affine[:3, :3] = (directions @ np.diag(spacing[::-1]))[:, ::-1]
    affine[:3, 3] = origin
    return np.diag([-1.0, -1, 1, 1]) @ affine


def position(index: float, origin=ORIGIN) -> np.ndarray:
    """LPS mm of the first pixel of a slice."""
    return origin + DIRECTIONS[:, 2] * SPACING[0] * index


def slice_of(pixels: np.ndarray, index: float, series: str = "1.2.3", **changes: object) -> Dataset:
    """One CT slice; ``changes`` are elements by keyword, None removes one."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.Modality, ds.SeriesNumber = series, "1.2", "CT", 4
    ds.PatientName = "Canary^Patient"
    ds.SeriesDescription = "thorax t1 post"
    ds.Rows, ds.Columns, ds.SamplesPerPixel = *pixels.shape[:2], 1 if pixels.ndim == 2 else 3
    ds.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8 * pixels.dtype.itemsize
    ds.BitsStored = 12 if pixels.dtype == np.uint16 else ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.PixelSpacing = [SPACING[1], SPACING[2]]
    ds.SliceThickness = 2.5
    ds.ImageOrientationPatient = [float(f"{v:.10f}") for v in (*DIRECTIONS[:, 0], *DIRECTIONS[:, 1])]
    ds.ImagePositionPatient = [float(f"{v:.8f}") for v in position(index)]
    ds.PixelData = pixels.tobytes()
    for key, value in changes.items():
        if value is None:
            delattr(ds, key)
        else:
            setattr(ds, key, value)
    return ds


def save(ds: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def write_series(
    folder: Path,
    array: np.ndarray | None = None,
    change: Callable[[Dataset, int], object] = lambda ds, z: None,
    series: str = "1.2.3",
    **changes: object,
) -> np.ndarray:
    """A series with shuffled names; ``change(dataset, z)`` edits each slice, and leaves it out if it returns False."""
    array = voxels() if array is None else array
    names = np.random.default_rng(1).permutation(len(array))
    for z, pixels in enumerate(array):
        ds = slice_of(pixels, z, series, InstanceNumber=int(names[z]) + 1, **changes)
        if change(ds, z) is not False:
            save(ds, folder / f"IM{names[z]:03d}.dcm")
    return array


def write_enhanced(path: Path, array: np.ndarray, order: np.ndarray, slopes: np.ndarray | None = None) -> Path:
    """An enhanced MR object of all slices in the given order of frames, a slope per frame if there are ``slopes``."""
    ds = slice_of(array[0], 0, NumberOfFrames=len(array), PixelSpacing=None, SliceThickness=None)
    del ds.ImageOrientationPatient, ds.ImagePositionPatient
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    orientation, measures, shared = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [float(f"{v:.10f}") for v in (*DIRECTIONS[:, 0], *DIRECTIONS[:, 1])]
    measures.PixelSpacing, measures.SliceThickness = [SPACING[1], SPACING[2]], 2.5
    shared.PlaneOrientationSequence = Sequence([orientation])
    shared.PixelMeasuresSequence = Sequence([measures])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for z in order:
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = [float(f"{v:.8f}") for v in position(z)]
        frame.PlanePositionSequence = Sequence([place])
        if slopes is not None:
            scale = Dataset()
            scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = float(slopes[z]), -5, "US"
            frame.PixelValueTransformationSequence = Sequence([scale])
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = Sequence(frames)
    ds.PixelData = array[order].tobytes()
    return save(ds, path)
