"""Checkpointing: stages whose inner values are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpoint_stages(stages: Iterable[nn.Module]) -> None:
    """Let each stage keep its inputs only while it is trained; outputs and gradients stay the same.

    A stage gets a class of its own that differs in ``forward``: names of weights, copies and hooks are as before.
    """
    for stage in stages:
        if any(True for _ in stage.parameters()):
            stage.__class__ = _checkpointed(type(stage))  # type: ignore[arg-type]


def is_checkpointed(network: nn.Module) -> bool:
    """Whether ``checkpoint_stages`` was called for stages of the network."""
    return any(getattr(module, "checkpointed", False) for module in network.modules())


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` with a forward pass that is computed twice."""
    original = kind.forward

    def forward(self: nn.Module, *inputs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return original(self, *inputs)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _without_statistics(self)

        def run(*values: Any) -> Any:
            return original(self, *values)

        return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)

    return type(f"Checkpointed{kind.__name__}", (kind,), {"forward": forward, "checkpointed": True})


@contextmanager
def _without_statistics(stage: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms: the second pass over a batch must not count it again."""
    norms = [m for m in stage.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:  # they stay arguments of the operation: what it keeps must be the same in both passes
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
