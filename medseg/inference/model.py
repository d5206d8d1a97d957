"""Model: trained networks of one configuration, found in a run or a model folder, ready to segment volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from medseg.artefacts import sha256_of_json
from medseg.errors import IncompatibleError, InputError, Problem, UsageError
from medseg.inference.export import labels_from_logits
from medseg.inference.sliding import predict_logits
from medseg.networks.build import build_network
from medseg.networks.device import Device, place
from medseg.networks.weights import load_weights
from medseg.preparation.prepare import Prepared
from medseg.preparation.restore import paste_back
from medseg.records.base import read_record
from medseg.records.model import ModelCard
from medseg.records.plan import ConfigurationPlan, Plan

CARD, WEIGHTS = "model.json", "weights.safetensors"
ALL = "all"


@dataclass(frozen=True, slots=True)
class Model:
    """Networks of one or more folds with the plan they were trained by; ``folder`` is their configuration's."""

    folder: Path
    cards: tuple[ModelCard, ...]
    networks: tuple[nn.Module, ...]
    device: Device

    @property
    def plan(self) -> Plan:
        """The plan of the training."""
        return self.cards[0].plan

    @property
    def configuration(self) -> ConfigurationPlan:
        """The configuration of the training."""
        return self.plan.configurations[self.cards[0].configuration]

    @property
    def sha256(self) -> tuple[str, ...]:
        """Hashes of the weights, by fold."""
        return tuple(card.weights_sha256 for card in self.cards)


def segment(model: Model, prepared: Prepared, *, mirror: bool = False) -> NDArray[np.int16]:
    """Segment a prepared image; class indices (Z, Y, X) on the source file's axes."""
    configuration = model.configuration
    mirror_axes = configuration.training.mirror_axes if mirror else ()
    logits = predict_logits(model.networks, prepared.image, configuration, model.device, mirror_axes=mirror_axes)
    labels = labels_from_logits(logits, prepared.preparation, configuration.resampling, model.plan.task)
    return paste_back(labels, prepared.preparation)


def load_model(path: Path, device: Device, configuration: str | None = None, folds: Sequence[str] = ()) -> Model:
    """Load a model from a run, from ``models/CONFIGURATION`` or from one fold's folder.

    Args:
        path: any of these folders.
        device: where the networks go.
        configuration: needed only if several were trained.
        folds: numbers or "all"; () means the model of all cases if there is one, else every trained fold.

    Raises:
        InputError: E0100 no trained model is there.
        UsageError: E0001 several configurations and none is named, or a fold is not there.
        IntegrityError: E0701, E0711 weights or card are damaged.
        IncompatibleError: E0802 the folds were trained by different plans.
    """
    found = _find_folds(path, configuration)
    chosen = _choose(found, folds)
    cards = tuple(read_record(folder / CARD, ModelCard) for folder in chosen)
    if len({_how_to_predict(card) for card in cards}) > 1:
        raise IncompatibleError(
            Problem("E0802", "the folds were trained by different plans", "one plan", "name folds of one plan")
        )
    networks = tuple(_load(folder, card, device) for folder, card in zip(chosen, cards, strict=True))
    return Model(chosen[0].parent, cards, networks, device)


def _how_to_predict(card: ModelCard) -> str:
    """Hash of what the folds of a model must share: all of the plan that prediction depends on."""
    configuration = card.plan.configurations[card.configuration].to_json()
    used = {key: value for key, value in configuration.items() if key not in ("batch_size", "training")}
    intensities = [intensity.to_json() for intensity in card.plan.intensities]
    return sha256_of_json([card.plan.task.to_json(), card.plan.transpose, intensities, used])


def _load(folder: Path, card: ModelCard, device: Device) -> nn.Module:
    configuration = card.plan.configurations[card.configuration]
    network = build_network(configuration.network, len(card.plan.task.channels), card.plan.task.outputs)
    load_weights(folder / WEIGHTS, network, card.weights_sha256)
    return place(network, device, configuration.dimensions).eval()


def _find_folds(path: Path, configuration: str | None) -> dict[str, Path]:
    """Finished folds by name: a fold is finished when its card is there."""
    path = path.absolute()  # "." has no name
    if (path / CARD).is_file():
        trained = read_record(path / CARD, ModelCard).configuration
        if configuration not in (None, trained):
            raise UsageError(Problem("E0001", f"{path.name} is of configuration {trained}", f"{configuration}", ""))
        return {path.name.removeprefix("fold_"): path}
    models = path / "models" if (path / "models").is_dir() else path
    by_configuration: dict[str, dict[str, Path]] = {}
    for card in sorted([*models.glob(f"fold_*/{CARD}"), *models.glob(f"*/fold_*/{CARD}")]):
        fold = card.parent
        by_configuration.setdefault(fold.parent.name, {})[fold.name.removeprefix("fold_")] = fold
    if not by_configuration:
        raise InputError(Problem("E0100", f"no trained model in {path}", "", "train one, or check the path"))
    if configuration is None and len(by_configuration) > 1:
        there = ", ".join(by_configuration)
        raise UsageError(Problem("E0001", f"several configurations are trained: {there}", "", "add --configuration"))
    name = configuration or next(iter(by_configuration))
    if name not in by_configuration:
        there = ", ".join(by_configuration)
        raise UsageError(Problem("E0001", f"configuration {name} is not trained", there, "choose one of these"))
    return by_configuration[name]


def _choose(found: dict[str, Path], folds: Sequence[str]) -> list[Path]:
    if not folds:
        folds = [ALL] if ALL in found else sorted(found)
    missing = [fold for fold in folds if fold not in found]
    if missing:
        raise UsageError(
            Problem("E0001", f"fold {', '.join(missing)} is not trained", ", ".join(sorted(found)), "choose of these")
        )
    return [found[fold] for fold in folds]
