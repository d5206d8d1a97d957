"""Post-processing: what is removed, and when cross-validation says that it should be."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import measure

from medseg.errors import InputError
from medseg.evaluation.postprocessing import apply, choose
from medseg.records.model import PostProcessing
from medseg.records.task import Channel, Label, Region, Task

SHAPE = (6, 12, 15)


def make_task(classes: int, **more: object) -> Task:
    labels = tuple(Label(name=f"label {i}", value=i) for i in range(classes))
    return Task(channels=(Channel(name="CT"),), labels=labels, **more)


def organ(*, islands: dict[int, int] | None = None) -> np.ndarray:
    """A block of label 1 that touches one of label 2, and ``islands``: label → single voxels far away."""
    labels = np.zeros(SHAPE, np.int16)
    labels[1:4, 2:7, 2:6] = 1
    labels[1:4, 2:7, 6:9] = 2
    for label, count in (islands or {}).items():
        for number in range(count):
            labels[5, 1 + 2 * number, 10 + 2 * (label - 1)] = label
    return labels


def naive(labels: np.ndarray, postprocessing: PostProcessing) -> np.ndarray:
    """scikit-image, whole volume, one step after the other."""
    labels = labels.copy()

    def clear(mask: np.ndarray) -> None:
        numbers = measure.label(mask, connectivity=3)
        if mask.any():
            labels[mask & (numbers != 1 + np.argmax(np.bincount(numbers.ravel())[1:]))] = 0

    if postprocessing.keep_largest_foreground:
        clear(labels > 0)
    for label in postprocessing.keep_largest_labels:
        clear(labels == label)
    return labels


@pytest.mark.parametrize("seed", range(4))
def test_apply_removes_what_scikit_image_removes(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.integers(1, 5, (7, 13, 19)) * (rng.random((7, 13, 19)) < 0.12)).astype(np.int16)
    before = labels.copy()
    for postprocessing in (
        PostProcessing(),
        PostProcessing(keep_largest_foreground=True),
        PostProcessing(keep_largest_labels=(2, 4)),
        PostProcessing(keep_largest_foreground=True, keep_largest_labels=(1, 3, 9)),
    ):
        result = apply(labels, postprocessing)
        np.testing.assert_array_equal(result, naive(labels, postprocessing))
        assert result.dtype == labels.dtype
    np.testing.assert_array_equal(labels, before)


def test_an_empty_prediction_stays_empty():
    everything = PostProcessing(keep_largest_foreground=True, keep_largest_labels=(1, 2))
    for labels in (np.zeros(SHAPE, np.int16), np.zeros((1, 1, 1), np.uint8)):
        assert not apply(labels, everything).any()


def test_islands_that_are_always_wrong_are_removed_from_all_foreground():
    cases = [(organ(islands={1: 3, 2: 1}), organ()), (organ(islands={2: 4}), organ())]
    chosen = choose(cases, make_task(3))
    assert chosen.keep_largest_foreground
    assert chosen.keep_largest_labels == ()  # nothing is left to gain
    assert "mean Dice 0.9" in chosen.evidence[0]
    assert "1.00000 over 2 cases: yes." in chosen.evidence[0]
    for prediction, reference in cases:
        np.testing.assert_array_equal(apply(prediction, chosen), reference)


def test_a_label_that_truly_has_two_parts_vetoes_the_foreground_but_not_the_other_label():
    cases = [(organ(islands={1: 3, 2: 1}), organ(islands={2: 1})) for _ in range(3)]
    chosen = choose(cases, make_task(3))
    assert not chosen.keep_largest_foreground
    assert chosen.keep_largest_labels == (1,)
    assert "label 2 would fall" in chosen.evidence[0]
    assert "3 of 3 cases would change: yes" in chosen.evidence[1]
    np.testing.assert_array_equal(apply(cases[0][0], chosen), cases[0][1])


def test_a_gain_below_a_ten_thousandth_changes_nothing():
    reference = np.zeros((30, 40, 50), np.int16)
    reference[:, :25, :30] = 1
    prediction = reference.copy()
    prediction[20, 35, 45] = 1  # Dice rises by 1 / 45001
    chosen = choose([(prediction, reference)], make_task(2))
    assert (chosen.keep_largest_foreground, chosen.keep_largest_labels) == (False, ())
    assert all(sentence.endswith("no.") for sentence in chosen.evidence)


def test_a_spurious_label_that_vanishes_from_a_case_counts_as_a_gain():
    reference = np.where(organ() == 2, 0, organ()).astype(np.int16)
    prediction = reference.copy()
    prediction[5, 10, 13] = 2
    chosen = choose([(prediction, reference), (organ(), organ())], make_task(3))
    assert chosen.keep_largest_foreground
    np.testing.assert_array_equal(apply(prediction, chosen), reference)


def test_ignored_voxels_do_not_decide_but_take_part_in_components():
    reference = organ()
    prediction = organ(islands={1: 4})
    reference[5] = -1  # nobody annotated the slice with the islands
    chosen = choose([(prediction, reference)], make_task(3))
    assert not chosen.keep_largest_foreground
    bridge = organ()
    bridge[4:6, 4, 3] = 1
    bridge[5, 4, 3:14] = 1
    reference = bridge.copy()
    reference[4] = -1
    bridge[1, 0, 0] = 2
    assert choose([(bridge, reference)], make_task(3)).keep_largest_foreground


def test_no_region_may_fall():
    # label 1 gains from losing its islands, but they are right for the region of 1 and 2: just mislabelled
    reference, prediction = organ(islands={2: 3}), organ()
    prediction[reference != organ()] = 1
    regions = (Region(name="both", values=(1, 2)), Region(name="second", values=(2,)))
    cases = [(prediction, reference)]
    assert choose(cases, make_task(3)).keep_largest_foreground
    chosen = choose(cases, make_task(3, regions=regions, regions_order=(1, 2)))
    assert (chosen.keep_largest_foreground, chosen.keep_largest_labels) == (False, ())
    assert all("but both would fall: no." in sentence for sentence in chosen.evidence[:2])


def test_the_choice_is_that_of_trying_every_step_on_every_case():
    rng = np.random.default_rng(2)
    cases = []
    for _ in range(5):
        reference = organ(islands={2: int(rng.integers(0, 2))})
        prediction = reference.copy()
        noise = rng.random(SHAPE) < 0.02
        prediction[noise] = rng.integers(0, 3, int(noise.sum()))
        cases.append((prediction, reference))

    def mean_dice(labels: PostProcessing) -> list[float]:
        table = []
        for prediction, reference in cases:
            result = naive(prediction, labels)
            table.append(
                [
                    2 * ((result == i) & (reference == i)).sum() / ((result == i).sum() + (reference == i).sum())
                    for i in (1, 2)
                ]
            )
        return np.mean(table, axis=0).tolist()

    plain, whole = mean_dice(PostProcessing()), mean_dice(PostProcessing(keep_largest_foreground=True))
    expect_whole = np.mean(whole) > np.mean(plain) + 1e-4 and all(w >= p for w, p in zip(whole, plain, strict=True))
    base = whole if expect_whole else plain
    expected = []
    for label in (1, 2):
        tried = mean_dice(PostProcessing(keep_largest_foreground=expect_whole, keep_largest_labels=(label,)))
        if tried[label - 1] > base[label - 1] + 1e-4:
            expected.append(label)
    chosen = choose(iter(cases), make_task(3))
    assert chosen.keep_largest_foreground == expect_whole
    assert chosen.keep_largest_labels == tuple(expected)
    assert expected


def test_without_predictions_nothing_is_chosen_and_different_shapes_are_refused():
    chosen = choose([], make_task(2))
    assert (chosen.keep_largest_foreground, chosen.keep_largest_labels) == (False, ())
    assert len(chosen.evidence) == 1
    with pytest.raises(InputError, match="E0119"):
        choose([(organ(), organ()[1:])], make_task(3))
