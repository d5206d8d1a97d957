"""Benchmark of the metrics: all scores of many labels in a large volume, against MONAI's distances alone, in one run.

Made-up organs or a label map of your own, enlarged to the size asked for; the prediction is the reference with its rows
moved by up to three voxels. Both sides get the same arrays and one thread. MONAI is given one label at a time, because
a float32 one-hot of 25 channels would need 8 GB; its time is the sum over labels of ``compute_hausdorff_distance``,
``compute_average_surface_distance`` and ``compute_surface_dice``, which crop to the label by themselves.

    OMP_NUM_THREADS=1 python scripts/bench/metrics.py --shape 300 512 512 --lesions --labels-file labels.nii.gz
"""

from __future__ import annotations

import argparse
import threading
import time
import warnings
from pathlib import Path
from statistics import median

import numpy as np
from scipy import ndimage

from medseg.evaluation.scores import score_arrays
from medseg.records.scores import Measures
from medseg.records.task import Channel, Label, Task


def main() -> None:
    options = parse()
    measures = Measures(lesion_overlap=0.1 if options.lesions else None)
    if options.labels_file:
        reference, spacing_mm = enlarged(options.labels_file, options.shape)
    else:
        reference, spacing_mm = (scattered if options.scattered else made_up)(options.shape, options.labels)
    prediction = bent(reference)
    values = [int(v) for v in np.unique(reference) if v > 0]
    print(f"{reference.shape} at {np.round(spacing_mm, 2)} mm, {len(values)} labels")
    task = Task(
        channels=(Channel(name="CT"),),
        labels=tuple(Label(name=str(v), value=v) for v in range(int(reference.max()) + 1)),
    )
    times = []
    with Memory() as memory:
        for _ in range(options.repeats):
            started = time.perf_counter()
            rows = score_arrays(prediction, reference, spacing_mm, task, measures)
            times.append(time.perf_counter() - started)
    ours = median(times)
    dice = np.mean([row.dice for row in rows if row.dice is not None])
    print(f"medseg  {ours:8.2f} s  (mean Dice {dice:.3f}, memory above the two volumes {memory.gb:.2f} GB)")
    chosen = values[:: max(1, len(values) // options.monai_labels)] if options.monai_labels else values
    if options.no_monai:
        return
    theirs = monai_seconds(prediction, reference, spacing_mm, chosen)
    if len(chosen) < len(values):
        subset = Task(channels=task.channels, labels=tuple(x for x in task.labels if x.value in (0, *chosen)))
        index = np.zeros(int(reference.max()) + 1, np.int16)
        index[chosen] = range(1, len(chosen) + 1)
        small = index[prediction], index[reference]
        started = time.perf_counter()
        score_arrays(*small, spacing_mm, subset, measures)
        ours = time.perf_counter() - started
        print(f"medseg  {ours:8.2f} s  for the {len(chosen)} labels given to MONAI")
    print(f"MONAI   {theirs:8.2f} s  for {len(chosen)} labels: {theirs / ours:.1f} times medseg's time")


def monai_seconds(prediction, reference, spacing_mm, values) -> float:
    """Seconds of MONAI's three distance metrics, label by label."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

        torch.set_num_threads(1)
        total = 0.0
        for value in values:
            a, b = prediction == value, reference == value
            a, b = (torch.from_numpy(np.ascontiguousarray(m, np.float32))[None, None] for m in (a, b))
            started = time.perf_counter()
            compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=list(spacing_mm))
            compute_average_surface_distance(a, b, include_background=True, symmetric=True, spacing=list(spacing_mm))
            compute_surface_dice(a, b, [2.0], include_background=True, spacing=list(spacing_mm))
            total += time.perf_counter() - started
    return total


def enlarged(path: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A label map (Z, Y, X) int16 enlarged to ``shape`` by its nearest voxels, with the spacing that this gives."""
    import nibabel

    image = nibabel.load(path)
    stored = np.asarray(image.dataobj).T
    _, labels = np.unique(stored, return_inverse=True)
    labels = labels.reshape(stored.shape).astype(np.int16)
    index = np.ix_(*[np.arange(n) * old // n for n, old in zip(shape, labels.shape, strict=True)])
    spacing = [
        float(s) * old / n for s, old, n in zip(image.header.get_zooms()[2::-1], labels.shape, shape, strict=True)
    ]
    return np.ascontiguousarray(labels[index]), tuple(spacing)


def made_up(shape: tuple[int, int, int], count: int) -> tuple[np.ndarray, tuple[float, float, float]]:
    """``count`` irregular organs that fill about half of the volume."""
    rng = np.random.default_rng(0)
    coarse = tuple(max(8, n // 8) for n in shape)
    best, labels = np.full(coarse, 0.9, np.float32), np.zeros(coarse, np.int16)
    for label in range(1, count + 1):
        field = ndimage.gaussian_filter(rng.normal(size=coarse).astype(np.float32), [n / 12 for n in coarse])
        field /= field.std()
        labels[field > best] = label
        best = np.maximum(best, field)
    index = np.ix_(*[np.arange(n) * old // n for n, old in zip(shape, coarse, strict=True)])
    return np.ascontiguousarray(labels[index]), (1.0, 0.8, 0.8)


def bent(labels: np.ndarray) -> np.ndarray:
    """``labels`` with every row moved by a few voxels that change slowly along the other axes."""
    z, y, x = labels.shape
    along_y = np.round(2.5 * np.sin(np.arange(z)[:, None] / 17 + np.arange(x)[None] / 23)).astype(int)
    rows = np.clip(np.arange(y)[None, :, None] + along_y[:, None, :], 0, y - 1)
    return np.ascontiguousarray(np.take_along_axis(labels, rows, axis=1))


def scattered(shape: tuple[int, int, int], count: int) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Blocks of ``count`` labels strewn over the volume, so that the box of every label nearly fills it."""
    rng, side = np.random.default_rng(0), 14
    coarse = tuple(-(-n // side) for n in shape)
    labels = np.where(rng.random(coarse) < 0.5, rng.integers(1, count + 1, coarse), 0).astype(np.int16)
    index = np.ix_(*[np.arange(n) // side for n in shape])
    return np.ascontiguousarray(labels[index]), (1.0, 0.8, 0.8)


class Memory:
    """The most memory held inside a ``with`` block above what was held before it, looked at every 10 ms."""

    def __enter__(self) -> Memory:
        self.before = self.most = resident_gb()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.01):
            self.most = max(self.most, resident_gb())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.watcher.join()

    @property
    def gb(self) -> float:
        return self.most - self.before


def resident_gb() -> float:
    """Memory held now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e9


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--labels", type=int, default=24, help="made-up labels (default: 24)")
    parser.add_argument("--labels-file", type=Path, help="a NIfTI label map instead of made-up organs")
    parser.add_argument("--scattered", action="store_true", help="made-up labels strewn over the whole volume")
    parser.add_argument("--lesions", action="store_true", help="count the lesions of every label too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--monai-labels", type=int, default=0, metavar="N", help="give MONAI only about N of the labels"
    )
    parser.add_argument("--no-monai", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
