"""Engines: halved weights change nothing, and what a GPU replays is what it was shown, without a GPU by a stand-in."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import FLAT_KERNELS
from tiny_networks import FLAT_OR_SOLID, FOUND, planned
from torch import Tensor

from medseg.errors import UsageError
from medseg.inference import backend as backends
from medseg.inference import engines
from medseg.inference.backend import choose_backend
from medseg.inference.engines import SIZES_KEPT, GraphNetwork, Recorded, in_half
from medseg.inference.passes import PLAIN, Passes, split_heads
from medseg.networks.build import build_network
from medseg.networks.device import Device, place
from medseg.planning.networks import input_patch

HALF = Device(torch.device("cpu"), torch.bfloat16, "test")
CPU = Device(torch.device("cpu"), torch.float32, "test")
GPU = Device(torch.device("cuda"), torch.bfloat16, "made up")
TILE = (4, 8, 6)


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "dimensions"), FLAT_OR_SOLID)
def test_halved_weights_give_the_same_logits_to_the_bit(name, dimensions):
    plan = planned(name, dimensions)
    network = place(build_network(plan, 2, 3).eval(), HALF, dimensions)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    x = noise(2, 2, *input_patch(plan, FOUND[dimensions].patch))
    passes = [Passes([one], HALF, PLAIN, 2, x.numel()) for one in (network, in_half(network, torch.bfloat16))]
    with torch.inference_mode():
        expected, found = (one(x) for one in passes)
    assert torch.equal(found, expected)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert any(p.dtype == torch.bfloat16 for p in passes[1].networks[0].parameters())


def test_torch_in_half_precision_computes_with_copies_and_in_float32_with_the_network_itself():
    networks = [build_network(FLAT_KERNELS, 1, 9, seed).eval() for seed in (0, 1)]
    halved, exact = (choose_backend("torch", networks, (1, *TILE), device, 1) for device in (HALF, CPU))
    assert exact.weight_bytes == 0
    assert all(exact.engine(one) is one for one in networks)
    assert all(halved.engine(one) is not one for one in networks)
    assert 0 < halved.weight_bytes < sum(p.nbytes for one in networks for p in one.parameters())
    split = split_heads(networks, PLAIN)
    assert split is not None
    assert all(halved.engine(body) is body for body in split[0])  # not what it was chosen for


class Replays:
    """A stand-in for ``record``: the replay computes what is in ``given`` then, into the tensor shown first."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []
        self.pools: list[object] = []

    def __call__(self, network, x: Tensor, device: Device, pool: object) -> Recorded:
        self.sizes.append(tuple(x.shape))
        self.pools.append(pool)
        given = torch.zeros_like(x)
        found = network(given).float()
        return Recorded(given, found, lambda: found.copy_(network(given)), "pool" if pool is None else pool)


@pytest.fixture
def replays(monkeypatch) -> Replays:
    stand_in = Replays()
    monkeypatch.setattr(engines, "record", stand_in)
    return stand_in


def test_each_size_is_recorded_once_and_replayed_with_every_input(replays):
    network = place(build_network(FLAT_KERNELS, 1, 3).eval(), CPU, 3)
    graphs = GraphNetwork(network, GPU)
    with torch.inference_mode():
        for batch in (2, 1, 2, 2, 1):
            x = noise(batch, 1, *TILE, seed=batch)
            (found,) = graphs(x)
            assert torch.equal(found, network(x)[0])
            kept = found.clone()
            graphs(x + 1)
            assert torch.equal(found, kept)  # the caller's own
    assert replays.sizes == [(2, 1, *TILE), (1, 1, *TILE)]
    assert replays.pools == [None, "pool"]


def test_more_sizes_than_are_kept_go_through_the_network(replays):
    network = build_network(FLAT_KERNELS, 1, 3).eval()
    graphs = GraphNetwork(network, GPU)
    with torch.inference_mode():
        for batch in range(1, SIZES_KEPT + 3):
            x = noise(batch, 1, *TILE)
            assert torch.equal(graphs(x)[0], network(x)[0])
    assert len(replays.sizes) == SIZES_KEPT


def test_a_recording_that_fails_is_told_once_and_not_tried_again(monkeypatch, caplog):
    def fails(*_: object) -> Recorded:
        raise torch.OutOfMemoryError("out of memory\nlong story")

    monkeypatch.setattr(engines, "record", fails)
    network = build_network(FLAT_KERNELS, 1, 3).eval()
    graphs, x = GraphNetwork(network, GPU), noise(1, 1, *TILE)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(graphs(x)[0], network(x)[0])
    assert [one.getMessage() for one in caplog.records if one.name.startswith("medseg")] == [
        "CUDA graphs are not used: OutOfMemoryError: out of memory"
    ]


@pytest.mark.parametrize(("seconds", "name"), [(1.0, "torch"), (0.3, "graphs")])
def test_on_a_gpu_graphs_are_taken_where_they_are_faster(replays, monkeypatch, seconds, name):
    networks = [build_network(FLAT_KERNELS, 1, 3, seed).eval() for seed in (0, 1)]
    found, took = noise(1, 3, *TILE), {True: seconds, False: 0.5}
    monkeypatch.setattr(backends._Race, "_timed", lambda race, one: (found, took[isinstance(one, GraphNetwork)]))
    chosen = choose_backend("auto", networks, (1, *TILE), GPU, 10**6)
    assert chosen.name == name
    kind = GraphNetwork if name == "graphs" else type(networks[0])
    assert all(isinstance(chosen.engine(one), kind) and chosen.engine(one) is not one for one in networks)


def test_what_fails_on_the_gpu_leaves_torch(monkeypatch, caplog):
    def fails(race: object, one: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(backends._Race, "_timed", fails)
    network = build_network(FLAT_KERNELS, 1, 3).eval()
    chosen = choose_backend("auto", [network], (1, *TILE), GPU, 10**6)
    assert (chosen.name, chosen.reason) == ("torch", "CUDA graphs failed")
    assert caplog.records[-1].levelno == logging.WARNING


def test_a_backend_of_another_device_is_refused():
    network = build_network(FLAT_KERNELS, 1, 3).eval()
    with pytest.raises(UsageError, match="for a GPU"):
        choose_backend("graphs", [network], (1, *TILE), CPU, 10**6)
    with pytest.raises(UsageError, match="for the CPU"):
        choose_backend("openvino", [network], (1, *TILE), GPU, 10**6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_network_gives_its_own_logits_on_a_gpu():
    device = Device(torch.device("cuda"), torch.bfloat16, "test")
    network = place(build_network(FLAT_KERNELS, 1, 3).eval(), device, 3)
    graphs = GraphNetwork(in_half(network, torch.bfloat16), device)
    plain, replayed = (Passes([one], device, PLAIN, 1, 10**6) for one in (network, graphs))
    with torch.inference_mode():
        for seed in range(3):
            x = noise(2, 1, *TILE, seed=seed)
            torch.testing.assert_close(replayed(x), plain(x), rtol=1e-2, atol=1e-2)
    assert not graphs._failed
