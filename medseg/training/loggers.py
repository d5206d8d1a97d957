"""Loggers: observers of a journal that show a training in the tools of others, TensorBoard and MLflow, offline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medseg.errors import Problem, UsageError
from medseg.training.journal import Observer
from medseg.training.mlflow_log import MLflow
from medseg.training.tensorboard_log import TensorBoard


@dataclass(frozen=True, slots=True)
class Logged:
    """What is logged: the run folder, the fold's folder in it, the fold's name, and what is told of its plan."""

    run: Path
    folder: Path
    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def open_loggers(names: Sequence[str], logged: Logged) -> tuple[Observer, ...]:
    """The loggers of these names, each once; nothing is written before a journal is opened with them.

    Raises:
        UsageError: E0001 no such logger, or its library is not installed.
    """
    check_loggers(names)
    return tuple(LOGGERS[name].make(logged) for name in dict.fromkeys(names))


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers that there are not, or whose library is not installed.

    Raises:
        UsageError: E0001.
    """
    for name in names:
        if name not in LOGGERS:
            raise UsageError(Problem("E0001", f"no logger is called {name}", ", ".join(LOGGERS), "choose one of them"))
        try:
            LOGGERS[name].try_import()
        except ImportError as error:
            missing = Problem("E0001", f"the logger needs {error.name}", "", f'pip install "medseg[{name}]"')
            raise UsageError(missing) from error


def _import_tensorboard() -> None:
    import tensorboard.summary.writer.record_writer  # noqa: F401


def _import_mlflow() -> None:
    import mlflow  # noqa: F401
    import sqlalchemy  # noqa: F401


@dataclass(frozen=True, slots=True)
class _Kind:
    try_import: Callable[[], None]
    make: Callable[[Logged], Observer]


LOGGERS = {
    "tensorboard": _Kind(_import_tensorboard, lambda logged: TensorBoard(logged.folder / "tensorboard")),
    "mlflow": _Kind(_import_mlflow, lambda logged: MLflow(logged.run / "mlflow.db", logged.name, logged.parameters)),
}
