"""Ensemble: labels from the mean of several models' probabilities, class by class, so that two maps are in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.records.task import Task

Map = NDArray[np.float32]


def labels_of_maps(maps: Iterable[Map], task: Task) -> NDArray[np.int16]:
    """Class indices (Z, Y, X) from one map of probabilities per output of the task, in their order.

    Classes: the largest probability, the first of equals. Regions: those above 0.5 are painted one after the other in
    ``regions_order``, later over earlier. The same rules as ``medseg.inference.export.decide``.
    """
    labels: NDArray[np.int16] | None = None
    best: Map | None = None
    for output, probability in enumerate(maps):
        if labels is None:
            labels = np.zeros(probability.shape, np.int16)
        if task.regions:
            labels[probability > 0.5] = task.values.index(task.regions_order[output])
        elif best is None:
            best = probability.copy()
        else:
            higher = probability > best
            labels[higher] = output
            best[higher] = probability[higher]
    assert labels is not None
    return labels


def mean_map(maps: Sequence[NDArray[np.number]], scales: Sequence[float]) -> Map:
    """The sum (Z, Y, X) of maps, each times its scale."""
    total: Map = maps[0].astype(np.float32) * np.float32(scales[0])
    for values, scale in zip(maps[1:], scales[1:], strict=True):
        total += values.astype(np.float32) * np.float32(scale)
    return total


def labels_of_votes(votes: Sequence[NDArray[np.integer]]) -> NDArray[np.int16]:
    """The label that most of several label maps of one shape hold; of equals that of the map named first."""
    labels = votes[0].astype(np.int16)
    most = np.zeros(labels.shape, np.uint16)
    for vote in votes[::-1]:
        count = np.zeros(labels.shape, np.uint16)
        for other in votes:
            count += vote == other
        better = count >= most  # going backwards, so that the first of equals has the last word
        labels[better] = vote[better]
        most = np.maximum(most, count)
    return labels
