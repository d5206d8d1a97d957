"""Frugal: a training for which the GPU's memory is too small goes on with less of it, and with the same result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from medseg.networks.checkpointing import checkpoint_stages, is_checkpointed

log = logging.getLogger(__name__)

T = TypeVar("T")


def frugally(network: Any, work: Callable[[], T], processes: int = 1) -> T:
    """``work``, which takes a step of ``network``; when the GPU's memory is too small, again with checkpointing.

    From then on the network computes its stages twice, with the same loss and gradients to the last bit, in about a
    third more time. Several processes cannot do that on their own: the others are in the middle of the same step.

    Raises:
        torch.OutOfMemoryError: it is too small all the same, or there are several processes.
    """
    try:
        return work()
    except torch.OutOfMemoryError:
        if processes > 1 or is_checkpointed(network):
            raise
    _save_memory(network)  # not while the error is handled: it holds on to the tensors of where it happened
    return work()


def _save_memory(network: nn.Module) -> None:
    log.warning("the GPU's memory is too small; going on with checkpointing, which takes longer and gives the same")
    network.zero_grad(set_to_none=True)
    checkpoint_stages(network.stages())  # type: ignore[operator]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
