"""Instance norm, alone or with the leaky ReLU that follows it, in the memory layout of its input.

``F.instance_norm`` turns channels-last tensors into contiguous ones, and the channels-last backward of
``F.group_norm(x, C)`` in bfloat16 is some 30 times slower than a pass over the data on AVX-512 (measured with torch
2.13). Batch norm has good channels-last kernels in both directions, and over one sample it *is* instance norm:
each sample of a channels-last tensor goes through it on its own. On a GPU, too, ``F.instance_norm`` makes a
channels-last network slower than a contiguous one (pytorch/pytorch#59168); see ``layout`` for which is taken there.

On the CPU, its channels-last statistics are plain float32 sums: over a million voxels their error is 1e-3 of the
result, which half precision does not notice and float32 does. There they are taken in pieces, at no cost worth naming.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-5  # nnU-Net: InstanceNorm eps
SLOPE = 0.01  # nnU-Net: LeakyReLU negative slope
PIECE = 16384  # voxels


class InstanceNorm(nn.Module):
    """(B, C, ...) → same shape, dtype and memory layout. Statistics per sample and channel in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, scale and shift; a channel of a single voxel becomes its shift."""
        if torch.compiler.is_dynamo_compiling():
            return _written_out(x, self.weight, self.bias)
        if x.is_contiguous():
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            if x.device.type != "cpu" and x[0, 0].numel() > 1:
                return F.instance_norm(x, weight=weight, bias=bias, eps=EPSILON)
            return torch.group_norm(x, x.shape[1], weight, bias, EPSILON)  # not torch.nn.functional's: single voxels
        weight, bias = self.weight.float(), self.bias.float()
        if not torch.is_grad_enabled():
            y = torch.empty_like(x)
            for one, normed in zip(x.split(1), y.split(1), strict=True):
                _norm(one, weight, bias, normed)
            return y
        samples = (torch.native_batch_norm(one, weight, bias, None, None, True, 0.0, EPSILON) for one in x.split(1))
        return torch.cat([normed for normed, _, _ in samples])


class InstanceNormLeakyReLU(InstanceNorm):
    """Instance norm, then leaky ReLU; between the two a shortcut may be added. Less is kept for the backward."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Normalise, scale and shift, add ``shortcut`` where there is one, then leaky ReLU."""
        if torch.compiler.is_dynamo_compiling():
            normed = _written_out(x, self.weight, self.bias)
            return F.leaky_relu(normed if shortcut is None else normed + shortcut, SLOPE)
        if not x.is_contiguous():
            result: Tensor = _PerSample.apply(x, self.weight.float(), self.bias.float(), shortcut)  # type: ignore[no-untyped-call]
            return result
        normed = super().forward(x)
        return F.leaky_relu(normed if shortcut is None else normed.add_(shortcut), SLOPE, inplace=True)


class _PerSample(torch.autograd.Function):
    """Batch norm of one sample at a time + shortcut + leaky ReLU; only input and output are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
        y = torch.empty_like(x)
        statistics: list[Tensor] = []
        for i in range(x.shape[0]):
            normed = y[i : i + 1]
            statistics += _norm(x[i : i + 1], weight, bias, normed)
            if shortcut is not None:
                normed += shortcut[i : i + 1]
            F.leaky_relu_(normed, SLOPE)
        ctx.save_for_backward(x, y, weight, *statistics)
        ctx.has_shortcut = shortcut is not None
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        x, y, weight, *statistics = ctx.saved_tensors
        (gradient,) = gradients
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
        grad_shortcut = torch.empty_like(x) if ctx.has_shortcut else None
        for i in range(x.shape[0]):
            one = slice(i, i + 1)
            inner = torch.ops.aten.leaky_relu_backward(gradient[one], y[one], SLOPE, True)
            part_x, part_weight, part_bias = torch.ops.aten.native_batch_norm_backward(
                inner, x[one], weight, None, None, statistics[2 * i], statistics[2 * i + 1], True, EPSILON, [True] * 3
            )
            grad_x[one] = part_x
            grad_weight += part_weight
            grad_bias += part_bias
            if grad_shortcut is not None:
                grad_shortcut[one] = inner
        return grad_x, grad_weight, grad_bias, grad_shortcut


def _written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same by operations that a compiler can join to each other and to what follows."""
    axes, each = list(range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    variance, mean = torch.var_mean(x.float(), axes, correction=0, keepdim=True)
    scale = (variance + EPSILON).rsqrt() * weight.view(each)
    return ((x.float() - mean) * scale + bias.view(each)).to(x.dtype)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """(1, C, ...), normalised into ``out``; the channels' means, and their inverse standard deviations, float32."""
    mean, inverse_std = torch.empty_like(weight), torch.empty_like(weight)
    if x.dtype != torch.float32 or x.device.type != "cpu":
        torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, EPSILON, out=(out, mean, inverse_std))
        return mean, inverse_std
    pieces = x.flatten(2).split(PIECE, 2)
    found = [torch.batch_norm_update_stats(piece, None, None, 0.0) for piece in pieces]
    means, variances = (torch.stack(values).double() for values in zip(*found, strict=True))
    share = torch.tensor([[piece.shape[2]] for piece in pieces], dtype=torch.float64) / x[0, 0].numel()
    mean = (means * share).sum(0)
    variance = ((variances + (means - mean).square()) * share).sum(0)
    whole = mean.float(), variance.float()
    unused = torch.empty(0), torch.empty(0)
    torch.native_batch_norm(x, weight, bias, *whole, False, 0.0, EPSILON, out=(out, *unused))
    return whole[0], (variance + EPSILON).rsqrt().float()
