"""``medseg evaluate``: score label files against references, or compare two sets of predictions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.cli import console, options
from medseg.errors import Problem, UsageError

if TYPE_CHECKING:
    from medseg.pipeline.evaluate import EvaluateOptions
    from medseg.records.task import Task

HELP = "score predictions against references"
DESCRIPTION = (
    "Compare label files of the same name and print Dice, surface Dice, HD95 and volume errors per label. Missed and "
    "spurious structures are counted, never dropped. With --compare, test two sets of predictions against each other."
)

LESION_OVERLAP = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--predictions", type=Path, metavar="DIR", help="folder of predicted labels")
    what.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="test two sets of predictions on the same cases: folders, or JSON files that --output wrote",
    )
    parser.add_argument("--references", type=Path, metavar="DIR", help="folder of true labels")
    parser.add_argument("--task", type=Path, metavar="DATASET_JSON", help="names and values of the labels; or a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the scores as JSON, and as CSV beside it")
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        nargs="+",
        default=[],
        metavar="MM",
        help="of the surface Dice (default: 2 mm); LABEL=MM for one label; further numbers are measured as well",
    )
    parser.add_argument("--labels", nargs="+", default=[], metavar="LABEL", help="score only these names or values")
    parser.add_argument(
        "--lesions",
        type=_share,
        nargs="?",
        const=LESION_OVERLAP,
        metavar="SHARE",
        help=f"count lesions; one is found if this share of it is covered (default: {LESION_OVERLAP})",
    )
    parser.add_argument(
        "--probabilities",
        type=Path,
        metavar="DIR",
        help="measure calibration too: output folder of predict --probabilities, or nnU-Net's CASE.npz files",
    )
    parser.add_argument("--worst", type=options.positive, metavar="N", help="also print the N worst rows")
    parser.add_argument("--nnunet-summary", type=Path, metavar="FILE", help="also write nnU-Net's summary.json")
    parser.add_argument("--allow-missing", action="store_true", help="a reference without prediction is no error")
    options.add_workers(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    return _score(arguments) if arguments.compare is None else _compare(arguments)


def _score(arguments: argparse.Namespace) -> int:
    from medseg.evaluation.tables import summary_table, worst_table
    from medseg.pipeline.evaluate import evaluate_files, raise_if_partial, read_task

    missing = [f"--{name}" for name in ("references", "task") if getattr(arguments, name) is None]
    if missing:
        raise UsageError(Problem("E0001", f"the following arguments are required: {', '.join(missing)}"))
    task = read_task(arguments.task)
    scores = evaluate_files(
        arguments.predictions,
        arguments.references,
        task,
        arguments.output,
        _options(arguments, task),
        console.make_progress(arguments.progress),
    )
    console.print_table(summary_table(scores))
    if arguments.worst:
        print("\nworst:")
        console.print_table(worst_table(scores, arguments.worst))
    console.print_problems(problem for problem in scores.problems if problem.severity == "warning")
    raise_if_partial(scores.problems)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from medseg.evaluation.comparison_tables import comparison_table
    from medseg.pipeline.evaluate import compare_files, raise_if_partial, read_task

    for name in ("nnunet_summary", "worst", "probabilities"):
        if getattr(arguments, name) is not None:
            raise UsageError(
                Problem("E0001", f"--{name.replace('_', '-')} with --compare", "", "score each side alone")
            )
    a, b = arguments.compare
    task = None if arguments.task is None else read_task(arguments.task)
    comparison = compare_files(
        (a, b),
        arguments.references,
        task,
        arguments.output,
        _options(arguments, task),
        console.make_progress(arguments.progress),
    )
    print(f"A: {a}\nB: {b}\n{len(comparison.cases)} cases in both")
    for side, cases in (("A", comparison.only_a), ("B", comparison.only_b)):
        if cases:
            print(f"only in {side}, left out: {', '.join(cases)}")
    console.print_table(comparison_table(comparison))
    console.print_problems(problem for problem in comparison.problems if problem.severity == "warning")
    raise_if_partial(comparison.problems)
    return 0


def _options(arguments: argparse.Namespace, task: Task | None) -> EvaluateOptions:
    from medseg.pipeline.evaluate import MEASURES, EvaluateOptions, named_labels
    from medseg.records.scores import Measures

    general = [mm for label, mm in arguments.tolerance if label is None]
    own = [(label, mm) for label, mm in arguments.tolerance if label is not None]
    named = named_labels([label for label, _ in own], task) if task else ()
    measures = Measures(
        tolerance_mm=general[0] if general else MEASURES.tolerance_mm,
        more_tolerances_mm=tuple(dict.fromkeys(general[1:])),
        label_tolerances_mm=dict(zip(named, (mm for _, mm in own), strict=False)),
        lesion_overlap=arguments.lesions,
        labels=named_labels(arguments.labels, task) if task else (),
    )
    return EvaluateOptions(
        measures=measures,
        probabilities=arguments.probabilities,
        nnunet_summary=arguments.nnunet_summary,
        allow_missing=arguments.allow_missing,
        workers=arguments.workers,
    )


def _tolerance(text: str) -> tuple[str | None, float]:
    """``MM`` or ``LABEL=MM``."""
    label, equals, number = text.rpartition("=")
    return (label if equals else None), options.millimetres(number)


def _share(text: str) -> float:
    """A share above 0, up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and up to 1")
    return value
