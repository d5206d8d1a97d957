"""Plan: data set → fingerprint, plan and splits in a run folder; or a plan alone, without the images."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from medseg.artefacts import commit_json, owned, sha256_of_json
from medseg.dataset.declaration import NnunetDeclaration, read_declaration_file, task_of
from medseg.dataset.fingerprint import measure, read_fingerprint
from medseg.dataset.layouts import read_dataset
from medseg.dataset.splits import read_splits
from medseg.errors import IncompatibleError, Problem, UsageError
from medseg.interop.nnunet_plans import Naming, nnunet_plans, reader_of
from medseg.pipeline.device_plan import Request, device_budget, file_budget, plan_for_device
from medseg.pipeline.run_folder import RunFolder
from medseg.pipeline.seen import seen_before
from medseg.pipeline.split import SplitOptions, choose_splits
from medseg.pipeline.transfer import Source, keep_weights, read_source
from medseg.planning.matching import Asked
from medseg.planning.networks import Variant, rules_with, variant_differences
from medseg.planning.planner import make_plan
from medseg.planning.presets import DEFAULT_PRESET, Preset, preset_named
from medseg.planning.transfer import TAKEN_OVER, Wishes, carried_plan, origin_of
from medseg.progress import SILENT, Progress
from medseg.records.base import R, read_record, write_record
from medseg.records.case import Dataset
from medseg.records.fingerprint import Fingerprint
from medseg.records.plan import Plan
from medseg.records.run import Splits
from medseg.records.task import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What may be asked of planning.

    ``request`` is the memory, time and device to plan for, by default what the preset is made for or what is there;
    ``overwrite`` replaces a plan and splits that are there; ``preset`` is a name or the path of a JSON file,
    ``variant`` another network or loss than the preset's. ``begin_from`` is a model whose plan and weights are taken
    over, its channels and labels by name, or as ``asked``.
    """

    request: Request = field(default_factory=Request)
    splits: SplitOptions = field(default_factory=SplitOptions)
    overwrite: bool = False
    preset: str = DEFAULT_PRESET
    variant: Variant = field(default_factory=Variant)
    begin_from: Path | None = None
    asked: Asked = field(default_factory=Asked)

    @property
    def rules(self) -> Preset:
        """The preset with what is asked for beside it."""
        return rules_with(preset_named(self.preset), self.variant)


@dataclass(frozen=True, slots=True)
class PlanFiles:
    """What is planned from where no image is read, and where the plan goes, ours and in nnU-Net's form.

    ``fingerprint`` is ours or nnU-Net's ``dataset_fingerprint.json``; ``task`` is a ``dataset.json`` of any name. Its
    folder gives nnU-Net the name of the data set.
    """

    fingerprint: Path
    task: Path
    output: Path | None = None
    nnunet_plans: Path | None = None


def plan_run(dataset_path: Path, run: Path, options: PlanOptions | None = None, progress: Progress = SILENT) -> Plan:
    """Measure a data set and write ``dataset.json``, ``fingerprint.json``, ``plan.json`` and ``splits.json``.

    A plan that is there already stays if the data and the options are those it was made from, also if it was edited
    by hand since; ``reasons`` tells the same as ``medseg plan --explain``. With ``begin_from`` the run gets a copy of
    the model's weights, and needs the model no more.

    Raises:
        InputError: the data set is refused; every problem found is in the error.
        UsageError: E0001 options that do not go together, or names that are not there.
        IncompatibleError: E0802 the run holds a plan of other data or options, and ``overwrite`` is not set; or the
            model is not for such data.
        IntegrityError: E0711 a file of the run does not follow its schema, and ``overwrite`` is not set.
    """
    options = options or PlanOptions()
    folder = RunFolder(run)
    source = _source(options)
    dataset = read_dataset(dataset_path)
    with owned(run):
        old = None if options.overwrite else _read_if_there(folder.plan_json, Plan)
        measured = measure(dataset, progress=progress, store=folder.measurements)
        fingerprint = measured.fingerprint
        there = None if options.overwrite else _read_splits(folder, dataset)
        splits = choose_splits(dataset, measured, options.splits, options.preset, there)
        if old is not None:
            plan = _checked(old, fingerprint, dataset.task, options, source)
        elif source is not None:
            plan = _carried(fingerprint, dataset.task, options, source, progress)
        else:
            plan = plan_for_device(fingerprint, dataset.task, options.request, options.rules, progress)
        if source is not None and plan.origin is not None:
            for line in seen_before(source.path, source.given, plan.origin, fingerprint, splits):
                log.warning("%s", line)
            keep_weights(folder, source)
        elif plan.origin is None:
            shutil.rmtree(folder.initial, ignore_errors=True)  # of a plan that was replaced
        for path, record in (
            (folder.dataset_json, folder.reference(dataset)),
            (folder.fingerprint_json, fingerprint),
            (folder.splits_json, splits),
            (folder.plan_json, plan),
        ):
            if options.overwrite or not path.is_file() or read_record(path, type(record)) != record:
                write_record(path, record)
    return plan


def plan_files(files: PlanFiles, options: PlanOptions | None = None) -> Plan:
    """Plan from a fingerprint and a task, and write what is asked for. No image is read, no run folder is needed.

    Where ``numTraining`` of the task differs from the fingerprint's number of cases it counts, as in nnU-Net.

    Raises:
        InputError: a file is not there, or ``task`` is invalid, or nnU-Net cannot read such images.
        IntegrityError: E0711 the fingerprint does not follow its schema.
        IncompatibleError: E0802 they do not belong together.
    """
    options = options or PlanOptions()
    fingerprint = read_fingerprint(files.fingerprint)
    declaration = read_declaration_file(files.task)
    task = task_of(declaration)
    budget = file_budget(options.request, options.rules)
    plan = make_plan(fingerprint, task, budget, options.rules, declaration.numTraining)
    if files.nnunet_plans is not None:
        ending, wanted = ".nii.gz", None
        if isinstance(declaration, NnunetDeclaration):
            ending, wanted = declaration.file_ending, declaration.overwrite_image_reader_writer
        naming = Naming.of(plan, files.task.resolve().parent.name, reader_of(ending, fingerprint, wanted))
        commit_json(files.nnunet_plans, nnunet_plans(plan, fingerprint, naming))
    if files.output is not None:
        write_record(files.output, plan)
    return plan


def read_plan(path: Path) -> Plan:
    """The plan of a run folder, or in a file.

    Raises:
        InputError: E0100 there is none.
        IntegrityError: E0711 it does not follow its schema.
    """
    return read_record(RunFolder(path).plan_json if path.is_dir() else path, Plan)


def _source(options: PlanOptions) -> Source | None:
    asked = options.asked
    if options.begin_from is None:
        if asked.channels or asked.labels:
            raise UsageError(Problem("E0001", "--map-channel or --map-label without --from", "", "name the model"))
        return None
    if options.variant.network is not None:
        measured = f"--network {options.variant.network} with --from"
        raise UsageError(Problem("E0001", measured, "the model's network", "leave out one of them"))
    return read_source(options.begin_from)


def _carried(fingerprint: Fingerprint, task: Task, options: PlanOptions, source: Source, progress: Progress) -> Plan:
    """The model's plan for this data set, and what was taken over, told."""
    from medseg.networks.device import choose_device

    budget = device_budget(options.request, options.request.device or choose_device())
    origin = origin_of(source.given, task, options.asked)
    plan = carried_plan(
        fingerprint, task, source.given, origin, Wishes(budget, preset_named(options.preset), options.variant)
    )
    for reason in plan.reasons:
        if reason.topic == TAKEN_OVER:
            progress.say(reason.text)
    return plan


def _checked(
    old: Plan, fingerprint: Fingerprint, task: Task, options: PlanOptions, source: Source | None = None
) -> Plan:
    """The plan that is there, if it was made from the same data and by the same rules; for any time it may stay.

    A run that began from a model needs neither it nor ``--from`` any more.
    """
    memory_gb, budget = options.request.memory_gb, old.budget
    same_preset = old.origin is not None or old.preset == preset_named(options.preset).name
    differences = [
        what
        for what, same in (
            ("other data", old.fingerprint_sha256 == sha256_of_json(fingerprint.to_json())),
            ("other channels or labels", old.task == task),
            (f"--memory {budget.memory_gb:g}", memory_gb in (None, budget.memory_gb)),
            (f"preset {old.preset}", same_preset),
        )
        if not same
    ]
    differences += variant_differences(old, options.variant)
    if source is not None and old.task == task and old.origin != origin_of(source.given, task, options.asked):
        differences.append("no --from" if old.origin is None else "another --from, --map-channel or --map-label")
    if differences:
        raise IncompatibleError(
            Problem(
                "E0802",
                f"the plan of this run was made with {', '.join(differences)}",
                "the same data set and options",
                "choose another --run, or plan again with --overwrite",
            )
        )
    return old


def _read_splits(folder: RunFolder, dataset: Dataset) -> Splits | None:
    cases = [case.id for case in dataset.cases]
    return read_splits(folder.splits_json, cases) if folder.splits_json.is_file() else None


def _read_if_there(path: Path, kind: type[R]) -> R | None:
    return read_record(path, kind) if path.is_file() else None
