"""Recipe: the selection of a run, followed by predictions that name no configuration."""

from __future__ import annotations

from pathlib import Path

from medseg.errors import IncompatibleError, Problem
from medseg.inference.model import Model, load_model
from medseg.networks.device import Device
from medseg.records.base import read_record
from medseg.records.selection import Selection

SELECTION = "selection.json"


def recipe_of(path: Path, configuration: str | None) -> Selection | None:
    """The selection of a run folder, or None: there is none, or a configuration was named, which goes before it.

    Raises:
        IntegrityError: E0711 the file does not follow its schema.
    """
    file = path / SELECTION
    return read_record(file, Selection) if configuration is None and file.is_file() else None


def recipe_models(path: Path, recipe: Selection, device: Device, folds: tuple[str, ...] = ()) -> dict[str, Model]:
    """The models of a recipe by configuration; ``folds`` instead of its own.

    Raises:
        IncompatibleError: E0802 a fold was trained again since the selection.
    """
    models = {}
    for member in recipe.members:
        model = load_model(path, device, member.configuration, folds or member.folds)
        if not folds and tuple(card.weights_sha256 for card in model.cards) != member.weights_sha256:
            measured = f"{member.configuration} was trained again since the selection"
            action = "run medseg select again, or name a --configuration"
            raise IncompatibleError(Problem("E0802", measured, f"the weights that {SELECTION} names", action))
        models[member.configuration] = model
    return models


def described(recipe: Selection) -> str:
    """The recipe in one line."""
    names = " + ".join(member.configuration for member in recipe.members)
    steps = recipe.postprocessing
    kinds = {
        "refined by a mean field": steps.refinement,
        "largest component of the foreground": steps.keep_largest_foreground,
        "largest components of labels": steps.keep_largest_labels,
        "largest components of regions": steps.keep_largest_groups,
        "no small components": steps.min_mm3,
        "holes filled": steps.fill_holes_labels,
    }
    after = ", ".join(words for words, taken in kinds.items() if taken) or "no post-processing"
    return f"as selected by cross-validation: {names}; {after}"
