"""nnU-Net's ``postprocessing.json``: what it found by cross-validation to remove from predictions.

Beside it lies a pickle of the same, which is a program and is not read here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medseg.errors import InputError, IntegrityError, Problem
from medseg.records.model import PostProcessing
from medseg.records.task import Task

MAX_BYTES = 16 * 2**20
FUNCTION = "remove_all_but_largest_component_from_segmentation"


def read_postprocessing(path: Path, task: Task) -> PostProcessing:
    """Read the file. A step keeps the largest component of a label, of a region, or of several labels together.

    Raises:
        IntegrityError: E0711 not JSON, or not what nnU-Net writes.
        InputError: E0162 another function, or another background.
    """
    value = _read(path)
    if not isinstance(value, dict):
        raise _wrong("the file is no object")
    functions, arguments = value.get("postprocessing_fns"), value.get("postprocessing_kwargs")
    if not isinstance(functions, list) or not isinstance(arguments, list) or len(functions) != len(arguments):
        raise _wrong("postprocessing_fns and postprocessing_kwargs are no lists of one length")
    for function, given in zip(functions, arguments, strict=True):
        known = isinstance(given, dict) and set(given) <= {"labels_or_regions", "background_label"}
        if function != FUNCTION or not known or given.get("background_label", 0) != 0:
            measured = f"{path.name}: {str(function)[:80]} with {str(given)[:80]}"
            raise InputError(Problem("E0162", measured, FUNCTION, "import with --no-postprocessing"))
    groups = [_classes(given.get("labels_or_regions"), task) for given in arguments]
    return _steps(groups, task)


def _steps(groups: list[tuple[int, ...]], task: Task) -> PostProcessing:
    """All foreground, then single labels, where that is the order; labels do not touch one another's voxels."""
    everything = tuple(range(1, len(task.labels)))
    whole = bool(groups) and groups[0] == everything and len(everything) > 1
    rest = groups[1:] if whole else groups
    evidence = ("Chosen by nnU-Net's cross-validation.",)
    if all(len(group) == 1 for group in rest):
        labels = tuple(group[0] for group in rest)
        return PostProcessing(keep_largest_foreground=whole, keep_largest_labels=labels, evidence=evidence)
    return PostProcessing(keep_largest_foreground=whole, keep_largest_groups=tuple(rest), evidence=evidence)


def _classes(value: Any, task: Task) -> tuple[int, ...]:
    """Class indices of a label value, a region, or a list of both."""
    items = value if isinstance(value, list) else [value]
    values = [inner for item in items for inner in (item if isinstance(item, list) else [item])]
    if not values or any(type(v) is not int or v == 0 or v not in task.values for v in values):
        raise _wrong(f"labels_or_regions {str(value)[:80]} are no labels of the data set")
    return tuple(sorted({task.values.index(v) for v in values}))


def _read(path: Path) -> Any:
    """JSON as nnU-Net writes it: scores may be NaN."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _wrong(f"larger than {MAX_BYTES >> 20} MiB")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(Problem("E0106", f"cannot read {path}: {error.strerror}", "", "check the file")) from error
    except (ValueError, RecursionError) as error:
        raise _wrong(f"not JSON: {str(error)[:80]}") from error


def _wrong(measured: str) -> IntegrityError:
    action = "get the file again, or import with --no-postprocessing"
    return IntegrityError(Problem("E0711", f"postprocessing.json: {measured}", "", action))
