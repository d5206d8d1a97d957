"""Processing: what is done to predictions beside segmenting, as it was chosen, read from a file, or asked for."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from medseg.errors import Problem, UsageError
from medseg.pipeline.predict_settings import PredictOptions
from medseg.records.base import read_record
from medseg.records.model import PostProcessing, Refinement
from medseg.records.task import Task

NONE, MEAN_FIELD = "none", "mean-field"


def processing(chosen: PostProcessing, options: PredictOptions, task: Task) -> PostProcessing:
    """What cross-validation chose, unless the options say something else.

    Raises:
        UsageError: E0001 a step is for a label that the task does not have.
    """
    steps = chosen if options.postprocessing is None else options.postprocessing
    if options.refinement is not None:
        refinement = None if options.refinement == NONE else options.refinement
        steps = steps.model_copy(update={"refinement": refinement})
    named = {*steps.keep_largest_labels, *sum(steps.keep_largest_groups, ()), *steps.min_mm3, *steps.fill_holes_labels}
    wrong = sorted(index for index in named if not 0 < index < len(task.labels))
    if wrong:
        measured = f"post-processing of label number {', '.join(map(str, wrong))}"
        action = "labels are counted as in dataset.json, the background is 0"
        raise UsageError(Problem("E0001", measured, f"1 to {len(task.labels) - 1}", action))
    return steps


def processing_named(text: str) -> PostProcessing:
    """``none``, or what a ``postprocessing.json`` holds.

    Raises:
        InputError: E0100 no such file.
        IntegrityError: E0711 it does not follow its schema.
    """
    return PostProcessing() if text == NONE else read_record(Path(text), PostProcessing)


def refinement_named(text: str) -> Refinement | None:
    """``none``, ``mean-field``, or ``mean-field:FIELD=NUMBER,…`` with fields of ``Refinement``.

    Raises:
        UsageError: E0001 something else.
    """
    if text == NONE:
        return None
    name, _, fields = text.partition(":")
    values = dict(pair.partition("=")[::2] for pair in fields.split(",")) if fields else {}
    try:
        if name != MEAN_FIELD:
            raise ValueError(name)
        return Refinement.model_validate_strings(values)
    except (ValidationError, ValueError) as error:
        known = f"{NONE}, {MEAN_FIELD} or {MEAN_FIELD}:FIELD=NUMBER,… of {', '.join(Refinement.model_fields)}"
        raise UsageError(Problem("E0001", f"refinement {text}", known, "see medseg predict --help")) from error
