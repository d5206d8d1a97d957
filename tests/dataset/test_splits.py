"""Splits against recorded folds of scikit-learn's KFold, which nnU-Net uses, and files that must be refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.dataset.groups import Groups
from medseg.dataset.splits import leaks, make_splits, read_splits
from medseg.errors import InputError, IntegrityError, UsageError
from medseg.records.base import write_record

# KFold(5, shuffle=True, random_state=12345) of scikit-learn 1.9.1; KFOLD_200 is the SHA-256 of the folds as JSON
KFOLD = {
    7: [[3, 6], [0, 4], [1], [5], [2]],
    13: [[0, 7, 9], [3, 6, 10], [8, 11, 12], [1, 4], [2, 5]],
}
KFOLD_200 = "3a08b7b534ccd2a851d36259642775630b5b085f3c409e9576c782f8fcc34315"


def ids(count: int) -> list[str]:
    return [f"case_{n:03d}" for n in range(count)]


@pytest.mark.parametrize("count", sorted(KFOLD))
def test_the_folds_are_those_of_nnunet_whatever_the_order_of_the_cases(count: int) -> None:
    shuffled = np.random.default_rng(0).permutation(ids(count)).tolist()
    splits = make_splits(shuffled)
    assert [[int(case[-3:]) for case in fold.val] for fold in splits.folds] == KFOLD[count]
    assert splits.seed == 12345


def test_the_folds_of_200_cases_are_those_of_nnunet() -> None:
    folds = [[int(case[-3:]) for case in fold.val] for fold in make_splits(ids(200)).folds]
    assert hashlib.sha256(json.dumps(folds).encode()).hexdigest() == KFOLD_200


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 60),
    folds=st.integers(2, 9),
    seed=st.integers(0, 2**32 - 1),
    patients=st.integers(1, 20),
    presence=st.none() | st.lists(st.frozensets(st.integers(1, 4)), min_size=60, max_size=60),
)
def test_every_case_validates_once_and_no_group_is_on_both_sides(
    count: int, folds: int, seed: int, patients: int, presence: list[frozenset[int]] | None
) -> None:
    groups = {case: f"patient_{n % patients}" for n, case in enumerate(ids(count)) if n % 4}
    labels = None if presence is None else dict(zip(ids(count), presence, strict=False))
    units = len(set(groups.values())) + count - len(groups)
    if units < max(2, folds):
        with pytest.raises(InputError, match="E0161"):
            make_splits(ids(count), folds, seed, Groups(groups), labels)
        return
    splits = make_splits(ids(count), folds, seed, Groups(groups), labels)
    assert splits == make_splits(ids(count)[::-1], folds, seed, Groups(groups), labels)
    assert len(splits.folds) == folds
    assert leaks(splits, Groups(groups)) == []
    assert sorted(case for fold in splits.folds for case in fold.val) == ids(count)
    for fold in splits.folds:
        assert fold.val
        assert sorted((*fold.train, *fold.val)) == ids(count)
        assert not {groups.get(case, case) for case in fold.train} & {groups.get(case, case) for case in fold.val}


def test_fewer_cases_than_folds_leave_one_out() -> None:
    splits = make_splits(["b", "a", "c"])
    assert sorted(fold.val for fold in splits.folds) == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize("cases", [[], ["a"], ["a", "a"]])
def test_one_case_cannot_be_split(cases: list[str]) -> None:
    with pytest.raises(InputError, match="E0161"):
        make_splits(cases)


def test_one_group_cannot_be_split_and_one_fold_is_no_cross_validation() -> None:
    with pytest.raises(InputError, match="E0161"):
        make_splits(["a", "b"], groups=Groups({"a": "p", "b": "p"}))
    with pytest.raises(UsageError):
        make_splits(["a", "b"], folds=1)


@pytest.mark.parametrize(
    "value",
    [
        [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}],
        {"train": ["a", "b"], "val": ["c"]},
        {"train": ["a", "b", "c"], "val": []},
    ],
)
def test_splits_of_nnunet_and_of_hand_are_read(tmp_path: Path, value: object) -> None:
    (tmp_path / "splits.json").write_text(json.dumps(value))
    splits = read_splits(tmp_path / "splits.json", ["a", "b", "c"])
    folds = value if isinstance(value, list) else [value]
    assert [{"train": list(f.train), "val": list(f.val)} for f in splits.folds] == folds


def test_our_own_splits_read_back_equal(tmp_path: Path) -> None:
    splits = make_splits(ids(11))
    write_record(tmp_path / "splits.json", splits)
    assert read_splits(tmp_path / "splits.json", ids(11)) == splits


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "folds"),
        ({}, "folds.0.train"),
        ([{"train": ["a"]}], "folds.0.val"),
        ([{"train": [], "val": ["a"]}], "folds.0.train"),
        ([{"train": [1], "val": ["a"]}], "folds.0.train.0"),
        ([{"train": "ab", "val": ["a"]}], "folds.0.train"),
        ([{"train": ["a"], "val": ["b"], "test": ["c"]}], "test"),
        ([{"train": ["a", "b"], "val": ["b"]}], "trains on b"),
        ([{"train": ["a", "x"], "val": ["b"]}], "names x"),
        ([{"train": ["a", "a"], "val": ["b"]}], "a twice"),
        ({"folds": [{"train": ["a"], "val": ["../x"]}]}, "../x"),
        (3, "Splits"),
    ],
)
def test_wrong_splits_are_refused(tmp_path: Path, value: object, said: str) -> None:
    (tmp_path / "splits.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="E0161") as error:
        read_splits(tmp_path / "splits.json", ["a", "b", "c"])
    assert said in str(error.value)


def test_all_that_is_wrong_with_a_split_is_said_at_once(tmp_path: Path) -> None:
    folds = [{"train": ["a", "b"], "val": ["b"]}, {"train": ["x"], "val": ["c"]}]
    (tmp_path / "splits.json").write_text(json.dumps(folds))
    with pytest.raises(InputError) as error:
        read_splits(tmp_path / "splits.json", ["a", "b", "c"])
    assert len(error.value.problems) == 2


def test_cases_in_no_fold_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "splits.json").write_text('{"train": ["a"], "val": ["b"]}')
    read_splits(tmp_path / "splits.json", ["a", "b", "c"])
    assert "1 case(s) are in no fold: c" in caplog.text


def test_a_file_that_is_not_there_or_no_json_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="E0100"):
        read_splits(tmp_path / "none.json", ["a", "b"])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(IntegrityError, match="E0711"):
        read_splits(tmp_path / "bad.json", ["a", "b"])


def test_the_recorded_split_of_the_hippocampus_is_read(shared: Path) -> None:
    folder = shared / "data" / "hippocampus"
    cases = [path.name.removesuffix(".nii.gz") for path in (folder / "labelsTr").iterdir()]
    splits = read_splits(folder / "split_160_40.json", cases)
    assert (len(splits.folds[0].train), len(splits.folds[0].val)) == (160, 40)
