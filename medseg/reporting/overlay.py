"""Overlay: one case's segmentation drawn over its image, in three planes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from medseg.records.grid import Float3
from medseg.reporting import style
from medseg.reporting.scene import Labels, Scene, draw_plane, make_scene, size_mm

WIDEST_INCHES = 13.0
TALLEST_INCHES = 3.8
PICTURE_INCHES = 6.5
LEGEND_COLUMN_INCHES = 2.1
MAX_LEGEND_LABELS = 24


def overlay_picture(
    path: Path,
    image: NDArray[Any],
    prediction: Labels,
    reference: Labels | None,
    spacing_mm: Float3,
    title: str,
    label_names: Sequence[str],
) -> str:
    """Draw a segmentation over its image in three planes (one for a flat image) and commit it as PNG.

    Each plane is cut where prediction and reference differ most, without a reference (or any difference) where the
    labels are largest. Volumes are drawn as radiologists hang them: the patient's right on the left of the picture,
    anterior up in axial and to the left in sagittal planes. A picture (one slice of spacing exactly 1, as pictures
    are read) has no such directions and is drawn as stored.

    Args:
        path: where the PNG goes.
        image: (Z, Y, X), (1, Z, Y, X) or (3, Z, Y, X) in canonical orientation; three channels are red, green, blue,
            of other numbers of channels the first is shown. Its window is wide enough for the labels and half as
            much again on each side, within the 0.5th to 99.5th percentile of the part that is shown.
        prediction: (Z, Y, X) class indices, drawn as solid contours.
        reference: the same, drawn dashed, or None. Values below 0 are not annotated and count as no difference.
        spacing_mm: (z, y, x), for the right proportions.
        title: one line, usually the case's id.
        label_names: name of each class index, background first.

    Returns:
        The file's SHA-256.

    Raises:
        ValueError: the shapes do not belong together.
        EnvironmentFailure: E0501 not writable, E0502 no space.
    """
    scene = make_scene(image, prediction, reference, spacing_mm)
    planes = scene.planes
    widths = [min(max(float(np.divide(*size_mm(scene, plane))), 0.4), 4.0) for plane in planes]
    height = min(WIDEST_INCHES / sum(widths), TALLEST_INCHES if len(planes) > 1 else PICTURE_INCHES)
    handles = _legend(scene, label_names)
    columns = max(1, int(height * sum(widths) / LEGEND_COLUMN_INCHES))
    figure = style.new_figure(max(4.0, height * sum(widths)), height + 0.95 + 0.19 * -(-len(handles) // columns))
    for axes, plane in zip(figure.subplots(1, len(planes), width_ratios=widths, squeeze=False)[0], planes, strict=True):
        draw_plane(axes, scene, plane)
    figure.suptitle(style.text(title), fontsize=style.TITLE_POINTS, color=style.INK)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    legend.set_title(_small_print(scene), prop=FontProperties(size=style.SMALL_POINTS))
    legend.get_title().set_color(style.FAINT)
    for entry in legend.get_texts():
        entry.set_fontsize(style.TEXT_POINTS)
    return style.save_png(figure, path)


def _legend(scene: Scene, names: Sequence[str]) -> list[Artist]:
    """One coloured line per label that is there, with its Dice; then what solid and dashed mean."""
    predicted, expected, both = _voxels(scene, len(names))
    present = [label for label in range(1, len(predicted)) if predicted[label] or expected[label]]
    handles: list[Artist] = []
    for label in present[:MAX_LEGEND_LABELS]:
        name = style.text(names[label] if label < len(names) else f"class {label}", 30)
        if scene.reference is not None:
            name += f" (Dice {2 * both[label] / max(1, predicted[label] + expected[label]):.3f})"
        handles.append(Line2D([], [], color=style.label_colour(label), linewidth=3, label=name))
    if len(present) > MAX_LEGEND_LABELS:
        more = f"and {len(present) - MAX_LEGEND_LABELS} more"
        handles.append(Line2D([], [], linewidth=0, label=more))
    lines = [("prediction", "solid"), ("reference", "dashed")][: 1 if scene.reference is None else 2]
    return handles + [Line2D([], [], color=style.INK, linewidth=1.3, linestyle=s, label=n) for n, s in lines]


def _voxels(scene: Scene, classes: int) -> list[NDArray[np.int64]]:
    """Voxels per class index: in the prediction, in the reference, in both; where the reference is annotated."""
    reference = scene.prediction if scene.reference is None else scene.reference
    known = (reference >= 0) & (scene.prediction >= 0)
    prediction, reference = scene.prediction[known], reference[known]
    length = max(classes, int(prediction.max(initial=0)) + 1, int(reference.max(initial=0)) + 1)
    return [np.bincount(v, minlength=length) for v in (prediction, reference, prediction[prediction == reference])]


def _small_print(scene: Scene) -> str:
    if not scene.oriented:
        return "Shown as stored."
    sides = "Radiological view: the patient's right is on the left of the picture."
    if scene.shape[0] > 1:
        sides = f"{sides[:-1]}; in sagittal planes anterior is on the left."
    cut = scene.prediction.shape != scene.shape
    chosen = "largest labels" if scene.reference is None else "largest error"
    return f"{sides} Slices through the {chosen}{', cut to the labels with context' if cut else ''}."
