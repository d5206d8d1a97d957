"""``medseg select`` and ``medseg ensemble``: what is printed, what is refused, how it ends."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from phantoms import affine_ijk, anatomy, save_nifti


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished.parent / "data", tmp_path / "data")
    return shutil.copytree(finished, tmp_path / "run")


def test_one_trained_fold_is_enough_and_the_gaps_are_named(medseg, run):
    ended = medseg("select", "--run", run, "--device", "cpu", "--precision", "float32", "--progress", "none")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[1].split()[:4] == ["candidate", "networks", "as", "predicted"]
    assert lines[2].split()[:2] == ["3d_fullres", "1"]
    assert "missing: 3d_fullres lacks fold 1, 2, 3, 4" in lines
    assert lines[-2] == "chosen: 3d_fullres"
    recipe = json.loads((run / "selection.json").read_text())
    assert recipe["members"][0]["folds"] == ["0"]
    images = run.parent / "data" / "imagesTs"
    ended = medseg("predict", "--model", run, "-i", images, "-o", run / "out", "--device", "cpu", "--progress", "plain")
    assert ended.code == 0
    assert "as selected by cross-validation: 3d_fullres" in ended.err


def test_a_run_that_was_only_planned_has_nothing_to_select_from(medseg, run):
    shutil.rmtree(run / "models")
    ended = medseg("select", "--run", run, "--progress", "none")
    assert ended.code == 3
    assert "no validated fold" in ended.err


def test_label_files_vote_and_what_fails_is_told(medseg, tmp_path):
    array = anatomy(np.random.default_rng(0))[1]
    for index, name in enumerate("abc"):
        save_nifti(tmp_path / name / "x.nii.gz", np.roll(array, index, axis=0), affine_ijk())
    save_nifti(tmp_path / "a" / "only.nii.gz", array, affine_ijk())
    folders = [tmp_path / name for name in "abc"]
    ended = medseg("ensemble", *folders, "-o", tmp_path / "out", "--vote", "--progress", "none")
    assert (ended.code, ended.out.split()[:2]) == (4, ["1", "joined,"])
    assert "case=only" in ended.err
    ended = medseg("ensemble", *folders, "-o", tmp_path / "out2", "--progress", "none")
    assert ended.code == 3
    assert "--vote" in ended.err
