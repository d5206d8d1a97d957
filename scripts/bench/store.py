"""Reading patches of a large prepared CT: our store against nnU-Net 2.8.1's .b2nd files with its block sizes.

Random 128^3 patches of image and labels, one reader, files in the page cache, the same places for both, in turns. The
files of nnU-Net are those that its own preprocessing wrote in scripts/bench/preprocess.py (chunks and blocks for its
plan's patch). Shown: patches per second of processor time (median of the turns), the ratio, the size on disk; and for
our store what the checksums cost: the first reading of every chunk against later ones.

    python scripts/bench/preprocess.py --nnunet ... --shared ../shared --work WORK --cases ct-0.8-24
    python scripts/bench/store.py --work WORK
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np

from medseg.preparation.store import Provenance, StoredCase, open_store, read_case_record
from medseg.preparation.writer import write_case

PATCH = 128
DATASET = "Dataset504_ct_08_24"
Place = tuple[slice, slice, slice]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of scripts/bench/preprocess.py --work")
    parser.add_argument("--patches", type=int, default=60, help="of a turn (default: 60)")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    theirs = arguments.work / "nnunet" / DATASET / "nnUNetPlans_3d_fullres" / "ct"
    ours = arguments.work / "runs" / DATASET / "prepared" / "3d_fullres"
    if not theirs.with_suffix(".b2nd").exists() or not ours.exists():
        sys.exit(f"prepare ct-0.8-24 first with scripts/bench/preprocess.py --work {arguments.work}")
    cases = {"float32": open_store(ours).case("ct"), "float16": half(open_store(ours).case("ct"), arguments.work)}
    readers = {"nnU-Net": nnunet_reader(theirs), **{name: medseg_reader(case) for name, case in cases.items()}}
    places = draw(cases["float32"].image.shape[1:], arguments.patches)
    for reader in readers.values():  # into the page cache, and every chunk verified
        read_all(reader, places)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(arguments.turns):
        for name, reader in readers.items():
            seconds[name].append(read_all(reader, places))
    rates = {name: len(places) / statistics.median(values) for name, values in seconds.items()}
    sizes = {"nnU-Net": sum(theirs.with_name(f"ct{end}").stat().st_size for end in (".b2nd", "_seg.b2nd"))}
    sizes |= {name: disk_bytes(case) for name, case in cases.items()}
    print("store     patches/s   ratio   image and labels on disk")
    for name, rate in rates.items():
        print(f"{name:8} {rate:10.1f} {rate / rates['nnU-Net']:7.2f}   {sizes[name] / 2**20:8.1f} MiB")
    for name in cases:
        fresh = statistics.median(whole(StoredCase(cases[name]._folder, cases[name].record)) for _ in range(3))
        case = cases[name]
        again = statistics.median(whole(case) for _ in range(3))
        print(f"{name}: whole image, first reading with checksums {fresh:.3f} s, later {again:.3f} s")
    error = np.abs(cases["float16"].image[:] - cases["float32"].image[:]).max()
    print(f"float16: largest difference {error:.1e} of {np.ptp(cases['float32'].image[:]):.1f} (normalised units)")


def half(case: StoredCase, work: Path) -> StoredCase:
    """The same case in half precision, beside it."""
    folder = work / "half"
    write_case(
        folder, "ct", case.image[:], case.labels[:].astype(np.int16), case.record.preparation, Provenance("half", ()),
        3, "float16",
    )  # fmt: skip
    record = read_case_record(folder, "ct")
    assert record is not None
    return StoredCase(folder, record)


def draw(shape: tuple[int, ...], count: int) -> list[Place]:
    """Places of random patches."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, np.array(shape) - PATCH + 1, (count, 3))
    return [(slice(z, z + PATCH), slice(y, y + PATCH), slice(x, x + PATCH)) for z, y, x in starts.tolist()]


def medseg_reader(case: StoredCase) -> Callable[[Place], float]:
    """As ``training.batches`` reads; half precision is given as float32."""

    def read(place: Place) -> float:
        return float(case.image[:, *place][0, 0, 0, 0]) + float(case.labels[place][0, 0, 0])

    return read


def nnunet_reader(path: Path) -> Callable[[Place], float]:
    """As nnU-Net's data loader reads: opened for every sample."""
    kwargs = {"mode": "r", "dparams": {"nthreads": 1}, "mmap_mode": None if sys.platform == "win32" else "r"}

    def read(place: Place) -> float:
        image = np.asarray(blosc2.open(urlpath=str(path) + ".b2nd", **kwargs)[:, *place])
        labels = np.asarray(blosc2.open(urlpath=str(path) + "_seg.b2nd", **kwargs)[:, *place])
        return float(image[0, 0, 0, 0]) + float(labels[0, 0, 0, 0])

    return read


def read_all(reader: Callable[[Place], float], places: list[Place]) -> float:
    """Processor seconds: the files are in memory, and waiting for a core on a busy machine does not count."""
    started = time.process_time()
    for place in places:
        reader(place)
    return time.process_time() - started


def whole(case: StoredCase) -> float:
    started = time.process_time()
    _ = case.image[:]
    return time.process_time() - started


def disk_bytes(case: StoredCase) -> int:
    return sum(checks.file_bytes for name, checks in case.record.checks.items() if ".foreground." not in name)


if __name__ == "__main__":
    main()
