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
from medseg.networks.device import DTYPES, place
from medseg.preparation.store import StoredCase
from medseg.progress import SILENT, Progress, never
from medseg.records.model import ModelCard
from medseg.training.checkpoint import (
    Checkpoint,
    Describe,
    LoopState,
    LossScale,
    load_checkpoint,
    newest_checkpoint,
    save_best,
    save_checkpoint,
)
from medseg.training.compiling import compiled
from medseg.training.feed import Feed
from medseg.training.journal import Journal, Observer, ValidationLine, read_journal
from medseg.training.loss import region_table
from medseg.training.schedule import Length, poly
from medseg.training.scribe import Draft, Scribe
from medseg.training.settings import Settings
from medseg.training.step import build_optimizer, build_scaler, take_step
from medseg.training.transfer import begin_from
from medseg.training.watch import Watch
from medseg.training.world import ALONE, World, check_batches, check_network

log = logging.getLogger(__name__)

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
    checkpoint = _unfinished(settings, cases, folder / CHECKPOINTS, hooks.progress)
    world.same("" if checkpoint is None else checkpoint.folder.name, "newest checkpoints")
    if checkpoint is not None:  # go on as it began, whatever the self-test of the device says today
        dtype = DTYPES[checkpoint.state.precision.removeprefix("torch.")]
        settings = replace(settings, device=replace(settings.device, dtype=dtype))
    network, optimizer = build(settings)
    check_network(network, world)
    state = _begin(settings, cases)
    if checkpoint is not None:
        load_checkpoint(checkpoint, network, optimizer)
        state = checkpoint.state.model_copy(update={"length": str(settings.length)})
    world.spread([*network.parameters(), *network.buffers()])
    engine = compiled(network, settings, hooks.progress.say)
    place = (settings.device.torch_device, world.local_size)
    feed = Feed(cases, settings.configuration, settings.task, settings.seed, world.share, *place)
    course = _Course(settings, folder, hooks, world, network, engine, optimizer, state)
    try:
        course.run(feed)
    finally:
        feed.close()
        course.close()
    return Trained(network.eval(), course.step, course.elapsed)


class _Course:
    """One training under way: where it stands, and what is done at every step of it."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        hooks: Hooks,
        world: World,
        network: nn.Module,
        engine: nn.Module,
        optimizer: torch.optim.SGD,
        state: LoopState,
    ) -> None:
        self.settings, self.folder, self.hooks, self.world = settings, folder, hooks, world
        self.network, self.engine, self.optimizer, self.state = network, engine, optimizer, state
        self.journal = Journal.open(folder, state.step, hooks.observers) if world.first else Journal.nowhere(folder)
        validations = read_journal(self.journal.path)[1]
        self.history = [line.smoothed for line in validations if line.smoothed is not None]
        self.scribe = Scribe(self.journal, Watch(settings.length, validations), hooks.progress)
        self.regions = region_table(settings.task)
        self.scaler = build_scaler(settings.device)
        if state.loss_scale is not None:
            state.loss_scale.restore(self.scaler)
        self.begun = time.monotonic() - state.elapsed_s
        self.step, self.elapsed, self.saved, self.validating = state.step, state.elapsed_s, time.monotonic(), 0.0
        self.finished = False

    def run(self, feed: Feed) -> None:
        """Step after step to the end, where a checkpoint is saved."""
        length = self.settings.length
        self.hooks.progress.begin(f"train {self.settings.configuration.name}", 1000, "‰")
        while True:
            stop, self.elapsed = self.world.agree(self.hooks.stop_signal(), self.elapsed)
            if (fraction := length.fraction(self.step, self.elapsed)) >= 1:
                break
            if stop is not None or time.monotonic() - self.saved > self.settings.checkpoint_s:
                self.save()
            if stop is not None:
                told = Problem("E1300", f"stopped at step {self.step}", "", "the same command goes on here")
                raise Stopped(told, stop)
            self.take(feed, fraction)
            if self.is_time_to_validate(fraction):
                self.validate()
        self.save()
        self.finished = True

    def take(self, feed: Feed, fraction: float) -> None:
        """One step, when ``fraction`` of the training is over."""
        lr = poly(self.settings.configuration.training.initial_lr, fraction)
        asked = time.monotonic()
        batch = feed.batch(self.step, fraction)
        waited = time.monotonic() - asked
        more = self.settings, self.regions, self.world, self.scaler
        taken = take_step(self.engine, self.optimizer, batch, lr, *more)
        self.step, self.elapsed = self.step + 1, time.monotonic() - self.begun
        now = self.settings.length.fraction(self.step, self.elapsed)
        self.scribe.step(Draft(taken, lr, self.elapsed, waited, now))

    def is_time_to_validate(self, before: float) -> bool:
        """Whether one of the evenly spaced points was passed since ``before``, and there is time for it."""
        if self.hooks.validate is None:
            return False
        length = self.settings.length
        now = length.fraction(self.step, self.elapsed)
        affordable = length.steps is not None or self.validating <= VALIDATION_SHARE * self.elapsed or now >= 1
        return int(now * VALIDATIONS) > int(before * VALIDATIONS) and affordable

    def validate(self) -> None:
        """Write one validation to the journal, draw it, and keep the weights if their moving average is the best."""
        assert self.hooks.validate is not None
        begun = time.monotonic()
        self.scribe.catch_up()  # a step that went wrong must not be taken for the best
        self.network.eval()
        line = ValidationLine(step=self.step, dice=self.hooks.validate(self.network), seconds=round(self.elapsed, 3))
        self.network.train()
        if line.mean_dice is not None:
            line = line.model_copy(update={"smoothed": self.keep_best(line.mean_dice, line)})
        self.scribe.validation(line)
        self.scribe.sync()
        self.hooks.picture(self.journal.path)
        if line.mean_dice is not None:
            per_label = ", ".join(f"{name} {dice:.3f}" for name, dice in line.dice.items() if dice is not None)
            self.hooks.progress.say(f"step {self.step}: validation Dice {line.mean_dice:.3f} ({per_label})")
        self.validating += time.monotonic() - begun
        self.elapsed = time.monotonic() - self.begun

    def keep_best(self, mean: float, line: ValidationLine) -> float:
        """The moving average with ``mean``; the weights are kept if it is the highest so far."""
        history, describe = self.history, self.hooks.describe
        smoothed = SMOOTHING * history[-1] + (1 - SMOOTHING) * mean if history else mean
        if describe is not None and smoothed > max(history, default=-1.0):
            card = partial(_scored, describe, self.step, self.elapsed, {"mean": mean, **line.dice})
            save_best(self.folder / CHECKPOINTS, self.network, card)
        history.append(smoothed)
        return smoothed

    def save(self) -> None:
        """Commit a checkpoint; one process does it for all."""
        if self.world.first:
            self.scribe.sync()
            known = {"step": self.step, "elapsed_s": self.elapsed, "loss_scale": LossScale.of(self.scaler)}
            state = self.state.model_copy(update=known)
            save_checkpoint(self.folder / CHECKPOINTS, self.network, self.optimizer, state, self.hooks.describe)
        self.saved = time.monotonic()

    def close(self) -> None:
        """Whatever happened."""
        self.journal.close(finished=self.finished)
        self.hooks.progress.end()


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
        precision=settings.device.precision,
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


def _scored(
    describe: Describe, step: int, elapsed: float, scores: dict[str, float | None], weights_sha256: str
) -> ModelCard:
    return describe(step, elapsed, weights_sha256).model_copy(update={"scores": scores})
