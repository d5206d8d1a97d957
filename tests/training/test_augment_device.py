"""Augmentation on a GPU, without one: fake tensors refuse to mix devices and to wait for a value."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from tiny_models import blobs, store_case
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from medseg.training.augment import Box, Intensity, apply_intensity, apply_spatial
from medseg.training.batches import Sampling, make_batch
from medseg.training.warp import Elastic, Spatial

CUDA = torch.device("cuda", 0)
EVERYTHING = Intensity(
    0.1, ((0.9, 0.6, 0.7),) * 2, *[(value,) * 2 for value in (1.2, 0.8, 0.6, 1.4, 0.8)], noise_seed=3
)
SAMPLING = Sampling((6, 16, 12), 3, 1 / 3, (0, 1, 2), seed=7, flat=False, jitter=0.25, masked=(1,), elastic=0.5)


class FakeGenerator:
    """There is no generator of a device that is not there; randn with none is the same to a fake tensor."""

    devices: ClassVar[list[torch.device]] = []

    def __init__(self, device: torch.device) -> None:
        self.devices.append(torch.device(device))

    def manual_seed(self, seed: int) -> None:
        return None


def fake_grid_sample(values: Tensor, grid: Tensor, *, padding_mode: str, align_corners: bool) -> Tensor:
    """What fake tensors know of it asks the device for more than there is."""
    assert values.device == grid.device
    return values.new_empty((*values.shape[:2], *grid.shape[1:-1]))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(torch, "Generator", FakeGenerator)
    monkeypatch.setattr(torch.nn.functional, "grid_sample", fake_grid_sample)
    FakeGenerator.devices.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    found = []
    for index, shape in enumerate([(9, 24, 17), (12, 19, 22)]):
        image, labels = blobs(shape, index)
        found.append(store_case(folder, f"case_{index}", np.concatenate([image, image]), labels).load())
    return found


def test_fake_tensors_would_tell(fake):
    image = torch.empty((2, 3), device=CUDA)
    with pytest.raises(RuntimeError, match="same device"):
        image + torch.ones((2, 3))
    with pytest.raises(DataDependentOutputException):
        image.max().item()


@pytest.mark.parametrize("flat", [False, True])
def test_intensity_stays_on_the_device(fake, flat):
    image = torch.empty((2, 8, 20, 18), device=CUDA)
    changed = apply_intensity(image, replace(EVERYTHING, flat=flat))
    assert (changed.device, changed.shape) == (CUDA, image.shape)
    assert FakeGenerator.devices == [CUDA]


@pytest.mark.parametrize("elastic", [None, Elastic(0.05, 3)])
def test_the_spatial_map_stays_on_the_device(fake, elastic):
    image = torch.empty((2, 8, 20, 18), device=CUDA)
    labels = torch.empty((2, 8, 20, 18), device=CUDA, dtype=torch.int8)
    box = Box(image, labels, ((-1, 2), ()), (4.0, 9.0, 8.0))
    found, maps = apply_spatial(box, Spatial((0.3, 0.2, 0.1), 1.1, False, elastic), (5, 8, 6))
    assert (found.device, found.shape) == (CUDA, (2, 5, 8, 6))
    assert (maps.device, maps.shape, maps.dtype) == (CUDA, (2, 5, 8, 6), torch.int8)


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        replace(SAMPLING, patch=(3, 16, 12), swapped=(2, (0, 2, 1))),
        replace(SAMPLING, patch=(1, 16, 12), mirror_axes=(1, 2), flat=True),
    ],
)
def test_whole_batches_are_made_on_the_device_without_waiting_for_it(fake, cases, sampling):
    for step in range(12):
        batch = make_batch(cases, sampling, step, CUDA)
        assert (batch.image.device, batch.labels.device) == (CUDA, CUDA)
        assert batch.image.shape == (3, 2, *sampling.patch[sampling.flat :])
        assert batch.labels.shape == (3, *sampling.patch[sampling.flat :])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_a_cpu_gives_but_for_rounding_and_noise(cases, monkeypatch):
    from medseg.training import batches

    original = batches.apply_intensity
    monkeypatch.setattr(
        batches, "apply_intensity", lambda image, drawn: original(image, replace(drawn, noise_std=None))
    )
    for step in range(12):
        here, there = make_batch(cases, SAMPLING, step), make_batch(cases, SAMPLING, step, CUDA)
        torch.testing.assert_close(there.image.cpu(), here.image, rtol=1e-3, atol=1e-3)
        assert float((there.labels.cpu() != here.labels).float().mean()) < 0.01
