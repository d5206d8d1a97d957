"""The JSON files of a run folder: which record each is, and a check that all are read and written back as they are."""

from __future__ import annotations

import json
from pathlib import Path

from medseg.pipeline.cascade import PreviousRecord
from medseg.records.base import read_record, write_record
from medseg.records.dataset import DatasetReference
from medseg.records.fingerprint import Fingerprint
from medseg.records.model import ModelCard, PostProcessing
from medseg.records.plan import Plan
from medseg.records.preparation import PreparedCaseRecord, StoreManifest
from medseg.records.run import RunManifest, Splits
from medseg.records.scores import Scores
from medseg.records.selection import Selection
from medseg.training.checkpoint import CheckpointManifest, LoopState
from medseg.training.recipe import Recipe

SCHEMAS = {
    "dataset.json": DatasetReference,
    "fingerprint.json": Fingerprint,
    "plan.json": Plan,
    "splits.json": Splits,
    "selection.json": Selection,
    "selection/*/select.json": RunManifest,
    "selection/*/scores.json": Scores,
    "prepared/*/manifest.json": StoreManifest,
    "prepared/*/*.case.json": PreparedCaseRecord,
    "prepared/*/previous/*.json": PreviousRecord,
    "models/*/fold_*/model.json": ModelCard,
    "models/*/fold_*/recipe.json": Recipe,
    "models/*/fold_*/validation.json": Scores,
    "models/*/fold_*/checkpoints/*/model.json": ModelCard,
    "models/*/fold_*/checkpoints/*/state.json": LoopState,
    "models/*/fold_*/checkpoints/*/manifest.json": CheckpointManifest,
    "models/*/postprocessing.json": PostProcessing,
    "predictions/predict.json": RunManifest,
    "scores/*.json": Scores,
}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def check_records(run: Path, folder: Path, edited: tuple[str, ...] = ("plan.json",)) -> set[str]:
    """Every JSON file of a run is strict, follows its schema, and is written back byte for byte; the schemas found.

    Files that the test has ``edited`` have other bytes, but equal content.
    """
    found = set()
    for path in sorted(run.rglob("*.json")):
        relative = path.relative_to(run)
        schemas = [name for name in SCHEMAS if relative.match(name) and len(relative.parts) == name.count("/") + 1]
        assert len(schemas) == 1, relative
        found |= set(schemas)
        json.loads(path.read_text(), parse_constant=refuse)
        record = read_record(path, SCHEMAS[schemas[0]])
        write_record(folder / "again.json", record)
        if relative.name not in edited:
            assert (folder / "again.json").read_bytes() == path.read_bytes(), relative
        assert read_record(folder / "again.json", type(record)) == record
        assert hash(json.dumps(record.to_json(), sort_keys=True))
    return found
