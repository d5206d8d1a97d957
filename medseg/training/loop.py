"""The loop: one configuration trained on one set of cases, from the first step or from the newest checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from medseg.artefacts import sha256_of_json
from medseg.errors import IncompatibleError, InputError, NonFiniteError, Problem, Stopped
from medseg.networks.build import build_network
from medseg.networks.device import Device, place, place_batch
from medseg.preparation.store import StoredCase
from medseg.progress import SILENT, Progress, never
from medseg.records.model import ModelCard
from medseg.records.plan import ConfigurationPlan
from medseg.records.task import Task
from medseg.training.batches import Batch
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
from medseg.training.journal import Journal, StepLine, ValidationLine, read_journal
from medseg.training.loss import Choice, region_table, supervised_loss
from medseg.training.schedule import Length, poly
from medseg.training.world import ALONE, World, check_batches, check_network

log = logging.getLogger(__name__)

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
CLIP_NORM = 12.0  # nnU-Net: gradient norm
VALIDATIONS = 10  # per training, evenly spaced
SMOOTHING = 0.5  # weight of the past in the moving average of validations
CHECKPOINTS = "checkpoints"
VALIDATION_SHARE = 0.05  # of the time so far; what would go beyond is left out when training by the clock

Validate = Callable[[nn.Module], dict[str, float | None]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is trained and for how long. ``recipe`` is how batch size and learning rate were chosen."""

    task: Task
    configuration: ConfigurationPlan
    length: Length
    device: Device
    seed: int = 0
    checkpoint_s: float = 300.0
    recipe: str = "reference"

    def sha256(self, cases: Sequence[StoredCase]) -> str:
        """Hash of all that the weights depend on, but the length, which may be changed, and the machine."""
        return sha256_of_json(
            {
                "task": self.task.to_json(),
                "configuration": self.configuration.to_json(),
                "recipe": self.recipe,
                "seed": self.seed,
                "cases": [case.provenance for case in cases],
            }
        )


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop calls besides itself: validation, a picture of the journal, progress, and who may stop it.

    ``describe`` makes the card that lets a checkpoint predict.
    """

    validate: Validate | None = None
    picture: Callable[[Path], None] = lambda journal: None
    progress: Progress = SILENT
    stop_signal: Callable[[], int | None] = never
    describe: Describe | None = None


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
    journal = Journal.open(folder, state.step) if world.first else Journal.nowhere(folder)
    history = [line.smoothed for line in read_journal(journal.path)[1] if line.smoothed is not None]
    begun = time.monotonic() - state.elapsed_s
    step, elapsed, saved, validating = state.step, state.elapsed_s, time.monotonic(), 0.0

    def save() -> None:
        journal.sync()
        save_checkpoint(folder / CHECKPOINTS, network, optimizer, _at(state, step, elapsed), hooks.describe)

    hooks.progress.begin(f"train {settings.configuration.name}", 1000, "‰")
    feed = Feed(cases, settings.configuration, settings.task, settings.seed, world.share)
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
            loss = take_step(network, optimizer, feed.batch(step, fraction), lr, settings, regions, world)
            step, elapsed = step + 1, time.monotonic() - begun
            journal.write(StepLine(step=step, loss=loss, lr=lr, seconds=round(elapsed, 3)))
            now = length.fraction(step, elapsed)
            hooks.progress.update(int(1000 * now), f"step {step}  loss {loss:+.3f}  {elapsed / step:.2f} s/step")
            affordable = length.steps is not None or validating <= VALIDATION_SHARE * elapsed or now >= 1
            if int(now * VALIDATIONS) > int(fraction * VALIDATIONS) and affordable and hooks.validate is not None:
                validating += _validate(network, step, elapsed, journal, history, hooks)
                elapsed = time.monotonic() - begun
        if world.first:
            save()
    finally:
        feed.close()
        journal.close()
        hooks.progress.end()
    return Trained(network.eval(), step, elapsed)


def build(settings: Settings) -> tuple[nn.Module, torch.optim.SGD]:
    """A fresh network in training mode on its device, and its optimiser."""
    configuration = settings.configuration
    channels = configuration.input_channels(settings.task)
    network = build_network(configuration.network, channels, settings.task.outputs, settings.seed)
    network = place(network, settings.device, configuration.dimensions).train()
    training = configuration.training
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=training.initial_lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=training.momentum > 0,
    )
    return network, optimizer


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


def take_step(
    network: nn.Module,
    optimizer: torch.optim.SGD,
    batch: Batch,
    lr: float,
    settings: Settings,
    regions: Tensor | None,
    world: World = ALONE,
) -> float:
    """One update; returns the loss before it, which is that of the whole batch in every process."""
    device, training = settings.device, settings.configuration.training
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    value = 0.0
    for image, labels, share in _parts(batch, training.accumulate, world.size):
        with torch.autocast(device.torch_device.type, device.dtype, enabled=device.half):
            outputs = network(place_batch(image, device))
        choice = Choice.of(settings.configuration)
        labels = labels.to(device.torch_device)
        batch_dice = training.batch_dice
        loss = supervised_loss(outputs, labels, batch_dice=batch_dice, regions=regions, choice=choice, world=world)
        (loss * share if share < 1 else loss).backward()
        value += float(loss.detach()) * share
    world.sum_gradients(network.parameters())
    norm = nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
    if not (math.isfinite(value) and math.isfinite(float(norm))):
        cases = ", ".join(sorted(set(batch.cases)))
        raise NonFiniteError(
            Problem(
                "E1001",
                f"step {batch.step}: loss {value}, gradient norm {float(norm)} with cases {cases}",
                "finite values",
                "check these cases, or lower initial_lr in plan.json; the last checkpoint is intact",
            )
        )
    optimizer.step()
    return value


def _parts(batch: Batch, count: int, processes: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The batch in parts of like size, whose gradients are summed: less memory, the Dice is of each part.

    ``processes`` that share the batch need fewer parts each, and all of them as many. With each part comes the share
    of all samples that it has, in all processes together.
    """
    whole = len(batch.cases)
    count = max(1, min(math.ceil(count / processes), whole // processes))
    samples = [whole * (n + 1) // processes - whole * n // processes for n in range(processes)]
    shares = [sum(n // count + (part < n % count) for n in samples) / whole for part in range(count)]
    yield from zip(batch.image.tensor_split(count), batch.labels.tensor_split(count), shares, strict=True)


def _scored(
    describe: Describe, step: int, elapsed: float, scores: dict[str, float | None], weights_sha256: str
) -> ModelCard:
    return describe(step, elapsed, weights_sha256).model_copy(update={"scores": scores})


def _validate(
    network: nn.Module, step: int, elapsed: float, journal: Journal, history: list[float], hooks: Hooks
) -> float:
    """Write one validation to the journal, keep and draw it, and return the seconds that took.

    ``history`` holds the moving average after each validation; weights with the best so far are kept.
    """
    assert hooks.validate is not None
    begun = time.monotonic()
    network.eval()
    line = ValidationLine(step=step, dice=hooks.validate(network), seconds=round(elapsed, 3))
    if (mean := line.mean_dice) is not None:
        smoothed = SMOOTHING * history[-1] + (1 - SMOOTHING) * mean if history else mean
        line = line.model_copy(update={"smoothed": smoothed})
        if hooks.describe is not None and smoothed > max(history, default=-1.0):
            scores = {"mean": mean, **line.dice}
            describe = partial(_scored, hooks.describe, step, elapsed, scores)
            save_best(journal.path.parent / CHECKPOINTS, network, describe)
        history.append(smoothed)
    network.train()
    journal.write(line)
    journal.sync()
    hooks.picture(journal.path)
    if line.mean_dice is not None:
        per_label = ", ".join(f"{name} {dice:.3f}" for name, dice in line.dice.items() if dice is not None)
        hooks.progress.say(f"step {step}: validation Dice {line.mean_dice:.3f} ({per_label})")
    return time.monotonic() - begun
