"""Borders: labels on a finer grid, interpolating logits only where neighbouring voxels of the network disagree.

Linear interpolation gives a convex combination of the corner voxels. A class that is the largest logit at all corners
of a cell is the largest everywhere in it, and a region that is positive at all corners is positive everywhere. So a
cell whose corners agree needs no logits. Elsewhere only the classes are interpolated that no other class beats at all
corners by more than it varies. Rounding is covered: where the first and the second class are closer at a corner than
what rounding could turn round, the cell counts as a border. The labels are those of interpolating everything in float32
along z, then y, then x, and taking the first of the largest: to the last bit, ties included.

The functions here are compiled at first use. They release the interpreter's lock; whoever calls them shares the rows
among threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.inference.compiled import compiled

if TYPE_CHECKING:
    Floats = NDArray[np.float32]
    Codes = NDArray[np.uint16]
    Axis = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]

MIXED = 65535  # of a cell: its corners differ
TINY = 1e-30  # products of smaller logits with weights may vanish
ROUNDING = 2e-6  # more than seven roundings of 2^-24 on either side, relative to the larger logit
KEPT = 8  # classes remembered per cell; a cell with more of them interpolates all
BLOCK = 2048  # voxels whose best and second-best logits stay in the cache


def _winners_of_classes(logits: Floats, codes: Codes) -> None:
    """(C, N) → (N,) index of the largest logit, the first of equal ones; MIXED where rounding could matter."""
    classes, count = logits.shape
    best, second = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    index = np.empty(BLOCK, np.int32)
    rounding, tiny = np.float32(ROUNDING), np.float32(TINY)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        for v in range(size):
            best[v] = logits[0, start + v]
            second[v] = -np.inf
            index[v] = 0
        for c in range(1, classes):
            row = logits[c, start : start + size]
            for v in range(size):
                value, most = row[v], best[v]
                lower = most if value > most else value
                second[v] = lower if lower > second[v] else second[v]
                index[v] = c if value > most else index[v]
                best[v] = value if value > most else most
        for v in range(size):
            clear = best[v] - second[v] > rounding * abs(best[v]) + tiny
            codes[start + v] = index[v] if clear else MIXED


def _winners_of_regions(logits: Floats, codes: Codes) -> None:
    """(R, N) → (N,) 1 + the last positive region, 0 if there is none; MIXED where a product could vanish."""
    regions, count = logits.shape
    codes[:] = 0
    for r in range(regions):
        for v in range(count):
            if logits[r, v] > 0:
                codes[v] = r + 1 if logits[r, v] > TINY else MIXED


def _merge_corners(codes: Codes, step_z: int, step_y: int, step_x: int) -> None:
    """Voxels (Z, Y, X) → cells in place, along one axis: the code that a voxel and the next one share, or MIXED."""
    depth, height, width = codes.shape
    for z in range(depth - step_z):
        for y in range(height - step_y):
            for x in range(width - step_x):
                if codes[z, y, x] != codes[z + step_z, y + step_y, x + step_x]:
                    codes[z, y, x] = MIXED


def _keep_candidates(
    logits: Floats, cells: Codes, z: int, linear: tuple[bool, bool, bool], kept: Codes, counts: NDArray[np.uint8]
) -> None:
    """The classes that can be the largest somewhere in the MIXED cells of layer ``z``.

    Some class is nowhere in a cell below the largest of all classes' smallest corners; one whose largest corner lies
    below that cannot win.
    """
    classes, depth, height, width = logits.shape
    upper_z = z + 1 if linear[0] and z + 1 < depth else z
    places = np.empty(width, np.int32)
    reach = np.empty(width, np.float32)
    highest = np.empty((classes, width), np.float32)
    for y in range(height):
        mixed = 0
        for x in range(width):
            if cells[z, y, x] == MIXED:
                places[mixed] = x
                reach[mixed] = -np.inf
                mixed += 1
        if mixed == 0:
            continue
        upper_y = y + 1 if linear[1] and y + 1 < height else y
        for c in range(classes):
            a, b = logits[c, z, y], logits[c, z, upper_y]
            d, e = logits[c, upper_z, y], logits[c, upper_z, upper_y]
            for i in range(mixed):
                x = places[i]
                u = x + 1 if linear[2] and x + 1 < width else x
                low = min(min(min(a[x], a[u]), min(b[x], b[u])), min(min(d[x], d[u]), min(e[x], e[u])))
                high = max(max(max(a[x], a[u]), max(b[x], b[u])), max(max(d[x], d[u]), max(e[x], e[u])))
                reach[i] = max(reach[i], low)
                highest[c, i] = high
        for i in range(mixed):
            number = 0
            limit = reach[i] - np.float32(ROUNDING) * abs(reach[i]) - np.float32(TINY)
            for c in range(classes):
                if highest[c, i] + np.float32(ROUNDING) * abs(highest[c, i]) >= limit:
                    if number < KEPT:
                        kept[y, places[i], number] = c
                    number += 1
            counts[y, places[i]] = min(number, KEPT + 1)


def _interpolated(
    volume: Floats, zs: tuple[int, int], ys: tuple[int, int], xs: tuple[int, int], weights: tuple[Any, ...]
) -> Any:
    """One logit between the corners, along z, then y, then x; ``weights`` are lower and upper for each of them."""
    low_z, up_z, low_y, up_y, low_x, up_x = weights
    a = volume[zs[0], ys[0], xs[0]] * low_z + volume[zs[1], ys[0], xs[0]] * up_z
    b = volume[zs[0], ys[0], xs[1]] * low_z + volume[zs[1], ys[0], xs[1]] * up_z
    d = volume[zs[0], ys[1], xs[0]] * low_z + volume[zs[1], ys[1], xs[0]] * up_z
    e = volume[zs[0], ys[1], xs[1]] * low_z + volume[zs[1], ys[1], xs[1]] * up_z
    a = a * low_y + d * up_y
    b = b * low_y + e * up_y
    return a * low_x + b * up_x


def _fill_classes(
    logits: Floats, cells: Codes, z: Axis, y: Axis, x: Axis, linear: tuple[bool, bool, bool], out: NDArray[np.int16]
) -> None:
    """Class indices (rows, Y, X) from (C, z, y, x) logits and their cells; an axis is (lower, upper, their weights)."""
    classes, _, height, width = logits.shape
    kept = np.empty((height, width, KEPT), np.uint16)
    counts = np.zeros((height, width), np.uint8)
    layer = -1
    for i in range(len(z[0])):
        if z[0][i] != layer:
            layer = z[0][i]
            _keep_candidates_compiled(logits, cells, layer, linear, kept, counts)
        for j in range(len(y[0])):
            below = y[0][j]
            for k in range(len(x[0])):
                left = x[0][k]
                code = cells[layer, below, left]
                if code == MIXED:
                    weights = (z[2][i], z[3][i], y[2][j], y[3][j], x[2][k], x[3][k])
                    zs, ys, xs = (layer, z[1][i]), (below, y[1][j]), (left, x[1][k])
                    number = counts[below, left]
                    largest = np.float32(-np.inf)
                    code = 0
                    for n in range(classes if number > KEPT else number):
                        c = n if number > KEPT else kept[below, left, n]
                        value = _interpolated_compiled(logits[c], zs, ys, xs, weights)
                        if value > largest:
                            largest = value
                            code = c
                out[i, j, k] = code


def _fill_regions(
    logits: Floats, cells: Codes, z: Axis, y: Axis, x: Axis, table: NDArray[np.int16], out: NDArray[np.int16]
) -> None:
    """As ``fill_classes`` for regions: the last one that is positive decides; ``table`` maps codes to class indices."""
    for i in range(len(z[0])):
        for j in range(len(y[0])):
            for k in range(len(x[0])):
                code = cells[z[0][i], y[0][j], x[0][k]]
                if code == MIXED:
                    weights = (z[2][i], z[3][i], y[2][j], y[3][j], x[2][k], x[3][k])
                    zs, ys, xs = (z[0][i], z[1][i]), (y[0][j], y[1][j]), (x[0][k], x[1][k])
                    code = 0
                    for r in range(len(logits) - 1, -1, -1):
                        if _interpolated_compiled(logits[r], zs, ys, xs, weights) > 0:
                            code = r + 1
                            break
                out[i, j, k] = table[code]


_interpolated_compiled = compiled(_interpolated)
_keep_candidates_compiled = compiled(_keep_candidates)
winners_of_classes = compiled(_winners_of_classes)
winners_of_regions = compiled(_winners_of_regions)
merge_corners = compiled(_merge_corners)
fill_classes = compiled(_fill_classes)
fill_regions = compiled(_fill_regions)
