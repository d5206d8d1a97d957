"""``medseg plan``: measure a data set and decide how to segment it, or decide from measurements alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.cli import console, options
from medseg.errors import Problem, UsageError

if TYPE_CHECKING:
    from medseg.records.plan import Plan

HELP = "measure a data set and configure the networks"
DESCRIPTION = (
    "Measure a data set and write fingerprint.json, plan.json and splits.json into the run folder. plan.json may be "
    "edited by hand; every command checks it when it reads it. With --fingerprint and --task instead of DATASET and "
    "--run, plan without the images, and write the plan where --output and --nnunet-plans say."
)

OF_IMAGES = (*options.SPLITS, *options.TRANSFER)  # options that need a data set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("dataset", type=Path, nargs="?", metavar="DATASET", help="folder, or list of cases")
    parser.add_argument("--run", type=Path, metavar="RUN", help="run folder: everything is kept here")
    options.add_preset(parser)
    options.add_memory(parser)
    parser.add_argument("--time-budget", metavar="TIME", help="training time to plan for, such as 20m (preset medseg)")
    options.add_device(parser)
    parser.add_argument("--explain", action="store_true", help="print the reason of every decision")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="print what differs from another plan or run")
    parser.add_argument("--overwrite", action="store_true", help="replace a plan that was edited or made otherwise")
    options.add_network(parser)
    options.add_transfer(parser)
    options.add_splits(parser, "--folds")
    group = parser.add_argument_group("without images")
    group.add_argument("--fingerprint", type=Path, metavar="FILE", help="ours, or nnU-Net's dataset_fingerprint.json")
    group.add_argument("--task", type=Path, metavar="DATASET_JSON", help="channels and labels")
    group.add_argument("--output", type=Path, metavar="FILE", help="write the plan")
    group.add_argument("--nnunet-plans", type=Path, metavar="FILE", help="write the plan as nnU-Net v2's plans.json")


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.pipeline.device_plan import Request
    from medseg.pipeline.plan import PlanFiles, PlanOptions, plan_files, plan_run, read_plan
    from medseg.planning.compare import plan_differences

    other = None if arguments.compare is None else read_plan(arguments.compare)
    request = Request(arguments.memory, options.seconds_of(arguments), options.device_if_asked(arguments))
    splits, variant = options.splits_of(arguments), options.variant_of(arguments)
    model, asked = arguments.begin_from, options.asked_of(arguments)
    wanted = PlanOptions(request, splits, arguments.overwrite, arguments.preset, variant, model, asked)
    if arguments.fingerprint is not None:
        _check_form(arguments, needed=["fingerprint", "task"], foreign=["dataset", "run", "overwrite", *OF_IMAGES])
        files = PlanFiles(arguments.fingerprint, arguments.task, arguments.output, arguments.nnunet_plans)
        plan = plan_files(files, wanted)
    else:
        _check_form(arguments, needed=["dataset", "run"], foreign=["task", "output", "nnunet_plans"])
        plan = plan_run(arguments.dataset, arguments.run, wanted, console.make_progress(arguments.progress))
    _print_configurations(plan)
    if arguments.run is not None:
        _print_splits(arguments.run)
    if arguments.explain:
        for reason in plan.reasons:
            print(f"{reason.topic}: {reason.text}")
    if other is not None:
        rows = plan_differences(plan, other)
        print()
        console.print_table([("difference", "this plan", str(arguments.compare)), *rows] if rows else [("same plan",)])
    return 0


def _check_form(arguments: argparse.Namespace, needed: list[str], foreign: list[str]) -> None:
    """Refuse a mixture of the command's two forms."""
    missing = [_option(name) for name in needed if getattr(arguments, name) is None]
    mixed = [_option(name) for name in foreign if getattr(arguments, name)]
    if missing or mixed:
        measured = f"missing: {', '.join(missing)}" if missing else f"not with {_option(needed[0])}: {', '.join(mixed)}"
        expected = "either DATASET --run RUN, or --fingerprint FILE --task DATASET_JSON"
        raise UsageError(Problem("E0001", measured, expected, "see medseg plan --help"))


def _option(name: str) -> str:
    special = {"dataset": "DATASET", "begin_from": "--from"}
    return special.get(name, f"--{name.replace('_', '-')}")


def _print_configurations(plan: Plan) -> None:
    from medseg.planning.networks import choice_of

    rows = [("configuration", "spacing (mm)", "patch", "batch", "network", "stages")]
    for configuration in plan.configurations.values():
        spacing = " × ".join(f"{s:.3g}" for s in configuration.spacing_mm)
        patch = " × ".join(str(p) for p in configuration.patch_size)
        stages = str(len(configuration.network.features))
        network = choice_of(configuration.network)
        rows.append((configuration.name, spacing, patch, str(configuration.batch_size), network, stages))
    console.print_table(rows)


def _print_splits(run: Path) -> None:
    """How many cases of each fold validate, and how many of them have each label."""
    from medseg.dataset.splits import split_table
    from medseg.pipeline.run_folder import RunFolder
    from medseg.pipeline.split import labels_present

    folder = RunFolder(run)
    task = folder.read_plan().task
    splits = folder.read_splits()
    print(f"\nvalidation cases of each fold ({splits.reason or 'given in a file'})")
    console.print_table(split_table(splits, labels_present(folder.read_fingerprint(), task), task))
