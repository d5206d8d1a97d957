"""Recipe: batch size, learning rate and momentum that fit the time there is.

nnU-Net's recipe (large batches, momentum 0.99) is made for 250 000 steps. With a time budget the number of samples is
fixed by the machine, and what is left to choose is how many updates they make. Smaller batches make more of them, down
to nnU-Net's least batch of 2; and momentum 0.9 at the same ratio lr / (1 - momentum) follows the shorter schedule
better. Hippocampus, 800 steps of batch 2 in bfloat16 (5 minutes on two cores), mean Dice of 40 cases: 0.854 with
momentum 0.99, 0.861 with 0.9; nnU-Net's own recipe reached 0.842 after 600 steps of batch 7 (21 minutes, an
earlier measurement on another machine).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from medseg.preparation.store import StoredCase
from medseg.records.base import Record, read_record, write_record
from medseg.records.plan import ConfigurationPlan
from medseg.training.batches import Sampling, make_batch
from medseg.training.checkpoint import newest_checkpoint
from medseg.training.growth import grown, steps_per_planned
from medseg.training.loop import CHECKPOINTS, build, other_training
from medseg.training.loss import region_table
from medseg.training.schedule import Length
from medseg.training.settings import Settings
from medseg.training.step import take_step

NAME = "recipe.json"
LEAST_BATCH = 2
WANTED_STEPS = 10_000  # below, smaller batches are taken
LONG_STEPS = 25_000  # from here on, nnU-Net's momentum
SHORT_MOMENTUM = 0.9
HIGHEST_LR = 10.0  # of a plan


class Recipe(Record):
    """What a length was turned into, once; a resumed training reads it instead of measuring again."""

    request_sha256: str
    length: str
    configuration: ConfigurationPlan
    seconds_per_sample: float | None = None
    reason: str


def fit_to_time(
    configuration: ConfigurationPlan, seconds: float, seconds_per_sample: float, processes: int = 1
) -> ConfigurationPlan:
    """The configuration with the batch size, growth, learning rate and momentum for ``seconds`` of training.

    ``processes`` share each batch, so that none is smaller than their number.
    """
    samples = seconds / seconds_per_sample
    least = min(max(LEAST_BATCH, processes), configuration.batch_size)
    batch = min(configuration.batch_size, max(least, int(samples / WANTED_STEPS)))
    fitted = grown(configuration.model_copy(update={"batch_size": batch}))
    return fit_to_steps(fitted, expected_steps(fitted, seconds, seconds_per_sample))


def expected_steps(configuration: ConfigurationPlan, seconds: float, seconds_per_sample: float) -> float:
    """How many steps fit; the cost of a sample goes with its voxels."""
    return seconds / (seconds_per_sample * configuration.batch_size) * steps_per_planned(configuration)


def fit_to_steps(configuration: ConfigurationPlan, steps: float) -> ConfigurationPlan:
    """The configuration with the learning rate and momentum for this many steps."""
    training = configuration.training
    if steps >= LONG_STEPS or training.momentum <= SHORT_MOMENTUM:
        return configuration
    ratio = (1 - SHORT_MOMENTUM) / (1 - training.momentum)
    changes = {"momentum": SHORT_MOMENTUM, "initial_lr": min(HIGHEST_LR, training.initial_lr * ratio)}
    return configuration.model_copy(update={"training": training.model_copy(update=changes)})


def settle(settings: Settings, cases: Sequence[StoredCase], folder: Path, processes: int = 1) -> tuple[Settings, str]:
    """Settings of the recipe, and the sentence that says so: ``reference`` keeps what is planned.

    For ``fast``, the first call measures a few training steps if the length is a time, and commits ``recipe.json``;
    later ones read it. A training that was begun keeps its recipe when its length is changed.

    Raises:
        IncompatibleError: E0802 a training with other settings was begun in ``folder``; its recipe stays.
    """
    if settings.recipe == "reference":
        return settings, "the plan's recipe"
    request, path = settings.sha256(cases), folder / NAME
    recipe = read_record(path, Recipe) if path.is_file() else None
    begun = newest_checkpoint(folder / CHECKPOINTS) is not None
    fits = recipe is not None and recipe.request_sha256 == request and (begun or recipe.length == str(settings.length))
    if recipe is None or not fits:
        if begun:
            raise other_training()
        recipe = _choose(settings, cases, request, processes)
        write_record(path, recipe)
    return replace(settings, configuration=recipe.configuration), recipe.reason


def _choose(settings: Settings, cases: Sequence[StoredCase], request: str, processes: int) -> Recipe:
    planned, length = settings.configuration, settings.length
    if length.seconds is None:
        assert length.steps is not None
        fitted, seconds_per_sample = fit_to_steps(grown(planned), length.steps), None
        reason = f"{length.steps} steps of batch {fitted.batch_size}, {_rate(fitted)}"
    else:
        batch_size = min(LEAST_BATCH, planned.batch_size)
        seconds_per_sample = _step_seconds(settings, cases, batch_size) / batch_size / processes
        fitted = fit_to_time(planned, length.seconds, seconds_per_sample, processes)
        steps = expected_steps(fitted, length.seconds, seconds_per_sample)
        reason = (
            f"about {steps:.0f} steps of batch {fitted.batch_size} (planned: {planned.batch_size}), {_rate(fitted)}: "
            f"a sample takes {seconds_per_sample:.2g} s"
        )
    return Recipe(
        request_sha256=request,
        length=str(length),
        configuration=fitted,
        seconds_per_sample=seconds_per_sample,
        reason=reason,
    )


def _rate(configuration: ConfigurationPlan) -> str:
    training = configuration.training
    rate = f"momentum {training.momentum:g}, learning rate from {training.initial_lr:g}"
    sizes = [*(phase.patch_size for phase in training.growth), configuration.patch_size]
    grows = ", patch " + " → ".join("×".join(map(str, size)) for size in sizes) if training.growth else ""
    return rate + grows


def _step_seconds(settings: Settings, cases: Sequence[StoredCase], batch_size: int) -> float:
    """Seconds of a training step on a network that is thrown away: the fastest of two after one to warm up."""
    configuration = settings.configuration.model_copy(update={"batch_size": batch_size})
    settings = replace(settings, configuration=configuration, length=Length(steps=3))
    network, optimizer = build(settings)
    sampling, regions = Sampling.of(configuration, settings.task, settings.seed), region_table(settings.task)
    best = float("inf")
    for step in range(3):
        batch = make_batch(cases, sampling, step)
        begun = time.monotonic()
        take_step(network, optimizer, batch, configuration.training.initial_lr, settings, regions)
        if settings.device.torch_device.type == "cuda":
            torch.cuda.synchronize()
        if step > 0:
            best = min(best, time.monotonic() - begun)
    return best
