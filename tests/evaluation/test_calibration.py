"""Calibration against scikit-learn-like sums done by hand and MONAI's calibration error."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from medseg.errors import InputError, UsageError
from medseg.evaluation.calibration import calibration, calibration_box
from medseg.evaluation.probabilities import find_probabilities, read_probabilities
from medseg.evaluation.scores import score_arrays
from medseg.evaluation.targets import targets
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
    rows = score_arrays(np.zeros_like(reference), reference, (2.0, 1.0, 1.0), task, Measures(), "", probabilities)
    # 10 mm around one voxel: all 7 slices (5 and more each way), 21 rows and columns, one voxel ignored
    assert rows[0].calibration.brier == pytest.approx(1 / (7 * 21 * 21 - 1))
    assert rows[1].calibration is None
    assert calibration_box(np.zeros((2, 3, 4)), np.zeros((2, 3, 4), bool), (1.0, 1.0, 1.0)) is None


def test_regions_sum_classes_or_have_outputs_of_their_own():
    outputs = softmax(3)
    a, b = targets(TASK)
    np.testing.assert_array_equal(b.probability(outputs, TASK), outputs[2])
    assert a.probability(outputs[:2], REGIONS) is None
    both, only_b = targets(REGIONS)[2:]
    np.testing.assert_array_equal(both.probability(outputs[:2], REGIONS), outputs[0])
    np.testing.assert_array_equal(only_b.probability(outputs[:2], REGIONS), outputs[1])


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
