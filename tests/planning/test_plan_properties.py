"""A plan is made for every data set, and every plan can be built."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_phantoms import fingerprint, task

from medseg.networks.build import build_network
from medseg.planning.planner import make_plan
from medseg.planning.presets import NNUNET, PRESETS
from medseg.records.plan import Budget, Plan

preset = st.sampled_from(sorted(PRESETS))


size = st.one_of(st.integers(1, 9), st.integers(10, 700), st.sampled_from([1, 2, 3, 2048, 12_000]))
spacing = st.one_of(st.floats(0.3, 6), st.floats(1e-3, 1e4), st.sampled_from([1.0, 999.0]))
case = st.tuples(st.tuples(size, size, size), st.tuples(spacing, spacing, spacing))


@given(st.lists(case, min_size=1, max_size=5), st.floats(0.01, 200), st.integers(2, 200), preset)
@settings(max_examples=150, deadline=None)
def test_every_data_set_gets_a_plan_that_can_be_built(cases, memory_gb, classes, rules):
    measured, asked = fingerprint(cases), task(classes=classes)
    plan = make_plan(measured, asked, Budget(memory_gb=memory_gb), rules)
    assert "2d" in plan.configurations
    assert plan == make_plan(measured, asked, Budget(memory_gb=memory_gb), rules)
    assert Plan.model_validate(plan.to_json()) == plan
    for configuration in plan.configurations.values():
        network = configuration.network
        for axis, edge in enumerate(configuration.patch_size):
            divisor = math.prod(stride[axis] for stride in network.strides)
            assert edge % divisor == 0
            assert edge // divisor >= 1
            assert edge < configuration.median_shape[axis] + divisor
        assert configuration.batch_size >= 2
        assert configuration.network.name == PRESETS[rules].network
        assert configuration.training.mirror_axes == tuple(range(configuration.dimensions))
        assert network.kernels[-1] == (3,) * configuration.dimensions


@given(st.lists(case, min_size=1, max_size=3), st.floats(0.5, 20), preset)
@settings(max_examples=8, deadline=None)
def test_every_planned_network_takes_its_patch_and_gives_logits_of_that_size(cases, memory_gb, rules):
    plan = make_plan(fingerprint(cases), task(), Budget(memory_gb=memory_gb), rules)
    for configuration in plan.configurations.values():
        with torch.device("meta"):  # shapes without memory
            network = build_network(configuration.network, 1, 2).train()
            finest, *others = network(torch.empty(1, 1, *configuration.patch_size))
        assert tuple(finest.shape) == (1, 2, *configuration.patch_size)
        assert len(others) == max(0, len(configuration.network.features) - 2)


@given(st.lists(case, min_size=1, max_size=5), st.lists(st.floats(0.5, 100), min_size=2, max_size=4), preset)
@settings(max_examples=100, deadline=None)
def test_more_memory_never_means_a_smaller_patch(cases, memories, rules):
    plans = [make_plan(fingerprint(cases), task(), Budget(memory_gb=gb), rules) for gb in sorted(memories)]
    for name in ("2d", "3d_fullres"):
        voxels = [math.prod(p.configurations[name].patch_size) for p in plans if name in p.configurations]
        assert voxels == sorted(voxels)


@given(st.lists(case, min_size=1, max_size=5), preset)
@settings(max_examples=100, deadline=None)
def test_a_low_resolution_stage_saves_half_of_the_voxels_and_its_patch_covers_a_quarter(cases, rules):
    plan = make_plan(fingerprint(cases), task(), preset=rules)
    lowres, full = plan.configurations.get("3d_lowres"), plan.configurations.get("3d_fullres")
    assert full is None or full.training.batch_dice == (lowres is not None)
    if lowres is not None:
        assert all(low >= high for low, high in zip(lowres.spacing_mm, full.spacing_mm, strict=True))
        gain = math.prod(low / high for low, high in zip(lowres.spacing_mm, full.spacing_mm, strict=True))
        assert gain >= 2 - 1e-9
        voxels = math.prod(full.median_shape) / gain
        reached = math.prod(lowres.patch_size) / voxels >= 0.25 - 1e-9
        assert reached or max(lowres.spacing_mm) * 1.03 > 1e4
        assert not lowres.training.batch_dice


@given(st.lists(st.tuples(size, size), min_size=1, max_size=4), st.sampled_from([0, 1, 2]), st.floats(1e-3, 2e4))
@settings(max_examples=60, deadline=None)
def test_single_slices_get_only_2d_across_the_single_axis_whatever_their_thickness_if_a_preset_says_so(
    shapes, axis, thickness
):
    cases = []
    for shape in shapes:
        spacings = [0.7, 0.7]
        full = list(shape)
        full.insert(axis, 1)
        spacings.insert(axis, thickness)
        cases.append((tuple(full), tuple(spacings)))
    plan = make_plan(fingerprint(cases), task(), preset=NNUNET.model_copy(update={"single_slices_first": True}))
    assert list(plan.configurations) == ["2d"]
    if all(min(shape) > 1 for shape in shapes):
        assert plan.transpose[0] == axis
        assert plan.configurations["2d"].spacing_mm == (0.7, 0.7)
