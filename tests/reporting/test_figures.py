"""Figures: decoded and looked at where a test can look — size, proportions, sides, colours."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from medseg.errors import EnvironmentFailure
from medseg.reporting import style
from medseg.reporting.figures import HistoryPoint, overlay_picture, training_picture

NAMES = ["background", "outer", "inner"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def count_colour(picture: np.ndarray, colour: object, tolerance: int = 12) -> int:
    wanted = np.round(np.array(colour) * 255)
    return int((np.abs(picture - wanted).max(axis=-1) <= tolerance).sum())


def phantom(shape: tuple[int, int, int] = (11, 24, 31)) -> tuple[np.ndarray, np.ndarray]:
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    radius = ((z - shape[0] / 2) / 4) ** 2 + ((y - shape[1] / 2) / 7) ** 2 + ((x - shape[2] / 2) / 9) ** 2
    labels = np.where(radius < 0.2, 2, np.where(radius < 1, 1, 0)).astype(np.int16)
    return np.random.default_rng(0).normal(100 + 50 * labels, 5).astype(np.float32), labels


def panel(picture: np.ndarray) -> np.ndarray:
    """The part of a one-panel figure that is filled with the image, found by its dark pixels."""
    dark = picture.max(axis=-1) < 60
    rows, columns = np.flatnonzero(dark.mean(axis=1) > 0.3), np.flatnonzero(dark.mean(axis=0) > 0.3)
    return picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def test_an_overlay_shows_every_label_in_its_colour(tmp_path):
    image, labels = phantom()
    digest = overlay_picture(tmp_path / "a.png", image, labels, None, (2.5, 0.9, 0.8), "case", NAMES)
    assert len(digest) == 64
    picture = pixels(tmp_path / "a.png")
    assert picture.shape[1] > 1.8 * picture.shape[0]  # three planes side by side
    for label in (1, 2):
        assert count_colour(picture, style.label_colour(label)) > 300
    assert count_colour(picture, style.label_colour(3)) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_reference_adds_its_dashed_outline_and_the_dice(tmp_path):
    image, labels = phantom()
    alone = overlay_picture(tmp_path / "a.png", image, labels, None, (2.5, 0.9, 0.8), "case", NAMES)
    moved = np.roll(labels, 3, axis=2)
    both = overlay_picture(tmp_path / "b.png", image, labels, moved, (2.5, 0.9, 0.8), "case", NAMES)
    assert alone != both
    colour = style.label_colour(1)
    assert count_colour(pixels(tmp_path / "b.png"), colour) > count_colour(pixels(tmp_path / "a.png"), colour) + 100


@pytest.mark.parametrize("flat_axis", [0, 1, 2])
def test_the_highest_indices_are_drawn_top_left_in_every_plane(tmp_path, flat_axis):
    """Superior and anterior up, right on the left; in the sagittal plane anterior on the left."""
    shape = [40, 44, 50]
    shape[flat_axis] = 1
    image = np.zeros(shape, np.float32)
    image[tuple(slice(0, 1) if n == 1 else slice(3 * n // 4, n) for n in shape)] = 1
    none = np.zeros(shape, np.int16)
    overlay_picture(tmp_path / "a.png", image, none, None, (1.5, 1.5, 1.5), "case", NAMES)
    bright = panel(pixels(tmp_path / "a.png")).min(axis=-1) > 200
    rows, columns = bright.shape
    assert bright[: rows // 5, : columns // 5].mean() > 0.9
    assert bright[rows // 2 :].mean() < 0.05
    assert bright[:, columns // 2 :].mean() < 0.05


def test_a_picture_is_drawn_as_stored_in_its_colours(tmp_path):
    image = np.zeros((3, 1, 60, 80), np.uint8)
    image[0, 0, :20, :20] = 200  # red, top left
    labels = np.zeros((1, 60, 80), np.int16)
    labels[0, 40:50, 50:70] = 1
    overlay_picture(tmp_path / "a.png", image, labels, labels, (1.0, 1.0, 1.0), "picture", NAMES)
    found = panel(pixels(tmp_path / "a.png"))
    red = (found[..., 0] > 150) & (found[..., 1:].max(axis=-1) < 60)
    rows, columns = red.shape
    assert red[: rows // 4, : columns // 5].mean() > 0.9
    assert columns / rows == pytest.approx(80 / 60, rel=0.03)
    assert count_colour(found[rows // 2 :, columns // 2 :], style.label_colour(1)) > 200


def test_proportions_follow_the_spacing(tmp_path):
    image = np.zeros((1, 30, 40), np.float32)
    image[0, 5, 5] = 1
    labels = np.zeros((1, 30, 40), np.int16)
    overlay_picture(tmp_path / "a.png", image, labels, None, (5.0, 2.0, 0.7), "case", NAMES)
    rows, columns = panel(pixels(tmp_path / "a.png")).shape[:2]
    assert columns / rows == pytest.approx(40 * 0.7 / (30 * 2.0), rel=0.03)


def test_odd_volumes_and_names_are_drawn_without_a_warning(tmp_path):
    image, labels = phantom()
    broken = image.copy()
    broken[0, 0, 0], broken[5, 5, 5] = np.nan, np.inf
    ignored = labels.copy()
    ignored[:, :10] = -1
    title = "$\\frac{a}$ _x_ \n 肝臓 " + "long " * 40
    names = ["background", "_hidden", "$x$ 肝"]
    spacing = (2.5, 0.9, 0.8)
    overlay_picture(tmp_path / "1.png", broken, labels, ignored, spacing, title, names)
    overlay_picture(tmp_path / "2.png", np.zeros_like(image), np.zeros_like(labels), None, spacing, "", names)
    overlay_picture(tmp_path / "3.png", np.full_like(image, np.nan), labels, labels, spacing, "", names[:1])
    overlay_picture(tmp_path / "4.png", image[None], labels, np.zeros_like(labels), spacing, "", names)
    one = np.ones((1, 1, 1), np.int16)
    overlay_picture(tmp_path / "5.png", one.astype(np.float32), one, one, (1.0, 1.0, 1.0), "", names)
    thin = np.zeros((2, 3, 400), np.int16)
    thin[1, 1, 200:] = 1
    overlay_picture(tmp_path / "6.png", thin.astype(np.int32), thin, None, (8.0, 0.1, 0.1), "", names)
    for number in range(1, 7):
        assert pixels(tmp_path / f"{number}.png").std() > 5
    with Image.open(tmp_path / "1.png") as picture:
        assert max(picture.size) < 2500


def test_more_labels_than_the_legend_holds_are_summed_up(tmp_path):
    labels = (np.arange(6 * 10 * 15).reshape(6, 10, 15) % 41).astype(np.int16)
    overlay_picture(tmp_path / "a.png", labels.astype(np.float32), labels, None, (2.0, 1.0, 1.1), "many", ["b"] * 41)
    assert pixels(tmp_path / "a.png").shape[0] < 1200


def test_labels_of_another_shape_are_refused(tmp_path):
    image, labels = phantom()
    for wrong in (labels[1:], labels[None]):
        with pytest.raises(ValueError, match="do not lie"):
            overlay_picture(tmp_path / "a.png", image, wrong, None, (1.0, 1.0, 2.0), "", NAMES)
        with pytest.raises(ValueError, match="do not lie"):
            overlay_picture(tmp_path / "a.png", image, labels, wrong, (1.0, 1.0, 2.0), "", NAMES)
    assert not list(tmp_path.iterdir())


def test_many_threads_draw_the_same_bytes(tmp_path):
    image, labels = phantom()

    def draw(number: int) -> str:
        return overlay_picture(tmp_path / f"{number}.png", image, labels, None, (2.5, 0.9, 0.8), "case", NAMES)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(draw, range(8)))) == 1


def history(labels: int = 2) -> list[HistoryPoint]:
    points = []
    for step in range(0, 2000, 20):
        dice = (
            {f"label {i}": (1 - np.exp(-step / 400)) / (1 + 0.5 * i) for i in range(labels)} if step % 200 == 0 else {}
        )
        points.append(
            HistoryPoint(
                step=step,
                seconds=step * 0.3,
                train_loss=float(np.exp(-step / 300)) if step != 400 else float("nan"),
                validation_loss=0.2 + float(np.exp(-step / 300)) if dice else None,
                learning_rate=0.01 * (1 - step / 2000) ** 0.9,
                mean_dice=float(np.mean(list(dice.values()))) if dice else None,
                dice=dice,
            )
        )
    return points


def test_a_training_picture_shows_losses_and_every_label(tmp_path):
    training_picture(tmp_path / "progress.png", history())
    picture = pixels(tmp_path / "progress.png")
    for colour in (style.label_colour(1), style.label_colour(2), (0x22 / 255,) * 3):
        assert count_colour(picture, colour) > 300
    many = training_picture(tmp_path / "many.png", history(labels=14))
    assert many
    assert count_colour(pixels(tmp_path / "many.png"), style.label_colour(1)) == 0  # grey lines and the mean


def test_parts_of_the_loss_the_moving_average_and_the_waiting_are_drawn_where_they_are_known(tmp_path):
    training_picture(tmp_path / "a.png", history())
    more = [
        replace(
            point,
            losses={"CE": 0.3, "Dice": -0.4},
            smoothed_dice=0.25 if point.dice else None,
            wait_share=None if point.step < 500 else 0.5,
        )
        for point in history()
    ]
    training_picture(tmp_path / "b.png", more)
    before, after = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert before.shape == after.shape
    waiting, training = to_rgb(style.PALETTE[5]), to_rgb(style.PALETTE[6])
    assert count_colour(after, waiting) > count_colour(before, waiting) + 300
    assert count_colour(after, training) > count_colour(before, training) + 300


def test_time_runs_below_the_steps_even_if_it_stands_still_for_a_while(tmp_path):
    plain = [HistoryPoint(step, 0.0, train_loss=1.0) for step in range(50)]
    timed = [HistoryPoint(step, 3600.0 * (step // 10), train_loss=1.0) for step in range(50)]
    training_picture(tmp_path / "plain.png", plain)
    training_picture(tmp_path / "timed.png", timed)
    lowest = [pixels(tmp_path / name)[-90:].min(axis=-1) < 120 for name in ("plain.png", "timed.png")]
    assert lowest[1].sum() > 1.3 * lowest[0].sum()


def test_short_and_empty_histories_give_pictures_too(tmp_path):
    bare = HistoryPoint(step=0, seconds=0.0)
    absent = HistoryPoint(step=10, seconds=1.0, train_loss=float("inf"), dice={"never there": None})
    for points in ([], [bare], [bare, absent], history()[:1]):
        training_picture(tmp_path / "progress.png", points)
        assert pixels(tmp_path / "progress.png").shape == (1170, 1170, 3)


def test_a_picture_replaces_the_one_before_or_leaves_it(tmp_path):
    path = tmp_path / "progress.png"
    first = training_picture(path, history()[:5])
    assert training_picture(path, history()) != first
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(EnvironmentFailure, match="E0501"):
        training_picture(tmp_path / "file" / "progress.png", history())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "progress.png"]


def test_neighbouring_labels_have_different_colours():
    colours = [style.label_colour(index) for index in range(1, 22)]
    assert len(set(colours)) == 21
    assert style.label_colour(22) == style.label_colour(1)
