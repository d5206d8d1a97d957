"""World: the processes that train one network together, and the few things that they tell each other.

Every process makes its share of each batch. Sums of a loss are taken over all shares before they enter a quotient, and
gradients are added up: so loss, clipping and update are those of one process with the whole batch, whatever the shares
are. (A mean of the processes' gradients, as ``DistributedDataParallel`` takes it, is another one where the shares are
unequal or hold ignored voxels.)

Gradients are sent when all are there, not while the backward pass still runs: the network stays what it is, without a
wrapper that checkpoints, compilation and validation would have to know.

Who waits for a message looks for the others' heartbeats meanwhile (``medseg.training.beats``): nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medseg.errors import IncompatibleError, Problem, UsageError
from medseg.records.plan import ConfigurationPlan
from medseg.training.beats import Beats, gone

Result = TypeVar("Result")

LOOK_S = 2.0  # between two looks at the heartbeats while waiting
BUCKET_BYTES = 2**25  # gradients are added up in pieces of this size


@dataclass(frozen=True, slots=True)
class World:
    """The processes of one training, seen from one of them. ``ALONE`` is a world of one, in which nothing is sent.

    ``control`` carries messages between processors, ``data`` sums of tensors on the device of the network.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    control: Any = None
    data: Any = None
    beats: Beats | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """This process's share of a batch, as ``Sampling`` takes it."""
        return self.rank, self.size

    def sums(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Each of the tensors summed over the processes, in float32, in one message.

        The gradient is that of the own summand: whoever adds up the gradients of all processes has that of the sum.
        """
        if self.size == 1:
            return values
        flat = torch.cat([value.float().flatten() for value in values])
        parts = _Sum.apply(flat, self).split([value.numel() for value in values])  # type: ignore[no-untyped-call]
        return tuple(part.view(value.shape) for part, value in zip(parts, values, strict=True))

    def mean(self, values: Tensor) -> Tensor:
        """Mean of the values of all processes, of which each has its own number."""
        if self.size == 1:
            return values.mean()
        total, count = self.sums(values.sum(), values.new_tensor(values.numel(), dtype=torch.float32))
        return total / count

    def gather(self, values: Tensor) -> Tensor:
        """(size, *shape) of tensors that have the same shape everywhere; without gradient."""
        if self.size == 1:
            return values.detach().unsqueeze(0)
        parts = [torch.empty_like(values) for _ in range(self.size)]
        self._finish(dist.all_gather(parts, values.detach().contiguous(), self.data, async_op=True), self.data)
        return torch.stack(parts)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of all processes, in place. Those without one have none anywhere."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        sent = []
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, group=self.data, async_op=True)))
        for bucket, flat, work in sent:
            self._finish(work, self.data)
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                values = tensor.detach().contiguous()
                self._finish(dist.broadcast(values, 0, self.data, async_op=True), self.data)
                tensor.detach().copy_(values)

    def agree(self, stop: int | None, value: float) -> tuple[int | None, float]:
        """The signal that asked any of the processes to stop, or None, and the value of the first process."""
        if self.size == 1:
            return stop, value
        message = torch.tensor([stop or 0, value if self.first else -torch.inf], dtype=torch.float64)
        self._finish(dist.all_reduce(message, dist.ReduceOp.MAX, self.control, async_op=True), self.control)
        return int(message[0]) or None, float(message[1])

    def text(self, text: str) -> str:
        """The text of the first process; the others wait for it, however long that one works."""
        if self.size == 1:
            return text
        own = text.encode() if self.first else b""
        length = torch.tensor([len(own)])
        self._finish(dist.broadcast(length, 0, self.control, async_op=True), self.control)
        letters = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else torch.empty(0, dtype=torch.uint8)
        if not self.first:
            letters = torch.empty(int(length), dtype=torch.uint8)
        if int(length):
            self._finish(dist.broadcast(letters, 0, self.control, async_op=True), self.control)
        return bytes(letters.tolist()).decode()

    def same(self, text: str, what: str) -> None:
        """Refuse to go on unless the first process has the same text.

        Raises:
            IncompatibleError: E0802.
        """
        if (first := self.text(text)) != text:
            measured = f"process {self.rank} sees other {what} ({text or 'none'}) than the first ({first or 'none'})"
            raise IncompatibleError(Problem("E0802", measured, "", "give all processes the same run folder"))

    def in_turn(self, work: Callable[[], Result]) -> Result:
        """Let the first process do something, then the others, who find it done."""
        if not self.first:
            self.text("")
            return work()
        result = work()
        self.text("")
        return result

    def _finish(self, work: Any, group: Any) -> None:
        """Wait for a message; NCCL's are waited for by the device.

        Raises:
            ResourceError: E0602 a process is gone.
        """
        if group is not self.control:
            work.wait()
            return
        while True:
            try:
                work.wait(timedelta(seconds=LOOK_S))
                return
            except RuntimeError as error:  # it failed, or the time was up
                if work.is_completed() and not _succeeded(work):
                    raise gone("a process of this training ended") from error
            if self.beats is not None:
                self.beats.look()


ALONE = World()


def check_batches(configuration: ConfigurationPlan, world: World) -> None:
    """Refuse batches of which some process would get no sample.

    Raises:
        UsageError: E0001.
    """
    least = min([configuration.batch_size, *(phase.batch_size for phase in configuration.training.growth)])
    if least < world.size:
        measured = f"{world.size} processes for batches of {least}"
        raise UsageError(Problem("E0001", measured, "at least one sample each", "start fewer, or plan larger batches"))


def check_network(network: nn.Module, world: World) -> None:
    """Refuse networks whose layers look at the samples of other processes.

    Raises:
        UsageError: E0162.
    """
    if world.size > 1 and any(isinstance(module, _BatchNorm) for module in network.modules()):
        measured = "batch normalisation over several processes"
        raise UsageError(Problem("E0162", measured, "one process, or another norm", "plan another --network"))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in pieces of one type and of about ``BUCKET_BYTES``."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (bucket[0].dtype != tensor.dtype or sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _succeeded(work: Any) -> bool:
    try:
        work.wait()
    except RuntimeError:
        return False
    return True


class _Sum(torch.autograd.Function):
    """Sum over the processes; its gradient goes to the own summand alone."""

    @staticmethod
    def forward(context: Any, values: Tensor, world: World) -> Tensor:
        total = values.detach().clone()
        world._finish(dist.all_reduce(total, group=world.data, async_op=True), world.data)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
