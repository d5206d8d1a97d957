"""Compiling: only where it is wanted, right and faster; whatever goes wrong leaves the network and its weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import FLAT_KERNELS, TWO_D, make_configuration, make_task
from tiny_networks import planned
from torch import nn

from medseg.networks.build import build_network
from medseg.networks.device import Device, place
from medseg.training import compiling
from medseg.training.compiling import compiled
from medseg.training.schedule import Length
from medseg.training.settings import Settings

CPU = Device(torch.device("cpu"), torch.float32, "test")
HALF = Device(torch.device("cpu"), torch.bfloat16, "test")
GPU = Device(torch.device("cuda"), torch.bfloat16, "made up")
SETTINGS = Settings(make_task(), make_configuration((4, 8, 6), FLAT_KERNELS), Length(steps=9), CPU, compile="on")


def network(settings: Settings = SETTINGS) -> nn.Module:
    configuration = settings.configuration
    made = build_network(configuration.network, configuration.input_channels(settings.task), 3)
    return place(made, CPU, configuration.dimensions).train()


def wrapped(change=lambda levels: levels):
    """A stand-in for ``torch.compile``: calls the network and changes what it gives."""

    def compile_it(one: nn.Module, *, dynamic: bool) -> nn.Module:
        class Fast(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one = one

            def forward(self, x):
                return change(self.one(x))

        return Fast()

    return compile_it


@pytest.fixture
def faster(monkeypatch):
    """Every network is twice as fast as the one before."""
    real, seconds = compiling._gradients, [2.0]

    def timed(one, settings):
        seconds[0] /= 2
        return real(one, settings)[0], seconds[0]

    monkeypatch.setattr(compiling, "_gradients", timed)
    return seconds


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (replace(SETTINGS, compile="auto", length=Length(steps=10**6)), False),
        (replace(SETTINGS, compile="auto", device=GPU), False),
        (replace(SETTINGS, compile="auto", device=GPU, length=Length(seconds=600)), False),
        (replace(SETTINGS, compile="auto", device=GPU, length=Length(seconds=7200)), True),
        (replace(SETTINGS, compile="auto", device=GPU, length=Length(steps=250_000)), True),
        (replace(SETTINGS, compile="off", device=GPU, length=Length(steps=250_000)), False),
        (SETTINGS, True),
    ],
)
def test_it_is_wanted_where_asked_for_or_for_long_trainings_on_a_gpu(settings, wanted):
    assert compiling._wanted(settings) == wanted


def test_a_right_and_faster_one_is_taken_and_shares_the_weights(monkeypatch, faster):
    monkeypatch.setattr(torch, "compile", wrapped())
    said, one = [], network()
    engine = compiled(one, SETTINGS, said.append)
    assert engine is not one
    assert [id(p) for p in engine.parameters()] == [id(p) for p in one.parameters()]
    x = torch.randn(2, 1, 4, 8, 6)
    assert all(torch.equal(a, b) for a, b in zip(engine(x), one(x), strict=True))
    (line,) = said
    assert "2.00 times as fast" in line
    assert all(p.grad is None for p in one.parameters())


def test_a_slower_one_is_not_taken(monkeypatch, faster):
    monkeypatch.setattr(torch, "compile", wrapped())
    real = compiling._gradients
    monkeypatch.setattr(compiling, "_gradients", lambda one, settings: (real(one, settings)[0], 1 / faster[0]))
    one, said = network(), []
    assert compiled(one, SETTINGS, said.append) is one
    assert "0.50 times as fast" in said[0]


@pytest.mark.parametrize("factor", [1.2, float("nan")])
def test_a_wrong_one_is_not_taken(monkeypatch, faster, caplog, factor):
    monkeypatch.setattr(torch, "compile", wrapped(lambda levels: [factor * level for level in levels]))
    one = network()
    assert compiled(one, SETTINGS, lambda text: None) is one
    assert "gradients would differ" in caplog.text


def test_a_compiler_that_is_not_there_is_one_line(monkeypatch, caplog):
    def missing(one, *, dynamic):
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", missing)
    one = network()
    assert compiled(one, SETTINGS, lambda text: None) is one
    assert [r.getMessage() for r in caplog.records if r.name.startswith("medseg")] == [
        "the network is not compiled: RuntimeError: no C++ compiler"
    ]


def test_what_fails_later_goes_on_with_the_network(monkeypatch, faster, caplog):
    def until_larger(levels):
        if levels[0].shape[-1] > 6:
            raise RuntimeError("a new size")
        return levels

    monkeypatch.setattr(torch, "compile", wrapped(until_larger))
    one = network()
    engine = compiled(one, SETTINGS, lambda text: None)
    for size in (6, 12, 6):
        x = torch.randn(1, 1, 4, 8, size)
        assert all(torch.equal(a, b) for a, b in zip(engine(x), one(x), strict=True))
    assert caplog.text.count("going on without compiling") == 1


def test_statistics_of_batch_norms_are_those_before(monkeypatch, faster):
    monkeypatch.setattr(torch, "compile", wrapped())
    plan = planned("resnet18-unet", 2).model_copy(update={"norm": "batch"})
    settings = replace(SETTINGS, configuration=make_configuration((64, 64), plan))
    one = network(settings)
    before = {name: buffer.clone() for name, buffer in one.named_buffers()}
    assert any("running_mean" in name for name in before)
    compiled(one, settings, lambda text: None)
    assert all(torch.equal(buffer, before[name]) for name, buffer in one.named_buffers())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch about itself
@pytest.mark.parametrize("device", [CPU, HALF], ids=["float32", "bfloat16"])
def test_the_real_compiler_gives_the_networks_gradients(device):
    settings = replace(SETTINGS, configuration=make_configuration((16, 16), TWO_D), device=device)
    one = network(settings)
    expected, _ = compiling._gradients(one, settings)
    found, _ = compiling._gradients(torch.compile(one, dynamic=False), settings)
    assert float((found - expected).norm() / expected.norm()) < compiling.TOLERANCE[device.half]
