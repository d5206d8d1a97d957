"""Overlay: one case's segmentation drawn over its image, in three planes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from medseg.imaging.components import bounding_box
from medseg.records.grid import Float3, Int3
from medseg.reporting import style

Labels = NDArray[np.integer]

WIDEST_INCHES = 13.0
TALLEST_INCHES = 3.8
PICTURE_INCHES = 6.5
LEGEND_COLUMN_INCHES = 2.1
MAX_LEGEND_LABELS = 24
_PERCENTILES = (0.5, 99.5)
_WINDOW_VOXELS = 1_000_000
_CONTEXT = 0.5  # of the labels' extent is shown around them on each side …
_LEAST_VIEW = 0.4  # … and at least this share of the image along each axis


@dataclass(frozen=True, slots=True)
class _Plane:
    """A slicing direction: the axis it cuts, and what lies at the left, right, top and bottom once drawn."""

    name: str
    axis: int
    sides: str


_PLANES = (_Plane("axial", 0, "RLAP"), _Plane("coronal", 1, "RLSI"), _Plane("sagittal", 2, "APSI"))


@dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """The cut-out of one case that is drawn; ``oriented`` if its axes have directions in the patient."""

    image: NDArray[Any]  # (Z, Y, X) or (Z, Y, X, 3)
    prediction: Labels
    reference: Labels | None
    spacing_mm: Float3
    oriented: bool
    first: Int3  # index in the volume of the cut-out's first voxel
    shape: Int3  # of the volume
    window: tuple[float, float]  # shown from black to white


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
    for labels in (prediction, reference):
        if labels is not None and (labels.ndim != 3 or labels.shape != image.shape[-3:]):
            raise ValueError(f"labels of shape {labels.shape} do not lie on an image of shape {image.shape}")
    scene = _scene(image, prediction, reference, spacing_mm)
    planes = [plane for plane in _PLANES if scene.shape[plane.axis] == 1][:1] or list(_PLANES)
    widths = [min(max(float(np.divide(*_size_mm(scene, plane))), 0.4), 4.0) for plane in planes]
    height = min(WIDEST_INCHES / sum(widths), TALLEST_INCHES if len(planes) > 1 else PICTURE_INCHES)
    handles = _legend(scene, label_names)
    columns = max(1, int(height * sum(widths) / LEGEND_COLUMN_INCHES))
    figure = style.new_figure(max(4.0, height * sum(widths)), height + 0.95 + 0.19 * -(-len(handles) // columns))
    for axes, plane in zip(figure.subplots(1, len(planes), width_ratios=widths, squeeze=False)[0], planes, strict=True):
        _draw_plane(axes, scene, plane)
    figure.suptitle(style.text(title), fontsize=style.TITLE_POINTS, color=style.INK)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    legend.set_title(_small_print(scene), prop=FontProperties(size=style.SMALL_POINTS))
    legend.get_title().set_color(style.FAINT)
    for entry in legend.get_texts():
        entry.set_fontsize(style.TEXT_POINTS)
    return style.save_png(figure, path)


def _scene(image: NDArray[Any], prediction: Labels, reference: Labels | None, spacing_mm: Float3) -> _Scene:
    """Cut the case to what is worth showing; pictures are shown whole."""
    shown = image
    if image.ndim == 4:
        shown = np.moveaxis(image, 0, -1) if len(image) == 3 else image[0]
    marked = prediction > 0 if reference is None else (prediction > 0) | (reference > 0)
    oriented = marked.shape[0] > 1 or any(s != 1 for s in spacing_mm)
    view = _view(bounding_box(marked) if oriented else None, marked.shape)
    return _Scene(
        image=shown[view],
        prediction=prediction[view],
        reference=None if reference is None else reference[view],
        spacing_mm=spacing_mm,
        oriented=oriented,
        first=(view[0].start, view[1].start, view[2].start),
        shape=prediction.shape,
        window=_window(shown[view], marked[view]),
    )


def _view(box: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The labels' box with context around it, inside the volume; all of it without a box."""
    if box is None:
        return tuple(slice(0, n) for n in shape)
    view = []
    for side, n in zip(box, shape, strict=True):
        size = max((1 + 2 * _CONTEXT) * (side.stop - side.start), _LEAST_VIEW * n)
        middle = (side.start + side.stop) / 2
        view.append(slice(max(0, int(middle - size / 2)), min(n, int(np.ceil(middle + size / 2)))))
    return tuple(view)


def _slice_to_show(scene: _Scene, axis: int) -> int:
    """Index of the slice with most differing voxels, else with most labelled ones, else the middle one."""
    others = tuple(i for i in range(3) if i != axis)
    candidates = [scene.prediction > 0]
    if scene.reference is not None:
        wrong = (scene.prediction != scene.reference) & (scene.reference >= 0)
        candidates = [wrong, (scene.prediction > 0) | (scene.reference > 0)]
    for voxels in candidates:
        if voxels.any():
            return int(np.argmax(np.count_nonzero(voxels, axis=others)))
    return int(scene.prediction.shape[axis] // 2)


def _draw_plane(axes: Any, scene: _Scene, plane: _Plane) -> None:
    index = _slice_to_show(scene, plane.axis)

    def hung(array: NDArray[Any]) -> NDArray[Any]:
        cut: NDArray[Any] = array.take(index, axis=plane.axis)
        return cut[::-1, ::-1] if scene.oriented else cut  # canonical indices grow upwards and to the left

    width, height = _size_mm(scene, plane)
    pixels = _windowed(hung(scene.image), scene.window)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="bilinear")
    axes.set_facecolor("black")
    _draw_contours(axes, hung(scene.prediction), (width, height), "solid")
    if scene.reference is not None:
        _draw_contours(axes, hung(scene.reference), (width, height), (0, (2.2, 1.6)))
    if scene.oriented:
        number, total = scene.first[plane.axis] + index + 1, scene.shape[plane.axis]
        axes.set_title(f"{plane.name}, slice {number} of {total}", fontsize=style.TEXT_POINTS, color=style.INK)
        _write_sides(axes, plane.sides)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=(), yticks=())


def _draw_contours(axes: Any, labels: Labels, size_mm: tuple[float, float], line: Any) -> None:
    """Outline every label of a slice halfway between the centres of voxels inside and outside it."""
    rows, columns = labels.shape
    x = (np.arange(-1, columns + 1) + 0.5) * (size_mm[0] / columns)
    y = (np.arange(-1, rows + 1) + 0.5) * (size_mm[1] / rows)
    for label in np.unique(labels[labels > 0]):
        mask = np.pad(labels == label, 1).astype(np.float32)
        axes.contour(
            x, y, mask, levels=[0.5], colors=[style.label_colour(int(label))], linewidths=1.3, linestyles=[line]
        )


def _write_sides(axes: Any, sides: str) -> None:
    left, right = (0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center")
    top, bottom = (0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom")
    places = (left, right, top, bottom)
    for letter, (x, y, horizontal, vertical) in zip(sides, places, strict=True):
        text = axes.text(x, y, letter, transform=axes.transAxes, ha=horizontal, va=vertical)
        text.set(color="white", fontsize=style.TEXT_POINTS, path_effects=style.OUTLINE)


def _size_mm(scene: _Scene, plane: _Plane) -> tuple[float, float]:
    """Width and height of a plane of the cut-out."""
    row, column = (i for i in range(3) if i != plane.axis)
    lengths = [n * s for n, s in zip(scene.prediction.shape, scene.spacing_mm, strict=True)]
    return lengths[column], lengths[row]


def _window(image: NDArray[Any], marked: NDArray[np.bool_]) -> tuple[float, float]:
    """Lowest and highest value to show: what the labels need and half as much on each side, without outliers."""
    every = max(1, round((marked.size / _WINDOW_VOXELS) ** (1 / 3)))
    thin = (slice(None, None, every),) * 3

    def percentiles(values: NDArray[Any]) -> tuple[float, float]:
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, _PERCENTILES) if finite.size else (0.0, 0.0)
        return float(low), float(high)

    low, high = percentiles(image[thin])
    inner, outer = percentiles(image[thin][marked[thin]])
    if outer > inner:
        margin = (outer - inner) / 2
        low, high = max(low, inner - margin), min(high, outer + margin)
    return low, high if high > low else low + 1


def _windowed(plane: NDArray[Any], window: tuple[float, float]) -> NDArray[np.float64]:
    """Grey values or colours of a slice in 0 to 1; what is not a number is black."""
    low, high = window
    values: NDArray[np.float64] = np.nan_to_num(plane.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.clip((values - low) / (high - low), 0, 1)


def _legend(scene: _Scene, names: Sequence[str]) -> list[Artist]:
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


def _voxels(scene: _Scene, classes: int) -> list[NDArray[np.int64]]:
    """Voxels per class index: in the prediction, in the reference, in both; where the reference is annotated."""
    reference = scene.prediction if scene.reference is None else scene.reference
    known = (reference >= 0) & (scene.prediction >= 0)
    prediction, reference = scene.prediction[known], reference[known]
    length = max(classes, int(prediction.max(initial=0)) + 1, int(reference.max(initial=0)) + 1)
    return [np.bincount(v, minlength=length) for v in (prediction, reference, prediction[prediction == reference])]


def _small_print(scene: _Scene) -> str:
    if not scene.oriented:
        return "Shown as stored."
    sides = "Radiological view: the patient's right is on the left of the picture."
    if scene.shape[0] > 1:
        sides = f"{sides[:-1]}; in sagittal planes anterior is on the left."
    cut = scene.prediction.shape != scene.shape
    chosen = "largest labels" if scene.reference is None else "largest error"
    return f"{sides} Slices through the {chosen}{', cut to the labels with context' if cut else ''}."
