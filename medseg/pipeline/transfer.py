"""Transfer: a trained model found, its plan carried over to a run, and its weights kept there for the trainings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from medseg.artefacts import commit, sha256_of, sha256_of_json
from medseg.errors import IncompatibleError, InputError, IntegrityError, Problem
from medseg.inference.model import how_to_predict, trained_folds
from medseg.pipeline.run_folder import RunFolder
from medseg.planning.transfer import Given
from medseg.records.base import read_record
from medseg.records.model import CARD, WEIGHTS, ModelCard
from medseg.records.plan import Plan
from medseg.records.transfer import ALL_CASES, FIRST, NameMap, Origin
from medseg.training.transfer import Initial, Slots


@dataclass(frozen=True, slots=True)
class Source:
    """A model to begin from: where it is, what it gives, and the files of its weights by configuration and fold."""

    path: Path
    given: Given
    files: Mapping[str, Mapping[str, Path]]


def read_source(path: Path) -> Source:
    """The trained configurations of a run or a model folder; networks are not loaded.

    Raises:
        InputError: E0100 no trained model is there, or a cascade without its first stage.
        IntegrityError: E0711 a card does not follow its schema.
        IncompatibleError: E0802 folds or configurations were trained by different plans.
    """
    if (path / "plans.json").is_file():
        action = f"medseg import nnunet {path} --output MODEL, then --from MODEL"
        raise InputError(Problem("E0100", f"{path} is a model of nnU-Net", "one of medseg", action))
    cards: dict[str, dict[str, ModelCard]] = {}
    files: dict[str, dict[str, Path]] = {}
    for folds in trained_folds(path).values():
        for folder in folds.values():
            card = read_record(folder / CARD, ModelCard)
            name = _fold_name(folder, card)
            if not re.fullmatch("[0-9a-f]{64}", card.weights_sha256):
                measured = f"{folder / CARD}: weights_sha256 is no SHA-256"
                raise IntegrityError(Problem("E0711", measured, "", "restore the model"))
            if name in files.get(card.configuration, {}):
                measured = f"two folders of {path} hold fold {name} of {card.configuration}"
                raise IncompatibleError(Problem("E0802", measured, "one", "name the folder of one fold"))
            cards.setdefault(card.configuration, {})[name] = card
            files.setdefault(card.configuration, {})[name] = folder / WEIGHTS
    first = {name: next(iter(folds.values())) for name, folds in cards.items()}
    _check(path, cards, first)
    shared = next(iter(first.values()))
    configurations = {name: card.plan.configurations[name] for name, card in first.items()}
    weights = {name: {fold: card.weights_sha256 for fold, card in folds.items()} for name, folds in cards.items()}
    plan = shared.plan.model_copy(update={"configurations": configurations})
    return Source(path, Given(plan, shared.orientation, weights), files)


def keep_weights(folder: RunFolder, source: Source) -> None:
    """Copy the model's weights into the run, so that it needs the model no more; copies of others are removed.

    Raises:
        IntegrityError: E0701 the weights are not those that their card vouches for.
        EnvironmentFailure: E0501, E0502.
    """
    kept = set()
    for configuration, folds in source.files.items():
        for fold, path in folds.items():
            target, wanted = initial_weights(folder, configuration, fold), source.given.weights[configuration][fold]
            kept.add(target)
            if not (target.is_file() and sha256_of(target) == wanted):
                _check_weights(wanted, path, path)
                commit(target, partial(shutil.copyfile, path), partial(_check_weights, wanted, path))
    for other in set(folder.initial.glob("*/*.safetensors")) - kept:
        other.unlink(missing_ok=True)


def _check_weights(wanted: str, model: Path, copy: Path) -> None:
    if not copy.is_file() or sha256_of(copy) != wanted:
        measured = f"{model} is not the file that its {CARD} vouches for"
        raise IntegrityError(Problem("E0701", measured, "", "restore the model"))


def initial_weights(folder: RunFolder, configuration: str, fold: str) -> Path:
    """Where the weights of a model's fold are kept."""
    return folder.initial / configuration / f"fold_{fold}.safetensors"


def initial_of(folder: RunFolder, plan: Plan, configuration: str, fold: str) -> Initial | None:
    """What the training of a fold begins from; None where the plan names no weights for the configuration."""
    origin = plan.origin
    if origin is None or configuration not in origin.weights:
        return None
    theirs = origin.fold_for(configuration, fold)
    path, sha256 = initial_weights(folder, configuration, theirs), origin.weights[configuration][theirs]
    inputs: tuple[Slots, ...] = (_slots(origin.channels),)
    if plan.configurations[configuration].previous_stage is not None:
        inputs = (*inputs, _foreground(origin.labels))
    return Initial(path, sha256, inputs, _slots(origin.outputs))


def begins_from(origin: Origin, configuration: str, fold: str) -> str:
    """One sentence: which fold of the model, by its hash."""
    theirs = origin.fold_for(configuration, fold)
    sha256 = origin.weights[configuration][theirs]
    return f"{configuration}: begins from the weights of the model's fold {theirs} ({sha256[:12]})"


def _slots(found: NameMap) -> Slots:
    return Slots(len(found.names), found.places)


def _foreground(labels: NameMap) -> Slots:
    """The labels that the second stage of a cascade sees: all but the background, which is first on both sides."""
    return Slots(len(labels.names) - 1, tuple(place - 1 if place else None for place in labels.places[1:]))


def _fold_name(folder: Path, card: ModelCard) -> str:
    """A fold's number or "all"; a folder may be called otherwise."""
    names = (folder.name.removeprefix("fold_"), card.fold)
    return next((name for name in names if name == ALL_CASES or re.fullmatch(r"[0-9]{1,4}", name)), FIRST)


def _check(path: Path, cards: Mapping[str, Mapping[str, ModelCard]], first: Mapping[str, ModelCard]) -> None:
    """Refuse what does not belong together."""
    differ = [name for name, folds in cards.items() if len({how_to_predict(card) for card in folds.values()}) > 1]
    shared = {
        sha256_of_json([card.plan.task.to_json(), card.plan.transpose, card.orientation, _intensities(card)])
        for card in first.values()
    }
    if differ or len(shared) > 1:
        measured = f"{', '.join(differ or first)} of {path} were trained by different plans"
        raise IncompatibleError(Problem("E0802", measured, "one plan", "name the folder of one configuration or fold"))
    for name, card in first.items():
        before = card.plan.configurations[name].previous_stage
        if before is not None and before not in first:
            measured = f"{name} needs {before}, which is not trained in {path}"
            raise InputError(Problem("E0100", measured, "both", "name a folder that holds both stages"))


def _intensities(card: ModelCard) -> list[object]:
    return [intensity.to_json() for intensity in card.plan.intensities]
