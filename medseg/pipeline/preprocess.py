"""Preprocess: the planned configurations prepared in a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medseg.errors import IntegrityError
from medseg.pipeline.run_folder import RunFolder, prepared_as, stages_of
from medseg.preparation.preprocess import preprocess_all
from medseg.preparation.store import open_store, verify
from medseg.progress import SILENT, Progress
from medseg.records.plan import Plan
from medseg.records.preparation import StoreManifest, StorePrecision


def preprocess_run(
    run: Path,
    configurations: Sequence[str] = (),
    workers: int | None = None,
    progress: Progress = SILENT,
    precision: StorePrecision | None = None,
) -> dict[str, StoreManifest]:
    """Prepare all cases of the planned data set for the named configurations, or for all of the plan.

    Each case is read once for all of them. Configurations that prepare cases alike (``3d_fullres``, and the second
    stage of a cascade) share them; a cascade needs those of its first stage too. Finished cases are kept. Files must
    be those that were planned. ``precision`` is that of the images on disk; None keeps what is there, else it is
    float32.

    Raises:
        IncompatibleError: E0803 cases came or went since planning.
        InputError, PartialFailure: cases failed (E0103: their files changed since planning); all are listed.
    """
    folder = RunFolder(run)
    plan = folder.read_plan()
    folders = {name: folder.prepared(name) for name in _stores(plan, configurations)}
    planned = {case.id: case for case in folder.read_fingerprint().cases}
    return preprocess_all(folder.read_dataset(), plan, folders, workers, progress, planned, precision)


def verify_run(run: Path, configurations: Sequence[str] = (), progress: Progress = SILENT) -> dict[str, int]:
    """Read all prepared cases of the named configurations, or of all of the plan, again and compare their hashes.

    Returns:
        The number of cases by configuration.

    Raises:
        IncompatibleError: E0801 preprocessing did not run or did not finish.
        IntegrityError: E0701 files are missing, or not as they were written; every one is listed.
    """
    folder = RunFolder(run)
    stores = {name: open_store(folder.prepared(name)) for name in _stores(folder.read_plan(), configurations)}
    problems = [problem for store in stores.values() for problem in verify(store, progress)]
    if problems:
        raise IntegrityError(problems)
    return {name: len(store.cases) for name, store in stores.items()}


def _stores(plan: Plan, configurations: Sequence[str]) -> list[str]:
    """The names under which the prepared cases of the configurations and of their first stages lie."""
    wanted = list(configurations) or list(plan.configurations)
    return list(dict.fromkeys(prepared_as(plan, stage) for name in wanted for stage in stages_of(plan, name)))
