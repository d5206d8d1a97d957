"""Members: several models on one case, their probabilities averaged and compared.

The maps of all classes of every model wait in temporary files, of one case at a time, so that neither memory nor disk
grows with the number of cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from medseg.evaluation.probabilities import slab_slices
from medseg.inference.ensemble import Map, mean_map
from medseg.inference.ladder import Ladder
from medseg.inference.maps import Maps, expected_dice
from medseg.inference.model import Model
from medseg.pipeline.predict_case import Job, ReadCase, read_case, segment_case
from medseg.pipeline.predict_settings import PredictOptions
from medseg.records.case import Case
from medseg.records.model import PostProcessing, Refinement
from medseg.records.task import Task

STEPS = int(np.iinfo(np.uint16).max)  # of a map of disagreement


def member_job(model: Model, options: PredictOptions, output: Path, refinement: Refinement | None = None) -> Job:
    """A job that gives the probabilities of one model; temporary files go to ``output``.

    Where uncertainty is wanted, a model of several networks also tells how far these lie apart.
    """
    mapped = replace(options, probabilities="uint16", uncertainty=options.uncertainty and len(model.networks) > 1)
    return Job(model, Ladder(model), PostProcessing(refinement=refinement), mapped, output)


@contextmanager
def opened_maps(case: Case, jobs: Mapping[str, Job]) -> Iterator[tuple[dict[str, Maps], ReadCase]]:
    """The probabilities of every job's model by name, and the case as it was read; the files go at the end.

    Raises:
        Whatever reading and segmenting raise.
    """
    found: dict[str, Maps] = {}
    try:
        last = None
        for name, job in jobs.items():
            read = read_case(case, job, None, alone=True)
            assert isinstance(read, ReadCase)  # nothing was there before
            maps = segment_case(read, job).maps
            assert maps is not None
            found[name], last = maps, read
        assert last is not None
        yield found, last
    finally:
        for maps in found.values():
            maps.close()


def mean_maps(maps: Sequence[Maps], weights: Sequence[float], task: Task) -> Iterator[Map]:
    """The mean of the models' maps, output by output."""
    for output in range(task.outputs):
        spools = [one.probabilities[output] for one in maps]
        scales = [weight / spool.largest for weight, spool in zip(weights, spools, strict=True)]
        yield mean_map([spool.array for spool in spools], scales)


def disagreement(
    maps: Sequence[Maps], weights: Sequence[float], networks: Sequence[int], task: Task
) -> NDArray[np.uint16]:
    """How far all networks of the models lie apart, (Z, Y, X) in ``STEPS`` steps: 0 all say the same, ``STEPS`` each is
    certain of something else.

    The Jensen-Shannon divergence of ``medseg.inference.passes.disagreement``: that between the models' means plus the
    weighted mean of those within the models, since the entropies of the means cancel.

    Args:
        maps: of every model; with ``uncertainty`` where it has several networks.
        weights: the models' shares, together 1.
        networks: of every model.
        task: its labels and regions.
    """
    shape = maps[0].probabilities[0].array.shape
    outcomes = 2 if task.regions else task.outputs
    result = np.empty(shape, np.uint16)
    largest = math.log(min(sum(networks), outcomes))
    slices = slab_slices(shape)
    for start in range(0, shape[0], slices):
        rows = slice(start, start + slices)
        apart = np.zeros((len(result[rows]), *shape[1:]), np.float32)
        for output in range(task.outputs):
            shares = [_share(one, output, rows) for one in maps]
            mean = mean_map(shares, weights)
            apart += _information(mean, task)
            for share, weight in zip(shares, weights, strict=True):
                apart -= weight * _information(share, task)
        for one, weight, count in zip(maps, weights, networks, strict=True):
            if one.uncertainty is not None:
                scale = weight * math.log(min(count, outcomes)) / one.uncertainty.largest
                apart += one.uncertainty.array[rows] * np.float32(scale)
        result[rows] = np.rint(np.clip(apart / largest, 0, 1) * STEPS)
    return result


def _share(maps: Maps, output: int, rows: slice) -> Map:
    spool = maps.probabilities[output]
    return spool.array[rows].astype(np.float32) / np.float32(spool.largest)


def _information(share: Map, task: Task) -> Map:
    """What an output adds to the entropy; of regions, the mean of what each region's two outcomes have."""
    own: Map = entr(share)
    if not task.regions:
        return own
    other: Map = entr(1 - share)
    return (own + other) / np.float32(task.outputs)


def quality(means: Iterator[Map], labels: NDArray[np.int16], task: Task) -> float | None:
    """``Maps.quality`` of averaged maps, given one output after the other; ``labels`` are before post-processing."""
    sums = np.zeros((3, task.outputs))
    for output, mean in enumerate(means):
        inside = mean > 0.5 if task.regions else labels == output
        sums[:, output] = mean.sum(dtype=np.float64), mean[inside].sum(dtype=np.float64), np.count_nonzero(inside)
    return expected_dice(sums, task)
