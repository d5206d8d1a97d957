"""Evaluate: label files against reference files, with the labels that a task declares."""

from __future__ import annotations

from pathlib import Path

from medseg.dataset.declaration import read_declaration, task_of
from medseg.errors import InputError, PartialFailure, Problem, UsageError
from medseg.evaluation.scores import evaluate, find_pairs, write_scores
from medseg.machine import usable_cores
from medseg.pipeline.validate import TOLERANCE_MM
from medseg.progress import SILENT, Progress
from medseg.records.scores import Scores
from medseg.records.task import Task


def evaluate_files(
    predictions: Path,
    references: Path,
    task: Task,
    output: Path | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> Scores:
    """Score files of the same name in two folders (or two files); ``output`` also gets JSON, and CSV beside it.

    Returns:
        The scores. References without prediction and pairs that could not be read are in ``problems``.

    Raises:
        UsageError: E0001 ``output`` is named like the CSV.
        InputError: a path does not exist, no names in common, or no pair could be scored.
    """
    if output is not None and output.suffix.lower() == ".csv":
        raise UsageError(Problem("E0001", f"{output.name} is to be the JSON file", "NAME.json; NAME.csv comes beside"))
    pairs, problems = find_pairs(predictions, references)
    scores = evaluate(pairs, task, tolerance_mm, workers or usable_cores(), progress)
    scores = scores.model_copy(update={"problems": (*problems, *scores.problems)})
    if not scores.cases:
        raise InputError(scores.problems)
    if output is not None:
        write_scores(scores, output)
    return scores


def raise_if_partial(scores: Scores) -> None:
    """Raise PartialFailure when a pair was missing or could not be scored."""
    errors = [problem for problem in scores.problems if problem.severity == "error"]
    if errors:
        raise PartialFailure(errors)


def read_task(path: Path) -> Task:
    """The task of a ``dataset.json`` (nnU-Net v2 or Decathlon), given as file or as its folder.

    Raises:
        InputError: E0100 there is none, E0145 it is invalid.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name != "dataset.json":
        raise InputError(Problem("E0145", f"{path.name} is not called dataset.json", "", "give a dataset.json"))
    if not path.exists():
        raise InputError(Problem("E0100", f"{path} does not exist", "", "check the path"))
    return task_of(read_declaration(folder))
