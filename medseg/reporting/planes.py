"""Planes: one case's segmentation over its image, each plane a picture of its own, for pages that arrange them."""

from __future__ import annotations

from dataclasses import dataclass

from medseg.reporting import style
from medseg.reporting.scene import Plane, Scene, describe_slice, draw_plane, size_mm

PICTURE_INCHES = 3.2  # of the longer side: 416 pixels, as wide as a page shows it


@dataclass(frozen=True, slots=True)
class PlanePicture:
    """One slice as JPEG, with the words that say which it is."""

    caption: str
    jpeg: bytes
    width: int
    height: int


def plane_pictures(scene: Scene) -> tuple[PlanePicture, ...]:
    """Three planes, one of a flat image, each cut where most voxels are wrong; prediction solid, reference dashed.

    Without a reference (or any difference) they are cut where the labels are largest. The same scene gives the same
    bytes.
    """
    return tuple(_picture(scene, plane) for plane in scene.planes)


def _picture(scene: Scene, plane: Plane) -> PlanePicture:
    width, height = size_mm(scene, plane)
    scale = PICTURE_INCHES / max(width, height)
    inches = max(0.5, width * scale), max(0.5, height * scale)
    figure = style.new_figure(*inches)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    draw_plane(axes, scene, plane)
    axes.set_title("")
    axes.set_aspect("auto")
    axes.set_axis_off()
    caption = describe_slice(scene, plane) if scene.oriented else "as stored"
    pixels = [round(side * style.DPI) for side in inches]
    return PlanePicture(caption, style.jpeg(figure), *pixels)
