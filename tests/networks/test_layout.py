"""The choice of a memory layout: fixed on the CPU, tried on a GPU, where anything odd leaves contiguous."""

from __future__ import annotations

import pytest
import torch

from medseg.networks import layout as layouts
from medseg.networks.layout import fastest_layout, try_layout

CUDA = torch.device("cuda", 0)
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
GRADIENT = [torch.arange(8.0), torch.ones(3)]


def stand_in(last_s: float, change=lambda gradients: gradients):
    """Contiguous takes 1 s, channels last ``last_s`` and its gradients are changed."""
    tried = []

    def try_one(device, dtype, layout, size):
        tried.append((device, dtype, layout, size))
        return (GRADIENT, 1.0) if layout == torch.contiguous_format else (change(GRADIENT), last_s)

    return try_one, tried


@pytest.fixture(autouse=True)
def forgotten():
    fastest_layout.cache_clear()
    yield
    fastest_layout.cache_clear()


def test_the_cpu_has_channels_last_in_3d_and_contiguous_maps_in_2d(monkeypatch):
    monkeypatch.setattr(layouts, "try_layout", lambda *_: pytest.fail("nothing is to be tried"))
    cpu = torch.device("cpu")
    assert fastest_layout(cpu, torch.bfloat16, 3) == torch.channels_last_3d
    assert fastest_layout(cpu, torch.float32, 2) == torch.contiguous_format


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_faster_one_is_taken_and_tried_once(monkeypatch, dimensions):
    for last_s, expected in ((0.8, LAST[dimensions]), (1.2, torch.contiguous_format)):
        fastest_layout.cache_clear()
        try_one, tried = stand_in(last_s)
        monkeypatch.setattr(layouts, "try_layout", try_one)
        assert [fastest_layout(CUDA, torch.bfloat16, dimensions) for _ in range(3)] == [expected] * 3
        assert [one[2] for one in tried] == [torch.contiguous_format, LAST[dimensions]]
        assert all(len(one[3]) == dimensions + 2 for one in tried)


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_other_gradients_leave_contiguous(monkeypatch, wrong):
    try_one, _ = stand_in(0.1, lambda gradients: [gradients[0], wrong * gradients[1]])
    monkeypatch.setattr(layouts, "try_layout", try_one)
    assert fastest_layout(CUDA, torch.bfloat16, 3) == torch.contiguous_format


def test_what_does_not_run_leaves_contiguous(monkeypatch):
    def fails(device, dtype, layout, size):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(layouts, "try_layout", fails)
    assert fastest_layout(CUDA, torch.float32, 2) == torch.contiguous_format


@pytest.mark.parametrize("size", [(2, 4, 9, 8), (2, 4, 5, 6, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_tried_is_one_computation_in_both_layouts(size, dtype):
    dimensions, cpu = len(size) - 2, torch.device("cpu")
    first, first_s = try_layout(cpu, dtype, torch.contiguous_format, size)
    second, second_s = try_layout(cpu, dtype, LAST[dimensions], size)
    assert min(first_s, second_s) > 0
    for a, b in zip(first, second, strict=True):
        assert a.shape == (4, 4, *[3] * dimensions)
        assert float((a - b).norm() / a.norm()) < (1e-5 if dtype == torch.float32 else 0.03)
