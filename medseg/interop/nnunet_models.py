"""nnU-Net models as they are: a result folder or exported zip of nnU-Net v2 becomes a model folder of ours.

The model folder holds ``CONFIGURATION/fold_K/`` with weights and card, for a cascade those of its first stage too, and
predicts without nnU-Net. Its networks see every volume on the axes on which nnU-Net's reader gave it to them.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medseg import __version__
from medseg.artefacts import environment_failure, sha256_of_json
from medseg.dataset.declaration import NnunetDeclaration, read_declaration_file, task_of
from medseg.errors import IncompatibleError, InputError, IntegrityError, Problem, UsageError
from medseg.interop.nnunet_checkpoint import Checkpoint, read_checkpoint
from medseg.interop.nnunet_folder import (
    CHECKPOINTS,
    DATASET,
    PLANS,
    Results,
    choose_results,
    find_results,
    opened,
    postprocessing_file,
)
from medseg.interop.nnunet_postprocessing import read_postprocessing
from medseg.interop.nnunet_schema import (
    NnunetPlans,
    configuration_of,
    network_of,
    normalisations,
    read_plans,
    resampling,
)
from medseg.interop.nnunet_weights import from_nnunet
from medseg.networks.weights import save_tensors
from medseg.records.base import parse_record, write_record
from medseg.records.model import CARD, WEIGHTS, ModelCard, NnunetOrigin, PostProcessing
from medseg.records.plan import ConfigurationPlan, Orientation, Plan
from medseg.records.task import Task

# nnU-Net's readers leave the axes as the file has them, except for those that turn every volume to RAS
READERS: dict[str, Orientation] = {
    "SimpleITKIO": "file",
    "NibabelIO": "file",
    "NaturalImage2DIO": "file",
    "Tiff3DIO": "file",
    "SimpleITKIOWithReorient": "canonical",
    "NibabelIOWithReorient": "canonical",
}
POST_PROCESSING = "postprocessing.json"
# Of nnU-Net 2.8.1, without those that change the network: what may follow "nnUNetTrainer"
STOCK_LENGTHS = re.compile(r"(_\d{1,5}epochs?)?(_?NoMirroring)?")
STOCK_VARIANTS = (
    "Adam Adam1en3 Adam3en4 Adan Adan1en1 Adan1en3 Adan3en4 AdanCosAnneal Benchmark_5epochs "
    "Benchmark_5epochs_noDataLoading CELoss CosAnneal DA5 DA5_10epochs DA5Segord0 DA5ord0 DiceCELoss_noSmooth DiceLoss "
    "DiceTopK10Loss NoDA NoDeepSupervision Topk10Loss Topk10LossLS01 VanillaAdam VanillaAdam1en3 VanillaAdam3en4 "
    "_DASegOrd0 _DASegOrd0_NoMirroring _noDummy2DDA _onlyMirror01 _onlyMirror01_1500ep _onlyMirror01_DA5 "
    "_onlyMirror01_DASegOrd0 _probabilisticOversampling _probabilisticOversampling_010 _probabilisticOversampling_033 "
    "_warmup"
)


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What to import: () folds means all that are there. ``postprocessing`` False leaves nnU-Net's away."""

    configuration: str | None = None
    folds: tuple[str, ...] = ()
    checkpoint: str = CHECKPOINTS[0]
    postprocessing: bool = True
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Imported:
    """What was imported, the last stage's cards first; ``notes`` are worth telling."""

    cards: tuple[ModelCard, ...]
    postprocessing: PostProcessing | None
    notes: tuple[str, ...]


def import_nnunet(source: Path, output: Path, options: ImportOptions | None = None) -> Imported:
    """Write the model in ``source`` as a model folder; all of it or nothing.

    Args:
        source: a result folder, one of its folds, a data set's folder of them, or a zip archive.
        output: the model folder to write; one that is there is replaced only by ``overwrite``.
        options: configuration, folds, checkpoint.

    Raises:
        InputError: E0100, E0106, E0145, E0162 something is missing, or is nothing that medseg predicts.
        IntegrityError: E0701, E0710, E0711 something is damaged, hostile or against its schema.
        IncompatibleError: E0802 weights and plans do not belong together.
        NonFiniteError: E1001 weights are not finite.
        UsageError: E0001 several models are there, or ``output`` is.
        EnvironmentFailure: E0501, E0502.
    """
    options = options or ImportOptions()
    output = output.absolute()
    _check_output(output, options)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=".medseg-", suffix=".tmp", dir=output.parent))
    except OSError as error:
        raise environment_failure(error, output) from error
    try:
        with opened(source, output.parent) as folder:
            model = choose_results(find_results(folder, options.checkpoint), options.configuration)
            imported = _import(model, workspace, options)
        if output.exists():
            shutil.rmtree(output)
        workspace.chmod(0o755)  # mkdtemp makes private folders
        workspace.replace(output)
    except OSError as error:
        raise environment_failure(error, output) from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(workspace)
    return imported


def _import(model: Results, target: Path, options: ImportOptions) -> Imported:
    """Both stages of a cascade, or the only one."""
    folds = _folds(model, options.folds)
    stage = _read_stage(model, folds, options.checkpoint)
    notes = list(stage.notes)
    previous = stage.plan.configurations[stage.name].previous_stage
    cards: list[ModelCard] = []
    if previous is not None:
        first = _first_stage(model, previous, options)
        if (first.plan.task, first.plan.transpose) != (stage.plan.task, stage.plan.transpose):
            measured = f"{previous} beside it was trained by other plans or labels"
            raise IncompatibleError(Problem("E0802", measured, "one plan", "import results that belong together"))
        notes += first.notes
        cards += first.write(target)
    cards = [*stage.write(target), *cards]
    file = postprocessing_file(model, folds) if options.postprocessing else None
    postprocessing = None if file is None else read_postprocessing(file, stage.plan.task)
    if postprocessing is not None:
        write_record(target / stage.name / POST_PROCESSING, postprocessing)
    return Imported(tuple(cards), postprocessing, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Stage:
    """One configuration with its checkpoints, checked, not yet written."""

    name: str
    plan: Plan
    origin: NnunetOrigin
    checkpoints: dict[str, Checkpoint]
    notes: tuple[str, ...]

    def write(self, target: Path) -> list[ModelCard]:
        """Weights and card of every fold."""
        configuration, task = self.plan.configurations[self.name], self.plan.task
        cards = []
        for fold, checkpoint in self.checkpoints.items():
            channels = configuration.input_channels(task)
            weights = from_nnunet(checkpoint.weights, configuration.network, channels, task.outputs)
            folder = target / self.name / f"fold_{fold}"
            card = ModelCard(
                configuration=self.name,
                fold=fold,
                plan=self.plan,
                weights_sha256=save_tensors(folder / WEIGHTS, weights),
                medseg_version=__version__,
                torch_version=torch.__version__,
                settings_sha256=sha256_of_json(configuration.to_json()),
                batch_size=configuration.batch_size,
                training=configuration.training,
                steps=0,
                orientation=READERS[self.origin.reader],
                imported=self.origin,
            )
            write_record(folder / CARD, card)
            cards.append(card)
        return cards


def _first_stage(model: Results, name: str, options: ImportOptions) -> _Stage:
    """The first stage of a cascade, from the folder beside it, with all its folds."""
    folder = model.sibling(name)
    if not (folder / PLANS).is_file():
        measured = f"{model.path.name} is the second stage of a cascade; its first, {folder.name}, is not beside it"
        raise InputError(Problem("E0100", measured, "both", f"put {folder.name} there, or give an archive with both"))
    first = find_results(folder, options.checkpoint)[0]
    stage = _read_stage(first, first.folds, options.checkpoint)
    if stage.name != name:
        raise IncompatibleError(Problem("E0802", f"{folder.name} holds {stage.name}", name, "restore the folder"))
    return stage


def _read_stage(model: Results, folds: Sequence[str], checkpoint: str) -> _Stage:
    declaration, task = _read_task(model.path / DATASET)
    plans = read_plans(model.path / PLANS)
    if plans.image_reader_writer not in READERS:
        measured = f"plans.json: image_reader_writer is {plans.image_reader_writer[:120]}"
        raise InputError(Problem("E0162", measured, " ".join(READERS), "predict with nnU-Net itself"))
    checkpoints = {fold: read_checkpoint(model.path / f"fold_{fold}" / checkpoint) for fold in folds}
    first = checkpoints[folds[0]]
    if len({(c.configuration, c.trainer) for c in checkpoints.values()}) > 1:
        raise IncompatibleError(Problem("E0802", "the folds are of several trainers or configurations", "one", ""))
    origin = NnunetOrigin(
        dataset=plans.dataset_name,
        plans=plans.plans_name,
        trainer=first.trainer,
        reader=plans.image_reader_writer,
        file_ending=declaration.file_ending,
    )
    plan = _plan(plans, first, task)
    notes = []
    if not _is_stock(first.trainer):
        notes.append(
            f"{first.trainer} is no trainer of nnU-Net's own: if it changes the network without changing its weights' "
            "names, or prepares images in another way, predictions will differ"
        )
    return _Stage(first.configuration, plan, origin, checkpoints, tuple(notes))


def _is_stock(trainer: str) -> bool:
    variant = trainer.removeprefix("nnUNetTrainer")
    return variant != trainer and (variant in STOCK_VARIANTS.split() or STOCK_LENGTHS.fullmatch(variant) is not None)


def _plan(plans: NnunetPlans, checkpoint: Checkpoint, task: Task) -> Plan:
    """The plan of one configuration, and of its first stage."""
    channels = len(task.channels)
    configuration = _configuration(plans, checkpoint.configuration, checkpoint.mirror_axes)
    stages = [configuration]
    if configuration["previous_stage"] is not None:
        stages.append(_configuration(plans, configuration["previous_stage"], ()))
    value = {
        "preset": f"nnU-Net {plans.plans_name}"[:200],
        "task": task,
        "transpose": plans.transpose_forward,
        "intensities": plans.intensities(channels),
        "configurations": {stage["name"]: parse_record(stage, ConfigurationPlan, PLANS) for stage in stages},
    }
    return parse_record(value, Plan, PLANS)


def _configuration(plans: NnunetPlans, name: str, mirror_axes: tuple[int, ...]) -> dict[str, Any]:
    found = configuration_of(plans, name)
    if any(axis >= len(found.patch_size) for axis in mirror_axes):
        measured = f"mirroring axes {mirror_axes} of a patch with {len(found.patch_size)} axes"
        raise IntegrityError(Problem("E0711", measured, "", "get the checkpoint again"))
    return {
        "name": name,
        "spacing_mm": found.spacing,
        "patch_size": found.patch_size,
        "batch_size": found.batch_size,
        "median_shape": found.median_image_size_in_voxels or found.patch_size,
        "normalisation": normalisations(found),
        "resampling": resampling(found),
        "network": network_of(found),
        "training": {"batch_dice": found.batch_dice, "mirror_axes": tuple(sorted(mirror_axes))},
        "previous_stage": found.previous_stage,
    }


def _read_task(path: Path) -> tuple[NnunetDeclaration, Task]:
    if not path.is_file():
        raise InputError(Problem("E0100", f"no {DATASET} in {path.parent}", "", "get the folder complete"))
    declaration = read_declaration_file(path)
    if not isinstance(declaration, NnunetDeclaration):
        raise InputError(Problem("E0145", f"{path} is no dataset.json of nnU-Net v2", "", "get the file again"))
    task = task_of(declaration)
    values = [*task.values]
    if not task.regions and values != list(range(len(values))):
        measured = f"{DATASET}: label values {values[:20]}"
        raise InputError(Problem("E0145", measured, "0, 1, 2 … as nnU-Net needs them", f"correct {DATASET}"))
    return declaration, task


def _folds(model: Results, wanted: Sequence[str]) -> tuple[str, ...]:
    """Those that are wanted, else all that are trained."""
    missing = [fold for fold in wanted if fold not in model.folds]
    if missing:
        there = ", ".join(model.folds)
        raise UsageError(Problem("E0001", f"fold {', '.join(missing)} is not in {model.path.name}", there, "choose"))
    return tuple(wanted) or model.folds


def _check_output(output: Path, options: ImportOptions) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    ours = output.is_dir() and any(output.glob(f"*/fold_*/{CARD}"))
    if not (options.overwrite and ours):
        action = "choose another --output" + (", or add --overwrite" if ours else "")
        raise UsageError(Problem("E0001", f"{output} is there already", "a new folder", action))
