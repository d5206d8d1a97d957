"""Phantoms: small made-up anatomy with three different side lengths, anisotropic spacing and oblique affines.

Written with nibabel and Pillow, never with medseg's own writers.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE_IJK = (30, 26, 18)
SPACING_IJK = (0.9, 1.1, 2.0)


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    """Rotation about x, then y, then z."""
    a, b, c = np.deg2rad(degrees)
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return rz @ ry @ rx


def affine_ijk(
    spacing: tuple[float, float, float] = SPACING_IJK,
    degrees: tuple[float, float, float] = (8, -5, 12),
    origin: tuple[float, float, float] = (-20.0, 14.0, 31.0),
) -> np.ndarray:
    """NIfTI affine (i, j, k) → RAS mm, oblique by default."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


def anatomy(rng: np.random.Generator, shape: tuple[int, int, int] = SHAPE_IJK) -> tuple[np.ndarray, np.ndarray]:
    """Image float32 and labels uint8 in (i, j, k): an ellipsoid (1) that holds a smaller, off-centre one (2)."""
    centre = np.array(shape) / 2 + rng.uniform(-1.5, 1.5, 3)
    radii = np.array(shape) * rng.uniform(0.28, 0.36, 3)
    points = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    outer = (((points - centre) / radii) ** 2).sum(-1) < 1
    inner = (((points - centre - radii * (0.35, 0.2, -0.25)) / (radii * 0.45)) ** 2).sum(-1) < 1
    labels = np.where(inner, 2, np.where(outer, 1, 0)).astype(np.uint8)
    image = np.array([20.0, 100.0, 180.0])[labels] + rng.normal(0, 6, shape) + 10 * rng.uniform()
    return image.astype(np.float32), labels


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write (i, j, k[, …]) with both form codes set and millimetres."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)


def dataset_json(cases: int, **changes: object) -> dict:
    """nnU-Net v2 dataset.json of the phantom task."""
    return {
        "name": "Phantom",
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "outer": 1, "inner": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    } | changes


def make_dataset(folder: Path, cases: int = 4, seed: int = 0, channels: int = 1) -> Path:
    """An nnU-Net v2 data set of ``cases`` phantoms of slightly different shapes, ids ``case_00`` …"""
    rng = np.random.default_rng(seed)
    for index in range(cases):
        shape = tuple(int(n + d) for n, d in zip(SHAPE_IJK, rng.integers(-2, 3, 3), strict=True))
        image, labels = anatomy(rng, shape)
        affine = affine_ijk(origin=tuple(rng.uniform(-30, 30, 3)))
        for channel in range(channels):
            noisy = image if channel == 0 else image[..., :] * 0.5 + rng.normal(0, 3, shape).astype(np.float32)
            save_nifti(folder / "imagesTr" / f"case_{index:02d}_{channel:04d}.nii.gz", noisy, affine)
        save_nifti(folder / "labelsTr" / f"case_{index:02d}.nii.gz", labels, affine)
    names = {str(c): "MRI" if c == 0 else f"MRI{c}" for c in range(channels)}
    (folder / "dataset.json").write_text(json.dumps(dataset_json(cases, channel_names=names)))
    return folder


def make_dataset_2d(folder: Path, cases: int = 6, seed: int = 0) -> Path:
    """An nnU-Net v2 data set of 2D RGB ``.png`` images with bright discs, ids ``img_00`` …"""
    from PIL import Image

    rng = np.random.default_rng(seed)
    (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
    (folder / "labelsTr").mkdir(parents=True, exist_ok=True)
    for index in range(cases):
        shape = (40 + int(rng.integers(0, 9)), 56 + int(rng.integers(0, 9)))
        y, x = np.mgrid[: shape[0], : shape[1]]
        cy, cx, r = rng.uniform(14, 26), rng.uniform(16, 38), rng.uniform(7, 11)
        labels = ((y - cy) ** 2 + (x - cx) ** 2 < r**2).astype(np.uint8)
        image = np.clip(60 + 120 * labels[..., None] * (1.0, 0.7, 0.4) + rng.normal(0, 8, (*shape, 3)), 0, 255)
        Image.fromarray(image.astype(np.uint8)).save(folder / "imagesTr" / f"img_{index:02d}_0000.png")
        Image.fromarray(labels).save(folder / "labelsTr" / f"img_{index:02d}.png")
    changes = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "disc": 1}}
    (folder / "dataset.json").write_text(json.dumps(dataset_json(cases, file_ending=".png", **changes)))
    return folder
