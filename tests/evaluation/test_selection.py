"""Which candidate is chosen, with made-up scores; and which post-processing, with made-up volumes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

import medseg.evaluation.steps as steps_module
from medseg.evaluation import crossfit
from medseg.evaluation.crossfit import Judged, cross_fit, parts_of
from medseg.evaluation.postprocessing import apply
from medseg.evaluation.selection import MOST_BEHIND, choose_candidate
from medseg.evaluation.targets import targets
from medseg.records.model import PostProcessing
from medseg.records.task import Channel, Label, Region, Task

SPACING = (2.0, 1.0, 0.5)  # a voxel has 1 mm³
SHAPE = (9, 22, 26)


def judged(dice, plain=None) -> Judged:
    """One label; None is absent on both sides, 0 is missed."""
    processed, unprocessed = (np.array(values, float)[:, None] for values in (dice, dice if plain is None else plain))
    return Judged(("organ",), unprocessed, processed, PostProcessing())


def chosen(scores: dict[tuple[str, ...], list], networks: dict | None = None) -> tuple[str, ...]:
    cost = {name: len(name) for name in scores} | (networks or {})
    return choose_candidate({name: judged(dice) for name, dice in scores.items()}, cost)[0]


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
    sentences = choose_candidate({n: judged(d) for n, d in scores.items()}, {n: len(n) for n in scores})[2]
    assert "3d_fullres alone is 0.0250 behind" in sentences[-1]


def test_a_cascade_costs_two_networks_and_must_earn_them():
    cost = {("cascade",): 2}
    assert chosen({("3d",): list(BASE), ("cascade",): list(BASE + 0.0005)}, cost) == ("3d",)
    assert chosen({("3d",): list(BASE), ("cascade",): list(BASE + 0.02 + WOBBLE)}, cost) == ("cascade",)


def test_missed_structures_count_and_absent_ones_do_not():
    never = [0.8, 0.8, 0.8, 0.8, None]
    once = [0.9, 0.9, 0.9, 0.0, None]
    best, candidates, _ = choose_candidate({("a",): judged(never), ("b",): judged(once)}, {("a",): 1, ("b",): 1})
    assert best == ("a",)
    assert [c.mean_dice for c in candidates] == [pytest.approx(0.8), pytest.approx(0.675)]
    assert candidates[1].gain == pytest.approx(-0.125)


def test_a_structure_that_one_side_invents_counts_as_one_that_the_other_has_right():
    a, b = [0.8] * 9 + [None], [0.8] * 9 + [0.0]
    _, candidates, _ = choose_candidate({("a",): judged(a), ("b",): judged(b)}, {("a",): 1, ("b",): 1})
    assert candidates[1].configurations == ("b",)
    assert candidates[1].gain == pytest.approx(-0.1)


def test_candidates_are_compared_after_their_post_processing_and_both_figures_are_told():
    scores = {("2d",): judged(list(BASE), list(BASE - 0.1)), ("3d",): judged(list(BASE - 0.01), list(BASE - 0.02))}
    best, candidates, _ = choose_candidate(scores, {("2d",): 1, ("3d",): 1})
    assert best == ("2d",)
    assert candidates[0].mean_dice == pytest.approx(BASE.mean())
    assert candidates[0].mean_dice_unprocessed == pytest.approx(BASE.mean() - 0.1)


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


def fitted(cases, parts=None, **more) -> Judged:
    opened = [lambda case=case: (*case, SPACING) for case in cases]
    return cross_fit(opened, parts or [0] * len(cases), task(**more), workers=2)


def pick(cases, **more) -> PostProcessing:
    return fitted(cases, **more).postprocessing


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
    assert pick([]).evidence == ("No cross-validated predictions: nothing is changed.",)


def mean_dice(prediction, reference) -> float:
    found = []
    for label in (1, 2):
        a, b = prediction == label, reference == label
        found.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return float(np.mean(found))


def test_each_case_is_judged_by_the_choice_of_the_other_parts():
    """Two parts: only in the first are islands wrong, in the second they are true."""
    wrong = [(volume(islands=1 + n % 5), volume()) for n in range(8)]
    truly = [(volume(islands=1 + n % 5), volume(islands=1 + n % 5)) for n in range(8)]
    found = fitted([*wrong, *truly], [0] * 8 + [1] * 8)
    only_wrong, only_truly = pick(wrong), pick(truly)
    assert only_wrong.keep_largest_foreground
    assert only_truly == PostProcessing(evidence=only_truly.evidence)
    for number, (prediction, reference) in enumerate([*wrong, *truly]):
        chosen = only_truly if number < 8 else only_wrong
        processed = apply(prediction, chosen, SPACING)
        assert found.plain[number].mean() == pytest.approx(mean_dice(prediction, reference))
        assert found.processed[number].mean() == pytest.approx(mean_dice(processed, reference))
    assert found.processed[8:].mean() < found.plain[8:].mean()  # what the other part chose does harm here


def test_a_gain_that_holds_in_every_part_is_counted_and_one_of_a_single_part_is_not():
    everywhere = [(volume(islands=1 + n % 5), volume()) for n in range(18)]
    found = fitted(everywhere, [n % 3 for n in range(18)])
    assert (found.processed == 1).all()
    lucky = [(volume(islands=3), volume())] * 8 + [(volume(), volume())] * 8  # all that is wrong lies in one part
    found = fitted(lucky, [0] * 8 + [1] * 8)
    assert found.postprocessing.keep_largest_foreground
    np.testing.assert_array_equal(found.processed, found.plain)


def test_post_processing_fitted_to_noise_gains_nothing_once_it_is_judged_on_other_cases(monkeypatch):
    """Islands that are true or wrong by a coin: what is chosen on all cases looks better than it is."""
    monkeypatch.setattr(steps_module, "SIGNIFICANT", 1.01)
    rng, gained, judged_gain = np.random.default_rng(4), 0.0, 0.0
    for _ in range(6):
        coins = rng.integers(0, 2, 12)
        cases = [(volume(islands=3), volume(islands=3 * int(coin))) for coin in coins]
        steps = pick(cases)
        gained += np.mean([mean_dice(apply(p, steps, SPACING), r) - mean_dice(p, r) for p, r in cases])
        found = fitted(cases, [n % 4 for n in range(12)])
        judged_gain += (found.processed - found.plain).mean()
    assert gained > 0
    assert judged_gain < gained


@pytest.mark.parametrize("shape", [(9, 22, 26), (1, 40, 50)])
def test_what_a_step_changes_is_counted_in_its_box_as_in_the_whole_volume(shape):
    rng = np.random.default_rng(8)
    smooth = ndimage.gaussian_filter(rng.normal(size=(3, *shape)), (0, *(0.9 * (n > 1) for n in shape)))
    prediction, reference = (np.roll(smooth, k, axis=2).argmax(0).astype(np.int16) for k in (0, 2))
    reference[:, :4] = -1
    whole = task(regions=(Region(name="both", values=(1, 2)),), regions_order=(1,))
    scored = targets(whole)
    changing = 0
    for stage in steps_module.stages(whole, scored):
        steps = stage(PostProcessing())
        plain, changes = crossfit._count((prediction, reference, SPACING), (PostProcessing(), steps), scored)
        for step, change in zip(steps, changes, strict=True):
            after = apply(prediction, step.alone, SPACING)
            expected = []
            for target in scored:
                a, b = target.mask(after) & (reference >= 0), target.mask(reference)
                expected.append([(a & b).sum(), a.sum(), b.sum()])
            np.testing.assert_array_equal(plain if change is None else plain + change, expected, err_msg=step.name)
            changing += change is not None
    assert changing > 8


def test_parts_are_folds_and_a_single_fold_is_dealt():
    assert parts_of(["0", "2", "0", "1"]) == [0, 2, 0, 1]
    assert parts_of(["3"] * 7) == [0, 1, 2, 3, 4, 0, 1]


def test_a_shelf_without_room_reads_again(monkeypatch):
    cases = [(volume(islands=1 + n % 5, hole=True), volume()) for n in range(8)]
    expected = fitted(cases, [n % 2 for n in range(8)])
    monkeypatch.setattr(crossfit, "SHELF_BYTES", 0)
    found = fitted(cases, [n % 2 for n in range(8)])
    assert found.postprocessing == expected.postprocessing
    np.testing.assert_array_equal(found.processed, expected.processed)


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
