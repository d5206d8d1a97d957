"""Seen: validation cases whose images a model was trained on, so that their scores will be too good."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medseg.artefacts import sha256_of_json
from medseg.pipeline.run_folder import RunFolder
from medseg.planning.transfer import Given
from medseg.records.fingerprint import CasePrint, Fingerprint
from medseg.records.run import Splits
from medseg.records.transfer import Origin

DEPTH = 5  # a checkpoint lies so deep in its run


def seen_before(model: Path, given: Given, origin: Origin, fingerprint: Fingerprint, splits: Splits) -> Iterator[str]:
    """A sentence for each fold that validates on images which the weights it begins from were trained on.

    A model in its run folder is known case by case, by the SHA-256 of the images. Of one that was copied from there
    only the hash of the whole data set is known, and of one that was imported nothing.
    """
    theirs = _run_of(model)
    trained = {} if theirs is None else _trained_on(theirs)
    same_data = given.plan.fingerprint_sha256 == sha256_of_json(fingerprint.to_json())
    cases = {case.id: case for case in fingerprint.cases}
    for number, fold in enumerate(splits.folds):
        for name in dict.fromkeys(origin.fold_for(configuration, str(number)) for configuration in origin.weights):
            if theirs is not None:
                known = trained.get(name, set().union(*trained.values()))
                seen = [case for case in fold.val if case in cases and known & _images(cases[case])]
            else:
                seen = list(fold.val) if same_data and name != str(number) else []
            if seen:
                some = ", ".join(seen[:3]) + (" …" if len(seen) > 3 else "")
                yield (
                    f"fold {number} validates on {len(seen)} cases ({some}) that fold {name} of the model was trained "
                    "on: its scores will be too good"
                )


def _run_of(model: Path) -> RunFolder | None:
    model = model.absolute()
    for folder in (model, *model.parents[:DEPTH]):
        run = RunFolder(folder)
        if run.fingerprint_json.is_file() and run.splits_json.is_file():
            return run
    return None


def _trained_on(run: RunFolder) -> dict[str, set[str]]:
    """Hashes of the images that each fold was trained on; any other one on all of them."""
    images = {case.id: _images(case) for case in run.read_fingerprint().cases}
    folds = run.read_splits().folds
    found = {str(number): _union(images, fold.train) for number, fold in enumerate(folds)}
    return found | {"all": _union(images, tuple(images))}


def _union(images: dict[str, set[str]], cases: tuple[str, ...]) -> set[str]:
    return set().union(*(images.get(case, set()) for case in cases))


def _images(case: CasePrint) -> set[str]:
    """Hashes of the image files: all but the last, which is the label's."""
    return {sha256 for sha256 in case.sha256[:-1] if sha256}
