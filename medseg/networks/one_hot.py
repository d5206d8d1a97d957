"""One-hot: labels of a previous stage as input channels of a network."""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(labels: Tensor, classes: int, axis: int) -> Tensor:
    """Class indices → float32 with a new ``axis`` of ``classes - 1`` channels, 1 where the class is; no background."""
    indices = torch.arange(1, classes, dtype=labels.dtype, device=labels.device).view(-1, *[1] * (labels.ndim - axis))
    return (labels.unsqueeze(axis) == indices).float()
