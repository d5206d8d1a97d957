"""Calibration against sums done by hand, scikit-learn's Brier score, NumPy, and MONAI's calibration error."""

from __future__ import annotations

import tracemalloc
import warnings
from functools import partial

import numpy as np
import pytest
from phantoms import affine_ijk
from scipy import ndimage
from sklearn.metrics import brier_score_loss

from medseg.errors import InputError, UsageError
from medseg.evaluation.calibration import calibrate, calibration
from medseg.evaluation.probabilities import (
    ArrayProbabilities,
    find_probabilities,
    map_files,
    open_probabilities,
    read_probabilities,
)
from medseg.evaluation.scores import score_arrays
from medseg.evaluation.targets import targets
from medseg.imaging.geometry import grid_from_nifti
from medseg.imaging.scaled import write_scaled
from medseg.records.scores import Measures
from medseg.records.task import Channel, Label, Region, Task

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from monai.metrics import CalibrationErrorMetric

LABELS = tuple(Label(name=name, value=value) for name, value in (("background", 0), ("a", 3), ("b", 7)))
TASK = Task(channels=(Channel(name="CT"),), labels=LABELS)
REGIONS = Task(
    channels=(Channel(name="CT"),),
    labels=LABELS,
    regions=(Region(name="both", values=(3, 7)), Region(name="b", values=(7,))),
    regions_order=(3, 7),
)


def softmax(seed: int, channels: int = 3, shape=(5, 13, 11)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    raw = np.exp(rng.normal(size=(channels, *shape)))
    return (raw / raw.sum(0)).astype(np.float32)


def test_ten_voxels_by_hand():
    probability = np.array([0.05, 0.15, 0.15, 0.95, 0.95, 0.95, 0.95, 0.5, 1.0, 0.0])
    truth = np.array([0, 0, 1, 1, 1, 1, 0, 1, 1, 0], bool)
    found = calibration(probability, truth)
    assert found.brier == pytest.approx(((probability - truth) ** 2).mean())
    # believed against true, bin by bin: 0.05 and 0; 0.3 and 1; 0.5 and 1; 4.8 and 4
    assert found.ece == pytest.approx((0.05 + 0.7 + 0.5 + 0.8) / 10)
    assert calibration(truth.astype(float), truth).ece == 0


def test_the_expected_error_is_monais():
    probability = softmax(0)
    truth = np.random.default_rng(1).random(probability.shape[1:]) < 0.4
    metric = CalibrationErrorMetric(num_bins=10, include_background=True, calibration_reduction="expected")
    given = torch.from_numpy(probability[None, 1:2]), torch.from_numpy(truth[None, None].astype(np.float32))
    metric(*given)
    assert calibration(probability[1], truth).ece == pytest.approx(float(metric.aggregate()), rel=1e-4)


def test_only_the_surroundings_count_and_ignored_voxels_do_not():
    reference = np.zeros((7, 40, 50), np.int16)
    reference[3, 20, 25] = 1
    reference[0, 20, 25] = -1
    probabilities = np.stack([np.ones(reference.shape), np.zeros(reference.shape), np.zeros(reference.shape)])
    probabilities[1, 0, 20, 25] = 0.9  # sure and ignored
    task = TASK.model_copy(update={"ignore_value": 9})
    given = ArrayProbabilities(probabilities)
    rows = score_arrays(np.zeros_like(reference), reference, (2.0, 1.0, 1.0), task, Measures(), "", given)
    # 10 mm around one voxel: all 7 slices (5 and more each way), 21 rows and columns, one voxel ignored
    assert rows[0].calibration.brier == pytest.approx(1 / (7 * 21 * 21 - 1))
    assert rows[1].calibration is None
    empty = ArrayProbabilities(np.zeros((1, 2, 3, 4), np.float32))
    assert calibrate(partial(empty.slabs, [0]), np.zeros((2, 3, 4), bool), None, (1.0, 1.0, 1.0)) is None


def test_regions_sum_classes_or_have_outputs_of_their_own():
    a, b = targets(TASK)
    assert (a.outputs(TASK), b.outputs(TASK)) == ((1,), (2,))
    assert (a.outputs(REGIONS), b.outputs(REGIONS)) == ((), ())
    both, only_b = targets(REGIONS)[2:]
    assert (both.outputs(REGIONS), only_b.outputs(REGIONS)) == ((0,), (1,))
    outputs = softmax(3)
    (found,) = ArrayProbabilities(outputs).slabs([1, 2])
    np.testing.assert_allclose(found[1], outputs[1] + outputs[2], rtol=1e-6)


SPACING = (2.5, 1.0, 1.0)  # z, y, x
GRID = grid_from_nifti(affine_ijk(spacing=SPACING[::-1]), (43, 37, 29))


def smooth(seed: int, channels: int) -> np.ndarray:
    """Probabilities (channels, 29, 37, 43) of blobs, so that most of the volume is sure."""
    rng = np.random.default_rng(seed)
    raw = ndimage.gaussian_filter(rng.normal(size=(channels, *GRID.shape)), (0, 2, 3, 3))
    raw = np.exp(60 * raw) * np.array([40.0, *[1.0] * (channels - 1)])[:, None, None, None]
    return raw / raw.sum(0)


def oracle(probability: np.ndarray, truth: np.ndarray, counted: np.ndarray) -> tuple[float, float]:
    """Brier score by scikit-learn and the expected calibration error by NumPy, as the documentation defines them."""
    marked = np.argwhere((truth | (probability >= 0.5)) & counted)
    box = tuple(
        slice(max(0, low - int(np.ceil(10 / s))), high + 1 + int(np.ceil(10 / s)))
        for low, high, s in zip(marked.min(0), marked.max(0), SPACING, strict=True)
    )
    p, t = probability[box][counted[box]], truth[box][counted[box]]
    edges = np.linspace(0, 1, 11)[1:-1]
    bins = np.searchsorted(edges, p, side="right")
    ece = sum(abs(p[bins == b].mean() - t[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins))
    return brier_score_loss(t, p), float(ece)


@pytest.mark.parametrize("steps", ["uint8", "uint16"])
@pytest.mark.parametrize("task", [TASK, REGIONS], ids=["labels", "regions"])
def test_maps_written_as_nifti_give_what_scikit_learn_and_numpy_give(tmp_path, monkeypatch, steps, task):
    monkeypatch.setattr("medseg.evaluation.probabilities.SLAB_VOXELS", 4000)  # several slabs
    task = task.model_copy(update={"ignore_value": 9})
    largest = np.iinfo(steps).max
    outputs = smooth(1, 3)
    outputs = np.stack([outputs[1] + outputs[2], outputs[2]]) if task.regions else outputs
    stored = np.rint(outputs * largest).astype(steps)
    folder = tmp_path / "out" / "probabilities" / "case"
    for name, values in zip(map_files(task), stored, strict=True):
        write_scaled(folder / name, values, GRID, 1 / largest)
    reference = np.rint(ndimage.zoom(smooth(2, 3).argmax(0), 1, order=0)).astype(np.int16)
    reference[:2, :20] = -1
    (found,) = find_probabilities(tmp_path / "out").values()
    probabilities = open_probabilities(found, task, GRID)
    rows = score_arrays(np.zeros_like(reference), reference, GRID.spacing_mm, task, Measures(), "case", probabilities)
    for row, target in zip(rows, targets(task), strict=True):
        if not (chosen := target.outputs(task)):
            assert row.calibration is None
            continue
        believed = np.minimum((stored[list(chosen)].astype(np.float32) * np.float32(1 / largest)).sum(0), 1)
        brier, ece = oracle(believed.astype(np.float64), target.mask(reference), reference >= 0)
        assert row.calibration.brier == pytest.approx(brier, rel=1e-5)
        assert row.calibration.ece == pytest.approx(ece, rel=1e-4)


def test_maps_that_do_not_fit_are_refused(tmp_path):
    folder = tmp_path / "probabilities" / "case"
    for name in map_files(TASK):
        write_scaled(folder / name, np.full(GRID.shape, 3, np.uint8), GRID, 1 / 255)

    def read(grid=GRID, outputs=(2,)):
        return list(open_probabilities(folder, TASK, grid).slabs(outputs))

    assert read()[0][1] == pytest.approx(3 / 255)
    with pytest.raises(InputError, match="E0120"):
        read(grid_from_nifti(affine_ijk(spacing=(1, 1, 2.4)), (43, 37, 29)))
    with pytest.raises(InputError, match="E0119"):
        read(grid_from_nifti(affine_ijk(spacing=SPACING[::-1]), (43, 37, 28)))
    write_scaled(folder / "label_7.nii.gz", np.full(GRID.shape, 3, np.uint8), GRID, 1.0)
    with pytest.raises(InputError, match=r"E0102.*3 to 3"):
        read()
    (folder / "label_7.nii.gz").write_bytes((folder / "label_3.nii.gz").read_bytes()[:-20])
    with pytest.raises(InputError, match="E0101"):
        read()
    (folder / "label_7.nii.gz").unlink()
    with pytest.raises(InputError, match=r"E0100.*label_7"):
        read()


def test_memory_does_not_grow_with_the_size_of_the_maps(tmp_path):
    """A map is inflated slab by slab: 64 MB of probabilities in float32 pass through less than 25."""
    grid = grid_from_nifti(affine_ijk(spacing=(1, 1, 1)), (256, 256, 256))
    values = np.zeros(grid.shape, np.uint8)
    values[100:120] = 200
    for name in map_files(TASK):
        write_scaled(tmp_path / "case" / name, values, grid, 1 / 255)
    probabilities = open_probabilities(tmp_path / "case", TASK, grid)
    tracemalloc.start()
    total = sum(float(slab.sum()) for _, slab in probabilities.slabs([2]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == pytest.approx(20 * 256 * 256 * 200 / 255)
    assert peak < 25e6


def test_names_choose_targets_and_unknown_ones_are_refused():
    assert [t.kind for t in targets(REGIONS, ["b"])] == ["label", "region"]
    with pytest.raises(UsageError, match=r"no label or region c.*one of a, b, both"):
        targets(REGIONS, ["b", "c"])


def test_files_that_do_not_fit_are_refused(tmp_path):
    good = softmax(0)
    np.savez_compressed(tmp_path / "case.npz", probabilities=good)
    np.testing.assert_array_equal(read_probabilities(tmp_path / "case.npz", TASK, good.shape[1:]), good)
    assert list(find_probabilities(tmp_path)) == ["case"]
    np.savez(tmp_path / "few.npz", probabilities=good[:2])
    np.savez(tmp_path / "other.npz", softmax=good)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "case.npz").read_bytes()[:500])
    np.savez(tmp_path / "object.npz", probabilities=np.array([{}], dtype=object))
    for name, shape, code in (
        ("case", (5, 13, 12), "E0119"),
        ("few", (5, 13, 11), "E0133"),
        ("other", (5, 13, 11), "E0102"),
        ("cut", (5, 13, 11), "E0102"),
        ("object", (5, 13, 11), "E0102"),
    ):
        with pytest.raises(InputError, match=code):
            read_probabilities(tmp_path / f"{name}.npz", TASK, shape)
    with pytest.raises(InputError, match="E0100"):
        find_probabilities(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="E0146"):
        find_probabilities(tmp_path / "empty")
    with pytest.raises(ValueError, match="0 to 1"):
        calibration(np.array([1.2]), np.array([True]))
