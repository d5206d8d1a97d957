"""From MONAI: networks that are MONAI's own, configured by a plan and fitted to the way that ours are called."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.errors import Problem, UsageError
from medseg.networks.blocks import fit
from medseg.networks.unet import SafeConv3d
from medseg.records.network import NetworkPlan

SWIN_HEADS = (3, 6, 12, 24)  # of the four stages; each has 12 features at feature_size 36, 8 at 24 (MONAI's defaults)
UNETR_HEADS = 12


class Fitted(nn.Module):
    """(B, C, [Z,] Y, X) of any size → list of logits, finest first, by a network that wants certain sizes.

    The image gets zeros at the ends of its axes up to the next multiple of ``multiple``, or up to ``exact``; the logits
    lose them. A coarser level whose voxels do not divide the image is left out. The coarsest stage must hold more than
    one voxel, or its instance norm would have nothing to divide by.
    """

    def __init__(
        self,
        network: nn.Module,
        multiple: Sequence[int],
        repeated: Sequence[type[nn.Module]],
        exact: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.multiple, self.repeated, self.exact = tuple(multiple), tuple(repeated), exact
        for module in network.modules():
            if type(module) is nn.Conv3d:
                module.__class__ = SafeConv3d

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits of every supervised level in training, else the finest."""
        size = tuple(x.shape[2:])
        padded = self._padded(size)
        found = self.network(fit(x, padded))
        levels = [found] if isinstance(found, Tensor) else list(found)
        return [
            fit(logits, _share(size, padded, logits.shape[2:]))
            for logits in levels
            if all(n * m % p == 0 for n, m, p in zip(size, logits.shape[2:], padded, strict=True))
        ]

    def _padded(self, size: tuple[int, ...]) -> tuple[int, ...]:
        if self.exact is not None:
            if any(n > limit for n, limit in zip(size, self.exact, strict=True)):
                raise ValueError(f"the network was made for images of {self.exact}, found {size}")
            return self.exact
        padded = [math.ceil(n / m) * m for n, m in zip(size, self.multiple, strict=True)]
        if padded == list(self.multiple):
            padded[-1] *= 2
        return tuple(padded)

    def stages(self) -> list[nn.Module]:
        """What gradient checkpointing computes again."""
        return [module for module in self.network.modules() if isinstance(module, self.repeated)]


def swinunetr(plan: NetworkPlan, channels: int, outputs: int) -> Fitted:
    """Swin UNETR (Hatamizadeh et al. 2022, arXiv 2201.01266): stages of strides 1 to 32, four of them transformers."""
    _require_monai()
    from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
    from monai.networks.nets.swin_unetr import BasicLayer, SwinUNETR

    network = SwinUNETR(
        channels,
        outputs,
        depths=plan.convs_encoder[1:5],
        num_heads=SWIN_HEADS,
        feature_size=plan.features[0],
        spatial_dims=len(plan.strides[0]),
    )
    return Fitted(network, _divisors(plan), (UnetrBasicBlock, UnetrUpBlock, BasicLayer))


def unetr(plan: NetworkPlan, channels: int, outputs: int) -> Fitted:
    """UNETR (Hatamizadeh et al. 2021, arXiv 2103.10504): a transformer on boxes of 16 voxels, and a decoder."""
    _require_monai()
    from monai.networks.blocks.transformerblock import TransformerBlock
    from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
    from monai.networks.nets.unetr import UNETR

    assert plan.input_size is not None  # NetworkPlan
    network = UNETR(
        channels,
        outputs,
        plan.input_size,
        feature_size=plan.features[0],
        hidden_size=plan.features[-1],
        mlp_dim=4 * plan.features[-1],
        num_heads=UNETR_HEADS,
        spatial_dims=len(plan.strides[0]),
    )
    kinds = (UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock, TransformerBlock)
    return Fitted(network, _divisors(plan), kinds, plan.input_size)


def segresnet(plan: NetworkPlan, channels: int, outputs: int) -> Fitted:
    """SegResNet (Myronenko 2018, arXiv 1810.11654) with deep supervision and the plan's anisotropic first strides."""
    _require_monai()
    from monai.networks.nets.segresnet_ds import SegResBlock, SegResNetDS

    coarse = tuple(sum(stride[axis] == 1 for stride in plan.strides[1:]) for axis in range(len(plan.strides[0])))
    network = SegResNetDS(
        spatial_dims=len(plan.strides[0]),
        init_filters=plan.features[0],
        in_channels=channels,
        out_channels=outputs,
        norm="batch" if plan.norm == "batch" else "instance",
        blocks_down=plan.convs_encoder,
        blocks_up=plan.convs_decoder,
        dsdepth=max(1, len(plan.features) - 1) if plan.deep_supervision else 1,
        resolution=tuple(float(2**n) for n in coarse) if any(coarse) else None,
    )
    return Fitted(network, _divisors(plan), (SegResBlock,))


def mednext(plan: NetworkPlan, channels: int, outputs: int) -> Fitted:
    """MedNeXt-S (Roy et al. 2023, arXiv 2303.09975): ConvNeXt blocks all the way, with deep supervision."""
    _require_monai()
    from monai.networks.blocks.mednext_block import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock
    from monai.networks.nets.mednext import MedNeXt

    network = MedNeXt(
        spatial_dims=len(plan.strides[0]),
        init_filters=plan.features[0],
        in_channels=channels,
        out_channels=outputs,
        kernel_size=plan.kernels[0][0],
        deep_supervision=plan.deep_supervision,
        use_residual_connection=True,
        blocks_down=plan.convs_encoder[:-1],
        blocks_bottleneck=plan.convs_encoder[-1],
        blocks_up=plan.convs_decoder,
    )
    return Fitted(network, _divisors(plan), (MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock))


def _share(size: tuple[int, ...], padded: tuple[int, ...], level: torch.Size) -> list[int]:
    """The part of a level that the image covers."""
    return [n * m // p for n, m, p in zip(size, level, padded, strict=True)]


def _divisors(plan: NetworkPlan) -> list[int]:
    return [math.prod(stride[axis] for stride in plan.strides) for axis in range(len(plan.strides[0]))]


def _require_monai() -> None:
    try:
        import monai.networks.nets  # noqa: F401
    except ImportError as error:
        action = 'pip install "medseg[monai]"'
        raise UsageError(Problem("E0001", "this network is MONAI's, which is not installed", "", action)) from error
