"""What a case is estimated to take, and how many processes that makes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from prepared_phantoms import make_plan, make_task

from medseg.preparation import estimate
from medseg.preparation.estimate import Need, case_need, default_workers
from medseg.records.fingerprint import CasePrint


def printed(shape: tuple[int, int, int], spacing: tuple[float, float, float], share: float = 1.0) -> CasePrint:
    return CasePrint(id="x", shape_after_crop=shape, spacing_mm=spacing, relative_size_after_cropping=share)


def test_finer_spacings_more_channels_and_wider_margins_need_more():
    plan, configuration = make_plan(spacing=(1.0, 1.0, 1.0))
    coarse = case_need(printed((100, 120, 140), (1.0, 1.0, 1.0)), plan, [configuration])
    fine = case_need(printed((100, 120, 140), (2.0, 2.0, 2.0)), plan, [configuration])
    assert fine.memory_bytes > 4 * coarse.memory_bytes
    assert fine.seconds > 4 * coarse.seconds
    assert case_need(printed((100, 120, 140), (1.0, 1.0, 1.0), 0.5), plan, [configuration]).memory_bytes > (
        coarse.memory_bytes
    )
    two, two_configuration = make_plan(make_task(channels=2), spacing=(1.0, 1.0, 1.0))
    assert case_need(printed((100, 120, 140), (1.0, 1.0, 1.0)), two, [two_configuration]).seconds > coarse.seconds


def test_the_plan_s_order_of_axes_and_2d_slices_count():
    case = printed((100, 20, 30), (1.0, 4.0, 1.0))
    plan, configuration = make_plan(spacing=(2.0, 2.0, 1.0), transpose=(1, 0, 2))
    straight, other = make_plan(spacing=(2.0, 2.0, 1.0))
    assert case_need(case, plan, [configuration]) == case_need(case, straight, [other])  # 40 × 50 × 30 and 50 × 40 × 30
    flat, slices = make_plan(spacing=(4.0, 1.0))
    assert case_need(case, flat, [slices]).seconds == pytest.approx(
        estimate.SECONDS_PER_CASE + 2 * 60_000 * estimate.SECONDS_PER_VOXEL
    )


def test_without_measurements_it_is_the_median_case():
    plan, configuration = make_plan()
    assert case_need(None, plan, [configuration]).memory_bytes > 20**3


def test_processes_are_started_only_for_work_that_is_worth_it(monkeypatch):
    monkeypatch.setattr(estimate, "usable_cores", lambda: 8)
    need = Need(10**6, 0.01)
    assert default_workers([]) == 1
    assert default_workers([need] * 50) == 1
    assert default_workers([replace(need, seconds=5.0)] * 3) == 3
    assert default_workers([replace(need, seconds=5.0)] * 100) == 8


MEASURE = """
import sys
import numpy as np
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from prepared_phantoms import make_plan
from medseg.preparation.estimate import case_need
from medseg.preparation.job import Job, Target, prepare_case
from medseg.preparation.prepare import prepare
from medseg.records.case import Case
from medseg.records.fingerprint import CasePrint
folder = Path(sys.argv[3])
plan, configuration = make_plan(spacing=(1.1, 0.8, 0.9))
case = Case("a", (folder / "a_0000.nii",), folder / "a.nii")
def peak():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024  # not ru_maxrss, which a process takes over from its parent
before = peak()
prepare_case(Job(case, plan, {"x": Target(configuration, folder / "out", "float32", "s")}, None))
shape = (160, 230, 250)
found = CasePrint(id="a", shape_after_crop=shape, spacing_mm=(1, 1, 1), relative_size_after_cropping=1.0)
print((peak() - before) / case_need(found, plan, [configuration]).memory_bytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_the_estimate_is_near_what_a_case_takes(tmp_path):
    """Goal G13: measured peak over estimate within 0.5 to 1.25; the process's own memory left out."""
    import nibabel as nib
    import numpy as np

    image = np.random.default_rng(0).uniform(1, 900, (250, 230, 160)).astype(np.float32)
    labels = np.zeros(image.shape, np.uint8)
    labels[40:150, 60:180, 50:110] = 1
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "a_0000.nii")
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "a.nii")
    folders = [str(path) for path in sys.path if path.endswith(("tests", "preparation"))][:2]
    done = subprocess.run([sys.executable, "-c", MEASURE, *folders, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout) < 1.25
