"""Readings: the numbers of every step, fetched from the device without making it wait.

To ask a GPU for a number makes the program wait until the GPU has done all that it was told; a GPU that has nothing
more to do then stands still until the next step is on its way. So the numbers are copied while the GPU works on, and
read a few steps later.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

AHEAD = 2  # steps that may be on their way: enough to keep a GPU busy, and the clock tells the truth

T = TypeVar("T")


class Readings(Generic[T]):
    """Small tensors on their way from a device, each with what it belongs to, in order."""

    def __init__(self, ahead: int = AHEAD) -> None:
        self.ahead = ahead
        self.coming: deque[tuple[T, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, what: T, numbers: Tensor) -> list[tuple[T, list[float]]]:
        """Start to fetch ``numbers`` (n,); returns what has arrived, all of it if the device is a CPU.

        Waits where more than ``ahead`` are on their way.
        """
        numbers = numbers.detach()
        if numbers.is_cuda:
            copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            copy.copy_(numbers, non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(numbers.device))
            self.coming.append((what, copy, done))
        else:
            self.coming.append((what, numbers.clone(), None))
        arrived = []
        while self.coming and (len(self.coming) > self.ahead or _done(self.coming[0][2])):
            arrived.append(self._next())
        return arrived

    def drain(self) -> list[tuple[T, list[float]]]:
        """Wait for all that are on their way, and return them."""
        return [self._next() for _ in range(len(self.coming))]

    def _next(self) -> tuple[T, list[float]]:
        what, numbers, done = self.coming.popleft()
        if done is not None:
            done.synchronize()
        return what, numbers.tolist()


def _done(event: torch.cuda.Event | None) -> bool:
    return event is None or event.query()
