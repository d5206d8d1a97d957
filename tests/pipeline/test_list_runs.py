"""Lists through the pipeline: from the command line to prepared cases and label files with the list's values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk, anatomy, save_nifti
from tiny_runs import CONFIGURATION, cpu, shrink

from medseg.cli.main import main
from medseg.errors import InputError
from medseg.pipeline.preprocess import preprocess_run
from medseg.pipeline.run import RunOptions, run_all
from medseg.pipeline.train import TrainOptions
from medseg.preparation.store import open_store


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Two folders with two channels, float labels 0, 5 and 200, no CT of case c2; paired from the command line."""
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    for number in range(4):
        image, labels = anatomy(rng)
        save_nifti(data / "images" / f"c{number}_T2.nii.gz", image, affine_ijk())
        if number != 2:
            save_nifti(data / "images" / f"c{number}_CT.nii.gz", 500 - image, affine_ijk())
        save_nifti(data / "labels" / f"c{number}.nii.gz", np.float32([0, 5, 200])[labels], affine_ijk())
    options = ["--channels", "T2,CT", "--labels", "outer=5,inner=200", "--group", "c[0-9]", "--progress", "none"]
    assert main(["dataset", str(data), *options, "-o", str(data / "list.csv")]) == 3
    assert main(["dataset", str(data), *options, "--allow-missing", "-o", str(data / "list.csv")]) == 0
    return data / "list.csv"


def test_a_list_is_checked_planned_and_prepared_and_found_again_after_moving(listed, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert main(["dataset", str(listed.parent), "--channels", "CT", "-o", str(listed)]) == 2
    assert main(["check", str(listed), "--progress", "none"]) == 0
    assert main(["plan", str(listed), "--run", str(run), "--progress", "none"]) == 0
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (listed.parent, run):
        shutil.move(path, moved / path.name)
    assert main(["preprocess", "--run", str(moved / "run"), "--progress", "none"]) == 0
    shutil.move(moved / "data", tmp_path / "gone")
    with pytest.raises(InputError, match="correct root"):
        preprocess_run(moved / "run")
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_channel_is_zero_after_normalisation_and_counts_in_no_statistics(listed, tmp_path) -> None:
    run = tmp_path / "run"
    assert main(["plan", str(listed), "--run", str(run), "--progress", "none"]) == 0
    preprocess_run(run, [CONFIGURATION], workers=1)
    fingerprint = json.loads((run / "fingerprint.json").read_text())
    assert fingerprint["cases"][2]["sha256"][1] == ""
    pooled = []
    for case in (0, 1, 3):
        values = np.asarray(nib.load(listed.parent / "images" / f"c{case}_CT.nii.gz").dataobj)
        inside = np.asarray(nib.load(listed.parent / "labels" / f"c{case}.nii.gz").dataobj) > 0
        pooled.append(values[inside].mean(dtype=np.float64))
    assert fingerprint["intensities"][1]["mean"] == pytest.approx(np.mean(pooled), rel=1e-6)
    plan = json.loads((run / "plan.json").read_text())["configurations"][CONFIGURATION]
    assert [normalisation["scheme"] for normalisation in plan["normalisation"]] == ["zscore", "ct"]
    stored = open_store(run / "prepared" / CONFIGURATION).case("c2")
    assert np.asarray(stored.image[0]).any()
    assert not np.asarray(stored.image[1]).any()
    assert set(np.unique(np.asarray(stored.labels[:]))) == {0, 1, 2}


@pytest.mark.slow
def test_outputs_hold_the_values_of_the_list_and_inputs_may_lack_channels(listed, tmp_path) -> None:
    run = tmp_path / "run"
    assert main(["plan", str(listed), "--run", str(run), "--progress", "none"]) == 0
    shrink(run)
    run_all(
        listed, run, RunOptions(training=TrainOptions(epochs=8), device=cpu(), workers=1, configuration=CONFIGURATION)
    )
    arguments = ["--model", str(run), "-i", str(listed), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["predict", *arguments, "--progress", "none"]) == 0
    values = {
        int(value)
        for number in range(4)
        for value in np.unique(np.asarray(nib.load(tmp_path / "out" / f"c{number}.nii.gz").dataobj))
    }
    assert values <= {0, 5, 200}
    assert len(values) > 1
