"""Export to nnU-Net: a model folder of ours becomes result folders that ``nnUNetv2_predict`` runs.

Our own models see volumes in canonical orientation. nnU-Net has readers that turn volumes to RAS, which is the same;
the plans name one of these, so that files of any orientation give the same labels in both programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from medseg.artefacts import commit_json
from medseg.errors import InputError, Problem, UsageError
from medseg.inference.model import Model, load_model
from medseg.interop.nnunet_checkpoint import write_checkpoint
from medseg.interop.nnunet_plans import Naming, nnunet_plans
from medseg.interop.nnunet_weights import to_nnunet
from medseg.networks.device import choose_device
from medseg.records.fingerprint import CasePrint, Fingerprint
from medseg.records.model import NnunetOrigin
from medseg.records.network import NetworkPlan
from medseg.records.plan import ConfigurationPlan, Plan
from medseg.records.task import Task

TRAINER = "nnUNetTrainer"
READERS = {  # of our own models, by file ending: those that turn volumes to RAS, and pictures, which lie as they lie
    ".nii.gz": "NibabelIOWithReorient",
    ".nii": "NibabelIOWithReorient",
    ".nrrd": "SimpleITKIOWithReorient",
    ".mha": "SimpleITKIOWithReorient",
    ".png": "NaturalImage2DIO",
    ".bmp": "NaturalImage2DIO",
}
MOST_LABELS = {"SimpleITKIOWithReorient": 255}  # it writes bytes
RESERVED = ("background", "ignore")
_OF_NNUNET = ("name", "features", "kernels", "strides", "convs_encoder", "convs_decoder", "deep_supervision")


@dataclass(frozen=True, slots=True)
class Exported:
    """The result folders, the last stage's first, and what is worth telling."""

    folders: tuple[Path, ...]
    notes: tuple[str, ...]


def export_nnunet(
    model_path: Path,
    output: Path,
    configuration: str | None = None,
    folds: tuple[str, ...] = (),
    file_ending: str | None = None,
) -> Exported:
    """Write ``OUTPUT/nnUNetTrainer__PLANS__CONFIGURATION``, for a cascade one for each stage.

    Args:
        model_path: a run, a configuration's or a fold's folder, or an imported model.
        output: folder to write in; ``DatasetXXX_Name`` below ``nnUNet_results`` for ``nnUNetv2_predict -d``.
        configuration: needed only if several were trained.
        folds: as in ``load_model``.
        file_ending: of the files that nnU-Net will be given; None is the imported model's, else ``.nii.gz``.

    Raises:
        InputError: E0100 no model; E0162 nnU-Net has no such network, labels or files.
        UsageError: E0001 a result folder is there already, or an ending that is not known.
        IntegrityError, IncompatibleError: the model is damaged.
        EnvironmentFailure: E0501, E0502.
    """
    model = load_model(model_path, choose_device("cpu", "float32"), configuration, folds)
    origin = _origin(model, file_ending)
    _check_task(model.plan.task, origin)
    folders = [output / f"{TRAINER}__{origin.plans}__{stage.configuration.name}" for stage in model.stages]
    for stage, folder in zip(model.stages, folders, strict=True):
        _check_network(stage.configuration, origin)
        if folder.exists():
            raise UsageError(Problem("E0001", f"{folder} is there already", "a new folder", "choose another --output"))
    notes: list[str] = []
    for stage, folder in zip(model.stages, folders, strict=True):
        notes += _write_stage(stage, folder, origin)
    return Exported(tuple(folders[::-1]), tuple(notes))


def _write_stage(stage: Model, folder: Path, origin: NnunetOrigin) -> list[str]:
    """Checkpoints first, ``plans.json`` last."""
    plan = _plan_of(stage)
    plans = nnunet_plans(plan, _typical(plan), Naming(origin.dataset, origin.reader, origin.plans))
    declaration = dataset_json(plan.task, origin.file_ending)
    axes, notes = _mirror_axes(stage.configuration)
    for card, network in zip(stage.cards, stage.networks, strict=True):
        settings = {
            "trainer_name": TRAINER,
            "init_args": {
                "plans": plans,
                "configuration": card.configuration,
                "fold": int(card.fold) if card.fold.isdecimal() else card.fold,
                "dataset_json": declaration,
            },
            "inference_allowed_mirroring_axes": axes,
            "current_epoch": 0,
            "optimizer_state": None,
            "grad_scaler_state": None,
            "logging": {},
            "_best_ema": None,
        }
        weights = to_nnunet(_tensors(network), stage.configuration.network)
        write_checkpoint(folder / f"fold_{card.fold}" / "checkpoint_final.pth", weights, settings)
    commit_json(folder / "dataset.json", declaration)
    commit_json(folder / "plans.json", plans)
    if (stage.folder / "postprocessing.json").is_file():
        notes.append(f"{stage.configuration.name}: nnU-Net does not apply the post-processing that medseg predict does")
    return notes


def dataset_json(task: Task, file_ending: str) -> dict[str, Any]:
    """The task in nnU-Net's form. The ignore label is left out where nnU-Net would not have it."""
    labels: dict[str, Any] = {"background": 0}
    if task.regions:
        labels |= {region.name: list(region.values) for region in task.regions}
    else:
        labels |= {label.name: label.value for label in task.foreground}
    if task.ignore_value == max(task.values) + 1:
        labels["ignore"] = task.ignore_value
    value: dict[str, Any] = {
        "channel_names": {str(number): channel.name for number, channel in enumerate(task.channels)},
        "labels": labels,
        "numTraining": 0,
        "file_ending": file_ending,
    }
    return value | ({"regions_class_order": list(task.regions_order)} if task.regions else {})


def _origin(model: Model, file_ending: str | None) -> NnunetOrigin:
    """What the model was called in nnU-Net, or is to be called there."""
    imported = model.cards[0].imported
    if imported is not None:
        if file_ending not in (None, imported.file_ending):
            measured = f"the model reads {imported.file_ending} with {imported.reader}, not {file_ending}"
            raise UsageError(Problem("E0001", measured, imported.file_ending, "leave --file-ending away"))
        return imported
    ending = file_ending or ".nii.gz"
    if ending not in READERS:
        raise UsageError(Problem("E0001", f"file ending {ending}", f"one of {' '.join(READERS)}", "choose one"))
    naming = Naming.of(model.plan, model.plan.task.name, READERS[ending])
    plans = "".join(c if c.isalnum() or c in "-_." else "-" for c in naming.plans).replace("__", "_")
    return NnunetOrigin(dataset=naming.dataset, plans=plans, trainer=TRAINER, reader=naming.reader, file_ending=ending)


def _check_task(task: Task, origin: NnunetOrigin) -> None:
    if task.regions and all(len(region.values) == 1 for region in task.regions):
        raise _unsupported("every region is of one label", "nnU-Net takes these for labels")
    if not task.regions and list(task.values) != list(range(len(task.values))):
        raise _unsupported(f"label values {list(task.values)[:20]}", "0, 1, 2 … without gaps")
    named = [region.name for region in task.regions] or [label.name for label in task.foreground]
    if set(named) & set(RESERVED):
        raise _unsupported(f"a label called {' or '.join(RESERVED)}", "other names")
    if max(task.values) > MOST_LABELS.get(origin.reader, 65535):
        raise _unsupported(f"label values up to {max(task.values)}", "255 in this file format: choose .nii.gz")


def _check_network(configuration: ConfigurationPlan, origin: NnunetOrigin) -> None:
    network = configuration.network
    plain = NetworkPlan.model_validate({field: getattr(network, field) for field in _OF_NNUNET})
    if network.name not in ("plain", "residual") or plain != network:
        raise _unsupported(f"network {network.name} of {configuration.name}", "nnU-Net's plain or residual one")
    if origin.reader == "NaturalImage2DIO" and configuration.dimensions != 2:
        raise _unsupported(f"{configuration.name} for pictures", "a 2d configuration")


def _plan_of(stage: Model) -> Plan:
    """The plan with this stage and its first one only."""
    names = {stage.configuration.name, stage.configuration.previous_stage}
    kept = {name: plan for name, plan in stage.plan.configurations.items() if name in names}
    return stage.plan.model_copy(update={"configurations": kept})


def _typical(plan: Plan) -> Fingerprint:
    """One case of the plan's median size and spacing, where nnU-Net keeps those of the data set for information."""
    last = list(plan.configurations.values())[-1]
    spacing = (*(1.0,) * (3 - len(last.spacing_mm)), *last.spacing_mm)
    shape = (*(1.0,) * (3 - len(last.median_shape)), *last.median_shape)
    place = [plan.transpose.index(axis) for axis in range(3)]
    case = CasePrint(
        id="median",
        shape_after_crop=(round(shape[place[0]]), round(shape[place[1]]), round(shape[place[2]])),
        spacing_mm=(spacing[place[0]], spacing[place[1]], spacing[place[2]]),
        relative_size_after_cropping=1,
    )
    return Fingerprint(cases=(case,), intensities=plan.intensities, median_relative_size_after_cropping=1)


def _mirror_axes(configuration: ConfigurationPlan) -> tuple[tuple[int, ...] | None, list[str]]:
    """Axes to mirror, None for none; without the one between left and right, where labels would change places."""
    axes, laterality = configuration.training.mirror_axes, configuration.training.laterality
    if laterality is None:
        return axes or None, []
    left = tuple(axis for axis in axes if axis != laterality.axis)
    note = f"{configuration.name}: nnU-Net cannot exchange left and right labels, so it does not mirror that axis"
    return left or None, [note]


def _tensors(network: nn.Module) -> dict[str, Any]:
    return {name: tensor.detach().cpu().float().contiguous() for name, tensor in network.state_dict().items()}


def _unsupported(measured: str, expected: str) -> InputError:
    return InputError(Problem("E0162", f"nnU-Net has no {measured}", expected, "predict with medseg"))
