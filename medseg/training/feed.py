"""Feed: the batch that the training needs next, from a stream that is begun anew when the patch grows."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

import torch

from medseg.preparation.store import StoredCase
from medseg.records.plan import ConfigurationPlan
from medseg.records.task import Task
from medseg.training.batches import CPU, Batch, Sampling, batch_threads, stream


class Feed:
    """Batches of one training. Batch ``step`` is a pure function of the seed, the step and the patch of that time."""

    def __init__(
        self,
        cases: Sequence[StoredCase],
        configuration: ConfigurationPlan,
        task: Task,
        seed: int,
        share: tuple[int, int] = (0, 1),
        device: torch.device = CPU,
        processes: int = 1,
    ) -> None:
        """For one of several processes its ``share``; ``processes`` of them are on this machine."""
        self.cases, self.configuration, self.task, self.seed, self.share = cases, configuration, task, seed, share
        self.device, self.threads = device, batch_threads(device, processes)
        self.sampling: Sampling | None = None
        self.batches: Generator[Batch, None, None] | None = None

    def batch(self, step: int, fraction: float) -> Batch:
        """The batch of ``step``, when ``fraction`` of the training is over; steps come one after the other."""
        sampling = replace(Sampling.of(at(self.configuration, fraction), self.task, self.seed), share=self.share)
        if self.batches is None or sampling != self.sampling:
            self.close()
            self.sampling, self.batches = sampling, stream(self.cases, sampling, step, self.threads, self.device)
        return next(self.batches)

    def close(self) -> None:
        """Stop making batches."""
        if self.batches is not None:
            self.batches.close()
        self.batches = None


def at(configuration: ConfigurationPlan, fraction: float) -> ConfigurationPlan:
    """The configuration with the patch and batch of the time when ``fraction`` of the training is over."""
    for phase in configuration.training.growth:
        if fraction < phase.until:
            changes = {"patch_size": phase.patch_size, "batch_size": phase.batch_size}
            return configuration.model_copy(update=changes)
    return configuration
