"""``medseg predict``: segment images with a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path

from medseg.cli import console, imports, options

HELP = "segment images with a trained model"
DESCRIPTION = (
    "Segment images on their own grid: case_0000.nii.gz becomes OUTPUT/case.nii.gz. Finished cases are skipped; one "
    "case that fails does not stop the others (exit code 4)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_model_and_images(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUTPUT", help="folder of the label files")
    options.add_networks(parser, "the model of all cases, else all trained folds")
    parser.add_argument(
        "--speed",
        choices=["fast", "balanced", "accurate"],
        default="balanced",
        help="fast: fewer tiles, one network; balanced (default): all networks; accurate: mirrored views too",
    )
    parser.add_argument(
        "--tta", choices=["none", "mirror"], help="mirror: average mirrored views too (default: by speed)"
    )
    parser.add_argument(
        "--backend",
        choices=["auto", "torch", "openvino", "int8", "graphs"],
        default="auto",
        help="what computes the network; auto (default): OpenVINO, on a GPU CUDA graphs, where found faster; int8: "
        "in 8 bits on a CPU, after medseg quantise",
    )
    parser.add_argument(
        "--step", type=options.share, metavar="SHARE", help="distance of tiles in shares of a tile (default: by speed)"
    )
    parser.add_argument(
        "--probabilities",
        nargs="?",
        const="uint8",
        choices=["uint8", "uint16"],
        help="also write a NIfTI file for each class, from 0 to 1 in 255 (default) or 65535 steps",
    )
    parser.add_argument(
        "--uncertainty", action="store_true", help="also write a map of it, and a score of quality into predict.json"
    )
    parser.add_argument(
        "--format",
        metavar="ENDING",
        help="of the label files: .nii.gz .nii .nrrd .seg.nrrd .mha .png .tif; default: as input",
    )
    parser.add_argument(
        "--post-processing",
        metavar="FILE",
        help="another postprocessing.json, or none (default: what cross-validation chose)",
    )
    parser.add_argument(
        "--refine",
        metavar="HOW",
        help="mean-field: draw borders along the image's edges, mean-field:smoothness_weight=2,… to set it; none "
        "(default: what cross-validation chose)",
    )
    parser.add_argument(
        "--depth", type=options.positive, metavar="N", help="of unetpp: compute its U-Net of N steps alone, faster"
    )
    parser.add_argument(
        "--attention-maps",
        action="store_true",
        help="of attention: also write what each gate lets pass, OUTPUT/attention/CASE/level_1.nii.gz …",
    )
    parser.add_argument("--preview", action="store_true", help="also draw every case: OUTPUT/previews/CASE.png")
    options.add_device(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    with imports.quickly():
        from medseg.cli.signals import StopRequest
        from medseg.errors import InputError, PartialFailure
        from medseg.pipeline.predict import PredictOptions, predict_files
        from medseg.pipeline.processing import processing_named, refinement_named

    stop = StopRequest()
    choice = PredictOptions(
        configuration=arguments.configuration,
        folds=tuple(arguments.folds),
        tta=arguments.tta,
        device=options.device_of(arguments),
        ending=arguments.format,
        preview=arguments.preview,
        speed=arguments.speed,
        step=arguments.step,
        backend=arguments.backend,
        probabilities=arguments.probabilities,
        uncertainty=arguments.uncertainty,
        postprocessing=None if arguments.post_processing is None else processing_named(arguments.post_processing),
        refinement=None if arguments.refine is None else refinement_named(arguments.refine) or "none",
        depth=arguments.depth,
        attention_maps=arguments.attention_maps,
    )
    progress = console.make_progress(arguments.progress)
    manifest = predict_files(arguments.model, options.inputs_of(arguments), arguments.output, choice, progress, stop)
    console.print_failures(manifest)
    counts = [sum(case.status == status for case in manifest.cases) for status in ("done", "skipped", "failed")]
    print(f"{counts[0]} segmented, {counts[1]} were there already, {counts[2]} failed: {arguments.output}")
    if not manifest.failed:
        return 0
    return PartialFailure.exit_code if counts[0] + counts[1] else InputError.exit_code
