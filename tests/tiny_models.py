"""Tiny networks, plans and prepared cases for the tests of networks, training and inference.

Nothing here is a cube: sides, spacings, kernels and strides differ by axis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.preparation.store import Provenance, StoredCase, read_case_record
from medseg.preparation.writer import write_case
from medseg.records.fingerprint import Intensity
from medseg.records.model import ModelCard
from medseg.records.network import NetworkPlan
from medseg.records.plan import ConfigurationPlan, Normalisation, Plan
from medseg.records.preparation import Preparation
from medseg.records.task import Channel, Label, Region, Task
from medseg.records.training import TrainingPlan

INTENSITY = Intensity(mean=110, median=100, std=40, min=0, max=260, percentile_00_5=60, percentile_99_5=220)
Shape = tuple[int, ...]

FLAT_KERNELS = NetworkPlan(
    features=(4, 6, 8),
    kernels=((1, 3, 3), (3, 3, 3), (3, 1, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 1)),
    convs_encoder=(2, 1, 3),
    convs_decoder=(1, 2),
)
TWO_D = NetworkPlan(
    features=(4, 6),
    kernels=((3, 3), (3, 5)),
    strides=((1, 1), (2, 1)),
    convs_encoder=(1, 2),
    convs_decoder=(2,),
)


def make_task(classes: int = 3, channels: int = 1, **changes: Any) -> Task:
    """Labels 0, 1, 2 …"""
    return Task(
        channels=tuple(Channel(name=f"MRI{c}") for c in range(channels)),
        labels=tuple(Label(name=f"label {v}", value=v) for v in range(classes)),
        **changes,
    )


def make_region_task() -> Task:
    """Classes 0, 2, 4, 7; "whole" is all of them, "core" two, "tip" one; painted in this order with 2, 7, 4."""
    values = (0, 2, 4, 7)
    return Task(
        channels=(Channel(name="MRI"),),
        labels=tuple(Label(name=f"label {v}", value=v) for v in values),
        regions=(
            Region(name="whole", values=(2, 4, 7)),
            Region(name="core", values=(4, 7)),
            Region(name="tip", values=(4,)),
        ),
        regions_order=(2, 7, 4),
    )


def make_configuration(
    patch: Shape, network: NetworkPlan, batch_size: int = 2, name: str = "tiny", **training: Any
) -> ConfigurationPlan:
    return ConfigurationPlan(
        name=name,
        spacing_mm=(2.0, 1.0, 0.8)[-len(patch) :],
        patch_size=patch,
        batch_size=batch_size,
        median_shape=tuple(float(n) for n in patch),
        normalisation=(Normalisation(scheme="zscore"),),
        network=network,
        training=TrainingPlan(**training),
    )


def make_plan(configuration: ConfigurationPlan, task: Task) -> Plan:
    channels = len(task.channels)
    configuration = configuration.model_copy(update={"normalisation": (Normalisation(scheme="zscore"),) * channels})
    return Plan(
        preset="test",
        task=task,
        intensities=(INTENSITY,) * channels,
        configurations={configuration.name: configuration},
    )


def make_card(plan: Plan, **changes: Any) -> ModelCard:
    """Of the only configuration of ``plan``."""
    (configuration,) = plan.configurations.values()
    values = {
        "configuration": configuration.name,
        "fold": "0",
        "plan": plan,
        "weights_sha256": "0",
        "medseg_version": "0",
        "torch_version": "0",
        "settings_sha256": "0",
        "batch_size": configuration.batch_size,
        "training": TrainingPlan(momentum=0.5),
        "steps": 1,
    }
    return ModelCard(**(values | changes))


def make_preparation(
    small: tuple[int, int, int],
    large: tuple[int, int, int] | None = None,
    spacing: tuple[float, float, float] = (2.0, 1.0, 0.8),
    target_spacing: tuple[float, float, float] = (2.0, 1.0, 0.8),
) -> Preparation:
    """Nothing turned, nothing cropped: ``large`` on the file's grid, ``small`` on the network's."""
    large = large or small
    return Preparation(
        source_shape=large,
        to_canonical=(0, 1, 2),
        flipped=(False, False, False),
        transpose=(0, 1, 2),
        uncropped_shape=large,
        crop_box=((0, large[0]), (0, large[1]), (0, large[2])),
        spacing_mm=spacing,
        target_spacing_mm=target_spacing,
        target_shape=small,
    )


def blobs(shape: tuple[int, int, int], seed: int) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """A noisy image (1, Z, Y, X) of an ellipsoid (1) with an off-centre one in it (2), and its labels."""
    rng = np.random.default_rng(seed)
    points = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"), -1)
    centre = rng.uniform(-0.15, 0.15, 3)
    outer = (((points - centre) / (0.75, 0.6, 0.65)) ** 2).sum(-1) < 1
    inner = (((points - centre - (0.1, 0.2, -0.15)) / (0.45, 0.3, 0.3)) ** 2).sum(-1) < 1
    labels = np.where(inner, 2, np.where(outer, 1, 0)).astype(np.int16)
    image = np.array([-1.0, 0.3, 1.6])[labels] + rng.normal(0, 0.15, shape)
    return image[None].astype(np.float32), labels


def store_case(
    folder: Path, case_id: str, image: NDArray[np.float32], labels: NDArray[np.int16], dimensions: int = 3
) -> StoredCase:
    """A case written to the store and read again."""
    shape = (labels.shape[0], labels.shape[1], labels.shape[2])
    folder.mkdir(parents=True, exist_ok=True)
    write_case(folder, case_id, image, labels, make_preparation(shape), Provenance("settings", (case_id,)), dimensions)
    record = read_case_record(folder, case_id)
    assert record is not None
    return StoredCase(folder, record)


def store_blobs(folder: Path, shapes: list[tuple[int, int, int]], dimensions: int = 3) -> list[StoredCase]:
    """Cases ``case_0``, ``case_1`` … of the given shapes, in memory."""
    return [
        store_case(folder, f"case_{index}", *blobs(shape, index), dimensions).load()
        for index, shape in enumerate(shapes)
    ]
