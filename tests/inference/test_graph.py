"""Graphs that are written down compute what torch computes; what is not known is left to torch's exporter."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from test_public import probe
from tiny_networks import FLAT_OR_SOLID, planned
from torch import Tensor, nn

from medseg.inference import with_openvino
from medseg.inference.engines import Finest
from medseg.inference.graph import NotWrittenError, write_graph
from medseg.inference.with_openvino import installed
from medseg.networks.build import build_network

pytestmark = pytest.mark.skipif(not installed(), reason="OpenVINO is not installed")
TRANSFORMERS = ("transunet", "swinunetr", "unetr")


def run(graph, x: Tensor) -> Tensor:
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = with_openvino._openvino().Core().compile_model(graph, "CPU", settings)
    return torch.from_numpy(next(iter(compiled([x.numpy()]).values())).copy())


def written(network: nn.Module, x: Tensor):
    return write_graph(with_openvino._openvino(), network, x.shape[1:])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lively(network: nn.Module) -> nn.Module:
    """In evaluation mode; no norm is plain, no statistic is 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if "running_var" in name:
            tensor.data.uniform_(0.5, 2, generator=generator)
        elif tensor.ndim == 1:
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
    return network.eval()


def tiny(name: str, dimensions: int) -> tuple[nn.Module, Tensor]:
    plan = planned(name, dimensions)
    tile = {"unet2015-valid": (188, 188)}.get(name) or plan.input_size or ((16, 24) if dimensions == 2 else (6, 16, 24))
    return lively(build_network(plan, 2, 3)), noise(1, 2, *tile)


@pytest.mark.parametrize(("name", "dimensions"), [one for one in FLAT_OR_SOLID if one[0] not in TRANSFORMERS])
def test_every_network_of_convolutions_is_written_down_and_computes_the_same(name, dimensions):
    network, x = tiny(name, dimensions)
    with torch.inference_mode():
        expected = network(x)[0]
        found = run(written(Finest(network), x), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "dimensions"), [("transunet", 3), ("swinunetr", 2), ("unetr", 2)])
def test_other_networks_are_exported_by_torch(name, dimensions):
    network, x = tiny(name, dimensions)
    with pytest.raises(NotWrittenError):
        written(Finest(network), x)
    graph = with_openvino._graph(with_openvino._openvino(), network, tuple(x.shape[1:]))
    with torch.inference_mode():
        torch.testing.assert_close(run(graph, x), network(x)[0], rtol=1e-3, atol=1e-3)


def test_torchs_exporter_agrees_with_what_is_written_down():
    network, x = tiny("residual", 3)
    exported = with_openvino._exported(with_openvino._openvino(), network, tuple(x.shape[1:]))
    with_openvino._fuse_instance_norms(with_openvino._openvino(), exported)
    torch.testing.assert_close(run(exported, x), run(written(Finest(network), x), x))


def test_what_cannot_be_converted_is_told_by_torch_and_later_warnings_are_heard(caplog):
    network = Calls(lambda x: [torch.histc(x)])
    with pytest.raises(Exception, match="histc"):
        with_openvino._graph(with_openvino._openvino(), network, (1, 4, 4))
    logging.getLogger("medseg.test").warning("still heard")
    assert "still heard" in caplog.text


class Calls(nn.Module):
    """A function as a network."""

    def __init__(self, call, *tensors: Tensor) -> None:
        super().__init__()
        self.call = call
        self.weights = nn.ParameterList(tensors)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.weights)


CALLS = {
    "strided and dilated": (lambda x, w: F.conv2d(x, w, None, (2, 1), (1, 2), (2, 1)), noise(5, 4, 3, 3)),
    "grouped": (lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=2), noise(6, 2, 3, 3), noise(6)),
    "transposed": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 3), (1, 0), (1, 0)),
        noise(4, 3, 3, 3),
        noise(3),
    ),
    "transposed in groups": (lambda x, w: F.conv_transpose2d(x, w, None, 2, groups=4), noise(4, 2, 2, 2)),
    "mean pooling": (lambda x: F.avg_pool2d(x, 2, ceil_mode=True),),
    "maximum pooling": (lambda x: F.max_pool2d(x, 3, 2, 1),),
    "another size": (lambda x: F.interpolate(x, (13, 8), mode="bilinear", align_corners=False),),
    "padded and cropped": (lambda x: F.pad(x, (1, -2, 0, 3), value=2.0),),
    "batch norm": (
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b),
        noise(4),
        noise(4).square() + 0.5,
        noise(4),
        noise(4),
    ),
    "instance norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), noise(4), noise(4)),
    "instance norm without weights": (lambda x: F.instance_norm(x),),
    "group norm of channels": (lambda x, w, b: torch.group_norm(x, 4, w, b), noise(4), noise(4)),
    "numbers": (lambda x: 2 * x + 0.5,),
    "gates": (lambda x: x * torch.sigmoid(F.gelu(x)) + F.gelu(x, approximate="tanh"),),
    "a part": (lambda x: torch.cat((x.narrow(2, 3, 4), x.narrow(2, 0, 4)), 1),),
    "in place, and looked at afterwards": (lambda x: in_place(F.relu(x + 1), x),),
    "of a tensor that was there before": (lambda x: torch.cat((F.leaky_relu(x, 0.2), x), 1),),
}


def in_place(y: Tensor, x: Tensor) -> Tensor:
    z = F.leaky_relu(y.add_(x), 0.1, True)
    F.relu(z, inplace=True)
    return torch.cat((y, z.contiguous(), x), 1)


@pytest.mark.parametrize("kind", CALLS)
def test_what_is_called_is_computed(kind):
    network, x = Calls(*CALLS[kind]), noise(1, 4, 9, 11, seed=7)
    with torch.inference_mode():
        torch.testing.assert_close(run(written(network, x), x), network(x.clone()), rtol=1e-4, atol=1e-5)


UNKNOWN = {
    "a function": lambda x: torch.exp(x),
    "a view": lambda x: x[:, :2] + 1,
    "in place": lambda x: x.clamp_(0, 1),
    "a part that is set": lambda x: x.__setitem__((0, 0), 1) or x,
    "a part that is added to": lambda x: x.narrow(1, 0, 2).add_(1),
    "a whole that is added to after a part was taken": lambda x: (F.relu(x), x.narrow(1, 0, 2), x.add_(1))[1],
    "a view that is added to": lambda x: x[:, :2].add_(1),
    "a result that is given": lambda x: torch.exp(x, out=x),
    "group norm over several channels": lambda x: torch.group_norm(x, 2),
    "statistics of the batch": lambda x: F.batch_norm(x, None, None, training=True),
    "an argument by another name": lambda x: torch.cat((x, x), axis=1),
    "corners": lambda x: F.interpolate(x, (3, 3), mode="bilinear", align_corners=True),
    "nearest": lambda x: F.interpolate(x, (3, 3)),
    "reflected": lambda x: F.pad(x, (1, 1), mode="reflect"),
    "another type": lambda x: x.to(torch.float64) + 1,
    "multiples": lambda x: torch.add(x, x, alpha=2),
    "rounded up": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "padded means": lambda x: F.avg_pool2d(x, 2, padding=1),
    "padding by name": lambda x: F.conv2d(x, torch.ones(1, 4, 3, 3, device="meta"), padding="same"),
    "weights made on the way": lambda x: F.conv2d(x, torch.ones(1, 4, 3, 3, device="meta")),
    "kept statistics": lambda x: F.instance_norm(x, x[0, :, 0, 0], x[0, :, 0, 0], use_input_stats=False),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_not_known_is_refused_rather_than_guessed(kind):
    with pytest.raises(NotWrittenError):
        written(Calls(UNKNOWN[kind]), noise(1, 4, 9, 11))


def test_the_network_is_left_as_it_was_and_its_values_are_in_the_graph():
    network, x = tiny("plain", 3)
    network.to(memory_format=torch.channels_last_3d)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.inference_mode():  # as a prediction asks for it
        graph = written(Finest(network), x)
        network.encoder[0][0].weight.data.zero_()
        assert not torch.equal(run(graph, x), network(x)[0])
        network.encoder[0][0].weight.data.copy_(before["encoder.0.0.weight"])
        torch.testing.assert_close(run(graph, x), network(x)[0], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.encoder[0][0].weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_prediction_loads_neither_torchs_exporter_nor_matplotlib():
    plan = planned("plain", 2).model_dump_json()
    statement = (
        "import medseg.pipeline.predict; from medseg.inference.with_openvino import OpenVinoNetwork; "
        "from medseg.networks.build import build_network; from medseg.records.network import NetworkPlan; "
        f"network = build_network(NetworkPlan.model_validate_json({plan!r}), 1, 2).eval(); "
        "OpenVinoNetwork(network, (1, 16, 24), half=False); "
        "print('openvino' in sys.modules, 'torch._dynamo' in sys.modules, 'matplotlib' in sys.modules)"
    )
    assert probe(statement)["out"].split() == ["True", "False", "False"]
