"""Network: the drawing of a U-Net, its stages as boxes with their numbers of features, sizes and ways down and up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.patches import FancyArrowPatch, Rectangle

from medseg.artefacts import commit
from medseg.records.network import PADDING_NETWORKS, NetworkPlan
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
ENCODER, DECODER, BOTTOM, NODE = PALETTE[1], PALETTE[0], PALETTE[2], PALETTE[3]
WIDE, HIGH = 0.43, 0.27  # half a box


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
        whole_image = network.name == "resnet-unet" and stage == 0  # handed through
        features = channels if whole_image else network.features[stage]
        _box(axes, (stage, -stage), features, sizes[stage], BOTTOM if last else ENCODER)
        if stage:
            _down(axes, (stage - 1, -stage + 1))
        if not last:
            right = columns - 1 - stage
            _box(axes, (right, -stage), _decoder_width(network, stage), sizes[stage], DECODER)
            if network.name == "unetpp":
                _nodes(axes, network, stage, sizes[stage])
            _up(axes, (right, -stage))
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
        with rc_context({"svg.hashsalt": "medseg", "svg.fonttype": "none"}):  # letters as outlines take 30 kB
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
    look: dict[str, Any] = {"facecolor": colour, "edgecolor": INK, "linewidth": 0.8, "zorder": 3}
    axes.add_patch(Rectangle((x - WIDE, y - HIGH), 2 * WIDE, 2 * HIGH, **look))
    centred: dict[str, Any] = {"ha": "center", "va": "center", "color": INK, "zorder": 4}
    axes.text(x, y + 0.09, str(features), fontsize=TEXT_POINTS + 1, **centred)
    axes.text(x, y - 0.13, " × ".join(map(str, size)), fontsize=SMALL_POINTS - 1, **centred)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str, style: str = "-") -> None:
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=8, shrinkA=1, shrinkB=1, color=colour, linestyle=style, zorder=2
    )
    axes.add_patch(arrow)


def _down(axes: Any, place: tuple[float, float]) -> None:
    """From a stage to the next coarser one."""
    x, y = place
    _arrow(axes, (x + WIDE - 0.1, y - HIGH), (x + 1 - WIDE + 0.1, y - 1 + HIGH), INK)


def _up(axes: Any, place: tuple[float, float]) -> None:
    """To a node from the one below on its left."""
    x, y = place
    _arrow(axes, (x - 1 + WIDE - 0.1, y - 1 + HIGH), (x - WIDE + 0.1, y - HIGH), INK)


def _nodes(axes: Any, network: NetworkPlan, stage: int, size: tuple[int, ...]) -> None:
    """The inner nodes of U-Net++ on a stage; each also sees all nodes on its left, and the one below."""
    for column in range(1, len(network.features) - 1 - stage):
        place = (stage + 2 * column, -stage)
        _box(axes, place, network.features[stage], size, NODE)
        _up(axes, place)


def _skip(axes: Any, network: NetworkPlan, stage: int, right: int) -> None:
    """The way from a stage to its decoder: straight, through a gate, or past the nodes of U-Net++."""
    if network.name == "resnet-unet" and stage == 0:
        return
    _arrow(axes, (stage + WIDE, -stage), (right - WIDE, -stage), FAINT, "--")
    if network.name == "attention":
        axes.plot([right - 0.72], [-stage], marker="D", markersize=9, color=NODE, markeredgecolor=INK, zorder=3)
        axes.text(right - 0.72, -stage + 0.18, "gate", ha="center", fontsize=SMALL_POINTS - 1, color=INK)


def _ends(axes: Any, network: NetworkPlan, numbers: tuple[int, int, int]) -> None:
    """Input, output, and what is special at the bottom."""
    channels, outputs, columns = numbers
    last = len(network.features) - 1
    plural = "s" if channels > 1 else ""
    axes.text(-WIDE - 0.1, 0, f"{channels} channel{plural} →", ha="right", va="center", fontsize=TEXT_POINTS, color=INK)
    x = columns - 1 if last else 0
    axes.text(x, HIGH + 0.08, f"↑ {outputs} logits", ha="center", va="bottom", fontsize=TEXT_POINTS, color=INK)
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
        axes.text(last + WIDE + 0.1, -last, "; ".join(words), ha="left", va="center", fontsize=SMALL_POINTS, color=INK)
