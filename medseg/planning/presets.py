"""Preset: the constants that the planning rules are run with.

The default lives here, so that an installed package needs no other file. ``plans/presets/nnunet.json`` holds the same
numbers (a test compares them): copy it, change it, and give the record that ``read_record(path, Preset)`` returns to
``make_plan``.
"""

from __future__ import annotations

from pydantic import Field

from medseg.errors import Problem, UsageError
from medseg.records.base import Record


class Scale(Record):
    """Constants that differ between 2D and 3D networks.

    ``reference_values`` is the size of all feature maps that a network may have at ``reference_batch`` samples and
    the preset's ``reference_memory_gb``. ``initial_voxels`` is the size of the patch that the search starts from.
    """

    max_features: int = Field(ge=1, le=4096)
    reference_values: float = Field(gt=0)
    reference_batch: int = Field(ge=1)
    initial_voxels: int = Field(ge=1)


class Preset(Record):
    """Every constant of the planning rules; the fields are explained where the rules use them."""

    name: str = Field(min_length=1, max_length=64)
    base_features: int = Field(default=32, ge=1, le=4096)
    convs_encoder: int = Field(default=2, ge=1, le=32)
    convs_decoder: int = Field(default=2, ge=1, le=32)
    min_edge: int = Field(default=4, ge=1, le=64)
    reference_memory_gb: float = Field(default=8.0, gt=0)
    min_batch: int = Field(default=2, ge=1)
    max_dataset_share: float = Field(default=0.05, gt=0, le=1)
    anisotropy: float = Field(default=3.0, gt=1)
    coarse_percentile: float = Field(default=10.0, ge=0, le=100)
    mask_below: float = Field(default=0.75, ge=0, le=1)
    lowres_below: float = Field(default=0.25, ge=0, le=1)
    lowres_step: float = Field(default=1.03, gt=1, le=2)
    lowres_min_gain: float = Field(default=2.0, ge=1)
    two: Scale = Scale(max_features=512, reference_values=85e6, reference_batch=12, initial_voxels=2048**2)
    three: Scale = Scale(max_features=320, reference_values=560e6, reference_batch=2, initial_voxels=256**3)

    def scale(self, dimensions: int) -> Scale:
        """The constants for 2 or 3 dimensions."""
        return self.two if dimensions == 2 else self.three


NNUNET = Preset(name="nnunet")
"""nnU-Net 2.8.1, class ExperimentPlanner (experiment_planners/default_experiment_planner.py)."""

PRESETS = {NNUNET.name: NNUNET}


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UsageError: E0001 there is none.
    """
    if name not in PRESETS:
        raise UsageError(Problem("E0001", f"preset {name!r}", ", ".join(PRESETS), "choose one of them"))
    return PRESETS[name]
