"""Names of a new task found among those of a model, and the line that tells the user."""

from __future__ import annotations

import pytest

from medseg.errors import UsageError
from medseg.planning.matching import Asked, match_names, match_tasks, told, told_all
from medseg.records.task import Channel, Label, Region, Task


def task(channels="MRI", labels="liver tumour", regions=None, background="background") -> Task:
    """``labels`` get values 1, 3, 5 …; ``regions`` are named and hold all of them."""
    found = [Label(name=background, value=0)]
    found += [Label(name=name, value=2 * index + 1) for index, name in enumerate(labels.split())]
    values = tuple(label.value for label in found[1:])
    return Task(
        channels=tuple(Channel(name=name) for name in channels.split()),
        labels=tuple(found),
        regions=tuple(Region(name=name, values=values) for name in regions.split()) if regions else (),
        regions_order=(values[-1],) * len(regions.split()) if regions else (),
    )


def places(new: str, old: str, **asked: str) -> tuple[int | None, ...]:
    return match_names(new.split(), old.split(), asked).places


def test_names_match_whatever_their_case_and_order():
    assert places("Tumour cyst LIVER", "liver tumour") == (1, None, 0)


def test_an_equal_name_goes_before_one_that_differs_in_case():
    assert places("a A", "A a") == (1, 0)
    assert places("a", "A a") == (1,)
    assert places("a A", "A") == (None, 0)


def test_channels_that_are_called_alike_are_taken_in_order():
    assert places("MRI mri MRI", "MRI MRI") == (0, None, 1)
    assert places("MRI MRI", "mri T2 MRI Mri") == (2, 0)


def test_what_is_asked_for_goes_first_and_may_be_asked_for_twice():
    assert places("left right tumour", "kidney tumour", left="kidney", right="kidney") == (0, 0, 1)
    assert places("kidney other", "kidney tumour", kidney="tumour") == (1, None)
    assert places("kidney tumour", "kidney tumour", kidney="") == (None, 1)


def test_backgrounds_belong_together_whatever_they_are_called():
    found = match_tasks(task(background="nothing"), task(labels="nothing Liver"), Asked())
    assert found.labels.places == (0, 2, None)
    assert found.outputs == found.labels


def test_regions_are_matched_as_outputs_and_labels_beside_them():
    new, old = task(labels="core edge", regions="whole Core"), task(labels="edge core", regions="core whole")
    found = match_tasks(new, old, Asked())
    assert found.outputs.places == (1, 0)
    assert found.labels.places == (0, 2, 1)
    assert found.outputs.names == ("core", "whole")


@pytest.mark.parametrize("regions_in", ["new", "old"])
def test_labels_and_regions_are_not_taken_for_each_other(regions_in):
    one, other = task(labels="core edge", regions="core edge"), task(labels="core edge")
    found = match_tasks(*((one, other) if regions_in == "new" else (other, one)), Asked())
    assert set(found.outputs.places) == {None}
    assert len(found.outputs.names) == (3 if regions_in == "new" else 2)
    assert found.labels.places == (0, 1, 2)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked(labels={"livr": "liver"}), "the data set has no 'livr'"),
        (Asked(labels={"liver": "livr"}), "the model has no 'livr'"),
        (Asked(labels={"background": "liver"}), "the data set has no 'background'"),
        (Asked(channels={"T1": "MRI"}), "the data set has no 'T1'"),
        (Asked(channels={"MRI": "T1"}), "the model has no 'T1'"),
    ],
)
def test_names_that_are_not_there_are_refused(asked, words):
    with pytest.raises(UsageError, match="E0001") as error:
        match_tasks(task(), task(), asked)
    assert words in str(error.value)


def test_the_user_sees_what_is_taken_over_what_is_new_and_what_is_lost():
    new, old = task("T1 FLAIR", "liver cyst vessel"), task("t1", "LIVER tumour spleen")
    found = match_tasks(new, old, Asked(labels={"vessel": "spleen"}))
    assert told_all(new, found) == (
        "channels: 1 taken over (T1), 1 new (FLAIR)",
        "labels: 2 taken over (liver, vessel from spleen), 1 new (cyst), 1 of the model not used (tumour)",
    )


def test_what_is_asked_for_may_be_written_in_any_case():
    found = match_tasks(task("FLAIR"), task("T2 PET"), Asked(channels={"flair": "pet"}, labels={"TUMOUR": "Liver"}))
    assert found.channels.places == (1,)
    assert found.labels.places == (0, 1, 1)


def test_regions_are_told_instead_of_labels_and_long_lists_are_cut():
    new = task(regions="whole")
    assert told_all(new, match_tasks(new, new, Asked()))[1] == "regions: 1 taken over (whole)"
    names = [f"l{index}" for index in range(9)]
    assert told(names, match_names(names, names, {}), "labels").endswith("(l0, l1, l2, l3, l4, l5 and 3 more)")
