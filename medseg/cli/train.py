"""``medseg train``: train one fold of one configuration."""

from __future__ import annotations

import argparse
from dataclasses import replace

from medseg.cli import console, options

HELP = "train one fold of one configuration"
DESCRIPTION = (
    "Train a network on the prepared cases and validate it on whole volumes. The same command goes on where a stopped "
    "one was; SIGTERM and Ctrl-C stop at the next step with a checkpoint."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_run(parser)
    parser.add_argument("--configuration", required=True, metavar="NAME", help="such as 3d_fullres")
    parser.add_argument("--fold", required=True, metavar="0|1|…|all", help="all: on all cases, without validation")
    options.add_length(parser)
    parser.add_argument("--resume", action="store_true", help="insist on a checkpoint to go on from")
    parser.add_argument("--overwrite", action="store_true", help="start anew whatever lies there")
    options.add_seed(parser)
    parser.add_argument(
        "--checkpoint-every", default="5m", metavar="TIME", help="how often training is saved (default: 5m)"
    )
    options.add_loggers(parser)
    options.add_device(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.cli.signals import StopRequest
    from medseg.pipeline.train import train_run
    from medseg.training.schedule import parse_duration

    stop = StopRequest()
    card = train_run(
        arguments.run,
        arguments.configuration,
        arguments.fold,
        replace(
            options.training_of(arguments),
            device=options.device_of(arguments),
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            checkpoint_s=parse_duration(arguments.checkpoint_every),
        ),
        console.make_progress(arguments.progress),
        stop,
    )
    print(f"{card.configuration} fold {card.fold}: {card.steps} steps in {card.training_seconds / 60:.1f} min")
    for label, dice in card.scores.items():
        print(f"  validation Dice {label}: {'none' if dice is None else f'{dice:.4f}'}")
    return 0
