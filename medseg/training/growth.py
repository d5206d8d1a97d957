"""Growth: a training that begins with smaller patches, which are cheaper, and ends with those that were planned.

Small patches give many more updates in the same time while the network learns what things look like; large ones teach
it afterwards where they lie. Fischer et al. (MICCAI 2024, arXiv 2407.07853) report a higher Dice on 7 of 10 tasks of
the Decathlon in about half of the time, with patches that grow in many steps; two smaller sizes are taken here. What
that gains within a time budget is in ``docs/concepts/training.md``.
"""

from __future__ import annotations

import math

from medseg.records.network import PADDING_NETWORKS
from medseg.records.plan import ConfigurationPlan
from medseg.records.training import Phase

# Until this share of the training: share of the patch's edges, and how many times the batch.
PHASES = ((0.40, 0.6, 2), (0.65, 0.8, 1))
LEAST_EDGE = 2  # of the coarsest level, in voxels, where it is not smaller as planned


def grown(configuration: ConfigurationPlan) -> ConfigurationPlan:
    """The configuration with phases of smaller patches; without, where nothing can be made smaller.

    Networks whose strides are not those of the plan, or that take one size only, keep their patch.
    """
    network, phases = configuration.network, []
    if network.name in PADDING_NETWORKS or network.padding == "valid":
        return configuration
    for until, share, batches in PHASES:
        patch = smaller(configuration, share)
        if patch != configuration.patch_size:
            phases.append(Phase(until=until, patch_size=patch, batch_size=batches * configuration.batch_size))
    training = configuration.training.model_copy(update={"growth": tuple(phases)})
    return configuration.model_copy(update={"training": training})


def smaller(configuration: ConfigurationPlan, share: float) -> tuple[int, ...]:
    """The patch with edges of about ``share`` of the planned ones that the strides divide."""
    edges = []
    for axis, planned in enumerate(configuration.patch_size):
        divisor = math.prod(stride[axis] for stride in configuration.network.strides)
        steps = max(round(planned * share / divisor), min(LEAST_EDGE, planned // divisor))
        edges.append(min(planned, steps * divisor))
    return tuple(edges)


def steps_per_planned(configuration: ConfigurationPlan) -> float:
    """How many steps a training by the clock makes while one with the planned patch all along would make one."""
    voxels, before, steps = math.prod(configuration.patch_size), 0.0, 0.0
    for phase in configuration.training.growth:
        cost = math.prod(phase.patch_size) * phase.batch_size / (voxels * configuration.batch_size)
        steps += (phase.until - before) / cost
        before = phase.until
    return steps + 1 - before
