"""A GPU whose memory is too small for a training: it goes on with checkpointing, and the result is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import FLAT_KERNELS, make_configuration, make_task, store_blobs
from tiny_networks import planned

from medseg.networks.checkpointing import is_checkpointed
from medseg.networks.device import Device
from medseg.training import loop, recipe, step
from medseg.training.compiling import _Guarded
from medseg.training.cost import measure_step
from medseg.training.loop import build, train
from medseg.training.schedule import Length
from medseg.training.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGURATION = make_configuration((4, 8, 6), FLAT_KERNELS, momentum=0.9)
SETTINGS = Settings(make_task(), CONFIGURATION, Length(steps=5), Device(torch.device("cpu"), torch.float32, "test"), 3)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return store_blobs(tmp_path_factory.mktemp("store"), [(7, 12, 9), (6, 11, 13)])


class Full:
    """Gradients on a GPU whose memory does for the first steps only, unless the network is checkpointed."""

    def __init__(self, monkeypatch, fits: int = 0, *, hopeless: bool = False) -> None:
        self.original, self.fits, self.hopeless, self.failures = step.supervised_parts, fits, hopeless, 0
        self.network = None
        monkeypatch.setattr(step, "supervised_parts", self)
        original = step._backward

        def backward(network, *arguments):
            self.network = network
            return original(network, *arguments)

        monkeypatch.setattr(step, "_backward", backward)

    def __call__(self, outputs, *arguments, **options):
        """Called when the pass forward is done."""
        self.fits -= 1
        if self.fits < 0 and (self.hopeless or not is_checkpointed(self.network)):
            self.failures += 1
            outputs[0].sum().backward()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.original(outputs, *arguments, **options)


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replace(SETTINGS, device=Device(torch.device("cpu"), torch.float16, "test")),  # gradients are scaled
        replace(SETTINGS, configuration=make_configuration((6, 16, 24), planned("unet2015", 3))),  # with batch norm
    ],
    ids=["float32", "float16", "batch norm"],
)
def test_it_goes_on_with_checkpointing_and_ends_with_the_same_weights(settings, cases, tmp_path, monkeypatch, caplog):
    expected = train(cases, settings, tmp_path / "roomy")
    full = Full(monkeypatch, fits=2)
    found = train(cases, settings, tmp_path / "full")
    assert full.failures == 1
    assert is_checkpointed(found.network)
    assert not is_checkpointed(expected.network)
    pairs = zip(expected.network.state_dict().values(), found.network.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert sum("checkpointing" in record.getMessage() for record in caplog.records) == 1


def test_a_compiled_network_goes_on_too(cases, tmp_path, monkeypatch):
    expected = train(cases, SETTINGS, tmp_path / "roomy")
    calls = []

    def compiled(network, settings, say):
        return _Guarded(network, lambda x: calls.append(1) or network(x))

    monkeypatch.setattr(loop, "compiled", compiled)
    full = Full(monkeypatch, fits=2)
    found = train(cases, SETTINGS, tmp_path / "full")
    assert full.failures == 1
    assert len(calls) == SETTINGS.length.steps + 1
    pairs = zip(expected.network.state_dict().values(), found.network.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_memory_that_is_too_small_is_not_taken_for_a_fault_of_the_compiler():
    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = _Guarded(build(SETTINGS)[0], full)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            engine(torch.zeros(1, 1, 4, 8, 6))


def test_what_does_not_fit_all_the_same_is_an_error_after_one_more_try(cases, tmp_path, monkeypatch):
    full = Full(monkeypatch, hopeless=True)
    with pytest.raises(torch.OutOfMemoryError):
        train(cases, SETTINGS, tmp_path)
    assert full.failures == 2


def test_a_plan_with_checkpointing_is_not_tried_again(cases, tmp_path, monkeypatch):
    network = CONFIGURATION.network.model_copy(update={"checkpointing": True})
    settings = replace(SETTINGS, configuration=CONFIGURATION.model_copy(update={"network": network}))
    assert is_checkpointed(build(settings)[0])
    full = Full(monkeypatch, hopeless=True)
    with pytest.raises(torch.OutOfMemoryError):
        train(cases, settings, tmp_path)
    assert full.failures == 1


def test_measuring_a_step_for_a_time_budget_goes_on_too(cases, tmp_path, monkeypatch):
    full = Full(monkeypatch)
    settings, reason = recipe.settle(replace(SETTINGS, length=Length(seconds=5), recipe="fast"), cases, tmp_path)
    assert full.failures == 1
    assert "steps" in reason
    assert settings.configuration.network == CONFIGURATION.network


def test_what_a_step_costs_is_not_measured_with_other_memory_than_planned(monkeypatch):
    full = Full(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        measure_step(CONFIGURATION, SETTINGS.task, SETTINGS.device)
    assert full.failures == 1
