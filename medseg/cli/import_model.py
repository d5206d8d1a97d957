"""``medseg import``: take over a model that another program trained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medseg.interop.nnunet_models import Imported

NAME = "import"
HELP = "take over a model of nnU-Net"
DESCRIPTION = (
    "Write a model of nnU-Net v2 as a model folder that medseg predict takes: the same networks, seen and decided as "
    "nnU-Net does. Nothing in the files is executed."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("program", choices=["nnunet"], help="which program's model it is")
    parser.add_argument(
        "source",
        type=Path,
        metavar="FOLDER_OR_ZIP",
        help="a result folder TRAINER__PLANS__CONFIGURATION, a folder of them, one fold, or an exported zip archive",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="MODEL", help="model folder to write")
    parser.add_argument("--configuration", metavar="NAME", help="needed if several are there")
    parser.add_argument("--folds", nargs="+", default=[], metavar="FOLD", help="default: all that are there")
    parser.add_argument("--checkpoint", choices=["final", "best"], default="final", help="which one of each fold")
    parser.add_argument("--no-postprocessing", action="store_true", help="leave away what cross-validation chose")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.interop.nnunet_models import ImportOptions, import_nnunet

    options = ImportOptions(
        arguments.configuration,
        tuple(arguments.folds),
        f"checkpoint_{arguments.checkpoint}.pth",
        not arguments.no_postprocessing,
        arguments.overwrite,
    )
    _print(import_nnunet(arguments.source, arguments.output, options), arguments.output)
    return 0


def _print(imported: Imported, output: Path) -> None:
    from medseg.errors import escape

    cards = imported.cards
    for name in dict.fromkeys(card.configuration for card in cards):
        folds = ", ".join(card.fold for card in cards if card.configuration == name)
        stage = "first stage of the cascade, " if name != cards[0].configuration else ""
        print(escape(f"{name}: {stage}folds {folds}"))
    task, origin = cards[0].plan.task, cards[0].imported
    print(escape(f"channels: {', '.join(channel.name for channel in task.channels)}"))
    print(escape(f"labels: {', '.join(f'{label.value} {label.name}' for label in task.foreground)}"))
    if origin is not None:
        seen = {"file": "as they lie in the file", "canonical": "turned to RAS"}[cards[0].orientation]
        print(escape(f"trained by {origin.trainer} ({origin.plans}); volumes are seen {seen} ({origin.reader})"))
    if imported.postprocessing is not None:
        print("post-processing of nnU-Net's cross-validation is applied; --no-postprocessing leaves it away")
    for note in imported.notes:
        print(escape(f"note: {note}"))
    print(f"medseg predict --model {output} -i IMAGES -o PREDICTIONS")
