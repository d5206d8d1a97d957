"""Compiling: the network through ``torch.compile``, where that is asked for or pays, and where a test finds it right.

Compiling takes half a minute to several for every patch size. On a GPU it can join norms and activations to one pass
over memory; on a CPU it gained nothing (decision 19).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from medseg.errors import first_line
from medseg.networks.device import place_batch
from medseg.training.settings import Settings

log = logging.getLogger(__name__)

LONG_S, LONG_STEPS = 3600.0, 20_000  # of a training on a GPU that is compiled for without being asked
SAMPLES, WARM, ROUNDS = 2, 2, 3
TOLERANCE = {True: 0.1, False: 1e-3}  # of all gradients together, in half precision and not, relative
LIFT = 2.0**10  # gradients of a mean are small for float16


def compiled(network: nn.Module, settings: Settings, say: Callable[[str], None]) -> nn.Module:
    """What computes ``network`` in training, sharing its weights: compiled, or the network itself.

    It is compared with the network on noise: outputs of all levels, forward and backward. Whatever fails, then or
    later, leaves the network, with a line in the log.
    """
    if not _wanted(settings):
        return network
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    begun = time.perf_counter()
    try:
        fast: Any = torch.compile(network, dynamic=False)
        expected, plain_s = _gradients(network, settings)
        found, fast_s = _gradients(fast, settings)
    except Exception as error:  # of torch's compiler, or of the C++ or Triton below it: any
        log.warning("the network is not compiled: %s", first_line(error))
        return network
    finally:
        network.zero_grad(set_to_none=True)
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
    apart, took = float((found - expected).norm() / expected.norm()), time.perf_counter() - begun
    if not apart < TOLERANCE[settings.device.half]:  # NaN is not
        log.warning("the network is not compiled: its gradients would differ by %.1g", apart)
        return network
    say(f"compiled in {took:.0f} s: {plain_s / fast_s:.2f} times as fast, gradients differ by {apart:.1g}")
    return _Guarded(network, fast) if fast_s < plain_s else network


def _wanted(settings: Settings) -> bool:
    if settings.compile != "auto":
        return settings.compile == "on"
    length = settings.length
    long = length.seconds >= LONG_S if length.seconds is not None else (length.steps or 0) >= LONG_STEPS
    return long and settings.device.torch_device.type == "cuda"


class _Guarded(nn.Module):
    """The compiled network; a patch of a new size for which compiling fails goes through the network, as all after."""

    def __init__(self, network: nn.Module, fast: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.network, self._fast = network, [fast]  # in a list: no module of this one, whose weights would count twice

    def stages(self) -> list[nn.Module]:
        """Those of the network, for checkpointing; what was compiled without it is compiled anew."""
        return self.network.stages()  # type: ignore[operator,no-any-return]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, ...) → logits of all levels."""
        if self._fast:
            try:
                return self._fast[0](x)
            except torch.OutOfMemoryError:  # nor would the network fit
                raise
            except Exception as error:  # what is not the compiler's fault fails again below
                log.warning("going on without compiling: %s", first_line(error))
                self._fast = []
        found: list[Tensor] = self.network(x)
        return found


def _gradients(network: nn.Module, settings: Settings) -> tuple[Tensor, float]:
    """All gradients of one scalar of the outputs on noise, as one vector, and the seconds of the fastest round."""
    device, configuration = settings.device, settings.configuration
    channels = configuration.input_channels(settings.task)
    size = (min(SAMPLES, configuration.batch_size), channels, *configuration.patch_size)
    x = place_batch(torch.randn(size, generator=torch.Generator().manual_seed(0)), device)
    parameters = [one for one in network.parameters() if one.requires_grad]
    fastest, gradients = float("inf"), tuple[Tensor | None, ...]()
    for done in range(WARM + ROUNDS):
        begun = time.perf_counter()
        with torch.autocast(device.torch_device.type, device.dtype, enabled=device.half):
            levels = network(x)
        scalar = torch.stack([level.float().square().mean() for level in levels]).sum() * LIFT
        gradients = torch.autograd.grad(scalar, parameters, allow_unused=True)
        if device.torch_device.type == "cuda":
            torch.cuda.synchronize()
        if done >= WARM:
            fastest = min(fastest, time.perf_counter() - begun)
    return torch.cat([one.flatten() for one in gradients if one is not None]), fastest
