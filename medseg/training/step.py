"""Step: one update of the network's weights from one batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from medseg.errors import NonFiniteError, Problem
from medseg.networks.device import Device, place_batch
from medseg.training.batches import Batch
from medseg.training.frugal import frugally
from medseg.training.loss import Choice, supervised_parts
from medseg.training.settings import Settings
from medseg.training.world import ALONE, World

CLIP_NORM = 12.0  # nnU-Net: gradient norm
UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


@dataclass(frozen=True, slots=True)
class Taken:
    """A step: ``numbers`` are its loss, the norm of its gradient, its loss scale and the ``parts`` of the loss.

    On a GPU they may not be known yet; to read them is to wait. The scale is 1 where there is none.
    """

    step: int
    cases: tuple[str, ...]
    parts: tuple[str, ...]
    numbers: Tensor

    def losses(self, numbers: Sequence[float]) -> tuple[float, dict[str, float]]:
        """The loss and its parts by name, none if it is of one piece, from ``numbers`` as they were read.

        In float16 a gradient may be beyond its numbers: the step was left out, and the next ones have a lower scale.

        Raises:
            NonFiniteError: E1001 the loss or the gradient is not finite: no update was made.
        """
        loss, norm, scale, *parts = numbers
        if not math.isfinite(loss) or not (math.isfinite(norm) or scale > 1):
            cases = ", ".join(sorted(set(self.cases)))
            raise NonFiniteError(
                Problem(
                    "E1001",
                    f"step {self.step}: loss {loss}, gradient norm {norm} with cases {cases}",
                    "finite values",
                    "check these cases, or lower initial_lr in plan.json; the last checkpoint is intact",
                )
            )
        return loss, dict(zip(self.parts, parts, strict=True)) if len(parts) > 1 else {}


def build_optimizer(network: nn.Module, settings: Settings) -> torch.optim.SGD:
    """SGD as the plan says; on a GPU the fused one, which can be told by the GPU to leave out a step."""
    training = settings.configuration.training
    return torch.optim.SGD(
        network.parameters(),
        lr=training.initial_lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=training.momentum > 0,
        fused=settings.device.torch_device.type == "cuda",
    )


def build_scaler(device: Device) -> torch.amp.GradScaler:
    """What multiplies losses in float16, so that small gradients are not lost, and gradients by the inverse.

    In other number types it changes nothing.
    """
    return torch.amp.GradScaler(device.torch_device.type, enabled=device.dtype == torch.float16)


def take_step(
    network: nn.Module,
    optimizer: torch.optim.SGD,
    batch: Batch,
    lr: float,
    settings: Settings,
    regions: Tensor | None,
    world: World = ALONE,
    scaler: torch.amp.GradScaler = UNSCALED,
    *,
    frugal: bool = True,
) -> Taken:
    """One update; the loss is the one before it, of the whole batch in every process.

    A gradient that is not finite updates nothing. On a CPU the error is raised here; a GPU skips the update by itself
    and is not waited for: the error is that of ``Taken.losses``. ``scaler`` is that of ``build_scaler``. If
    ``frugal``, gradients for which the GPU's memory is too small are computed with checkpointing, now and from then on.

    Raises:
        NonFiniteError: E1001 on a CPU.
        torch.OutOfMemoryError: the GPU's memory is too small.
    """
    device = settings.device
    for group in optimizer.param_groups:
        group["lr"] = lr
    work = partial(_backward, network, batch, settings, regions, world, scaler)
    sums = frugally(network, work, world.size) if frugal else work()
    world.sum_gradients(network.parameters())
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
    values = torch.stack(list(sums.values()))
    scale = scaler.scale(torch.ones_like(values[:1]))
    numbers = torch.cat([values.sum()[None], norm.detach()[None], scale, values])
    taken = Taken(batch.step, batch.cases, tuple(sums), numbers)
    if device.torch_device.type != "cuda":
        taken.losses(numbers.tolist())
    elif not scaler.is_enabled():
        finite = numbers[:2].isfinite().all()
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # what the scaler sets, too
    scaler.step(optimizer)
    scaler.update()
    return taken


def _backward(
    network: nn.Module,
    batch: Batch,
    settings: Settings,
    regions: Tensor | None,
    world: World,
    scaler: torch.amp.GradScaler,
) -> dict[str, Tensor]:
    """The gradients of this process, scaled, in the network's weights; the parts of the loss by name."""
    device, training = settings.device, settings.configuration.training
    network.zero_grad(set_to_none=True)
    choice, sums = Choice.of(settings.configuration), dict[str, Tensor]()
    for image, labels, share in _parts(batch, training.accumulate, world.size):
        with torch.autocast(device.torch_device.type, device.dtype, enabled=device.half):
            outputs = network(place_batch(image, device))
        labels, batch_dice = labels.to(device.torch_device, non_blocking=True), training.batch_dice
        parts = supervised_parts(outputs, labels, batch_dice=batch_dice, regions=regions, choice=choice, world=world)
        scaler.scale(torch.stack(list(parts.values())).sum() * share).backward()
        sums = {name: sums.get(name, 0.0) + part.detach() * share for name, part in parts.items()}
    return sums


def _parts(batch: Batch, count: int, processes: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The batch in parts of like size, whose gradients are summed: less memory, the Dice is of each part.

    ``processes`` that share the batch need fewer parts each, and all of them as many. With each part comes the share
    of all samples that it has, in all processes together.
    """
    whole = len(batch.cases)
    count = max(1, min(math.ceil(count / processes), whole // processes))
    samples = [whole * (n + 1) // processes - whole * n // processes for n in range(processes)]
    shares = [sum(n // count + (part < n % count) for n in samples) / whole for part in range(count)]
    yield from zip(batch.image.tensor_split(count), batch.labels.tensor_split(count), shares, strict=True)
