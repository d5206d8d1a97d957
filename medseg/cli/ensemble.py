"""``medseg ensemble``: join predictions of several models."""

from __future__ import annotations

import argparse
from pathlib import Path

from medseg.cli import console

HELP = "join predictions of several models"
DESCRIPTION = (
    "Average the probabilities of predictions of the same images (medseg predict --probabilities, or nnU-Net's .npz) "
    "and write the labels that they give; or let label files vote."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="predictions, two folders or more")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUTPUT", help="folder of the label files")
    parser.add_argument("--vote", action="store_true", help="majority of the label files instead of probabilities")
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[], metavar="W", help="of the folders (default: equal)"
    )
    parser.add_argument(
        "--task",
        type=Path,
        metavar="DATASET_JSON",
        help="labels, of a data set or run; for regions and .npz",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.cli.signals import StopRequest
    from medseg.errors import InputError, PartialFailure
    from medseg.pipeline.ensemble import EnsembleOptions, ensemble_folders
    from medseg.pipeline.evaluate import read_task

    stop = StopRequest()
    task = None if arguments.task is None else read_task(arguments.task)
    options = EnsembleOptions("vote" if arguments.vote else "probabilities", tuple(arguments.weights), task)
    progress = console.make_progress(arguments.progress)
    manifest = ensemble_folders(arguments.folders, arguments.output, options, progress, stop)
    console.print_failures(manifest)
    done = len(manifest.cases) - len(manifest.failed)
    print(f"{done} joined, {len(manifest.failed)} failed: {arguments.output}")
    if not manifest.failed:
        return 0
    return PartialFailure.exit_code if done else InputError.exit_code
