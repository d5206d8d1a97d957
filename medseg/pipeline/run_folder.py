"""RunFolder: where everything of a run lies."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from medseg.dataset.layouts import read_dataset
from medseg.errors import IncompatibleError, InputError, Problem, UsageError
from medseg.preparation.preprocess import settings_sha256
from medseg.records.base import read_record
from medseg.records.case import Dataset
from medseg.records.dataset import DatasetReference
from medseg.records.fingerprint import Fingerprint
from medseg.records.plan import ConfigurationPlan, Plan
from medseg.records.run import Splits

ALL_CASES = "all"  # the fold that trains on every case and validates on none


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The layout of a run folder; nothing is read or made until asked for."""

    path: Path

    @property
    def dataset_json(self) -> Path:
        """Which data set, which cases."""
        return self.path / "dataset.json"

    @property
    def fingerprint_json(self) -> Path:
        """What was measured."""
        return self.path / "fingerprint.json"

    @property
    def measurements(self) -> Path:
        """What was measured of each case, so that planning again reads only what is new."""
        return self.path / "fingerprint"

    @property
    def plan_json(self) -> Path:
        """What was decided."""
        return self.path / "plan.json"

    @property
    def splits_json(self) -> Path:
        """Which cases train and which validate."""
        return self.path / "splits.json"

    @property
    def predictions(self) -> Path:
        """Label maps of the data set's imagesTs."""
        return self.path / "predictions"

    @property
    def scores(self) -> Path:
        """Scores of those predictions."""
        return self.path / "scores"

    @property
    def pictures(self) -> Path:
        """Overlay pictures of those predictions."""
        return self.path / "pictures"

    @property
    def initial(self) -> Path:
        """Weights of the model that the trainings begin from."""
        return self.path / "initial"

    def prepared(self, configuration: str) -> Path:
        """Prepared cases of a configuration."""
        return self.path / "prepared" / configuration

    def models(self, configuration: str) -> Path:
        """Trained folds of a configuration."""
        return self.path / "models" / configuration

    def fold(self, configuration: str, fold: str) -> Path:
        """One trained fold."""
        return self.models(configuration) / f"fold_{fold}"

    def read_plan(self) -> Plan:
        """The plan.

        Raises:
            InputError: E0100 the run was not planned yet.
            IntegrityError: E0711 a field of the plan is wrong; it is named.
        """
        return read_record(self._planned(self.plan_json), Plan)

    def read_fingerprint(self) -> Fingerprint:
        """The fingerprint."""
        return read_record(self.fingerprint_json, Fingerprint)

    def read_splits(self) -> Splits:
        """The folds.

        Raises:
            InputError: E0100 the run was not planned yet.
            IntegrityError: E0711 a field is wrong; it is named.
        """
        return read_record(self._planned(self.splits_json), Splits)

    def read_dataset(self) -> Dataset:
        """The data set as it lies on disk now, which must have the cases that were planned.

        Raises:
            IncompatibleError: E0803 cases came or went since planning.
        """
        reference = read_record(self.dataset_json, DatasetReference)
        dataset = read_dataset(self._dataset_path(reference))
        now, then = {case.id for case in dataset.cases}, set(reference.cases)
        if now != then:
            changed = [f"{len(now - then)} new", f"{len(then - now)} gone"]
            some = ", ".join(sorted(now ^ then)[:5])
            raise IncompatibleError(
                Problem("E0803", f"cases {' and '.join(changed)} since planning ({some})", "", "plan again")
            )
        return dataset

    def reference(self, dataset: Dataset) -> DatasetReference:
        """What ``dataset.json`` of this run says about a data set."""
        root = dataset.root.resolve()
        return DatasetReference(
            root=str(root),
            relative_root=_relative(root, self.path.resolve()),
            task=dataset.task,
            cases=tuple(case.id for case in dataset.cases),
        )

    def _planned(self, path: Path) -> Path:
        if not path.is_file():
            action = "run: medseg plan DATASET --run RUN"
            raise InputError(Problem("E0100", f"no {path.name} in {self.path}", "", action))
        return path

    def _dataset_path(self, reference: DatasetReference) -> Path:
        root = Path(reference.root)
        moved = None if reference.relative_root is None else self.path / reference.relative_root
        if not root.exists() and moved is not None and moved.exists():
            return moved
        if not root.exists():
            action = f"restore it, or correct root in {self.dataset_json}"
            raise InputError(Problem("E0100", f"the data set {root} is not there", "", action))
        return root


def _relative(path: Path, folder: Path) -> str | None:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return None


def configuration_of(plan: Plan, name: str) -> ConfigurationPlan:
    """A configuration of the plan by name.

    Raises:
        UsageError: E0001 there is none of that name.
    """
    if name not in plan.configurations:
        there = ", ".join(plan.configurations)
        raise UsageError(Problem("E0001", f"no configuration {name!r} in the plan", there, "choose one of these"))
    return plan.configurations[name]


def prepared_as(plan: Plan, name: str) -> str:
    """The configuration under whose name the prepared cases of ``name`` lie: the first that prepares them alike."""
    wanted = settings_sha256(plan, plan.configurations[name])
    return next(other for other, found in plan.configurations.items() if settings_sha256(plan, found) == wanted)


def stages_of(plan: Plan, name: str) -> tuple[str, ...]:
    """The configurations that are trained for ``name``: its first stage, if it is a cascade's second, and itself."""
    first = configuration_of(plan, name).previous_stage
    return (name,) if first is None else (first, name)


def check_fold(name: str, splits: Splits) -> None:
    """Refuse a name that is neither the number of a fold nor "all".

    Raises:
        UsageError: E0001.
    """
    if name != ALL_CASES and name not in every_fold(splits):
        there = f"0 to {len(splits.folds) - 1}, or {ALL_CASES}"
        raise UsageError(Problem("E0001", f"no fold {name!r}", there, "choose one of these"))


def every_fold(splits: Splits) -> tuple[str, ...]:
    """The names of all folds of the splits."""
    return tuple(str(number) for number in range(len(splits.folds)))


def default_configuration(plan: Plan) -> str:
    """The configuration to train when none is named: 3d_fullres where the data have depth, else 2d."""
    return "3d_fullres" if "3d_fullres" in plan.configurations else next(iter(plan.configurations))
