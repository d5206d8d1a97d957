"""Model: trained networks of one configuration, found in a run or a model folder, ready to segment volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from medseg.artefacts import sha256_of_json
from medseg.errors import IncompatibleError, InputError, Problem, UsageError
from medseg.imaging.resample import resample_labels
from medseg.inference.backend import TORCH, Backend
from medseg.inference.export import Observer, labels_from_slabs
from medseg.inference.passes import PLAIN, Mirroring
from medseg.inference.refine import Scene, refine
from medseg.inference.sliding import Blending, PreviousLabels, stream_logits
from medseg.networks.build import build_network
from medseg.networks.device import Device, place
from medseg.networks.nested_unet import NestedUNet
from medseg.networks.skip_unet import WithAttention
from medseg.networks.weights import load_weights
from medseg.preparation.foreground import IGNORE
from medseg.preparation.prepare import Prepared, outside_mask, prepare
from medseg.preparation.restore import paste_back
from medseg.records.base import read_record
from medseg.records.grid import Volume
from medseg.records.model import CARD, WEIGHTS, ModelCard, Refinement
from medseg.records.plan import ConfigurationPlan, Orientation, Plan
from medseg.records.preparation import Preparation

ALL = "all"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True)
class Model:
    """Networks of one or more folds with the plan they were trained by; ``folder`` is their configuration's.

    ``previous`` is the first stage of a cascade; ``backend`` computes the networks. ``fold_folders`` are those that the
    networks were read from.
    """

    folder: Path
    cards: tuple[ModelCard, ...]
    networks: tuple[nn.Module, ...]
    device: Device
    previous: Model | None = None
    backend: Backend = TORCH
    fold_folders: tuple[Path, ...] = ()

    @property
    def plan(self) -> Plan:
        """The plan of the training."""
        return self.cards[0].plan

    @property
    def configuration(self) -> ConfigurationPlan:
        """The configuration of the training."""
        return self.plan.configurations[self.cards[0].configuration]

    @property
    def orientation(self) -> Orientation:
        """The axes on which the networks see volumes."""
        return self.cards[0].orientation

    @property
    def stages(self) -> tuple[Model, ...]:
        """The models that work one after the other, this one last."""
        return (self,) if self.previous is None else (*self.previous.stages, self)

    @property
    def sha256(self) -> tuple[str, ...]:
        """Hashes of the weights, by stage and fold."""
        return tuple(card.weights_sha256 for stage in self.stages for card in stage.cards)


def prepare_stages(model: Model, volume: Volume) -> tuple[Prepared, ...]:
    """The volume as each stage of the model sees it, the first stage first."""
    prepared = [prepare(volume, stage.plan, stage.configuration, stage.orientation) for stage in model.stages]
    if model.previous is not None and model.cards[0].imported is not None:
        prepared[-1] = replace(prepared[-1], outside=outside_mask(volume, prepared[-1].preparation))
    return tuple(prepared)


def segment(
    model: Model,
    prepared: Sequence[Prepared],
    *,
    mirror: bool = False,
    blending: Blending | None = None,
    observe: Observer | None = None,
    refinement: Refinement | None = None,
) -> NDArray[np.int16]:
    """Segment a volume prepared for every stage; class indices (Z, Y, X) on the source file's axes.

    Args:
        model: one or two stages.
        prepared: by ``prepare_stages``.
        mirror: average over mirrored views, on the axes that were mirrored in training.
        blending: of the tiles of every stage; ``disagreement`` is of the last one alone.
        observe: shown the logits of the last stage, see ``labels_from_slabs``.
        refinement: of the last stage's logits.

    Raises:
        NonFiniteError: E1002 logits are NaN or infinite.
    """
    blending = blending or Blending()
    cropped: NDArray[np.int16] | None = None
    for stage, seen in zip(model.stages, prepared, strict=True):
        previous = None if cropped is None else _seen_by(stage, seen, cropped)
        last = stage is model
        own = replace(blending, disagreement=blending.disagreement and last and len(stage.networks) > 1)
        cropped = segment_stage(
            stage,
            seen,
            previous,
            mirror=mirror,
            blending=own,
            observe=observe if last else None,
            refinement=refinement if last else None,
        )
    assert cropped is not None
    return paste_back(cropped, prepared[-1].preparation)


def cut(model: Model, depth: int) -> Model:
    """The model with U-Net++ networks that compute the U-Net of ``depth`` steps alone, in all stages.

    Raises:
        UsageError: E0001 another network, or one that was not supervised at that depth.
    """
    for stage in model.stages:
        for network in stage.networks:
            if not isinstance(network, NestedUNet):
                measured = f"a depth for {stage.configuration.network.name} ({stage.configuration.name})"
                raise UsageError(Problem("E0001", measured, "unetpp", "only U-Net++ can be cut"))
            try:
                network.prune(depth)
            except ValueError as error:
                raise UsageError(Problem("E0001", f"depth {depth}: {error}", "", "choose another depth")) from error
    return model


def with_attention(model: Model) -> Model:
    """The model whose last stage gives more channels: what each gate lets pass, finest first.

    Raises:
        UsageError: E0001 its networks have no attention gates.
    """
    network = model.configuration.network
    if network.name != "attention" or len(network.features) < 2:
        measured = f"attention maps of the network {network.name} ({model.configuration.name})"
        raise UsageError(Problem("E0001", measured, "attention", "train one: medseg run --network attention"))
    return replace(model, networks=tuple(WithAttention(one).eval() for one in model.networks))


def _seen_by(stage: Model, seen: Prepared, cropped: NDArray[np.int16]) -> NDArray[np.int16]:
    """Labels of the stage before on the grid of this one.

    nnU-Net resamples them with its marks for voxels outside of the body, which do not vote with the background.
    """
    if seen.outside is None:
        return on_grid_of(seen.preparation, cropped, stage.configuration)
    marked = np.where(seen.outside & (cropped == 0), np.int16(IGNORE), cropped)
    return np.maximum(on_grid_of(seen.preparation, marked, stage.configuration), 0)


def segment_stage(
    model: Model,
    prepared: Prepared,
    previous: NDArray[np.int16] | None = None,
    *,
    mirror: bool = False,
    blending: Blending | None = None,
    observe: Observer | None = None,
    refinement: Refinement | None = None,
) -> NDArray[np.int16]:
    """One stage: class indices (Z, Y, X) on the cropped grid. ``previous`` lies on the network's grid."""
    configuration, task = model.configuration, model.plan.task
    slabs = stream_logits(
        model.networks,
        prepared.image,
        configuration,
        model.device,
        mirroring=mirroring_of(model) if mirror else PLAIN,
        blending=replace(blending or Blending(), regions=bool(task.regions)),
        previous=None if previous is None else PreviousLabels(previous, len(task.labels)),
        backend=model.backend,
    )
    if refinement is not None:
        spacing_mm, device = prepared.preparation.target_spacing_mm, model.device.torch_device
        scene = Scene(prepared.image, spacing_mm, task.outputs, bool(task.regions), device)
        slabs = refine(slabs, scene, refinement)
    return labels_from_slabs(slabs, prepared.preparation, configuration.resampling, task, observe)


def mirroring_of(model: Model) -> Mirroring:
    """The views that one stage was trained to see: all combinations of the axes that its training mirrored."""
    configuration = model.configuration
    return Mirroring(configuration.training.mirror_axes, configuration.swap(model.plan.task))


def on_grid_of(
    preparation: Preparation, cropped: NDArray[np.int16], configuration: ConfigurationPlan
) -> NDArray[np.int16]:
    """Labels of the stage before, on the cropped grid, brought to the network's grid of ``configuration``.

    Training and prediction both come here, so that the second stage learns from what it will see.
    """
    return resample_labels(
        cropped,
        preparation.target_shape,
        preparation.spacing_mm,
        preparation.target_spacing_mm,
        configuration.resampling,
    )


def load_model(
    path: Path,
    device: Device,
    configuration: str | None = None,
    folds: Sequence[str] = (),
    previous_folds: Sequence[str] = (),
) -> Model:
    """Load a model from a run, from ``models/CONFIGURATION`` or from one fold's folder.

    Args:
        path: any of these folders.
        device: where the networks go.
        configuration: needed only if several were trained.
        folds: numbers or "all"; () means the model of all cases if there is one, else every trained fold.
        previous_folds: the same of a cascade's first stage.

    Raises:
        InputError: E0100 no trained model is there.
        UsageError: E0001 several configurations and none is named, or a fold is not there.
        IntegrityError: E0701, E0711 weights or card are damaged.
        IncompatibleError: E0802 the folds were trained by different plans.
    """
    found = _find_folds(path, configuration)
    chosen = _choose(found, folds)
    cards = tuple(read_record(folder / CARD, ModelCard) for folder in chosen)
    if len({how_to_predict(card) for card in cards}) > 1:
        raise IncompatibleError(
            Problem("E0802", "the folds were trained by different plans", "one plan", "name folds of one plan")
        )
    networks = tuple(_load(folder, card, device) for folder, card in zip(chosen, cards, strict=True))
    model = Model(chosen[0].parent, cards, networks, device, fold_folders=tuple(chosen))
    first = model.configuration.previous_stage
    return model if first is None else replace(model, previous=_load_previous(model, first, previous_folds))


def _load_previous(model: Model, configuration: str, folds: Sequence[str]) -> Model:
    """The first stage of a cascade, which lies beside the second."""
    own = model.folder.parent.parent if model.folder.name == CHECKPOINTS else model.folder
    folder = own.parent / configuration
    if not folder.is_dir():
        measured = f"{model.configuration.name} needs the labels of {configuration}, which is not in {folder.parent}"
        raise InputError(Problem("E0100", measured, "both in one folder", f"train or copy {configuration}"))
    previous = load_model(folder, model.device, configuration, folds)
    if (previous.plan.task, previous.plan.transpose) != (model.plan.task, model.plan.transpose):
        measured = f"{configuration} and {model.configuration.name} were trained by different plans"
        raise IncompatibleError(Problem("E0802", measured, "one plan", "train both by one plan"))
    return previous


def how_to_predict(card: ModelCard) -> str:
    """Hash of what the folds of a model must share: all of the plan that prediction depends on."""
    configuration = card.plan.configurations[card.configuration].to_json()
    used = {key: value for key, value in configuration.items() if key not in ("batch_size", "training")}
    intensities = [intensity.to_json() for intensity in card.plan.intensities]
    return sha256_of_json([card.plan.task.to_json(), card.plan.transpose, intensities, used, card.orientation])


def _load(folder: Path, card: ModelCard, device: Device) -> nn.Module:
    configuration, task = card.plan.configurations[card.configuration], card.plan.task
    network = build_network(configuration.network, configuration.input_channels(task), task.outputs)
    load_weights(folder / WEIGHTS, network, card.weights_sha256)
    return place(network, device, configuration.dimensions).eval()


def trained_folds(path: Path) -> dict[str, dict[str, Path]]:
    """Folders of the finished folds by configuration and fold; a fold is finished when its card is there.

    Args:
        path: a run, ``models/CONFIGURATION``, or one fold's folder, which is found alone.

    Raises:
        InputError: E0100 no trained model is there.
    """
    path = path.absolute()  # "." has no name
    if (path / CARD).is_file():
        return {read_record(path / CARD, ModelCard).configuration: {path.name.removeprefix("fold_"): path}}
    models = path / "models" if (path / "models").is_dir() else path
    by_configuration: dict[str, dict[str, Path]] = {}
    for card in sorted([*models.glob(f"fold_*/{CARD}"), *models.glob(f"*/fold_*/{CARD}")]):
        fold = card.parent
        by_configuration.setdefault(fold.parent.name, {})[fold.name.removeprefix("fold_")] = fold
    if not by_configuration:
        raise InputError(Problem("E0100", f"no trained model in {path}", "", "train one, or check the path"))
    return by_configuration


def _find_folds(path: Path, configuration: str | None) -> dict[str, Path]:
    by_configuration = trained_folds(path)
    whole = _without_first_stages(by_configuration)
    if configuration is None and len(whole) > 1:
        there = ", ".join(by_configuration)
        raise UsageError(Problem("E0001", f"several configurations are trained: {there}", "", "add --configuration"))
    name = configuration or whole[0]
    if name not in by_configuration:
        there = ", ".join(by_configuration)
        raise UsageError(Problem("E0001", f"configuration {name} is not trained", there, "choose one of these"))
    return by_configuration[name]


def _without_first_stages(trained: dict[str, dict[str, Path]]) -> list[str]:
    """The trained configurations that are no first stage of another trained one: a cascade counts as one."""
    if len(trained) == 1:
        return list(trained)
    cards = [read_record(next(iter(folds.values())) / CARD, ModelCard) for folds in trained.values()]
    first = {card.plan.configurations[card.configuration].previous_stage for card in cards}  # folders may be renamed
    return [name for name in trained if name not in first]


def _choose(found: dict[str, Path], folds: Sequence[str]) -> list[Path]:
    if not folds:
        folds = [ALL] if ALL in found else sorted(found)
    missing = [fold for fold in folds if fold not in found]
    if missing:
        raise UsageError(
            Problem("E0001", f"fold {', '.join(missing)} is not trained", ", ".join(sorted(found)), "choose of these")
        )
    return [found[fold] for fold in folds]
