"""Reading and writing NIfTI side by side with SimpleITK and nibabel: time, file size, peak memory, in one run.

Reading: a real CT of 512 x 512 x 300 voxels, int16, once resampled with scanner noise (make_ct_case.py) and once
tiled, without added noise. Writing: its label map with 24 organs, once resampled by the nearest voxel (blocky, packs
best) and once by linear interpolation of each organ (smooth, as networks draw). medseg's times hold what the others
leave out: checksums while reading; fsync, reading back and comparing while writing. Files are in the page cache; the
runs of all three alternate, so that a busy machine slows all; trust the ratios.

    python scripts/bench/read_write.py [--shared ../shared] [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK
from scipy import ndimage

from medseg.imaging.nifti import read_nifti, write_nifti
from medseg.records.grid import Source

SHAPE = (300, 512, 512)
READERS: dict[str, Callable[[Path], np.ndarray]] = {
    "medseg": lambda path: read_nifti(path).array[0],
    "SimpleITK": lambda path: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))),
    "nibabel": lambda path: np.asarray(nib.load(path).dataobj).T,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and tools/")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each (default: 7); medians are shown")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # the child processes
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.peak[0], Path(arguments.peak[1])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        images, labels = make_cases(arguments.shared.resolve(), work)
        print(f"{'':28}{'median s':>10}{'ratio':>8}{'MB file':>10}{'MB beyond the array':>22}")
        for name, path in images.items():
            compare_readers(name, path, arguments.repeats)
        for name, path in labels.items():
            compare_readers(name, path, arguments.repeats)
        for name, path in labels.items():
            compare_writers(name, path, work, arguments.repeats)


def make_cases(shared: Path, work: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Write the images and label maps; name -> path."""
    tool = [
        sys.executable,
        str(shared / "tools" / "make_ct_case.py"),
        "--size",
        *map(str, SHAPE),
        "--output",
        str(work),
    ]
    subprocess.run(tool, check=True, stdout=subprocess.DEVNULL)
    real, organs = (nib.load(shared / "data" / "ct_thorax" / name) for name in ("image.nii.gz", "labels25.nii.gz"))
    affine = nib.load(work / "ct_0000.nii.gz").affine
    voxels = np.asarray(real.dataobj).astype(np.int16)
    repeats = [-(-n // m) for n, m in zip(SHAPE[::-1], voxels.shape, strict=True)]
    tiled = np.tile(voxels, repeats)[: SHAPE[2], : SHAPE[1], : SHAPE[0]]
    nib.save(nib.Nifti1Image(tiled, affine), work / "tiled.nii.gz")
    nib.save(nib.Nifti1Image(smooth(np.asarray(organs.dataobj).astype(np.uint8)), affine), work / "smooth.nii.gz")
    images = {"image, noisy": work / "ct_0000.nii.gz", "image, tiled": work / "tiled.nii.gz"}
    return images, {"labels, blocky": work / "ct_labels.nii.gz", "labels, smooth": work / "smooth.nii.gz"}


def smooth(labels: np.ndarray) -> np.ndarray:
    """Labels (i, j, k) on the large grid, each voxel the organ with the largest linear interpolation."""
    zoom = np.array(SHAPE[::-1]) / labels.shape
    result = np.zeros(SHAPE[::-1], np.uint8)
    largest = np.full(SHAPE[::-1], -1, np.float32)
    for organ in np.unique(labels):
        share = ndimage.zoom((labels == organ).astype(np.float32), zoom, order=1, mode="nearest", grid_mode=True)
        larger = share > largest
        result[larger], largest[larger] = organ, share[larger]
    return result


def compare_readers(name: str, path: Path, repeats: int) -> None:
    first, *others = (read(path) for read in READERS.values())
    if not all(np.array_equal(first, other) for other in others):
        sys.exit(f"{name}: the readers disagree")
    del first, others
    times = measure({tool: lambda read=read: read(path) for tool, read in READERS.items()}, repeats)
    for tool, seconds in times.items():
        command = [sys.executable, __file__, "--peak", tool, str(path)]
        beyond = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        size = path.stat().st_size / 1e6
        print(f"{f'read {name}, {tool}':28}{ratio(times, seconds)}{size:10.2f}{float(beyond):22.0f}")


def compare_writers(name: str, path: Path, work: Path, repeats: int) -> None:
    volume = read_nifti(path)
    labels = volume.array[0]
    itk = SimpleITK.GetImageFromArray(labels)
    image = nib.Nifti1Image(labels.T, nib.load(path).affine)
    targets = {tool: work / f"{tool}.nii.gz" for tool in READERS}
    writers = {
        "medseg": lambda: write_nifti(targets["medseg"], labels, volume.grid, Source("", "")),
        "SimpleITK": lambda: SimpleITK.WriteImage(itk, str(targets["SimpleITK"]), useCompression=True),
        "nibabel": lambda: nib.save(image, targets["nibabel"]),
    }
    times = measure(writers, repeats)
    for tool, seconds in times.items():
        if not np.array_equal(np.asarray(nib.load(targets[tool]).dataobj).T, labels):
            sys.exit(f"{name}: what {tool} wrote is something else")
        print(f"{f'write {name}, {tool}':28}{ratio(times, seconds)}{targets[tool].stat().st_size / 1e6:10.2f}")


def measure(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def ratio(times: dict[str, float], seconds: float) -> str:
    return f"{seconds:10.3f}{seconds / times['medseg']:8.2f}"


def peak(tool: str, path: Path) -> float:
    """Megabytes that reading takes at its peak beyond the array itself (Linux)."""
    before = _most_bytes()
    array = READERS[tool](path)
    return (_most_bytes() - before - array.nbytes) / 1e6


def _most_bytes() -> int:
    """The most memory this process ever had; ``getrusage`` would hand down that of its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    main()
