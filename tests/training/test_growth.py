"""Growing patches: sizes that the network takes, phases in order, and how many more steps they make."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FLAT_KERNELS, TWO_D, make_configuration

from medseg.networks.build import build_network
from medseg.records.network import NetworkPlan
from medseg.records.plan import ConfigurationPlan
from medseg.training.growth import grown, smaller, steps_per_planned

HIPPOCAMPUS = NetworkPlan(
    features=(4, 6, 8, 8),
    kernels=((3, 3, 3),) * 4,
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    convs_encoder=(1, 1, 1, 1),
    convs_decoder=(1, 1, 1),
)


def phases(configuration: ConfigurationPlan) -> list[tuple[float, tuple[int, ...], int]]:
    return [(p.until, p.patch_size, p.batch_size) for p in grown(configuration).training.growth]


def test_a_patch_grows_in_two_steps_to_what_was_planned():
    configuration = make_configuration((40, 56, 40), HIPPOCAMPUS, batch_size=2)
    assert phases(configuration) == [(0.40, (24, 32, 24), 4), (0.65, (32, 48, 32), 2)]
    assert grown(configuration).patch_size == (40, 56, 40)
    flat = make_configuration((256, 216), TWO_D.model_copy(update={"strides": ((1, 1), (2, 2))}), batch_size=3)
    assert phases(flat) == [(0.40, (154, 130), 6), (0.65, (204, 172), 3)]


def test_a_patch_that_is_as_small_as_it_can_be_stays():
    assert phases(make_configuration((2, 4, 2), FLAT_KERNELS)) == []
    one = make_configuration((16, 8, 8), HIPPOCAMPUS)  # one voxel along two axes of the coarsest level
    assert grown(one).training.growth == ()


@pytest.mark.parametrize("name", ["swinunetr", "segresnet", "mednext"])
def test_networks_with_strides_of_their_own_keep_their_patch(name):
    network = HIPPOCAMPUS.model_copy(update={"name": name})
    configuration = make_configuration((40, 56, 40), HIPPOCAMPUS).model_copy(update={"network": network})
    assert grown(configuration) == configuration


@given(st.lists(st.integers(1, 12), min_size=3, max_size=3), st.integers(1, 9), st.floats(0.1, 0.95))
def test_every_smaller_patch_is_one_the_plan_could_have(steps, batch_size, share):
    patch = tuple(8 * n for n in steps)
    configuration = grown(make_configuration(patch, HIPPOCAMPUS, batch_size=batch_size))
    assert ConfigurationPlan.model_validate(configuration.to_json()) == configuration
    sizes = [*(p.patch_size for p in configuration.training.growth), patch]
    assert all(a <= b for one, other in pairwise(sizes) for a, b in zip(one, other, strict=True))
    coarsest = [n // 8 for n in smaller(configuration, share)]
    assert all(n >= min(2, p) for n, p in zip(coarsest, steps, strict=True))


def test_the_network_takes_every_phase():
    configuration = grown(make_configuration((40, 56, 40), HIPPOCAMPUS))
    network = build_network(HIPPOCAMPUS, 1, 3)
    for phase in configuration.training.growth:
        output = network(torch.zeros(1, 1, *phase.patch_size))
        assert output[0].shape[2:] == phase.patch_size


def test_the_steps_are_those_that_the_shares_of_time_pay_for():
    configuration = grown(make_configuration((40, 56, 40), HIPPOCAMPUS, batch_size=2))
    planned = 2 * math.prod((40, 56, 40))
    small, middle = 4 * math.prod((24, 32, 24)), 2 * math.prod((32, 48, 32))
    seconds, made = 1000.0, 0.0
    for share, cost in ((0.40, small), (0.25, middle), (0.35, planned)):
        made += share * seconds / (cost / planned)
    assert steps_per_planned(configuration) * seconds == pytest.approx(made)
    assert steps_per_planned(make_configuration((40, 56, 40), HIPPOCAMPUS)) == 1
