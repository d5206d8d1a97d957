"""Vote: the label of each output voxel when every label's indicator is interpolated linearly and the highest wins.

This is how nnU-Net 2.8.1 resamples segmentations (batchgenerators 0.25.5, ``_resample_seg_by_argmax`` with ties to
the nearest neighbour). Where all input voxels around an output voxel carry one label it wins with any weights, and
that is nearly everywhere; only the others are computed, so that the cost hardly depends on the number of labels and
no volume of scores ever exists.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.axes import Neighbours, linear_neighbours, nearest_indices
from medseg.records.grid import Int3

Label = TypeVar("Label", bound=np.integer[Any])
Floats = NDArray[np.float64]
Places = NDArray[np.intp]


def vote(labels: NDArray[Label], shape: Int3) -> NDArray[Label]:
    """Resample a label map by linear interpolation of each label's indicator and the highest score.

    Equal scores go to the nearest neighbour if its label is among them, else to the lowest label. Scores are float64
    and computed in scipy's order of operations, so that what is equal there is equal here.

    Args:
        labels: (Z, Y, X) integers; every value is a label, negative ones too.
        shape: target (z, y, x).

    Returns:
        A new array of ``shape`` and the type of ``labels``.
    """
    result = np.empty(shape, dtype=labels.dtype)
    z, y, x = (linear_neighbours(n, m) for n, m in zip(labels.shape, shape, strict=True))
    for source, places in groupby(range(shape[0]), nearest_indices(labels.shape[0], shape[0]).__getitem__):
        plane = np.take(labels[source], nearest_indices(labels.shape[1], shape[1]), axis=0)
        plane = np.take(plane, nearest_indices(labels.shape[2], shape[2]), axis=1)
        for place in places:
            result[place] = plane
    border = _Border(labels)
    for (lower, upper), places in groupby(range(shape[0]), lambda place: (int(z.lower[place]), int(z.upper[place]))):
        contested = np.flatnonzero(np.take(np.take(border.between(lower, upper), y.lower, axis=0), x.lower, axis=1))
        if not contested.size:
            continue
        corners, weights = _corners(labels[lower], labels[upper] if upper > lower else None, contested, y, x)
        for place in places:
            plane = result[place].reshape(-1)
            along_z = (z.lower_weight[place], z.upper_weight[place])
            scaled = [(along_z[i // 4] * in_y) * in_x for i, (in_y, in_x) in enumerate(weights)]
            plane[contested] = _winners(corners, scaled, plane[contested])
    return result


class _Border:
    """Where labels meet: of each slice, computed once, since slices are asked for in ascending order."""

    def __init__(self, labels: NDArray[Label]) -> None:
        self._labels = labels
        self._known: dict[int, NDArray[np.bool_]] = {}

    def between(self, lower: int, upper: int) -> NDArray[np.bool_]:
        """(Y, X): whether voxel (y, x), its next ones along y and x, and the same of slice ``upper`` differ."""
        self._known = {z: self._known[z] if z in self._known else _mixed(self._labels[z]) for z in {lower, upper}}
        if lower == upper:
            return self._known[lower]
        mixed: NDArray[np.bool_] = self._labels[lower] != self._labels[upper]
        mixed |= self._known[lower]
        mixed |= self._known[upper]
        return mixed


def _mixed(plane: NDArray[Label]) -> NDArray[np.bool_]:
    """Whether voxel (y, x) and the next ones, (y, x + 1), (y + 1, x) and (y + 1, x + 1), do not all agree."""
    along_x = plane[:, :-1] != plane[:, 1:]
    mixed = np.zeros(plane.shape, dtype=np.bool_)
    mixed[:, :-1] = along_x
    mixed[:-1, :-1] |= along_x[1:]
    mixed[:-1] |= plane[:-1] != plane[1:]
    return mixed


def _corners(
    lower: NDArray[Label], upper: NDArray[Label] | None, at: Places, y: Neighbours, x: Neighbours
) -> tuple[list[NDArray[Label]], list[tuple[Floats, Floats]]]:
    """The labels around each of the output places ``at`` (flat indices of a slice) and their weights in y and x.

    Four of one slice, or four of each of two; slowest axis first, the order in which scipy adds them up.
    """
    rows, columns = np.divmod(at, len(x.lower))
    ys = [
        (y.lower[rows] * lower.shape[1], y.lower_weight[rows]),
        (y.upper[rows] * lower.shape[1], y.upper_weight[rows]),
    ]
    xs = [(x.lower[columns], x.lower_weight[columns]), (x.upper[columns], x.upper_weight[columns])]
    in_plane = [(row + column, (in_y, in_x)) for row, in_y in ys for column, in_x in xs]
    planes = [lower] if upper is None else [lower, upper]
    corners = [np.take(plane, place) for plane in planes for place, _ in in_plane]
    return corners, [weights for _ in planes for _, weights in in_plane]


def _winners(corners: list[NDArray[Label]], weights: list[Floats], nearest: NDArray[Label]) -> NDArray[Label]:
    """The label with the highest score at each place; (n,) arrays."""
    low, high = corners[0], corners[0]
    for corner in corners[1:]:
        low, high = np.minimum(low, corner), np.maximum(high, corner)
    low_score, high_score = _score(low, corners, weights), _score(high, corners, weights)
    winners = np.where(low_score > high_score, low, np.where(high_score > low_score, high, nearest))
    several = np.zeros(low.shape, dtype=np.bool_)
    for corner in corners:
        several |= (corner != low) & (corner != high)
    some = np.flatnonzero(several)
    if some.size:
        winners[some] = _winners_of_many([c[some] for c in corners], [w[some] for w in weights], nearest[some])
    return winners


def _winners_of_many(corners: list[NDArray[Label]], weights: list[Floats], nearest: NDArray[Label]) -> NDArray[Label]:
    """The same where more than two labels meet."""
    scores = [_score(corner, corners, weights) for corner in corners]
    best = np.max(scores, axis=0)
    winners = np.full(nearest.shape, np.iinfo(nearest.dtype).max, dtype=nearest.dtype)
    for corner, score in zip(corners, scores, strict=True):
        np.minimum(winners, corner, out=winners, where=score == best)
    return np.where(_score(nearest, corners, weights) == best, nearest, winners)


def _score(label: NDArray[Label], corners: list[NDArray[Label]], weights: list[Floats]) -> Floats:
    """The sum of the weights of the corners that carry ``label``, place by place, in order."""
    score = np.zeros(label.shape)
    for corner, weight in zip(corners, weights, strict=True):
        score += np.where(corner == label, weight, 0)
    return score
