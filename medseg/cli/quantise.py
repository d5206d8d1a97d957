"""``medseg quantise``: let a model predict in int8."""

from __future__ import annotations

import argparse

from medseg.cli import console, imports, options

HELP = "let a model predict in 8 bits on a CPU"
DESCRIPTION = (
    "Measure on some images between which values a model's networks compute, write int8.json beside their weights, and "
    "compare labels and time in int8 with those otherwise. medseg predict --backend int8 uses it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_model_and_images(parser)
    options.add_networks(parser, "those that medseg predict takes")
    parser.add_argument(
        "--cases",
        type=options.positive,
        default=4,
        metavar="N",
        help="measure N of the images, evenly spread, and compare as many others (default: 4)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    with imports.quickly():
        from medseg.cli.signals import StopRequest
        from medseg.pipeline.quantise import quantise_model

    found = quantise_model(
        arguments.model,
        options.inputs_of(arguments),
        arguments.cases,
        arguments.configuration,
        tuple(arguments.folds),
        progress=console.make_progress(arguments.progress),
        stop_signal=StopRequest(),
    )
    for one in found:
        print(f"{one.configuration}: measured on {_cases(one.measured)}: {', '.join(map(str, one.files))}")
        before, after = one.seconds
        same = " (the same)" if one.compared == one.measured else ""
        print(f"  {_cases(one.compared)}{same}: {after:.1f} s in int8, {before:.1f} s by {one.otherwise}")
        dice = ", ".join(f"{label} {value:.4f}" for label, value in one.dice.items()) or "nothing was found"
        print(f"  Dice of the labels in int8 against those: {dice}")
    print(f"medseg predict --model {arguments.model} --backend int8 uses it")
    return 0


def _cases(names: tuple[str, ...]) -> str:
    return f"{len(names)} case{'s' * (len(names) > 1)}"
