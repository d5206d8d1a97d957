"""Seconds that one tile takes in a plain U-Net: torch as nnU-Net uses it, ours, OpenVINO or CUDA graphs, compiled.

All in one process and in turns, so that other work on the machine meets all of them; medians, GFLOP/s reached (direct
convolutions counted, transposed ones too), the ratio to nnU-Net's way (contiguous tensors, instance norm; float32 on a
CPU, float16 on a GPU), and the error of the logits against it. The weights are random; a trained network's is smaller.

    python scripts/bench/tile.py                                     # six stages, 128 x 128 x 128
    python scripts/bench/tile.py --features 32 64 128 256 --tile 40 56 40 --repeats 15
    python scripts/bench/tile.py --device cuda --repeats 30
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medseg.errors import first_line
from medseg.inference.engines import GraphNetwork, in_half
from medseg.inference.int8 import watched
from medseg.inference.with_openvino import OpenVinoNetwork, exact_in_int8, half_precision, installed
from medseg.networks.build import build_network
from medseg.networks.device import Device, choose_device, place, place_batch
from medseg.networks.instance_norm import EPSILON, SLOPE, InstanceNormLeakyReLU
from medseg.records.network import NetworkPlan


class TorchNorm(nn.Module):
    """Instance norm and leaky ReLU as torch's own modules compute them, one after the other."""

    def __init__(self, ours: InstanceNormLeakyReLU) -> None:
        super().__init__()
        self.weight, self.bias = ours.weight, ours.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(F.instance_norm(x, weight=self.weight, bias=self.bias, eps=EPSILON), SLOPE, inplace=True)


def with_torch_norms(network: nn.Module) -> nn.Module:
    """A copy of the network as nnU-Net builds it."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, InstanceNormLeakyReLU):
                setattr(module, name, TorchNorm(child))
    return network.eval()


def contestants(network: nn.Module, x: Tensor, device: torch.device, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Name → one pass."""
    exact, half = (Device(device, dtype, "") for dtype in (torch.float32, torch.bfloat16))
    on_gpu, nnunet, there = device.type == "cuda", with_torch_norms(network).to(device), x.to(device)
    found: dict[str, Callable[[], Tensor]] = {}
    if on_gpu:
        found["nnU-Net, float16"] = lambda: autocast(nnunet, there, torch.float16)
    found["nnU-Net, float32"] = lambda: nnunet(there)[0]
    placed = place(copy.deepcopy(network), exact, x.ndim - 2)
    found["ours, float32"] = lambda: placed(place_batch(x, exact))[0]
    halved = in_half(place(copy.deepcopy(network), half, x.ndim - 2), torch.bfloat16)
    found["ours, bfloat16"] = lambda: autocast(halved, place_batch(x, half))
    if on_gpu:
        graphs = GraphNetwork(halved, half)
        found["graphs, bfloat16"] = lambda: graphs(place_batch(x, half))[0]
    if compiled:
        fast = torch.compile(place(copy.deepcopy(network), half, x.ndim - 2), dynamic=False)
        found["compiled, bfloat16"] = lambda: autocast(fast, place_batch(x, half))
    if installed() and not on_gpu:
        for kind in (True, False) if half_precision() else (False,):
            begin = time.perf_counter()
            engine = OpenVinoNetwork(network, tuple(x.shape[1:]), half=kind)
            name = f"OpenVINO, {'bfloat16' if kind else 'float32'}"
            print(f"{name}: converted in {time.perf_counter() - begin:.1f} s")
            found[name] = lambda engine=engine: engine(x)[0]
        if exact_in_int8():
            with torch.inference_mode(), watched(network) as ranges:
                network(x)
            engine = OpenVinoNetwork(network, tuple(x.shape[1:]), half=half_precision(), ranges=ranges)
            found["OpenVINO, int8"] = lambda engine=engine: engine(x)[0]
    return found


def autocast(network: Callable[[Tensor], list[Tensor]], x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with torch.autocast(x.device.type, dtype):
        return network(x)[0].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile", type=int, nargs="+", default=[128, 128, 128])
    parser.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256, 320, 320])
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--outputs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile too; the first pass takes a minute")
    parser.add_argument("--profile", action="store_true", help="what our bfloat16 pass spends its time on")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    device = choose_device(options.device, "bfloat16").torch_device
    stages, one, two, three = len(options.features), *((n,) * len(options.tile) for n in (1, 2, 3))
    plan = NetworkPlan(
        features=tuple(options.features),
        kernels=(three,) * stages,
        strides=(one, *[two] * (stages - 1)),
        convs_encoder=(2,) * stages,
        convs_decoder=(2,) * (stages - 1),
    )
    network = build_network(plan, options.channels, options.outputs).eval()
    x = torch.randn(1, options.channels, *options.tile, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x)
    race(contestants(network, x, device, options.compile), options.repeats, counter.get_total_flops() / 1e9)
    if options.profile:
        profile(network, x, device)


@torch.inference_mode()
def race(runs: dict[str, Callable[[], Tensor]], repeats: int, gflop: float) -> None:
    """Print a row for each."""
    results, seconds = {}, {name: [] for name in runs}
    for name in list(runs):  # warm
        begin = time.perf_counter()
        try:
            results[name] = runs[name]().cpu()
        except Exception as error:
            print(f"{name}: {first_line(error)}")
            del runs[name]
        print(f"{name}: first pass {time.perf_counter() - begin:.2f} s", flush=True)
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(seconds[name]) for name in runs}
    reference = next(iter(runs))
    print(f"\n{torch.get_num_threads()} threads, {gflop:.0f} GFLOP")
    print(f"{'':20} {'s':>8} {'fastest':>8} {'GFLOP/s':>8} {'times':>6} {'error':>8} {'argmax':>8}")
    for name, median in medians.items():
        error = float((results[name] - results[reference]).norm() / results[reference].norm())
        same = float((results[name].argmax(1) == results[reference].argmax(1)).float().mean())
        print(
            f"{name:20} {median:8.3f} {min(seconds[name]):8.3f} {gflop / median:8.0f} "
            f"{medians[reference] / median:6.2f} {error:8.1e} {same:8.2%}"
        )


@torch.inference_mode()
def profile(network: nn.Module, x: Tensor, device: torch.device) -> None:
    """Print the operators of our bfloat16 pass by time."""
    half, kind = Device(device, torch.bfloat16, ""), device.type
    placed = place(network, half, x.ndim - 2)
    seen = place_batch(x, half)
    autocast(placed, seen)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU if kind == "cpu" else activity.CUDA]) as found:
        autocast(placed, seen)
    print(found.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=12))


if __name__ == "__main__":
    main()
