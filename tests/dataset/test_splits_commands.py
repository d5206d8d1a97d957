"""Splits from the command line: what is asked for, what is kept, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import make_dataset, save_nifti

from medseg.cli.main import main
from medseg.dataset.splits import make_splits
from medseg.pipeline.plan import PlanOptions, plan_run
from medseg.pipeline.run_folder import RunFolder
from medseg.pipeline.split import SplitOptions, choose_splits, labels_present
from medseg.records.run import Splits


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight cases; only the last two have label 2."""
    folder = make_dataset(tmp_path_factory.mktemp("data") / "d", 8)
    for case in range(6):
        path = folder / "labelsTr" / f"case_{case:02d}.nii.gz"
        image = nib.load(path)
        save_nifti(path, np.minimum(np.asarray(image.dataobj), 1), image.affine)
    return folder


def plan(data: Path, run: Path, *more: object) -> int:
    """With the preset that keeps nnU-Net's folds where nothing else is asked for."""
    return main(["plan", str(data), "--run", str(run), "--preset", "nnunet", "--progress", "none", *map(str, more)])


def folds(run: Path) -> Splits:
    return RunFolder(run).read_splits()


def test_no_patient_of_cardiac_is_on_both_sides(shared, tmp_path, capsys):
    cardiac = shared / "data" / "cardiac"
    assert plan(cardiac, tmp_path / "a", "--group", r"regex:(patient\d+)_") == 0
    table = "case,patient\n" + "".join(f"{p.name[:-12]},{p.name[:10]}\n" for p in (cardiac / "imagesTr").iterdir())
    (tmp_path / "cases.csv").write_text(table)
    assert plan(cardiac, tmp_path / "b", "--group", tmp_path / "cases.csv:patient") == 0
    splits = folds(tmp_path / "a")
    assert splits.folds == folds(tmp_path / "b").folds
    assert len(splits.groups) == 60
    assert len(set(splits.groups.values())) == 30
    for fold in splits.folds:
        assert (len(fold.train), len(fold.val)) == (48, 12)
        assert not {case[:10] for case in fold.train} & {case[:10] for case in fold.val}
    assert "5 folds of 60 cases in 30 groups" in capsys.readouterr().out


def test_without_groups_the_folds_are_nnunets_and_by_themselves_leak_patients(shared, tmp_path):
    assert plan(shared / "data" / "cardiac", tmp_path / "run") == 0
    splits = folds(tmp_path / "run")
    assert (splits.method, splits.groups) == ("kfold", {})
    assert splits.folds == make_splits([case for fold in splits.folds for case in fold.val]).folds
    assert any({case[:10] for case in fold.train} & {case[:10] for case in fold.val} for fold in splits.folds)


def test_folds_seed_and_labels_are_those_asked_for_and_printed(data, tmp_path, capsys):
    assert plan(data, tmp_path / "run", "--folds", 2, "--split-seed", 3, "--stratify", "always") == 0
    splits = folds(tmp_path / "run")
    assert (len(splits.folds), splits.seed, splits.method) == (2, 3, "stratified")
    assert ["".join(line.split()) for line in capsys.readouterr().out.splitlines()[-3:]] == [
        "foldcasesouterinner",
        "0441",
        "1441",
    ]


def test_the_same_command_keeps_the_folds_and_another_is_refused_until_overwritten(data, tmp_path, capsys):
    asked = ("--group", r"regex:case_0(\d)")
    assert plan(data, tmp_path / "run", *asked) == 0
    before = (tmp_path / "run" / "splits.json").read_bytes()
    assert plan(data, tmp_path / "run") == plan(data, tmp_path / "run", *asked) == 0
    assert plan(data, tmp_path / "run", "--split-seed", 3) == 8
    assert "error[E0802]: this run has other splits: 5 folds of 8 cases" in capsys.readouterr().err
    assert (tmp_path / "run" / "splits.json").read_bytes() == before
    assert plan(data, tmp_path / "run", "--split-seed", 3, "--overwrite") == 0
    assert folds(tmp_path / "run").seed == 3


def test_nnunets_splits_are_taken_and_groups_that_leak_in_them_refused(data, tmp_path, capsys):
    cases = [f"case_{n:02d}" for n in range(8)]
    given = [{"train": cases[:5], "val": cases[5:]}, {"train": cases[5:], "val": cases[:5]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(given))
    assert plan(data, tmp_path / "run", "--splits", tmp_path / "splits_final.json") == 0
    splits = folds(tmp_path / "run")
    assert splits.method == "given"
    assert [fold.to_json() for fold in splits.folds] == given
    fitting = ("--splits", tmp_path / "splits_final.json", "--group", r"regex:case_0(\d)")
    assert plan(data, tmp_path / "fits", *fitting) == 0
    (tmp_path / "t.csv").write_text("case,group\n" + "".join(f"{case},p{n // 4}\n" for n, case in enumerate(cases)))
    leaking = ("--splits", tmp_path / "splits_final.json", "--group", tmp_path / "t.csv")
    assert plan(data, tmp_path / "leaks", *leaking) == 3
    assert "error[E0161]: fold 0 trains and validates on group(s) p1" in capsys.readouterr().err
    assert plan(data, tmp_path / "both", "--splits", tmp_path / "splits_final.json", "--folds", 3) == 2


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--folds", 1), 2, "1 folds"),
        (("--folds", 9), 3, "9 folds of 8 cases"),
        (("--group", r"regex:case_0([0-6])"), 3, "finds no group in 1 of 8 case ids: case_07"),
        (("--folds", 3, "--group", r"regex:(case)_"), 3, "8 case(s) in 1 group(s)"),
        (("--group", "patients"), 2, "--group patients"),
        (("--split-seed", -1), 2, "4294967295"),
    ],
)
def test_what_cannot_be_split_is_said_and_nothing_is_planned(data, tmp_path, capsys, more, code, said):
    assert plan(data, tmp_path / "run", *more) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "plan.json").exists()


def test_identical_images_stay_together_however_they_are_compressed_unless_that_is_switched_off(data, tmp_path, capsys):
    copied = Path(shutil.copytree(data, tmp_path / "d"))
    for folder, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
        image = nib.load(copied / folder / f"case_01{suffix}.nii.gz")
        image.header["descrip"] = b"the same again"
        nib.save(image, copied / folder / f"case_07{suffix}.nii.gz")
    assert plan(copied, tmp_path / "run", "--folds", 4) == 0
    assert "--group none splits them like others" in capsys.readouterr().err
    splits = folds(tmp_path / "run")
    assert splits.groups == {"case_01": "case_01 + case_07", "case_07": "case_01 + case_07"}
    assert all(("case_01" in fold.val) == ("case_07" in fold.val) for fold in splits.folds)
    assert sorted(len(fold.val) for fold in splits.folds) == [2, 2, 2, 2]
    assert plan(copied, tmp_path / "apart", "--group", "none") == 0
    assert folds(tmp_path / "apart").folds == make_splits([f"case_{n:02d}" for n in range(8)]).folds


def test_a_hand_edit_that_moves_half_of_a_patient_is_refused(data, tmp_path, capsys):
    assert plan(data, tmp_path / "run", "--folds", 2, "--group", r"regex:case_0(\d)") == 0
    path = tmp_path / "run" / "splits.json"
    splits = json.loads(path.read_text())
    splits["groups"] = dict.fromkeys(splits["groups"], "one")
    path.write_text(json.dumps(splits))
    assert plan(data, tmp_path / "run") == 3
    assert "fold 0 trains and validates on group(s) one" in capsys.readouterr().err


def test_presets_of_our_own_stratify_where_chance_would_miss_a_label_and_nnunets_never(data, tmp_path):
    from medseg.dataset.fingerprint import measure
    from medseg.dataset.layouts import read_dataset

    dataset = read_dataset(data)
    measured = measure(dataset)
    assert labels_present(measured.fingerprint, dataset.task)["case_00"] == {1}
    ours = choose_splits(dataset, measured, SplitOptions(), "mine")
    assert ours.method == "stratified"
    assert "of 5 folds would be without inner" in ours.reason
    assert sum("case_06" in fold.val or "case_07" in fold.val for fold in ours.folds) == 2
    for preset, options in (("resenc-m", SplitOptions()), ("mine", SplitOptions(stratify="never"))):
        assert choose_splits(dataset, measured, options, preset).method == "kfold"
    assert plan_run(data, tmp_path / "run", PlanOptions(splits=SplitOptions(folds=3))).preset
