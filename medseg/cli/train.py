"""``medseg train``: train folds of one configuration."""

from __future__ import annotations

import argparse
from dataclasses import replace

from medseg.cli import console, folds, options
from medseg.cli.launch import launch_of
from medseg.errors import Problem, ResourceError, Stopped, UsageError

HELP = "train folds of one configuration"
DESCRIPTION = (
    "Train a network on the prepared cases and validate it on whole volumes. The same command goes on where a stopped "
    "one was; SIGTERM and Ctrl-C stop at the next step with a checkpoint. Several folds: in turn, or with --gpus side "
    "by side. One fold on several devices: torchrun --nproc-per-node N -m -- medseg train …"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_run(parser)
    parser.add_argument("--configuration", required=True, metavar="NAME", help="such as 3d_fullres")
    folds.add_folds(parser, required=True)
    options.add_length(parser)
    parser.add_argument("--resume", action="store_true", help="insist on a checkpoint to go on from")
    parser.add_argument("--overwrite", action="store_true", help="start anew whatever lies there")
    options.add_seed(parser)
    parser.add_argument(
        "--checkpoint-every", default="5m", metavar="TIME", help="how often training is saved (default: 5m)"
    )
    options.add_loggers(parser)
    options.add_compile(parser)
    options.add_device(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.cli.signals import StopRequest
    from medseg.pipeline.folds import train_folds
    from medseg.training.schedule import parse_duration

    names, launch = folds.folds_of(arguments), launch_of()
    if launch is not None:
        _check_launch(names, arguments)
    side_by_side = folds.side_by_side_of(arguments, add_arguments)
    training = replace(
        options.training_of(arguments),
        device=None if side_by_side else options.device_of(arguments, launch),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        launch=launch,
        checkpoint_s=parse_duration(arguments.checkpoint_every),
    )
    others = launch is not None and launch.rank > 0  # the first process talks
    progress = console.make_progress("none" if others else arguments.progress)
    run, configuration = arguments.run, arguments.configuration
    stop = StopRequest()
    try:
        result = train_folds(run, configuration, names, training, side_by_side, progress, stop)
    except Stopped as stopped:
        if not others:
            raise
        return stopped.exit_code  # the first says so
    except ResourceError:
        if not others or stop.number is None:
            raise
        return 128 + stop.number  # the first was asked to stop as well, and has ended
    for card in () if others else result.cards:
        print(f"{card.configuration} fold {card.fold}: {card.steps} steps in {card.training_seconds / 60:.1f} min")
        for label, dice in card.scores.items():
            print(f"  validation Dice {label}: {'none' if dice is None else f'{dice:.4f}'}")
    return result.exit_code


def _check_launch(names: tuple[str, ...] | None, arguments: argparse.Namespace) -> None:
    """Several processes train one fold together."""
    if names is None or len(names) > 1 or arguments.gpus is not None:
        action = "name one --fold, or start medseg train once with --gpus"
        raise UsageError(Problem("E0001", "several folds in processes that were started together", "one", action))
