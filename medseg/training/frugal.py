"""Frugal: a training for which the GPU's memory is too small goes on with less of it, and with the same result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from medseg.networks.checkpointing import checkpoint_stages, is_checkpointed

log = logging.getLogger(__name__)

T = TypeVar("T")


def frugally(network: nn.Module, work: Callable[[], T], processes: int = 1) -> T:
    """``work``, which computes gradients of ``network``; if the GPU's memory is too small, again with checkpointing.

    From then on the network computes its stages twice, with the same loss and gradients to the last bit, in about a
    third more time. What the first try did to running statistics is undone. Several processes cannot do that on their
    own: the others are in the middle of the same step.

    Raises:
        torch.OutOfMemoryError: it is too small all the same, or there are several processes.
    """
    if processes > 1 or is_checkpointed(network):
        return work()
    before = [buffer.clone() for buffer in network.buffers()]
    try:
        return work()
    except torch.OutOfMemoryError:
        log.warning("the GPU's memory is too small; going on with checkpointing, which takes longer and gives the same")
    _save_memory(network)  # not while the error is handled: it holds on to the tensors of where it happened
    for buffer, value in zip(network.buffers(), before, strict=True):
        buffer.copy_(value)
    return work()


def _save_memory(network: nn.Module) -> None:
    network.zero_grad(set_to_none=True)
    checkpoint_stages(network.stages())  # type: ignore[operator]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
