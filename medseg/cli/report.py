"""``medseg report``: one HTML page about a run or a folder of predictions."""

from __future__ import annotations

import argparse
from pathlib import Path

from medseg.cli import console, options
from medseg.errors import Problem, UsageError

HELP = "one HTML page: data, plan, training, scores, pictures"
DESCRIPTION = (
    "Write one HTML file that needs nothing else and loads nothing from anywhere: data, plan, training curves, scores, "
    "the worst cases first with pictures and a viewer, and what to look at. It holds images and case names: treat it "
    "like the data."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="RUN", help="a run, finished or not")
    what.add_argument("--predictions", type=Path, metavar="DIR", help="a folder that medseg predict -o wrote")
    parser.add_argument("--model", type=Path, metavar="RUN_OR_MODEL", help="with --predictions: where they come from")
    parser.add_argument("--images", type=Path, metavar="DIR", help="with --predictions: their images, for pictures")
    parser.add_argument("--references", type=Path, metavar="DIR", help="with --predictions: true labels, for scores")
    parser.add_argument("--pictures", type=options.count, default=6, metavar="N", help="cases to show (default: 6)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: report.html in the folder")


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    progress = console.make_progress(arguments.progress)
    if arguments.predictions is not None:
        from medseg.pipeline.report_predictions import PredictionReportOptions, report_predictions

        known = PredictionReportOptions(arguments.model, arguments.images, arguments.references, arguments.pictures)
        page = report_predictions(arguments.predictions, arguments.output, known, progress)
    else:
        from medseg.pipeline.report import report_run

        for name in ("model", "images", "references"):
            if getattr(arguments, name) is not None:
                raise UsageError(Problem("E0001", f"--{name} with --run", "", "use it with --predictions"))
        page = report_run(arguments.run, arguments.output, arguments.pictures, progress)
    print(page)
    return 0
