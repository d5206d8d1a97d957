"""Left and right: found by names and by where labels lie, and what mirroring then does."""

from __future__ import annotations

import pytest
from planning_phantoms import INTENSITY

from medseg.planning.planner import make_plan
from medseg.planning.presets import MEDSEG, NNUNET
from medseg.planning.sides import LEFT_RIGHT, Sides, find_sides
from medseg.records.fingerprint import CasePrint, Fingerprint
from medseg.records.task import Channel, Label, Region, Task
from medseg.records.training import Laterality, Swap

HERE = (60.0, 90.0)  # mm along z and y
LEFT, RIGHT = (*HERE, 40.0), (*HERE, 130.0)


def task(*names: str, **more) -> Task:
    labels = (Label(name="background", value=0), *(Label(name=n, value=3 * i + 2) for i, n in enumerate(names)))
    return Task(channels=(Channel(name="MRI"),), labels=labels, **more)


def fingerprint(centres=None, cases: int = 4, voxels=None) -> Fingerprint:
    """``centres`` by label value, moved by a few mm from case to case."""
    return Fingerprint(
        cases=tuple(
            CasePrint(
                id=f"c{i}",
                shape_after_crop=(40, 160, 150),
                spacing_mm=(3.0, 1.2, 1.1),
                relative_size_after_cropping=1,
                voxels_per_label=voxels or dict.fromkeys(centres or {}, 1000 + i),
                label_centres_mm={v: (z + i, y - i, x + 2 * i) for v, (z, y, x) in (centres or {}).items()},
            )
            for i in range(cases)
        ),
        intensities=(INTENSITY,),
        median_relative_size_after_cropping=1,
    )


def sides(asked: Task, measured: Fingerprint, preset=MEDSEG, order=(0, 1, 2)) -> tuple[Sides, str]:
    found, reason = find_sides(asked, measured, order, preset)
    return found, reason.text


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("kidney left", "kidney right"),
        ("left_kidney", "right_kidney"),
        ("kidneyLeft", "kidneyRight"),
        ("Kidney-L", "Kidney-R"),
        ("ctx.lh.5", "ctx.rh.5"),
        ("Left", "Right"),
    ],
)
def test_names_that_differ_in_the_side_only_are_a_pair(left, right):
    found, why = sides(task("liver", right, left), fingerprint({2: (80, 90, 95), 5: RIGHT, 8: LEFT}))
    expected = Sides(LEFT_RIGHT, ((3, 2),)) if " " in left or left != "Left" else Sides()
    if left == "Left":  # no name but the side: it is a pair by where it lies only
        assert found.pairs == ()
    else:
        assert found == expected, why
        assert left in why


def test_vertebrae_and_numbers_are_no_sides():
    names = ("vertebra L1", "vertebra R1", "L2", "rib 3 r1")
    found, _ = sides(task(*names), fingerprint({2: (10, 90, 80), 5: (40, 90, 80), 8: (70, 90, 80), 11: (90, 90, 82)}))
    assert found == Sides()


def test_heart_chambers_are_called_left_and_right_but_are_no_mirror_images():
    chambers = task("left ventricle", "right ventricle")
    found, why = sides(chambers, fingerprint({2: (60, 60, 60), 5: (75, 110, 90)}))
    assert found == Sides()
    assert "no labels are each other's mirror image" in why


def test_pairs_whose_places_are_not_known_are_not_exchanged_but_not_mirrored_either():
    found, why = sides(task("kidney left", "kidney right"), fingerprint())
    assert found == Sides(LEFT_RIGHT, ())
    assert "tell them apart" in why


def test_a_pair_that_changes_sides_from_case_to_case_is_no_pair():
    a, b = fingerprint({2: LEFT, 5: RIGHT}), fingerprint({2: RIGHT, 5: LEFT})
    mixed = a.model_copy(update={"cases": (*a.cases[:2], *b.cases[:2])})
    assert sides(task("cyst left", "cyst right"), mixed)[0] == Sides()


def test_a_side_without_counterpart_stops_mirroring():
    found, why = sides(task("left kidney", "spleen"), fingerprint({2: LEFT, 5: (80, 90, 95)}))
    assert found == Sides(LEFT_RIGHT, ())
    assert "left kidney has no counterpart" in why


def test_labels_without_names_that_face_each_other_stop_mirroring():
    measured = fingerprint({2: LEFT, 5: RIGHT})
    assert sides(task("structure 12", "structure 51"), measured)[0] == Sides(LEFT_RIGHT, ())
    unlike = fingerprint({2: LEFT, 5: RIGHT}, voxels={2: 1000, 5: 1400})
    assert sides(task("structure 12", "structure 51"), unlike)[0] == Sides()
    few = fingerprint({2: LEFT, 5: RIGHT}, cases=2)
    assert sides(task("structure 12", "structure 51"), few)[0] == Sides()


def test_presets_may_drop_the_axis_or_mirror_as_nnunet_does():
    pair, measured = task("lung left", "lung right"), fingerprint({2: LEFT, 5: RIGHT})
    drop = MEDSEG.model_copy(update={"laterality": "drop"})
    assert sides(pair, measured, drop)[0] == Sides(LEFT_RIGHT, ())
    assert sides(pair, measured, NNUNET)[0] == Sides()


def test_regions_that_are_not_symmetric_stop_mirroring():
    measured = fingerprint({2: LEFT, 5: RIGHT})
    lungs = Region(name="lungs", values=(2, 5))
    one = Region(name="left", values=(2,))
    other = Region(name="right", values=(5,))
    symmetric = task("lung left", "lung right", regions=(lungs, one, other), regions_order=(2, 2, 5))
    assert sides(symmetric, measured)[0].pairs == ((1, 2),)
    lopsided = task("lung left", "lung right", regions=(lungs, one), regions_order=(2, 5))
    assert sides(lopsided, measured)[0] == Sides(LEFT_RIGHT, ())


def test_the_axis_is_that_of_the_prepared_array():
    pair, measured = task("lung left", "lung right"), fingerprint({2: LEFT, 5: RIGHT})
    assert sides(pair, measured, order=(2, 0, 1))[0] == Sides(0, ((1, 2),))
    assert sides(pair, measured, order=(1, 2, 0))[0] == Sides(1, ((1, 2),))


def test_what_configurations_make_of_sides():
    swap = Laterality(axis=2, pairs=((1, 2),))
    assert Sides().mirroring(3) == ((0, 1, 2), None)
    assert Sides(2, ((1, 2),)).mirroring(3) == ((0, 1, 2), swap)
    assert Sides(2, ((1, 2),)).mirroring(2) == ((0, 1), swap.model_copy(update={"axis": 1}))
    assert Sides(2).mirroring(3) == ((0, 1), None)
    assert Sides(2).mirroring(2) == ((0,), None)
    assert Sides(0, ((1, 2),)).mirroring(2) == ((0, 1), None)  # slices across that axis


def test_a_plan_exchanges_the_labels_of_both_sides():
    pair, measured = task("lung left", "lung right", "heart"), fingerprint({2: LEFT, 5: RIGHT, 8: (60, 60, 90)})
    plan = make_plan(measured, pair)
    assert all(c.training.laterality is None for c in plan.configurations.values())  # nnU-Net's preset
    plan = make_plan(measured, pair, preset="medseg")
    assert plan.configurations["3d_fullres"].training.laterality == Laterality(axis=2, pairs=((1, 2),))
    assert plan.configurations["2d"].swap(pair) == Swap(1, (0, 2, 1, 3), (0, 2, 1, 3))
