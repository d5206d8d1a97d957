"""Maps of probabilities and uncertainty against interpolating everything; less GPU memory; what a case needs."""

from __future__ import annotations

import errno
import os

import nibabel as nib
import numpy as np
import pytest
import torch
from test_export import REGION_TASK, along
from tiny_models import FLAT_KERNELS, TWO_D, make_configuration, make_plan, make_preparation, make_task

from medseg.errors import EnvironmentFailure
from medseg.imaging.geometry import grid_from_nifti
from medseg.inference import accumulator, maps
from medseg.inference.export import labels_from_slabs
from medseg.inference.ladder import RUNGS, Ladder
from medseg.inference.maps import Maps, Wanted
from medseg.inference.model import Model
from medseg.inference.need import case_need
from medseg.inference.sliding import Blending, predict_logits
from medseg.networks.build import build_network
from medseg.networks.device import Device, place
from medseg.records.model import ModelCard
from medseg.records.plan import Resampling
from medseg.records.training import TrainingPlan

SMALL, LARGE = (4, 5, 6), (7, 11, 9)
AFFINE = np.array([[0, 0.8, 0, 3], [0, 0, 1.2, -4], [2, 0, 0, 5], [0, 0, 0, 1.0]])


def full_size(logits: np.ndarray) -> np.ndarray:
    for axis, size in enumerate(LARGE, start=1):
        logits = along(logits, axis, size, 1)
    return logits


def turned():
    """Axes permuted and flipped, and a margin that is cropped away."""
    preparation = make_preparation(SMALL, LARGE)
    return preparation.model_copy(
        update={
            "source_shape": (12, 10, 8),
            "to_canonical": (2, 0, 1),
            "flipped": (True, False, True),
            "uncropped_shape": (8, 12, 10),
            "crop_box": ((1, 8), (0, 11), (1, 10)),
        }
    )


def back(array: np.ndarray) -> np.ndarray:
    """From the cropped grid of ``turned`` to the source's axes, written out by hand."""
    whole = np.zeros((8, 12, 10), array.dtype)
    whole[1:8, 0:11, 1:10] = array
    return whole[::-1, :, ::-1].transpose(1, 2, 0)


def observed(tmp_path, task, logits, wanted, preparation):
    found = Maps(wanted, task, preparation, tmp_path)
    slabs = [torch.from_numpy(logits[:, z : z + 1]) for z in range(SMALL[0])]
    labels = labels_from_slabs(slabs, preparation, Resampling(), task, found.observe)
    return found, labels


@pytest.mark.parametrize("steps", ["uint8", "uint16"])
@pytest.mark.parametrize("at_most", [1, 10**9])
def test_probabilities_are_those_of_the_interpolated_logits_on_the_files_grid(monkeypatch, tmp_path, steps, at_most):
    monkeypatch.setattr(maps, "ROWS_BYTES", at_most)
    logits = np.random.default_rng(0).normal(size=(3, *SMALL)).astype(np.float32) * 3
    found, labels = observed(tmp_path, make_task(3), logits, Wanted(steps), turned())
    grid = grid_from_nifti(AFFINE, (8, 10, 12))
    written = found.write(tmp_path / "out", "a", grid)
    found.close()
    assert sorted(written) == [f"probabilities/a/label_{value}.nii.gz" for value in range(3)]
    shares = torch.softmax(torch.from_numpy(full_size(logits)), 0).numpy()
    largest = np.iinfo(steps).max
    for value, share in enumerate(shares):
        image = nib.load(tmp_path / "out" / f"probabilities/a/label_{value}.nii.gz")
        assert image.get_data_dtype() == steps
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
        expected = back(share)
        if value == 0:
            expected[back(np.ones(LARGE)) == 0] = 1
        np.testing.assert_allclose(image.get_fdata().T, expected, atol=0.51 / largest + 1e-6)
    assert labels.shape == LARGE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_quality_is_the_dice_expected_if_probabilities_are_right(tmp_path):
    logits = np.random.default_rng(1).normal(size=(3, *SMALL)).astype(np.float32) * 2
    found, labels = observed(tmp_path, make_task(3), logits, Wanted(uncertainty=True), make_preparation(SMALL, LARGE))
    shares = torch.softmax(torch.from_numpy(full_size(logits)).double(), 0).numpy()
    expected = np.mean([2 * shares[c][labels == c].sum() / ((labels == c).sum() + shares[c].sum()) for c in (1, 2)])
    assert found.quality() == pytest.approx(expected, rel=1e-5)
    found.close()


def test_certain_predictions_have_no_entropy_and_quality_1_and_empty_ones_none(tmp_path):
    logits = np.zeros((3, *SMALL), np.float32)
    logits[1], logits[0, :2] = 50, 100
    found, _ = observed(tmp_path, make_task(3), logits, Wanted(uncertainty=True), make_preparation(SMALL))
    assert found.quality() == pytest.approx(1)
    assert found.uncertainty.array.max() == 0
    found.close()
    logits[0] = 200
    found, _ = observed(tmp_path, make_task(3), logits, Wanted(uncertainty=True), make_preparation(SMALL))
    assert found.quality() is None
    found.close()


def test_uncertainty_is_the_entropy_or_the_disagreement_that_comes_with_the_logits(tmp_path):
    logits = np.random.default_rng(2).normal(size=(3, *SMALL)).astype(np.float32)
    preparation = make_preparation(SMALL, LARGE)
    found, _ = observed(tmp_path, make_task(3), logits, Wanted(uncertainty=True), preparation)
    shares = torch.softmax(torch.from_numpy(full_size(logits)), 0).numpy()
    entropy = -(shares * np.log(shares)).sum(0) / np.log(3)
    np.testing.assert_allclose(found.uncertainty.array / 65535, entropy, atol=2e-5)
    found.close()
    apart = np.random.default_rng(3).uniform(size=(1, *SMALL)).astype(np.float32)
    found, labels = observed(tmp_path, make_task(3), np.concatenate((logits, apart)), Wanted(None, True), preparation)
    np.testing.assert_allclose(found.uncertainty.array / 65535, full_size(apart)[0], atol=2e-5)
    assert np.array_equal(labels, full_size(logits).argmax(0))
    found.close()


def test_regions_have_probabilities_of_their_own(tmp_path):
    logits = np.random.default_rng(4).normal(size=(3, *SMALL)).astype(np.float32)
    wanted = Wanted("uint16", True)
    found, _ = observed(tmp_path, REGION_TASK, logits, wanted, make_preparation(SMALL, LARGE))
    grid = grid_from_nifti(AFFINE, LARGE[::-1])
    assert list(found.write(tmp_path, "a", grid)) == [
        *(f"probabilities/a/region_{n}.nii.gz" for n in (1, 2, 3)), "uncertainty/a.nii.gz",
    ]  # fmt: skip
    expected = torch.sigmoid(torch.from_numpy(full_size(logits)))
    image = nib.load(tmp_path / "probabilities/a/region_2.nii.gz")
    np.testing.assert_allclose(image.get_fdata().T, expected[1], atol=2e-5)
    assert 0 < found.quality() < 1
    found.close()


def test_a_disk_without_room_for_the_maps_is_told_before_any_of_them_is_written(tmp_path, monkeypatch):
    asked = []

    def full(descriptor, start, size):
        asked.append(size)
        if len(asked) == 2:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(np, "memmap", lambda path, kind, mode, shape: np.zeros(shape, kind))
    with pytest.raises(EnvironmentFailure, match="E0502"):
        Maps(Wanted("uint8"), make_task(3), make_preparation(SMALL, LARGE), tmp_path)
    assert list(tmp_path.iterdir()) == []


CPU = Device(torch.device("cpu"), torch.float32, "test")


def model_of(configuration, outputs: int = 3, networks: int = 1, **changes) -> Model:
    plan = make_plan(configuration, make_task(outputs))
    card = ModelCard(
        configuration=configuration.name,
        fold="0",
        plan=plan,
        weights_sha256="0",
        medseg_version="0",
        torch_version="0",
        settings_sha256="0",
        batch_size=2,
        training=TrainingPlan(),
        steps=1,
    )
    made = [build_network(configuration.network, 1, outputs, seed) for seed in range(networks)]
    placed = tuple(place(network, CPU, configuration.dimensions).eval() for network in made)
    return Model(None, (card,) * networks, placed, **({"device": CPU} | changes))


def test_when_the_gpu_has_too_little_memory_each_rung_asks_for_less_and_the_next_case_starts_there():
    """A device that is called a GPU and runs out of memory until everything is on the CPU."""
    gpu = Device(torch.device("cuda"), torch.bfloat16, "made up")
    ladder = Ladder(model_of(make_configuration((4, 8, 6), FLAT_KERNELS), device=gpu))
    asked = []

    def work(model, blending):
        asked.append((model.device.torch_device.type, blending.together, blending.on_device, blending.step))
        if model.device.torch_device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert ladder.run(work, Blending(0.7)) == "done"
    assert asked == [("cuda", None, True, 0.7), ("cuda", 1, True, 0.7), ("cuda", 1, False, 0.7), ("cpu", 1, False, 0.7)]
    assert len(asked) == len(RUNGS)
    assert ladder.run(work, Blending()) == "done"
    assert len(asked) == len(RUNGS) + 1
    assert ladder.model.device.dtype == torch.float32
    image = np.random.default_rng(0).normal(size=(1, 5, 9, 7)).astype(np.float32)
    configuration = ladder.model.configuration
    assert predict_logits(ladder.model.networks, image, configuration, ladder.model.device).isfinite().all()


def test_without_a_gpu_there_is_nothing_to_step_down_to():
    ladder = Ladder(model_of(make_configuration((4, 8, 6), FLAT_KERNELS)))

    def work(model, blending):
        raise torch.OutOfMemoryError("no")

    with pytest.raises(torch.OutOfMemoryError):
        ladder.run(work, Blending())


@pytest.mark.parametrize("flat", [False, True])
def test_the_need_of_a_case_counts_tiles_views_and_networks(flat):
    configuration = make_configuration((8, 6), TWO_D) if flat else make_configuration((4, 8, 6), FLAT_KERNELS)
    configuration = configuration.model_copy(update={"training": TrainingPlan(mirror_axes=(0, 1))})
    model, spacing = model_of(configuration, networks=2), (2.0, 1.0, 0.8)
    plain = case_need(model, (8, 8, 12), spacing, 0.5, mirror=False, mapped=False)
    assert plain.tiles == (8 if flat else 3) * 3
    assert plain.passes == plain.tiles * 2
    assert case_need(model, (8, 8, 12), spacing, 0.5, mirror=True, mapped=False).passes == plain.tiles * 2 * 4
    assert case_need(model, (8, 8, 12), spacing, 1.0, mirror=False, mapped=False).tiles < plain.tiles
    assert case_need(model, (80, 80, 120), spacing, 0.5, mirror=False, mapped=False).alone_bytes > plain.alone_bytes
    assert plain.alone_bytes < plain.together_bytes
    assert case_need(model, (8, 8, 12), spacing, 0.5, mirror=False, mapped=True).segment_bytes > plain.segment_bytes


def test_the_need_grows_with_features_not_classes_where_features_are_blended(monkeypatch):
    monkeypatch.setattr(accumulator, "SLAB_BYTES", 1)
    configuration = make_configuration((4, 8, 6), FLAT_KERNELS)
    sizes = [
        case_need(
            model_of(configuration, outputs), (4, 800, 900), (2.0, 1.0, 0.8), 0.5, mirror=False, mapped=False
        ).segment_bytes
        for outputs in (5, 40)
    ]
    assert sizes[1] < 8 * sizes[0]
