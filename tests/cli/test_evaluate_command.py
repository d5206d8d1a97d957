"""``medseg evaluate`` and ``--compare``: what is printed, what is refused, how it ends."""

from __future__ import annotations

import json

import numpy as np
import pytest
from phantoms import affine_ijk, anatomy, dataset_json, save_nifti


@pytest.fixture
def folder(tmp_path):
    """Three references; ``good`` misses nothing, ``poor`` misses the inner structure of one case."""
    (tmp_path / "dataset.json").write_text(json.dumps(dataset_json(3)))
    for index in range(3):
        labels = anatomy(np.random.default_rng(index))[1]
        poor = np.roll(labels, 2, axis=0)
        poor[poor == 2] = 1 if index == 1 else 2
        for name, array in (("references", labels), ("good", np.roll(labels, 1, axis=1)), ("poor", poor)):
            save_nifti(tmp_path / name / f"case_{index}.nii.gz", array, affine_ijk())
    return tmp_path


def given(folder) -> tuple[object, ...]:
    return ("--references", folder / "references", "--task", folder, "--progress", "none")


def test_missed_structures_and_worst_cases_are_shown_first_on_request(medseg, folder):
    ended = medseg("evaluate", "--predictions", folder / "poor", *given(folder), "--worst", 2)
    assert (ended.code, ended.err) == (0, "")
    table, worst = ended.out.split("\nworst:\n")
    inner = next(line for line in table.splitlines() if line.startswith("inner"))
    assert "(1 infinite)" in inner
    assert worst.splitlines()[1].split()[:6] == ["case_1", "inner", "missed", "0.0000", "0.0000", "infinite"]
    assert len(worst.splitlines()) == 3


def test_columns_for_tolerances_and_lesions_are_there_if_they_were_asked_for(medseg, folder):
    plain = medseg("evaluate", "--predictions", folder / "good", *given(folder)).out.splitlines()[0]
    assert "NSD 2 mm" in plain
    assert "lesion" not in plain
    ended = medseg(
        *("evaluate", "--predictions", folder / "good", *given(folder)),
        *("--tolerance", 1, 3, "2=0.5", "--lesions", "0.3", "--labels", "inner", "outer"),
    )
    header, outer, inner, mean = ended.out.splitlines()
    assert all(name in header for name in ("tolerance mm", "NSD 3 mm", "lesion F1", "false per case"))
    assert "0.5" in inner.split()
    assert (outer.split()[0], mean.split()[0]) == ("outer", "mean")


def test_a_comparison_shows_both_sides_and_the_tests(medseg, folder):
    ended = medseg(
        "evaluate", "--compare", folder / "poor", folder / "good", *given(folder), "--output", folder / "c.json"
    )
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[:3] == [f"A: {folder / 'poor'}", f"B: {folder / 'good'}", "3 cases in both"]
    assert [line.split()[:2] for line in lines[4:6]] == [["outer", "Dice"], ["inner", "Dice"]]
    assert json.loads((folder / "c.json").read_text())["tests"][1]["infinite_a"] == 0
    assert (folder / "c.csv").is_file()


def test_a_case_that_only_one_side_has_ends_with_4_and_is_named(medseg, folder):
    (folder / "poor" / "case_2.nii.gz").unlink()
    sides = ("evaluate", "--compare", folder / "poor", folder / "good", *given(folder))
    ended = medseg(*sides)
    assert ended.code == 4
    assert "only in B, left out: case_2" in ended.out
    (problem,) = ended.problems
    assert f"E0100] case=case_2: {folder / 'poor'}: no prediction" in problem
    assert medseg(*sides, "--allow-missing").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "one of the arguments --predictions --compare is required"),
        (("--predictions", "p", "--compare", "a", "b"), "not allowed with"),
        (("--predictions", "p"), "required: --references, --task"),
        (("--compare", "a", "b", "--worst", "3"), "--worst with --compare"),
        (("--predictions", "p", "--lesions", "0"), "'0' is not a share"),
        (("--predictions", "p", "--tolerance", "liver=x"), "'x' is not a number of mm"),
    ],
)
def test_wrong_usage_ends_with_2(medseg, arguments, words):
    ended = medseg("evaluate", *arguments)
    assert ended.code == 2
    assert words in ended.err


def test_an_unknown_label_is_refused_with_the_known_ones(medseg, folder):
    ended = medseg("evaluate", "--predictions", folder / "good", *given(folder), "--labels", "liver")
    assert (ended.code, ended.out) == (2, "")
    assert "no label or region liver vs one of outer, inner" in ended.err
