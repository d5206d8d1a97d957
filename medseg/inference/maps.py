"""Maps: probabilities and uncertainty of every voxel, made slab by slab while labels are exported, and their quality.

The maps of all classes on a large grid do not fit into memory: each is kept in a temporary file on the axes of the
source, whatever the order in which slabs come, and compressed when all are there.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.artefacts import TEMPORARY_PREFIX, TEMPORARY_SUFFIX, environment_failure
from medseg.imaging.crop import box_slices
from medseg.imaging.geometry import to_canonical
from medseg.imaging.scaled import write_scaled
from medseg.inference.export import Interpolation, Ready, interpolate, portions
from medseg.inference.passes import entropy
from medseg.records.grid import Grid
from medseg.records.preparation import Preparation
from medseg.records.task import Task

ROWS_BYTES = 64 * 2**20  # of interpolated logits at a time; several copies of them live at once

Steps = Literal["uint8", "uint16"]
Numbers = NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which maps: probabilities in 255 or 65535 steps, None for none; the uncertainty in 65535 steps; attention in 255.

    Uncertainty and attention exclude one another: both are channels after the outputs.
    """

    probabilities: Steps | None = None
    uncertainty: bool = False
    attention: bool = False

    @property
    def any(self) -> bool:
        """Whether a map is wanted at all."""
        return self.probabilities is not None or self.uncertainty or self.attention


class Maps:
    """The maps of one case; ``observe`` is for ``medseg.inference.export.labels_from_slabs``."""

    def __init__(self, wanted: Wanted, task: Task, preparation: Preparation, folder: Path) -> None:
        """Reserve temporary files in ``folder``.

        Raises:
            EnvironmentFailure: E0501, E0502.
        """
        self.wanted, self.task, self.preparation = wanted, task, preparation
        self.sums = np.zeros((3, task.outputs))  # of probability, of probability within the label, of its voxels
        self.probabilities: list[_Spool] = []
        self.uncertainty: _Spool | None = None
        self.attention: list[_Spool] = []
        self.folder = folder
        try:
            if wanted.probabilities is not None:
                for output in range(task.outputs):
                    outside = 0 if task.regions or output else 1
                    self.probabilities.append(_Spool(folder, preparation, wanted.probabilities, outside))
            if wanted.uncertainty:
                self.uncertainty = _Spool(folder, preparation, "uint16", 0)
        except BaseException:
            self.close()
            raise

    def observe(self, way: Interpolation, ready: Ready, labels: NDArray[np.int16]) -> None:
        """Take the logits of some rows; channels after the outputs: the networks' disagreement, or their attention."""
        outputs = self.task.outputs
        for rows in portions(ready.rows, ROWS_BYTES, outputs, way):
            logits = interpolate(ready, way, rows)
            found = logits[:outputs]
            inside = self._inside(found, labels[rows.start - ready.rows.start : rows.stop - ready.rows.start])
            shares = torch.sigmoid(found) if self.task.regions else torch.softmax(found, 0)
            self.sums[0] += shares.sum((1, 2, 3), dtype=torch.float64).numpy(force=True)
            for output in range(outputs):
                mask = inside(output)
                self.sums[1, output] += float(shares[output][mask].sum(dtype=torch.float64))
                self.sums[2, output] += int(mask.sum())
            for spool, share in zip(self.probabilities, shares, strict=False):
                spool.put(rows, share)
            if self.uncertainty is not None:
                self.uncertainty.put(rows, logits[outputs] if len(logits) > outputs else self._entropy(shares))
            if self.wanted.attention:
                self._put_attention(rows, logits[outputs:])

    def _put_attention(self, rows: slice, gates: Tensor) -> None:
        if not self.attention:
            for _ in gates:
                self.attention.append(_Spool(self.folder, self.preparation, "uint8", 0))
        for spool, gate in zip(self.attention, gates, strict=True):
            spool.put(rows, gate)

    def _inside(self, logits: Tensor, labels: NDArray[np.int16]) -> _Inside:
        return _Inside(logits if self.task.regions else None, torch.from_numpy(labels).to(logits.device))

    def _entropy(self, shares: Tensor) -> Tensor:
        """In shares of the largest possible."""
        regions = bool(self.task.regions)
        return entropy(shares.unsqueeze(0), regions)[0] / math.log(2 if regions else max(2, len(shares)))

    def quality(self) -> float | None:
        """See ``expected_dice``."""
        return expected_dice(self.sums, self.task)

    def write(self, output: Path, case: str, grid: Grid) -> dict[str, str]:
        """Compress and commit the maps below ``output``; SHA-256 by relative name."""
        written = {}
        for spool, name in zip(self.probabilities, self._names(case), strict=False):
            written[name] = spool.write(output / name, grid)
        if self.uncertainty is not None:
            name = f"uncertainty/{case}.nii.gz"
            written[name] = self.uncertainty.write(output / name, grid)
        for level, spool in enumerate(self.attention, start=1):
            name = f"attention/{case}/level_{level}.nii.gz"
            written[name] = spool.write(output / name, grid)
        return written

    def _names(self, case: str) -> Iterator[str]:
        if self.task.regions:
            yield from (f"probabilities/{case}/region_{i + 1}.nii.gz" for i in range(len(self.task.regions)))
        else:
            yield from (f"probabilities/{case}/label_{value}.nii.gz" for value in self.task.values)

    def close(self) -> None:
        """Remove the temporary files."""
        uncertainty = [] if self.uncertainty is None else [self.uncertainty]
        for spool in [*self.probabilities, *uncertainty, *self.attention]:
            spool.close()


def expected_dice(sums: NDArray[np.float64], task: Task) -> float | None:
    """The mean over foreground outputs that were found of the Dice expected if probabilities are right.

    Of one output: twice the probability within its voxels, over their number plus all probability of it. None where
    nothing was found.

    Args:
        sums: (3, outputs): of all probability, of that within the output's voxels, and the number of these.
        task: its labels and regions.
    """
    total, within, voxels = sums[:, 0 if task.regions else 1 :]
    found = voxels > 0
    if not found.any():
        return None
    return float(np.clip((2 * within[found] / (voxels[found] + total[found])).mean(), 0, 1))


@dataclass(frozen=True, slots=True, eq=False)
class _Inside:
    """The voxels (rows, Y, X) that belong to an output: of its label, or in its region."""

    logits: Tensor | None
    labels: Tensor

    def __call__(self, output: int) -> Tensor:
        return self.labels == output if self.logits is None else self.logits[output] > 0


class _Spool:
    """One map from 0 to 1 in a temporary file, on the source's axes; ``rows`` of it are those of the cropped grid."""

    def __init__(self, folder: Path, preparation: Preparation, steps: Steps, outside: int) -> None:
        kind = np.dtype(steps)
        self.largest = int(np.iinfo(kind).max)
        self.path = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}{TEMPORARY_SUFFIX}"
        shape = preparation.source_shape
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _reserve(self.path, math.prod(shape) * kind.itemsize)
            self.array: Numbers = np.memmap(self.path, kind, "r+", shape=shape)
        except OSError as error:
            self.close()
            raise environment_failure(error, self.path) from error
        if outside:
            self.array[...] = self.largest
        canonical = to_canonical(self.array, preparation.to_canonical, preparation.flipped)
        self.cropped = canonical.transpose(preparation.transpose)[box_slices(preparation.crop_box)]

    def put(self, rows: slice, values: Tensor) -> None:
        self.cropped[rows] = (values * self.largest).round_().numpy(force=True).astype(self.array.dtype)

    def write(self, path: Path, grid: Grid) -> str:
        return write_scaled(path, self.array, grid, 1 / self.largest)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    """A file of ``size`` bytes whose blocks are there: writing to a mapped hole of a full disk would kill us."""
    with path.open("xb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        piece = bytes(2**20)
        for start in range(0, size, len(piece)):
            file.write(piece[: size - start])
