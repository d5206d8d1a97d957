"""``medseg select``: choose the configuration, or two together, and the post-processing by cross-validation."""

from __future__ import annotations

import argparse

from medseg.cli import console, options

HELP = "choose the best configuration, ensemble and post-processing"
DESCRIPTION = (
    "Compare the trained configurations of a run and their ensembles of two on the cases that all of them validated, "
    "choose post-processing, and write RUN/selection.json, which medseg predict --model RUN follows."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_run(parser)
    parser.add_argument(
        "--configuration", nargs="+", default=[], metavar="NAME", help="compare only these (default: all trained)"
    )
    parser.add_argument("--no-ensembles", action="store_true", help="single configurations only; predicts nothing")
    parser.add_argument(
        "--refine",
        nargs="?",
        const="mean-field",
        metavar="HOW",
        help="also segment the validation cases of the winner refined, and keep that where the gain is real; "
        "mean-field (default) or mean-field:smoothness_weight=2,…",
    )
    options.add_device(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.cli.signals import StopRequest
    from medseg.pipeline.processing import refinement_named
    from medseg.pipeline.select import SelectOptions, select_run

    stop = StopRequest()
    selection = select_run(
        arguments.run,
        SelectOptions(
            tuple(arguments.configuration),
            not arguments.no_ensembles,
            options.device_of(arguments),
            None if arguments.refine is None else refinement_named(arguments.refine),
        ),
        console.make_progress(arguments.progress),
        stop,
    )
    rows = [("candidate", "networks", "as predicted", "post-processed: mean Dice (95 % CI)", "gain (95 % CI)")]
    for candidate in selection.candidates:
        dice, gain = (_number(candidate.mean_dice, candidate.mean_dice_ci), _number(candidate.gain, candidate.gain_ci))
        plain = _number(candidate.mean_dice_unprocessed, None)
        rows.append((candidate.name, str(candidate.networks), plain, dice, gain))
    print(f"{len(selection.cases)} cases, each post-processed as the other folds chose")
    console.print_table(rows)
    for sentence in (*selection.evidence, *selection.postprocessing.evidence):
        print(sentence)
    for sentence in selection.missing:
        print(f"missing: {sentence}")
    print(f"chosen: {' + '.join(member.configuration for member in selection.members)}")
    print(f"medseg predict --model {arguments.run} follows it")
    return 0


def _number(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" + ("" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})")
