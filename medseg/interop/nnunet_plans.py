"""nnU-Net plans: a plan written as the ``plans.json`` of nnU-Net v2 (keys and their order as of 2.8.1).

Axes: a fingerprint from nnU-Net gives a plan in nnU-Net's axes, those of the files. One measured by medseg counts
them in canonical orientation; such a plan fits nnU-Net only where the files' axes run along z, y, x too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medseg.errors import InputError, Problem
from medseg.records.fingerprint import Fingerprint, Intensity
from medseg.records.network import NetworkPlan
from medseg.records.plan import ConfigurationPlan, Normalisation, Plan, Resampling, Scheme

NORMALISATION: dict[Scheme, str] = {
    "zscore": "ZScoreNormalization",
    "ct": "CTNormalization",
    "none": "NoNormalization",
    "rescale_0_1": "RescaleTo01Normalization",
    "rgb_0_1": "RGBTo01Normalization",
}
NETWORKS = {  # class, and the word for what each encoder stage holds
    "plain": ("dynamic_network_architectures.architectures.unet.PlainConvUNet", "n_conv_per_stage"),
    "residual": ("dynamic_network_architectures.architectures.unet.ResidualEncoderUNet", "n_blocks_per_stage"),
}
PLANNERS = {  # planner and plans name by preset
    "nnunet": ("ExperimentPlanner", "nnUNetPlans"),
    "resenc-m": ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans"),
    "resenc-l": ("nnUNetPlannerResEncL", "nnUNetResEncUNetLPlans"),
    "resenc-xl": ("nnUNetPlannerResEncXL", "nnUNetResEncUNetXLPlans"),
}
OWN_PLANNERS = {"plain": "ExperimentPlanner", "residual": "ResEncUNetPlanner"}  # of other presets, by network
SHARED_DATA = ("2d", "3d_fullres")  # the planners of PLANNERS all prepare these alike, and keep them under one name
READERS = {  # in nnU-Net's order of preference (imageio/reader_writer_registry.py)
    "NaturalImage2DIO": (".png", ".bmp", ".tif"),
    "SimpleITKIO": (".nii.gz", ".nrrd", ".mha", ".gipl"),
    "Tiff3DIO": (".tif", ".tiff"),
    "NibabelIO": (".nii", ".nii.gz"),
    "SimpleITKIOWithReorient": (),
    "NibabelIOWithReorient": (),
}
RESAMPLE = "resample_data_or_seg_to_shape"


@dataclass(frozen=True, slots=True)
class Naming:
    """What a plans file says beside the plan: nnU-Net's names of the data set, of its reader and of the plans."""

    dataset: str
    reader: str
    plans: str

    @classmethod
    def of(cls, plan: Plan, dataset: str, reader: str) -> Naming:
        """The plans are called what nnU-Net calls those of the same preset."""
        return cls(dataset, reader, PLANNERS.get(plan.preset, ("", f"nnUNetPlans_{plan.preset}"))[1])


def reader_of(file_ending: str, fingerprint: Fingerprint, wanted: str | None = None) -> str:
    """The class that nnU-Net reads files of an ending with; ``wanted`` is dataset.json's own wish, if it has one.

    nnU-Net tries a file where several classes claim an ending; for ``.tif`` the number of slices decides here.

    Raises:
        InputError: E0106 nnU-Net cannot read such files.
    """
    if wanted in READERS:
        return wanted
    flat = all(1 in case.shape_after_crop for case in fingerprint.cases)
    for name, endings in READERS.items():
        if file_ending.lower() in endings and (flat or name != "NaturalImage2DIO"):
            return name
    readable = " ".join(dict.fromkeys(ending for endings in READERS.values() for ending in endings))
    raise InputError(Problem("E0106", f"nnU-Net reads no {file_ending} files", readable, "convert the images"))


def nnunet_plans(plan: Plan, fingerprint: Fingerprint, naming: Naming) -> dict[str, Any]:
    """The plan in nnU-Net's form, as JSON values. ``fingerprint`` is what the plan was made from."""
    configurations = {name: _configuration(plan, name, naming) for name in plan.configurations}
    for name, configuration in plan.configurations.items():
        if configuration.previous_stage is not None:
            configurations[configuration.previous_stage]["next_stage"] = name
            configurations[name] = _second_stage(plan, configuration, configurations[name])
    order = list(plan.transpose)
    spacing = np.median([case.spacing_mm for case in fingerprint.cases], 0)[order]
    shape = np.median([case.shape_after_crop for case in fingerprint.cases], 0)[order]
    network = next(iter(plan.configurations.values())).network.name
    return {
        "dataset_name": naming.dataset,
        "plans_name": naming.plans,
        "original_median_spacing_after_transp": [float(s) for s in spacing],
        "original_median_shape_after_transp": [round(float(n)) for n in shape],
        "image_reader_writer": naming.reader,
        "transpose_forward": order,
        "transpose_backward": [order.index(axis) for axis in range(3)],
        "configurations": configurations,
        "experiment_planner_used": PLANNERS.get(plan.preset, (OWN_PLANNERS[network], ""))[0],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(channel): _intensity(intensity) for channel, intensity in enumerate(plan.intensities)
        },
    }


def _configuration(plan: Plan, name: str, naming: Naming) -> dict[str, Any]:
    configuration = plan.configurations[name]
    residual = configuration.network.name == "residual"
    shared = residual and plan.preset in PLANNERS and name in SHARED_DATA
    return {
        "data_identifier": f"{'nnUNetPlans' if shared else naming.plans}_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": configuration.batch_size,
        "patch_size": list(configuration.patch_size),
        "median_image_size_in_voxels": _median_shape(configuration),
        "spacing": list(configuration.spacing_mm),
        **_normalisation(configuration.normalisation),
        **_resampling(configuration.resampling),
        "architecture": _architecture(configuration.network),
        "batch_dice": configuration.training.batch_dice,
    }


def _second_stage(plan: Plan, configuration: ConfigurationPlan, written: dict[str, Any]) -> dict[str, Any]:
    """Inheriting from the configuration that differs from it in nothing but the previous stage, if there is one."""
    for other in plan.configurations.values():
        if configuration.model_copy(update={"name": other.name, "previous_stage": None}) == other:
            return {"inherits_from": other.name, "previous_stage": configuration.previous_stage}
    return {**written, "previous_stage": configuration.previous_stage}


def _median_shape(configuration: ConfigurationPlan) -> list[float]:
    """Whole numbers for ``3d_lowres``, floats for the others, as nnU-Net writes them."""
    shape = configuration.median_shape
    return [round(n) for n in shape] if configuration.name == "3d_lowres" else [float(n) for n in shape]


def _normalisation(schemes: Sequence[Normalisation]) -> dict[str, Any]:
    return {
        "normalization_schemes": [NORMALISATION[normalisation.scheme] for normalisation in schemes],
        "use_mask_for_norm": [normalisation.use_mask for normalisation in schemes],
    }


def _resampling(resampling: Resampling) -> dict[str, Any]:
    def arguments(order: int, order_z: int, *, labels: bool) -> dict[str, Any]:
        separate = resampling.force_separate_z
        return {"is_seg": labels, "order": order, "order_z": order_z, "force_separate_z": separate}

    images = arguments(resampling.image_order, resampling.image_order_z, labels=False)
    labels = arguments(resampling.label_order, resampling.label_order_z, labels=True)
    probabilities = arguments(resampling.probability_order, resampling.probability_order_z, labels=False)
    return {
        "resampling_fn_data": RESAMPLE,
        "resampling_fn_seg": RESAMPLE,
        "resampling_fn_data_kwargs": images,
        "resampling_fn_seg_kwargs": labels,
        "resampling_fn_probabilities": RESAMPLE,
        "resampling_fn_probabilities_kwargs": probabilities,
    }


def _architecture(network: NetworkPlan) -> dict[str, Any]:
    if network.name not in NETWORKS:
        known = ", ".join(NETWORKS)
        raise InputError(Problem("E0162", f"nnU-Net's plans know no network {network.name}", known, ""))
    class_name, stages = NETWORKS[network.name]
    dimensions = len(network.strides[0])
    return {
        "network_class_name": class_name,
        "arch_kwargs": {
            "n_stages": len(network.features),
            "features_per_stage": list(network.features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [list(kernel) for kernel in network.kernels],
            "strides": [list(stride) for stride in network.strides],
            stages: list(network.convs_encoder),
            "n_conv_per_stage_decoder": list(network.convs_decoder),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _intensity(intensity: Intensity) -> dict[str, float]:
    return dict(sorted(intensity.to_json().items()))
