"""A plan is made for every data set, and every plan can be built."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from planning_phantoms import fingerprint, task

from medseg.planning.planner import make_plan
from medseg.records.plan import Budget, Plan

size = st.one_of(st.integers(1, 9), st.integers(10, 700), st.sampled_from([1, 2, 3, 2048, 12_000]))
spacing = st.one_of(st.floats(0.3, 6), st.floats(1e-3, 1e4), st.sampled_from([1.0, 999.0]))
case = st.tuples(st.tuples(size, size, size), st.tuples(spacing, spacing, spacing))


@given(st.lists(case, min_size=1, max_size=5), st.floats(0.01, 200), st.integers(2, 200))
@settings(max_examples=150, deadline=None)
def test_every_data_set_gets_a_plan_that_can_be_built(cases, memory_gb, classes):
    measured, asked = fingerprint(cases), task(classes=classes)
    plan = make_plan(measured, asked, Budget(memory_gb=memory_gb))
    assert "2d" in plan.configurations
    assert plan == make_plan(measured, asked, Budget(memory_gb=memory_gb))
    assert Plan.model_validate(plan.to_json()) == plan
    for configuration in plan.configurations.values():
        network = configuration.network
        for axis, edge in enumerate(configuration.patch_size):
            divisor = math.prod(stride[axis] for stride in network.strides)
            assert edge % divisor == 0
            assert edge // divisor >= 1
            assert edge < configuration.median_shape[axis] + divisor
        assert configuration.batch_size >= 2
        assert configuration.training.mirror_axes == tuple(range(configuration.dimensions))
        assert network.kernels[-1] == (3,) * configuration.dimensions


@given(st.lists(st.tuples(size, size), min_size=1, max_size=4), st.sampled_from([0, 1, 2]), st.floats(1e-3, 2e4))
@settings(max_examples=60, deadline=None)
def test_single_slices_get_only_2d_across_the_single_axis_whatever_their_thickness(shapes, axis, thickness):
    cases = []
    for shape in shapes:
        spacings = [0.7, 0.7]
        full = list(shape)
        full.insert(axis, 1)
        spacings.insert(axis, thickness)
        cases.append((tuple(full), tuple(spacings)))
    plan = make_plan(fingerprint(cases), task())
    assert list(plan.configurations) == ["2d"]
    if all(min(shape) > 1 for shape in shapes):
        assert plan.transpose[0] == axis
        assert plan.configurations["2d"].spacing_mm == (0.7, 0.7)
