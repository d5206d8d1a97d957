"""``medseg export``: give a model to another program."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "export"
HELP = "give a model to nnU-Net"
DESCRIPTION = (
    "Write a model as result folders of nnU-Net v2, which nnUNetv2_predict and programs built on it run with the same "
    "labels."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("program", choices=["nnunet"], help="for which program")
    parser.add_argument("model", type=Path, metavar="RUN_OR_MODEL", help="run or model folder")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder to write result folders in; nnUNet_results/DatasetXXX_Name for nnUNetv2_predict -d XXX",
    )
    parser.add_argument("--configuration", metavar="NAME", help="needed if several were trained")
    parser.add_argument(
        "--folds", nargs="+", default=[], metavar="FOLD", help="default: the model of all cases, else all trained folds"
    )
    parser.add_argument("--file-ending", metavar="ENDING", help="of the files nnU-Net will get (default: .nii.gz)")


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.errors import escape
    from medseg.interop.nnunet_export import export_nnunet

    exported = export_nnunet(
        arguments.model, arguments.output, arguments.configuration, tuple(arguments.folds), arguments.file_ending
    )
    for note in exported.notes:
        print(escape(f"note: {note}"))
    for folder in exported.folders[::-1]:
        folds = " ".join(sorted(path.name.removeprefix("fold_") for path in folder.glob("fold_*")))
        print(escape(f"nnUNetv2_predict_from_modelfolder -m {folder} -f {folds} -i IMAGES -o PREDICTIONS"))
    if len(exported.folders) > 1:
        print("the second takes the predictions of the first by -prev_stage_predictions")
    return 0
