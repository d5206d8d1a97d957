"""MLflow log: a journal as a run in an SQLite database, which ``mlflow ui`` shows."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.training.journal import Line
from medseg.training.scalars import scalars

EXPERIMENT = "medseg"
FOLD = "medseg.fold"  # tag: which fold a run is of
WRITING = "medseg.writing"  # tag: "FIRST LAST" step of the newest batch; a kill may have cut it off
FLUSH_EVERY_S = 10.0
BATCH = 1000  # numbers; MLflow takes no more at once


class MLflow:
    """An observer that fills a run of MLflow.

    A training that goes on goes on in its run. If that run holds steps that were lost and are taken again (after a
    kill or a loss of power), it is deleted and a new one is made from the journal: no run holds a step twice.

    Args:
        database: SQLite file; folds may share it.
        fold: names the run, such as ``3d_fullres/fold_0``.
        parameters: what the run shows of the plan.
    """

    def __init__(self, database: Path, fold: str, parameters: Mapping[str, str]) -> None:
        self.database, self.fold, self.parameters = database, fold, parameters
        self.client: Any = None
        self.run_id, self.begun_ms, self.flushed = "", 0, 0.0
        self.waiting: list[Any] = []
        self.first = 0  # step from which on the run may lack lines

    def begin(self, lines: Sequence[Line]) -> None:
        """Open or make the run, and add the lines that it lacks."""
        self.client = _client(self.database)
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        place = (self.database.parent / "mlflow-files").resolve().as_uri()
        number = experiment.experiment_id if experiment else self.client.create_experiment(EXPERIMENT, place)
        for run in self.client.search_runs([number]):
            if run.data.tags.get(FOLD) == self.fold:
                self._take_over(run, lines[-1].step if lines else 0)
        if self.run_id:
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self._make_run(number, lines[-1].seconds if lines else 0.0)
        for line in lines:
            if line.step >= self.first:  # what the run has of them already is not written twice: it is equal
                self.write(line)
        self.sync()

    def _take_over(self, run: Any, last: int) -> None:
        """Go on in this run, unless it holds more than ``last`` steps."""
        first, written = (int(step) for step in run.data.tags.get(WRITING, "0 0").split())
        if self.run_id or written > last:
            self.client.delete_run(run.info.run_id)
        else:
            self.run_id, self.begun_ms, self.first = run.info.run_id, run.info.start_time, first

    def _make_run(self, experiment_id: str, seconds: float) -> None:
        self.begun_ms = round(1000 * (time.time() - seconds))
        run = self.client.create_run(experiment_id, self.begun_ms, {FOLD: self.fold}, self.fold)
        self.run_id = run.info.run_id
        for name, value in self.parameters.items():
            self.client.log_param(self.run_id, name, value)

    def write(self, line: Line) -> None:
        """Remember the line's numbers; they are written every ten seconds."""
        from mlflow.entities import Metric

        now_ms = self.begun_ms + round(1000 * line.seconds)  # of the training, not of the clock
        self.waiting += [Metric(name, value, now_ms, line.step) for name, value in scalars(line).items()]
        if len(self.waiting) >= BATCH or time.monotonic() - self.flushed > FLUSH_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Write what is remembered."""
        if self.waiting:
            self.client.set_tag(self.run_id, WRITING, f"{self.waiting[0].step} {self.waiting[-1].step}")
        for start in range(0, len(self.waiting), BATCH):
            self.client.log_batch(self.run_id, metrics=self.waiting[start : start + BATCH])
        self.waiting.clear()
        self.flushed = time.monotonic()

    def close(self, *, finished: bool) -> None:
        """Write what is remembered and end the run; one that was interrupted is opened again when it goes on."""
        self.sync()
        self.client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


def _client(database: Path) -> Any:
    """A client of the database that tells nobody else anything."""
    import mlflow
    from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY
    from mlflow.telemetry import set_telemetry_client

    MLFLOW_DISABLE_TELEMETRY.set(True)
    set_telemetry_client()  # looks at the setting again
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes
    database.parent.mkdir(parents=True, exist_ok=True)
    return mlflow.MlflowClient(f"sqlite:///{database.resolve().as_posix()}")
