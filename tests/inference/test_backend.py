"""Backends: OpenVINO gives torch's logits for every kind of network, is refused where it does not, and never needed."""

from __future__ import annotations

import socket
import sys

import pytest
import torch
from tiny_models import FLAT_KERNELS, TWO_D, make_configuration
from torch import Tensor, nn

from medseg.errors import UsageError
from medseg.inference import backend as backends
from medseg.inference.backend import TORCH, choose_backend
from medseg.inference.passes import PLAIN, Mirroring, split_heads
from medseg.inference.sliding import Blending, stream_logits
from medseg.inference.with_openvino import OpenVinoNetwork, installed
from medseg.networks.build import build_network
from medseg.networks.device import Device, place
from medseg.records.network import NetworkPlan

CPU = Device(torch.device("cpu"), torch.float32, "test")
HALF = Device(torch.device("cpu"), torch.bfloat16, "test")
TILE = (4, 8, 6)
needs_openvino = pytest.mark.skipif(not installed(), reason="OpenVINO is not installed")


def trained_like(plan: NetworkPlan, channels: int, outputs: int, seed: int = 0) -> nn.Module:
    """A network none of whose norms is plain."""
    network = build_network(plan, channels, outputs, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 and "heads" not in name:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


PLANS = {
    "plain": (FLAT_KERNELS, TILE),
    "residual": (FLAT_KERNELS.model_copy(update={"name": "residual"}), TILE),
    "attention": (FLAT_KERNELS.model_copy(update={"name": "attention"}), TILE),
    "unetpp": (FLAT_KERNELS.model_copy(update={"name": "unetpp"}), (4, 8, 6)),
    "2d": (TWO_D, (8, 6)),
}


@needs_openvino
@pytest.mark.parametrize("kind", PLANS)
def test_openvino_gives_the_logits_of_torch(kind):
    plan, tile = PLANS[kind]
    network = place(trained_like(plan, 2, 3), CPU, len(tile))  # channels-last weights, as predict has them
    x = noise(3, 2, *tile)
    with torch.inference_mode():
        expected = network(x)[0]
        (found,) = OpenVinoNetwork(network, (2, *tile), half=False)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_openvino
def test_results_are_the_callers_own():
    network = OpenVinoNetwork(trained_like(FLAT_KERNELS, 1, 2), (1, *TILE), half=False)
    with torch.inference_mode():
        (first,) = network(noise(1, 1, *TILE))
        kept = first.clone()
        network(noise(1, 1, *TILE) + 5)
        assert torch.equal(first, kept)
        first.zero_()  # may be written to
        assert torch.equal(network(noise(1, 1, *TILE))[0], kept)


@needs_openvino
def test_inputs_of_another_size_and_all_after_a_failure_go_through_torch(caplog):
    torch_network = trained_like(FLAT_KERNELS, 1, 2)
    network = OpenVinoNetwork(torch_network, (1, *TILE), half=False)
    other, same = noise(1, 1, 8, 8, 6), noise(1, 1, *TILE)

    class Broken:
        def infer(self, *_: object, **__: object) -> None:
            raise RuntimeError("no more\nlong story")

    with torch.inference_mode():
        assert torch.equal(network(other)[0], torch_network(other)[0])
        network._requests = [Broken()]
        for _ in range(2):
            assert torch.equal(network(same)[0], torch_network(same)[0])
    assert [record.getMessage() for record in caplog.records if record.name.startswith("medseg")] == [
        "OpenVINO failed, going on with torch: RuntimeError: no more"
    ]


@needs_openvino
@pytest.mark.parametrize("mirroring", [PLAIN, Mirroring((0, 2))], ids=["plain", "mirrored"])
@pytest.mark.parametrize("outputs", [3, 9], ids=["logits", "features are blended"])
def test_a_sliding_window_of_several_folds_gives_the_same_by_both_backends(mirroring, outputs):
    networks = [place(trained_like(FLAT_KERNELS, 1, outputs, seed), CPU, 3) for seed in (0, 1)]
    configuration = make_configuration(TILE, FLAT_KERNELS)
    image = noise(1, 9, 11, 7).numpy()
    split = split_heads(networks, mirroring)
    assert (split is None) == (outputs == 3)
    bodies = networks if split is None else split[0]
    chosen = choose_backend("openvino", bodies, (1, *TILE), CPU, 1)
    assert chosen.name == "openvino"
    assert len(chosen.engines) == 2
    assert chosen.weight_bytes > 0
    if split is not None:  # stream_logits splits anew, and must find the same engines
        again = split_heads(networks, mirroring)
        assert again is not None
        assert all(isinstance(chosen.engine(body), OpenVinoNetwork) for body in again[0])
        assert all(chosen.engine(network) is network for network in networks)
    found, expected = (
        torch.cat(list(stream_logits(networks, image, configuration, CPU, mirroring=mirroring, backend=one)), 1)
        for one in (chosen, TORCH)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@needs_openvino
def test_disagreement_of_folds_is_the_same_by_both_backends():
    networks = [trained_like(FLAT_KERNELS, 1, 3, seed) for seed in (0, 1)]
    configuration, image = make_configuration(TILE, FLAT_KERNELS), noise(1, 5, 9, 7).numpy()
    chosen = choose_backend("openvino", networks, (1, *TILE), CPU, 1)
    found, expected = (
        torch.cat(
            list(stream_logits(networks, image, configuration, CPU, blending=Blending(disagreement=True), backend=one)),
            1,
        )
        for one in (chosen, TORCH)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@needs_openvino
def test_half_precision_is_near_and_float32_is_never_half():
    network = place(trained_like(FLAT_KERNELS, 1, 3), HALF, 3)
    assert choose_backend("openvino", [network], (1, *TILE), HALF, 1).name == "openvino"
    exact = choose_backend("openvino", [network], (1, *TILE), CPU, 1)
    (engine,) = exact.engines.values()
    hint = engine._requests[0].get_compiled_model().get_property("INFERENCE_PRECISION_HINT")
    assert "float" in str(hint) or "f32" in str(hint)
    assert "bf" not in str(hint)


class Twice(nn.Module):
    """An engine whose result is wrong."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...], *, half: bool) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        return [2 * self.network(x)[0]]


class NotANumber(Twice):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.network(x)[0] * float("nan")]


class Same(Twice):
    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = self.network(x)
        return found


class Failing(Twice):
    def __init__(self, network: nn.Module, shape: tuple[int, ...], *, half: bool) -> None:
        raise ValueError("an operation is unknown\nlong story")


@pytest.fixture
def network(monkeypatch) -> nn.Module:
    monkeypatch.setattr(backends, "installed", lambda: True)
    monkeypatch.setattr(backends, "half_precision", lambda: True)
    return trained_like(FLAT_KERNELS, 1, 3)


@pytest.mark.parametrize("engine", [Twice, NotANumber])
def test_a_wrong_result_is_refused_even_if_asked_for(network, monkeypatch, engine):
    monkeypatch.setattr(backends, "OpenVinoNetwork", engine)
    chosen = choose_backend("openvino", [network], (1, *TILE), CPU, 10**9)
    assert chosen.name == "torch"
    assert "differs" in chosen.reason
    assert chosen.engine(network) is network


def test_what_fails_leaves_torch_and_one_line(network, monkeypatch, caplog):
    monkeypatch.setattr(backends, "OpenVinoNetwork", Failing)
    chosen = choose_backend("auto", [network], (1, *TILE), CPU, 10**9)
    assert (chosen.name, chosen.reason) == ("torch", "OpenVINO failed")
    (record,) = [one for one in caplog.records if one.name.startswith("medseg")]
    assert record.getMessage().endswith("ValueError: an operation is unknown")


@pytest.mark.parametrize(("seconds", "name"), [(1.0, "torch"), (0.3, "openvino")])
def test_the_faster_one_is_taken(network, monkeypatch, seconds, name):
    monkeypatch.setattr(backends, "OpenVinoNetwork", Same)
    real = backends._Race._timed
    took = {True: seconds, False: 0.5}
    monkeypatch.setattr(backends._Race, "_timed", lambda race, one: (real(race, one)[0], took[isinstance(one, Same)]))
    assert choose_backend("auto", [network], (1, *TILE), CPU, 10**6).name == name


def test_little_work_is_not_tested(network, monkeypatch):
    monkeypatch.setattr(backends, "OpenVinoNetwork", Failing)
    for name, passes in (("auto", 1), ("auto", 6), ("openvino", 0)):
        assert choose_backend(name, [network], (1, *TILE), CPU, passes).reason.startswith("too little work")


def test_what_is_not_there_is_refused_only_if_asked_for(monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda: False)
    network = trained_like(FLAT_KERNELS, 1, 3)
    assert choose_backend("auto", [network], (1, *TILE), CPU, 10**9).name == "torch"
    assert choose_backend("torch", [network], (1, *TILE), CPU, 10**9).name == "torch"
    with pytest.raises(UsageError, match=r"medseg\[openvino\]"):
        choose_backend("openvino", [network], (1, *TILE), CPU, 10**9)


@needs_openvino
def test_nothing_is_told_to_its_maker(monkeypatch):
    asked: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _self, address: asked.append(address))
    OpenVinoNetwork(trained_like(TWO_D, 1, 2), (1, 8, 6), half=False)
    assert not asked
    assert sys.modules.get("openvino_telemetry") is None


def test_a_race_is_run_with_as_many_tiles_as_go_together(network, monkeypatch):
    monkeypatch.setattr(backends, "OpenVinoNetwork", Same)
    raced = []
    monkeypatch.setattr(backends, "Passes", lambda *arguments: lambda x: raced.append(x.shape) or network(x)[0])
    choose_backend("openvino", [network], (1, *TILE), CPU, 10, group=3)
    assert set(raced) == {(3, 1, *TILE)}
