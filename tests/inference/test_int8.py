"""Int8: ranges are those of the data, convolutions compute with bytes and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FLAT_KERNELS, TWO_D
from torch import nn

from medseg.errors import UsageError
from medseg.inference import backend as backends
from medseg.inference import with_openvino
from medseg.inference.backend import choose_backend
from medseg.inference.int8 import HEADROOM, STEPS, quantise, steps_of, watched
from medseg.inference.passes import split_heads
from medseg.inference.with_openvino import OpenVinoNetwork, exact_in_int8, installed
from medseg.networks.build import build_network
from medseg.networks.device import Device
from medseg.records.int8 import Int8Ranges, LayerRange

CPU = Device(torch.device("cpu"), torch.float32, "test")
HALF = Device(torch.device("cpu"), torch.bfloat16, "test")
WIDE = FLAT_KERNELS.model_copy(update={"features": (8, 16, 24)})
TILE = (8, 16, 16)
needs_int8 = pytest.mark.skipif(not (installed() and exact_in_int8()), reason="needs OpenVINO and VNNI")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ranges_of(network: nn.Module, *inputs: torch.Tensor) -> dict[str, LayerRange]:
    with torch.inference_mode(), watched(network) as ranges:
        for x in inputs:
            network(x)
    return ranges


def record(layers: dict[str, LayerRange]) -> Int8Ranges:
    return Int8Ranges(weights_sha256="0", medseg_version="0", cases=("a", "b"), layers=layers)


@given(
    st.lists(st.tuples(st.floats(0, 30), st.floats(0, 30)), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_steps_reach_over_the_measured_range_and_nothing_is_off_by_more_than_half_of_one(sides, seed):
    low, high = np.array([[-a, b] for a, b in sides]).T
    zero, steps = steps_of(low, high)
    assert 1 <= zero < STEPS
    assert (steps > 0).all()
    x = np.random.default_rng(seed).uniform(low * HEADROOM, high * HEADROOM, (20, len(low)))
    bytes_ = np.clip(np.rint(x / steps) + zero, 0, STEPS)
    assert np.all(np.abs((bytes_ - zero) * steps - x) <= steps * 0.51 + 1e-6)


def test_what_is_as_large_on_both_sides_has_its_zero_in_the_middle_and_what_is_positive_at_the_lowest_step():
    assert steps_of(np.array([-1.0, -5.0]), np.array([1.0, 5.0]))[0] in (127, 128)
    zero, steps = steps_of(np.array([0.0, 0.0]), np.array([1.0, 100.0]))
    assert zero == 1
    np.testing.assert_allclose(steps, HEADROOM * np.array([1.0, 100.0]) / 254, rtol=1e-6)


def test_ranges_are_those_of_all_inputs_of_convolutions_that_gain_from_bytes():
    network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 9, 3), nn.Conv2d(9, 9, 3, groups=9), nn.Conv2d(9, 3, 1))
    inputs = [noise(2, 2, 9, 8, seed=1), 3 * noise(1, 2, 7, 7, seed=2)]
    with torch.inference_mode():
        seen = [network[0](x).transpose(0, 1).flatten(1) for x in inputs]
    ranges = ranges_of(network, *inputs)
    assert list(ranges) == ["1"]  # not the image's, nor of single channels, nor of one pixel
    expected = torch.cat(seen, 1).numpy()
    np.testing.assert_array_equal(np.float32(ranges["1"].low), expected.min(1))
    np.testing.assert_array_equal(np.float32(ranges["1"].high), expected.max(1))
    assert not any(module._forward_pre_hooks for module in network.modules())


@needs_int8
def test_a_convolution_is_that_of_rounded_numbers():
    """Against the same arithmetic in float64; channels of very different size keep their own precision."""
    scale = torch.tensor([1e-3, 1.0, 50.0, 1.0, 2.0, 0.1, 1.0, 3.0]).view(1, 8, 1, 1)
    x = scale * F.leaky_relu(noise(1, 8, 12, 10), 0.01)
    convolution = nn.Conv2d(8, 8, 3, padding=1)
    convolution.weight.data = noise(8, 8, 3, 3, seed=5) / scale
    network = Levels(convolution).eval()
    ranges = ranges_of(network, x)
    zero, steps = steps_of(np.array(ranges["body"].low), np.array(ranges["body"].high))
    step = torch.from_numpy(steps).double().view(1, 8, 1, 1)
    rounded = ((x.double() / step).round().clip(-zero, STEPS - zero)) * step
    scaled = convolution.weight.detach().double() * step
    most = scaled.abs().amax((1, 2, 3), keepdim=True) / 127
    weight = (scaled / most).round() * most / step
    expected = F.conv2d(rounded, weight, convolution.bias.detach().double(), padding=1)
    with torch.inference_mode():
        (found,) = OpenVinoNetwork(network, (8, 12, 10), half=False, ranges=ranges)(x)
        exact = network(x)[0]
    assert float((found - expected).norm() / expected.norm()) < 2e-3  # ties, and sums in float32
    assert 1e-3 < float((found - exact).norm() / exact.norm()) < 0.03


class Levels(nn.Module):
    """One convolution with the output of a network."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.body(x)]


@needs_int8
@pytest.mark.parametrize(
    ("plan", "tile"),
    [
        (WIDE, TILE),
        (WIDE.model_copy(update={"name": "residual"}), TILE),
        (WIDE.model_copy(update={"name": "attention"}), TILE),
        (TWO_D.model_copy(update={"features": (8, 16)}), (16, 24)),
    ],
    ids=["plain", "residual", "attention", "2d"],
)
def test_a_network_in_int8_is_near_the_exact_one_and_not_the_same(plan, tile):
    network = build_network(plan, 2, 3).eval()
    x = noise(2, 2, *tile)
    ranges = ranges_of(network, x)
    with torch.inference_mode():
        expected = network(x)[0]
        (found,) = OpenVinoNetwork(network, (2, *tile), half=False, ranges=ranges)(x)
    error = float((found - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.1
    assert float((found.argmax(1) == expected.argmax(1)).float().mean()) > 0.95


@needs_int8
def test_every_convolution_with_a_range_computes_in_bytes():
    network = build_network(WIDE, 1, 3).eval()
    ranges = ranges_of(network, noise(1, 1, *TILE))
    assert len(ranges) == sum(isinstance(m, nn.Conv3d) and m.in_channels > 1 and m.kernel_size != (1, 1, 1)
                              for m in network.modules())  # fmt: skip
    openvino = with_openvino._openvino()
    graph = with_openvino._graph(openvino, network, (1, *TILE))
    assert quantise(openvino, graph, network, ranges) == len(ranges)
    kinds = [node.get_type_name() for node in graph.get_ordered_ops()]
    assert kinds.count("FakeQuantize") == 2 * len(ranges)
    fewer = dict(list(ranges.items())[:2])
    graph = with_openvino._graph(openvino, network, (1, *TILE))
    assert quantise(openvino, graph, network, fewer) == 2


@needs_int8
def test_the_backend_is_taken_as_asked_and_says_what_its_labels_depend_on():
    networks = [build_network(WIDE, 1, 20, seed).eval() for seed in (0, 1)]
    ranges = [record(ranges_of(network, noise(1, 1, *TILE))) for network in networks]
    split = split_heads(networks, backends.PLAIN)
    assert split is not None
    for bodies in (networks, split[0]):
        chosen = choose_backend("int8", bodies, (1, *TILE), HALF, 1, ranges=ranges)
        assert (chosen.name, chosen.tested) == ("int8", True)
        assert "2 cases" in chosen.reason
        assert all(isinstance(chosen.engine(body), OpenVinoNetwork) for body in bodies)
    other = choose_backend("int8", networks, (1, *TILE), HALF, 1, ranges=ranges[::-1])
    assert len({chosen.labels, other.labels, ""}) == 3


def test_what_cannot_be_computed_leaves_torch_and_one_line(monkeypatch, caplog):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("none of its convolutions")

    monkeypatch.setattr(backends, "installed", lambda: True)
    monkeypatch.setattr(backends, "exact_in_int8", lambda: True)
    monkeypatch.setattr(backends, "half_precision", lambda: False)
    monkeypatch.setattr(backends, "OpenVinoNetwork", broken)
    network = build_network(WIDE, 1, 3).eval()
    layers = {"encoder.0.1": LayerRange(low=(0.0,), high=(1.0,))}
    chosen = choose_backend("int8", [network], (1, *TILE), CPU, 1, ranges=[record(layers)])
    assert (chosen.name, chosen.labels) == ("torch", "")
    assert "none of its convolutions" in caplog.text


def test_it_is_for_processors_that_add_bytes_exactly(monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda: True)
    monkeypatch.setattr(backends, "exact_in_int8", lambda: False)
    network = build_network(WIDE, 1, 3).eval()
    with pytest.raises(UsageError, match=r"E0001.*VNNI"):
        choose_backend("int8", [network], (1, *TILE), CPU, 1)
    monkeypatch.setattr(backends, "installed", lambda: False)
    with pytest.raises(UsageError, match=r"E0001.*not installed"):
        choose_backend("int8", [network], (1, *TILE), CPU, 1)
    with pytest.raises(UsageError, match=r"E0001.*for the CPU"):
        choose_backend("int8", [network], (1, *TILE), Device(torch.device("cuda"), torch.float16, "made up"), 1)


def test_a_range_whose_sides_do_not_fit_is_refused():
    for low, high in (((0.0,), (1.0, 2.0)), ((1.0,), (0.0,))):
        with pytest.raises(ValueError, match="same channels"):
            LayerRange(low=low, high=high)
