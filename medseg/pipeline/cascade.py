"""Cascade: the labels that a first stage predicts for the cases its second stage is trained on.

Every case is predicted by the fold that did not train on it, so that the second stage learns from errors such as it
will see. The labels go the way they go in prediction: first stage, cropped grid of the file, grid of the second stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.artefacts import commit, owned_in_turn, sha256_of, sha256_of_json
from medseg.errors import IncompatibleError, MedsegError, Problem, Stopped
from medseg.inference.ladder import Ladder
from medseg.inference.model import Model, load_model, on_grid_of, segment_stage
from medseg.inference.sliding import Blending
from medseg.networks.device import Device
from medseg.pipeline.run_folder import RunFolder
from medseg.preparation.arrays import checks_of, chunk_layout, encode_array
from medseg.preparation.prepare import Prepared
from medseg.preparation.store import PreviousLabels, Store, StoredCase
from medseg.progress import SILENT, Progress, never
from medseg.records.base import Record, read_record, write_record
from medseg.records.model import CARD
from medseg.records.plan import ConfigurationPlan
from medseg.records.preparation import ArrayChecks
from medseg.records.run import Splits

FOLDER = "previous"


class PreviousRecord(Record):
    """How a case's labels of the first stage came to be: hashes of all they depend on, of the file and its chunks."""

    id: str
    key: str
    sha256: str
    checks: ArrayChecks
    weights_sha256: str


def with_previous_labels(
    folder: RunFolder,
    stores: tuple[Store, Store],
    configuration: ConfigurationPlan,
    case_ids: Sequence[str],
    device: Device,
    progress: Progress = SILENT,
    stop_signal: Callable[[], int | None] = never,
) -> dict[str, StoredCase]:
    """The prepared cases of a second stage with the first stage's labels, predicted where they are not there yet.

    Args:
        folder: of the run; labels are kept in ``prepared/CONFIGURATION/previous``.
        stores: the prepared cases of the first and of the second stage.
        configuration: the second stage.
        case_ids: which cases.
        device: to predict on.
        progress: told after every predicted case.
        stop_signal: asked before every case.

    Raises:
        IncompatibleError: E0805 the first stage lacks the fold that validates one of the cases.
        Stopped: by ``stop_signal``; finished cases stay.
    """
    assert configuration.previous_stage is not None
    first, second = stores
    models = folder.models(configuration.previous_stage)
    fold_of = _folds(case_ids, folder.read_splits(), models)
    target = folder.prepared(configuration.name) / FOLDER
    loaded: dict[str, Model] = {}
    found = {}
    progress.begin(f"labels of {configuration.previous_stage}", len(case_ids), "cases")
    try:
        for done, case_id in enumerate(sorted(case_ids, key=lambda case_id: fold_of[case_id]), start=1):
            if (stop := stop_signal()) is not None:
                raise Stopped(Problem("E1300", "stopped in the first stage", "", "the same command goes on here"), stop)
            fold, coarse, fine = fold_of[case_id], first.case(case_id), second.case(case_id)
            if fold not in loaded:
                loaded = {fold: load_model(models / f"fold_{fold}", device)}
            model = loaded[fold]
            key = sha256_of_json([model.sha256, coarse.provenance, fine.provenance, str(device.dtype)])
            previous = _finished(target, case_id, key)
            if previous is None:
                with owned_in_turn(target):  # folds that train side by side see the same cases
                    previous = _finished(target, case_id, key)
                    previous = previous or _predict(target, key, model, coarse, fine, configuration)
            found[case_id] = fine.after(previous)
            progress.update(done, case_id)
    finally:
        progress.end()
    return found


def _folds(case_ids: Sequence[str], splits: Splits, models: Path) -> dict[str, str]:
    """For each case the fold of the first stage that validates it; all of them must be trained."""
    fold_of = {case: str(number) for number, fold in reversed(list(enumerate(splits.folds))) for case in fold.val}
    unseen = [case for case in case_ids if case not in fold_of]
    missing = sorted(
        {fold_of[c] for c in case_ids if c in fold_of and not (models / f"fold_{fold_of[c]}" / CARD).is_file()}
    )
    if unseen:
        measured = f"{len(unseen)} cases ({', '.join(unseen[:3])} …) validate in no fold"
        action = "a cascade needs splits in which every case validates once"
        raise IncompatibleError(Problem("E0805", measured, "none", action))
    if missing:
        measured = f"fold {', '.join(missing)} of {models.name} is not trained"
        action = f"train it: medseg train --configuration {models.name} --fold {missing[0]}"
        raise IncompatibleError(Problem("E0805", measured, "all folds that validate these cases", action))
    return {case: fold_of[case] for case in case_ids}


def _finished(target: Path, case_id: str, key: str) -> PreviousLabels | None:
    path = target / f"{case_id}.json"
    try:
        record = read_record(path, PreviousRecord) if path.is_file() else None
    except MedsegError:
        return None
    labels = _labels_path(target, case_id)
    if record is None or record.key != key or not labels.is_file() or sha256_of(labels) != record.sha256:
        return None
    return PreviousLabels(labels, record.weights_sha256, record.checks)


def _predict(
    target: Path, key: str, model: Model, coarse: StoredCase, fine: StoredCase, configuration: ConfigurationPlan
) -> PreviousLabels:
    """Predict one case and commit its labels, the record last."""
    image: NDArray[np.float32] = np.asarray(coarse.image[:], dtype=np.float32)
    prepared = Prepared(image, coarse.record.preparation)
    cropped = Ladder(model).run(lambda used, how: segment_stage(used, prepared, blending=how), Blending())
    labels = on_grid_of(fine.record.preparation, cropped, configuration).astype(fine.labels.dtype)
    spacing = fine.record.preparation.target_spacing_mm
    path = _labels_path(target, coarse.record.id)
    content = encode_array(labels, *chunk_layout(labels.shape, spacing, labels.itemsize, 3))
    checks = checks_of(content)
    record = PreviousRecord(
        id=coarse.record.id, key=key, sha256=commit(path, content), checks=checks, weights_sha256=model.sha256[0]
    )
    write_record(target / f"{coarse.record.id}.json", record)
    return PreviousLabels(path, record.weights_sha256, checks)


def _labels_path(target: Path, case_id: str) -> Path:
    return target / f"{case_id}.labels.b2nd"
