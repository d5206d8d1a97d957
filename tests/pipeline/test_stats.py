"""Statistics of labels against SimpleITK's, and what of a folder is refused."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import SimpleITK
from phantoms import affine_ijk, anatomy, save_nifti
from scipy import ndimage
from tiny_models import make_task

from medseg.cli.main import main
from medseg.errors import InputError, UsageError
from medseg.pipeline.stats import measure_files
from medseg.records.base import read_record
from medseg.records.stats import Statistics


@pytest.fixture
def folders(tmp_path):
    """Labels and images of three cases, one with a label file alone."""
    rng = np.random.default_rng(0)
    for index in range(3):
        image, labels = anatomy(rng)
        labels[1:3, 1:4, 1:3] = 2
        if index == 1:
            labels[labels == 1] = 0
        affine = affine_ijk(origin=(3.0 * index, -5, 7))
        save_nifti(tmp_path / "labels" / f"case_{index}.nii.gz", labels, affine)
        if index < 2:
            save_nifti(tmp_path / "images" / f"case_{index}_0000.nii.gz", image, affine)
            save_nifti(tmp_path / "images" / f"case_{index}_0001.nii.gz", image * 2 - 5, affine)
    return tmp_path


def test_every_number_equals_simpleitks(folders):
    found = measure_files(folders / "labels", folders / "images", make_task(3))
    assert [(row.case, row.label) for row in found.rows] == [
        (f"case_{case}", f"label {label}") for case in (0, 1) for label in (1, 2)
    ]
    for row in found.rows:
        labels = SimpleITK.ReadImage(str(folders / "labels" / f"{row.case}.nii.gz"))
        if row.voxels == 0:
            assert (row.case, row.value, row.volume_ml, row.components, row.intensities) == ("case_1", 1, 0, 0, ())
            continue
        shape = SimpleITK.LabelShapeStatisticsImageFilter()
        shape.Execute(labels)
        assert row.voxels == shape.GetNumberOfPixels(row.value)
        assert row.volume_ml == pytest.approx(shape.GetPhysicalSize(row.value) / 1000, rel=1e-6)
        mask = SimpleITK.GetArrayFromImage(labels) == row.value
        assert row.components == ndimage.label(mask, np.ones((3, 3, 3)))[1]
        assert [one.image for one in row.intensities] == ["0000", "0001"]
        for one in row.intensities:
            image = SimpleITK.ReadImage(str(folders / "images" / f"{row.case}_{one.image}.nii.gz"))
            inside = SimpleITK.LabelIntensityStatisticsImageFilter()
            inside.Execute(labels, image)
            assert one.mean == pytest.approx(inside.GetMean(row.value), rel=1e-5)
            assert (one.minimum, one.maximum) == (inside.GetMinimum(row.value), inside.GetMaximum(row.value))
            expected = np.percentile(SimpleITK.GetArrayFromImage(image)[mask], (5, 50, 95))
            np.testing.assert_allclose((one.percentile_05, one.median, one.percentile_95), expected, rtol=1e-5)
    assert len(found.problems) == 1
    assert "E0100" in found.problems[0]
    assert "case_2" in found.problems[0]


def test_the_command_prints_a_table_and_writes_json_and_csv(folders, capsys):
    arguments = ["stats", str(folders / "labels"), "--progress", "none"]
    assert main([*arguments, "--output", str(folders / "all.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["case", "label", "voxels", "ml", "pieces"]
    statistics = read_record(folders / "all.json", Statistics)
    assert [(row.case, row.label) for row in statistics.rows] == [
        ("case_0", "1"), ("case_0", "2"), ("case_1", "2"), ("case_2", "1"), ("case_2", "2"),
    ]  # fmt: skip
    assert len(lines) == 1 + len(statistics.rows)
    images = ["--images", str(folders / "images"), "--output", str(folders / "all.csv")]
    assert main([*arguments, *images]) == 4
    rows = list(csv.DictReader((folders / "all.csv").read_text().splitlines()))
    assert [float(row["volume_ml"]) for row in rows] == [row.volume_ml for row in statistics.rows[:3]]
    assert float(rows[0]["0001_mean"]) == pytest.approx(2 * float(rows[0]["0000_mean"]) - 5, rel=1e-5)
    assert "case=case_2" in capsys.readouterr().err


def test_names_come_from_dataset_json(folders, capsys):
    task = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "outer": 1, "inner": 2}, "file_ending": ".nii.gz"}
    (folders / "dataset.json").write_text(json.dumps(task | {"numTraining": 3}))
    one = str(folders / "labels" / "case_1.nii.gz")
    assert main(["stats", one, "--task", str(folders / "dataset.json"), "--progress", "none"]) == 0
    table = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in table] == [["case_1", "outer"], ["case_1", "inner"]]
    assert table[0][2] == "0"


@pytest.mark.parametrize(("value", "code"), [(0.4, "E0130"), (-1.0, "E0131"), (7e4, "E0131"), (np.nan, "E0130")])
def test_files_that_hold_no_labels_are_refused_and_the_others_measured(folders, value, code):
    array = np.zeros((5, 6, 7), np.float32)
    array[1, 2, 3] = value
    save_nifti(folders / "labels" / "image.nii.gz", array, affine_ijk())
    found = measure_files(folders / "labels")
    assert {row.case for row in found.rows} == {"case_0", "case_1", "case_2"}
    assert [problem.partition("[")[2][:5] for problem in found.problems] == [code]
    with pytest.raises(InputError, match=code):
        measure_files(folders / "labels" / "image.nii.gz")


def test_an_image_on_another_grid_spoils_its_case(folders):
    image, _ = anatomy(np.random.default_rng(1))
    save_nifti(folders / "images" / "case_0_0000.nii.gz", image, affine_ijk(origin=(90, 0, 0)))
    found = measure_files(folders / "labels", folders / "images")
    assert {row.case for row in found.rows} == {"case_1"}
    assert "E0120" in found.problems[0]


def test_wrong_paths_and_endings_are_refused(folders):
    (folders / "empty").mkdir()
    with pytest.raises(InputError, match="E0146"):
        measure_files(folders / "empty")
    with pytest.raises(InputError, match="E0100"):
        measure_files(folders / "gone")
    with pytest.raises(UsageError, match="E0001"):
        measure_files(folders / "labels", output=folders / "all.txt")


def test_labels_without_foreground_have_no_rows(folders):
    save_nifti(folders / "none.nii.gz", np.zeros((5, 6, 7), np.uint8), affine_ijk())
    assert measure_files(folders / "none.nii.gz") == Statistics()
