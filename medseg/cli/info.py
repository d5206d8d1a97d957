"""``medseg info``: layers, size and cost of a network, as a table and as a drawing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.cli import console, options

if TYPE_CHECKING:
    from medseg.pipeline.info import NetworkInfo

HELP = "show the layers, weights and cost of a network"
DESCRIPTION = (
    "Show the layers of a network with their shapes and weights, its operations, memory and receptive field; --draw "
    "draws it. The network is that of a plan (--plan), or the one that would be planned for a patch (--network, "
    "--patch), or both: another network on the plan's patch. Nothing is computed but shapes."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--network", metavar="NAME", help="a network, see medseg plan --help")
    parser.add_argument("--plan", type=Path, metavar="RUN", help="run folder or plan.json")
    parser.add_argument("--configuration", metavar="NAME", help="of the plan (default: 3d_fullres if there is one)")
    parser.add_argument(
        "--patch", type=options.positive, nargs="+", metavar="N", help="[z] y x (default: the plan's, or 96 96 96)"
    )
    parser.add_argument("--spacing", type=float, nargs="+", metavar="MM", help="[z] y x, without a plan (default: 1)")
    parser.add_argument("--channels", type=options.positive, default=1, metavar="N", help="without a plan (default: 1)")
    parser.add_argument("--outputs", type=options.positive, default=2, metavar="N", help="without a plan (default: 2)")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw the network: .svg, .png or .pdf")
    parser.add_argument("--json", action="store_true", help="print an object as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.artefacts import json_bytes
    from medseg.pipeline.info import Wanted, describe, draw

    info = describe(
        Wanted(
            arguments.network,
            arguments.plan,
            arguments.configuration,
            tuple(arguments.patch) if arguments.patch else None,
            tuple(arguments.spacing) if arguments.spacing else None,
            arguments.channels,
            arguments.outputs,
        )
    )
    if arguments.json:
        from dataclasses import asdict

        values = asdict(info.summary) | {"network": info.network.to_json(), "patch": info.patch, "field": info.field}
        print(json_bytes(values | {"choice": info.choice, "memory_bytes": round(info.memory_bytes)}).decode())
    else:
        _print(info)
    if arguments.draw is not None:
        draw(info, arguments.draw)
        if not arguments.json:
            print(f"drawn: {arguments.draw}")
    return 0


def _print(info: NetworkInfo) -> None:
    rows = [("layer", "kind", "kernel", "stride", "output", "weights")]
    for layer in info.summary.layers:
        kernel, stride = _times(layer.kernel), _times(layer.stride)
        rows.append((layer.name, layer.kind, kernel, stride, _times(layer.output), f"{layer.parameters:,}"))
    console.print_table(rows)
    field = info.field if isinstance(info.field, str) else "not known" if info.field is None else _times(info.field)
    logits = ", ".join(_times(shape) for shape in info.summary.outputs)
    memory = f"{info.memory_bytes / 1e9:.2f} GB for one sample in float32 (predicted)"
    print()
    console.print_table(
        [
            ("network", f"{info.choice}, {len(info.network.features)} stages"),
            ("patch", _times(info.patch)),
            ("logits", logits),
            ("weights", f"{info.summary.parameters:,}"),
            ("operations", f"{info.summary.flop / 1e9:,.1f} · 10⁹ forward"),
            ("training step", memory),
            ("receptive field", field),
        ]
    )


def _times(numbers: tuple[int, ...]) -> str:
    return " × ".join(map(str, numbers))
