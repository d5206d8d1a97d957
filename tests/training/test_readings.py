"""Readings: numbers of steps arrive in order, none is lost, and a GPU is not made to wait for them."""

from __future__ import annotations

import pytest
import torch

from medseg.training.readings import Readings

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_numbers_on_a_cpu_are_there_at_once():
    readings: Readings[str] = Readings()
    assert readings.add("a", torch.tensor([1.5, float("inf")])) == [("a", [1.5, float("inf")])]
    assert readings.drain() == []


def test_numbers_are_those_of_their_time():
    readings: Readings[int] = Readings()
    readings.coming.append((0, torch.tensor([1.0]), Never()))  # on its way for as long as it may
    value = torch.tensor([2.0], requires_grad=True)
    assert readings.add(1, value) == []
    with torch.no_grad():
        value += 40
    assert readings.add(2, value) == [(0, [1.0]), (1, [2.0]), (2, [42.0])]


def test_what_is_on_its_way_is_waited_for_in_the_end():
    readings: Readings[int] = Readings()
    events = [Never(), Never()]
    readings.coming.extend((number, torch.tensor([float(number)]), event) for number, event in enumerate(events))
    assert readings.drain() == [(0, [0.0]), (1, [1.0])]
    assert [event.waited for event in events] == [1, 1]
    assert readings.drain() == []


class Never:
    """An event of a GPU that has not happened yet, and happens when it is waited for."""

    def __init__(self) -> None:
        self.waited = 0

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.waited += 1


@needs_gpu
def test_numbers_of_a_gpu_come_later_and_in_order():
    readings: Readings[int] = Readings()
    big = torch.randn(4096, 4096, device="cuda")
    arrived = []
    for number in range(10):
        big = (big @ big).tanh()
        arrived += readings.add(number, torch.stack([big.sum() * 0 + number, big.abs().max()]))
        assert len(readings.coming) <= readings.ahead
    arrived += readings.drain()
    assert [(number, values[0]) for number, values in arrived] == [(number, float(number)) for number in range(10)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_fused_optimiser_skips_a_step_that_its_device_finds_not_finite(device):
    """What the loop relies on where the numbers arrive after the update: neither weights nor momentum take it."""
    weights = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.SGD([weights], lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=True)
    weights.grad = torch.ones(3, device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    before, momentum = weights.detach().clone(), optimizer.state[weights]["momentum_buffer"].clone()
    assert not torch.equal(before, torch.ones(3, device=device))
    weights.grad = torch.tensor([1.0, float("nan"), 1.0], device=device)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    assert torch.equal(weights, before)
    assert torch.equal(optimizer.state[weights]["momentum_buffer"], momentum)
