"""Style: the colours, sizes and lettering that all figures share, and how a figure becomes a file."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patheffects import withStroke

from medseg.artefacts import commit
from medseg.errors import escape

# Okabe and Ito, "Color Universal Design" (2008): told apart with every form of colour blindness. Black is left out and
# the order puts the colours that stand out on grey tissue first.
PALETTE = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")

INK = "#222222"
FAINT = "#8A8A8A"
GRID = "#DDDDDD"

DPI = 130
TITLE_POINTS = 12
TEXT_POINTS = 9
SMALL_POINTS = 7.5

OUTLINE = (withStroke(linewidth=2, foreground="black"),)

Rgb = tuple[float, float, float]


def label_colour(index: int) -> Rgb:
    """Colour of the label with class index 1, 2, …; from the 8th on lighter, from the 15th on darker, then again."""
    colour = to_rgb(PALETTE[(index - 1) % len(PALETTE)])
    shade = (index - 1) // len(PALETTE) % 3
    if shade == 0:
        return colour
    towards, share = (1.0, 0.55) if shade == 1 else (0.0, 0.4)
    red, green, blue = (c + (towards - c) * share for c in colour)
    return red, green, blue


def hex_colour(index: int) -> str:
    """``label_colour`` as ``#rrggbb``."""
    return to_hex(label_colour(index))


def text(value: object, limit: int = 60) -> str:
    """``value`` as it may stand in a figure: one line, cut to ``limit`` characters, never read as a formula.

    Characters that the font cannot draw become ``?`` (else every one of them is a warning).
    """
    line = escape(str(value))
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else "?" for c in line).replace("$", r"\$")


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty white figure that draws into memory and shares no state with others, so any thread may have one."""
    figure = Figure(figsize=(width_inches, height_inches), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Any) -> None:
    """Light grid, no box: for curves."""
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=TEXT_POINTS, colors=INK, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def jpeg(figure: Figure) -> bytes:
    """The figure as JPEG, the same bytes for the same figure: for pages that hold many pictures of tissue."""
    buffer = BytesIO()
    options = {"quality": 82, "optimize": True, "subsampling": 0}  # full colour: outlines are one pixel wide
    figure.savefig(buffer, format="jpeg", pil_kwargs=options)
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> str:
    """Commit the figure as PNG, whatever the ending of ``path``; returns the file's SHA-256.

    Raises:
        EnvironmentFailure: E0501 not writable, E0502 no space.
    """
    return commit(path, lambda temporary: figure.savefig(temporary, format="png"))
