"""Windows: where tiles lie, against the rule written out, and how their voxels count, against scipy's filter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from medseg.inference.windows import importance, window_starts, windows


def starts_by_the_rule(size: int, tile: int, step: float) -> list[int]:
    """nnU-Net's: as many tiles as the step needs, spread evenly between both ends."""
    count = int(np.ceil((size - tile) / (tile * step))) + 1
    return [int(start) for start in np.round(np.linspace(0, size - tile, count))] if count > 1 else [0]


def test_tiles_lie_where_nnunet_puts_them():
    assert window_starts(110, 64, 0.5) == [0, 23, 46]
    for tile in (2, 5, 16, 33):
        for size in range(tile, 5 * tile):
            for step in (0.5, 0.75, 1.0):
                assert window_starts(size, tile, step) == starts_by_the_rule(size, tile, step), (size, tile, step)


@given(st.integers(1, 40), st.integers(0, 200), st.floats(0.05, 1))
def test_tiles_cover_everything_and_are_flush_with_both_ends(tile, more, step):
    starts = window_starts(tile + more, tile, step)
    assert starts[0] == 0
    assert starts[-1] == more
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    assert (gaps <= max(1.0, tile * step) + 1).all()
    assert (gaps <= tile).all()


def test_tiles_of_one_slice_come_once_each():
    assert window_starts(7, 1, 0.5) == list(range(7))


def test_a_volume_as_large_as_its_tile_has_one_window():
    assert windows((5, 8, 6), (5, 8, 6)) == [(0, 0, 0)]


def test_windows_are_all_combinations_of_the_starts_of_the_axes():
    found = windows((5, 12, 6), (4, 8, 6))
    assert found == [(0, 0, 0), (0, 4, 0), (1, 0, 0), (1, 4, 0)]


@pytest.mark.parametrize("tile", [(5, 8, 6), (1, 12, 9), (16, 40, 24), (40, 56, 40)])
def test_weights_are_those_of_nnunet(tile):
    impulse = np.zeros(tile)
    impulse[tuple(n // 2 for n in tile)] = 1
    blurred = ndimage.gaussian_filter(impulse, [n / 8 for n in tile], mode="constant")
    half = (10 * blurred / blurred.max()).astype(np.float16)
    half[half == 0] = half[half > 0].min()
    assert np.array_equal(importance(tile), half.astype(np.float32))


@pytest.mark.parametrize("tile", [(1, 1, 1), (3, 2, 4), (128, 96, 160), (320, 256, 4)])
def test_weights_are_never_zero_and_fall_from_the_middle(tile):
    weights = importance(tile)
    assert (weights.shape, weights.dtype) == (tile, np.float32)
    assert weights.min() > 0
    assert weights[tuple(n // 2 for n in tile)] == weights.max() == 10
    for axis, size in enumerate(tile):
        along = weights[tuple(slice(None) if a == axis else n // 2 for a, n in enumerate(tile))]
        assert (np.diff(along[: size // 2 + 1]) >= 0).all()
        assert (np.diff(along[size // 2 :]) <= 0).all()


def test_weights_are_shared_and_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        importance((3, 5, 4))[0, 0, 0] = 2
