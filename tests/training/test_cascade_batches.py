"""Batches with labels of a previous stage, and with sides that change places."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import FLAT_KERNELS, make_configuration, make_task, store_case

from medseg.artefacts import commit
from medseg.errors import IntegrityError
from medseg.preparation.arrays import checks_of, encode_array
from medseg.preparation.store import PreviousLabels
from medseg.records.training import Laterality
from medseg.training import batches
from medseg.training.augment import Augmentation, Intensity
from medseg.training.batches import Sampling, make_batch
from medseg.training.disturb import Disturbance, Morphology
from medseg.training.warp import Spatial

PATCH = (4, 8, 6)
SHAPE = (6, 13, 11)
NOTHING = Augmentation(None, Intensity(None, *[(None,)] * 6, noise_seed=0), ())
SAMPLING = Sampling(PATCH, 2, 0.5, (0, 1, 2), seed=7, flat=False, previous_classes=4)


@pytest.fixture
def pair(tmp_path):
    """A case and the labels of its previous stage: every voxel's image value is a code of both."""
    rng = np.random.default_rng(3)
    labels, before = rng.integers(-1, 4, SHAPE).astype(np.int16), rng.integers(0, 4, SHAPE).astype(np.int8)
    image = (10 * (labels + 1) + before).astype(np.float32)[None]
    case = store_case(tmp_path, "case", image, labels)
    path = tmp_path / "before.b2nd"
    content = encode_array(before)
    commit(path, content)
    return case.after(PreviousLabels(path, "weights", checks_of(content)))


def unchanged(monkeypatch, drawn=NOTHING, errors=None):
    monkeypatch.setattr(batches, "draw", lambda *arguments: drawn)
    monkeypatch.setattr(batches, "draw_disturbance", lambda *arguments: errors or Disturbance())


def decoded(batch):
    """Labels and previous labels as the image tells them, where the patch is not padded."""
    code = batch.image[:, 0].round().long()
    return code // 10 - 1, code % 10


def test_previous_labels_are_appended_as_one_channel_per_class(pair, monkeypatch):
    unchanged(monkeypatch)
    batch = make_batch([pair.load()], SAMPLING, 0)
    labels, before = decoded(batch)
    assert batch.image.shape == (2, 1 + 3, *PATCH)
    assert torch.equal(batch.labels, labels)
    for label in (1, 2, 3):
        assert torch.equal(batch.image[:, label], (before == label).float())


def test_cases_on_disk_and_in_memory_give_the_same_batches(pair):
    for step in range(4):
        on_disk, loaded = (make_batch([case], SAMPLING, step) for case in (pair, pair.load()))
        assert torch.equal(on_disk.image, loaded.image)
        assert torch.equal(on_disk.labels, loaded.labels)


def test_both_label_maps_follow_flips_and_sides_change_their_names(pair, monkeypatch):
    unchanged(monkeypatch, replace(NOTHING, flips=(0, 2)))
    sampling = replace(SAMPLING, swapped=(2, (0, 2, 1, 3)))
    batch = make_batch([pair], sampling, 0)
    labels, before = decoded(batch)
    order = torch.tensor([0, 2, 1, 3, -1])  # the last for the ignored ones
    assert torch.equal(batch.labels, order[labels])
    for label in (1, 2, 3):
        assert torch.equal(batch.image[:, label], (order[before] == label).float())


def test_mirroring_another_axis_leaves_the_names(pair, monkeypatch):
    unchanged(monkeypatch, replace(NOTHING, flips=(0,)))
    batch = make_batch([pair], replace(SAMPLING, swapped=(2, (0, 2, 1, 3))), 0)
    assert torch.equal(batch.labels, decoded(batch)[0])


def test_a_quarter_turn_takes_both_label_maps_with_it(pair, monkeypatch):
    unchanged(monkeypatch, replace(NOTHING, spatial=Spatial((np.pi / 2, 0, 0), 1.0, True)))
    square = replace(SAMPLING, patch=(4, 7, 7))
    batch = make_batch([pair], square, 1)
    labels, before = decoded(batch)
    known = batch.image[:, 0] > 0.5  # not beyond the volume
    assert float((batch.labels == labels)[known].float().mean()) > 0.99
    for label in (1, 2, 3):
        assert float((batch.image[:, label] == (before == label))[known].float().mean()) > 0.99


def test_errors_change_the_previous_labels_only(pair, monkeypatch):
    unchanged(monkeypatch, errors=Disturbance((Morphology(2, "dilate", 1.5),)))
    batch = make_batch([pair], SAMPLING, 0)
    labels, before = decoded(batch)
    assert torch.equal(batch.labels, labels)
    assert float(batch.image[:, 2].sum()) > float((before == 2).sum())
    assert float(batch.image[:, 1:].sum(1).max()) == 1.0


def test_a_plan_with_sides_and_stages_becomes_a_sampling():
    sides = Laterality(axis=2, pairs=((1, 3),))
    configuration = make_configuration(PATCH, FLAT_KERNELS, mirror_axes=(0, 2), laterality=sides)
    second = configuration.model_copy(update={"previous_stage": "3d_lowres"})
    sampling = Sampling.of(second, make_task(4), 0)
    assert sampling.swapped == (2, (0, 3, 2, 1))
    assert sampling.previous_classes == 4


def test_the_weights_of_the_first_stage_are_part_of_what_a_training_depends_on(pair):
    other = pair.after(PreviousLabels(pair._previous.path, "other weights", pair._previous.checks))
    assert pair.provenance != other.provenance
    assert pair.nbytes == other.nbytes == np.prod(SHAPE) * (4 + 1 + 1)


def test_a_flipped_bit_in_previous_labels_is_noticed_when_they_are_read(pair):
    path = pair._previous.path
    content = bytearray(path.read_bytes())
    content[pair._previous.checks.header_bytes + 40] ^= 2
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"E0701. case=case: .*chunk 0 of 1"):
        pair.previous[:]
