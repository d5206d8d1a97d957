"""Patches chosen by component: small lesions are seen as often as large ones."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage, stats
from tiny_models import TWO_D, make_configuration, make_task, store_case

from medseg.preparation import store
from medseg.preparation.foreground import LEAST_SAMPLES, locate_components, sample_size
from medseg.training import batches
from medseg.training.augment import Augmentation, Intensity
from medseg.training.batches import Sampling, make_batch

PATCH = (4, 8, 6)
SAMPLING = Sampling(PATCH, 4, 1.0, (), seed=3, flat=False, foreground_by="component")
NOTHING = Augmentation(None, Intensity(None, *[(None,)] * 6, noise_seed=0), ())
FULL = np.ones((3, 3, 3))


def lesions() -> np.ndarray:
    """One of 2000 voxels and five of one to three, further from each other than a patch is wide."""
    labels = np.zeros((16, 60, 50), np.int16)
    labels[2:12, 5:25, 4:14] = 1
    labels[14, 55, 45] = labels[1, 40, 40] = labels[7, 50, 10] = 1
    labels[14, 35, 25:28] = 1
    labels[4, 10, 40] = labels[5, 11, 41] = 1  # joined by a corner
    return labels


def random_labels(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(9, 21, 17)), 1.2)
    return np.digitize(smooth, [0.1, 0.25]).astype(np.int16)


@pytest.mark.parametrize("labels", [lesions(), random_labels(0), random_labels(1) - 1])
def test_components_are_those_of_scipy(labels):
    found = locate_components(labels, "case")
    assert sorted(found) == [c for c in np.unique(labels) if c > 0]
    for index, one in found.items():
        numbers, count = ndimage.label(labels == index, structure=FULL)
        pieces = np.split(one.locations, one.ends[:-1])
        assert len(pieces) == count
        expected = {tuple(np.flatnonzero(numbers == number)) for number in range(1, count + 1)}
        assert {tuple(sorted(piece)) for piece in pieces} == expected


def test_of_a_large_component_as_many_places_are_kept_as_of_a_class():
    labels = np.zeros((30, 50, 40), np.int8)
    labels[1:29, 1:40] = 2
    labels[5, 45, 3] = 2
    one = locate_components(labels, "case")[2]
    counts = np.diff(one.ends, prepend=0)
    assert sorted(counts) == [1, sample_size(28 * 39 * 40)]
    assert len(one.locations) == LEAST_SAMPLES + 1
    assert len(np.unique(one.locations)) == len(one.locations)
    assert (labels.ravel()[one.locations] == 2).all()
    again = locate_components(labels, "case")[2]
    assert np.array_equal(one.locations, again.locations)


@pytest.mark.parametrize("labels", [np.zeros((3, 4, 5), np.int8), np.full((1, 1, 1), -1, np.int16)])
def test_no_foreground_has_no_components(labels):
    assert locate_components(labels, "case") == {}


def held(tmp_path, monkeypatch, sampling: Sampling) -> Counter[int]:
    """How often each lesion of the phantom lies in a forced patch of 100 batches."""
    monkeypatch.setattr(batches, "draw", lambda *arguments: NOTHING)
    labels = lesions()
    numbers, _ = ndimage.label(labels, structure=FULL)
    case = store_case(tmp_path, "lesions", numbers[None].astype(np.float32), labels).load()
    seen: Counter[int] = Counter()
    for step in range(100):
        for image in make_batch([case], sampling, step).image.numpy():
            seen.update(int(number) for number in np.unique(image) if number)
    return seen


def test_tiny_lesions_are_seen_as_often_as_a_large_one(tmp_path, monkeypatch):
    seen = held(tmp_path, monkeypatch, SAMPLING)
    assert sum(seen.values()) == 400  # a patch holds one of them
    assert len(seen) == 6
    assert stats.chisquare(list(seen.values())).pvalue > 1e-4


def test_by_voxel_they_are_hardly_seen(tmp_path, monkeypatch):
    seen = held(tmp_path, monkeypatch, replace(SAMPLING, foreground_by="voxel"))
    assert seen.most_common(1)[0][1] > 390


def test_cases_on_disk_and_in_memory_give_the_same_patches(tmp_path):
    on_disk = store_case(tmp_path, "lesions", lesions()[None].astype(np.float32), lesions())
    loaded = on_disk.load()
    for step in range(6):
        assert np.array_equal(make_batch([on_disk], SAMPLING, step).labels, make_batch([loaded], SAMPLING, step).labels)


def test_components_are_found_once_and_only_when_they_are_asked_for(tmp_path, monkeypatch):
    calls = []
    original = store.locate_components
    monkeypatch.setattr(
        store, "locate_components", lambda *args: calls.append(threading.get_ident()) or original(*args)
    )
    case = store_case(tmp_path, "lesions", lesions()[None].astype(np.float32), lesions()).load()
    make_batch([case], replace(SAMPLING, foreground_by="voxel"), 0)
    assert not calls
    for step in range(3):
        make_batch([case], SAMPLING, step)
    assert len(calls) == 1


def test_a_plan_may_ask_for_it():
    training = {"foreground_by": "component", "elastic": 0.25}
    sampling = Sampling.of(make_configuration((8, 6), TWO_D, **training), make_task(2), 3)
    assert (sampling.foreground_by, sampling.elastic) == ("component", 0.25)
