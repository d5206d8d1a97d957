"""Layout: the order in memory of feature maps, contiguous or channels last, that is faster on a device."""

from __future__ import annotations

import logging
import time
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.errors import first_line
from medseg.networks.instance_norm import InstanceNormLeakyReLU

log = logging.getLogger(__name__)

SIZES = {2: (2, 32, 256, 256), 3: (2, 32, 64, 64, 64)}  # of the feature maps that are tried
LAYERS, WARM, ROUNDS = 3, 2, 3
TOLERANCE = 0.05  # of the gradients of three layers in bfloat16, relative
LIFT = 2.0**16  # gradients of a mean over so many voxels are below the numbers of float16


@cache
def fastest_layout(device: torch.device, dtype: torch.dtype, dimensions: int) -> torch.memory_format:
    """The layout of networks and batches there.

    On the CPU channels last, but for 2D, where contiguous steps took 0.88 of the time (torch 2.13, AVX-512). On a GPU
    it depends on the convolutions that cuDNN has for it: both are tried once, and channels last is taken only where it
    runs, gives the same and is faster.
    """
    if device.type == "cpu":
        return torch.channels_last_3d if dimensions == 3 else torch.contiguous_format
    last = torch.channels_last_3d if dimensions == 3 else torch.channels_last
    try:
        expected, contiguous_s = try_layout(device, dtype, torch.contiguous_format, SIZES[dimensions])
        found, last_s = try_layout(device, dtype, last, SIZES[dimensions])
    except RuntimeError as error:  # too little memory among them
        log.info("contiguous feature maps, as channels last was not tried: %s", first_line(error))
        return torch.contiguous_format
    apart = [float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]
    log.info("channels last: %.2f times as fast as contiguous, differs by %.1g", contiguous_s / last_s, max(apart))
    same = all(one < TOLERANCE for one in apart)  # NaN is not
    return last if same and last_s < contiguous_s else torch.contiguous_format


def try_layout(
    device: torch.device, dtype: torch.dtype, layout: torch.memory_format, size: tuple[int, ...]
) -> tuple[list[Tensor], float]:
    """Gradients, float32, of some convolutions with norms on feature maps of ``size`` (B, C, ...), and their seconds.

    Raises:
        RuntimeError: of torch, where something does not run or there is too little memory.
    """
    generator = torch.Generator().manual_seed(0)
    channels, dimensions = size[1], len(size) - 2
    kernel = (channels, channels, *[3] * dimensions)
    scale = (2 / channels / 3**dimensions) ** 0.5
    x = torch.randn(size, generator=generator).to(device, memory_format=layout)
    made = [scale * torch.randn(kernel, generator=generator) for _ in range(LAYERS)]
    weights = [one.to(device, memory_format=layout).requires_grad_() for one in made]
    norm = InstanceNormLeakyReLU(channels).to(device)
    convolve = F.conv3d if dimensions == 3 else F.conv2d
    best_s, gradients = float("inf"), list[Tensor]()
    for done in range(WARM + ROUNDS):
        begin = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y = x
            for weight in weights:
                y = norm(convolve(y, weight, padding=1))
        gradients = list(torch.autograd.grad((y.float() * x).mean() * LIFT, weights))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if done >= WARM:
            best_s = min(best_s, time.perf_counter() - begin)
    return [gradient.float() for gradient in gradients], best_s
