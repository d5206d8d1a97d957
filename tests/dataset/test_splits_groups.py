"""Where groups come from: tables, expressions, BIDS names, the layout, identical images; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg.dataset.groups import find_groups
from medseg.dataset.splits import make_splits
from medseg.dataset.twins import identical_cases
from medseg.errors import InputError, UsageError
from medseg.records.case import Case


def cases(*ids: str, groups: dict[str, str] | None = None) -> list[Case]:
    return [Case(case, (Path(f"{case}.nii.gz"),), group=(groups or {}).get(case)) for case in ids]


SCANS = cases("p1_ed", "p1_es", "p2_ed", "p2_es")
EXPECTED = {"p1_ed": "p1", "p1_es": "p1", "p2_ed": "p2", "p2_es": "p2"}


@pytest.mark.parametrize(
    ("name", "spec", "text"),
    [
        ("t.csv", "t.csv", "case,group\np1_ed,p1\np1_es,p1\np2_ed,p2\np2_es,p2\n"),
        ("t.csv", "t.csv:patient", "patient,case\np1,p1_ed\np1,p1_es\np2,p2_ed\np2,p2_es\n"),
        (
            "t.csv",
            "t.csv:scan:patient",
            '\ufeffscan;age;patient\np1_ed; 3;"p1"\np1_es;3;p1\n\np2_ed;9;p2\np2_es;9;p2\n',
        ),
        ("T.TSV", "T.TSV:who", "case\twho\np1_ed\tp1\np1_es\tp1\r\np2_ed\tp2\np2_es\tp2\nother\tp9\n"),
        ("a,b.csv", "a,b.csv:p:q", "x,p,q\n1,p1_ed,p1\n1,p1_es,p1\n1,p2_ed,p2\n1,p2_es,p2"),
    ],
)
def test_a_table_gives_the_groups_whatever_it_is_saved_by(tmp_path, monkeypatch, name, spec, text):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text, encoding="utf-8")
    found = find_groups(SCANS, spec)
    assert found.of == EXPECTED
    assert found.source.startswith(name + ":")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column 'case'"),
        ("case,patient\np1_ed,p1\n", "no column 'group'; its columns: case, patient".replace(";", " vs")),
        ("case,group\np1_ed,p1\np1_es,p1\np2_ed,p2\n", "for 1 of 4 cases: p2_es"),
        ("case,group\np1_ed,p1\np1_es,p1\np2_ed,p2\np2_es,\n", "for 1 of 4 cases: p2_es"),
        ("case,group\np1_ed,p1\np1_es,p1\np2_ed,p2\np2_es,p2\np1_ed,p1\n", "p1_ed more than once"),
        ("case,group\np1_ed,p1,x\n", "row 2 has not 2 values"),
        ("case,group,group\np1_ed,p1,x\n", "same name"),
        ('case,group\n"p1_ed,p1\n', "end of data"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match="E0161") as caught:
        find_groups(SCANS, str(tmp_path / "t.csv"))
    assert said in str(caught.value)


def test_everything_that_is_wrong_with_the_rows_is_said_at_once(tmp_path):
    (tmp_path / "t.csv").write_text("case,group\np1_ed,p1\np1_ed,p2\n")
    with pytest.raises(InputError) as caught:
        find_groups(SCANS, str(tmp_path / "t.csv"))
    assert len(caught.value.problems) == 2


def test_a_table_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(InputError, match="E0100"):
        find_groups(SCANS, str(tmp_path / "none.csv"))
    (tmp_path / "t.csv").write_bytes("case,group\np1_ed,Müller\n".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        find_groups(SCANS, str(tmp_path / "t.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match="E0106"):
        find_groups(SCANS, str(tmp_path / "folder.csv"))


def test_an_expression_gives_the_groups():
    assert find_groups(SCANS, r"regex:(p\d+)_").of == EXPECTED
    assert find_groups(SCANS, r"regex:^(?:x|(p\d+))_e[ds]$").of == EXPECTED


@pytest.mark.parametrize(
    "spec", ["regex:(p", r"regex:p\d", r"regex:(p)(\d)", "regex:", "patients", "t.txt", "t.csv:a:b:c"]
)
def test_a_request_that_makes_no_sense_is_a_usage_error(spec):
    with pytest.raises(UsageError, match="E0001"):
        find_groups(SCANS, spec)


@pytest.mark.parametrize("spec", [r"regex:(p1)_", r"regex:(q?)"])
def test_an_expression_that_misses_cases_is_refused_and_names_them(spec):
    with pytest.raises(InputError, match=r"E0161.*p2_ed, p2_es"):
        find_groups(SCANS, spec)


def test_bids_subjects_are_groups():
    names = ["sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-011_T1w", "study_sub-02_T1w"]
    assert list(find_groups(cases(*names), "bids").of.values()) == ["sub-01", "sub-01", "sub-011", "sub-02"]
    with pytest.raises(InputError, match=r"E0161.*nosub-01_T1w"):
        find_groups(cases(*names, "nosub-01_T1w"), "bids")


def test_the_layouts_groups_hold_unless_others_or_none_are_asked_for():
    grouped = cases(*EXPECTED, "p3_ed", groups={"p1_ed": "A", "p1_es": "A", "p2_ed": "B"})
    assert find_groups(grouped, None).of == {"p1_ed": "A", "p1_es": "A", "p2_ed": "B"}
    assert find_groups(grouped, None).source == "the data set"
    assert find_groups(grouped, r"regex:(p\d)").of["p2_es"] == "p2"
    assert find_groups(grouped, "none", [("p1_ed", "p3_ed")]).of == {}
    assert find_groups(SCANS, None).of == {}
    assert find_groups(SCANS, None).source == ""


def test_identical_images_bring_their_groups_together():
    found = find_groups(SCANS, r"regex:(p\d)", [("p1_es", "p2_ed")])
    assert set(found.of.values()) == {"p1 + p2"}
    grouped = cases("a", "b", "c", "d", "e", "f", groups={"a": "one", "b": "one", "c": "two"})
    found = find_groups(grouped, None, [("b", "d"), ("d", "e"), ("c", "c")])
    assert found.of == {"a": "d + e + one", "b": "d + e + one", "d": "d + e + one", "e": "d + e + one", "c": "two"}
    assert find_groups(cases("one", "x", "y", groups={"x": "one"}), None, [("one", "y")]).of == {
        "one": "one + y",
        "x": "one",
        "y": "one + y",
    }


def test_cases_that_share_any_image_are_twins():
    hashes = {"a": ["1", "2"], "b": ["3", "2"], "c": ["", "4"], "d": ["", "5"], "e": ["6", "6"]}
    assert identical_cases(hashes) == (("a", "b"),)


def test_groups_are_recorded_with_the_splits():
    splits = make_splits(list(EXPECTED), groups=find_groups(SCANS, r"regex:(p\d+)_"))
    assert splits.groups == EXPECTED
    assert (splits.method, splits.grouped_by) == ("kfold", r"regex:(p\d+)_")
    assert sorted(fold.val for fold in splits.folds) == [("p1_ed", "p1_es"), ("p2_ed", "p2_es")]
