"""What holds for the plan of any data set and every preset, also for single slices, huge volumes and many labels."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_phantoms import fingerprint, task

from medseg.networks.build import build_network
from medseg.planning.cost import step_memory_bytes
from medseg.planning.layers import layers_of
from medseg.planning.memory import counted_classes, plain_maps, residual_maps, unet_values
from medseg.planning.planner import make_plan
from medseg.planning.presets import PRESETS
from medseg.planning.sizing import USABLE
from medseg.records.plan import Budget, ConfigurationPlan, Plan
from medseg.records.task import Region, Task
from medseg.training.loss import region_table, supervised_loss

NAMES = ("MRI", "CT", "noNorm", "rescale_to_0_1", "rgb_to_0_1")
MAPS = {"plain": plain_maps, "residual": residual_maps}
ODD = {
    "a voxel": ((1, 1, 1), (1.0, 1.0, 1.0)),
    "a line": ((1, 1, 300), (1.0, 1.0, 1.0)),
    "one slice": ((1, 512, 384), (5.0, 0.4, 0.5)),
    "one slice across x": ((320, 280, 1), (0.6, 0.6, 8.0)),
    "one slice thinner than its pixels": ((1, 200, 180), (0.1, 0.7, 0.7)),
    "two slices": ((2, 256, 200), (10.0, 0.8, 0.8)),
    "tiny": ((5, 7, 6), (1.0, 1.2, 0.9)),
    "huge": ((2000, 2000, 2000), (0.2, 0.2, 0.2)),
    "huge slice": ((1, 60_000, 40_000), (1.0, 0.25e-2, 0.25e-2)),
    "a needle": ((4000, 3, 4), (0.05, 2.0, 2.0)),
    "thick": ((7, 640, 640), (100.0, 0.1, 0.1)),
    "micrometres": ((300, 400, 200), (1e-3, 1e-3, 1e-3)),
    "finest and coarsest": ((30, 400, 400), (9_000.0, 2e-3, 2e-3)),
    "microscopy": ((40, 9000, 11000), (0.3, 0.05, 0.05)),
}
QUICK = ("a voxel", "huge")  # the others are slow tests
PRESET = st.sampled_from(sorted(PRESETS))
SIZE = st.one_of(st.integers(1, 9), st.integers(10, 700), st.integers(701, 2000))
SPACING = st.one_of(st.floats(0.3, 6), st.floats(1e-3, 1e4))
CASE = st.one_of(
    st.tuples(st.tuples(SIZE, SIZE, SIZE), st.tuples(SPACING, SPACING, SPACING)), st.sampled_from(list(ODD.values()))
)
CASES = st.lists(CASE, min_size=1, max_size=4)


@st.composite
def tasks(draw) -> Task:
    """1 to 5 channels, 2 to 100 labels, sometimes overlapping regions or a value that is ignored."""
    channels = tuple(draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5)))
    classes = draw(st.one_of(st.integers(2, 5), st.integers(6, 100)))
    more = {}
    if draw(st.booleans()) and classes > 2:
        regions = (Region(name="all", values=tuple(range(1, classes))), Region(name="last", values=(classes - 1,)))
        more = {"regions": regions, "regions_order": (1, classes - 1)}
    return task(channels, classes, ignore_value=draw(st.sampled_from([None, classes])), **more)


def values(configuration: ConfigurationPlan, asked: Task) -> int:
    """Values in the feature maps of one sample, from the plan alone."""
    network = configuration.network
    maps = MAPS[network.name](network.strides, network.features, network.convs_encoder)
    convs = network.convs_decoder[0] if network.convs_decoder else 0
    return unet_values(configuration.patch_size, network.strides, network.features, maps, convs, counted_classes(asked))


@given(CASES, tasks(), st.floats(0.01, 500), PRESET)
@settings(max_examples=30, deadline=None)
def test_any_plan_is_pure_reads_back_and_has_patches_that_its_strides_divide(cases, asked, memory_gb, preset):
    measured, budget = fingerprint(cases, len(asked.channels)), Budget(memory_gb=memory_gb)
    before = measured.to_json(), asked.to_json(), budget.to_json()
    plan = make_plan(measured, asked, budget, preset)
    assert plan == make_plan(measured, asked, budget, preset)
    assert (measured.to_json(), asked.to_json(), budget.to_json()) == before
    assert Plan.model_validate(plan.to_json()) == plan
    for configuration in plan.configurations.values():
        assert configuration.batch_size >= 2
        assert len(configuration.normalisation) == len(asked.channels)
        for axis, edge in enumerate(configuration.patch_size):
            assert edge % math.prod(stride[axis] for stride in configuration.network.strides) == 0
        assert all(len(reason.text) < 500 for reason in plan.reasons)


@given(CASES, tasks(), st.lists(st.floats(0.05, 200), min_size=2, max_size=4, unique=True), PRESET)
@settings(max_examples=20, deadline=None)
def test_more_memory_never_means_a_sample_that_takes_less_or_at_its_size_a_smaller_batch(
    cases, asked, memories, preset
):
    measured = fingerprint(cases, len(asked.channels))
    plans = [make_plan(measured, asked, Budget(memory_gb=gb), preset) for gb in sorted(memories)]
    for name in {name for plan in plans for name in plan.configurations} - {"3d_lowres"}:  # its spacing moves too
        found = [plan.configurations[name] for plan in plans if name in plan.configurations]
        sizes = [values(configuration, asked) for configuration in found]
        assert sizes == sorted(sizes)
        for less, more in pairwise(found):
            assert less.patch_size != more.patch_size or less.batch_size <= more.batch_size


@given(CASES, tasks(), st.floats(0.5, 200), PRESET)
@settings(max_examples=20, deadline=None)
def test_a_plan_stays_within_its_memory_by_half_a_sample_unless_two_of_the_smallest_patch_exceed_it(
    cases, asked, memory_gb, preset
):
    rules = PRESETS[preset]
    budget = Budget(memory_gb=memory_gb)
    plan = make_plan(fingerprint(cases, len(asked.channels)), asked, budget, preset)
    for configuration in plan.configurations.values():
        if rules.sizing == "cost":
            layers = layers_of(configuration.network, configuration.patch_size, len(asked.channels), asked.outputs)
            taken = step_memory_bytes(layers, configuration.batch_size, budget, configuration.dimensions)
            least = configuration.batch_size == rules.min_batch and min(configuration.patch_size) <= 2 * rules.min_edge
            assert taken <= USABLE * memory_gb * 1e9 or least
            continue
        scale = rules.scale(configuration.dimensions)
        allowed = scale.reference_values * memory_gb / rules.reference_memory_gb
        # nnU-Net rounds the batch to the nearest number, so that half a sample may be too much
        taken = values(configuration, asked) * (configuration.batch_size - 0.5) / scale.reference_batch
        shortest = min(configuration.patch_size)
        assert taken <= allowed or configuration.batch_size == rules.min_batch or shortest <= 2 * rules.min_edge


@given(CASES, tasks(), st.floats(0.05, 40), PRESET)
@settings(max_examples=4, deadline=None)
def test_any_planned_network_can_be_built_and_gives_logits_of_its_patch(cases, asked, memory_gb, preset):
    check_networks(make_plan(fingerprint(cases, len(asked.channels)), asked, Budget(memory_gb=memory_gb), preset))


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("odd", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ODD])
def test_networks_of_odd_data_can_be_built(odd, preset):
    check_networks(make_plan(fingerprint([ODD[odd]] * 3, 2), task(("CT", "MRI"), 4), preset=preset))


def check_networks(plan: Plan) -> None:
    """Every network is built, without memory, and takes its patch."""
    for configuration in plan.configurations.values():
        channels, outputs = configuration.input_channels(plan.task), plan.task.outputs
        with torch.device("meta"):
            network = build_network(configuration.network, channels, outputs).train()
            finest, *others = network(torch.empty(2, channels, *configuration.patch_size))
        assert tuple(finest.shape) == (2, outputs, *configuration.patch_size)
        assert all(logits.shape[:2] == finest.shape[:2] for logits in others)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize(
    "odd",
    ["a voxel", "tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one slice", "a needle", "huge"))],
)
def test_plans_for_odd_data_and_little_memory_train_a_step(odd, preset):
    """With the least memory that a plan may have, so that a step takes a moment."""
    asked = task(("MRI", "CT"), 3)
    plan = make_plan(fingerprint([ODD[odd]] * 5, 2), asked, Budget(memory_gb=0.01), preset)
    small = [c for c in plan.configurations.values() if math.prod(c.patch_size) * c.batch_size < 2e4]
    assert small
    for configuration in small:
        train_a_step(configuration, asked)


def train_a_step(configuration: ConfigurationPlan, asked: Task) -> None:
    """One step of the plan's own loss on noise; every weight that the loss depends on gets a finite gradient."""
    generator = torch.Generator().manual_seed(3)
    channels = configuration.input_channels(asked)
    network = build_network(configuration.network, channels, asked.outputs).train()
    shape = (2, *configuration.patch_size)
    images = torch.randn(2, channels, *configuration.patch_size, generator=generator)
    labels = torch.randint(0, len(asked.labels), shape, generator=generator)
    batch_dice = configuration.training.batch_dice
    loss = supervised_loss(network(images), labels, batch_dice=batch_dice, regions=region_table(asked))
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    assert gradients
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
