"""Network: the drawing of a U-Net, its stages as boxes with their numbers of features, sizes and ways down and up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.patches import FancyArrowPatch, Rectangle

from medseg.artefacts import commit
from medseg.records.plan import PADDING_NETWORKS, NetworkPlan
from medseg.reporting.style import FAINT, INK, PALETTE, SMALL_POINTS, TEXT_POINTS, TITLE_POINTS, new_figure, text

FORMATS = (".svg", ".png", ".pdf")
TITLES = {
    "plain": "U-Net (nnU-Net)",
    "residual": "U-Net with residual encoder",
    "unet2015": "U-Net 2015",
    "attention": "Attention U-Net",
    "unetpp": "U-Net++",
    "resnet-unet": "ResNet U-Net",
    "transunet": "TransUNet",
    "swinunetr": "Swin UNETR",
    "unetr": "UNETR",
    "segresnet": "SegResNet",
    "mednext": "MedNeXt",
}
ENCODER, DECODER, BOTTOM, NODE = PALETTE[1], PALETTE[0], PALETTE[4], PALETTE[3]


def network_drawing(
    network: NetworkPlan, patch: Sequence[int], channels: int, outputs: int, parameters: int, path: Path
) -> str:
    """Draw a network as SVG, PNG or PDF, by the ending of ``path``; returns the file's SHA-256.

    Raises:
        EnvironmentFailure: E0501 not writable, E0502 no space.
    """
    stages = len(network.features)
    figure = new_figure(2.4 + 1.5 * stages, 1.6 + 0.85 * stages)
    axes = figure.add_subplot()
    axes.set_axis_off()
    columns = 2 * stages - 1
    axes.set_xlim(-1.6, columns + 0.6)
    axes.set_ylim(-stages + 0.2, 1.0)
    sizes = _sizes(network, patch)
    for stage in range(stages):
        last = stage == stages - 1
        _box(axes, (stage, -stage), network.features[stage], sizes[stage], BOTTOM if last else ENCODER)
        if stage:
            _arrow(axes, (stage - 1, -stage + 1), (stage, -stage), INK)
        if not last:
            right = columns - 1 - stage
            _box(axes, (right, -stage), _decoder_width(network, stage), sizes[stage], DECODER)
            below = (right - 1, -stage - 1)
            _arrow(axes, below, (right, -stage), INK)
            _skip(axes, network, stage, right)
    _ends(axes, network, (channels, outputs, columns))
    axes.set_title(
        text(f"{TITLES[network.name]}: {parameters:,} weights, patch {' × '.join(map(str, patch))}", 100),
        fontsize=TITLE_POINTS,
        color=INK,
        loc="left",
    )
    kind = path.suffix.lower().lstrip(".")
    metadata = {"Date": None} if kind == "svg" else None

    def save(temporary: Path) -> None:
        with rc_context({"svg.hashsalt": "medseg", "svg.fonttype": "path"}):
            figure.savefig(temporary, format=kind, metadata=metadata)

    return commit(path, save)


def _sizes(network: NetworkPlan, patch: Sequence[int]) -> list[tuple[int, ...]]:
    size, found = list(patch), []
    for stride in network.strides:
        size = [math.ceil(n / s) for n, s in zip(size, stride, strict=True)]
        found.append(tuple(size))
    return found


def _decoder_width(network: NetworkPlan, stage: int) -> int:
    return network.features[0] * 2**stage if network.name == "resnet-unet" else network.features[stage]


def _box(axes: Any, place: tuple[float, float], features: int, size: tuple[int, ...], colour: str) -> None:
    x, y = place
    axes.add_patch(Rectangle((x - 0.34, y - 0.22), 0.68, 0.44, facecolor=colour, edgecolor=INK, linewidth=0.8))
    axes.text(x, y, str(features), ha="center", va="center", fontsize=TEXT_POINTS, color=INK)
    label = " × ".join(map(str, size))
    axes.text(x, y + 0.25, label, ha="center", va="bottom", fontsize=SMALL_POINTS - 1, color=FAINT)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str, style: str = "-") -> None:
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=8, shrinkA=20, shrinkB=20, color=colour, linestyle=style
    )
    axes.add_patch(arrow)


def _skip(axes: Any, network: NetworkPlan, stage: int, right: int) -> None:
    """The way from a stage to its decoder: straight, through a gate, or through the nodes of U-Net++."""
    if network.name == "resnet-unet" and stage == 0:
        return
    if network.name == "unetpp":
        places = [stage + (right - stage) * n / (len(network.features) - 1 - stage) for n in range(1, right)]
        inner = [x for x in places if x < right - 0.5][: len(network.features) - 2 - stage]
        for x in inner:
            axes.add_patch(Rectangle((x - 0.2, -stage - 0.13), 0.4, 0.26, facecolor=NODE, edgecolor=INK, zorder=3))
            label = str(network.features[stage])
            axes.text(x, -stage, label, ha="center", va="center", fontsize=SMALL_POINTS - 1, color=INK, zorder=4)
    _arrow(axes, (stage, -stage), (right, -stage), FAINT, "--")
    if network.name == "attention":
        axes.plot([right - 0.75], [-stage], marker="D", markersize=9, color=NODE, markeredgecolor=INK)
        axes.text(right - 0.75, -stage + 0.2, "gate", ha="center", fontsize=SMALL_POINTS - 1, color=INK)


def _ends(axes: Any, network: NetworkPlan, numbers: tuple[int, int, int]) -> None:
    """Input, output, and what is special at the bottom."""
    channels, outputs, columns = numbers
    last = len(network.features) - 1
    plural = "s" if channels > 1 else ""
    axes.text(-0.5, 0, f"{channels} channel{plural} →", ha="right", va="center", fontsize=TEXT_POINTS, color=INK)
    x = columns - 1 if last else 0
    axes.text(x, 0.5, f"↑ {outputs} logits", ha="center", va="bottom", fontsize=TEXT_POINTS, color=INK)
    words = []
    if network.transformer is not None:
        words.append(f"{network.transformer.layers} transformer layers of {network.transformer.width}")
    if network.name in PADDING_NETWORKS:
        words.append("built by MONAI")
    if network.padding == "valid":
        words.append("no padding: logits of the patch's centre")
    if network.checkpointing:
        words.append("checkpointing")
    if words:
        axes.text(last + 0.5, -last, "; ".join(words), ha="left", va="center", fontsize=SMALL_POINTS, color=INK)
