"""What a training step of each network costs, measured, over what planning predicts for it.

A step of noise in a process of its own on the CPU, its peak of memory and its fastest time. ``memory`` and ``time`` are
ratios to the plain network of the same patch; ``of plain stages`` is the measured memory over the prediction for a
plain network of the same stages, over the same ratio of the plain network: medseg.planning.layers.VOXELS holds it.

    python scripts/bench/network_cost.py --patch 40 56 40 --networks unetpp transunet
"""

from __future__ import annotations

import argparse

from medseg.networks.device import choose_device
from medseg.planning import layers
from medseg.planning.cost import step_memory_bytes
from medseg.planning.networks import NETWORK_PLANS, Variant, input_patch, planned_network, rules_with
from medseg.planning.presets import MEDSEG
from medseg.planning.topology import topology
from medseg.records.plan import Budget, ConfigurationPlan, Normalisation
from medseg.records.task import Channel, Label, Task
from medseg.training.cost import measure_apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs="+", default=[40, 56, 40])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", choices=["float32", "auto"], default="float32")
    parser.add_argument("--networks", nargs="+", default=list(NETWORK_PLANS))
    parser.add_argument("--checkpointing", action="store_true", help="compare with the plain network that keeps all")
    options = parser.parse_args()
    task = Task(channels=(Channel(name="MRI"),), labels=tuple(Label(name=str(v), value=v) for v in range(3)))
    device, patch = choose_device("cpu", options.precision), tuple(options.patch)
    found = topology((1.0,) * len(patch), patch, MEDSEG.min_edge)
    reference = None
    print(f"{'network':16} {'memory':>8} {'time':>8} {'predicted':>10} {'of plain stages':>16}")
    for name in ["plain", *[n for n in options.networks if n != "plain" or options.checkpointing]]:
        repeated = options.checkpointing and reference is not None
        network = planned_network(found, rules_with(MEDSEG, Variant(name, checkpointing=repeated)))
        size = input_patch(network, found.patch)
        configuration = ConfigurationPlan(
            name="bench",
            spacing_mm=(1.0,) * len(size),
            patch_size=size,
            batch_size=options.batch,
            median_shape=tuple(map(float, size)),
            normalisation=(Normalisation(scheme="zscore"),),
            network=network,
        )
        cost = measure_apart(configuration, task, device)
        if cost is None:
            print(f"{name:16} does not fit")
            continue
        budget = Budget(device="cpu", half=device.half)
        predicted = step_memory_bytes(layers.layers_of(network, size, 1, 3), options.batch, budget, len(size))
        alone = network.model_copy(update={"checkpointing": False})
        factor, layers.VOXELS = layers.VOXELS, {}
        stages = step_memory_bytes(layers.layers_of(alone, size, 1, 3), options.batch, budget, len(size))
        layers.VOXELS = factor
        ratio = cost.memory_bytes / stages
        reference = reference or (cost, ratio)
        memory, seconds = cost.memory_bytes / reference[0].memory_bytes, cost.seconds / reference[0].seconds
        share = predicted / cost.memory_bytes
        print(f"{name:16} {memory:8.2f} {seconds:8.2f} {share:10.2f} {ratio / reference[1]:16.2f}", flush=True)


if __name__ == "__main__":
    main()
