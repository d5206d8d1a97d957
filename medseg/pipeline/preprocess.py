"""Preprocess: the planned configurations prepared in a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medseg.pipeline.run_folder import RunFolder, prepared_as, stages_of
from medseg.preparation.preprocess import preprocess
from medseg.progress import SILENT, Progress
from medseg.records.preparation import StoreManifest


def preprocess_run(
    run: Path, configurations: Sequence[str] = (), workers: int | None = None, progress: Progress = SILENT
) -> dict[str, StoreManifest]:
    """Prepare all cases of the planned data set for the named configurations, or for all of the plan.

    Configurations that prepare cases alike (``3d_fullres``, and the second stage of a cascade) share them; a cascade
    needs those of its first stage too. Finished cases are kept. Files must be those that were planned.

    Raises:
        IncompatibleError: E0803 cases came or went since planning.
        InputError, PartialFailure: cases failed (E0103: their files changed since planning); all are listed.
    """
    folder = RunFolder(run)
    plan = folder.read_plan()
    wanted = list(configurations) or list(plan.configurations)
    names = list(dict.fromkeys(prepared_as(plan, stage) for name in wanted for stage in stages_of(plan, name)))
    dataset = folder.read_dataset()
    planned = {case.id: case.sha256 for case in folder.read_fingerprint().cases}
    return {name: preprocess(dataset, plan, name, folder.prepared(name), workers, progress, planned) for name in names}
