"""Refinement: a mean field written out over all pairs of voxels, slabs, and borders that follow the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from tiny_models import blobs

from medseg.errors import UsageError
from medseg.imaging.volumes import read_channels
from medseg.inference.refine import Scene, neighbourhood, refine, refine_bytes
from medseg.records.model import Refinement

CPU = torch.device("cpu")


def noisy_logits(labels: np.ndarray, classes: int, noise: float, seed: int) -> np.ndarray:
    """(classes, Z, Y, X): right on the average, wrong in many single voxels, unsure along the borders."""
    rng = np.random.default_rng(seed)
    right = np.stack([ndimage.gaussian_filter((labels == c).astype(float), 0.7) for c in range(classes)])
    return (4 * right + rng.normal(0, noise, right.shape)).astype(np.float32)


def scene_of(image: np.ndarray, outputs: int, *, regions: bool = False, spacing=(2.0, 1.0, 0.8)) -> Scene:
    return Scene(image, spacing, outputs, regions, CPU)


def written_out(logits: np.ndarray, scene: Scene, refinement: Refinement, certain: np.ndarray) -> np.ndarray:
    """The mean field of the paper's equations over all pairs of voxels, as matrices; ``certain`` ones keep theirs."""
    shape, spacing = logits.shape[1:], np.array(scene.spacing_mm)
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    squared = (((points[:, None] - points[None]) * spacing) ** 2).sum(-1)
    pixels = scene.image.reshape(len(scene.image), -1).T.astype(float)
    unlike = ((pixels[:, None] - pixels[None]) ** 2).mean(-1)
    finest = min(s for s, n in zip(spacing, shape, strict=True) if n > 1)
    wide = np.stack(np.meshgrid(*[np.arange(-9, 10) if n > 1 else [0] for n in shape], indexing="ij"), -1)
    window = ((wide.reshape(-1, 3) * spacing) ** 2).sum(-1)

    def kernel(distances: np.ndarray, width: float) -> np.ndarray:
        inside = (distances > 0) & (distances <= (2 * width) ** 2 + 1e-4)
        return np.where(inside, np.exp(-distances / (2 * width**2)), 0)

    smooth, like = refinement.smoothness_mm or finest, refinement.appearance_mm or 1.5 * finest
    pairs = refinement.smoothness_weight * kernel(squared, smooth) / kernel(window, smooth).sum()
    similar = np.exp(-unlike / (2 * refinement.appearance_intensity**2))
    pairs = pairs + refinement.appearance_weight * kernel(squared, like) / kernel(window, like).sum() * similar

    def share(values: np.ndarray) -> np.ndarray:
        if scene.regions:
            return 1 / (1 + np.exp(-values))
        powers = np.exp(values - values.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    unary = logits.reshape(len(logits), -1).T.astype(float)
    belief, found = share(unary), unary
    for _ in range(refinement.iterations):
        if scene.regions:  # two labels each: the energy of "inside" less that of "outside"
            found = unary - (pairs @ (1 - belief) - pairs @ belief)
        else:  # Potts: each label pays for all neighbours that have another one
            found = unary - (pairs @ (belief.sum(1, keepdims=True) - belief))
            found = found + pairs.sum(1, keepdims=True)  # the same for all labels
        found = np.where(certain.reshape(-1, 1), unary, found)
        belief = share(found)
    return found.T.reshape(logits.shape)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("shape", [(5, 9, 7), (1, 11, 12)])
def test_the_mean_field_is_the_one_written_out_over_all_pairs(shape, regions):
    rng = np.random.default_rng(3)
    image = rng.normal(0, 0.6, (2, *shape)).astype(np.float32)
    logits = rng.normal(0, 2, (3, *shape)).astype(np.float32)
    refinement = Refinement(iterations=4, smoothness_weight=1.5, appearance_weight=2.5, appearance_mm=1.9)
    scene = scene_of(image, 3, regions=regions)
    (found,) = refine([torch.from_numpy(logits)], scene, refinement)
    expected = written_out(logits, scene, refinement, np.zeros(shape, bool))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_voxels_that_no_neighbour_could_turn_keep_their_logits_and_count_with_them():
    rng = np.random.default_rng(4)
    image = rng.normal(0, 0.6, (1, 5, 9, 7)).astype(np.float32)
    logits = rng.normal(0, 5, (3, 5, 9, 7)).astype(np.float32)
    refinement, scene = Refinement(), scene_of(image, 3)
    (found,) = refine([torch.from_numpy(logits)], scene, refinement)
    ordered = np.sort(logits, 0)
    certain = ordered[-1] - ordered[-2] > 1.0 + 3.0 + 4.0
    assert 0.1 < certain.mean() < 0.9
    assert (found.numpy()[:, certain] == logits[:, certain]).all()
    np.testing.assert_allclose(found.numpy(), written_out(logits, scene, refinement, certain), rtol=1e-4, atol=1e-4)
    exact = written_out(logits, scene, refinement, np.zeros_like(certain))
    assert (exact.argmax(0) == found.numpy().argmax(0)).mean() > 0.99


@pytest.mark.parametrize("rows", [(23,), (1,) * 23, (4, 9, 10)])
def test_slabs_of_any_height_give_what_all_at_once_gives(rows, monkeypatch):
    rng = np.random.default_rng(5)
    image = rng.normal(0, 0.6, (1, 23, 8, 6)).astype(np.float32)
    logits = torch.from_numpy(rng.normal(0, 2, (4, 23, 8, 6)).astype(np.float32))
    refinement = Refinement(iterations=2)
    scene = scene_of(image, 3, spacing=(1.2, 1.0, 0.8))  # the last channel is not refined
    (whole,) = refine([logits], scene, refinement)
    assert torch.equal(whole[3], logits[3])
    monkeypatch.setattr("medseg.inference.refine.BLOCK_BYTES", 1)
    monkeypatch.setattr("medseg.inference.refine.KEPT_BYTES", 1)
    parts = list(refine(logits.split(rows, 1), scene, refinement))
    assert len(parts) > 1
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def dice(logits: np.ndarray, labels: np.ndarray) -> float:
    predicted = logits.argmax(0)
    both = [((predicted == c) & (labels == c)).sum() for c in (1, 2)]
    sizes = [(predicted == c).sum() + (labels == c).sum() for c in (1, 2)]
    return float(np.mean([2 * hit / size for hit, size in zip(both, sizes, strict=True)]))


@pytest.mark.parametrize("flat", [False, True])
def test_refinement_raises_the_dice_of_noisy_probabilities_along_the_edges_of_the_image(flat):
    image, labels = blobs((18, 26, 22), 1)
    if flat:
        image, labels = blobs((9, 60, 50), 1)
        image, labels = image[:, 4:5], labels[4:5]
    logits, scene = noisy_logits(labels, 3, 1.5, 0), scene_of(image, 3, spacing=(1.2, 1.0, 0.8))
    (found,) = refine([torch.from_numpy(logits)], scene, Refinement())
    assert dice(found.numpy(), labels) > dice(logits, labels) + 0.03
    no_image = Refinement(smoothness_weight=4.0, appearance_weight=0.0)
    (smooth,) = refine([torch.from_numpy(logits)], scene, no_image)
    assert dice(found.numpy(), labels) > dice(smooth.numpy(), labels)


def test_widths_are_in_millimetres_and_reach_no_neighbour_that_is_too_far():
    near = neighbourhood(Refinement(smoothness_mm=1.0, appearance_mm=1.0), (5.0, 1.0, 0.5), (4, 9, 9))
    assert near.radius == (0, 2, 4)
    near = neighbourhood(Refinement(), (1.0, 1.0, 0.5), (1, 9, 9))
    assert near.radius == (0, 1, 3)
    assert float(near.smoothness.sum()) == pytest.approx(1.0)
    assert float(near.appearance.sum()) == pytest.approx(3.0)
    nothing = neighbourhood(Refinement(smoothness_mm=0.1, appearance_mm=0.1), (5.0, 1.0, 0.5), (4, 9, 9))
    assert nothing.steps == ()
    with pytest.raises(UsageError, match="smaller widths"):
        neighbourhood(Refinement(appearance_mm=60), (1.0, 1.0, 0.5), (100, 100, 100))


def test_a_single_voxel_and_widths_without_neighbours_change_nothing():
    logits = torch.tensor([0.3, 0.1]).view(2, 1, 1, 1)
    (found,) = refine([logits], scene_of(np.zeros((1, 1, 1, 1), np.float32), 2), Refinement())
    assert torch.equal(found, logits)
    logits = torch.randn((2, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    narrow = Refinement(smoothness_mm=0.1, appearance_mm=0.1)
    (found,) = refine([logits], scene_of(np.zeros((1, 3, 4, 5), np.float32), 2), narrow)
    torch.testing.assert_close(found, logits)


def test_memory_does_not_grow_with_the_length_of_a_volume():
    needs = [refine_bytes(Refinement(), 20, 1, (rows, 300, 300), (1.5, 1.5, 1.5)) for rows in (10, 400, 800)]
    assert needs[0] < needs[1] == needs[2]


def test_a_real_hippocampus_with_noisy_probabilities_comes_out_better(shared):
    folder = shared / "data" / "hippocampus"
    case = sorted((folder / "labelsTr").glob("*.nii.gz"))[3].name.removesuffix(".nii.gz")
    volume = read_channels([folder / "imagesTr" / f"{case}_0000.nii.gz"])
    labels = read_channels([folder / "labelsTr" / f"{case}.nii.gz"]).array[0]
    image = volume.array.astype(np.float32)
    image = (image - image.mean()) / image.std()
    logits = noisy_logits(labels, 3, 1.5, 0)
    scene = scene_of(image, 3, spacing=volume.grid.spacing_mm)
    (found,) = refine([torch.from_numpy(logits)], scene, Refinement())
    assert dice(found.numpy(), labels) > dice(logits, labels) + 0.03
