"""Preprocessing side by side with nnU-Net 2.8.1: time, peak memory and difference of what both prepare, in one run.

Cases: a real CT on a clinical matrix of 512 x 512 x 280 to 1.5 and to 0.8 mm, with 1 and with 24 labels; a two-channel
MR of thick slices (separate z); and the hippocampus set, where both commands are timed with the start of their
processes. The single cases are timed from opening the files to closing the prepared ones, imports left out; peak
memory is that of the whole process. Runs of both alternate, so that a busy machine slows both; trust the ratios, and
on a very busy one that of processor time, which waiting for a core does not enter.

    python scripts/bench/preprocess.py --nnunet NNUNET_ENV/bin/python --shared ../shared [--cases ct-1.5-24 mr]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = ("ct-1.5-1", "ct-1.5-24", "ct-0.8-1", "ct-0.8-24", "mr", "hippocampus")
NUMBERS = {name: 501 + index for index, name in enumerate(CASES)}
CONFIGURATION = "3d_fullres"
MR_SHAPE, MR_SPACING, MR_TARGET = (36, 512, 512), (4.5, 0.46875, 0.46875), (4.0, 0.6, 0.6)  # z, y, x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet", type=Path, help="python of an environment with nnU-Net 2.8.1")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and tools/")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3); medians are shown")
    parser.add_argument("--work", type=Path, help="folder for the data, kept (default: a temporary one)")
    parser.add_argument("--side", choices=["medseg", "nnunet"], help=argparse.SUPPRESS)  # the child processes
    arguments = parser.parse_args()
    if arguments.side:
        job = json.loads(sys.stdin.read())
        print("\n" + json.dumps((_medseg_side if arguments.side == "medseg" else _nnunet_side)(job)))
        return
    if arguments.nnunet is None:
        parser.error("--nnunet is needed")
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        print("case           medseg     nnU-Net   ratio  of processor time  memory                   image    labels")
        for name in arguments.cases:
            compare(name, work, arguments.shared.resolve(), arguments.nnunet, arguments.repeats)


def compare(name: str, work: Path, shared: Path, nnunet: Path, repeats: int) -> None:
    """Make a case, let both prepare it ``repeats`` times in turn, print a line."""
    job = make_job(name, work, shared)
    times: dict[str, list[dict[str, float]]] = {"medseg": [], "nnunet": []}
    for _ in range(repeats):
        for side, results in times.items():
            python = sys.executable if side == "medseg" else nnunet
            results.append(_command(side, python, job) if name == "hippocampus" else _child(side, python, job))
    seconds, cpu, peaks = (
        {side: statistics.median(result[what] for result in results) for side, results in times.items()}
        for what in ("seconds", "cpu_seconds", "peak_gib")
    )
    image, labels = differences(job)
    ratio, cpu_ratio = (values["nnunet"] / values["medseg"] for values in (seconds, cpu))
    print(
        f"{name:12} {seconds['medseg']:7.2f} s {seconds['nnunet']:9.2f} s {ratio:6.1f}x {cpu_ratio:6.1f}x"
        f"            {peaks['medseg']:.2f} of {peaks['nnunet']:.2f} GiB ({peaks['medseg'] / peaks['nnunet']:4.0%})"
        f"  {image:.1e} {labels:8d}",
        flush=True,
    )


def make_job(name: str, work: Path, shared: Path) -> dict[str, str]:
    """Data set, medseg run and nnU-Net folders of a case, both with the same plan."""
    from medseg.artefacts import commit_json
    from medseg.dataset.fingerprint import measure
    from medseg.dataset.layouts import read_dataset
    from medseg.interop.nnunet_plans import Naming, nnunet_plans
    from medseg.planning.planner import make_plan
    from medseg.records.base import write_record
    from medseg.records.dataset import DatasetReference

    dataset = f"Dataset{NUMBERS[name]}_{name.replace('-', '_').replace('.', '')}"
    raw, run, prepared = work / "raw" / dataset, work / "runs" / dataset, work / "nnunet" / dataset
    if not raw.exists():
        {"ct": make_ct, "mr": make_mr, "hi": make_hippocampus}[name[:2]](raw, shared, name)
    dataset_read = read_dataset(raw)
    fingerprint = measure(dataset_read, 1).fingerprint
    plan = make_plan(fingerprint, dataset_read.task)
    if name != "hippocampus":
        spacing = MR_TARGET if name == "mr" else (float(name.split("-")[1]),) * 3
        configuration = plan.configurations[CONFIGURATION].model_copy(update={"spacing_mm": spacing})
        plan = plan.model_copy(update={"configurations": {CONFIGURATION: configuration}, "transpose": (0, 1, 2)})
    reference = DatasetReference(root=str(raw), task=plan.task, cases=tuple(case.id for case in dataset_read.cases))
    for file, record in (("plan", plan), ("fingerprint", fingerprint), ("dataset", reference)):
        write_record(run / f"{file}.json", record)
    theirs = nnunet_plans(plan, fingerprint, Naming.of(plan, dataset, "SimpleITKIO"))
    commit_json(prepared / "nnUNetPlans.json", theirs)
    commit_json(prepared / "dataset.json", json.loads((raw / "dataset.json").read_text()))
    return {"dataset": dataset, "number": str(NUMBERS[name]), "raw": str(raw), "run": str(run), "nnunet": str(prepared)}


def make_ct(raw: Path, shared: Path, name: str) -> None:
    """The large CT in canonical orientation (nnU-Net keeps a file's own), with 24 labels or their union."""
    import nibabel as nib
    import numpy as np

    made = raw.parent / "ct"
    if not made.exists():
        tool = shared / "tools" / "make_ct_case.py"
        command = [sys.executable, tool, "--size", "280", "512", "512", "--output", made]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    image, labels = (nib.as_closest_canonical(nib.load(made / f)) for f in ("ct_0000.nii.gz", "ct_labels.nii.gz"))
    values = np.asarray(labels.dataobj)
    names = {"background": 0} | {f"label {v}": v for v in range(1, 25)}
    if name.endswith("-1"):
        values, names = (values > 0).astype(np.uint8), {"background": 0, "body": 1}
    _save(raw, "ct", [np.asarray(image.dataobj)], values, image.affine, names, "CT")


def make_mr(raw: Path, shared: Path, name: str) -> None:
    """Two channels of a real MR on thick slices with a fine matrix."""
    import nibabel as nib
    import numpy as np
    from scipy import ndimage as ndi

    source = shared / "data" / "glioma"
    paths = [source / "imagesTr" / f"pat0003_1_000{c}.nii.gz" for c in range(2)]
    images = [nib.as_closest_canonical(nib.load(path)) for path in paths]
    labels = nib.as_closest_canonical(nib.load(source / "labelsTr" / "pat0003_1.nii.gz"))
    zoom = np.array(MR_SHAPE[::-1]) / images[0].shape
    arrays = [
        ndi.zoom(np.asarray(i.dataobj, np.float32), zoom, order=1, mode="nearest", grid_mode=True) for i in images
    ]
    noise = np.random.default_rng(0)
    arrays = [np.where(a > 0, np.maximum(a + noise.normal(0, 5, a.shape), 1), 0).astype(np.int16) for a in arrays]
    values = ndi.zoom(np.asarray(labels.dataobj).astype(np.uint8), zoom, order=0, mode="nearest", grid_mode=True)
    values[(arrays[0] == 0) & (arrays[1] == 0)] = 0  # in training nnU-Net normalises with labels outside the head too
    affine = np.diag([*MR_SPACING[::-1], 1.0])
    names = {"background": 0} | {f"label {v}": v for v in range(1, int(values.max()) + 1)}
    _save(raw, "mr", arrays, values, affine, names, "T1c", "FLAIR")


def make_hippocampus(raw: Path, shared: Path, name: str) -> None:
    """Links to the hippocampus set, all labelled volumes."""
    source = shared / "data" / "hippocampus"
    raw.mkdir(parents=True)
    for what in ("imagesTr", "labelsTr", "dataset.json"):
        (raw / what).symlink_to(source / what)


def _save(raw: Path, case: str, channels, labels, affine, names: dict[str, int], *kinds: str) -> None:
    import nibabel as nib

    (raw / "imagesTr").mkdir(parents=True)
    (raw / "labelsTr").mkdir()
    for index, array in enumerate(channels):
        nib.save(nib.Nifti1Image(array, affine), raw / "imagesTr" / f"{case}_{index:04d}.nii.gz")
    nib.save(nib.Nifti1Image(labels, affine), raw / "labelsTr" / f"{case}.nii.gz")
    declared = {"channel_names": {str(i): kind for i, kind in enumerate(kinds)}, "labels": names}
    (raw / "dataset.json").write_text(json.dumps(declared | {"numTraining": 1, "file_ending": ".nii.gz"}))


def _environment(job: dict[str, str]) -> dict[str, str]:
    raw, prepared = str(Path(job["raw"]).parent), str(Path(job["nnunet"]).parent)
    return os.environ | {"nnUNet_raw": raw, "nnUNet_preprocessed": prepared, "nnUNet_results": prepared}


def _child(side: str, python: str | Path, job: dict[str, str]) -> dict[str, float]:
    """One case in a new process, which measures itself."""
    command = [python, __file__, "--side", side]
    ended = subprocess.run(
        command, input=json.dumps(job), env=_environment(job), capture_output=True, text=True, check=False
    )
    if ended.returncode:
        sys.exit(f"{side} failed:\n{ended.stderr}")
    return json.loads(ended.stdout.splitlines()[-1])


def _command(side: str, python: str | Path, job: dict[str, str]) -> dict[str, float]:
    """The whole command, from start to end; peak memory of its largest process."""
    folder = Path(python).parent
    if side == "medseg":
        subprocess.run(["rm", "-rf", Path(job["run"]) / "prepared"], check=True)
        command = [folder / "medseg", "preprocess", "--run", job["run"], "--configuration", CONFIGURATION]
    else:
        command = [folder / "nnUNetv2_preprocess", "-d", job["number"], "-c", CONFIGURATION, "-np", str(os.cpu_count())]
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2);"
    code += "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
    code += "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)"
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", code, *command], env=_environment(job), capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - started
    if ended.returncode:
        sys.exit(f"{side} failed:\n{ended.stderr}")
    cpu, peak = map(float, ended.stdout.split())
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak}


def _measured(started: tuple[float, float]) -> dict[str, float]:
    # not ru_maxrss, which a process takes over from the one that started it
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 2**20
    now = time.perf_counter(), time.process_time()
    return {"seconds": now[0] - started[0], "cpu_seconds": now[1] - started[1], "peak_gib": peak}


def _medseg_side(job: dict[str, str]) -> dict[str, float]:
    from medseg.pipeline.run_folder import RunFolder
    from medseg.preparation.preprocess import preprocess

    run = RunFolder(Path(job["run"]))
    subprocess.run(["rm", "-rf", run.prepared(CONFIGURATION)], check=True)
    plan, dataset = run.read_plan(), run.read_dataset()
    started = time.perf_counter(), time.process_time()
    preprocess(dataset, plan, CONFIGURATION, run.prepared(CONFIGURATION), workers=1)
    return _measured(started)


def _nnunet_side(job: dict[str, str]) -> dict[str, float]:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    raw, prepared = Path(job["raw"]), Path(job["nnunet"])
    plans = PlansManager(json.loads((prepared / "nnUNetPlans.json").read_text()))
    configuration = plans.get_configuration(CONFIGURATION)
    folder = prepared / configuration.data_identifier
    subprocess.run(["rm", "-rf", folder], check=True)
    folder.mkdir(parents=True)
    label = next((raw / "labelsTr").iterdir())
    images = sorted(str(path) for path in (raw / "imagesTr").iterdir())
    dataset = json.loads((raw / "dataset.json").read_text())
    started = time.perf_counter(), time.process_time()
    target = str(folder / label.name.removesuffix(".nii.gz"))
    DefaultPreprocessor(verbose=False).run_case_save(target, images, str(label), plans, configuration, dataset)
    return _measured(started)


def differences(job: dict[str, str]) -> tuple[float, int]:
    """Largest image difference relative to the range of nnU-Net's values, and labels that differ, over all cases."""
    import blosc2
    import numpy as np

    from medseg.pipeline.run_folder import RunFolder
    from medseg.preparation.store import open_store

    store = open_store(RunFolder(Path(job["run"])).prepared(CONFIGURATION))
    theirs = Path(job["nnunet"]) / f"nnUNetPlans_{CONFIGURATION}"
    worst, different = 0.0, 0
    for case_id in store.cases:
        case = store.case(case_id)
        image = blosc2.open(str(theirs / f"{case_id}.b2nd"), mode="r")[:]
        labels = blosc2.open(str(theirs / f"{case_id}_seg.b2nd"), mode="r")[0]
        ours = case.image[:]
        if ours.shape != image.shape:
            sys.exit(f"{case_id}: shapes {ours.shape} and {image.shape}")
        worst = max(worst, float(np.abs(ours - image).max() / np.ptp(image)))
        different += int(np.count_nonzero(case.labels[:] != np.maximum(labels, 0)))
    return worst, different


if __name__ == "__main__":
    main()
