"""Field: how far a network sees, from its plan."""

from __future__ import annotations

import math

from medseg.records.network import NetworkPlan, ways_up

WHOLE = ("transunet", "unetr")  # attention over all voxels
CONVOLUTIONAL = ("plain", "residual", "unet2015", "attention", "unetpp", "resnet-unet")


def receptive_field(network: NetworkPlan) -> tuple[int, ...] | None:
    """Voxels per axis that one logit's convolutions reach, all the way down and up; norms aside, which see all.

    None where attention sees the whole patch, or where the network is not ours.
    """
    if network.name not in CONVOLUTIONAL:
        return None
    return tuple(_along(network, axis) for axis in range(len(network.strides[0])))


def _along(network: NetworkPlan, axis: int) -> int:
    """From a logit down the decoder to a row of voxels of the coarsest stage, and up from them through the encoder."""
    row = 0  # voxels of the stage but one that a logit depends on, wherever it lies
    linear = ways_up(network)[::-1]
    for level, convs in enumerate(reversed(network.convs_decoder)):
        row += convs * (network.kernels[level][axis] - 1)
        step = network.strides[level + 1][axis]
        row = math.ceil(row / step) + (step > 1 and linear[level] == "linear")
    reach, jump = 0, 1  # voxels of the image but one that a voxel of a stage depends on, and how far neighbours lie
    for index, stride in enumerate(network.strides):
        for number, kernel in enumerate(_encoder_kernels(network, index, axis, stride[axis])):
            if number == 0 and network.name == "unet2015":  # maxima of boxes, then convolutions
                reach += (stride[axis] - 1) * jump
                jump *= stride[axis]
            reach += (kernel - 1) * jump
            if number == 0 and network.name != "unet2015":
                jump *= stride[axis]
    return 1 + reach + row * jump


def _encoder_kernels(network: NetworkPlan, index: int, axis: int, step: int) -> list[int]:
    """Kernels of a stage's convolutions and poolings, one after the other."""
    kernel, blocks = network.kernels[index][axis], network.convs_encoder[index]
    if network.name == "residual":
        return ([kernel] if index == 0 else []) + [kernel] * 2 * blocks
    if network.name != "resnet-unet":
        return [kernel] * blocks
    if index == 0:
        return []
    if index == 1:
        return [7 if kernel > 1 else 1]
    pooled = [2 * step - 1] if index == 2 else []
    return pooled + [kernel] * (2 if network.block == "basic" else 1) * blocks
