"""Which candidate is chosen, with made-up scores; and which post-processing, with made-up volumes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medseg.evaluation.postprocessing import apply
from medseg.evaluation.selection import MOST_BEHIND, choose_candidate
from medseg.evaluation.steps import choose_steps
from medseg.records.model import PostProcessing
from medseg.records.scores import CaseScore
from medseg.records.task import Channel, Label, Region, Task

SPACING = (2.0, 1.0, 0.5)  # a voxel has 1 mm³
SHAPE = (9, 22, 26)


def rows(dice, label: str = "organ") -> list[CaseScore]:
    """One label; None is absent on both sides, 0 is missed."""
    found = []
    for index, value in enumerate(dice):
        status = "both empty" if value is None else "missed" if value == 0 else "ok"
        none = dict.fromkeys(("iou", "precision", "recall", "hd95_mm", "assd_mm", "nsd"))
        counts = dict.fromkeys(("true_positives", "false_positives", "false_negatives"), 1)
        volumes = {"prediction_ml": 0, "reference_ml": 0, "volume_error_ml": 0}
        score = {"case": f"{index}", "label": label, "values": (1,), "status": status, "dice": value}
        found.append(CaseScore(**score, **none, **counts, **volumes))
    return found


def chosen(scores: dict[tuple[str, ...], list], networks: dict | None = None) -> tuple[str, ...]:
    cost = {name: len(name) for name in scores} | (networks or {})
    return choose_candidate({name: rows(dice) for name, dice in scores.items()}, cost)[0]


BASE = np.linspace(0.7, 0.9, 20)
WOBBLE = np.tile([0.004, -0.004], 10)


def test_of_equal_cost_the_highest_mean_wins():
    assert chosen({("2d",): list(BASE), ("3d_fullres",): list(BASE + 0.0005)}) == ("3d_fullres",)
    assert chosen({("2d",): list(BASE), ("3d_fullres",): list(BASE)}) == ("2d",)  # of equals the first


def test_an_ensemble_is_taken_for_a_gain_that_is_large_and_steady_enough():
    singles = {("2d",): list(BASE), ("3d_fullres",): list(BASE - 0.01)}
    pair = ("2d", "3d_fullres")
    assert chosen(singles | {pair: list(BASE + 0.01 + WOBBLE)}) == pair
    assert chosen(singles | {pair: list(BASE + 0.0008)}) == ("2d",)  # steady, but too small
    assert chosen(singles | {pair: list(BASE + 0.002 + 8 * WOBBLE)}) == ("2d",)  # larger, but could be chance
    few = {name: dice[:2] for name, dice in (singles | {pair: list(BASE + 0.05)}).items()}
    assert chosen(few) == ("2d",)  # two cases have no interval


def test_an_ensemble_with_a_much_weaker_member_is_not_considered():
    pair, better = ("2d", "3d_fullres"), list(BASE + 0.03)
    for behind, expected in ((MOST_BEHIND - 0.005, pair), (MOST_BEHIND + 0.005, ("2d",))):
        scores = {("2d",): list(BASE), ("3d_fullres",): list(BASE - behind), pair: better}
        assert chosen(scores) == expected
    sentences = choose_candidate({n: rows(d) for n, d in scores.items()}, {n: len(n) for n in scores})[2]
    assert "3d_fullres alone is 0.0250 behind" in sentences[-1]


def test_a_cascade_costs_two_networks_and_must_earn_them():
    cost = {("cascade",): 2}
    assert chosen({("3d",): list(BASE), ("cascade",): list(BASE + 0.0005)}, cost) == ("3d",)
    assert chosen({("3d",): list(BASE), ("cascade",): list(BASE + 0.02 + WOBBLE)}, cost) == ("cascade",)


def test_missed_structures_count_and_absent_ones_do_not():
    never = [0.8, 0.8, 0.8, 0.8, None]
    once = [0.9, 0.9, 0.9, 0.0, None]
    best, candidates, _ = choose_candidate({("a",): rows(never), ("b",): rows(once)}, {("a",): 1, ("b",): 1})
    assert best == ("a",)
    assert [c.mean_dice for c in candidates] == [pytest.approx(0.8), pytest.approx(0.675)]
    assert candidates[1].gain == pytest.approx(-0.125)


def task(**more) -> Task:
    return Task(channels=(Channel(name="CT"),), labels=tuple(Label(name=f"l{v}", value=v) for v in range(3)), **more)


def volume(*, islands: int = 0, hole: bool = False) -> np.ndarray:
    """Label 1 around label 2, with single voxels of 1 elsewhere, and a bubble of background in 1."""
    labels = np.zeros(SHAPE, np.int16)
    labels[1:8, 3:14, 3:16] = 1
    labels[3:6, 6:9, 5:9] = 2
    for number in range(islands):
        labels[8, 19, 2 + 3 * number] = 1
    if hole:
        labels[3:5, 10:12, 11:14] = 0
    return labels


def pick(cases, **more) -> PostProcessing:
    return choose_steps(lambda: iter([(*case, SPACING) for case in cases]), task(**more))


def test_steps_are_taken_where_they_help_in_enough_cases_and_nowhere_else():
    wrong = [(volume(islands=1 + n % 5, hole=True), volume()) for n in range(8)]
    steps = pick(wrong)
    assert steps.keep_largest_foreground
    assert steps.fill_holes_labels == (1,)
    for prediction, reference in wrong:
        np.testing.assert_array_equal(apply(prediction, steps, SPACING), reference)
    few = pick(wrong[:4])  # four that agree can be chance
    assert (few.keep_largest_foreground, few.fill_holes_labels) == (False, ())
    assert any("p = " in sentence and sentence.endswith("no.") for sentence in few.evidence)
    right = pick([(volume(), volume())] * 8)
    assert right == PostProcessing(evidence=right.evidence)
    assert all("would fall" in sentence for sentence in right.evidence)  # large parts are no small components
    assert choose_steps(lambda: iter(()), task()).evidence == ("No cross-validated predictions: nothing is changed.",)


def test_small_components_go_where_larger_ones_are_true():
    def case(n: int) -> tuple[np.ndarray, np.ndarray]:
        reference = volume()
        reference[8, 16:20, 20:24] = 1  # a second true part of 16 mm³
        prediction = reference.copy()
        prediction[8, 21, 1 : 2 + n % 4] = 1  # and up to 4 mm³ that are wrong
        return prediction, reference

    steps = pick([case(n) for n in range(9)])
    assert not steps.keep_largest_foreground
    assert steps.keep_largest_labels == ()
    assert steps.min_mm3 == {1: 10.0}
    assert any("l1 would fall" in sentence for sentence in steps.evidence)


def test_regions_are_cleaned_as_a_whole_and_none_may_fall():
    regions = (Region(name="both", values=(1, 2)), Region(name="core", values=(2,)))
    wrong = [(volume(islands=2 + n % 3), volume()) for n in range(8)]
    assert pick(wrong, regions=regions, regions_order=(1, 2)).keep_largest_foreground
    truly = [(volume(islands=2 + n % 3), volume(islands=2 + n % 3)) for n in range(8)]
    steps = pick(truly, regions=regions, regions_order=(1, 2))
    assert (steps.keep_largest_foreground, steps.keep_largest_labels, steps.keep_largest_groups) == (False, (), ())


@pytest.mark.parametrize("shape", [(9, 14, 17), (1, 24, 31)])
def test_holes_are_those_of_scipy_where_one_label_is_around(shape):
    rng = np.random.default_rng(3)
    mask = ndimage.gaussian_filter(rng.normal(size=shape), [0.6 * (n > 1) for n in shape]) > -0.35
    labels = mask.astype(np.int16)
    filled = apply(labels, PostProcessing(fill_holes_labels=(1,)), SPACING)
    inside = ndimage.binary_fill_holes(mask[0])[None] if shape[0] == 1 else ndimage.binary_fill_holes(mask)
    assert inside.sum() > mask.sum()
    np.testing.assert_array_equal(filled, inside)
    both = labels.copy()
    both[..., ::2] *= 2  # every hole now has faces with two labels
    wide = ndimage.label(~mask)[0]
    kept = apply(both, PostProcessing(fill_holes_labels=(1, 2)), SPACING)
    assert all((kept[wide == n] == 0).all() for n in range(1, wide.max() + 1) if np.ptp(np.nonzero(wide == n)[2]) > 0)


def test_sizes_are_in_mm3_and_the_limit_itself_stays():
    labels = np.zeros(SHAPE, np.int16)
    labels[2, 2, 2:6] = labels[5, 5, 5:8] = 2
    assert (apply(labels, PostProcessing(min_mm3={2: 4.0}), SPACING) == 2).sum() == 4
    assert (apply(labels, PostProcessing(min_mm3={2: 4.0}), (1.0, 1.0, 0.5)) == 2).sum() == 0
    assert (apply(labels, PostProcessing(min_mm3={2: 3.0}), SPACING) == 2).sum() == 7
    with pytest.raises(ValueError, match="spacing_mm"):
        apply(labels, PostProcessing(min_mm3={2: 3.0}))
