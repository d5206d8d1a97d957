"""Cases of a fold: the prepared ones that it trains on, in memory where they fit, and those that are watched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from medseg.errors import IncompatibleError, Problem
from medseg.inference.export import decide
from medseg.inference.sliding import PreviousLabels, predict_logits
from medseg.machine import free_memory_bytes
from medseg.networks.device import Device
from medseg.pipeline.cascade import with_previous_labels
from medseg.pipeline.run_folder import ALL_CASES, RunFolder, check_fold, prepared_as
from medseg.preparation.preprocess import settings_sha256
from medseg.preparation.store import Store, StoredCase, open_store
from medseg.progress import Progress
from medseg.records.plan import ConfigurationPlan, Plan
from medseg.records.run import Fold
from medseg.records.task import Task

log = logging.getLogger(__name__)

WATCHED_CASES = 8  # validation cases that are segmented whole while training
RAM_SHARE = 0.4  # of the free memory that prepared cases may take


def store_of(folder: RunFolder, plan: Plan, configuration: ConfigurationPlan) -> Store:
    """The prepared data set of a configuration, of this plan and with all of its cases.

    Raises:
        IncompatibleError: E0801, E0802.
    """
    store = open_store(folder.prepared(prepared_as(plan, configuration.name)))
    if store.manifest.settings_sha256 != settings_sha256(plan, configuration):
        raise IncompatibleError(
            Problem("E0802", "the prepared data set was made by another plan", "this plan", "run preprocess again")
        )
    planned = {case.id for case in folder.read_fingerprint().cases}
    if set(store.cases) != planned:
        found = f"{len(store.cases)} prepared cases"
        raise IncompatibleError(Problem("E0801", found, f"{len(planned)} planned", "run preprocess again"))
    return store


def cases_of(
    folder: RunFolder,
    plan: Plan,
    configuration: ConfigurationPlan,
    case_ids: Sequence[str],
    device: Device,
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> dict[str, StoredCase]:
    """The prepared cases, with the labels of the first stage if this is a cascade's second."""
    store = store_of(folder, plan, configuration)
    if configuration.previous_stage is None:
        return {case_id: store.case(case_id) for case_id in case_ids}
    first = store_of(folder, plan, plan.configurations[configuration.previous_stage])
    return with_previous_labels(folder, (first, store), configuration, case_ids, device, progress, stop_signal)


def fold_of(folder: RunFolder, name: str, store: Store) -> Fold:
    """The cases of a fold by its name, or all.

    Raises:
        UsageError: E0001 no such fold.
    """
    splits = folder.read_splits()
    check_fold(name, splits)
    return Fold(train=store.cases, val=()) if name == ALL_CASES else splits.folds[int(name)]


def in_memory(cases: Sequence[StoredCase], processes: int) -> list[StoredCase]:
    """The cases in memory if they fit well, for each of the processes on this machine, else read patch by patch."""
    if processes * sum(case.nbytes for case in cases) <= RAM_SHARE * free_memory_bytes():
        return [case.load() for case in cases]
    log.info("the prepared cases do not fit in memory and are read from disk")
    return list(cases)


def spread(cases: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the cases, evenly spread."""
    if len(cases) <= count:
        return list(cases)
    return [cases[i * len(cases) // count] for i in range(count)]


def watcher(
    cases: Sequence[StoredCase], configuration: ConfigurationPlan, task: Task, device: Device
) -> Callable[[nn.Module], dict[str, float | None]]:
    """A function that segments whole prepared volumes and returns the mean Dice per label on the network's grid."""
    names = {index: label.name for index, label in enumerate(task.labels) if index}

    def validate(network: nn.Module) -> dict[str, float | None]:
        dice: dict[int, list[float]] = {index: [] for index in names}
        for case in cases:
            previous = None if case.previous is None else PreviousLabels(case.previous[:], len(task.labels))
            logits = predict_logits([network], np.asarray(case.image[:]), configuration, device, previous=previous)
            predicted = decide(logits.unsqueeze(0), task)[0].numpy()
            reference = np.asarray(case.labels[:])
            for index in names:
                a, b = (predicted == index) & (reference >= 0), reference == index
                if (total := int(a.sum()) + int(b.sum())) > 0:
                    dice[index].append(2 * int((a & b).sum()) / total)
        return {names[index]: float(np.mean(values)) if values else None for index, values in dice.items()}

    return validate
