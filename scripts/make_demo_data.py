"""Build the demo data set: made-up subjects with real anatomy, in nnU-Net's folder layout.

The anatomy is the ICBM152 2009 T1 template with its grey- and white-matter maps, which lie in the nilearn wheel
(``pip install "medseg[demo]"``). Every subject is the template under its own affine map and smooth diffeomorphism,
with its own contrast, bias field and noise, scanned as a slab of thick slices on its own oblique grid whose axes run in
one of eight directions. Labels are the arg max of the tissue probabilities on that grid. A seed gives the same bytes
again.

    python scripts/make_demo_data.py demo/data
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float32]

LABELS = {"background": 0, "deep CSF": 1, "grey matter": 2, "white matter": 3}
ORIENTATIONS = ("RAS", "LPS", "PSR", "LAS", "RPI", "ASL", "SPL", "PIR")
SPACING_MM = (2.35, 2.35, 3.0)  # right, anterior, superior; the slices are thick, as in much clinical MR
SLICES = (27, 34)  # at least, less than: a slab through the ventricles, so that two cores learn it in minutes
VELOCITY_STEP_MM = 6.0
DEEP_MM = 6.0  # template voxels are 1 mm


@dataclass(frozen=True, slots=True)
class Template:
    """T1 in 0..1 and tissue probabilities (CSF, grey, white), all (3 + 1, I, J, K), with the affine to RAS mm."""

    maps: Array
    affine: NDArray[np.float64]


def read_template() -> Template:
    """The template files of the nilearn wheel; nilearn itself is not imported, which keeps scikit-learn out."""
    package = importlib.util.find_spec("nilearn")
    if package is None or package.origin is None:
        sys.exit('make_demo_data: nilearn is not installed; run: pip install "medseg[demo]"')
    folder = Path(package.origin).parent / "datasets" / "data"
    files = [nib.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz") for name in ("t1", "gm", "wm")]
    t1, grey, white = (np.asarray(file.dataobj, dtype=np.float32) / 255 for file in files)
    brain = (t1 > 0).astype(np.float32)  # the template is published without skull
    grey, white = grey * brain, white * brain
    csf = np.clip(brain - grey - white, 0, 1) * deep(brain)
    # half the finer voxel: what a scanner's point spread does in plane; across slices see `scan`
    maps = np.stack([ndimage.gaussian_filter(m, 0.8, truncate=3) for m in (t1, csf, grey, white)])
    return Template(maps, files[0].affine)


def deep(brain: Array) -> Array:
    """1 deeper than ``DEEP_MM`` under the brain's smoothed surface, else 0.

    Near the surface what is neither grey nor white is partly fluid, partly where the template was cut out of its head:
    no voxel there is surely one or the other, so only the ventricles, cisterns and deep fissures become a label.
    """
    ball = 8  # closing with a ball of this radius: grow the brain, then measure the depth from the grown surface
    away = ndimage.distance_transform_edt(np.pad(brain, ball) == 0) > ball
    depth = ndimage.distance_transform_edt(~away) - ball
    return (depth[(slice(ball, -ball),) * 3] > DEEP_MM).astype(np.float32)


def velocity(rng: np.random.Generator, extent_mm: NDArray[np.float64]) -> Array:
    """A smooth random velocity field (3, I, J, K) in mm on a grid of ``VELOCITY_STEP_MM``, at most about 7 mm."""
    shape = tuple(int(n) for n in np.ceil(extent_mm / VELOCITY_STEP_MM) + 1)
    field = np.zeros((3, *shape), np.float32)
    for wavelength_mm, size_mm in ((60.0, 2.4), (30.0, 0.9)):
        sigma = wavelength_mm / 4 / VELOCITY_STEP_MM
        for component in field:
            smooth = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
            component += (smooth * (size_mm / smooth.std())).astype(np.float32)
    return np.clip(field, -7, 7)


def flow(points: Array, field: Array, origin_mm: NDArray[np.float64], steps: int = 4) -> Array:
    """Move points (3, N) mm along the velocity field for unit time; small Euler steps keep the map invertible."""
    for _ in range(steps):
        index = (points - origin_mm[:, None].astype(np.float32)) / np.float32(VELOCITY_STEP_MM)
        moved = [ndimage.map_coordinates(component, index, order=1, mode="nearest") for component in field]
        points = points + np.stack(moved) / np.float32(steps)
    return points


def rotation(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation matrix about x, then y, then z."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    rx = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    ry = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    rz = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return np.asarray(rz @ ry @ rx)


def brain_points(template: Template) -> NDArray[np.float64]:
    """Points (3, N) in RAS mm spread over the template's brain."""
    brain = template.maps[0, ::5, ::5, ::5] > 0.02
    return (template.affine @ np.vstack([5 * np.argwhere(brain).T, np.ones(brain.sum())]))[:3]


def scan(template: Template, rng: np.random.Generator, coarseness: float) -> tuple[Array, NDArray[np.float64]]:
    """One subject on one scanner grid: maps (4, I, J, K) with i → right, j → anterior, k → superior, and the affine."""
    brain = brain_points(template)
    centre = brain.mean(axis=1, keepdims=True)
    head = rotation(rng.uniform(-6, 6, 3)) @ np.diag(rng.uniform(0.9, 1.1, 3))  # template mm → subject mm
    head += rng.uniform(-0.03, 0.03, (3, 3))  # shear
    offset = rng.uniform(-25, 25, (3, 1))  # where the head lies in the scanner
    field = velocity(rng, np.ptp(brain, axis=1) + 40)
    field_origin = brain.min(axis=1) - 20

    spacing = np.array(SPACING_MM) * coarseness * rng.uniform(0.94, 1.06, 2)[[0, 0, 1]]
    axes = rotation(rng.uniform(-12, 12, 3))
    deformed = flow(brain.astype(np.float32), -field, field_origin)  # against the field: from template to subject
    along = axes.T @ (head @ (deformed - centre))  # in mm along the grid's axes
    low, high = along.min(axis=1) - 3, along.max(axis=1) + 3
    slab = rng.integers(*SLICES) / coarseness * spacing[2]
    low[2] = (low[2] + high[2] - slab) / 2 + rng.uniform(-8, 8)
    high[2] = low[2] + slab
    shape = tuple(int(n) for n in np.ceil((high - low) / spacing - 1e-6))
    affine = np.eye(4)
    affine[:3, :3] = axes @ np.diag(spacing)
    affine[:3, 3] = offset[:, 0] + axes @ ((low + high) / 2 - spacing * (np.array(shape) - 1) / 2)

    voxels = np.indices(shape, dtype=np.float64).reshape(3, -1)
    maps = np.zeros((len(template.maps), voxels.shape[1]), np.float32)
    to_template = np.linalg.inv(template.affine)
    for sub_slice in (-0.25, 0.25):  # a thick slice is the mean of two thin ones
        in_scanner = affine[:3, :3] @ (voxels + np.array([[0], [0], [sub_slice]])) + affine[:3, 3:]
        in_template = np.linalg.inv(head) @ (in_scanner - offset) + centre
        points = flow(in_template.astype(np.float32), field, field_origin)
        index = to_template[:3, :3].astype(np.float32) @ points + to_template[:3, 3:].astype(np.float32)
        for row, source in zip(maps, template.maps, strict=True):
            row += ndimage.map_coordinates(source, index, order=1, mode="constant") / np.float32(2)
    margins = rng.integers(3, 12, (3, 2))
    margins[2] = 0  # the slab cuts through the head
    return pad(maps.reshape(-1, *shape), affine, margins)


def pad(maps: Array, affine: NDArray[np.float64], margins: NDArray[np.int64]) -> tuple[Array, NDArray[np.float64]]:
    """Air around the head: ``margins`` (3, 2) voxels before and after each axis; the head stays where it is."""
    moved = affine.copy()
    moved[:3, 3] -= affine[:3, :3] @ margins[:, 0]
    return np.pad(maps, [(0, 0), *map(tuple, margins)]), moved


def labels_of(maps: Array) -> NDArray[np.uint8]:
    """Arg max of background, CSF, grey and white matter: (4, I, J, K) maps → (I, J, K)."""
    tissues = maps[1:]
    background = np.clip(1 - tissues.sum(axis=0), 0, 1)
    return np.argmax(np.concatenate([background[None], tissues]), axis=0).astype(np.uint8)


def acquire(maps: Array, rng: np.random.Generator) -> NDArray[np.int16]:
    """The picture that a scanner makes of the maps: contrast, bias field, Rician noise, skull stripped, own units."""
    t1, csf, grey, white = maps
    brain = csf + grey + white
    clean = np.clip(t1, 0, 1) ** rng.uniform(0.8, 1.25)
    clean = clean + csf * rng.uniform(-0.06, 0.06) + grey * rng.uniform(-0.05, 0.04) + white * rng.uniform(-0.03, 0.06)
    coarse = rng.standard_normal((4, 4, 4))
    bias = ndimage.zoom(coarse, np.array(t1.shape) / 4, order=3, mode="nearest", grid_mode=True)
    bias = np.exp(0.12 * bias / np.abs(bias).max() * 2)
    noise = rng.uniform(0.012, 0.028)
    real = clean * bias + noise * rng.standard_normal(t1.shape)
    imaginary = noise * rng.standard_normal(t1.shape)
    image = np.hypot(real, imaginary) * (brain > rng.uniform(0.15, 0.35))
    return np.round(image * rng.uniform(300, 1500)).astype(np.int16)


def reorient(array: NDArray[np.generic], affine: NDArray[np.float64], codes: str) -> nib.Nifti1Image:
    """The same picture with its array axes in the order and directions of ``codes``; no voxel moves in the world."""
    here = nib.io_orientation(affine)
    change = nib.orientations.ornt_transform(here, axcodes2ornt(codes))
    turned = affine @ inv_ornt_aff(change, array.shape)
    image = nib.Nifti1Image(np.ascontiguousarray(apply_orientation(array, change)), turned)
    image.set_sform(turned, 1)
    image.set_qform(turned, 1)
    image.header.set_xyzt_units("mm")
    return image


def write(path: Path, image: nib.Nifti1Image) -> None:
    """Write ``.nii.gz`` without a time stamp, so that equal volumes are equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))


def make(folder: Path, training: int = 24, held_out: int = 6, seed: int = 2009, coarseness: float = 1.0) -> None:
    """Write the data set; ``dataset.json`` comes last and says that the rest is complete."""
    template = read_template()
    for number in range(training + held_out):
        rng = np.random.default_rng([seed, number])
        maps, affine = scan(template, rng, coarseness)
        codes = ORIENTATIONS[number % len(ORIENTATIONS)]
        name, part = f"subject_{number + 1:02d}", "Tr" if number < training else "Ts"
        write(folder / f"images{part}" / f"{name}_0000.nii.gz", reorient(acquire(maps, rng), affine, codes))
        write(folder / f"labels{part}" / f"{name}.nii.gz", reorient(labels_of(maps), affine, codes))
    description = {
        "name": "DemoBrains",
        "description": "Made-up subjects: the ICBM152 2009 T1 template, deformed, with made-up contrast and noise",
        "reference": "ICBM152 2009a nonlinear symmetric template, McConnell Brain Imaging Centre, McGill University",
        "channel_names": {"0": "T1"},
        "labels": LABELS,
        "numTraining": training,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")


def main() -> None:
    """Parse, build unless it is there, say so."""
    parser = argparse.ArgumentParser(description="Build the demo data set from the ICBM152 template.")
    parser.add_argument("folder", type=Path, help="where to write it (nnU-Net layout)")
    parser.add_argument("--training", type=int, default=24, help="training subjects (24)")
    parser.add_argument("--held-out", type=int, default=6, help="held-out subjects, imagesTs and labelsTs (6)")
    parser.add_argument("--seed", type=int, default=2009, help="another seed, other subjects (2009)")
    options = parser.parse_args()
    if (options.folder / "dataset.json").exists():
        print(f"{options.folder} is there already; remove it to build it again")
        return
    start = time.monotonic()
    make(options.folder, options.training, options.held_out, options.seed)
    subjects = options.training + options.held_out
    print(f"{options.folder}: {subjects} subjects in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
