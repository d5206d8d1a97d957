"""Ladder: what to do when the GPU's memory is too small — less at a time, blending on the CPU, all on the CPU.

And when an image is beyond the numbers of float16: that one in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from medseg.errors import NonFiniteError
from medseg.inference.backend import TORCH
from medseg.inference.model import Model
from medseg.inference.sliding import Blending
from medseg.networks.device import Device, place

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rung:
    """One way of getting by with less of the GPU's memory, and its words for the log."""

    words: str
    together: int | None = None
    blend_on_device: bool = True
    on_cpu: bool = False


RUNGS = (
    Rung("as the device allows"),
    Rung("one tile at a time", together=1),
    Rung("one tile at a time, blended on the CPU", together=1, blend_on_device=False),
    Rung("all on the CPU, which is slow", together=1, blend_on_device=False, on_cpu=True),
)


class Ladder:
    """A model and the rung that it stands on. Later cases start where the last one got through."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.rung = 0

    def run(self, work: Callable[[Model, Blending], T], blending: Blending) -> T:
        """``work`` with as much on the device as fits: after each failure for want of its memory, a rung lower.

        Raises:
            torch.OutOfMemoryError: there is no lower rung, or the model is on the CPU already.
            NonFiniteError: E1002, in float32 too if it began in float16.
        """
        while True:
            rung = RUNGS[self.rung]
            try:
                return work(self.model, replace(blending, together=rung.together, on_device=rung.blend_on_device))
            except torch.OutOfMemoryError:
                if self.model.device.torch_device.type == "cpu" or self.rung + 1 == len(RUNGS):
                    raise
            except NonFiniteError:
                if self.model.device.dtype != torch.float16:
                    raise
                break
            self._step_down()  # not while the error is handled: it holds on to the tensors of where it happened
        log.warning("beyond the numbers of float16; this one is computed in float32")
        exact = Ladder(in_float32(self.model))
        exact.rung = self.rung  # twice the memory of float16 will not fit where that did not
        return exact.run(work, blending)

    def _step_down(self) -> None:
        self.rung += 1
        rung = RUNGS[self.rung]
        log.warning("the GPU's memory is too small; going on with %s", rung.words)
        if rung.on_cpu:
            self.model = on_cpu(self.model)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def in_float32(model: Model) -> Model:
    """The same model, all stages."""
    device = replace(model.device, dtype=torch.float32, reason="float16 overflowed")
    previous = None if model.previous is None else in_float32(model.previous)
    return replace(model, device=device, previous=previous, backend=TORCH)


def on_cpu(model: Model) -> Model:
    """The same model on the CPU in float32, all stages."""
    device = Device(torch.device("cpu"), torch.float32, "the GPU's memory is too small")
    dimensions = model.configuration.dimensions
    networks = tuple(place(network, device, dimensions).eval() for network in model.networks)
    previous = None if model.previous is None else on_cpu(model.previous)
    return replace(model, networks=networks, device=device, previous=previous, backend=TORCH)
