"""Preset: the constants that the planning rules are run with.

The presets live here, so that an installed package needs no other file. ``plans/presets`` holds the same numbers as
JSON (a test compares them): copy one, change it, and give its path wherever the name of a preset is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from medseg.errors import Problem, UsageError
from medseg.records.base import Record, read_record
from medseg.records.training import ForegroundBy, LossName

NetworkChoice = Literal[
    "plain",
    "residual",
    "unet2015",
    "unet2015-linear",
    "unet2015-valid",
    "attention",
    "unetpp",
    "resnet18-unet",
    "resnet-unet",
    "resnet50-unet",
    "transunet",
    "swinunetr",
    "unetr",
    "segresnet",
    "mednext",
]


class Scale(Record):
    """Constants that differ between 2D and 3D networks.

    ``reference_values`` is the size of all feature maps that a network may have at ``reference_batch`` samples and
    the preset's ``reference_memory_gb``. ``initial_voxels`` is the size of the patch that the search starts from;
    the patch shrinks until ``patch_batch`` samples fit.
    """

    max_features: int = Field(ge=1, le=4096)
    reference_values: float = Field(gt=0)
    reference_batch: int = Field(ge=1)
    patch_batch: int = Field(ge=1)
    initial_voxels: int = Field(ge=1)


class Preset(Record):
    """Every constant of the planning rules; the fields are explained where the rules use them.

    ``sizing`` is how patch and batch are fitted to the budget: by nnU-Net's count of "values", or by the "cost" of a
    step on the device. ``laterality`` is what mirroring left and right does where labels tell them apart: nothing
    ("mirror"), or the axis is not mirrored ("drop"), or the labels change places too ("swap", where that is safe).
    ``convs_encoder`` are convolutions, of a residual network blocks, per stage, finest first; the last number holds
    for all deeper stages.
    """

    name: str = Field(min_length=1, max_length=64)
    network: NetworkChoice = "plain"
    loss: LossName = "dice-ce"
    checkpointing: bool = False
    base_features: int = Field(default=32, ge=1, le=4096)
    convs_encoder: tuple[Annotated[int, Field(ge=1, le=32)], ...] = Field(default=(2,), min_length=1, max_length=16)
    convs_decoder: int = Field(default=2, ge=1, le=32)
    min_edge: int = Field(default=4, ge=1, le=64)
    reference_memory_gb: float = Field(default=8.0, gt=0)
    min_batch: int = Field(default=2, ge=1)
    max_dataset_share: float = Field(default=0.05, gt=0, le=1)
    anisotropy: float = Field(default=3.0, gt=1)
    coarse_percentile: float = Field(default=10.0, ge=0, le=100)
    single_slices_first: bool = False
    mask_below: float = Field(default=0.75, ge=0, le=1)
    sizing: Literal["values", "cost"] = "values"
    least_steps: int = Field(default=100, ge=1)
    foreground_jitter: float = Field(default=0.0, ge=0, le=0.5)
    foreground_by: ForegroundBy = "voxel"
    elastic: float = Field(default=0.0, ge=0, le=1)
    probability_order_z: int = Field(default=0, ge=0, le=1)
    laterality: Literal["mirror", "drop", "swap"] = "mirror"
    lowres_below: float = Field(default=0.25, ge=0, le=1)
    lowres_step: float = Field(default=1.03, gt=1, le=2)
    lowres_min_gain: float = Field(default=2.0, ge=1)
    two: Scale = Scale(
        max_features=512, reference_values=85e6, reference_batch=12, patch_batch=2, initial_voxels=2048**2
    )
    three: Scale = Scale(
        max_features=320, reference_values=560e6, reference_batch=2, patch_batch=2, initial_voxels=256**3
    )

    def scale(self, dimensions: int) -> Scale:
        """The constants for 2 or 3 dimensions."""
        return self.two if dimensions == 2 else self.three


def _residual(name: str, memory_gb: float, values_2d: float, values_3d: float) -> Preset:
    """A preset of nnU-Net's residual-encoder planners: they differ in these numbers only."""
    return Preset(
        name=name,
        network="residual",
        convs_encoder=(1, 3, 4, 6),
        convs_decoder=1,
        reference_memory_gb=memory_gb,
        max_dataset_share=1.0,
        two=NNUNET.two.model_copy(update={"reference_values": values_2d, "patch_batch": 12}),
        three=NNUNET.three.model_copy(update={"reference_values": values_3d}),
    )


NNUNET = Preset(name="nnunet")
"""nnU-Net 2.8.1, class ExperimentPlanner (experiment_planners/default_experiment_planner.py)."""

RESENC_M = _residual("resenc-m", 8.0, 135e6, 680e6)
RESENC_L = _residual("resenc-l", 24.0, 380e6, 2.1e9)
RESENC_XL = _residual("resenc-xl", 40.0, 560e6, 3.6e9)
"""nnU-Net 2.8.1, classes nnUNetPlannerResEncM, L and XL (residual_unets/residual_encoder_unet_planners.py:220-293)."""

MEDSEG = Preset(
    name="medseg",
    sizing="cost",
    single_slices_first=True,
    foreground_jitter=0.25,
    probability_order_z=1,
    laterality="swap",
)
"""Our default: nnU-Net's rules but where there is evidence against them (docs/concepts/planning.md)."""

DEFAULT_PRESET = MEDSEG.name
PRESETS = {preset.name: preset for preset in (MEDSEG, NNUNET, RESENC_M, RESENC_L, RESENC_XL)}


def preset_named(name: str) -> Preset:
    """The preset of that name, or the one in a JSON file of that path.

    Raises:
        UsageError: E0001 there is neither.
        IntegrityError: E0711 the file does not hold a preset.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return read_record(path, Preset)
    raise UsageError(Problem("E0001", f"preset {name!r}", ", ".join(PRESETS), "choose one of them, or a JSON file"))
