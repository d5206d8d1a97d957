"""Field: how far a network sees, from its plan."""

from __future__ import annotations

from medseg.records.plan import NetworkPlan

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
    reach, jump = 0, 1  # voxels to both sides together, and the distance of neighbours on the stage
    for index, stride in enumerate(network.strides):
        step = stride[axis]
        kernels = _encoder_kernels(network, index, axis, step)
        for number, kernel in enumerate(kernels):
            if network.name == "unet2015" and number == 0:  # pools over boxes, then convolves
                reach += (step - 1) * jump
                jump *= step
            reach += (kernel - 1) * jump
            if network.name != "unet2015" and number == 0:
                jump *= step
    linear = network.name == "resnet-unet"
    for level, convs in zip(range(len(network.features) - 2, -1, -1), network.convs_decoder, strict=True):
        step = network.strides[level + 1][axis]
        way = network.up[len(network.features) - 2 - level] if network.up else ("linear" if linear else "transposed")
        reach += jump if way == "linear" and step > 1 else 0  # between two voxels
        jump //= step
        reach += convs * (network.kernels[level][axis] - 1) * jump
    return 1 + reach


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
