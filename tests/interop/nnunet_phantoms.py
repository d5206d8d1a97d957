"""Made-up result folders of nnU-Net v2: plans in both forms, data set, and checkpoints with random weights."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medseg.interop.nnunet_weights import to_nnunet
from medseg.networks.build import build_network
from medseg.records.network import NetworkPlan

RESAMPLE = "resample_data_or_seg_to_shape"
INTENSITY = {
    "max": 900.0, "mean": 100.0, "median": 90.0, "min": -50.0, "std": 80.0,
    "percentile_00_5": 0.0, "percentile_99_5": 700.0,
}  # fmt: skip
NETWORK = NetworkPlan(
    features=(4, 6, 8),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 1)),
    convs_encoder=(2, 1, 2),
    convs_decoder=(1, 2),
)
RESIDUAL = NETWORK.model_copy(update={"name": "residual", "convs_encoder": (1, 2, 1)})
LABELS = {"background": 0, "outer": 1, "inner": 2}


def architecture(network: NetworkPlan = NETWORK) -> dict[str, Any]:
    """As of nnU-Net 2.5."""
    plain, dimensions = network.name == "plain", len(network.strides[0])
    stages = "n_conv_per_stage" if plain else "n_blocks_per_stage"
    name = "PlainConvUNet" if plain else "ResidualEncoderUNet"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": {
            "n_stages": len(network.features),
            "features_per_stage": list(network.features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [list(k) for k in network.kernels],
            "strides": [list(s) for s in network.strides],
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


def configuration(network: NetworkPlan = NETWORK, channels: int = 1, **changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [8, 16, 12],
        "median_image_size_in_voxels": [18.0, 26.0, 30.0],
        "spacing": [2.0, 1.1, 0.9],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "architecture": architecture(network),
        "batch_dice": True,
    }
    for part, labels, order in (("data", False, 3), ("seg", True, 1), ("probabilities", False, 1)):
        arguments = {"is_seg": labels, "order": order, "order_z": 0, "force_separate_z": None}
        value |= {f"resampling_fn_{part}": RESAMPLE, f"resampling_fn_{part}_kwargs": arguments}
    return value | changes


def plans(configurations: dict[str, Any], channels: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "dataset_name": "Dataset900_Phantom",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0, 1.1, 0.9],
        "original_median_shape_after_transp": [18, 26, 30],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): INTENSITY for c in range(channels)},
    } | changes


def dataset(**changes: Any) -> dict[str, Any]:
    return {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": 4, "file_ending": ".nii.gz"} | changes


def checkpoint(network: NetworkPlan, name: str, channels: int = 1, outputs: int = 3, seed: int = 0) -> dict[str, Any]:
    """What nnU-Net stores, numpy's numbers in the log and all."""
    weights = build_network(network, channels, outputs, seed=seed).state_dict()
    return {
        "network_weights": OrderedDict(to_nnunet(weights, network)),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"ema_fg_dice": [np.float64(0.5), np.float32(0.25)], "epochs": [1]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 2,
        "init_args": {"configuration": name, "fold": 0, "plans": {}, "device": torch.device("cuda")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": tuple(range(len(network.strides[0]))),
    }


def write_results(
    folder: Path,
    written_plans: dict[str, Any],
    name: str = "3d_fullres",
    network: NetworkPlan = NETWORK,
    folds: tuple[str, ...] = ("0",),
    channels: int = 1,
    **changes: Any,
) -> Path:
    """``folder/nnUNetTrainer__nnUNetPlans__NAME``; ``changes`` are of dataset.json."""
    results = folder / f"nnUNetTrainer__nnUNetPlans__{name}"
    results.mkdir(parents=True)
    declaration = dataset(**changes)
    (results / "plans.json").write_text(json.dumps(written_plans))
    (results / "dataset.json").write_text(json.dumps(declaration))
    outputs = len(declaration["labels"]) - ("regions_class_order" in declaration) - ("ignore" in declaration["labels"])
    for seed, fold in enumerate(folds):
        (results / f"fold_{fold}").mkdir()
        stored = checkpoint(network, name, channels, outputs, seed)
        torch.save(stored, results / f"fold_{fold}" / "checkpoint_final.pth")
    return results
