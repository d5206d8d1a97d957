"""Scene: the part of a case that is worth showing, how it is hung, and how its slices and outlines are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.components import bounding_box
from medseg.records.grid import Float3, Int3
from medseg.reporting import style

Labels = NDArray[np.integer]

_PERCENTILES = (0.5, 99.5)
_WINDOW_VOXELS = 1_000_000
_CONTEXT = 0.5  # of the labels' extent is shown around them on each side …
_LEAST_VIEW = 0.4  # … and at least this share of the image along each axis


@dataclass(frozen=True, slots=True)
class Plane:
    """A slicing direction: the axis it cuts, and what lies at the left, right, top and bottom once drawn."""

    name: str
    axis: int
    sides: str


PLANES = (Plane("axial", 0, "RLAP"), Plane("coronal", 1, "RLSI"), Plane("sagittal", 2, "APSI"))


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """The cut-out of one case that is drawn; ``oriented`` if its axes have directions in the patient."""

    image: NDArray[Any]  # (Z, Y, X) or (Z, Y, X, 3)
    prediction: Labels
    reference: Labels | None
    spacing_mm: Float3
    oriented: bool
    first: Int3  # index in the volume of the cut-out's first voxel
    shape: Int3  # of the volume
    window: tuple[float, float]  # shown from black to white

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes to show: three, or of a flat image the one it is."""
        return tuple(plane for plane in PLANES if self.shape[plane.axis] == 1)[:1] or PLANES


def make_scene(image: NDArray[Any], prediction: Labels, reference: Labels | None, spacing_mm: Float3) -> Scene:
    """Cut the case to what is worth showing; pictures are shown whole.

    Args:
        image: (Z, Y, X), (1, Z, Y, X) or (3, Z, Y, X) in canonical orientation; three channels are red, green, blue,
            of other numbers of channels the first is shown.
        prediction: (Z, Y, X) class indices.
        reference: the same, or None.
        spacing_mm: (z, y, x).

    Raises:
        ValueError: the shapes do not belong together.
    """
    for labels in (prediction, reference):
        if labels is not None and (labels.ndim != 3 or labels.shape != image.shape[-3:]):
            raise ValueError(f"labels of shape {labels.shape} do not lie on an image of shape {image.shape}")
    shown = image
    if image.ndim == 4:
        shown = np.moveaxis(image, 0, -1) if len(image) == 3 else image[0]
    marked = prediction > 0 if reference is None else (prediction > 0) | (reference > 0)
    oriented = marked.shape[0] > 1 or any(s != 1 for s in spacing_mm)
    view = _view(bounding_box(marked) if oriented else None, marked.shape)
    return Scene(
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


def slice_to_show(scene: Scene, axis: int) -> int:
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


def describe_slice(scene: Scene, plane: Plane) -> str:
    """``axial, slice 12 of 35``: the slice that is drawn, counted in the volume from 1."""
    number = scene.first[plane.axis] + slice_to_show(scene, plane.axis) + 1
    return f"{plane.name}, slice {number} of {scene.shape[plane.axis]}"


def draw_plane(axes: Any, scene: Scene, plane: Plane) -> None:
    """Draw the chosen slice of a plane with its outlines: prediction solid, reference dashed; in mm."""
    index = slice_to_show(scene, plane.axis)

    def hung(array: NDArray[Any]) -> NDArray[Any]:
        cut: NDArray[Any] = array.take(index, axis=plane.axis)
        return cut[::-1, ::-1] if scene.oriented else cut  # canonical indices grow upwards and to the left

    width, height = size_mm(scene, plane)
    pixels = windowed(hung(scene.image), scene.window)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="bilinear")
    axes.set_facecolor("black")
    _draw_contours(axes, hung(scene.prediction), (width, height), "solid")
    if scene.reference is not None:
        _draw_contours(axes, hung(scene.reference), (width, height), (0, (2.2, 1.6)))
    if scene.oriented:
        axes.set_title(describe_slice(scene, plane), fontsize=style.TEXT_POINTS, color=style.INK)
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


def size_mm(scene: Scene, plane: Plane) -> tuple[float, float]:
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


def windowed(plane: NDArray[Any], window: tuple[float, float]) -> NDArray[np.float64]:
    """Grey values or colours of a slice in 0 to 1; what is not a number is black."""
    low, high = window
    values: NDArray[np.float64] = np.nan_to_num(plane.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.clip((values - low) / (high - low), 0, 1)
