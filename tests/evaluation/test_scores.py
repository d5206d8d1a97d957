"""Scores of files and arrays: degenerate cases, ignored voxels, regions, refused pairs, strict JSON and CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import SPACING_IJK, affine_ijk, anatomy, save_nifti
from PIL import Image

from medseg.errors import InputError
from medseg.evaluation.pairs import read_pair
from medseg.evaluation.scores import (
    evaluate,
    find_pairs,
    score_arrays,
    summarise,
    summary_table,
    write_scores,
)
from medseg.evaluation.tables import csv_text
from medseg.records.base import read_json, read_record
from medseg.records.scores import Measures, Scores
from medseg.records.task import Channel, Label, Region, Task

SPACING = (2.0, 1.1, 0.9)


def at(tolerance_mm: float) -> Measures:
    return Measures(tolerance_mm=tolerance_mm)


def make_task(*values: int, **more: object) -> Task:
    labels = tuple(Label(name="background" if v == 0 else f"organ {v}", value=v) for v in (0, *values))
    return Task(channels=(Channel(name="MRI"),), labels=labels, **more)


def phantom_pair(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Reference (i, j, k) and a prediction that is it moved by one voxel along j."""
    reference = anatomy(np.random.default_rng(seed))[1]
    return np.roll(reference, 1, axis=1), reference


def strict(path: Path) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# ---------------------------------------------------------------- arrays


def test_every_label_is_scored_inside_its_own_box_as_on_the_whole_volume():
    prediction, reference = (a.T.astype(np.int16) for a in phantom_pair())
    rows = score_arrays(prediction, reference, SPACING, make_task(1, 2), at(1.5), case="a")
    assert [(r.case, r.label, r.values, r.status) for r in rows] == [
        ("a", "organ 1", (1,), "ok"),
        ("a", "organ 2", (2,), "ok"),
    ]
    for row, label in zip(rows, (1, 2), strict=True):
        p, r = prediction == label, reference == label
        assert row.true_positives == (p & r).sum()
        assert row.dice == pytest.approx(2 * (p & r).sum() / (p.sum() + r.sum()))
        assert row.prediction_ml == pytest.approx(p.sum() * 2.0 * 1.1 * 0.9 / 1000)
        assert row.volume_error_ml == pytest.approx((int(p.sum()) - int(r.sum())) * 1.98 / 1000)
        assert 0 < row.hd95_mm <= 1.1 + 1e-9  # everything was moved by one voxel of 1.1 mm
        assert row.nsd == 1


def test_the_table_of_absent_structures():
    empty = np.zeros((3, 4, 5), np.int16)
    dot = empty.copy()
    dot[1, 2, 3] = 1
    cases = {"both empty": (empty, empty), "missed": (empty, dot), "spurious": (dot, empty), "ok": (dot, dot)}
    task = make_task(1)
    rows = [score_arrays(p, r, SPACING, task, at(1.0), case=name)[0] for name, (p, r) in cases.items()]
    found = {
        row.case: (row.status, row.dice, row.nsd, row.hd95_mm, row.assd_mm, row.precision, row.recall) for row in rows
    }
    assert found == {
        "both empty": ("both empty", None, None, None, None, None, None),
        "missed": ("missed", 0.0, 0.0, None, None, None, 0.0),
        "spurious": ("spurious", 0.0, 0.0, None, None, 0.0, None),
        "ok": ("ok", 1.0, 1.0, 0.0, 0.0, 1.0, 1.0),
    }
    summary = summarise(rows, task, at(1.0)).labels[0]
    assert (summary.cases, summary.both_empty, summary.missed, summary.spurious) == (4, 1, 1, 1)
    assert summary.dice.mean == pytest.approx(1 / 3)
    assert (summary.dice.cases, summary.dice.infinite) == (3, 0)
    assert (summary.hd95_mm.mean, summary.hd95_mm.cases, summary.hd95_mm.infinite) == (0.0, 1, 2)
    assert summary.volume_error_ml.cases == 3


def test_a_label_that_no_case_has_does_not_spoil_the_mean():
    labels = np.zeros((3, 4, 5), np.int16)
    labels[1:, 1:3, 2:] = 1
    task = make_task(1, 7)
    scores = summarise(score_arrays(labels, labels, SPACING, task, at(1.0)), task, at(1.0))
    assert scores.labels[1].dice.mean is None
    assert (scores.mean_dice, scores.mean_nsd) == (1.0, 1.0)


def test_without_any_case_there_are_no_means():
    scores = evaluate([], make_task(1), at(1.0))
    assert (scores.mean_dice, scores.labels[0].cases, scores.labels[0].dice.mean) == (None, 0, None)
    assert "n/a" in summary_table(scores)[1]


def test_ignored_voxels_count_on_neither_side():
    reference = np.zeros((3, 6, 8), np.int16)
    reference[:, 2:5, 2:5] = 1
    prediction = reference.copy()
    prediction[:, :, 6:] = 1
    prediction[:, 2, 2] = 0
    reference[:, :, 6:] = -1
    reference[:, 2, 2] = -1
    row = score_arrays(prediction, reference, SPACING, make_task(1, ignore_value=9), at(1.0))[0]
    assert (row.dice, row.false_positives, row.false_negatives, row.hd95_mm) == (1.0, 0, 0, 0.0)
    assert row.true_positives == 3 * 8


def test_a_region_is_the_union_of_its_labels_and_the_mean_is_that_of_the_regions():
    reference = np.zeros((2, 6, 7), np.int16)
    reference[:, 1:4, 1:3], reference[:, 1:4, 3:5] = 1, 2
    prediction = np.where(reference == 2, 1, reference).astype(np.int16)
    regions = (Region(name="whole", values=(4, 8)), Region(name="core", values=(8,)))
    task = make_task(4, 8, regions=regions, regions_order=(4, 8))
    rows = score_arrays(prediction, reference, SPACING, task, at(1.0))
    assert [(r.label, r.kind, r.values) for r in rows[2:]] == [("whole", "region", (4, 8)), ("core", "region", (8,))]
    assert [r.dice for r in rows] == pytest.approx([2 * 12 / 36, 0, 1, 0])
    assert summarise(rows, task, at(1.0)).mean_dice == pytest.approx(0.5)


def test_a_structure_in_one_slice_of_a_volume_is_measured_in_three_dimensions():
    volume = np.zeros((4, 9, 9), np.int16)
    volume[2, 2:7, 2:7] = 1
    inner = volume.copy()
    inner[2, 4, 4] = 0
    row = score_arrays(inner, volume, (5.0, 1.0, 1.0), make_task(1), at(0.5))[0]
    # in a volume the middle voxel is border too and lies 1 mm from the hole's rim: 24 + 24 of 49 within
    assert row.nsd == pytest.approx(48 / 49)
    flat = score_arrays(inner[2:3], volume[2:3], (5.0, 1.0, 1.0), make_task(1), at(0.5))[0]
    # in the flat image only the rim of 16 and the 4 neighbours of the hole are border, and these 4 lie 1 mm off
    assert flat.nsd == pytest.approx(32 / 36)


def test_arrays_of_different_shapes_are_refused():
    with pytest.raises(InputError, match="E0119"):
        score_arrays(np.zeros((2, 3, 4), np.int16), np.zeros((2, 3, 5), np.int16), SPACING, make_task(1), at(1.0))


# ---------------------------------------------------------------- label files


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        (np.float32(1.5), "E0130", "prediction: .*not integers"),
        (np.uint8(9), "E0131", "prediction: label values 9"),  # the reference may leave voxels open, a prediction not
        (np.int16(-1), "E0131", "prediction: label values -1"),
    ],
)
def test_values_that_are_no_declared_labels_are_refused_with_the_file_they_are_in(tmp_path, values, code, words):
    reference = np.zeros((5, 6, 7), np.uint8)
    reference[2, 3, 4] = 9
    save_nifti(tmp_path / "reference.nii", reference, affine_ijk())
    prediction = np.zeros((5, 6, 7), values.dtype)
    prediction[2, 2, 2] = values
    save_nifti(tmp_path / "prediction.nii", prediction, affine_ijk())
    with pytest.raises(InputError, match=rf"{code}\] case=a: {words}"):
        read_pair(("a", tmp_path / "prediction.nii", tmp_path / "reference.nii"), make_task(1, ignore_value=9))


def test_label_files_become_class_indices_with_the_spacing_of_the_reference(tmp_path):
    stored = np.zeros((5, 6, 7), np.float64)
    stored[1], stored[2] = 200, 9
    save_nifti(tmp_path / "reference.nii", stored, affine_ijk())
    save_nifti(tmp_path / "prediction.nii.gz", np.where(stored == 9, 0, stored).astype(np.uint8), affine_ijk())
    pair = ("a", tmp_path / "prediction.nii.gz", tmp_path / "reference.nii")
    prediction, reference, spacing_mm = read_pair(pair, make_task(3, 200, ignore_value=9))
    assert (np.unique(prediction).tolist(), np.unique(reference).tolist()) == ([0, 2], [-1, 0, 2])
    assert prediction.shape == (7, 6, 5)
    assert spacing_mm == pytest.approx(SPACING_IJK[::-1], rel=1e-5)


def write_pairs(folder: Path, cases: int = 3) -> tuple[Path, Path]:
    for index in range(cases):
        prediction, reference = phantom_pair(index)
        save_nifti(folder / "predicted" / f"case_{index}.nii.gz", prediction, affine_ijk())
        save_nifti(folder / "expected" / f"case_{index}.nii", reference, affine_ijk())
    return folder / "predicted", folder / "expected"


def test_files_score_as_their_arrays_do_with_any_number_of_workers(tmp_path):
    task = make_task(1, 2)
    pairs, problems = find_pairs(*write_pairs(tmp_path))
    assert [pair[0] for pair in pairs] == ["case_0", "case_1", "case_2"]
    assert problems == []
    scores = evaluate(pairs, task, at(1.0), workers=2)
    assert scores == evaluate(pairs, task, at(1.0), workers=1)
    assert scores.problems == ()
    spacing = tuple(np.linalg.norm(nib.load(pairs[0][2]).affine[:3, :3], axis=0)[::-1])
    prediction, reference = (a.T.astype(np.int16) for a in phantom_pair(0))
    for found, expected in zip(scores.cases, score_arrays(prediction, reference, spacing, task, at(1.0)), strict=False):
        assert found.dice == expected.dice
        assert found.hd95_mm == pytest.approx(expected.hd95_mm, rel=1e-5)


def test_a_failing_pair_is_named_and_does_not_stop_the_others(tmp_path):
    predicted, expected = write_pairs(tmp_path, 5)
    reference = nib.load(expected / "case_1.nii")
    moved = reference.affine.copy()
    moved[:3, 3] += 30
    save_nifti(predicted / "case_1.nii.gz", np.asarray(reference.dataobj), moved)
    save_nifti(predicted / "case_2.nii.gz", np.zeros((4, 5, 6), np.uint8), affine_ijk())
    (predicted / "case_3.nii.gz").write_bytes((predicted / "case_4.nii.gz").read_bytes()[:300])
    seen = []

    class Watching:
        def begin(self, stage, total, unit):
            seen.append((stage, total, unit))

        def update(self, done, note=""):
            seen.append(done)

        def end(self):
            seen.append("end")

        def say(self, message):
            pass

    scores = evaluate(find_pairs(predicted, expected)[0], make_task(1, 2), at(1.0), progress=Watching())
    assert seen == [("evaluate", 5, "cases"), 1, 2, 3, 4, 5, "end"]
    assert sorted({row.case for row in scores.cases}) == ["case_0", "case_4"]
    assert [(p.case, p.code) for p in scores.problems] == [
        ("case_1", "E0120"),
        ("case_2", "E0119"),
        ("case_3", "E0101"),
    ]


def test_a_fault_of_our_own_is_reported_for_its_case_only(tmp_path, monkeypatch, caplog):
    from medseg.evaluation import scores as module

    honest = module.read_pair_on_grid

    def faulty(pair, task):
        if pair[0] == "case_1":
            raise RuntimeError("broken")
        if pair[0] == "case_2":
            raise MemoryError
        return honest(pair, task)

    monkeypatch.setattr(module, "read_pair_on_grid", faulty)
    scores = evaluate(find_pairs(*write_pairs(tmp_path))[0], make_task(1, 2), at(1.0))
    assert {row.case for row in scores.cases} == {"case_0"}
    assert [(p.case, p.code) for p in scores.problems] == [("case_1", "E7000"), ("case_2", "E0600")]
    assert "broken" in caplog.text


def test_predictions_that_are_missing_spare_or_double_are_named(tmp_path):
    predicted, expected = write_pairs(tmp_path, 4)
    (predicted / "case_0.nii.gz").unlink()
    (expected / "case_1.nii").unlink()
    (predicted / "case_2.nii").write_bytes((expected / "case_2.nii").read_bytes())
    (predicted / "notes.txt").write_text("not an image")
    pairs, problems = find_pairs(predicted, expected)
    assert [pair[0] for pair in pairs] == ["case_3"]
    assert [(p.case, p.code) for p in problems] == [("case_0", "E0100"), ("case_1", "W0147"), ("case_2", "E0140")]


def test_two_files_are_a_pair_and_paths_that_lead_nowhere_are_refused(tmp_path):
    predicted, expected = write_pairs(tmp_path, 1)
    one, other = predicted / "case_0.nii.gz", expected / "case_0.nii"
    assert find_pairs(one, other) == ([("case_0", one, other)], [])
    with pytest.raises(InputError, match="E0100"):
        find_pairs(tmp_path / "nothing", expected)
    with pytest.raises(InputError, match="E0100"):
        find_pairs(one, expected)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="E0146"):
        find_pairs(tmp_path / "empty", expected)


def test_pictures_are_scored_in_two_dimensions(tmp_path):
    reference = np.zeros((20, 31), np.uint8)
    reference[5:15, 6:25] = 1
    prediction = np.roll(reference, 2, axis=1)
    for name, pixels in (("predicted", prediction), ("expected", reference)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    row = evaluate(find_pairs(tmp_path / "predicted", tmp_path / "expected")[0], make_task(1), at(1.0)).cases[0]
    assert row.dice == pytest.approx(2 * 170 / 380)
    assert row.hd95_mm == pytest.approx(2.0)


# ---------------------------------------------------------------- JSON, CSV and the console


def degenerate_scores() -> Scores:
    empty = np.zeros((3, 4, 5), np.int16)
    dot = empty.copy()
    dot[1, 2, 3] = 1
    task = make_task(1)
    pairs = {'odd, "name"': (dot, dot), "missed": (empty, dot), "absent": (empty, empty)}
    return summarise([score_arrays(p, r, SPACING, task, at(1.5), c)[0] for c, (p, r) in pairs.items()], task, at(1.5))


def test_json_is_strict_says_what_was_measured_and_reads_back_equal(tmp_path):
    scores = degenerate_scores()
    written = write_scores(scores, tmp_path / "scores.json")
    assert set(written) == {"scores.json", "scores.csv"}
    value = strict(tmp_path / "scores.json")
    assert value == read_json(tmp_path / "scores.json")
    assert value["tolerance_mm"] == 1.5
    assert "95th" in value["definitions"]["hd95_mm"]
    assert value["cases"][1]["hd95_mm"] is None
    assert value["cases"][1]["status"] == "missed"
    assert read_record(tmp_path / "scores.json", Scores) == scores


def test_csv_has_one_row_per_case_and_label_with_units_and_infinite_distances(tmp_path):
    write_scores(degenerate_scores(), tmp_path / "scores.json")
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == ['odd, "name"', "missed", "absent"]
    assert {"hd95_mm", "assd_mm", "nsd", "reference_ml", "volume_error_ml"} <= rows[0].keys()
    assert {row["tolerance_mm"] for row in rows} == {"1.5"}
    assert [row["hd95_mm"] for row in rows] == ["0.0", "inf", ""]
    assert [row["dice"] for row in rows] == ["1.0", "0.0", ""]
    assert float(rows[1]["reference_ml"]) == pytest.approx(1.98 / 1000)
    assert csv_text(degenerate_scores()).count("\n") == 4


def test_the_summary_for_the_console_counts_what_has_no_number():
    header, row, mean = summary_table(degenerate_scores())
    assert len(header) == len(row) == len(mean)
    cells = dict(zip(header, row, strict=True))
    assert cells["HD95 mm"] == "0.00 (1 infinite)"
    assert cells["Dice (95 % CI)"] == "0.5000"  # of two cases there is no interval
    assert (cells["missed"], cells["spurious"], cells["both empty"]) == ("1", "0", "1")
    assert mean[2] == "0.5000"


def test_nnunets_predictions_of_real_hippocampi_score_as_counted_from_the_files(shared):
    folder = shared / "nnunet_model" / "hippocampus" / "output_mirroring"
    pairs, problems = find_pairs(folder, shared / "data" / "hippocampus" / "labelsTr")
    assert len(pairs) == 20
    assert {p.code for p in problems} == {"E0100"}
    scores = evaluate(pairs[:6], make_task(1, 2), at(1.0), workers=2)
    assert scores.problems == ()
    for row in scores.cases:
        paths = next(pair for pair in pairs if pair[0] == row.case)[1:]
        predicted, expected = (np.asarray(nib.load(path).dataobj) == row.values[0] for path in paths)
        assert row.dice == pytest.approx(2 * (predicted & expected).sum() / (predicted.sum() + expected.sum()))
        assert row.nsd > 0.6
