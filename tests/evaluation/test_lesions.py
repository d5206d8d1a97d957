"""Lesions: drawn by hand, and counted again with SimpleITK's components on real multiple sclerosis lesions."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

from medseg.evaluation.lesions import count_lesions
from medseg.records.scores import Lesions


def drawing(*rows: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in rows])[None]


def by_simpleitk(prediction: np.ndarray, reference: np.ndarray, overlap: float) -> Lesions:
    def pieces(mask: np.ndarray) -> list[np.ndarray]:
        found = SimpleITK.ConnectedComponent(SimpleITK.GetImageFromArray(mask.astype(np.uint8)), True)
        numbers = SimpleITK.GetArrayFromImage(found)
        return [numbers == n for n in range(1, numbers.max() + 1)]

    expected, predicted = pieces(reference), pieces(prediction)
    return Lesions(
        expected=len(expected),
        found=sum((piece & prediction).sum() / piece.sum() >= overlap for piece in expected),
        predicted=len(predicted),
        false_positives=sum((piece & reference).sum() / piece.sum() < overlap for piece in predicted),
    )


def test_split_merged_touched_missed_and_invented_lesions_are_told_apart():
    reference = drawing("####.....##", "####.....##", "...........", "##.##....#.", "##.##......", "...........")
    prediction = drawing("#..#......#", "#..#.......", "...........", "#####....##", "#####......", "......#....")
    # split (8 voxels, 4 covered): found; right above (4, 1 covered): found at 0.25, not at 0.5; the merged two (4 + 4):
    # both found; the single voxel: found. Predicted: two columns, one voxel, the merger of 10 with 8 true, the pair
    # with one true, and one voxel that is nowhere.
    assert count_lesions(prediction, reference, 0.1) == Lesions(expected=5, found=5, predicted=6, false_positives=1)
    strict = count_lesions(prediction, reference, 0.51)
    assert strict == Lesions(expected=5, found=3, predicted=6, false_positives=2)
    assert strict.sensitivity == pytest.approx(3 / 5)
    assert strict.precision == pytest.approx(4 / 6)
    assert strict.f1 == pytest.approx(2 * (3 / 5) * (4 / 6) / (3 / 5 + 4 / 6))


def test_the_share_itself_is_enough():
    reference = drawing("#" * 10)
    prediction = drawing("#" + "." * 9)
    assert count_lesions(prediction, reference, 0.1).found == 1
    assert count_lesions(prediction, reference, 0.11).found == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "figures"),
    [
        ("..", "..", (None, None, None)),
        ("..", "#.", (0.0, None, 0.0)),
        ("#.", "..", (None, 0.0, 0.0)),
        (".#", "#.", (0.0, 0.0, 0.0)),
    ],
)
def test_absent_lesions_have_no_share_but_an_f1_of_0_if_one_was_missed_or_invented(prediction, reference, figures):
    found = count_lesions(drawing(prediction), drawing(reference), 0.1)
    assert (found.sensitivity, found.precision, found.f1) == figures


@pytest.mark.parametrize("seed", range(4))
def test_random_specks_are_counted_as_by_simpleitk(seed):
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=(9, 31, 27)), 1.2)
    other = field + 0.4 * ndimage.gaussian_filter(rng.normal(size=field.shape), 1.2)
    prediction, reference = field > np.quantile(field, 0.9), other > np.quantile(other, 0.92)
    for overlap in (0.1, 0.5, 1.0):
        assert count_lesions(prediction, reference, overlap) == by_simpleitk(prediction, reference, overlap)


def test_real_lesions_are_counted_as_by_simpleitk(shared):
    (path,) = (shared / "data" / "ms_lesions" / "labelsTr").iterdir()
    reference = (np.asarray(nib.load(path).dataobj).T > 0)[40:120]
    (box,) = ndimage.find_objects(reference.astype(np.uint8))
    reference = reference[box]
    prediction = ndimage.shift(reference.astype(np.uint8), (0, 1, 0), order=0) > 0
    found = count_lesions(prediction, reference, 0.4)
    assert found == by_simpleitk(prediction, reference, 0.4)
    assert 0 < found.found < found.expected


def test_nonsense_is_refused():
    mask = drawing("##.")
    with pytest.raises(ValueError, match="shape"):
        count_lesions(mask, mask[..., :2], 0.1)
    for overlap in (0.0, 1.1):
        with pytest.raises(ValueError, match="overlap"):
            count_lesions(mask, mask, overlap)
