"""Single rules of the planner, against numbers worked out by hand and against a network that is really built."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from planning_phantoms import fingerprint, task

from medseg.errors import IncompatibleError, InputError, IntegrityError, UsageError
from medseg.networks.build import build_network
from medseg.networks.residual import ResidualBlock
from medseg.planning.memory import (
    convs_per_stage,
    counted_classes,
    features_per_stage,
    plain_maps,
    residual_maps,
    unet_values,
)
from medseg.planning.normalisation import normalisations
from medseg.planning.patch import initial_patch
from medseg.planning.planner import make_plan
from medseg.planning.presets import NNUNET, PRESETS, RESENC_L, RESENC_M, Preset, preset_named
from medseg.planning.spacing import median_shape, target_spacing, transpose_order
from medseg.planning.topology import topology
from medseg.records.base import read_record
from medseg.records.network import NetworkPlan
from medseg.records.plan import Budget
from medseg.records.task import Region

PLANS = Path(__file__).resolve().parents[2] / "plans"


def test_the_target_is_the_median_spacing_of_each_axis():
    cases = [((40, 300, 320), (s, 0.7, 0.8)) for s in (1.0, 2.0, 1.5)]
    spacing, reason = target_spacing(fingerprint(cases), NNUNET)
    assert spacing == (1.5, 0.7, 0.8)
    assert reason.text == "spacing 1.5×0.7×0.8 mm: median of 3 cases"


def test_a_coarse_and_short_axis_takes_the_tenth_percentile():
    thick = np.linspace(2.0, 7.0, 11)
    cases = [((30, 300, 320), (s, 0.7, 0.8)) for s in thick]
    spacing, reason = target_spacing(fingerprint(cases), NNUNET)
    assert spacing == pytest.approx((2.5, 0.7, 0.8))
    assert "4.5×0.7×0.8 mm" in reason.text
    assert "percentile 10" in reason.text


def test_a_coarse_axis_never_becomes_finer_than_the_others():
    cases = [((30, 300, 320), (s, 0.7, 0.8)) for s in (0.1, 0.1, 5.0, 5.0, 5.0, 5.0)]
    spacing, _ = target_spacing(fingerprint(cases), NNUNET)
    assert spacing == pytest.approx((0.8 + 1e-5, 0.7, 0.8), abs=1e-12)


def test_a_coarse_axis_with_many_voxels_keeps_the_median():
    cases = [((110, 300, 320), (s, 0.7, 0.8)) for s in (2.0, 4.0, 6.0)]
    assert target_spacing(fingerprint(cases), NNUNET)[0] == (4.0, 0.7, 0.8)


def test_the_median_shape_is_that_of_the_resampled_cases_and_never_empty():
    cases = [((1, 100, 50), (0.3, 1.0, 2.0)), ((1, 101, 50), (0.3, 2.0, 1.0))]
    assert median_shape(fingerprint(cases), (1.0, 1.0, 2.0))[0] == (1.0, 151.0, 37.5)


@pytest.mark.parametrize(
    ("spacing", "shape", "order"),
    [
        ((3.0, 1.0, 1.0), (20, 200, 210), (0, 1, 2)),
        ((1.0, 1.0, 3.0), (200, 210, 20), (2, 0, 1)),
        ((1.0, 3.0, 1.0), (200, 20, 210), (1, 0, 2)),
        ((1.0, 1.0, 1.0), (200, 20, 210), (0, 1, 2)),
        ((0.5, 1.0, 1.2), (1, 200, 210), (2, 0, 1)),
    ],
)
def test_the_coarsest_axis_goes_first(spacing, shape, order):
    assert transpose_order(spacing, tuple(float(n) for n in shape), NNUNET)[0] == order


@pytest.mark.parametrize(
    ("spacing", "shape", "order"),
    [
        ((0.5, 1.0, 1.2), (1, 200, 210), (0, 1, 2)),
        ((1.0, 0.5, 1.2), (200, 1, 210), (1, 0, 2)),
        ((0.5, 1.0, 1.2), (2, 200, 210), (2, 0, 1)),
    ],
)
def test_a_preset_can_put_single_slices_before_the_coarsest_axis(spacing, shape, order):
    rules = NNUNET.model_copy(update={"single_slices_first": True})
    assert transpose_order(spacing, tuple(float(n) for n in shape), rules)[0] == order


def test_the_initial_patch_spans_equal_lengths_and_fits_the_median_case():
    assert initial_patch((1.0, 1.0, 1.0), (1000.0, 1000.0, 1000.0), NNUNET) == (256, 256, 256)
    assert initial_patch((4.0, 1.0, 1.0), (1000.0, 1000.0, 1000.0), NNUNET) == (102, 406, 406)
    assert initial_patch((1.0, 1.0), (1000.0, 37.5), NNUNET) == (1000, 37.5)


def test_axes_are_halved_once_their_spacings_are_within_a_factor_two():
    found = topology((3.0, 0.8, 0.8), (40, 224, 224), 4)
    assert found.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    assert found.kernels == ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert found.divisors == (8, 32, 32)
    assert found.patch == (40, 224, 224)


def test_patches_are_padded_up_to_what_is_halved():
    assert topology((1.0, 1.0), (50.0, 34.5), 4).patch == (56, 40)


def test_an_axis_left_alone_is_halved_while_it_is_three_edges_long():
    assert topology((1.0, 1.0), (7, 12), 4).strides == ((1, 1), (1, 2))
    assert topology((1.0, 1.0), (7, 11), 4).strides == ((1, 1),)


@pytest.mark.parametrize(
    ("spacing", "patch", "classes"),
    [((1.0, 1.0), (56, 40), 3), ((3.0, 0.8, 0.8), (16, 64, 48), 5), ((1.0, 1.2, 1.1), (40, 56, 24), 2)],
)
@pytest.mark.parametrize("name", ["plain", "residual"])
def test_the_closed_form_counts_the_feature_maps_of_a_real_network(name, spacing, patch, classes):
    found = topology(spacing, patch, 4)
    stages = len(found.strides)
    features = features_per_stage(stages, 8, 20)
    convs, of = ((2,), plain_maps) if name == "plain" else ((1, 3, 4, 6), residual_maps)
    plan = NetworkPlan(
        name=name,
        features=features,
        kernels=found.kernels,
        strides=found.strides,
        convs_encoder=convs_per_stage(convs, stages),
        convs_decoder=(2,) * (stages - 1),
    )
    network = build_network(plan, 1, classes).to("meta").eval()
    counted = []
    for layer in network.modules():
        if isinstance(layer, torch.nn.modules.conv._ConvNd):
            layer.register_forward_hook(lambda _, __, output: counted.append(output.numel()))
        if isinstance(layer, ResidualBlock) and not len(layer.project) and max(layer.stride) > 1:  # averages only
            layer.register_forward_hook(lambda _, __, output: counted.append(output.numel()))
    network(torch.zeros(1, 1, *found.patch, device="meta"))
    maps = of(found.strides, features, plan.convs_encoder)
    assert unet_values(found.patch, found.strides, features, maps, 2, classes) == sum(counted)


@pytest.mark.parametrize(
    ("patch", "features", "blocks", "recorded"),
    [
        ((128, 128, 128), (32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6), 557_420_544),
        ((512, 512), (32, 64, 128, 256, 512, 512, 512, 512), (1, 3, 4, 6, 6, 6, 6, 6), 129_703_936),
    ],
)
def test_residual_networks_hold_the_values_that_nnunet_counts(patch, features, blocks, recorded):
    dimensions, stages = len(patch), len(features)
    strides = ((1,) * dimensions, *((2,) * dimensions,) * (stages - 1))
    maps = residual_maps(strides, features, blocks)
    assert unet_values(patch, strides, features, maps, 1, 3) == recorded


def test_the_batch_is_bounded_by_memory_by_the_data_set_and_from_below():
    cases = [((64, 64, 64), (1.0, 1.0, 1.0))]
    many, few, least = (make_plan(fingerprint(cases * n), task(), Budget(memory_gb=24)) for n in (10_000, 100, 1))
    assert many.configurations["3d_fullres"].patch_size == (64, 64, 64)
    by_memory = many.configurations["3d_fullres"].batch_size
    assert by_memory > 5
    assert few.configurations["3d_fullres"].batch_size == 5  # 5 % of 100 cases
    assert least.configurations["3d_fullres"].batch_size == 2
    smaller = make_plan(fingerprint(cases * 10_000), task(), Budget(memory_gb=12)).configurations["3d_fullres"]
    assert smaller.batch_size == pytest.approx(by_memory / 2, abs=1)


def test_a_larger_budget_never_gives_a_smaller_patch_or_batch():
    cases = [((120, 300, 320), (1.5, 0.8, 0.8))] * 50
    plans = [make_plan(fingerprint(cases), task(), Budget(memory_gb=gb)) for gb in (2, 4, 8, 16, 40)]
    sizes = [np.prod(plan.configurations["3d_fullres"].patch_size) for plan in plans]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_channel_names_choose_the_normalisation_whatever_their_case():
    asked = task(("CT", "ct", "noNorm", "rescale_to_0_1", "rgb_to_0_1", "zscore", "T2w"))
    chosen, reason = normalisations(asked, 0.5, NNUNET)
    schemes = ["ct", "ct", "none", "rescale_0_1", "rgb_0_1", "zscore", "zscore"]
    assert [n.scheme for n in chosen] == schemes
    assert [n.use_mask for n in chosen] == [False] * 5 + [True] * 2
    assert "T2w: zscore" in reason.text
    assert not any(n.use_mask for n in normalisations(asked, 0.75, NNUNET)[0])


def test_classes_are_counted_as_nnunet_lists_them():
    regions = {"regions": (Region(name="whole", values=(1, 2)), Region(name="core", values=(2,)))}
    assert counted_classes(task(classes=3)) == 3
    assert counted_classes(task(classes=3, ignore_value=3)) == 4
    assert counted_classes(task(classes=3, regions_order=(1, 2), **regions)) == 3


def test_every_decision_has_a_reason_with_its_numbers():
    plan = make_plan(fingerprint([((120, 300, 320), (1.5, 0.8, 0.8))] * 20), task())
    topics = [reason.topic for reason in plan.reasons]
    assert topics[:4] == ["spacing", "median shape", "transpose", "normalisation"]
    for name in plan.configurations:
        assert {f"{name} patch", f"{name} stages", f"{name} batch"} <= set(topics)
    assert "3d_lowres" in topics
    assert all(any(c.isdigit() for c in reason.text) for reason in plan.reasons if reason.topic != "mirroring")
    assert all("\n" not in reason.text for reason in plan.reasons)


def test_a_budget_too_small_for_anything_gives_the_smallest_patch_and_says_so():
    plan = make_plan(fingerprint([((30, 60, 50), (1.5, 0.8, 0.8))]), task(), Budget(memory_gb=1e-6))
    assert plan.configurations["3d_fullres"].patch_size == (1, 1, 1)
    assert plan.configurations["3d_fullres"].batch_size == 2
    assert any("no smaller patch exists" in reason.text for reason in plan.reasons)


def test_the_plan_is_tied_to_the_fingerprint():
    one = make_plan(fingerprint([((30, 60, 50), (1.5, 0.8, 0.8))]), task())
    other = make_plan(fingerprint([((30, 60, 51), (1.5, 0.8, 0.8))]), task())
    assert len(one.fingerprint_sha256) == 64
    assert one.fingerprint_sha256 != other.fingerprint_sha256


def test_the_presets_in_the_repository_are_those_in_the_code():
    paths = sorted((PLANS / "presets").glob("*.json"))
    assert {path.stem: read_record(path, Preset) for path in paths} == PRESETS
    assert list(PRESETS) == ["medseg", "nnunet", "resenc-m", "resenc-l", "resenc-xl"]


def test_residual_networks_get_one_block_then_three_four_and_six():
    plan = make_plan(fingerprint([((120, 300, 320), (1.5, 0.8, 0.8))] * 20), task(), preset="resenc-m")
    network = plan.configurations["2d"].network
    assert network.name == "residual"
    assert network.convs_encoder == (1, 3, 4, 6, 6, 6, 6)
    assert set(network.convs_decoder) == {1}


def test_the_memory_is_by_default_what_the_preset_was_made_for():
    measured = fingerprint([((120, 300, 320), (1.5, 0.8, 0.8))] * 20)
    large = make_plan(measured, task(), preset="resenc-l")
    assert large.budget == Budget(memory_gb=24.0)
    assert large == make_plan(measured, task(), Budget(memory_gb=24.0), RESENC_L)
    assert make_plan(measured, task()).budget == Budget(memory_gb=8.0)


def test_residual_presets_take_as_many_samples_as_fit_whatever_the_size_of_the_data_set():
    few = fingerprint([((20, 40, 36), (1.0, 1.0, 1.0))] * 3)
    capped, free = (make_plan(few, task(), preset=rules).configurations["3d_fullres"] for rules in (NNUNET, RESENC_M))
    assert capped.patch_size == free.patch_size
    assert capped.batch_size == 2
    assert free.batch_size == 3


def test_training_cases_that_the_fingerprint_leaves_out_count_for_the_batch():
    few = fingerprint([((20, 40, 36), (1.0, 1.0, 1.0))] * 3)
    assert make_plan(few, task(), training_cases=200).configurations["3d_fullres"].batch_size > 2


def test_a_low_resolution_stage_is_planned_where_patches_cover_little():
    plan = make_plan(fingerprint([((300, 500, 520), (1.0, 0.8, 0.8))] * 20), task())
    assert list(plan.configurations) == ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    lowres, full = plan.configurations["3d_lowres"], plan.configurations["3d_fullres"]
    assert np.prod(full.patch_size) / np.prod(full.median_shape) < 0.25
    assert np.prod(lowres.patch_size) / np.prod(lowres.median_shape) >= 0.25
    assert (lowres.training.batch_dice, full.training.batch_dice) == (False, True)
    assert {"3d_lowres patch", "3d_lowres stages", "3d_lowres batch"} <= {reason.topic for reason in plan.reasons}
    near = make_plan(fingerprint([((100, 300, 300), (1.0, 0.8, 0.8))] * 20), task())
    assert list(near.configurations) == ["2d", "3d_fullres"]
    assert not near.configurations["3d_fullres"].training.batch_dice


def test_a_preset_of_ones_own_can_be_given():
    measured = fingerprint([((120, 300, 320), (1.5, 0.8, 0.8))] * 20)
    wide = NNUNET.model_copy(update={"name": "wide", "base_features": 64})
    plan = make_plan(measured, task(), preset=wide)
    assert plan.preset == "wide"
    assert plan.configurations["2d"].network.features[0] == 64


def test_a_preset_is_also_the_path_of_its_file(tmp_path):
    path = tmp_path / "wide.json"
    path.write_text(json.dumps(NNUNET.model_copy(update={"name": "wide"}).to_json()))
    assert preset_named(str(path)).name == "wide"
    path.write_text(json.dumps({"name": "wide", "base_features": 0}))
    with pytest.raises(IntegrityError, match=r"E0711.*wide.json: base_features"):
        preset_named(str(path))
    with pytest.raises(UsageError, match=r"E0001.*absent.json"):
        preset_named(str(tmp_path / "absent.json"))


def test_unknown_presets_foreign_fingerprints_and_impossible_spacings_are_refused():
    measured = fingerprint([((30, 60, 50), (1.5, 0.8, 0.8))])
    with pytest.raises(UsageError, match=r"E0001.*'large' vs medseg, nnunet"):
        make_plan(measured, task(), preset="large")
    with pytest.raises(IncompatibleError, match="E0802"):
        make_plan(measured, task(("T1", "T2")))
    with pytest.raises(InputError, match=r"E0124.*c001"):
        make_plan(fingerprint([((30, 60, 50), (1.5, 0.8, 0.8)), ((30, 60, 50), (0.0, 1, 1))]), task())
    with pytest.raises(InputError, match=r"E0125.*20000×0.8×0.8 mm"):
        make_plan(fingerprint([((30, 60, 50), (20_000.5, 0.8, 0.8))]), task())


def test_the_reference_records_say_where_they_come_from():
    text = (PLANS / "reference" / "README.md").read_text()
    for path in (PLANS / "reference").glob("*.json"):
        assert path.stem in text
        assert set(json.loads(path.read_text())) == {"dataset", "fingerprint", "plans"}
