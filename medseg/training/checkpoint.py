"""Checkpoint: a folder ``step_00001250`` with weights, momentum and the state of the loop, committed by its manifest.

The newest two are kept; a damaged one is passed over. No pickle, and no random state: batches are a function of the
step. With a model card beside the weights, a checkpoint is a model folder that predicts; ``best`` is one without
momentum.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import nn

from medseg.artefacts import sha256_of
from medseg.errors import IntegrityError, MedsegError, Problem
from medseg.networks.weights import load_weights, save_tensors, save_weights
from medseg.records.base import Record, read_record, write_record
from medseg.records.model import CARD, WEIGHTS, ModelCard

log = logging.getLogger(__name__)

KEEP = 2
BEST = "best"
OPTIMIZER, STATE, MANIFEST = "optimizer.safetensors", "state.json", "manifest.json"

Describe = Callable[[int, float, str], ModelCard]  # of steps, seconds and the SHA-256 of the weights


class LossScale(Record):
    """Of a training in float16: by how much losses are multiplied, and the steps since that was last too much."""

    scale: float = Field(gt=0)
    clean_steps: int = Field(ge=0)

    @classmethod
    def of(cls, scaler: torch.amp.GradScaler) -> LossScale | None:
        """The scaler's state; None where nothing is scaled."""
        state = scaler.state_dict()
        return cls(scale=state["scale"], clean_steps=state["_growth_tracker"]) if state else None

    def restore(self, scaler: torch.amp.GradScaler) -> None:
        """Put it back."""
        state = {"scale": self.scale, "_growth_tracker": self.clean_steps}
        scaler.load_state_dict(scaler.state_dict() | state)


class LoopState(Record):
    """Where the loop stands: steps done, seconds spent, and what it was asked to do (a hash of the settings).

    ``length`` is how long it was to train; a later command may have changed it. ``loss_scale`` is for float16 alone.
    """

    step: int = Field(ge=0)
    elapsed_s: float = Field(ge=0)
    settings_sha256: str
    length: str
    precision: str
    threads: int = Field(ge=1)
    loss_scale: LossScale | None = None


class CheckpointManifest(Record):
    """SHA-256 of the files of one checkpoint."""

    schema_version: int = Field(default=1, ge=1, le=1)
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    folder: Path
    state: LoopState


def save_checkpoint(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.SGD,
    state: LoopState,
    describe: Describe | None = None,
) -> None:
    """Commit a checkpoint in ``folder`` and remove all but it and the one before."""
    target = folder / f"step_{state.step:08d}"
    momentum = {
        f"{index}": optimizer.state[p]["momentum_buffer"]
        for index, p in enumerate(optimizer.param_groups[0]["params"])
        if optimizer.state[p].get("momentum_buffer") is not None
    }
    files = {
        WEIGHTS: save_weights(target / WEIGHTS, network),
        OPTIMIZER: save_tensors(target / OPTIMIZER, momentum),
        STATE: write_record(target / STATE, state),
    }
    if describe is not None:
        files[CARD] = write_record(target / CARD, describe(state.step, state.elapsed_s, files[WEIGHTS]))
    write_record(target / MANIFEST, CheckpointManifest(files=files))
    complete = [path for path in _folders(folder) if (path / MANIFEST).is_file() and path.name <= target.name]
    for path in set(_folders(folder)) - set(complete[-KEEP:]):  # later ones were damaged: training went on before them
        shutil.rmtree(path, ignore_errors=True)


def save_best(folder: Path, network: nn.Module, card: Callable[[str], ModelCard]) -> None:
    """Keep these weights as ``best``, a model folder; the card is written last and vouches for the weights."""
    target = folder / BEST
    (target / CARD).unlink(missing_ok=True)
    write_record(target / CARD, card(save_weights(target / WEIGHTS, network)))


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are what its manifest says; damaged ones are passed over with a warning."""
    for path in reversed(_folders(folder)):
        try:
            manifest = read_record(path / MANIFEST, CheckpointManifest)
            damaged = [name for name, digest in manifest.files.items() if sha256_of(path / name) != digest]
            if damaged:
                raise IntegrityError(Problem("E0701", f"{path.name}: {', '.join(damaged)} damaged"))
            return Checkpoint(path, read_record(path / STATE, LoopState))
        except (MedsegError, OSError) as error:
            log.warning("checkpoint %s is passed over: %s", path.name, error)
    return None


def load_checkpoint(checkpoint: Checkpoint, network: nn.Module, optimizer: torch.optim.SGD) -> None:
    """Put weights and momentum back where they were."""
    load_weights(checkpoint.folder / WEIGHTS, network)
    momentum = load_file(checkpoint.folder / OPTIMIZER)
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        if f"{index}" in momentum:
            buffer = torch.empty_like(parameter)
            buffer.copy_(momentum[f"{index}"])
            optimizer.state[parameter]["momentum_buffer"] = buffer


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if p.is_dir()) if folder.is_dir() else []
