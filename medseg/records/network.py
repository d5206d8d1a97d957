"""Network plan: a network by stages, as a plan describes it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medseg.records.base import Record, without_defaults

NetworkName = Literal[
    "plain",
    "residual",
    "unet2015",
    "attention",
    "unetpp",
    "resnet-unet",
    "transunet",
    "swinunetr",
    "unetr",
    "segresnet",
    "mednext",
]
Up = Literal["transposed", "linear"]
PADDING_NETWORKS = ("swinunetr", "unetr", "segresnet", "mednext")  # their strides are fixed: they pad what is odd
NETWORK_OPTIONS = ("norm", "up", "padding", "block", "transformer", "input_size", "checkpointing")


class TransformerPlan(Record):
    """Self-attention over all voxels of the last stage: layers, heads, features of a token and of its perceptron."""

    layers: int = Field(default=8, ge=1, le=64)
    heads: int = Field(default=6, ge=1, le=64)
    width: int = Field(default=384, ge=4, le=8192)
    mlp: int = Field(default=1536, ge=1, le=32768)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of the {self.heads} heads")
        return self


class NetworkPlan(Record):
    """A U-Net by stages, finest first. Kernels and strides per stage and axis; stride of stage 0 is 1.

    ``convs_encoder`` are convolutions per stage of a plain network, and blocks of two convolutions per stage of a
    residual one; ``convs_decoder`` are convolutions per stage of both, coarsest first. What follows
    ``deep_supervision`` matters to some networks only and is written where it is not the default: ``up`` per decoder
    stage, () for the network's own way; ``block`` of a ResNet; ``input_size`` that position embeddings are made for;
    ``checkpointing`` computes stages again in the backward pass instead of keeping their values.
    """

    name: NetworkName = "plain"
    features: tuple[int, ...] = Field(min_length=1, max_length=16)
    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    convs_encoder: tuple[int, ...]
    convs_decoder: tuple[int, ...]
    deep_supervision: bool = True
    norm: Literal["instance", "batch", "none"] = "instance"
    up: tuple[Up, ...] = ()
    padding: Literal["same", "valid"] = "same"
    block: Literal["basic", "bottleneck"] = "basic"
    transformer: TransformerPlan | None = None
    input_size: tuple[int, ...] | None = None
    checkpointing: bool = False

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, handler(self), NETWORK_OPTIONS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        stages = len(self.features)
        if not len(self.kernels) == len(self.strides) == len(self.convs_encoder) == stages:
            raise ValueError(f"features, kernels, strides and convs_encoder must all have {stages} stages")
        if len(self.convs_decoder) != stages - 1:
            raise ValueError(f"convs_decoder needs {stages - 1} entries")
        dimensions = len(self.strides[0])
        if dimensions not in (2, 3) or any(len(t) != dimensions for t in (*self.kernels, *self.strides)):
            raise ValueError("kernels and strides must all have 2 or all have 3 axes")
        if set(self.strides[0]) != {1}:
            raise ValueError("the stride of the first stage must be 1")
        if any(k < 1 or k > 15 or k % 2 == 0 for t in self.kernels for k in t):
            raise ValueError("kernel sizes must be odd, 1 to 15")
        if any(s not in (1, 2) for t in self.strides for s in t):
            raise ValueError("strides must be 1 or 2")
        if any(f < 1 or f > 4096 for f in self.features):
            raise ValueError("features must lie in 1 to 4096")
        if any(c < 1 or c > 32 for c in (*self.convs_encoder, *self.convs_decoder)):
            raise ValueError("convolutions or blocks per stage must lie in 1 to 32")
        self._check_options(stages, dimensions)
        return self

    def _check_options(self, stages: int, dimensions: int) -> None:
        if self.up and len(self.up) != stages - 1:
            raise ValueError(f"up needs {stages - 1} entries, or none")
        if self.padding == "valid" and (self.name != "unet2015" or self.deep_supervision):
            raise ValueError("only unet2015 without deep supervision can do without padding")
        if (self.transformer is not None) != (self.name == "transunet"):
            raise ValueError("transunet, and no other network, needs a transformer")
        if (self.input_size is not None) != (self.name == "unetr"):
            raise ValueError("unetr, and no other network, needs an input_size")
        if self.input_size is not None and (len(self.input_size) != dimensions or any(n % 16 for n in self.input_size)):
            raise ValueError(f"input_size must be {dimensions} multiples of 16")
        if stages < {"resnet-unet": 3, "unetr": 5, "swinunetr": 6}.get(self.name, 1):
            raise ValueError(f"{self.name} needs more than {stages} stages")

    def output_size(self, patch: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the logits for a patch: the same, but for convolutions without padding its centre.

        Raises:
            ValueError: without padding, the patch is too small, or a stage would halve an odd size.
        """
        if self.padding == "same":
            return patch
        return tuple(self.valid_size(axis, size) for axis, size in enumerate(patch))

    def valid_size(self, axis: int, size: int) -> int:
        """The same for one axis of convolutions without padding."""
        n = size
        for kernel, stride, convs in zip(self.kernels, self.strides, self.convs_encoder, strict=True):
            if n % stride[axis]:
                raise ValueError(f"patch size {size} of axis {axis}: a stage without padding would halve {n}")
            n = n // stride[axis] - convs * (kernel[axis] - 1)
        for level, convs in zip(range(len(self.features) - 2, -1, -1), self.convs_decoder, strict=True):
            n = n * self.strides[level + 1][axis] - convs * (self.kernels[level][axis] - 1)
        if n < 1:
            raise ValueError(f"patch size {size} of axis {axis} is too small without padding")
        return n


def ways_up(network: NetworkPlan) -> tuple[Up, ...]:
    """How each decoder level is reached, coarsest first: as the plan says, or as the network does."""
    default: Up = "linear" if network.name in ("resnet-unet", "transunet") else "transposed"
    return network.up or (default,) * (len(network.features) - 1)
