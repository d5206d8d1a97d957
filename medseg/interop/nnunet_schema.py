"""What nnU-Net's ``plans.json`` says of one configuration: checked field by field, in the words of our plan.

Nothing in the file is looked up, imported or called: classes and functions are compared with the few names that are
known here. Both forms are read: with ``architecture`` (since nnU-Net 2.5) and with ``UNet_class_name`` (before).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medseg.errors import InputError, IntegrityError, Problem
from medseg.interop.nnunet_plans import NETWORKS, NORMALISATION, RESAMPLE
from medseg.records.base import parse_record, read_json
from medseg.records.fingerprint import Intensity
from medseg.records.network import NetworkPlan
from medseg.records.plan import Normalisation, Resampling

MAX_BYTES = 16 * 2**20
MAX_PATCH_VOXELS = 2**28  # 645³: a network of 32 features needs 34 GB for one layer of it
MAX_HEIRS = 16  # steps of inherits_from

OLD_NETWORKS = {"PlainConvUNet": "plain", "ResidualEncoderUNet": "residual"}
CLASSES = {class_name: name for name, (class_name, _) in NETWORKS.items()} | {
    "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet": "residual"
}
CONVOLUTIONS = {f"torch.nn.{module}Conv{n}d": n for n in (2, 3) for module in ("", "modules.conv.")}
NORMS = {f"torch.nn.{module}InstanceNorm{n}d": n for n in (2, 3) for module in ("", "modules.instancenorm.")}
LEAKY = ("torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU")
BASIC_BLOCK = "dynamic_network_architectures.building_blocks.residual.BasicBlockD"

_Whole = Annotated[int, Field(ge=1, le=65536)]
_PerAxis = Annotated[tuple[_Whole, ...], Field(min_length=2, max_length=3)]
_PerStage = Annotated[tuple[_Whole, ...], Field(max_length=16)]
_Millimetres = Annotated[float, Field(ge=1e-3, le=1e4)]


class _Part(BaseModel):
    """A part of the file: types as JSON has them, fields that are not used here are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _Closed(BaseModel):
    """A part in which every field counts, so that none may be unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Slope(_Closed):
    inplace: bool = False
    negative_slope: float = 0.01


class _NormArguments(_Closed):
    eps: float = 1e-5
    affine: bool = False


class _Arguments(_Closed):
    """Arguments of the network's class."""

    n_stages: Annotated[int, Field(ge=2, le=16)]
    features_per_stage: _Whole | _PerStage
    conv_op: str
    kernel_sizes: _Whole | tuple[_Whole | _PerAxis, ...]
    strides: _Whole | tuple[_Whole | _PerAxis, ...]
    n_conv_per_stage: _Whole | _PerStage | None = None
    n_blocks_per_stage: _Whole | _PerStage | None = None
    n_conv_per_stage_decoder: _Whole | _PerStage
    conv_bias: bool = False
    norm_op: str | None = None
    norm_op_kwargs: _NormArguments | None = None
    dropout_op: str | None = None
    dropout_op_kwargs: dict[str, Any] | None = None
    nonlin: str | None = None
    nonlin_kwargs: _Slope | None = None
    nonlin_first: bool = False
    block: str = BASIC_BLOCK
    bottleneck_channels: int | None = None
    stem_channels: int | None = None


class _Architecture(_Part):
    network_class_name: str
    arch_kwargs: dict[str, Any]


class _Interpolation(_Closed):
    """Arguments of nnU-Net's ``resample_data_or_seg_to_shape``, with its defaults."""

    is_seg: bool = False
    order: Annotated[int, Field(ge=0, le=5)] = 3
    order_z: Annotated[int, Field(ge=0, le=5)] = 0
    force_separate_z: bool | None = False
    separate_z_anisotropy_threshold: float = 3


class NnunetConfiguration(_Part):
    """One configuration, with what it inherits."""

    preprocessor_name: str = "DefaultPreprocessor"
    batch_size: Annotated[int, Field(ge=1, le=100_000)]
    patch_size: _PerAxis
    median_image_size_in_voxels: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    spacing: Annotated[tuple[_Millimetres, ...], Field(min_length=2, max_length=3)]
    normalization_schemes: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    resampling_fn_data: str = RESAMPLE
    resampling_fn_seg: str = RESAMPLE
    resampling_fn_probabilities: str = RESAMPLE
    resampling_fn_data_kwargs: _Interpolation
    resampling_fn_seg_kwargs: _Interpolation
    resampling_fn_probabilities_kwargs: _Interpolation
    batch_dice: bool = False
    previous_stage: str | None = None
    architecture: _Architecture | None = None
    UNet_class_name: str | None = None
    UNet_base_num_features: _Whole | None = None
    unet_max_num_features: _Whole | None = None
    n_conv_per_stage_encoder: _PerStage | None = None
    n_conv_per_stage_decoder: _PerStage | None = None
    pool_op_kernel_sizes: tuple[_PerAxis, ...] | None = None
    conv_kernel_sizes: tuple[_PerAxis, ...] | None = None


class NnunetPlans(_Part):
    """The file as a whole; its configurations are looked at when one is asked for."""

    dataset_name: Annotated[str, Field(max_length=200)] = ""
    plans_name: Annotated[str, Field(max_length=200)]
    image_reader_writer: str
    transpose_forward: tuple[int, int, int]
    configurations: dict[str, dict[str, Any]]
    label_manager: str = "LabelManager"
    foreground_intensity_properties_per_channel: dict[str, dict[str, Any]] | None = None
    foreground_intensity_properties_by_modality: dict[str, dict[str, Any]] | None = None

    def intensities(self, channels: int) -> tuple[Intensity, ...]:
        """Statistics of every channel."""
        found = self.foreground_intensity_properties_per_channel or self.foreground_intensity_properties_by_modality
        missing = [str(c) for c in range(channels) if str(c) not in (found or {})]
        if found is None or missing:
            raise _wrong("foreground_intensity_properties_per_channel", f"no channel {', '.join(missing[:20])}")
        known = Intensity.model_fields
        return tuple(
            parse_record({k: v for k, v in found[str(c)].items() if k in known}, Intensity, f"plans.json, channel {c}")
            for c in range(channels)
        )


P = TypeVar("P", bound=BaseModel)


def read_plans(path: Path) -> NnunetPlans:
    """Read ``plans.json``.

    Raises:
        InputError: E0100 not found; E0162 a label manager of somebody's own.
        IntegrityError: E0711 not strict JSON, too large, or fields that are missing or impossible.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise IntegrityError(Problem("E0711", f"{path.name} is larger than {MAX_BYTES >> 20} MiB"))
    plans = _parse(read_json(path), NnunetPlans, "plans.json")
    if plans.label_manager != "LabelManager":
        raise _unknown("label_manager", plans.label_manager, "LabelManager")
    return plans


def configuration_of(plans: NnunetPlans, name: str) -> NnunetConfiguration:
    """One configuration with what it inherits.

    Raises:
        IntegrityError: E0711 it is not there, inherits from itself, or has fields that are missing or impossible.
        InputError: E0162 a preprocessor of somebody's own.
    """
    merged: dict[str, Any] = {}
    visited: list[str] = []
    current: Any = name
    while current is not None:
        if not isinstance(current, str) or current not in plans.configurations or len(visited) > MAX_HEIRS:
            there = ", ".join(list(plans.configurations)[:20])
            raise _wrong("configurations", f"no configuration {str(current)[:80]!r}", there)
        if current in visited:
            raise _wrong("inherits_from", f"{' → '.join([*visited, current])} goes in a circle")
        visited.append(current)
        merged = plans.configurations[current] | merged
        current = plans.configurations[current].get("inherits_from")
    configuration = _parse(merged, NnunetConfiguration, f"plans.json, {name}")
    if configuration.preprocessor_name != "DefaultPreprocessor":
        raise _unknown(f"{name}: preprocessor_name", configuration.preprocessor_name, "DefaultPreprocessor")
    if math.prod(configuration.patch_size) > MAX_PATCH_VOXELS:
        raise _wrong(f"{name}: patch_size", f"{configuration.patch_size} has too many voxels", f"{MAX_PATCH_VOXELS}")
    return configuration


def normalisations(configuration: NnunetConfiguration) -> tuple[Normalisation, ...]:
    """The scheme of every channel; a mask counts for z-score only, as in nnU-Net."""
    names = {nnunet: ours for ours, nnunet in NORMALISATION.items()}
    for scheme in configuration.normalization_schemes:
        if scheme not in names:
            raise _unknown("normalization_schemes", scheme, " ".join(names))
    masks = configuration.use_mask_for_norm
    if len(masks) != len(configuration.normalization_schemes):
        raise _wrong("use_mask_for_norm", f"{len(masks)} entries", f"{len(configuration.normalization_schemes)}")
    schemes = [names[scheme] for scheme in configuration.normalization_schemes]
    return tuple(
        Normalisation(scheme=scheme, use_mask=mask and scheme == "zscore")
        for scheme, mask in zip(schemes, masks, strict=True)
    )


def resampling(configuration: NnunetConfiguration) -> Resampling:
    """Spline orders of images, labels and logits.

    Raises:
        InputError: E0162 other functions than nnU-Net's default one, other orders than we have, or a separate axis for
            some of the three only.
    """
    for part in ("data", "seg", "probabilities"):
        function = getattr(configuration, f"resampling_fn_{part}")
        if function != RESAMPLE:
            raise _unknown(f"resampling_fn_{part}", function, RESAMPLE)
    image, label, probability = (
        configuration.resampling_fn_data_kwargs,
        configuration.resampling_fn_seg_kwargs,
        configuration.resampling_fn_probabilities_kwargs,
    )
    if (image.is_seg, label.is_seg, probability.is_seg) != (False, True, False):
        raise _unknown("resampling: is_seg", f"{image.is_seg}, {label.is_seg}, {probability.is_seg}", "labels only")
    if len({part.force_separate_z for part in (image, label, probability)}) > 1:
        raise _unknown("resampling: force_separate_z", "not the same for images, labels and logits", "one rule")
    if {part.separate_z_anisotropy_threshold for part in (image, label, probability)} != {3}:
        raise _unknown("resampling: separate_z_anisotropy_threshold", "changed", "3")
    try:
        return Resampling(
            image_order=image.order,
            image_order_z=image.order_z,
            label_order=label.order,
            label_order_z=label.order_z,
            probability_order=probability.order,
            probability_order_z=probability.order_z,
            force_separate_z=image.force_separate_z,
        )
    except ValidationError as error:
        raise _unknown("resampling", "spline orders", "images up to 3, labels and logits up to 1") from error


def network_of(configuration: NnunetConfiguration) -> NetworkPlan:
    """The network.

    Raises:
        InputError: E0162 another class, or one with layers that our networks do not have.
        IntegrityError: E0711 the stages do not fit together.
    """
    architecture = configuration.architecture or _architecture_before_2_5(configuration)
    name = CLASSES.get(architecture.network_class_name)
    if name is None:
        raise _unknown("network_class_name", architecture.network_class_name, "PlainConvUNet or ResidualEncoderUNet")
    arguments = _parse(architecture.arch_kwargs, _Arguments, "plans.json, arch_kwargs")
    dimensions = len(configuration.patch_size)
    _check_layers(arguments, dimensions)
    stages = arguments.n_stages
    per_stage = arguments.n_conv_per_stage if name == "plain" else arguments.n_blocks_per_stage
    if per_stage is None:
        raise _wrong("arch_kwargs", f"no {NETWORKS[name][1]}")
    lists = (arguments.features_per_stage, arguments.kernel_sizes, arguments.strides, per_stage)
    if any(isinstance(given, tuple) and len(given) != stages for given in lists):
        raise _wrong("arch_kwargs", f"lists that do not have one entry for each of {stages} stages")
    value = {
        "name": name,
        "features": _each(arguments.features_per_stage, stages),
        "kernels": tuple(_each(kernel, dimensions) for kernel in _each(arguments.kernel_sizes, stages)),
        "strides": tuple(_each(stride, dimensions) for stride in _each(arguments.strides, stages)),
        "convs_encoder": _each(per_stage, stages),
        "convs_decoder": _each(arguments.n_conv_per_stage_decoder, stages - 1),
    }
    return parse_record(value, NetworkPlan, "plans.json, architecture")


def _architecture_before_2_5(configuration: NnunetConfiguration) -> _Architecture:
    """The rule by which nnU-Net itself reads its older plans (plans_handler.py)."""
    name = configuration.UNet_class_name
    if name is None:
        raise _wrong("architecture", "neither architecture nor UNet_class_name")
    if name not in OLD_NETWORKS:
        raise _unknown("UNet_class_name", name, " or ".join(OLD_NETWORKS))
    convs, base, most = (
        configuration.n_conv_per_stage_encoder,
        configuration.UNet_base_num_features,
        configuration.unet_max_num_features,
    )
    if convs is None or base is None or most is None or configuration.n_conv_per_stage_decoder is None:
        raise _wrong("UNet_class_name", "without n_conv_per_stage_*, UNet_base_num_features or unet_max_num_features")
    if configuration.conv_kernel_sizes is None or configuration.pool_op_kernel_sizes is None:
        raise _wrong("UNet_class_name", "without conv_kernel_sizes or pool_op_kernel_sizes")
    dimensions = len(configuration.patch_size)
    class_name, per_stage = NETWORKS[OLD_NETWORKS[name]]
    arguments = {
        "n_stages": len(convs),
        "features_per_stage": [min(base * 2**stage, most) for stage in range(len(convs))],
        "conv_op": f"torch.nn.Conv{dimensions}d",
        "kernel_sizes": configuration.conv_kernel_sizes,
        "strides": configuration.pool_op_kernel_sizes,
        per_stage: convs,
        "n_conv_per_stage_decoder": configuration.n_conv_per_stage_decoder,
        "conv_bias": True,
        "norm_op": f"torch.nn.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": LEAKY[0],
        "nonlin_kwargs": {"inplace": True},
    }
    return _Architecture(network_class_name=class_name, arch_kwargs=arguments)


def _check_layers(arguments: _Arguments, dimensions: int) -> None:
    """Refuse what our networks do not do. Dropout does nothing in prediction and may be there."""
    norm, slope = arguments.norm_op_kwargs or _NormArguments(), arguments.nonlin_kwargs or _Slope()
    features = arguments.features_per_stage
    stem = (None, features if isinstance(features, int) else features[0] if features else None)
    checks = [
        ("conv_op", arguments.conv_op, CONVOLUTIONS.get(arguments.conv_op) == dimensions, f"Conv{dimensions}d"),
        ("norm_op", arguments.norm_op, NORMS.get(arguments.norm_op or "") == dimensions, f"InstanceNorm{dimensions}d"),
        ("norm_op_kwargs", norm, norm == _NormArguments(eps=1e-5, affine=True), "eps 1e-05, affine"),
        ("nonlin", arguments.nonlin, arguments.nonlin in LEAKY, "LeakyReLU"),
        ("nonlin_kwargs", slope, slope.negative_slope == 0.01, "negative_slope 0.01"),
        ("nonlin_first", arguments.nonlin_first, not arguments.nonlin_first, "False"),
        ("block", arguments.block, arguments.block == BASIC_BLOCK, "BasicBlockD"),
        ("bottleneck_channels", arguments.bottleneck_channels, arguments.bottleneck_channels is None, "none"),
        ("stem_channels", arguments.stem_channels, arguments.stem_channels in stem, "those of the first stage"),
    ]
    for field, found, known, expected in checks:
        if not known:
            raise _unknown(f"arch_kwargs: {field}", str(found), expected)


def _each(value: Any, count: int) -> tuple[Any, ...]:
    """A value for each of ``count`` stages or axes; the record checks the length."""
    return value if isinstance(value, tuple) else (value,) * count


def _parse(value: Any, kind: type[P], name: str) -> P:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise IntegrityError(
            [
                _problem(f"{name}: {'.'.join(str(part)[:80] for part in e['loc']) or 'file'}", e["msg"])
                for e in error.errors(include_url=False)[:20]
            ]
        ) from error


def _problem(field: str, measured: str, expected: str = "") -> Problem:
    return Problem("E0711", f"{field}: {measured}"[:300], expected, "correct the file, or get it again")


def _wrong(field: str, measured: str, expected: str = "") -> IntegrityError:
    return IntegrityError(_problem(f"plans.json: {field}", measured, expected))


def _unknown(field: str, measured: str, expected: str) -> InputError:
    return InputError(
        Problem("E0162", f"plans.json: {field} is {measured[:120]}", expected, "predict with nnU-Net itself")
    )
