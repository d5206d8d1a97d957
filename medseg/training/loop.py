"""The loop: one configuration trained on one set of cases, from the first step or from the newest checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from medseg.errors import IncompatibleError, InputError, Problem, Stopped
from medseg.networks.build import build_network
from medseg.networks.device import place
from medseg.preparation.store import StoredCase
from medseg.progress import SILENT, Progress, never
from medseg.records.model import ModelCard
from medseg.training.checkpoint import (
    Checkpoint,
    Describe,
    LoopState,
    load_checkpoint,
    newest_checkpoint,
    save_best,
    save_checkpoint,
)
from medseg.training.feed import Feed
from medseg.training.journal import Journal, Observer, ValidationLine, read_journal
from medseg.training.loss import region_table
from medseg.training.schedule import Length, poly
from medseg.training.scribe import Draft, Scribe
from medseg.training.settings import Settings
from medseg.training.step import build_optimizer, take_step
from medseg.training.transfer import begin_from
from medseg.training.watch import Watch
from medseg.training.world import ALONE, World, check_batches, check_network

log = logging.getLogger(__name__)

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
VALIDATIONS = 10  # per training, evenly spaced
SMOOTHING = 0.5  # weight of the past in the moving average of validations
CHECKPOINTS = "checkpoints"
VALIDATION_SHARE = 0.05  # of the time so far; what would go beyond is left out when training by the clock

Validate = Callable[[nn.Module], dict[str, float | None]]


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop calls besides itself: validation, a picture of the journal, progress, and who may stop it.

    ``describe`` makes the card that lets a checkpoint predict; ``observers`` are told of the journal's lines.
    """

    validate: Validate | None = None
    picture: Callable[[Path], None] = lambda journal: None
    progress: Progress = SILENT
    stop_signal: Callable[[], int | None] = never
    describe: Describe | None = None
    observers: tuple[Observer, ...] = ()


NO_HOOKS = Hooks()


@dataclass(frozen=True, slots=True)
class Trained:
    """The network (in evaluation mode, on its device), the steps it took and their seconds."""

    network: nn.Module
    steps: int
    seconds: float


def train(
    cases: Sequence[StoredCase], settings: Settings, folder: Path, hooks: Hooks = NO_HOOKS, world: World = ALONE
) -> Trained:
    """Train a network; ``folder`` receives ``log.jsonl`` and ``checkpoints/``.

    If the folder holds a checkpoint of the same settings, training goes on from there: with a length in steps, on a
    CPU with the same number of threads, the weights are those of an undisturbed run, bit for bit. The length may be
    another one than before, if it is not over yet.

    All processes of ``world`` call this alike and share every batch; the first alone writes, validates and talks. Loss
    and updates are those of one process, but for rounding, and their number may be another one after a stop.

    Raises:
        UsageError: E0001, E0162 more processes than samples in a batch, or a network that cannot be shared.
        InputError: E0146 no cases.
        IncompatibleError: E0802 the checkpoint belongs to other settings, or is beyond the length asked for.
        NonFiniteError: E1001 loss or gradient is not finite; the step's cases are named, no update was made.
        ResourceError: E0602 another process of ``world`` is gone.
        Stopped: ``hooks.stop_signal`` of any process said so; a checkpoint was saved.
    """
    if not cases:
        raise InputError(Problem("E0146", "no cases to train on", "at least one", "check splits and data"))
    check_batches(settings.configuration, world)
    length, training = settings.length, settings.configuration.training
    checkpoint = _unfinished(settings, cases, folder / CHECKPOINTS, hooks.progress)
    world.same("" if checkpoint is None else checkpoint.folder.name, "newest checkpoints")
    if checkpoint is not None:  # go on as it began, whatever the self-test of the device says today
        settings = replace(settings, device=replace(settings.device, dtype=DTYPES[checkpoint.state.precision]))
    network, optimizer = build(settings)
    check_network(network, world)
    state = _begin(settings, cases)
    if checkpoint is not None:
        load_checkpoint(checkpoint, network, optimizer)
        state = checkpoint.state.model_copy(update={"length": str(length)})
    regions = region_table(settings.task)
    world.spread([*network.parameters(), *network.buffers()])
    journal = Journal.open(folder, state.step, hooks.observers) if world.first else Journal.nowhere(folder)
    validations = read_journal(journal.path)[1]
    history = [line.smoothed for line in validations if line.smoothed is not None]
    scribe = Scribe(journal, Watch(length, validations), hooks.progress)
    begun = time.monotonic() - state.elapsed_s
    step, elapsed, saved, validating = state.step, state.elapsed_s, time.monotonic(), 0.0

    def save() -> None:
        scribe.sync()
        save_checkpoint(folder / CHECKPOINTS, network, optimizer, _at(state, step, elapsed), hooks.describe)

    finished = False
    hooks.progress.begin(f"train {settings.configuration.name}", 1000, "‰")
    place = (settings.device.torch_device, world.local_size)
    feed = Feed(cases, settings.configuration, settings.task, settings.seed, world.share, *place)
    try:
        while True:
            stop, elapsed = world.agree(hooks.stop_signal(), elapsed)
            if (fraction := length.fraction(step, elapsed)) >= 1:
                break
            if world.first and (stop is not None or time.monotonic() - saved > settings.checkpoint_s):
                save()
                saved = time.monotonic()
            if stop is not None:
                raise Stopped(Problem("E1300", f"stopped at step {step}", "", "the same command goes on here"), stop)
            lr = poly(training.initial_lr, fraction)
            asked = time.monotonic()
            batch = feed.batch(step, fraction)
            waited = time.monotonic() - asked
            taken = take_step(network, optimizer, batch, lr, settings, regions, world)
            step, elapsed = step + 1, time.monotonic() - begun
            now = length.fraction(step, elapsed)
            scribe.step(Draft(taken, lr, elapsed, waited, now))
            affordable = length.steps is not None or validating <= VALIDATION_SHARE * elapsed or now >= 1
            if int(now * VALIDATIONS) > int(fraction * VALIDATIONS) and affordable and hooks.validate is not None:
                validating += _validate(network, step, elapsed, scribe, history, hooks)
                elapsed = time.monotonic() - begun
        if world.first:
            save()
        finished = True
    finally:
        feed.close()
        journal.close(finished=finished)
        hooks.progress.end()
    return Trained(network.eval(), step, elapsed)


def build(settings: Settings) -> tuple[nn.Module, torch.optim.SGD]:
    """A network in training mode on its device, fresh or with the weights it begins from, and its optimiser."""
    configuration = settings.configuration
    channels = configuration.input_channels(settings.task)
    network = build_network(configuration.network, channels, settings.task.outputs, settings.seed)
    if settings.initial is not None:
        begin_from(network, configuration.network, settings.initial)
    network = place(network, settings.device, configuration.dimensions).train()
    return network, build_optimizer(network, settings)


def _begin(settings: Settings, cases: Sequence[StoredCase]) -> LoopState:
    return LoopState(
        step=0,
        elapsed_s=0,
        settings_sha256=settings.sha256(cases),
        length=str(settings.length),
        precision=str(settings.device.dtype),
        threads=torch.get_num_threads(),
    )


def _unfinished(settings: Settings, cases: Sequence[StoredCase], folder: Path, progress: Progress) -> Checkpoint | None:
    """The newest checkpoint if there is one; it must be of the same training, and not beyond its length."""
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        return None
    state, length = checkpoint.state, settings.length
    if state.settings_sha256 != settings.sha256(cases):
        raise other_training()
    if state.length != str(length):
        if length.fraction(state.step, state.elapsed_s) >= 1:
            raise too_short(f"{state.step} steps in {state.elapsed_s:.0f} s", length)
        progress.say(f"goes on from step {state.step}: {length} instead of {state.length}")
    if state.threads != torch.get_num_threads():
        log.warning(
            "resuming with %d threads what began with %d: the result will differ in rounding",
            torch.get_num_threads(),
            state.threads,
        )
    return checkpoint


def other_training() -> IncompatibleError:
    """The error for checkpoints of a training with other settings: they are neither used nor removed."""
    return IncompatibleError(
        Problem(
            "E0802",
            "a training with other settings or data lies here",
            "the same plan, recipe, seed and cases",
            "repeat its command to finish it, or --overwrite to start anew",
        )
    )


def too_short(done: str, length: Length) -> IncompatibleError:
    """The error for a length that the training which lies there has reached."""
    action = "ask for more to go on, or --overwrite to start anew"
    return IncompatibleError(Problem("E0802", f"trained for {done} already", f"less than {length}", action))


def _at(state: LoopState, step: int, elapsed_s: float) -> LoopState:
    return state.model_copy(update={"step": step, "elapsed_s": elapsed_s})


def _scored(
    describe: Describe, step: int, elapsed: float, scores: dict[str, float | None], weights_sha256: str
) -> ModelCard:
    return describe(step, elapsed, weights_sha256).model_copy(update={"scores": scores})


def _validate(
    network: nn.Module, step: int, elapsed: float, scribe: Scribe, history: list[float], hooks: Hooks
) -> float:
    """Write one validation to the journal, keep and draw it, and return the seconds that took.

    ``history`` holds the moving average after each validation; weights with the best so far are kept.
    """
    assert hooks.validate is not None
    begun, path = time.monotonic(), scribe.journal.path
    scribe.catch_up()  # a step that went wrong must not be taken for the best
    network.eval()
    line = ValidationLine(step=step, dice=hooks.validate(network), seconds=round(elapsed, 3))
    if (mean := line.mean_dice) is not None:
        smoothed = SMOOTHING * history[-1] + (1 - SMOOTHING) * mean if history else mean
        line = line.model_copy(update={"smoothed": smoothed})
        if hooks.describe is not None and smoothed > max(history, default=-1.0):
            scores = {"mean": mean, **line.dice}
            describe = partial(_scored, hooks.describe, step, elapsed, scores)
            save_best(path.parent / CHECKPOINTS, network, describe)
        history.append(smoothed)
    network.train()
    scribe.validation(line)
    scribe.sync()
    hooks.picture(path)
    if line.mean_dice is not None:
        per_label = ", ".join(f"{name} {dice:.3f}" for name, dice in line.dice.items() if dice is not None)
        hooks.progress.say(f"step {step}: validation Dice {line.mean_dice:.3f} ({per_label})")
    return time.monotonic() - begun
