"""The loop: resuming changes nothing, trouble is named and loses nothing, time is kept, two cases are learnt."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import (
    FLAT_KERNELS,
    TWO_D,
    blobs,
    make_card,
    make_configuration,
    make_plan,
    make_task,
    store_blobs,
    store_case,
)
from torch import nn

from medseg.errors import IncompatibleError, InputError, IntegrityError, NonFiniteError, Stopped
from medseg.inference.sliding import predict_logits
from medseg.networks.device import Device
from medseg.networks.weights import load_weights
from medseg.records.base import read_record
from medseg.records.model import CARD, WEIGHTS, ModelCard
from medseg.records.network import NetworkPlan
from medseg.records.training import Phase
from medseg.training import loop
from medseg.training import step as step_module
from medseg.training.batches import Sampling, stream
from medseg.training.checkpoint import newest_checkpoint
from medseg.training.journal import NAME, StepLine, read_journal
from medseg.training.loop import Hooks, Trained, train
from medseg.training.loss import supervised_loss
from medseg.training.schedule import Length
from medseg.training.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Device(torch.device("cpu"), torch.float32, "test")
HALF = Device(torch.device("cpu"), torch.bfloat16, "test")
STEPS = 9
CONFIGURATION = make_configuration((4, 8, 6), FLAT_KERNELS, momentum=0.9, mirror_axes=(0, 1, 2))
SETTINGS = Settings(make_task(), CONFIGURATION, Length(steps=STEPS), CPU, seed=3)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return store_blobs(tmp_path_factory.mktemp("store"), [(7, 12, 9), (6, 11, 13), (9, 10, 12)])


def stop_after(steps: int, number: int = signal.SIGTERM) -> Callable[[], int | None]:
    """A stop signal that comes during the step with this number."""
    asked = iter(range(10_000))
    return lambda: number if next(asked) >= steps else None


def stopped_at(step: int, cases, settings: Settings, folder: Path) -> None:
    with pytest.raises(Stopped):
        train(cases, settings, folder, Hooks(stop_signal=stop_after(step)))


def weights(trained: Trained) -> dict[str, torch.Tensor]:
    return dict(trained.network.state_dict())


def equal(a: Trained, b: Trained) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(line.step, line.loss, line.lr) for line in read_journal(folder / NAME)[0]]


@pytest.fixture(scope="module")
def undisturbed(cases, tmp_path_factory) -> tuple[Trained, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    return train(cases, SETTINGS, folder), folder


@pytest.mark.parametrize("stops", [[0], [1], [4], [8], [2, 3, 7]])
def test_stopping_and_resuming_gives_the_same_weights_and_losses_bit_for_bit(cases, undisturbed, tmp_path, stops):
    done = 0
    for stop in stops:
        stopped_at(stop - done, cases, SETTINGS, tmp_path)
        assert newest_checkpoint(tmp_path / "checkpoints").state.step == stop
        done = stop
    resumed = train(cases, SETTINGS, tmp_path)
    expected, folder = undisturbed
    assert resumed.steps == STEPS
    assert equal(resumed, expected)
    assert losses(tmp_path) == losses(folder)


def test_the_same_training_twice_gives_the_same_and_another_seed_does_not(cases, undisturbed, tmp_path):
    assert equal(train(cases, SETTINGS, tmp_path / "again"), undisturbed[0])
    assert not equal(train(cases, replace(SETTINGS, seed=4), tmp_path / "other"), undisturbed[0])


@pytest.mark.parametrize("kind", ["half precision", "2d"])
def test_other_number_types_and_dimensions_resume_exactly_too(tmp_path, kind):
    settings = replace(SETTINGS, device=HALF, length=Length(steps=4))
    if kind == "2d":
        settings = replace(settings, device=CPU, configuration=make_configuration((8, 6), TWO_D, mirror_axes=(1,)))
    cases = store_blobs(tmp_path / "store", [(7, 12, 9), (6, 11, 13)], dimensions=settings.configuration.dimensions)
    expected = train(cases, settings, tmp_path / "whole")
    stopped_at(2, cases, settings, tmp_path / "parts")
    assert equal(train(cases, settings, tmp_path / "parts"), expected)


def test_it_goes_on_with_the_number_type_that_it_began_with(cases, tmp_path):
    expected = train(cases, SETTINGS, tmp_path / "whole")
    stopped_at(3, cases, SETTINGS, tmp_path / "parts")
    assert equal(train(cases, replace(SETTINGS, device=HALF), tmp_path / "parts"), expected)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(cases, undisturbed, tmp_path, caplog):
    stopped_at(2, cases, SETTINGS, tmp_path)
    stopped_at(3, cases, SETTINGS, tmp_path)
    model = tmp_path / "checkpoints" / "step_00000005" / "weights.safetensors"
    content = bytearray(model.read_bytes())
    content[-9] ^= 1
    model.write_bytes(content)
    assert equal(train(cases, SETTINGS, tmp_path), undisturbed[0])
    assert losses(tmp_path) == losses(undisturbed[1])
    assert "step_00000005 is passed over" in caplog.text


def test_checkpoints_are_written_while_training_and_two_are_left(cases, tmp_path):
    train(cases, replace(SETTINGS, checkpoint_s=-1.0), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000008", "step_00000009"]


def test_a_finished_training_is_not_trained_again(cases, undisturbed, tmp_path, monkeypatch):
    train(cases, SETTINGS, tmp_path)
    monkeypatch.setattr(loop, "take_step", lambda *arguments: pytest.fail("there is nothing left to do"))
    again = train(cases, SETTINGS, tmp_path)
    assert again.steps == STEPS
    assert equal(again, undisturbed[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint_and_the_exit_code_of_the_signal(cases, tmp_path, number):
    with pytest.raises(Stopped, match=r"E1300.*step 5") as caught:
        train(cases, SETTINGS, tmp_path, Hooks(stop_signal=stop_after(5, number)))
    assert caught.value.exit_code == 128 + number
    assert newest_checkpoint(tmp_path / "checkpoints").state.step == 5
    assert len(losses(tmp_path)) == 5


def test_the_trained_network_is_in_evaluation_mode(undisturbed):
    assert not undisturbed[0].network.training


def test_no_cases_are_an_input_error(tmp_path):
    with pytest.raises(InputError, match="E0146"):
        train([], SETTINGS, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"recipe": "fast"},
        {"task": make_task(3, name="other")},
        {"configuration": make_configuration((4, 8, 6), FLAT_KERNELS, batch_size=3, momentum=0.9)},
        {"configuration": make_configuration((4, 8, 6), FLAT_KERNELS, momentum=0.8)},
    ],
)
def test_a_training_with_other_settings_is_refused_and_left_alone(cases, tmp_path, change):
    stopped_at(2, cases, SETTINGS, tmp_path)
    journal = (tmp_path / NAME).read_bytes()
    with pytest.raises(IncompatibleError, match="E0802"):
        train(cases, replace(SETTINGS, **change), tmp_path)
    assert newest_checkpoint(tmp_path / "checkpoints").state.step == 2
    assert (tmp_path / NAME).read_bytes() == journal


def test_a_training_with_other_cases_is_refused(cases, tmp_path):
    stopped_at(2, cases, SETTINGS, tmp_path)
    with pytest.raises(IncompatibleError, match="E0802"):
        train(cases[:2], SETTINGS, tmp_path)


def test_more_steps_go_on_where_fewer_stopped_or_ended(cases, undisturbed, tmp_path):
    said: list[str] = []
    progress = SimpleNamespace(
        begin=lambda *a: None, update=lambda *a: None, end=lambda: None, say=lambda text: said.append(text)
    )
    stopped_at(2, cases, replace(SETTINGS, length=Length(steps=4)), tmp_path)
    longer = train(cases, SETTINGS, tmp_path, Hooks(progress=progress))
    assert longer.steps == STEPS
    assert said == ["goes on from step 2: 9 steps instead of 4 steps"]
    rates = [lr for _, _, lr in losses(tmp_path)]
    assert rates[2:] == [lr for _, _, lr in losses(undisturbed[1])][2:]
    assert train(cases, replace(SETTINGS, length=Length(steps=STEPS + 3)), tmp_path).steps == STEPS + 3
    assert newest_checkpoint(tmp_path / "checkpoints").state.length == "12 steps"


def test_less_than_was_trained_already_is_refused_and_nothing_is_lost(cases, tmp_path):
    stopped_at(5, cases, SETTINGS, tmp_path)
    with pytest.raises(IncompatibleError, match=r"E0802.*5 steps.*less than 5 steps"):
        train(cases, replace(SETTINGS, length=Length(steps=5)), tmp_path)
    assert newest_checkpoint(tmp_path / "checkpoints").state.step == 5


def test_a_patch_that_grows_resumes_exactly_and_is_what_the_network_sees(cases, tmp_path, monkeypatch):
    growth = (
        Phase(until=0.3, patch_size=(4, 4, 4), batch_size=5),
        Phase(until=0.6, patch_size=(4, 8, 4), batch_size=3),
    )
    settings = replace(SETTINGS, configuration=make_configuration((4, 8, 6), FLAT_KERNELS, growth=growth))
    seen: list[tuple[int, ...]] = []
    original = loop.take_step

    def take_step(network, optimizer, batch, *arguments):
        seen.append(tuple(batch.image.shape))
        return original(network, optimizer, batch, *arguments)

    monkeypatch.setattr(loop, "take_step", take_step)
    expected = train(cases, settings, tmp_path / "whole")
    assert seen == [(5, 1, 4, 4, 4)] * 3 + [(3, 1, 4, 8, 4)] * 3 + [(2, 1, 4, 8, 6)] * 3
    stopped_at(2, cases, settings, tmp_path / "parts")
    stopped_at(2, cases, settings, tmp_path / "parts")
    assert equal(train(cases, settings, tmp_path / "parts"), expected)


def test_a_batch_in_parts_gives_the_gradient_of_the_whole_where_the_loss_is_a_mean_of_samples(cases):
    """Dice of each sample and cross-entropy of equally many voxels: parts and whole must agree."""
    found = []
    for parts in (1, 2, 4):
        configuration = make_configuration(
            (4, 8, 6), FLAT_KERNELS, batch_size=4, batch_dice=False, accumulate=parts, momentum=0.9
        )
        settings = replace(SETTINGS, configuration=configuration)
        batches = loop.Feed(cases, configuration, make_task(), 0)
        network, optimizer = loop.build(settings)
        taken = loop.take_step(network, optimizer, batches.batch(0, 0.0), 0.01, settings, None)
        batches.close()
        found.append((float(taken.numbers[0]), torch.cat([p.detach().flatten() for p in network.parameters()])))
    for loss, parameters in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(parameters, found[0][1], rtol=1e-4, atol=1e-6)


def test_how_often_checkpoints_are_written_is_free_to_change(cases, tmp_path):
    stopped_at(2, cases, SETTINGS, tmp_path)
    assert train(cases, replace(SETTINGS, checkpoint_s=7.0), tmp_path).steps == STEPS


def test_a_case_that_is_not_finite_is_named_and_the_checkpoint_stays(cases, tmp_path):
    image, labels = blobs((8, 12, 10), 5)
    image[:] = np.inf
    broken = store_case(tmp_path / "store", "broken_case", image, labels).load()
    settings = replace(
        SETTINGS, checkpoint_s=-1.0, configuration=CONFIGURATION.model_copy(update={"batch_size": 1}), seed=1
    )
    with pytest.raises(NonFiniteError, match=r"E1001.*broken_case") as caught:
        train([*cases, broken], settings, tmp_path)
    assert not any(case.record.id in str(caught.value) for case in cases)
    checkpoint = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.state.step == len(losses(tmp_path))
    assert all(np.isfinite(loss) for _, loss, _ in losses(tmp_path))


def test_a_gradient_that_is_not_finite_changes_no_weight(cases, monkeypatch):
    network, optimizer = loop.build(SETTINGS)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    batch = stream(cases, Sampling.of(CONFIGURATION, make_task(), 0), 4)
    network.encoder[0][0].weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match=r"E1001: step 4|E1001\]: step 4"):
        loop.take_step(network, optimizer, next(batch), 0.01, SETTINGS, None)
    batch.close()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_damaged_case_ends_the_training_with_its_own_error(cases, tmp_path):
    loaded = store_blobs(tmp_path / "store", [(7, 12, 9)])[0]
    on_disk = type(loaded)(tmp_path / "store", loaded.record)
    (tmp_path / "store" / "case_0.labels.b2nd").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"E0701.*case=case_0"):
        train([on_disk], SETTINGS, tmp_path)


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["small gradient", "large gradient"])
def test_an_update_follows_from_the_gradient_with_its_norm_cut_at_twelve(cases, monkeypatch, scale):
    """One step against the rule written out: nesterov momentum 0.9 on top of weight decay."""
    original = step_module.supervised_parts

    def scaled(*values, **options):
        return {name: scale * part for name, part in original(*values, **options).items()}

    monkeypatch.setattr(step_module, "supervised_parts", scaled)
    batches = stream(cases, Sampling.of(CONFIGURATION, make_task(), 0), 0)
    batch = next(batches)
    batches.close()
    network, optimizer = loop.build(SETTINGS)
    parameters = list(network.parameters())
    before = [p.detach().clone() for p in parameters]
    loss = scale * supervised_loss(network(batch.image), batch.labels, batch_dice=True, regions=None)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    assert (norm > 12) == (scale > 1)
    found = loop.take_step(network, optimizer, batch, 0.02, SETTINGS, None)
    assert float(found.numbers[0]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for p, old, gradient in zip(parameters, before, gradients, strict=True):
        if gradient is None:  # the head of the coarsest level has no weight in the loss
            assert torch.equal(p, old)
        else:
            decayed = gradient * min(1.0, 12 / float(norm)) + 3e-5 * old
            torch.testing.assert_close(p.detach(), old - 0.02 * (decayed + 0.9 * decayed), rtol=1e-4, atol=1e-6)


class Clock:
    """Seconds that pass only when a step or a validation is done."""

    def __init__(self, monkeypatch, seconds_per_step: float) -> None:
        self.now = 1000.0
        original = loop.take_step

        def take_step(*arguments):
            self.now += seconds_per_step
            return original(*arguments)

        monkeypatch.setattr(loop, "take_step", take_step)
        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: self.now))


def test_a_time_budget_ends_with_the_step_that_uses_it_up_and_the_rate_falls_to_nearly_zero(
    cases, tmp_path, monkeypatch
):
    Clock(monkeypatch, seconds_per_step=2.5)
    trained = train(cases, replace(SETTINGS, length=Length(seconds=39)), tmp_path)
    assert (trained.steps, trained.seconds) == (16, 40)
    rates = [lr for _, _, lr in losses(tmp_path)]
    assert rates == pytest.approx([0.01 * (1 - 2.5 * n / 39) ** 0.9 for n in range(16)])
    assert rates[-1] < 0.06 * rates[0]


def test_a_time_budget_goes_on_after_a_stop_with_the_time_that_was_left(cases, tmp_path, monkeypatch):
    clock = Clock(monkeypatch, seconds_per_step=2.5)
    settings = replace(SETTINGS, length=Length(seconds=39))
    stopped_at(6, cases, settings, tmp_path)
    clock.now += 5000  # overnight
    trained = train(cases, settings, tmp_path)
    assert (trained.steps, trained.seconds) == (16, 40)


def validating(clock: Clock | None, seconds: float, seen: list[bool]) -> Callable[[nn.Module], dict[str, float | None]]:
    def validate(network: nn.Module) -> dict[str, float | None]:
        seen.append(network.training)
        if clock is not None:
            clock.now += seconds
        return {"a": 0.5, "b": None}

    return validate


def test_training_by_the_clock_spends_little_of_it_on_validation_and_validates_at_the_end(cases, tmp_path, monkeypatch):
    clock = Clock(monkeypatch, seconds_per_step=2.5)
    seen: list[bool] = []
    train(
        cases,
        replace(SETTINGS, length=Length(seconds=100)),
        tmp_path,
        Hooks(validate=validating(clock, 3.0, seen)),
    )
    steps, validations = read_journal(tmp_path / NAME)
    assert validations[-1].step == steps[-1].step
    assert 2 <= len(validations) <= 4  # 3 s each: 5 % of 100 s, one begun within them, and the last
    assert not any(seen)


def test_training_by_steps_validates_ten_times_evenly_and_goes_on_in_training_mode(cases, tmp_path, monkeypatch):
    seen: list[bool] = []
    original = loop.take_step

    def take_step(network, *arguments):
        assert network.training
        return original(network, *arguments)

    monkeypatch.setattr(loop, "take_step", take_step)
    pictures: list[Path] = []
    hooks = Hooks(validate=validating(None, 0, seen), picture=pictures.append)
    plain = train(cases, replace(SETTINGS, length=Length(steps=20)), tmp_path / "plain")
    watched = train(cases, replace(SETTINGS, length=Length(steps=20)), tmp_path / "watched", hooks)
    _, validations = read_journal(tmp_path / "watched" / NAME)
    assert [v.step for v in validations] == list(range(2, 21, 2))
    assert not any(seen)
    assert pictures == [tmp_path / "watched" / NAME] * 10
    assert equal(plain, watched)


def test_the_best_moving_average_is_kept_as_a_model_folder(cases, tmp_path):
    dice = iter([0.2, 0.8, 0.6, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    settings = replace(SETTINGS, length=Length(steps=20))

    def describe(steps: int, seconds: float, weights_sha256: str) -> ModelCard:
        plan = make_plan(CONFIGURATION, make_task())
        return make_card(plan, steps=steps, weights_sha256=weights_sha256)

    validate = lambda network: {"a": next(dice), "b": None}  # noqa: E731
    trained = train(cases, settings, tmp_path, Hooks(validate=validate, describe=describe))
    smoothed = [line.smoothed for line in read_journal(tmp_path / NAME)[1]]
    assert smoothed[:5] == pytest.approx([0.2, 0.5, 0.55, 0.725, 0.4125])
    card = read_record(tmp_path / "checkpoints" / "best" / CARD, ModelCard)
    assert (card.steps, card.scores) == (8, {"mean": 0.9, "a": 0.9, "b": None})
    network, _ = loop.build(settings)
    load_weights(tmp_path / "checkpoints" / "best" / WEIGHTS, network, card.weights_sha256)
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest.state.step == 20
    last = read_record(newest.folder / CARD, ModelCard)
    load_weights(newest.folder / WEIGHTS, network, last.weights_sha256)
    assert all(torch.equal(v, weights(trained)[k]) for k, v in network.state_dict().items())


def test_progress_never_falls_and_ends_full(cases, tmp_path):
    told: list[tuple[str, object]] = []
    progress = SimpleNamespace(
        begin=lambda stage, total, unit: told.append(("begin", total)),
        update=lambda done, note="", facts=None: told.append(("update", done)),
        end=lambda: told.append(("end", None)),
        say=lambda message: told.append(("say", message)),
    )
    train(cases, SETTINGS, tmp_path, Hooks(progress=progress))
    updates = [value for kind, value in told if kind == "update"]
    assert told[0] == ("begin", 1000)
    assert told[-1] == ("end", None)
    assert updates == sorted(updates)
    assert updates[-1] == 1000


def test_the_journal_holds_every_step_once(undisturbed):
    steps, _ = read_journal(undisturbed[1] / NAME)
    assert [line.step for line in steps] == list(range(1, STEPS + 1))
    assert steps[0].lr == pytest.approx(0.01)
    assert isinstance(steps[0], StepLine)


def test_two_cases_are_learnt_by_heart(tmp_path):
    """Law: Dice over 0.95 on both structures of both cases."""
    shapes = [(10, 18, 14), (11, 16, 15)]
    cases = store_blobs(tmp_path / "store", shapes)
    network = NetworkPlan(
        features=(8, 12, 16),
        kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        convs_encoder=(1, 1, 1),
        convs_decoder=(1, 1),
    )
    configuration = make_configuration((8, 16, 12), network, batch_size=2, momentum=0.9, initial_lr=0.05)
    trained = train(cases, Settings(make_task(), configuration, Length(steps=150), CPU), tmp_path)
    for case in cases:
        predicted = predict_logits([trained.network], case.image, configuration, CPU).argmax(0).numpy()
        for index in (1, 2):
            a, b = predicted == index, np.asarray(case.labels) == index
            assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.95
