"""``medseg preprocess``: prepare all cases of a planned data set."""

from __future__ import annotations

import argparse

from medseg.cli import console, options

HELP = "prepare all cases of a planned data set"
DESCRIPTION = (
    "Orient, crop, normalise and resample every case for one configuration, or for all of the plan. Finished cases are "
    "kept; changing the batch size or the network redoes nothing."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_run(parser)
    parser.add_argument("--configuration", metavar="NAME", help="such as 3d_fullres (default: all of the plan)")
    options.add_workers(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--store",
        choices=["float32", "float16"],
        help="number type of images on disk (default: that of the cases that are there, else float32)",
    )
    group.add_argument("--verify", action="store_true", help="prepare nothing; read all prepared cases and check them")


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.pipeline.preprocess import preprocess_run, verify_run

    names = [arguments.configuration] if arguments.configuration else []
    progress = console.make_progress(arguments.progress)
    if arguments.verify:
        for name, cases in verify_run(arguments.run, names, progress).items():
            print(f"{name}: {cases} cases are as they were written")
        return 0
    for name, manifest in preprocess_run(arguments.run, names, arguments.workers, progress, arguments.store).items():
        print(f"{name}: {len(manifest.cases)} cases prepared")
    return 0
