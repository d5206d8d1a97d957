"""The parts of a page: charts, the drawing of the network, flags, methods, small volumes."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import io
import math
import re
from typing import get_args
from xml.etree import ElementTree

import made_up
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.measure import block_reduce

from medseg.records.model import PostProcessing
from medseg.records.network import NetworkName, NetworkPlan
from medseg.records.run import CaseOutcome
from medseg.records.selection import Candidate, Member, Selection
from medseg.reporting import cutout as cutouts
from medseg.reporting.charts import Axis, Group, Line, box_plot, line_chart, linear_axis, log_axis, whiskers
from medseg.reporting.content import Training
from medseg.reporting.curves import HistoryPoint
from medseg.reporting.cutout import cut_out
from medseg.reporting.drawing import inline_network, sizes
from medseg.reporting.flags import flags_of_quality, flags_of_scores, flags_of_volumes, usual_volumes
from medseg.reporting.methods import methods_text
from medseg.reporting.network import TITLES
from medseg.reporting.planes import plane_pictures
from medseg.reporting.report import render_report
from medseg.reporting.scene import make_scene
from medseg.reporting.sections import selection_table, training_charts, worst_table
from medseg.reporting.sources import NETWORKS, SOURCES

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(finite, max_size=20))
def test_a_linear_axis_holds_its_values_and_its_ticks_are_few(values):
    axis = linear_axis(values)
    assert axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 8
    rounding = 1e-8 * (axis.high - axis.low)
    assert all(axis.low - rounding <= v <= axis.high + rounding for v in values)
    places = [axis.place(v) for v in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= p <= 1 for p in places)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_a_logarithmic_axis_holds_its_values_and_equal_ratios_are_equally_far(values):
    axis = log_axis(values)
    assert axis.low <= min(values) * (1 + 1e-9)
    assert axis.high >= max(values) * (1 - 1e-9)
    assert 1 <= len(axis.ticks) <= 9
    middle = math.sqrt(axis.low * axis.high)
    assert axis.place(middle) == pytest.approx(0.5)


def test_the_box_is_at_the_quartiles_and_infinite_values_stand_at_the_end():
    values = (*np.random.default_rng(1).gamma(2, 3, 41).tolist(), math.inf)
    axis = Axis(0, 40, (0.0, 40.0))
    group = Group("organ", 1, values, tuple(f"case {i}" for i in range(42)))
    svg = ElementTree.fromstring(str(box_plot([group], axis, "mm", "words")))
    (box,) = [r for r in svg.iter("rect") if r.get("class") == "box"]
    circles = [float(c.get("cx")) for c in svg.iter("circle")]
    zero, width = 100, 360 - 100 - 12
    q1, q3 = np.quantile(values[:-1], (0.25, 0.75))
    assert float(box.get("x")) == pytest.approx(zero + width * q1 / 40, abs=0.06)
    assert float(box.get("width")) == pytest.approx(width * (q3 - q1) / 40, abs=0.11)
    assert len(circles) == 42
    assert circles[-1] == zero + width
    assert svg.findall("circle")[-1].find("title").text == "case 41: infinite"


def test_whiskers_end_at_the_last_points_within_one_and_a_half_boxes():
    values = np.array([0, 10, 11, 12, 13, 14, 15, 40.0])
    assert whiskers(values) == (10, 15)


def test_many_points_are_not_drawn_one_by_one():
    values = np.random.default_rng(0).normal(0.8, 0.05, 3000).clip(0, 1)
    names = tuple(str(i) for i in range(3000))
    svg = box_plot([Group("organ", 1, tuple(values), names)], Axis(0, 1, (0.0, 1.0)), "", "")
    low, high = whiskers(values)
    assert svg.count("<circle") == np.count_nonzero((values < low) | (values > high))


def test_a_line_has_gaps_where_values_are_missing():
    y = np.array([1.0, 2, np.nan, 4, np.nan, 6, 7])
    svg = line_chart([Line("a", np.arange(7.0), y, 1)], linear_axis([0, 8]), "step", "words")
    (path,) = re.findall(r'class="line" d="([^"]+)"', svg)
    assert path.count("M") == 3
    assert path.count("L") == 2


def test_long_lines_are_thinned_but_keep_their_course():
    x = np.arange(100_000.0)
    svg = line_chart([Line("a", x, np.sin(x / 9000), 1)], linear_axis([-1, 1]), "step", "words")
    assert len(svg) < 8000
    heights = [float(v) for v in re.findall(r"[ML][\d.]+ ([\d.]+)", re.findall(r'd="(M[^"]+)" stroke', svg)[0])]
    assert min(heights) < 12
    assert max(heights) > 188


@pytest.mark.parametrize("stages", [1, 2, 3, 7])
def test_the_drawing_has_a_box_for_every_stage(stages):
    plan = made_up.plan()
    network = NetworkPlan(
        name="residual",
        features=(32,) * stages,
        kernels=((3, 3),) * stages,
        strides=((1, 1), *((2, 2),) * (stages - 1)),
        convs_encoder=(1,) * stages,
        convs_decoder=(1,) * (stages - 1),
    )
    changes = {"network": network, "patch_size": (128, 192), "spacing_mm": (1.0, 1.0), "median_shape": (1.0, 1.0)}
    flat = made_up.configuration("2d").model_copy(update=changes)
    svg = ElementTree.fromstring(str(inline_network(flat, plan.task)))
    assert len(list(svg.iter("rect"))) == 2 * stages - 1
    assert sizes(flat)[-1] == (128 // 2 ** (stages - 1), 192 // 2 ** (stages - 1))
    assert "3 outputs" in "".join(svg.itertext())


def test_planes_are_pictures_in_the_right_proportions_and_always_the_same():
    scene = made_up.scene()
    first, second = plane_pictures(scene), plane_pictures(scene)
    assert first == second
    assert [p.caption.split(",")[0] for p in first] == ["axial", "coronal", "sagittal"]
    for picture in first:
        with Image.open(io.BytesIO(picture.jpeg)) as image:
            assert image.format == "JPEG"
            assert abs(image.width - picture.width) <= 1
            assert abs(image.height - picture.height) <= 1
    z, y, x = (n * s for n, s in zip(scene.prediction.shape, scene.spacing_mm, strict=True))
    assert first[0].width / first[0].height == pytest.approx(x / y, rel=0.02)
    assert first[1].width / first[1].height == pytest.approx(x / z, rel=0.02)


def unpack(text: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8).reshape(shape)


def test_a_large_volume_is_reduced_by_block_means_and_middle_labels():
    rng = np.random.default_rng(5)
    labels = np.zeros((40, 400, 330), np.int16)
    labels[3:37, 20:380, 20:310] = rng.integers(0, 3, (34, 360, 290))
    image = rng.normal(0, 1, labels.shape).astype(np.float32)
    scene = make_scene(image, labels, None, (5.0, 0.5, 0.5))
    cutout = cut_out(scene, "case", ["background", "a", "b"], most_bytes=10**8)
    assert cutout.reference is None
    assert cutout.reduced[0] == 1
    fy, fx = cutout.reduced[1:]
    assert fy == fx > 1
    assert max(cutout.shape) <= cutouts.LONGEST
    whole = tuple(slice(0, n - n % f) for n, f in zip(scene.image.shape, cutout.reduced, strict=True))
    means = block_reduce(scene.image[whole], cutout.reduced, np.mean)
    low, high = scene.window
    expected = np.round(255 * np.clip((means - low) / (high - low), 0, 1))
    found = unpack(cutout.image, cutout.shape)[tuple(slice(0, n) for n in means.shape)]
    assert np.abs(found - expected).max() <= 1
    thin = scene.prediction[whole][:, fy // 2 :: fy, fx // 2 :: fx]
    np.testing.assert_array_equal(unpack(cutout.prediction, cutout.shape)[tuple(slice(0, n) for n in thin.shape)], thin)


def test_a_volume_is_reduced_until_it_fits():
    rng = np.random.default_rng(5)
    image = rng.normal(0, 1, (60, 70, 80)).astype(np.float32)
    scene = make_scene(image, np.ones(image.shape, np.int16), None, (1.0, 1.1, 1.2))
    large, small = (cut_out(scene, "case", ["background", "a"], most_bytes=n) for n in (10**7, 20_000))
    assert small.size <= 20_000 < large.size
    assert np.prod(small.shape) < np.prod(large.shape)


def test_voxels_that_are_no_numbers_are_black_and_too_many_labels_are_left_out():
    image = np.full((5, 6, 7), np.nan, np.float32)
    image[2:] = 5
    scene = make_scene(image, np.zeros(image.shape, np.int16), None, (1.0, 1.1, 1.2))
    cutout = cut_out(scene, "case", ["background", "a"])
    assert not unpack(cutout.image, cutout.shape)[:2].any()
    assert cut_out(scene, "case", ["background", *map(str, range(255))]) is None


def test_unusual_missing_and_spurious_structures_are_flagged():
    task, known = made_up.task(), usual_volumes(made_up.fingerprint(), made_up.task())
    assert known["organ"].share == 1
    assert known["tumour"].share == 0.5
    typical = float(np.median(known["organ"].volumes_ml))
    volumes = {
        "fine": {"organ": typical, "tumour": 0.0},
        "huge": {"organ": 3 * typical, "tumour": 6.4},
        "gone": {"organ": 0.0, "tumour": 0.0},
    }
    assert [(f.case, f.label, f.reason) for f in flags_of_volumes(volumes, known)] == [
        ("gone", "organ", "missing"),
        ("huge", "organ", "unexpectedly large"),
    ]
    flags = flags_of_scores(made_up.rows(), known)
    assert [(f.case, f.reason) for f in flags] == [("case_03", "missed"), ("case_04", "spurious")]
    assert flags_of_volumes(volumes, {}) == []
    few = usual_volumes(made_up.fingerprint(cases=4), task)
    assert flags_of_volumes(volumes, few) == []


def test_small_differences_are_not_remarkable_however_alike_the_training_cases_are():
    print_ = made_up.fingerprint()
    alike = print_.model_copy(
        update={"cases": tuple(c.model_copy(update={"voxels_per_label": {1: 1000}}) for c in print_.cases)}
    )
    known = usual_volumes(alike, made_up.task())
    volume = known["organ"].volumes_ml[0]
    assert flags_of_volumes({"a": {"organ": 1.1 * volume}}, known) == []
    assert len(flags_of_volumes({"a": {"organ": 1.3 * volume}}, known)) == 1


def test_the_methods_say_what_the_models_say():
    cards = [made_up.card(), made_up.card(steps=2500).model_copy(update={"fold": "1", "training_seconds": 900})]
    print_ = made_up.fingerprint()
    methods = methods_text(made_up.plan(), print_, None, cards, made_up.content().score_sets[0].scores)
    text = " ".join(methods.paragraphs)
    for words in (
        "12 cases", "2.5×0.8×0.8 mm", "20×64×48 voxels", "batches of 2", "learning rate of 0.01", "momentum 0.99",
        "1 234 to 2 500 steps (10 min to 15 min) in each of 2 trainings",
        "32, 64, 128 features, instance normalisation",
        "no mirroring",
        "clipped to the 0.5th and 99.5th percentile", "surface Dice at 2 mm", "Trained folds: 0, 1",
    ):  # fmt: skip
        assert words in text, words
    cited = [int(n) for group in re.findall(r"\[([\d, ]+)\]", text) for n in group.split(",")]
    assert sorted(set(cited)) == list(range(1, len(methods.sources) + 1))
    assert list(dict.fromkeys(cited)) == sorted(set(cited))  # numbered in the order of the text
    assert set(methods.sources) <= set(SOURCES.values())
    assert not any("residual" in p or "nnU-Net revisited" in p for p in (*methods.paragraphs, *methods.sources))


def test_nothing_is_claimed_of_trainings_that_have_not_finished():
    methods = methods_text(made_up.plan(), None, None, [], None)
    assert methods.paragraphs[-1] == "No training has finished yet."
    assert not any("trained on" in p or "Dice" in p for p in methods.paragraphs)


def test_the_worst_come_first_and_infinite_distances_are_shown():
    table = worst_table(made_up.content().score_sets[0].scores, {"case_03": "case-1"})
    assert [row[0] for row in table.rows[:3]] == ["case_03", "case_04", "case_00"]
    assert table.rows[0][5] == "∞"
    assert table.links[0] == "case-1"


def test_a_training_that_has_only_begun_has_curves():
    begun = Training("2d", "all", None, (HistoryPoint(1, 0.5, train_loss=0.3),))
    (chart,) = training_charts([begun])
    assert "fold all" in chart.svg
    assert training_charts([Training("2d", "0", None, ())]) == []


def test_every_network_and_loss_of_a_plan_is_named_as_it_is():
    assert set(NETWORKS) == set(get_args(NetworkName)) == set(TITLES)
    assert {key for keys in NETWORKS.values() for key in keys} <= set(SOURCES)
    card = made_up.card()
    training = card.training.model_copy(update={"loss": "focal"})
    for name in get_args(NetworkName):
        network = made_up.configuration().network.model_copy(update={"name": name})
        changed = made_up.configuration().model_copy(update={"network": network})
        plan = card.plan.model_copy(update={"configurations": {"3d_fullres": changed}})
        methods = methods_text(plan, None, None, [card.model_copy(update={"plan": plan, "training": training})], None)
        text = " ".join(methods.paragraphs)
        assert TITLES[name] in text
        assert "the loss that medseg calls focal" in text
        assert "soft Dice" not in text
        assert all(SOURCES[key] in methods.sources for key in NETWORKS[name])


def test_predictions_that_their_networks_doubt_are_flagged():
    cases = [CaseOutcome(id=str(q), status="done", quality=q) for q in (None, 0.9, 0.4, 0.69)]
    assert [(f.case, f.reason) for f in flags_of_quality(cases)] == [("0.4", "uncertain"), ("0.69", "uncertain")]


def test_the_choice_is_shown_with_what_it_was_compared_with():
    member = Member(configuration="2d", folds=("0",), weights_sha256=("ab" * 32,), weight=1)
    candidates = (
        Candidate(
            configurations=("2d",), networks=1, mean_dice=0.8, mean_dice_ci=(0.7, 0.9), mean_dice_unprocessed=0.75
        ),
        Candidate(configurations=("2d", "3d_fullres"), networks=2, mean_dice=0.81, gain=0.01),
    )
    selection = Selection(
        medseg_version="0.1", members=(member,), postprocessing=PostProcessing(), cases=("a", "b"),
        candidates=candidates, evidence=("<b>because</b>",),
    )  # fmt: skip
    table = selection_table(selection)
    assert table.rows == (
        ("2d", "0.750", "0.800 (0.700–0.900)", "–", "chosen"),
        ("2d + 3d_fullres", "–", "0.810", "+0.010", ""),
    )
    text = render_report(dataclasses.replace(made_up.content(), selection=selection))
    assert "&lt;b&gt;because&lt;/b&gt;" in text
