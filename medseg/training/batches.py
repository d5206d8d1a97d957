"""Batches: the endless stream of training batches. Batch ``step`` is a pure function of (seed, step)."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.machine import usable_cores
from medseg.networks.one_hot import one_hot
from medseg.preparation.foreground import ANNOTATED
from medseg.preparation.store import StoredCase
from medseg.records.grid import Int3
from medseg.records.plan import ConfigurationPlan
from medseg.records.task import Task
from medseg.records.training import ForegroundBy
from medseg.training.augment import Augmentation, Box, Geometry, apply_intensity, apply_spatial, draw
from medseg.training.disturb import Disturbance, disturb, draw_disturbance

AHEAD = 3  # batches made before they are needed, by one thread
MOST_THREADS = 6  # for one GPU, which augments them itself; more only hold more of its memory
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Batch:
    """image (B, C, [Z,] Y, X) float32, labels (B, [Z,] Y, X) int64 with -1 = ignored, and the cases they are from.

    In a cascade's second stage the last channels of ``image`` are the previous stage's labels, one for each class.
    Where several processes share a batch, the samples are this process's, the cases those of the whole batch.
    """

    step: int
    image: Tensor
    labels: Tensor
    cases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How patches are drawn from the cases.

    ``jitter`` is how far, in shares of the patch, a forced foreground voxel may lie from its centre. ``swapped`` is
    the axis whose mirroring exchanges classes, with their new order. ``previous_classes`` are those of a previous
    stage, background included, 0 if there is none. ``masked`` are the channels that are 0 outside the nonzero mask.
    ``share`` (k, n): of the samples of each batch, the k-th of n contiguous shares is made.
    """

    patch: Int3
    batch_size: int
    foreground_share: float
    mirror_axes: tuple[int, ...]
    seed: int
    flat: bool
    jitter: float = 0.0
    swapped: tuple[int, tuple[int, ...]] | None = None
    previous_classes: int = 0
    masked: tuple[int, ...] = ()
    elastic: float = 0.0
    foreground_by: ForegroundBy = "voxel"
    share: tuple[int, int] = (0, 1)

    @property
    def samples(self) -> range:
        """Numbers of the samples of a batch that are made: those of the share."""
        number, shares = self.share
        return range(self.batch_size * number // shares, self.batch_size * (number + 1) // shares)

    @classmethod
    def of(cls, configuration: ConfigurationPlan, task: Task, seed: int) -> Sampling:
        """From a plan; the patch of a 2d configuration is one voxel thick."""
        first = 1 if configuration.dimensions == 2 else 0
        sizes = (1,) * first + configuration.patch_size
        training, swap = configuration.training, configuration.swap(task)
        return cls(
            patch=(sizes[0], sizes[1], sizes[2]),
            batch_size=configuration.batch_size,
            foreground_share=training.foreground_share,
            mirror_axes=tuple(axis + first for axis in training.mirror_axes),
            seed=seed,
            flat=first == 1,
            jitter=training.foreground_jitter,
            swapped=None if swap is None else (swap.axis + first, swap.classes),
            previous_classes=len(task.labels) if configuration.previous_stage else 0,
            elastic=training.elastic,
            foreground_by=training.foreground_by,
            masked=tuple(index for index, n in enumerate(configuration.normalisation) if n.use_mask),
        )


def make_batch(cases: Sequence[StoredCase], sampling: Sampling, step: int, device: torch.device = CPU) -> Batch:
    """Batch number ``step``: every sample has its own generator, seeded by (seed, step, sample).

    Args:
        cases: to draw from.
        sampling: how to draw.
        step: number of the batch.
        device: where patches are augmented, and the batch is. On a GPU its noise is another than on a CPU.
    """
    samples = [_make_sample(cases, sampling, (step, index), device) for index in sampling.samples]
    image = torch.stack([image for image, _ in samples])
    labels = torch.stack([labels for _, labels in samples]).long()
    if sampling.flat:
        image, labels = image.squeeze(2), labels.squeeze(1)
    dealt = (_case_index(len(cases), sampling, step, index) for index in range(sampling.batch_size))
    return Batch(step, image, labels, tuple(cases[index].record.id for index in dealt))


def stream(
    cases: Sequence[StoredCase], sampling: Sampling, first_step: int, threads: int = 1, device: torch.device = CPU
) -> Generator[Batch, None, None]:
    """Batches from ``first_step`` on, made ahead by ``threads``; their exceptions are raised here.

    Each thread makes whole batches on one core, so that these depend neither on the number of threads nor of cores.
    """
    with ThreadPoolExecutor(threads, "medseg-batches", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        step = first_step
        queue: deque[Future[Batch]] = deque()
        try:
            while True:
                while len(queue) < max(AHEAD, threads + 1):
                    queue.append(pool.submit(make_batch, cases, sampling, step, device))
                    step += 1
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()


def batch_threads(device: torch.device, processes: int = 1) -> int:
    """How many threads shall make batches for a device, where ``processes`` train on this machine.

    A GPU leaves them all cores but one, of which they need a few. On a CPU the network has the cores: it takes tens of
    times as long for a sample as one thread that makes it.
    """
    if device.type == "cpu":
        return 1
    return min(MOST_THREADS, max(1, usable_cores() // processes - 1))


def _make_sample(
    cases: Sequence[StoredCase], sampling: Sampling, place: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sample ``place``, that is (step, index): all is drawn before anything is read."""
    step, index = place
    rng = np.random.default_rng([sampling.seed, step, index])
    case = cases[_case_index(len(cases), sampling, step, index)]
    forced = index >= round(sampling.batch_size * (1 - sampling.foreground_share))  # nnU-Net: the last third
    shape = case.image.shape
    channels, volume = int(shape[0]), (int(shape[1]), int(shape[2]), int(shape[3]))
    start = _patch_start(rng, case, volume, sampling, forced)
    drawn = draw(rng, Geometry.of(sampling.patch, sampling.elastic), channels, sampling.mirror_axes)
    errors = draw_disturbance(rng, sampling.previous_classes) if sampling.previous_classes else Disturbance()
    image, labels = _read(case, volume, start, sampling.patch, drawn, device)
    image = _intensity(image, drawn, sampling.masked)
    if drawn.flips:
        image, labels = _mirrored(image, labels, drawn.flips, sampling)
    if sampling.previous_classes:
        previous = torch.from_numpy(disturb(labels[1].cpu().numpy(), errors)).to(device)
        image = torch.cat((image, one_hot(previous, sampling.previous_classes, 0)))
    return image.contiguous(), labels.select(0, 0).contiguous()


def _intensity(image: Tensor, drawn: Augmentation, masked: tuple[int, ...]) -> Tensor:
    """The drawn changes; what is 0 in a masked channel lies outside its mask and stays 0, as in nnU-Net."""
    changed = apply_intensity(image, drawn.intensity)
    if changed is not image:
        for channel in masked:
            changed.select(0, channel).masked_fill_(image.select(0, channel) == 0, 0)
    return changed


def _mirrored(image: Tensor, labels: Tensor, flips: tuple[int, ...], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Both flipped along ``flips`` (z, y, x); labels that lie on the other side now are named so."""
    axes = [axis + 1 for axis in flips]
    image, labels = image.flip(axes), labels.flip(axes)
    if sampling.swapped is not None and sampling.swapped[0] in flips:
        order = torch.tensor([-1, *sampling.swapped[1]], dtype=labels.dtype, device=labels.device)
        labels = order.take(labels.long() + 1)  # ignored voxels stay ignored
    return image, labels


def _case_index(count: int, sampling: Sampling, step: int, index: int) -> int:
    """Cases are dealt like cards: each once per round, every round in another order."""
    position = step * sampling.batch_size + index
    order = np.random.default_rng([sampling.seed, 2**31, position // count]).permutation(count)
    return int(order[position % count])


def _patch_start(rng: np.random.Generator, case: StoredCase, volume: Int3, sampling: Sampling, forced: bool) -> Int3:
    """First voxel of the patch; both borders are kept, and axes shorter than the patch are centred."""
    patch = sampling.patch
    classes = sorted(c for c in case.foreground if c != ANNOTATED)
    places = None
    if forced and classes:
        chosen = classes[rng.integers(len(classes))]
        by_voxel = sampling.foreground_by == "voxel"
        places = case.foreground[chosen] if by_voxel else case.components[chosen].one(rng)
    elif ANNOTATED in case.foreground:  # sparse annotation: patches without a labelled voxel teach nothing
        places = case.foreground[ANNOTATED]
    if places is not None:
        voxel = np.unravel_index(int(places[rng.integers(len(places))]), volume)
        half = [n // 2 + (int(rng.integers(-n, n + 1) * sampling.jitter) if n > 1 else 0) for n in patch]
        wanted = [int(v) - h for v, h in zip(voxel, half, strict=True)]
    else:
        wanted = [int(rng.integers(max(0, v - p) + 1)) for v, p in zip(volume, patch, strict=True)]
    z, y, x = (
        min(max(w, 0), v - p) if v >= p else -((p - v) // 2) for w, v, p in zip(wanted, volume, patch, strict=True)
    )
    return z, y, x


def _read(
    case: StoredCase, volume: Int3, start: Int3, patch: Int3, drawn: Augmentation, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The patch's voxels: read plainly, or the box that the drawn map needs, sampled. 0 outside the volume.

    Image (C, *patch), and labels (1, *patch), or (2, *patch) with the previous stage's.
    """
    if drawn.spatial is None:
        low, high = start, _whole(np.add(start, patch))
        image, labels = _box(case, volume, low, high)
        pad = [(0, 0), *((max(0, -a), max(0, b - v)) for a, b, v in zip(low, high, volume, strict=True))]
        if any(p != (0, 0) for p in pad):
            image, labels = np.pad(image, pad), np.pad(labels, pad)
        return torch.from_numpy(image).to(device), torch.from_numpy(labels).to(device)
    centre = np.array(start) + (np.array(patch) - 1) / 2
    reach = drawn.spatial.reach(patch)
    low = _whole(np.floor(centre - reach))
    high = _whole(np.ceil(centre + reach) + 1)
    image, labels = _box(case, volume, low, high)
    z, y, x = (centre - np.maximum(low, 0)).tolist()
    values = tuple(_values(one) for one in labels)
    box = Box(torch.from_numpy(image), torch.from_numpy(labels), values, (z, y, x))
    return apply_spatial(box.to(device), drawn.spatial, patch)


def _box(case: StoredCase, volume: Int3, low: Int3, high: Int3) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """The part of [low, high) that lies in the volume, copied.

    Image (C, z, y, x), and labels (1, z, y, x), or (2, z, y, x) with the previous stage's, in a type that holds both.
    """
    z, y, x = (slice(max(a, 0), min(b, v)) for a, b, v in zip(low, high, volume, strict=True))
    image = np.array(case.image[:, z, y, x], dtype=np.float32)
    maps = [case.labels] if case.previous is None else [case.labels, case.previous]
    labels = np.stack([np.asarray(one[z, y, x]) for one in maps])
    return image, labels


def _values(labels: NDArray[Any]) -> tuple[int, ...]:
    """The values of a label map of 8 or 16 bits, but background, ascending: counted, which is faster than sorted."""
    plain = labels.reshape(-1)
    unsigned = plain.view(f"u{labels.itemsize}")
    found = np.flatnonzero(np.bincount(unsigned)).astype(unsigned.dtype).view(labels.dtype)
    return tuple(sorted(int(value) for value in found if value))


def _whole(values: NDArray[Any]) -> Int3:
    z, y, x = (int(v) for v in values)
    return z, y, x
