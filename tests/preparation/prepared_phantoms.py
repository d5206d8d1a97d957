"""Plans and data sets for the tests of preparation, built without the planner and the dataset readers."""

from __future__ import annotations

from pathlib import Path

from phantoms import make_dataset

from medseg.records.case import Case, Dataset
from medseg.records.fingerprint import Intensity
from medseg.records.network import NetworkPlan
from medseg.records.plan import ConfigurationPlan, Normalisation, Plan
from medseg.records.task import Channel, Label, Task

INTENSITY = Intensity(mean=110, median=100, std=40, min=0, max=260, percentile_00_5=60, percentile_99_5=220)
ZSCORE = Normalisation(scheme="zscore")


def make_task(classes: int = 3, channels: int = 1, **changes: object) -> Task:
    return Task(
        channels=tuple(Channel(name=f"MRI{c}") for c in range(channels)),
        labels=tuple(Label(name=f"label {v}", value=v) for v in range(classes)),
        **changes,
    )


def make_plan(
    task: Task | None = None,
    spacing: tuple[float, ...] = (1.5, 1.0, 1.2),
    transpose: tuple[int, int, int] = (0, 1, 2),
    normalisation: Normalisation = ZSCORE,
    batch_size: int = 2,
) -> tuple[Plan, ConfigurationPlan]:
    task = task or make_task()
    axes = len(spacing)
    configuration = ConfigurationPlan(
        name="2d" if axes == 2 else "3d_fullres",
        spacing_mm=spacing,
        patch_size=(8,) * axes,
        batch_size=batch_size,
        median_shape=(20.0,) * axes,
        normalisation=(normalisation,) * len(task.channels),
        network=NetworkPlan(
            features=(8,), kernels=((3,) * axes,), strides=((1,) * axes,), convs_encoder=(2,), convs_decoder=()
        ),
    )
    plan = Plan(
        preset="test",
        task=task,
        transpose=transpose,
        intensities=(INTENSITY,) * len(task.channels),
        configurations={configuration.name: configuration},
    )
    return plan, configuration


def read_phantoms(folder: Path, cases: int = 4, channels: int = 1) -> Dataset:
    """Write an nnU-Net data set of phantoms, unless it is there, and list it."""
    if not folder.exists():
        make_dataset(folder, cases, channels=channels)
    return Dataset(
        root=folder,
        layout="nnunet",
        task=make_task(channels=channels),
        cases=tuple(
            Case(
                id=f"case_{index:02d}",
                images=tuple(folder / "imagesTr" / f"case_{index:02d}_{c:04d}.nii.gz" for c in range(channels)),
                label=folder / "labelsTr" / f"case_{index:02d}.nii.gz",
            )
            for index in range(cases)
        ),
        file_ending=".nii.gz",
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a store, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
