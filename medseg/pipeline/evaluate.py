"""Evaluate: label files against reference files with the labels of a task, and one method against another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg.dataset.declaration import read_declaration, task_of
from medseg.errors import InputError, PartialFailure, Problem, UsageError
from medseg.evaluation.comparison import compare
from medseg.evaluation.comparison_tables import write_comparison
from medseg.evaluation.nnunet_summary import write_nnunet_summary
from medseg.evaluation.probabilities import find_probabilities
from medseg.evaluation.scores import evaluate, find_pairs, write_scores
from medseg.evaluation.targets import targets
from medseg.machine import usable_cores
from medseg.pipeline.run_folder import RunFolder
from medseg.pipeline.validate import TOLERANCE_MM
from medseg.progress import SILENT, Progress
from medseg.records.base import read_record
from medseg.records.comparison import Comparison
from medseg.records.scores import Measures, Scores, Unpaired, UnscoredCase
from medseg.records.task import Task

MEASURES = Measures(tolerance_mm=TOLERANCE_MM)


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What to measure, and what to write besides the scores."""

    measures: Measures = MEASURES
    probabilities: Path | None = None
    nnunet_summary: Path | None = None
    allow_missing: bool = False
    """References without prediction are listed in ``unscored`` and are no problem."""
    workers: int | None = None


def evaluate_files(
    predictions: Path,
    references: Path,
    task: Task,
    output: Path | None = None,
    options: EvaluateOptions = EvaluateOptions(),
    progress: Progress = SILENT,
) -> Scores:
    """Score files of the same name in two folders (or two files); ``output`` also gets JSON, and CSV beside it.

    Returns:
        The scores. References without prediction and pairs that could not be read are in ``problems`` and ``unscored``.

    Raises:
        UsageError: E0001 ``output`` is named like the CSV, or a label is unknown.
        InputError: a path does not exist, no names in common, or no pair could be scored.
    """
    check_output(output)
    check_labels(options.measures, task)
    probabilities = None if options.probabilities is None else find_probabilities(options.probabilities)
    pairs, problems = find_pairs(predictions, references)
    workers = options.workers or usable_cores()
    scores = evaluate(pairs, task, options.measures, workers, progress, probabilities)
    unscored = _unscored(problems, scores)
    if options.allow_missing:
        problems = [problem for problem in problems if problem.code != "E0100"]
    if probabilities is not None:
        problems += [
            Problem(
                "E0100", f"no probabilities in {options.probabilities}", "", "predict with --probabilities", pair[0]
            )
            for pair in pairs
            if pair[0] not in probabilities
        ]
    scores = scores.model_copy(update={"problems": (*problems, *scores.problems), "unscored": unscored})
    if not scores.cases:
        raise InputError(scores.problems)
    if output is not None:
        write_scores(scores, output)
    if options.nnunet_summary is not None:
        write_nnunet_summary(scores, pairs, options.nnunet_summary)
    return scores


def compare_files(
    sides: tuple[Path, Path],
    references: Path | None,
    task: Task | None,
    output: Path | None = None,
    options: EvaluateOptions = EvaluateOptions(),
    progress: Progress = SILENT,
) -> Comparison:
    """Test two sets of predictions on the same cases; each side is a folder of label files or a JSON of scores.

    Raises:
        UsageError: E0001 a folder is to be scored but ``references`` or ``task`` is missing.
        InputError: as ``evaluate_files``, or no case is common to both.
        IncompatibleError: E0802 the sides were not scored in the same way.
    """
    check_output(output)
    scores = []
    for side in sides:
        if side.suffix.lower() == ".json" and not side.is_dir():
            scores.append(read_record(side, Scores))
        elif references is None or task is None:
            found = f"{side} is no JSON of scores"
            raise UsageError(Problem("E0001", found, "--references and --task as well", "or give NAME.json"))
        else:
            scores.append(evaluate_files(side, references, task, None, options, progress))
    a, b = scores
    comparison = compare(a, b, (str(sides[0]), str(sides[1])))
    if output is not None:
        write_comparison(comparison, a, b, output)
    return comparison


_UNPAIRED: dict[str, Unpaired] = {"E0100": "no prediction", "W0147": "no reference"}


def _unscored(pairing: Sequence[Problem], scores: Scores) -> tuple[UnscoredCase, ...]:
    """A status for every case that has no scores, from the problems of pairing and of scoring."""
    found: dict[str, Unpaired] = {p.case: _UNPAIRED.get(p.code, "failed") for p in pairing if p.case is not None}
    found |= {p.case: "failed" for p in scores.problems if p.case is not None}
    return tuple(UnscoredCase(case=case, status=found[case]) for case in sorted(found))


def check_output(output: Path | None) -> None:
    """Refuse an output that would be overwritten by the CSV beside it."""
    if output is not None and output.suffix.lower() == ".csv":
        raise UsageError(Problem("E0001", f"{output.name} is to be the JSON file", "NAME.json; NAME.csv comes beside"))


def check_labels(measures: Measures, task: Task) -> None:
    """Refuse names of labels that the task does not have, before anything is read.

    Raises:
        UsageError: E0001.
    """
    targets(task, (*measures.labels, *measures.label_tolerances_mm))


def named_labels(names: Sequence[str], task: Task) -> tuple[str, ...]:
    """Names of labels and regions, some of which may be given by their value in label files."""
    by_value = {str(label.value): label.name for label in task.foreground}
    known = {target.name for target in targets(task)}
    return tuple(name if name in known else by_value.get(name, name) for name in names)


def raise_if_partial(problems: Sequence[Problem]) -> None:
    """Raise PartialFailure when a pair was missing or could not be scored."""
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise PartialFailure(errors)


def read_task(path: Path) -> Task:
    """The task of a run, or of a ``dataset.json`` (nnU-Net v2 or Decathlon), file or folder, or of a list of cases.

    Raises:
        InputError: E0100 there is none, E0145 it is invalid.
        IntegrityError: E0711 the run's plan is damaged.
    """
    run = RunFolder(path if path.is_dir() else path.parent)
    if run.plan_json.is_file() and path in (run.path, run.plan_json, run.dataset_json):
        return run.read_plan().task
    return task_of(read_declaration(path))
