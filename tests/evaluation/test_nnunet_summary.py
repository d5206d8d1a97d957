"""nnU-Net's ``summary.json`` against what nnU-Net 2.8.1 gave for the same arrays, and against itself if it is here.

``RECORDED`` is what its ``compute_metrics_on_folder`` returned for ``label_files`` below (means only, to 12 digits).
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from phantoms import affine_ijk, save_nifti

from medseg.evaluation.nnunet_summary import nnunet_summary, write_nnunet_summary
from medseg.evaluation.scores import evaluate, find_pairs
from medseg.records.scores import Measures
from medseg.records.task import Channel, Label, Region, Task

LABELS = {"channels": (Channel(name="MRI"),), "labels": tuple(Label(name=f"l{v}", value=v) for v in (0, 1, 2, 5))}
PLAIN = Task(**LABELS, ignore_value=9)
REGIONS = Task(
    **LABELS,
    regions=(Region(name="all", values=(1, 2)), Region(name="two", values=(2,))),
    regions_order=(1, 2),
    ignore_value=9,
)

RECORDED: dict = {
    "labels": {
        "mean": {
            "1": {
                "Dice": 0.9312870288736,
                "IoU": 0.8722125094427,
                "FP": 14.75,
                "TP": 117.75,
                "FN": 2.25,
                "TN": 530.25,
                "n_pred": 132.5,
                "n_ref": 120.0,
            },
            "2": {
                "Dice": 0.4631297964631,
                "IoU": 0.3560784313725,
                "FP": 4.5,
                "TP": 5.5,
                "FN": 3.5,
                "TN": 651.5,
                "n_pred": 10.0,
                "n_ref": 9.0,
            },
            "5": {
                "Dice": math.nan,
                "IoU": math.nan,
                "FP": 0.0,
                "TP": 0.0,
                "FN": 0.0,
                "TN": 665.0,
                "n_pred": 0.0,
                "n_ref": 0.0,
            },
        },
        "foreground_mean": {
            "Dice": math.nan,
            "IoU": math.nan,
            "FP": 6.416666666667,
            "TP": 41.08333333333,
            "FN": 1.916666666667,
            "TN": 615.5833333333,
            "n_pred": 47.5,
            "n_ref": 43.0,
        },
    },
    "regions": {
        "mean": {
            "(1, 2)": {
                "Dice": 0.9380655902766,
                "IoU": 0.8834387972006,
                "FP": 15.25,
                "TP": 127.25,
                "FN": 1.75,
                "TN": 520.75,
                "n_pred": 142.5,
                "n_ref": 129.0,
            },
            "2": {
                "Dice": 0.4631297964631,
                "IoU": 0.3560784313725,
                "FP": 4.5,
                "TP": 5.5,
                "FN": 3.5,
                "TN": 651.5,
                "n_pred": 10.0,
                "n_ref": 9.0,
            },
        },
        "foreground_mean": {
            "Dice": 0.7005976933699,
            "IoU": 0.6197586142866,
            "FP": 9.875,
            "TP": 66.375,
            "FN": 2.625,
            "TN": 586.125,
            "n_pred": 76.25,
            "n_ref": 69.0,
        },
    },
}


def label_files(folder):
    """Four small cases: good, a missed label, an absent one, an ignored corner; label 5 occurs in none."""
    rng = np.random.default_rng(7)
    for index in range(4):
        reference = np.zeros((11, 9, 7), np.uint8)
        reference[2:8, 1:6, 1 + index % 2 : 6] = 1
        reference[4:6, 2:5, 2:4] = 2
        prediction = np.where(rng.random(reference.shape) < 0.05, rng.integers(0, 3, reference.shape), reference)
        if index == 1:
            prediction[prediction == 2] = 1
        if index == 2:
            reference[reference == 2], prediction[prediction == 2] = 1, 1
        if index == 3:
            reference[:4, :4] = 9
        save_nifti(folder / "reference" / f"case_{index}.nii.gz", reference, affine_ijk())
        save_nifti(folder / "prediction" / f"case_{index}.nii.gz", prediction.astype(np.uint8), affine_ijk())
    return folder / "prediction", folder / "reference"


def same(a, b) -> bool:
    """Equal numbers, nan included, whatever the nesting."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == pytest.approx(b, rel=1e-11) if isinstance(a, float) else a == b


@pytest.mark.parametrize(("name", "task"), [("labels", PLAIN), ("regions", REGIONS)])
def test_means_are_those_that_nnunet_gave(tmp_path, name, task):
    pairs, _ = find_pairs(*label_files(tmp_path))
    summary = nnunet_summary(evaluate(pairs, task, Measures()), pairs)
    assert same(summary["mean"], RECORDED[name]["mean"])
    assert same(summary["foreground_mean"], RECORDED[name]["foreground_mean"])


@pytest.mark.parametrize("task", [PLAIN, REGIONS])
def test_the_file_is_the_one_that_nnunet_writes(tmp_path, task):
    theirs = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions")
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    prediction, reference = label_files(tmp_path)
    chosen = [(1, 2), 2] if task.regions else [1, 2, 5]
    with pytest.warns(RuntimeWarning) if not task.regions else np.errstate():
        theirs.compute_metrics_on_folder(
            str(reference), str(prediction), str(tmp_path / "theirs.json"), SimpleITKIO(), ".nii.gz", chosen, 9, 1
        )
    pairs, _ = find_pairs(prediction, reference)
    write_nnunet_summary(evaluate(pairs, task, Measures()), pairs, tmp_path / "ours.json")
    ours = json.loads((tmp_path / "ours.json").read_text())
    assert same(ours, json.loads((tmp_path / "theirs.json").read_text()))
    assert theirs.load_summary_json(str(tmp_path / "ours.json"))["mean"].keys() == set(chosen)


def test_a_label_that_occurs_nowhere_is_nan_as_nnunets_tools_expect(tmp_path):
    pairs, _ = find_pairs(*label_files(tmp_path))
    write_nnunet_summary(evaluate(pairs, PLAIN, Measures()), pairs, tmp_path / "summary.json")
    value = json.loads((tmp_path / "summary.json").read_text())
    assert math.isnan(value["mean"]["5"]["Dice"])
    assert math.isnan(value["metric_per_case"][2]["metrics"]["2"]["Dice"])
    assert value["metric_per_case"][1]["metrics"]["2"]["Dice"] == 0
    assert value["metric_per_case"][0]["prediction_file"].endswith("prediction/case_0.nii.gz")
