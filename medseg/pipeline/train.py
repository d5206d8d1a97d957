"""Train: one fold of one configuration in a run folder, from prepared cases to a model with its validation scores."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from medseg import __version__
from medseg.artefacts import owned
from medseg.errors import IncompatibleError, Problem, UsageError
from medseg.inference.model import Model, load_model
from medseg.networks.device import DTYPES, Device, choose_device
from medseg.networks.weights import save_weights
from medseg.pipeline.fold_cases import WATCHED_CASES, cases_of, fold_of, in_memory, spread, store_of, watcher
from medseg.pipeline.history import training_history
from medseg.pipeline.run_folder import RunFolder, configuration_of
from medseg.pipeline.transfer import begins_from, initial_of
from medseg.pipeline.validate import FOLDER as VALIDATION
from medseg.pipeline.validate import finish_fold, validate_fold
from medseg.progress import SILENT, Progress, never
from medseg.records.base import read_record, write_record
from medseg.records.model import CARD, WEIGHTS, ModelCard
from medseg.records.plan import ConfigurationPlan, Plan
from medseg.records.run import Fold
from medseg.records.task import Task
from medseg.reporting.figures import training_picture
from medseg.training.checkpoint import newest_checkpoint
from medseg.training.journal import NAME as LOG
from medseg.training.launch import Launch, joined
from medseg.training.loggers import Logged, check_loggers, open_loggers
from medseg.training.loop import CHECKPOINTS, Hooks, Trained, too_short, train
from medseg.training.recipe import NAME as RECIPE
from medseg.training.recipe import settle
from medseg.training.schedule import Length
from medseg.training.settings import Compile, Settings

PICTURE = "progress.png"
RecipeName = Literal["reference", "fast"]


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How to train: for ``seconds``, ``epochs``, ``iterations``, or the plan's epochs.

    ``recipe`` "fast" fits patches, batch size, learning rate and momentum to that length, "reference" takes the plan's;
    None is the first for ``seconds`` and the second for the others. ``resume`` insists on a checkpoint; ``overwrite``
    starts anew whatever is there. ``launch`` tells which of several processes this one is that train the fold
    together; all of them call the same. ``loggers`` are "tensorboard", "mlflow" or both. ``compile`` is for
    ``torch.compile``, see ``Settings``.
    """

    seconds: float | None = None
    epochs: int | None = None
    iterations: int | None = None
    recipe: RecipeName | None = None
    device: Device | None = None
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    launch: Launch | None = None
    checkpoint_s: float = 300.0
    loggers: tuple[str, ...] = ()
    compile: Compile = "auto"


def train_run(
    run: Path,
    configuration_name: str,
    fold_name: str,
    options: TrainOptions | None = None,
    progress: Progress = SILENT,
    stop_signal: Callable[[], int | None] = never,
) -> ModelCard:
    """Train one fold and validate it on whole volumes; the model folder ``models/CONFIGURATION/fold_K`` is complete.

    The same command goes on where a killed one stopped; a finished fold is left as it is.

    Args:
        run: a run folder with a plan and the prepared configuration.
        configuration_name: for instance ``3d_fullres``.
        fold_name: "0", "1" … or "all" for one model of all cases, without validation.
        options: seconds or epochs, device, seed.
        progress: told of steps and validations.
        stop_signal: asked after every step; a signal number stops the training with a checkpoint.

    Returns:
        The model's card; where several processes train together, the first alone knows scores and weights.

    Raises:
        UsageError: E0001 no such configuration, fold or logger; E0804 ``resume`` and nothing to resume.
        IncompatibleError: E0801, E0802 the prepared data set is not there or not of this plan, or the fold holds a
            training with other settings; E0805 the first stage of a cascade is not trained.
        IntegrityError: E0701 a prepared case is damaged.
        ResourceError: E0602 another process of the training is gone.
        Stopped: by ``stop_signal``.
    """
    options = options or TrainOptions()
    check_loggers(options.loggers)
    folder = RunFolder(run)
    plan = folder.read_plan()
    configuration = configuration_of(plan, configuration_name)
    store = store_of(folder, plan, configuration)
    fold = fold_of(folder, fold_name, store)
    device = options.device or choose_device()
    target = folder.fold(configuration_name, fold_name)
    mine = owned(target, VALIDATION, f"{CHECKPOINTS}/*")
    with joined(options.launch, device.torch_device) as world, mine if world.first else nullcontext():
        device = replace(device, dtype=DTYPES[world.text(device.precision)])  # the first's self-test is for all
        initial = initial_of(folder, plan, configuration_name, fold_name)
        settings = replace(_settings(options, plan.task, configuration, device), initial=initial)
        if world.first:
            _make_way(target, options)
        watched_ids = spread(fold.val, WATCHED_CASES)
        needed = (*fold.train, *watched_ids)
        found = world.in_turn(lambda: cases_of(folder, plan, configuration, needed, device, progress, stop_signal))
        cases = in_memory([found[case] for case in fold.train], world.local_size)
        watched = [found[case] for case in watched_ids]
        finished = _finished(target, settings.sha256(cases), settings.length, progress)
        if finished is not None:
            return finished
        if plan.origin is not None and initial is not None:
            progress.say(begins_from(plan.origin, configuration_name, fold_name))
        fitted, recipe = world.in_turn(lambda: settle(settings, cases, target, world.size))
        progress.say(f"{device.torch_device}, {device.precision} ({device.reason}); {recipe}")
        describe = partial(_card, plan, fold_name, fitted, settings.sha256(cases))
        if not world.first:
            trained = train(cases, fitted, target, Hooks(stop_signal=stop_signal), world)
            return describe(trained.steps, trained.seconds, "")
        watch = watcher(watched, configuration, plan.task, device) if watched else None
        observers = open_loggers(options.loggers, _logged(run, target, fitted))
        hooks = Hooks(watch, _draw, progress, stop_signal, describe, observers)
        trained = train(cases, fitted, target, hooks, world)
        return _completed(folder, target, fold, trained, device, hooks)


def _completed(
    folder: RunFolder, target: Path, fold: Fold, trained: Trained, device: Device, hooks: Hooks
) -> ModelCard:
    """The card of a fold whose training is over, written when all else is: weights, curves and validation."""
    assert hooks.describe is not None
    _draw(target / LOG)
    (target / CARD).unlink(missing_ok=True)  # of a training that went on: a card vouches for the weights beside it
    card = hooks.describe(trained.steps, trained.seconds, save_weights(target / WEIGHTS, trained.network))
    if fold.val:
        card = _validated(folder, card, trained.network, fold, device, hooks.progress, hooks.stop_signal)
        finish_fold(folder, card)
    else:
        write_record(target / CARD, card)  # last: a fold with a card is finished
    return card


def _settings(options: TrainOptions, task: Task, configuration: ConfigurationPlan, device: Device) -> Settings:
    epochs = options.epochs or configuration.training.epochs
    steps = options.iterations or epochs * configuration.training.iterations_per_epoch
    length = Length(steps=steps) if options.seconds is None else Length(seconds=options.seconds)
    recipe = options.recipe or ("reference" if options.seconds is None else "fast")
    checkpoint_s, compile_it = options.checkpoint_s, options.compile
    return Settings(task, configuration, length, device, options.seed, checkpoint_s, recipe, compile=compile_it)


def _logged(run: Path, target: Path, fitted: Settings) -> Logged:
    """Where loggers write, and what they tell of the training besides its journal."""
    configuration, training = fitted.configuration, fitted.configuration.training
    parameters = {
        "configuration": configuration.name,
        "length": str(fitted.length),
        "recipe": fitted.recipe,
        "seed": str(fitted.seed),
        "patch size": " × ".join(str(n) for n in configuration.patch_size),
        "spacing mm": " × ".join(f"{n:g}" for n in configuration.spacing_mm),
        "batch size": str(configuration.batch_size),
        "loss": training.loss,
        "initial learning rate": f"{training.initial_lr:g}",
        "device": f"{fitted.device.torch_device}, {fitted.device.dtype}",
        "medseg": __version__,
    }
    return Logged(run, target, f"{configuration.name}/{target.name}", parameters)


def _card(
    plan: Plan, fold: str, fitted: Settings, settings_sha256: str, steps: int, seconds: float, weights_sha256: str
) -> ModelCard:
    """What a model folder says of weights after ``steps`` and ``seconds`` of training."""
    return ModelCard(
        configuration=fitted.configuration.name,
        fold=fold,
        plan=plan,
        weights_sha256=weights_sha256,
        medseg_version=__version__,
        torch_version=torch.__version__,
        settings_sha256=settings_sha256,
        batch_size=fitted.configuration.batch_size,
        training=fitted.configuration.training,
        steps=steps,
        training_seconds=round(seconds, 1),
        length=str(fitted.length),
        orientation=plan.orientation,
    )


def _validated(
    folder: RunFolder,
    card: ModelCard,
    network: nn.Module,
    fold: Fold,
    device: Device,
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> ModelCard:
    """The card with the scores of the fold's validation cases."""
    plan, models = card.plan, folder.models(card.configuration)
    first = _first_stage(folder, plan.configurations[card.configuration], card.fold, device)
    model = Model(models, (card,), (network,), device, first)
    scores = validate_fold(folder, model, fold.val, progress, stop_signal)
    return card.model_copy(update={"scores": scores})


def _first_stage(folder: RunFolder, configuration: ConfigurationPlan, fold: str, device: Device) -> Model | None:
    """The first stage's model of the same fold: the one that did not train on the cases to validate."""
    first = configuration.previous_stage
    return None if first is None else load_model(folder.models(first), device, first, (fold,))


def _make_way(target: Path, options: TrainOptions) -> None:
    checkpoints = target / CHECKPOINTS
    if options.overwrite:
        for path in (target / CARD, target / WEIGHTS, target / LOG, target / RECIPE):
            path.unlink(missing_ok=True)
        shutil.rmtree(checkpoints, ignore_errors=True)
    elif options.resume and not (target / CARD).is_file() and newest_checkpoint(checkpoints) is None:
        raise UsageError(Problem("E0804", f"no checkpoint in {target}", "one to resume from", "leave out --resume"))


def _finished(target: Path, settings: str, length: Length, progress: Progress) -> ModelCard | None:
    """The card of a finished training of these settings and this length; None if there is something to do.

    A finished training is not overwritten; with a greater length it goes on.
    """
    if not (target / CARD).is_file():
        return None
    card = read_record(target / CARD, ModelCard)
    if card.settings_sha256 != settings:
        found = f"{target.name} holds a finished training with other settings"
        raise IncompatibleError(Problem("E0802", found, "", "use another run, or train --overwrite"))
    if card.length == str(length):
        progress.say(f"{target.name} is finished: {card.steps} steps")
        return card
    if length.fraction(card.steps, card.training_seconds) >= 1:
        raise too_short(f"{card.steps} steps in {card.training_seconds:.0f} s", length)
    newest = newest_checkpoint(target / CHECKPOINTS)
    if newest is None or newest.state.step < card.steps:
        found = f"the last checkpoint of {target.name} is gone: its training cannot go on"
        raise IncompatibleError(Problem("E0802", found, "", "train --overwrite to start anew"))
    return None


def _draw(journal: Path) -> None:
    """Draw ``progress.png`` beside a journal."""
    training_picture(journal.with_name(PICTURE), training_history(journal))
