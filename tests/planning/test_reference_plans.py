"""The plans equal those of nnU-Net 2.8.1's default planner, field by field."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from medseg.dataset.fingerprint import from_nnunet
from medseg.planning.planner import Situation, make_plan, plan_3d_lowres
from medseg.planning.presets import NNUNET
from medseg.records.fingerprint import Fingerprint
from medseg.records.plan import Budget, ConfigurationPlan, Plan
from medseg.records.task import Channel, Label, Task

HERE = Path(__file__).resolve().parents[2] / "plans" / "reference"
NNUNET_SCHEMES = {
    "zscore": "ZScoreNormalization",
    "ct": "CTNormalization",
    "none": "NoNormalization",
    "rescale_0_1": "RescaleTo01Normalization",
    "rgb_0_1": "RGBTo01Normalization",
}


class Reference(NamedTuple):
    name: str
    fingerprint: Fingerprint
    task: Task
    memory_gb: float
    transpose: list[int]
    configurations: dict[str, dict[str, Any]]


def test_the_plans_in_the_repository_are_reproduced():
    assert compare(references_here(HERE)) == (18, 408, [])


def test_all_plans_of_the_default_planner_are_reproduced(shared):
    folder = shared / "reference_plans"
    assert compare([*references_of_msd(folder), *references_of_synthetic(folder)]) == (75, 1818, [])


def test_low_resolution_stages_are_reproduced(shared):
    folder = shared / "reference_plans"
    compared, wrong = 0, []
    for reference in [*references_of_msd(folder), *references_of_synthetic(folder)]:
        plan = make_plan(reference.fingerprint, reference.task, Budget(memory_gb=reference.memory_gb))
        if "3d_fullres" not in plan.configurations:
            continue
        lowres = lowres_of(plan, len(reference.fingerprint.cases))
        expected = reference.configurations.get("3d_lowres")
        if (lowres is None) != (expected is None):
            wrong.append(f"{reference.name}: {lowres} vs {expected}")
        elif lowres is not None:
            compared += 1
            wrong += differences(reference.name, to_nnunet(lowres), expected)
    assert (compared, wrong) == (29, [])


def compare(references: list[Reference]) -> tuple[int, int, list[str]]:
    """Entries, fields and what differs in ``2d`` and ``3d_fullres``."""
    fields, wrong = 0, []
    for reference in references:
        plan = make_plan(reference.fingerprint, reference.task, Budget(memory_gb=reference.memory_gb))
        expected = {k: v for k, v in reference.configurations.items() if k in ("2d", "3d_fullres")}
        if set(plan.configurations) != set(expected) or list(plan.transpose) != reference.transpose:
            wrong.append(f"{reference.name}: {sorted(plan.configurations)}, transpose {plan.transpose}")
        for name, configuration in plan.configurations.items():
            found = to_nnunet(configuration)
            wrong += differences(f"{reference.name} {name}", found, expected[name])
            fields += len(found.keys() & expected[name].keys())
    return len(references), fields, wrong


def differences(where: str, found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    resampling = {key for key in found if key.startswith("resampling_")}
    missing = found.keys() - expected.keys() - resampling
    shared_keys = sorted(found.keys() & expected.keys())
    return [f"{where} has no {key}" for key in missing] + [
        f"{where} {key}: {found[key]} vs {expected[key]}" for key in shared_keys if found[key] != expected[key]
    ]


def to_nnunet(configuration: ConfigurationPlan) -> dict[str, Any]:
    """A configuration in nnU-Net's words."""
    network, resampling = configuration.network, configuration.resampling

    def kwargs(is_seg: bool, order: int, order_z: int) -> dict[str, Any]:
        separate = resampling.force_separate_z
        return {"is_seg": is_seg, "order": order, "order_z": order_z, "force_separate_z": separate}

    return {
        "spacing": list(configuration.spacing_mm),
        "patch_size": list(configuration.patch_size),
        "batch_size": configuration.batch_size,
        "median_image_size_in_voxels": list(configuration.median_shape),
        "normalization_schemes": [NNUNET_SCHEMES[n.scheme] for n in configuration.normalisation],
        "use_mask_for_norm": [n.use_mask for n in configuration.normalisation],
        "batch_dice": configuration.training.batch_dice,
        "features_per_stage": list(network.features),
        "kernel_sizes": [list(kernel) for kernel in network.kernels],
        "strides": [list(stride) for stride in network.strides],
        "blocks_encoder": list(network.convs_encoder),
        "blocks_decoder": list(network.convs_decoder),
        "resampling_fn_data_kwargs": kwargs(False, resampling.image_order, resampling.image_order_z),
        "resampling_fn_seg_kwargs": kwargs(True, resampling.label_order, resampling.label_order_z),
        "resampling_fn_probabilities_kwargs": kwargs(
            False, resampling.probability_order, resampling.probability_order_z
        ),
    }


def lowres_of(plan: Plan, cases: int) -> ConfigurationPlan | None:
    fullres = plan.configurations["3d_fullres"]
    spacing, shape = fullres.spacing_mm, fullres.median_shape
    situation = Situation(plan.task, plan.budget, NNUNET, spacing, shape, cases, fullres.normalisation)
    return plan_3d_lowres(situation, fullres)


def references_here(folder: Path) -> list[Reference]:
    found = []
    for path in sorted(folder.glob("*.json")):
        value = json.loads(path.read_text())
        found += presets(path.stem, value["dataset"], value["fingerprint"], value["plans"])
    return found


def references_of_synthetic(folder: Path) -> list[Reference]:
    found = []
    for path in sorted((folder / "synthetic").iterdir()):
        dataset, fingerprint, plans = (
            json.loads((path / f"{name}.json").read_text()) for name in ("dataset", "fingerprint", "nnunet_plans")
        )
        found += presets(path.name, dataset, fingerprint, plans)
    return found


def presets(name: str, dataset: dict, fingerprint: dict, plans: dict) -> Iterator[Reference]:
    for preset, plan in plans.items():
        if preset.startswith("nnunet"):
            memory = 8.0 if preset == "nnunet" else float(preset.removeprefix("nnunet-").removesuffix("gb"))
            yield Reference(
                f"{name} {preset}",
                from_nnunet(fingerprint),
                task_of(dataset),
                memory,
                plan["transpose_forward"],
                plan["configurations"],
            )


def references_of_msd(folder: Path) -> Iterator[Reference]:
    with gzip.open(folder / "msd_and_local.json.gz") as file:
        records = json.load(file)
    for record in records:
        if record["planner"] == "ExperimentPlanner":
            plans = record["plans"]
            configurations = {k: flat(v) for k, v in plans["configurations"].items()}
            yield Reference(
                record["id"],
                from_nnunet(record["fingerprint"]),
                task_of(record["dataset"]),
                8.0,
                plans["transpose_forward"],
                configurations,
            )


def flat(configuration: dict[str, Any]) -> dict[str, Any]:
    """A configuration of a full plans file with the network's fields beside the others, named as in the short form."""
    if "inherits_from" in configuration:
        return configuration
    network = configuration["architecture"]["arch_kwargs"]
    return configuration | {
        "features_per_stage": network["features_per_stage"],
        "kernel_sizes": network["kernel_sizes"],
        "strides": network["strides"],
        "blocks_encoder": network["n_conv_per_stage"],
        "blocks_decoder": network["n_conv_per_stage_decoder"],
    }


def task_of(dataset: dict[str, Any]) -> Task:
    channels = tuple(Channel(name=name) for name in dataset["channel_names"].values())
    labels = tuple(Label(name=name, value=value) for name, value in dataset["labels"].items())
    return Task(channels=channels, labels=labels)
