"""A GPU whose memory is too small for a training: it goes on with checkpointing, and the result is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import FLAT_KERNELS, make_configuration, make_task, store_blobs

from medseg.networks.checkpointing import is_checkpointed
from medseg.networks.device import Device
from medseg.training import loop, recipe
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
    """``take_step`` on a GPU whose memory does for the first steps only, unless the network is checkpointed."""

    def __init__(self, module, monkeypatch, fits: int = 0, *, hopeless: bool = False) -> None:
        self.original, self.fits, self.hopeless, self.failures = module.take_step, fits, hopeless, 0
        monkeypatch.setattr(module, "take_step", self)

    def __call__(self, network, *arguments):
        self.fits -= 1
        if self.fits < 0 and (self.hopeless or not is_checkpointed(network)):
            self.failures += 1
            network(arguments[1].image)[0].sum().backward()  # part of the step was done
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.original(network, *arguments)


def test_it_goes_on_with_checkpointing_and_ends_with_the_same_weights(cases, tmp_path, monkeypatch, caplog):
    expected = train(cases, SETTINGS, tmp_path / "roomy")
    full = Full(loop, monkeypatch, fits=2)
    found = train(cases, SETTINGS, tmp_path / "full")
    assert full.failures == 1
    assert is_checkpointed(found.network)
    assert not is_checkpointed(expected.network)
    pairs = zip(expected.network.state_dict().values(), found.network.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert sum("checkpointing" in record.getMessage() for record in caplog.records) == 1


def test_what_does_not_fit_all_the_same_is_an_error_after_one_more_try(cases, tmp_path, monkeypatch):
    full = Full(loop, monkeypatch, hopeless=True)
    with pytest.raises(torch.OutOfMemoryError):
        train(cases, SETTINGS, tmp_path)
    assert full.failures == 2


def test_a_plan_with_checkpointing_is_not_tried_again(cases, tmp_path, monkeypatch):
    network = CONFIGURATION.network.model_copy(update={"checkpointing": True})
    settings = replace(SETTINGS, configuration=CONFIGURATION.model_copy(update={"network": network}))
    assert is_checkpointed(build(settings)[0])
    full = Full(loop, monkeypatch, hopeless=True)
    with pytest.raises(torch.OutOfMemoryError):
        train(cases, settings, tmp_path)
    assert full.failures == 1


def test_measuring_a_step_for_a_time_budget_goes_on_too(cases, tmp_path, monkeypatch):
    full = Full(recipe, monkeypatch)
    settings, reason = recipe.settle(replace(SETTINGS, length=Length(seconds=5), recipe="fast"), cases, tmp_path)
    assert full.failures == 1
    assert "steps" in reason
    assert settings.configuration.network == CONFIGURATION.network
