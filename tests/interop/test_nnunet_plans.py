"""Plans in nnU-Net's form beyond what the reference plans show: readers, names, and plans of other presets."""

from __future__ import annotations

import pytest

from medseg.errors import InputError
from medseg.interop.nnunet_plans import Naming, nnunet_plans, reader_of
from medseg.planning.planner import make_plan
from medseg.planning.presets import NNUNET, RESENC_M
from medseg.records.fingerprint import CasePrint, Fingerprint, Intensity
from medseg.records.task import Channel, Label, Task

INTENSITY = Intensity(mean=1, median=1, std=1, min=0, max=2, percentile_00_5=0, percentile_99_5=2)
TASK = Task(
    channels=(Channel(name="CT"), Channel(name="T1")), labels=(Label(name="b", value=0), Label(name="a", value=1))
)


def measured(*shapes: tuple[int, int, int], spacing: tuple[float, float, float] = (0.8, 3.0, 0.9)) -> Fingerprint:
    cases = [
        CasePrint(id=f"c{i}", shape_after_crop=shape, spacing_mm=spacing, relative_size_after_cropping=0.5)
        for i, shape in enumerate(shapes)
    ]
    return Fingerprint(cases=cases, intensities=(INTENSITY,) * 2, median_relative_size_after_cropping=0.5)


VOLUMES, PICTURES = measured((60, 12, 70), (65, 14, 71)), measured((1, 60, 70), spacing=(999.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("ending", "fingerprint", "reader"),
    [
        (".nii.gz", VOLUMES, "SimpleITKIO"),
        (".mha", VOLUMES, "SimpleITKIO"),
        (".nii", VOLUMES, "NibabelIO"),
        (".png", PICTURES, "NaturalImage2DIO"),
        (".tif", PICTURES, "NaturalImage2DIO"),
        (".tif", VOLUMES, "Tiff3DIO"),
        (".tiff", VOLUMES, "Tiff3DIO"),
        (".nii.gz", PICTURES, "SimpleITKIO"),
    ],
)
def test_the_reader_is_the_one_that_nnunet_would_choose(ending, fingerprint, reader):
    assert reader_of(ending, fingerprint) == reader


def test_the_reader_that_dataset_json_asks_for_comes_first():
    assert reader_of(".nii.gz", VOLUMES, "NibabelIOWithReorient") == "NibabelIOWithReorient"
    assert reader_of(".nii.gz", VOLUMES, "None") == "SimpleITKIO"


def test_files_that_nnunet_cannot_read_are_refused():
    with pytest.raises(InputError, match=r"E0106.*\.jpg"):
        reader_of(".jpg", PICTURES)


def test_axes_and_medians_are_given_in_the_transposed_order():
    plan = make_plan(VOLUMES, TASK)
    value = nnunet_plans(plan, VOLUMES, Naming.of(plan, "Dataset007_Two", "SimpleITKIO"))
    assert value["transpose_forward"] == [1, 0, 2]
    assert value["transpose_backward"] == [1, 0, 2]
    assert value["original_median_spacing_after_transp"] == [3.0, 0.8, 0.9]
    assert value["original_median_shape_after_transp"] == [13, 62, 70]
    flat = value["configurations"]["2d"]
    assert flat["normalization_schemes"] == ["CTNormalization", "ZScoreNormalization"]
    assert flat["use_mask_for_norm"] == [False, True]
    assert list(value["foreground_intensity_properties_per_channel"]) == ["0", "1"]


def test_presets_of_ones_own_get_plans_and_data_of_their_own():
    for rules, planner in ((NNUNET, "ExperimentPlanner"), (RESENC_M, "ResEncUNetPlanner")):
        plan = make_plan(VOLUMES, TASK, preset=rules.model_copy(update={"name": "mine"}))
        value = nnunet_plans(plan, VOLUMES, Naming.of(plan, "Dataset007_Two", "SimpleITKIO"))
        assert value["plans_name"] == "nnUNetPlans_mine"
        assert value["experiment_planner_used"] == planner
        assert value["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPlans_mine_3d_fullres"


def test_residual_presets_share_prepared_data_but_those_of_low_resolution():
    large = measured((300, 500, 520), spacing=(1.0, 0.8, 0.8))
    plan = make_plan(large, TASK, preset="resenc-m")
    configurations = nnunet_plans(plan, large, Naming.of(plan, "D", "SimpleITKIO"))["configurations"]
    identifiers = {name: c["data_identifier"] for name, c in configurations.items() if "data_identifier" in c}
    assert identifiers == {
        "2d": "nnUNetPlans_2d",
        "3d_lowres": "nnUNetResEncUNetMPlans_3d_lowres",
        "3d_fullres": "nnUNetPlans_3d_fullres",
    }
    assert configurations["3d_cascade_fullres"] == {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
