"""``medseg run``: everything from a data set to scored predictions."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from medseg.cli import console, folds, options, train
from medseg.cli.launch import refuse_launch

HELP = "check, plan, preprocess, train, predict, evaluate, report in one go"
DESCRIPTION = (
    "Check, plan and preprocess a data set, train and validate a model, then segment and score the data set's held-out "
    "images (imagesTs, labelsTs) if there are any, and write RUN/report.html. The same command goes on where a stopped "
    "one was."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder, or list of cases")
    options.add_run(parser)
    options.add_length(parser)
    parser.add_argument("--configuration", metavar="NAME", help="such as 2d (default: 3d_fullres, 2d for 2D images)")
    folds.add_folds(parser, required=False)
    options.add_preset(parser)
    options.add_memory(parser)
    options.add_network(parser)
    options.add_transfer(parser)
    options.add_loggers(parser)
    options.add_compile(parser)
    options.add_seed(parser)
    options.add_workers(parser)
    options.add_device(parser)
    options.add_splits(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.cli.signals import StopRequest
    from medseg.errors import PartialFailure
    from medseg.evaluation.scores import summary_table
    from medseg.pipeline.device_plan import Request
    from medseg.pipeline.plan import PlanOptions
    from medseg.pipeline.run import RunOptions, run_all

    refuse_launch("run")
    stop = StopRequest()
    seconds, device = options.seconds_of(arguments), options.device_of(arguments)
    request, variant = Request(arguments.memory, seconds, device), options.variant_of(arguments)
    result = run_all(
        arguments.dataset,
        arguments.run,
        RunOptions(
            training=options.training_of(arguments),
            configuration=arguments.configuration,
            folds=folds.folds_of(arguments),
            side_by_side=folds.side_by_side_of(arguments, train.add_arguments),
            device=device,
            workers=arguments.workers,
            plan=PlanOptions(
                request,
                options.splits_of(arguments),
                preset=arguments.preset,
                variant=variant,
                begin_from=arguments.begin_from,
                asked=options.asked_of(arguments),
            ),
        ),
        console.make_progress(arguments.progress),
        stop,
    )
    for card in result.cards:
        dice = ", ".join(f"{label} {value:.4f}" for label, value in card.scores.items() if value is not None)
        print(f"{card.configuration} fold {card.fold}: {card.steps} steps, validation Dice: {dice or 'none'}")
    if result.predictions is not None:
        console.print_failures(result.predictions)
    if result.held_out is not None:
        console.print_problems(result.held_out.problems)
        print("\nheld-out images:")
        console.print_table(summary_table(result.held_out))
    print()
    if result.pictures:
        print(f"pictures: {result.pictures[0].parent}")
    if result.report is not None:
        print(f"report, to open in a browser: {result.report}")
    model = shlex.quote(str(arguments.run))
    print(f"to segment more: medseg predict --model {model} -i IMAGES -o PREDICTIONS")
    return 0 if result.complete else PartialFailure.exit_code
