"""Export alone: logits on the network's grid to labels on a large CT's grid, against nnU-Net 2.8.1's own function.

Made-up organs, smooth logits. Both sides get the same half-precision logits of a 3 mm network grid and give labels of
512 x 512 x 280; their labels are compared. nnU-Net's function needs classes x voxels x 2 bytes for its result alone, so
it is given at most ``--nnunet-classes`` of the classes, and the time of more is in proportion: it works class by class.
Each side runs in a process of its own, whose peak memory is shown.

    python scripts/bench/export.py --nnunet-python ENV/bin/python --classes 25 105
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SPACING, TARGET = (1.0, 0.8, 0.8), 3.0

MAKE = f"""
import sys, numpy as np
from scipy import ndimage
folder, classes, *shape = sys.argv[1:]
large = [int(n) for n in shape]
small = [max(1, round(n * s / {TARGET})) for n, s in zip(large, {SPACING})]
rng = np.random.default_rng(0)
logits = np.lib.format.open_memmap(folder + "/logits.npy", "w+", np.float16, (int(classes), *small))
for c in range(int(classes)):
    field = ndimage.gaussian_filter(rng.normal(size=small).astype(np.float32), [n / 14 for n in small])
    logits[c] = 12 * field / field.std() - (0 if c == 0 else 10) + rng.normal(0, 0.2, small)
logits[0] = 6
"""

OURS = """
import json, resource, sys, time
sys.path[:0] = [{tests!r}]
import numpy as np, torch
from medseg.inference.export import labels_from_logits
from medseg.records.plan import Resampling
from tiny_models import make_preparation, make_task
folder, threads, repeats, *shape = sys.argv[1:]
torch.set_num_threads(int(threads))
logits = torch.from_numpy(np.load(folder + "/logits.npy")).float()
large = tuple(int(n) for n in shape)
preparation = make_preparation(tuple(logits.shape[1:]), large, {spacing}, ({target},) * 3)
task = make_task(len(logits))
given = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
times = []
for _ in range(int(repeats) + 1):
    begun = time.perf_counter()
    labels = labels_from_logits(logits, preparation, Resampling(), task)
    times.append(time.perf_counter() - begun)
np.save(folder + "/ours.npy", labels.astype(np.uint8))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps(dict(first=times[0], times=times[1:], peak=peak, given=given)))
"""

THEIRS = """
import json, resource, sys, time
from types import SimpleNamespace as Space
import numpy as np, torch
from functools import partial
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape as convert
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.utilities.label_handling.label_handling import LabelManager
folder, classes, threads, repeats, *shape = sys.argv[1:]
torch.set_num_threads(int(threads))
logits = torch.from_numpy(np.load(folder + "/logits.npy", mmap_mode="r")[: int(classes)].copy())
large = tuple(int(n) for n in shape)
resample = partial(resample_data_or_seg_to_shape, is_seg=False, order=1, order_z=0, force_separate_z=None)
plans = Space(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2])
configuration = Space(spacing=[{target}] * 3, resampling_fn_probabilities=resample)
labels = LabelManager({{"background": 0, **{{str(c): c for c in range(1, len(logits))}}}}, None)
properties = dict(spacing=list({spacing}), shape_after_cropping_and_before_resampling=large,
    shape_before_cropping=large, bbox_used_for_cropping=[[0, n] for n in large])
times = []
for _ in range(int(repeats)):
    begun = time.perf_counter()
    found = convert(logits, plans, configuration, labels, properties, num_threads_torch=int(threads))
    times.append(time.perf_counter() - begun)
np.save(folder + "/theirs.npy", np.asarray(found).astype(np.uint8))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps(dict(times=times, peak=peak)))
"""


def main() -> None:
    options = parse()
    tests = str(Path(__file__).resolve().parents[2] / "tests")
    fill = {"spacing": SPACING, "target": TARGET, "tests": tests}
    shape = [str(n) for n in options.shape]
    for classes in options.classes:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            run(sys.executable, MAKE, folder, classes, *shape)
            ours = run(sys.executable, OURS.format(**fill), folder, options.threads, options.repeats, *shape)
            seconds = statistics.median(ours["times"])
            print(f"{classes} classes to {' x '.join(shape)}, {options.threads} threads")
            print(f"  medseg   {seconds:8.2f} s (first call {ours['first']:.2f} s)")
            print(f"           peak {ours['peak']:.2f} GiB, of which {ours['given']:.2f} GiB with the logits before")
            if options.nnunet_python is None:
                continue
            count = min(classes, options.nnunet_classes)
            command = (options.nnunet_python, THEIRS.format(**fill), folder, count)
            theirs = run(*command, options.threads, 1, *shape)
            reference = statistics.median(theirs["times"]) * classes / count
            note = "" if count == classes else f" (in proportion to {count} classes measured)"
            print(f"  nnU-Net  {reference:8.2f} s{note}, peak {theirs['peak']:.2f} GiB")
            print(f"  ratio    {reference / seconds:8.1f}")
            if count == classes:
                compare(Path(folder))


def compare(folder: Path) -> None:
    import numpy as np

    ours, theirs = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ours", "theirs"))
    differing = int((ours != theirs).sum())
    print(f"  voxels that differ (nnU-Net rounds to half precision): {differing} of {ours.size}")


def run(python: str, code: str, *arguments: object) -> dict:
    done = subprocess.run([python, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(280, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--classes", type=int, nargs="+", default=(25, 105))
    parser.add_argument("--nnunet-python", help="Python of an environment with nnU-Net 2.8.1")
    parser.add_argument("--nnunet-classes", type=int, default=25, metavar="N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
