"""Foreground locations."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.preparation.foreground import ANNOTATED, sample_foreground, sample_size, split_foreground


@pytest.mark.parametrize(
    ("voxels", "samples"), [(0, 0), (1, 1), (9_999, 9_999), (10_000, 10_000), (10_001, 10_000), (1_000_001, 10_001)]
)
def test_ten_thousand_voxels_are_kept_or_one_per_cent(voxels, samples):
    assert sample_size(voxels) == samples


def labels_of(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.choice(np.array([0, 1, 2, 5], np.int16), (40, 50, 60), p=[0.4, 0.55, 0.03, 0.02])


def test_every_location_holds_its_class_and_none_comes_twice():
    labels = labels_of()
    counts, locations = sample_foreground(labels, "case")
    assert counts == {c: int((labels == c).sum()) for c in (1, 2, 5)}
    assert locations.dtype == np.int32
    by_class = split_foreground(counts, locations)
    for index, drawn in by_class.items():
        assert len(drawn) == min(10_000, counts[index])
        assert (np.diff(drawn) > 0).all()
        assert (labels.ravel()[drawn] == index).all()


def test_the_draw_is_even_over_the_volume():
    drawn = split_foreground(*sample_foreground(labels_of(), "case"))[1]
    z = np.unravel_index(drawn, (40, 50, 60))[0]
    assert abs(z.mean() - 19.5) < 0.5  # 4 standard errors


def test_the_draw_depends_on_case_and_class_alone():
    labels = labels_of()
    _, first = sample_foreground(labels, "a")
    np.testing.assert_array_equal(first, sample_foreground(labels.astype(np.int8), "a")[1])
    assert (first != sample_foreground(labels, "b")[1]).any()
    without = np.where(labels == 2, 0, labels).astype(np.int16)
    alone = split_foreground(*sample_foreground(without, "a"))
    np.testing.assert_array_equal(alone[1], split_foreground(*sample_foreground(labels, "a"))[1])


def test_annotated_voxels_are_drawn_only_where_some_are_ignored():
    labels = labels_of()
    labels[:20] = -1
    counts, locations = sample_foreground(labels, "case")
    assert list(counts) == [ANNOTATED, 1, 2, 5]
    assert counts[ANNOTATED] == 20 * 50 * 60
    assert (labels.ravel()[split_foreground(counts, locations)[ANNOTATED]] >= 0).all()
    assert ANNOTATED not in sample_foreground(labels_of(), "case")[0]


@pytest.mark.parametrize("fill", [0, -1])
def test_a_case_without_foreground_has_no_locations(fill):
    counts, locations = sample_foreground(np.full((2, 3, 4), fill, np.int16), "case")
    assert counts == {}
    assert locations.shape == (0,)
    assert split_foreground(counts, locations) == {}


def test_locations_that_do_not_fit_their_counts_are_noticed():
    with pytest.raises(ValueError, match="counts say 7"):
        split_foreground({1: 7}, np.zeros(6, np.int32))
