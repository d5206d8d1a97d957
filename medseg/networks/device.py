"""Device and precision: where the network runs, and the fastest number type that is right there."""

from __future__ import annotations

import ctypes
import logging
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from medseg.errors import Problem, UsageError, first_line
from medseg.networks.layout import fastest_layout

log = logging.getLogger(__name__)

DeviceName = str  # "auto", "cpu", "cuda", or "cuda:N" for one of several GPUs
PrecisionName = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

WORTH_IT = 1.15  # a half precision must beat float32 by this factor
ROUNDS, CLEAR = 8, 2.0  # the self-test's; it ends after the second where half precision is faster by this factor
TOLERANCE = 0.02  # bfloat16 keeps 8 bits: relative error of a convolution's output stays below 1 %
HALVES = {"cpu": (torch.bfloat16,), "cuda": (torch.bfloat16, torch.float16)}
SIZES = {"cpu": (1, 32, 16, 24, 16), "cuda": (2, 128, 32, 32, 32)}  # what is convolved: enough for all of a GPU


@dataclass(frozen=True, slots=True)
class Device:
    """Where networks run: device, number type of their convolutions, memory layout, and why."""

    torch_device: torch.device
    dtype: torch.dtype
    reason: str

    @property
    def half(self) -> bool:
        """Whether convolutions run in less than float32."""
        return self.dtype != torch.float32

    @property
    def precision(self) -> PrecisionName:
        """The number type by its name in ``DTYPES``."""
        return cast(PrecisionName, _name(self.dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_device(name: DeviceName = "auto", precision: PrecisionName = "auto") -> Device:
    """The device asked for and its number type, by a self-test against float32 when ``precision`` is "auto".

    Raises:
        UsageError: E0001 no such device, CUDA is asked for and not there, or convolutions in the number type that is
            asked for do not run on the GPU or are wrong.
    """
    device = _named(name)
    if device.type == "cpu":
        keep_freed_memory()
    if precision == "float32":
        torch.backends.cudnn.allow_tf32 = False  # on by default: float32 convolutions that keep 10 of 23 bits
        return Device(device, torch.float32, "asked for")
    if precision == "auto":
        return _self_test(device)
    refused = _try_half(*_test_case(device), DTYPES[precision]).refused if device.type == "cuda" else None
    if refused is not None:  # a CPU computes in every number type
        raise UsageError(Problem("E0001", f"--precision {precision}: {refused}", "", "use --precision auto or float32"))
    return Device(device, DTYPES[precision], "asked for")


def _named(name: DeviceName) -> torch.device:
    if name in ("auto", "cpu"):
        return _cuda() if name == "auto" and torch.cuda.is_available() else torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise UsageError(Problem("E0001", f"--device {name}", "auto, cpu, cuda or cuda:N", "choose one of these"))
    if not torch.cuda.is_available():
        raise UsageError(Problem("E0001", f"--device {name}: no CUDA device is usable", "", "use --device cpu"))
    if not number:
        return _cuda()
    if int(number) >= torch.cuda.device_count():
        there = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        raise UsageError(Problem("E0001", f"--device {name}: no such device", there, "choose one of these"))
    torch.cuda.set_device(torch.device("cuda", int(number)))  # what is synchronised and measured without saying where
    return _cuda(int(number))


def _cuda(number: int | None = None) -> torch.device:
    """A GPU, on which cuDNN tries its kernels for each size: patches and tiles have few."""
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda") if number is None else torch.device("cuda", number)


def _self_test(device: torch.device) -> Device:
    """Half precision where it is right and faster than float32; float16 only where it is faster than bfloat16, too.

    That is so on GPUs older than bfloat16. Elsewhere the range of bfloat16, which is that of float32, is the safer one.
    """
    x, weight = _test_case(device)
    taken, gain = None, 1.0
    reasons = []
    for dtype in HALVES[device.type]:
        with _one_thread():
            trial = _try_half(x, weight, dtype)
        if trial.refused is None and trial.gain >= gain * WORTH_IT:
            taken, gain = trial, trial.gain
        reasons.append(trial.refused or f"{_name(dtype)} is not faster here ({trial.gain:.1f} times)")
    if taken is None:
        return Device(device, torch.float32, "; ".join(reasons))
    return Device(device, taken.dtype, f"self-test: {taken.gain:.1f} times float32, error {taken.error:.1%}")


def _test_case(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and a convolution's weights for it."""
    generator = torch.Generator().manual_seed(0)
    size = SIZES[device.type]
    x = torch.randn(size, generator=generator)
    weight = torch.randn(size[1], size[1], 3, 3, 3, generator=generator) / (27 * size[1]) ** 0.5
    last = torch.channels_last_3d
    return x.to(device, memory_format=last).requires_grad_(), weight.to(device, memory_format=last).requires_grad_()


@dataclass(frozen=True, slots=True)
class _Trial:
    """How a number type did against float32: times as fast, its relative error, and why it cannot be used."""

    dtype: torch.dtype
    gain: float = 0.0
    error: float = 0.0
    refused: str | None = None


def _try_half(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> _Trial:
    """Time and compare one convolution, forward and backward, in float32 and in ``dtype``."""
    half_x, half_weight = x.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
    reference_s = half_s = float("inf")
    for done in range(1, ROUNDS + 1):
        reference, seconds = _convolve(x, weight)
        reference_s = min(reference_s, seconds)
        try:
            half, seconds = _convolve(half_x, half_weight)
        except RuntimeError as error:
            return _Trial(dtype, refused=f"{_name(dtype)} does not run here ({first_line(error)})")
        half_s = min(half_s, seconds)
        if done > 1 and reference_s > CLEAR * half_s:
            break
    errors = [float((h.float() - r).norm() / r.norm()) for h, r in zip(half, reference, strict=True)]
    wrong = not all(error < TOLERANCE for error in errors)  # max() can lose a NaN
    refused = f"{_name(dtype)} convolutions are wrong here by {max(errors):.0%}" if wrong else None
    return _Trial(dtype, reference_s / half_s, max(errors), refused)


def _convolve(x: torch.Tensor, weight: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """Output and gradients of a convolution, and the seconds that they took: on a CPU, of this thread alone.

    Other work on the machine would choose the number type otherwise: beside it, two of 40 tests by the clock, on two
    threads that wait for each other, found bfloat16 slower where it is 9 times as fast.

    The gradients are those of half the sum of squares: of a scalar, as gradients that are given make torch import
    sympy, which takes longer than all of this.
    """
    on_gpu = x.device.type == "cuda"
    clock = time.perf_counter if on_gpu or sys.platform == "win32" else time.thread_time  # that of Windows has 16 ms
    begin = clock()
    y = F.conv3d(x, weight, padding=1)
    gradients = torch.autograd.grad(y.square().sum() / 2, (x, weight))
    if on_gpu:
        torch.cuda.synchronize()
    return [y.detach(), *gradients], clock() - begin


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning it at every step (Linux only, harmless elsewhere).

    Large temporaries are otherwise mapped and unmapped by the kernel each time: single norms and activations of
    7 × 32 × 40 × 56 × 40 ran 5 to 10 times slower, a whole training step of batch 2 took 0.317 s instead of 0.299 s
    (torch 2.13, two AVX-512 cores).
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    for option in (m_mmap_threshold, m_trim_threshold):
        if libc.mallopt(option, 2**31 - 1) != 1:
            log.debug("mallopt(%d) refused", option)


def place(network: nn.Module, device: Device, dimensions: int) -> nn.Module:
    """Move a network to the device, in the layout that its convolutions like there."""
    network.to(device.torch_device)
    layout = fastest_layout(device.torch_device, device.dtype, dimensions)
    return network.to(memory_format=layout)  # type: ignore[no-any-return, call-overload]


def place_batch(batch: torch.Tensor, device: Device) -> torch.Tensor:
    """A batch (B, C, [Z,] Y, X) on the device, in the same layout."""
    layout = fastest_layout(device.torch_device, device.dtype, batch.ndim - 2)
    return batch.to(device.torch_device, memory_format=layout, non_blocking=True)
