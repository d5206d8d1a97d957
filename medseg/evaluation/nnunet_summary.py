"""Scores in the layout of nnU-Net's ``summary.json``, for tools that read it.

Facts from nnU-Net 2.8.1, ``evaluation/evaluate_predictions.py``: regions are scored where the task has them, else
labels; keys are label values as text, "(1, 2)" for a region; a structure that is absent on both sides has NaN, which
the file holds as such (no strict JSON); ``mean`` leaves NaN out, ``foreground_mean`` does not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.artefacts import commit
from medseg.evaluation.pairs import Pair
from medseg.records.scores import CaseScore, Scores

_NAN = float("nan")


def write_nnunet_summary(scores: Scores, pairs: Sequence[Pair], path: Path) -> str:
    """Commit the layout of ``nnunet_summary`` at ``path`` and return the file's SHA-256."""
    return commit(path, json.dumps(nnunet_summary(scores, pairs), indent=4, sort_keys=True).encode())


def nnunet_summary(scores: Scores, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What nnU-Net's ``compute_metrics_on_folder`` saves for the scored ones of ``pairs``, in order of file names."""
    kind = "region" if any(summary.kind == "region" for summary in scores.labels) else "label"
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for row in scores.cases:
        if row.kind == kind:
            rows.setdefault(row.case, {})[_key(row.values)] = _metrics(row)
    cases = [
        {"metrics": rows[case], "prediction_file": str(prediction), "reference_file": str(reference)}
        for case, prediction, reference in sorted(pairs, key=lambda pair: pair[1].name)
        if case in rows
    ]
    keys = [_key(summary.values) for summary in scores.labels if summary.kind == kind]
    names = list(_METRICS)
    means = {key: {name: _nanmean([rows[case][key][name] for case in rows]) for name in names} for key in keys}
    foreground = {name: float(np.mean([means[key][name] for key in keys])) for name in names}
    return {"metric_per_case": cases, "mean": means, "foreground_mean": foreground}


_METRICS = ("Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref")


def _metrics(row: CaseScore) -> dict[str, float]:
    tp, fp, fn = row.true_positives, row.false_positives, row.false_negatives
    dice, iou = (_NAN if value is None else value for value in (row.dice, row.iou))
    tn = _NAN if row.true_negatives is None else row.true_negatives
    return dict(zip(_METRICS, (dice, iou, fp, tp, fn, tn, fp + tp, fn + tp), strict=True))


def _key(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(values) == 1 else str(values)


def _nanmean(values: Sequence[float]) -> float:
    numbers = np.array(values)
    present = numbers[~np.isnan(numbers)]
    return float(present.mean()) if present.size else _NAN
