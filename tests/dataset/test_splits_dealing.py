"""Folds of equal numbers of cases, and of cases with each label; an exhaustive search tells what is possible."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.dataset.dealing import Unit, deal_balanced, deal_evenly
from medseg.dataset.groups import Groups
from medseg.dataset.splits import left_to_chance, make_splits, split_table
from medseg.records.task import Channel, Label, Task


def single(labels: list[int], case: int) -> Unit:
    return Unit((f"case_{case:03d}",), dict.fromkeys(labels, 1))


def sizes(dealt: list[list[Unit]]) -> list[int]:
    return [sum(len(unit.cases) for unit in fold) for fold in dealt]


def with_label(dealt: list[list[Unit]], label: int) -> list[int]:
    return [sum(unit.labels.get(label, 0) for unit in fold) for fold in dealt]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sets(st.integers(1, 6)), min_size=2, max_size=60), st.integers(2, 7), st.integers(0, 2**32 - 1))
def test_single_cases_fill_the_folds_as_evenly_as_kfold(labels, folds, seed):
    units = [single(sorted(own), case) for case, own in enumerate(labels)]
    folds = min(folds, len(units))
    dealt = deal_balanced(units, folds, seed)
    assert sizes(dealt) == sizes(deal_evenly(units, folds, seed))
    assert dealt == deal_balanced(units, folds, seed)
    assert sorted(unit.cases for fold in dealt for unit in fold) == [unit.cases for unit in units]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(2, 7), st.integers(0, 99))
def test_a_label_that_some_cases_have_differs_by_at_most_one_between_folds(having, folds, seed):
    units = [single([3] if has else [], case) for case, has in enumerate(having)]
    numbers = with_label(deal_balanced(units, min(folds, len(units)), seed), 3)
    assert max(numbers) - min(numbers) <= 1


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=40), st.integers(2, 7), st.integers(0, 99))
def test_groups_without_labels_leave_folds_that_differ_by_less_than_the_largest_group(numbers, folds, seed):
    units = [Unit(tuple(f"{group}_{n}" for n in range(count))) for group, count in enumerate(numbers)]
    dealt = deal_balanced(units, min(folds, len(units)), seed)
    assert max(sizes(dealt)) - min(sizes(dealt)) <= max(numbers)
    assert all(dealt)


def unevenness(folds: list[list[Unit]], labels: list[int]) -> float:
    """Sum over folds of the squared distances from equal shares, of cases and of each label."""
    columns = [sizes(folds), *(with_label(folds, label) for label in labels)]
    return sum(float(np.var(column)) * len(column) for column in columns)


@pytest.mark.parametrize("seed", range(6))
def test_the_folds_are_near_the_best_that_an_exhaustive_search_finds(seed):
    rng = np.random.default_rng(seed)
    units = []
    for group in range(8):
        cases = tuple(f"{group}_{n}" for n in range(rng.integers(1, 4)))
        units.append(Unit(cases, {1: int(rng.integers(0, len(cases) + 1)), 2: int(group % 3 == 0) * len(cases)}))
    searched = []
    for places in itertools.product(range(3), repeat=len(units)):
        if len(set(places)) == 3:
            folds = [[unit for unit, place in zip(units, places, strict=True) if place == fold] for fold in range(3)]
            searched.append(unevenness(folds, [1, 2]))
    ours = unevenness(deal_balanced(units, 3, seed), [1, 2])
    better = sum(score < ours - 1e-9 for score in searched)
    assert better / len(searched) < 0.05
    assert ours <= min(searched) + 8


def test_more_labels_than_chance_spreads_are_all_in_every_fold():
    """A hundred cases; two labels in five of them each, one in ten: shuffled folds miss some, dealt ones none."""
    rng = np.random.default_rng(1)
    ids = [f"case_{n:03d}" for n in range(100)]
    presence = {case: {1} for case in ids}
    for label, count in ((2, 5), (3, 5), (4, 10)):
        for case in rng.choice(ids, count, replace=False):
            presence[case] = presence[case] | {label}
    stratified, shuffled = make_splits(ids, stratify_by=presence), make_splits(ids)

    def missed(splits) -> int:
        found = [Counter(label for case in fold.val for label in presence[case]) for fold in splits.folds]
        return sum(numbers[label] == 0 for numbers in found for label in (2, 3, 4))

    assert missed(shuffled) > 0
    assert missed(stratified) == 0
    assert stratified.method == "stratified"
    assert [len(fold.val) for fold in stratified.folds] == [20] * 5


@pytest.mark.parametrize("seed", range(4))
def test_the_expected_number_of_folds_without_a_label_is_what_drawing_gives(seed):
    rng = np.random.default_rng(seed)
    ids = [f"c{n:02d}" for n in range(int(rng.integers(11, 30)))]
    rare = set(rng.choice(ids, int(rng.integers(1, 6)), replace=False).tolist())
    presence = {case: {1, 2} if case in rare else {1} for case in ids}
    expected = left_to_chance(ids, None, Groups(), presence)
    drawn = [make_splits(ids, seed=n) for n in range(600)]
    mean = np.mean([sum(not rare & set(fold.val) for fold in splits.folds) for splits in drawn])
    assert expected.keys() == {2}
    assert mean == pytest.approx(expected[2], abs=0.15)


def test_labels_of_every_case_and_of_many_are_not_left_to_chance():
    ids = [f"c{n:03d}" for n in range(200)]
    presence = {case: {1, 2} if n % 2 else {1} for n, case in enumerate(ids)}
    assert left_to_chance(ids, None, Groups(), presence) == {}
    everything_one = Groups(dict.fromkeys(ids[:100], "a") | dict.fromkeys(ids[100:], "b"))
    assert left_to_chance(ids, None, everything_one, presence) == {}


def test_the_table_counts_groups_cases_and_the_rarest_labels():
    labels = tuple(Label(name=f"label_{n}", value=n) for n in range(11))
    task = Task(channels=(Channel(name="CT"),), labels=labels)
    ids = [f"c{n}" for n in range(6)]
    presence = {case: set(range(1, 11)) - {n + 1} for n, case in enumerate(ids)}
    groups = Groups(dict(zip(ids, "aabbcc", strict=True)), "by hand")
    rows = split_table(make_splits(ids, 3, groups=groups), presence, task)
    assert rows[0] == ("fold", "groups", "cases", *(f"label_{n}" for n in range(1, 9)))
    assert {row[1:3] for row in rows[1:]} == {("1", "2")}
    assert [sum(int(row[column]) for row in rows[1:]) for column in range(3, 11)] == [5] * 6 + [6, 6]
    assert split_table(make_splits(ids), presence, task)[0][:2] == ("fold", "cases")
