"""Training in float16: losses are scaled, a gradient that overflows costs its step and halves the scale."""

from __future__ import annotations

import signal
from dataclasses import replace
from itertools import count

import pytest
import torch
from tiny_models import FLAT_KERNELS, make_configuration, make_task, store_blobs

from medseg.errors import NonFiniteError, Stopped
from medseg.networks.device import Device
from medseg.training import loop
from medseg.training.batches import Sampling, stream
from medseg.training.checkpoint import newest_checkpoint
from medseg.training.journal import NAME, read_journal
from medseg.training.loop import Hooks, build, train
from medseg.training.schedule import Length
from medseg.training.settings import Settings
from medseg.training.step import build_scaler, take_step

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = Device(torch.device("cpu"), torch.float32, "test")
FLOAT16 = Device(torch.device("cpu"), torch.float16, "test")
CONFIGURATION = make_configuration((4, 8, 6), FLAT_KERNELS, momentum=0.9)
SETTINGS = Settings(make_task(), CONFIGURATION, Length(steps=6), FLOAT16, seed=3)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return store_blobs(tmp_path_factory.mktemp("store"), [(7, 12, 9), (6, 11, 13)])


@pytest.fixture
def batch(cases):
    batches = stream(cases, Sampling.of(CONFIGURATION, make_task(), 0), 0)
    yield next(batches)
    batches.close()


def scaler_from(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


def flat(network) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def losses(folder) -> list[float]:
    return [line.loss for line in read_journal(folder / NAME)[0]]


def test_only_float16_is_scaled():
    assert build_scaler(FLOAT16).is_enabled()
    assert not build_scaler(FLOAT32).is_enabled()
    assert not build_scaler(replace(FLOAT16, dtype=torch.bfloat16)).is_enabled()


def test_a_step_is_that_of_float32_but_for_rounding_whatever_the_scale(batch):
    reference, optimizer = build(replace(SETTINGS, device=FLOAT32))
    before = flat(reference)
    exact = take_step(reference, optimizer, batch, 0.01, replace(SETTINGS, device=FLOAT32), None)
    update = flat(reference) - before
    for scale in (1.0, 1024.0, 65536.0):
        network, optimizer = build(SETTINGS)
        taken = take_step(network, optimizer, batch, 0.01, SETTINGS, None, scaler=scaler_from(scale))
        assert float(taken.numbers[0]) == pytest.approx(float(exact.numbers[0]), rel=2e-3)  # the loss is told unscaled
        assert float(taken.numbers[1]) == pytest.approx(float(exact.numbers[1]), rel=1e-2)  # and so is the gradient
        assert float(taken.numbers[2]) == scale
        assert float((flat(network) - before - update).norm() / update.norm()) < 0.02


def test_gradients_that_overflow_change_nothing_and_halve_the_scale_until_they_fit(batch):
    network, optimizer = build(SETTINGS)
    scaler, scale, before, skipped = scaler_from(2.0**40), 2.0**40, flat(network), 0
    while True:
        taken = take_step(network, optimizer, batch, 0.01, SETTINGS, None, scaler=scaler)
        taken.losses(taken.numbers.tolist())  # no error
        if not torch.equal(flat(network), before):
            break
        scale, skipped = scale / 2, skipped + 1
        assert scaler.get_scale() == scale
    assert 5 < skipped < 40
    assert scaler.get_scale() == scale


def test_a_gradient_that_no_scale_mends_ends_the_training_and_names_its_cases(batch):
    network, optimizer = build(SETTINGS)
    network.encoder[0][0].weight.register_hook(lambda gradient: gradient * float("nan"))
    before, scaler = flat(network), scaler_from(4.0)
    for _ in range(2):
        take_step(network, optimizer, batch, 0.01, SETTINGS, None, scaler=scaler)
    with pytest.raises(NonFiniteError, match=r"E1001.*case_"):
        take_step(network, optimizer, batch, 0.01, SETTINGS, None, scaler=scaler)
    assert torch.equal(flat(network), before)


def test_a_stopped_training_goes_on_with_its_scale_bit_for_bit(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "build_scaler", lambda device: scaler_from(2.0**30))  # the first steps are left out
    expected = train(cases, SETTINGS, tmp_path / "whole")
    asked = count()
    hooks = Hooks(stop_signal=lambda: signal.SIGTERM if next(asked) >= 3 else None)
    with pytest.raises(Stopped):
        train(cases, SETTINGS, tmp_path / "parts", hooks)
    kept = newest_checkpoint(tmp_path / "parts" / "checkpoints").state.loss_scale
    assert kept is not None
    assert kept.scale < 2.0**30
    resumed = train(cases, SETTINGS, tmp_path / "parts")
    assert torch.equal(flat(resumed.network), flat(expected.network))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_it_learns_as_float32_does(cases, tmp_path):
    settings = replace(SETTINGS, length=Length(steps=60))
    exact = train(cases, replace(settings, device=FLOAT32), tmp_path / "float32")
    half = train(cases, settings, tmp_path / "float16")
    assert half.steps == exact.steps
    a, b = losses(tmp_path / "float32"), losses(tmp_path / "float16")
    assert sum(b[-10:]) / 10 < sum(b[:5]) / 5 - 0.3
    assert sum(b[-10:]) / 10 == pytest.approx(sum(a[-10:]) / 10, abs=0.1)
