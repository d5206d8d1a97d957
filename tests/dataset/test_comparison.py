"""Comparison: a case that stands out among others is named, and ordinary variety is not."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import dataset_json, make_dataset, save_nifti

from medseg.dataset.case_check import CaseFindings, Shape
from medseg.dataset.check import check_dataset
from medseg.dataset.comparison import duplicates, odd_geometry, odd_intensities, stray_labels
from medseg.records.task import Task

TASK = Task.model_validate(
    {"channels": [{"name": "CT"}], "labels": [{"name": "background", "value": 0}, {"name": "liver", "value": 1}]}
)
MRI = TASK.model_copy(update={"channels": (TASK.channels[0].model_copy(update={"name": "T1"}),)})
PLAIN = Shape((40, 200, 220), (5.0, 0.8, 0.8), "LPS", picture=False)


def cases(*ranges: tuple[float, float]) -> list[CaseFindings]:
    return [CaseFindings(f"c{n}", (), 1, PLAIN, extremes={0: found}) for n, found in enumerate(ranges)]


def shaped(*shapes: Shape) -> list[CaseFindings]:
    return [CaseFindings(f"c{n}", (), 1, shape) for n, shape in enumerate(shapes)]


def labelled(*counts: int) -> list[CaseFindings]:
    return [CaseFindings(f"c{n}", (), 2, label_counts={0: 10**6, 1: count}) for n, count in enumerate(counts)]


CT = [(-1024.0, 1200.0), (-1010.0, 900.0), (-1024.0, 1600.0), (-990.0, 1100.0)]


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        ((0.0, 2224.0), True),  # the offset of 1024 was never taken off
        ((1.0, 1900.0), True),
        ((-3024.0, 1250.0), False),  # padding outside the scanner's circle
        ((-200.0, 300.0), False),  # an abdomen cut close: no air, no bone
        ((-1024.0, 3071.0), False),  # metal
        ((-0.3, 0.9), True),  # normalised already
    ],
)
def test_a_ct_on_another_scale_is_named(odd: tuple[float, float], named: bool) -> None:
    problems = odd_intensities(cases(*CT, odd), TASK)
    assert [(problem.code, problem.case) for problem in problems] == ([("W0127", "c4")] if named else [])


def test_a_ct_without_negative_values_is_named_even_alone() -> None:
    assert [problem.case for problem in odd_intensities(cases((0, 3000)), TASK)] == ["c0"]
    assert odd_intensities(cases((0, 3000)), MRI) == []


@pytest.mark.parametrize(
    ("odd", "named"), [((0, 4000), False), ((0, 60), False), ((0, 1), True), ((0, 40000), True), ((800, 1500), True)]
)
def test_mr_may_vary_but_not_by_other_units(odd: tuple[float, float], named: bool) -> None:
    usual = [(0.0, 400.0), (0.0, 600.0), (5.0, 350.0), (0.0, 900.0), (2.0, 500.0)]
    assert bool(odd_intensities(cases(*usual, odd), MRI)) == named


def test_few_cases_are_not_compared() -> None:
    assert odd_intensities(cases((0, 1), (0, 1000)), MRI) == []
    assert odd_geometry(shaped(PLAIN, Shape((40, 200, 220), (5000, 800, 800), "LPS", picture=False))) == []
    assert stray_labels(labelled(5000, 1), MRI) == []


@pytest.mark.parametrize(
    ("odd", "word"),
    [
        (Shape((40, 200, 220), (0.05, 0.8, 0.8), "LPS", picture=False), "along z"),
        (Shape((1, 200, 220), (5.0, 0.8, 0.8), "LPS", picture=False), "one slice"),
        (Shape((40, 200, 220), (0.7, 0.8, 0.8), "LPS", picture=False), ""),
        (Shape((40, 200, 220), (5.0, 0.8, 0.8), "RAS", picture=False), "RAS"),
    ],
)
def test_a_geometry_unlike_all_others_is_named(odd: Shape, word: str) -> None:
    problems = odd_geometry(shaped(*[PLAIN] * 24, odd))
    assert [problem.case for problem in problems] == (["c24"] if word else [])
    assert all(word in problem.measured and problem.code == "W0126" for problem in problems)


def test_two_orientations_that_both_occur_are_ordinary() -> None:
    other = Shape((40, 200, 220), (5.0, 0.8, 0.8), "RAS", picture=False)
    assert odd_geometry(shaped(*[PLAIN] * 30, other, other)) == []


@pytest.mark.parametrize(("count", "named"), [(1, True), (3, True), (4, False), (400, False), (0, False)])
def test_a_handful_of_voxels_of_a_label_is_named(count: int, named: bool) -> None:
    problems = stray_labels(labelled(5000, 900, 3000, 2000, 1000, count), MRI)
    assert [problem.case for problem in problems] == (["c5"] if named else [])


def test_small_lesions_are_ordinary() -> None:
    assert stray_labels(labelled(30, 2, 1, 60, 200, 3), MRI) == []


def test_cases_equal_in_part_are_no_duplicates() -> None:
    both = {"channel 0": "x", "channel 1": "y"}
    findings = [
        CaseFindings("a", (), hashes=both, label_hash="l"),
        CaseFindings("b", (), hashes=both, label_hash="l"),
        CaseFindings("c", (), hashes=both, label_hash="other"),
        CaseFindings("d", (), hashes=both | {"channel 1": "z"}, label_hash="l"),
        CaseFindings("e", (), hashes={"channel 0": "", "channel 1": ""}, label_hash="l"),
        CaseFindings("f", (), hashes={"channel 0": "", "channel 1": ""}, label_hash="l"),
    ]
    assert duplicates(findings) == (("a", "b"),)


def test_labels_of_another_case_and_labels_outside_the_image_are_named(tmp_path: Path) -> None:
    shape = (30, 28, 20)
    rng = np.random.default_rng(0)
    affine = np.diag([0.9, 1.1, 2.0, 1.0])
    for case in range(4):
        image = np.zeros(shape, np.float32)
        image[: 12 + case, 5:25] = rng.normal(100, 10, (12 + case, 20, 20))
        labels = np.zeros(shape, np.uint8)
        labels[3 : 7 + case, 8:15, 5:9] = 1
        labels[2, 3 + case, 2] = 2
        if case == 2:
            labels = labels[::-1]  # flipped without its header
        if case == 3:
            labels = np.asanyarray(nib.load(tmp_path / "labelsTr" / "case_00.nii.gz").dataobj)
        save_nifti(tmp_path / "imagesTr" / f"case_{case:02d}_0000.nii.gz", image, affine)
        save_nifti(tmp_path / "labelsTr" / f"case_{case:02d}.nii.gz", labels, affine)
    (tmp_path / "dataset.json").write_text(json.dumps(dataset_json(4)))
    report = check_dataset(tmp_path)
    assert {(problem.code, problem.case) for problem in report.problems} == {("W0139", "case_02"), ("W0149", "case_00")}
    assert "case_00, case_03" in next(p.measured for p in report.problems if p.code == "W0149")


def test_one_image_with_two_annotations_says_so(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, cases=3)
    for folder, name in (("imagesTr", "_0000"), ("labelsTr", "")):
        source = nib.load(data / folder / f"case_00{name}.nii.gz")
        array = np.asanyarray(source.dataobj).copy()
        if folder == "labelsTr":
            array[10, 10, 10] = 0 if array[10, 10, 10] else 1
        save_nifti(data / folder / f"case_02{name}.nii.gz", array, source.affine)
    report = check_dataset(data)
    (problem,) = report.problems
    assert (problem.code, "labels differ" in problem.measured) == ("W0141", True)
    assert (report.identical, report.duplicates) == ((("case_00", "case_02"),), ())
