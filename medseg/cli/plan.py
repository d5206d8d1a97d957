"""``medseg plan``: measure a data set and decide how to segment it."""

from __future__ import annotations

import argparse
from pathlib import Path

from medseg.cli import console, options

HELP = "measure a data set and configure the networks"
DESCRIPTION = (
    "Measure a data set and write fingerprint.json, plan.json and splits.json into the run folder. plan.json may be "
    "edited by hand; every command checks it when it reads it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="nnU-Net v2 or Decathlon folder")
    options.add_run(parser)
    options.add_memory(parser)
    parser.add_argument("--splits", type=Path, metavar="FILE", help="folds to use, also nnU-Net's splits_final.json")
    parser.add_argument("--explain", action="store_true", help="print the reason of every decision")
    parser.add_argument("--overwrite", action="store_true", help="replace a plan that was edited or made otherwise")


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.pipeline.plan import PlanOptions, plan_run

    plan = plan_run(
        arguments.dataset,
        arguments.run,
        PlanOptions(arguments.memory, arguments.splits, arguments.overwrite),
        console.make_progress(arguments.progress),
    )
    rows = [("configuration", "spacing (mm)", "patch", "batch", "stages")]
    for configuration in plan.configurations.values():
        spacing = " × ".join(f"{s:.3g}" for s in configuration.spacing_mm)
        patch = " × ".join(str(p) for p in configuration.patch_size)
        stages = str(len(configuration.network.features))
        rows.append((configuration.name, spacing, patch, str(configuration.batch_size), stages))
    console.print_table(rows)
    if arguments.explain:
        for reason in plan.reasons:
            print(f"{reason.topic}: {reason.text}")
    return 0
