"""Options that several commands share."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import Problem, UsageError

TRANSFER = ("begin_from", "map_channel", "map_label")
SPLITS = ("splits", "split_folds", "split_seed", "group", "stratify")

if TYPE_CHECKING:
    from medseg.networks.device import Device
    from medseg.pipeline.split import SplitOptions
    from medseg.pipeline.train import TrainOptions
    from medseg.planning.matching import Asked
    from medseg.planning.networks import Variant
    from medseg.training.launch import Launch


def add_run(parser: argparse.ArgumentParser) -> None:
    """``--run RUN``."""
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="run folder: everything is kept here")


def add_model_and_images(parser: argparse.ArgumentParser) -> None:
    """``--model`` and ``-i``: what segments, and what is segmented."""
    parser.add_argument("--model", type=Path, required=True, metavar="RUN_OR_MODEL", help="run or model folder")
    parser.add_argument("-i", "--input", type=Path, required=True, nargs="+", metavar="INPUT", help="files or a folder")


def inputs_of(arguments: argparse.Namespace) -> Path | list[Path]:
    """The folder or the files after ``-i``."""
    given: list[Path] = arguments.input
    return given[0] if len(given) == 1 else given


def add_networks(parser: argparse.ArgumentParser, folds: str) -> None:
    """``--configuration`` and ``--folds``, whose default is told as ``folds``."""
    parser.add_argument("--configuration", metavar="NAME", help="needed if several were trained")
    parser.add_argument("--folds", nargs="+", default=[], metavar="FOLD", help=f"default: {folds}")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--precision``."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto (default: a GPU if there is one), cpu, cuda, or cuda:N for one of several GPUs",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="auto: half precision where a self-test finds it right and faster (default)",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """``--workers N``."""
    parser.add_argument("--workers", type=positive, metavar="N", help="cases at a time (default: by cores and memory)")


def add_length(parser: argparse.ArgumentParser) -> None:
    """``--time-budget``, ``--epochs`` or ``--iterations``, and ``--recipe``."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--time-budget", metavar="TIME", help="train this long, for instance 90s, 10m or 1h30m")
    group.add_argument("--epochs", type=positive, metavar="N", help="train this many epochs (default: the plan's)")
    group.add_argument("--iterations", type=positive, metavar="N", help="train this many steps")
    parser.add_argument(
        "--recipe",
        choices=["fast", "reference"],
        help="fast: patches grow, batch size, learning rate and momentum fit the length (default with --time-budget); "
        "reference: they are the plan's, which are nnU-Net's (default with --epochs and --iterations)",
    )


def add_loggers(parser: argparse.ArgumentParser) -> None:
    """``--logger NAME``, several times."""
    parser.add_argument(
        "--logger",
        dest="loggers",
        action="append",
        default=[],
        choices=["tensorboard", "mlflow"],
        help="also log for this tool, into the run folder; may be given several times",
    )


def add_compile(parser: argparse.ArgumentParser) -> None:
    """``--compile``."""
    parser.add_argument(
        "--compile",
        choices=["auto", "on", "off"],
        default="auto",
        help="torch.compile, where a test finds it right and faster; auto (default): for an hour or more on a GPU",
    )


def training_of(arguments: argparse.Namespace) -> TrainOptions:
    """The options of ``add_length``, ``add_seed``, ``add_loggers`` and ``add_compile``."""
    from medseg.pipeline.train import TrainOptions

    return TrainOptions(
        seconds=seconds_of(arguments),
        epochs=arguments.epochs,
        iterations=arguments.iterations,
        recipe=arguments.recipe,
        seed=arguments.seed,
        loggers=tuple(arguments.loggers),
        compile=arguments.compile,
    )


def add_memory(parser: argparse.ArgumentParser) -> None:
    """``--memory GB``."""
    parser.add_argument(
        "--memory",
        type=gigabytes,
        metavar="GB",
        help="memory to plan for (default: the GPU's, up to 8 of a CPU's, or what an nnU-Net preset is made for)",
    )


def add_preset(parser: argparse.ArgumentParser) -> None:
    """``--preset NAME``."""
    parser.add_argument(
        "--preset",
        default="medseg",
        metavar="NAME",
        help="medseg (default), nnunet, resenc-m, resenc-l, resenc-xl, or a JSON file with a preset",
    )


def add_network(parser: argparse.ArgumentParser) -> None:
    """What is trained: ``--network``, ``--loss``, ``--checkpointing``, ``--elastic`` and ``--foreground-by``."""
    group = parser.add_argument_group("what is trained (docs/concepts/networks.md)")
    group.add_argument(
        "--network",
        metavar="NAME",
        help="plain, residual, unet2015, unet2015-linear, unet2015-valid, attention, unetpp, resnet-unet, "
        "resnet18-unet, resnet50-unet, transunet, swinunetr, unetr, segresnet, mednext (default: the preset's)",
    )
    group.add_argument(
        "--loss",
        metavar="NAME",
        help="dice-ce (default), dice, ce, weighted-ce, focal, dice-focal, iou, tversky, generalized-dice, "
        "dice-topk, border-ce, boundary",
    )
    group.add_argument("--checkpointing", action="store_true", help="less memory, about a third more time per step")
    group.add_argument(
        "--elastic", type=probability, metavar="P", help="share of patches that are deformed elastically (default: 0)"
    )
    group.add_argument(
        "--foreground-by",
        choices=["voxel", "component"],
        help="what of a class patches are chosen for alike: voxels (default), or connected components such as lesions",
    )


def variant_of(arguments: argparse.Namespace) -> Variant:
    """The options of ``add_network``.

    Raises:
        UsageError: E0001 no such network or loss.
    """
    from medseg.planning.networks import NETWORK_PLANS, Variant
    from medseg.records.training import LOSS_NAMES

    for option, value, known in (
        ("--network", arguments.network, tuple(NETWORK_PLANS)),
        ("--loss", arguments.loss, LOSS_NAMES),
    ):
        if value is not None and value not in known:
            raise UsageError(Problem("E0001", f"{option} {value}", ", ".join(known), "choose one of them"))
    return Variant(
        arguments.network, arguments.loss, arguments.checkpointing, arguments.elastic, arguments.foreground_by
    )


def add_transfer(parser: argparse.ArgumentParser) -> None:
    """Fine-tuning: ``--from``, ``--map-channel`` and ``--map-label``."""
    group = parser.add_argument_group("begin from a trained model (docs/how-to/fine-tune-a-model.md)")
    group.add_argument(
        "--from",
        dest="begin_from",
        type=Path,
        metavar="MODEL",
        help="take over plan and weights of a run or model folder; channels and labels by name",
    )
    group.add_argument(
        "--map-channel", action="append", default=[], metavar="NEW=OLD", help="NEW is the model's channel OLD"
    )
    group.add_argument(
        "--map-label",
        action="append",
        default=[],
        metavar="NEW=OLD",
        help="label or region NEW is the model's OLD; NEW= does not take it over",
    )


def asked_of(arguments: argparse.Namespace) -> Asked:
    """``--map-channel`` and ``--map-label``.

    Raises:
        UsageError: E0001 not of the form NEW=OLD, or NEW twice.
    """
    from medseg.planning.matching import Asked

    return Asked(_pairs("--map-channel", arguments.map_channel), _pairs("--map-label", arguments.map_label))


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        new, equals, old = text.partition("=")
        if not (new and equals) or new in found:
            measured = f"{option} {text}" + (", and another one" if new in found else "")
            raise UsageError(Problem("E0001", measured, "NEW=OLD, once for each NEW", "names as in dataset.json"))
        found[new] = old
    return found


def add_splits(parser: argparse.ArgumentParser, *folds: str) -> None:
    """``--splits``, or how to draw them; ``folds`` are more names for ``--split-folds``."""
    group = parser.add_argument_group("which cases train and which validate")
    group.add_argument("--splits", type=Path, metavar="FILE", help="folds to use, also nnU-Net's splits_final.json")
    group.add_argument(
        "--split-folds", *folds, dest="split_folds", type=positive, metavar="K", help="number of folds (default: 5)"
    )
    group.add_argument("--split-seed", type=seed, metavar="N", help="of the draw (default: 12345, as nnU-Net)")
    group.add_argument(
        "--group",
        metavar="GROUPS",
        help="keep patients on one side: FILE.csv:COLUMN, regex:(PATTERN), bids or none (default: the data set's)",
    )
    group.add_argument(
        "--stratify",
        choices=["auto", "always", "never"],
        help="spread rare labels over the folds (auto: where chance would not; never with nnU-Net's presets)",
    )


def splits_of(arguments: argparse.Namespace) -> SplitOptions:
    """The options of ``add_splits``."""
    from medseg.pipeline.split import SplitOptions, Stratify

    stratify: Stratify = arguments.stratify or "auto"
    return SplitOptions(arguments.splits, arguments.split_folds, arguments.split_seed, arguments.group, stratify)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """``--seed N``."""
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of weights and batches (default: 0)")


def positive(text: str) -> int:
    """A whole number above zero."""
    return int(_number(text, "a whole number above 0", 1, math.inf, whole=True))


def count(text: str) -> int:
    """A whole number, 0 or more."""
    return int(_number(text, "a whole number, 0 or more", 0, math.inf, whole=True))


def seed(text: str) -> int:
    """A whole number from 0 to 2³² - 1."""
    return int(_number(text, "a whole number from 0 to 4294967295", 0, 2**32 - 1, whole=True))


def gigabytes(text: str) -> float:
    """An amount of memory that a plan may be made for."""
    return _number(text, "a number of GB from 0.5 to 1024", 0.5, 1024)


def millimetres(text: str) -> float:
    """A distance."""
    return _number(text, "a number of mm, 0 or more", 0, 1e6)


def share(text: str) -> float:
    """A share of something, above 0."""
    return _number(text, "a share from 0.1 to 1", 0.1, 1)


def probability(text: str) -> float:
    """A probability."""
    return _number(text, "a probability from 0 to 1", 0, 1)


def _number(text: str, expected: str, least: float, most: float, *, whole: bool = False) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def device_of(options: argparse.Namespace, launch: Launch | None = None) -> Device:
    """The device that the options ask for; of several processes on a machine each has a GPU of its own."""
    import torch

    from medseg.networks.device import choose_device

    name = options.device
    if launch is not None and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        name = f"cuda:{launch.local_rank}"
    return choose_device(name, options.precision)


def device_if_asked(options: argparse.Namespace) -> Device | None:
    """The device, unless it is left to be chosen."""
    return None if (options.device, options.precision) == ("auto", "auto") else device_of(options)


def seconds_of(options: argparse.Namespace) -> float | None:
    """The seconds of ``--time-budget``, or None."""
    from medseg.training.schedule import parse_duration

    return None if options.time_budget is None else parse_duration(options.time_budget)
