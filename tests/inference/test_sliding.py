"""The sliding window: constants stay constant, the identity stays the image, MONAI's window as oracle."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from tiny_models import FLAT_KERNELS, TWO_D, make_configuration
from torch import Tensor, nn

from medseg.inference import passes
from medseg.inference.passes import Mirroring
from medseg.inference.sliding import predict_logits
from medseg.inference.windows import importance, windows
from medseg.networks.build import build_network
from medseg.networks.device import Device, place

CPU = Device(torch.device("cpu"), torch.float32, "test")
TILE = (4, 8, 6)
CONFIGURATION = make_configuration(TILE, FLAT_KERNELS)
FLAT = make_configuration((8, 6), TWO_D)
SHAPES = [(4, 8, 6), (5, 9, 7), (11, 30, 17), (3, 5, 2), (1, 40, 6), (9, 3, 25), (1, 1, 1)]


class Constant(nn.Module):
    """Three outputs that are the same everywhere, whatever the image."""

    def __init__(self, values: tuple[float, ...]) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, x: Tensor) -> list[Tensor]:
        shape = (len(x), len(self.values), *x.shape[2:])
        return [self.values.view(1, -1, *[1] * (x.ndim - 2)).expand(shape).clone()]


class Identity(nn.Module):
    """A convolution of one voxel that gives the image and twice its negative."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        kind = nn.Conv3d if dimensions == 3 else nn.Conv2d
        self.convolution = kind(1, 2, 1, bias=False)
        with torch.no_grad():
            self.convolution.weight.view(-1).copy_(torch.tensor([1.0, -2.0]))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.convolution(x)]


class Uneven(nn.Module):
    """Depends on the place in the tile and on the image, so that blending and mirroring show."""

    def __init__(self, tile: tuple[int, ...], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.factor, self.shift = torch.randn((2, 2, *tile), generator=generator)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.tanh(x * self.factor) + self.shift]


def image_of(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("configuration", [CONFIGURATION, FLAT], ids=["3d", "2d"])
@pytest.mark.parametrize("step", [0.5, 1.0])
def test_a_constant_output_is_that_constant_everywhere_up_to_the_border(shape, configuration, step):
    found = predict_logits([Constant((1.0, -0.5, 4.0))], image_of(shape), configuration, CPU, step=step)
    assert found.shape == (3, *shape)
    assert found.dtype == torch.float32
    for value, channel in zip((1.0, -0.5, 4.0), found, strict=True):
        assert torch.equal(channel, torch.full(shape, value))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("configuration", [CONFIGURATION, FLAT], ids=["3d", "2d"])
def test_the_identity_gives_the_image(shape, configuration):
    image = image_of(shape)
    found = predict_logits([Identity(configuration.dimensions)], image, configuration, CPU).numpy()
    np.testing.assert_allclose(found[0], image[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], -2 * image[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 8, 6), (8, 16, 15), (10, 28, 9), (3, 24, 12), (12, 5, 6)])
def test_the_blend_equals_that_of_monai_where_its_windows_are_the_same(shape):
    """Sides that are whole half tiles apart; MONAI is given our weights, because it cuts small ones off."""
    from monai.inferers import sliding_window_inference

    image, network = image_of(shape), Uneven(TILE)
    expected = sliding_window_inference(
        torch.from_numpy(image).unsqueeze(0),
        TILE,
        1,
        lambda x: network(x)[0],
        overlap=0.5,
        mode="gaussian",
        roi_weight_map=torch.from_numpy(importance(TILE).copy()),
    )[0]
    torch.testing.assert_close(predict_logits([network], image, CONFIGURATION, CPU), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 13, 11), (5, 9, 6)])
def test_the_blend_is_the_mean_of_all_tiles_by_their_weights(shape):
    image, network = image_of(shape), Uneven(TILE)
    total, weights = np.zeros((2, *shape)), np.zeros(shape)
    for start in windows(shape, TILE):
        box = tuple(slice(s, s + t) for s, t in zip(start, TILE, strict=True))
        tile = torch.from_numpy(image[(slice(None), *box)])[None]
        total[(slice(None), *box)] += network(tile)[0][0].double().numpy() * importance(TILE)
        weights[box] += importance(TILE)
    found = predict_logits([network], image, CONFIGURATION, CPU)
    np.testing.assert_allclose(found.numpy(), total / weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [(), (2,), (0, 1), (0, 1, 2)])
def test_mirroring_is_the_mean_over_all_combinations_of_flips(axes):
    image, network = image_of((7, 13, 11)), Uneven(TILE)
    views = [c for n in range(len(axes) + 1) for c in combinations(axes, n)]
    assert len(views) == 2 ** len(axes)

    class Mirrored(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            flips = [[a + 2 for a in view] for view in views]
            return [torch.stack([network(x.flip(f))[0].flip(f) for f in flips]).mean(0)]

    found = predict_logits([network], image, CONFIGURATION, CPU, mirroring=Mirroring(axes))
    torch.testing.assert_close(found, predict_logits([Mirrored()], image, CONFIGURATION, CPU), rtol=1e-5, atol=1e-5)


def test_mirroring_in_2d_flips_rows_and_columns_not_slices():
    image, network = image_of((3, 13, 9)), Uneven((8, 6))

    class UpsideDown(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [(network(x)[0] + network(x.flip(2))[0].flip(2)) / 2]

    found = predict_logits([network], image, FLAT, CPU, mirroring=Mirroring((0,)))
    torch.testing.assert_close(found, predict_logits([UpsideDown()], image, FLAT, CPU), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, predict_logits([network], image, FLAT, CPU))


def test_several_networks_are_averaged():
    image = image_of((7, 13, 11))
    networks = [Uneven(TILE, seed) for seed in range(3)]
    single = [predict_logits([network], image, CONFIGURATION, CPU, mirroring=Mirroring((1,))) for network in networks]
    together = predict_logits(networks, image, CONFIGURATION, CPU, mirroring=Mirroring((1,)))
    torch.testing.assert_close(together, torch.stack(single).mean(0), rtol=1e-5, atol=1e-5)


def test_2d_goes_slice_by_slice():
    image = image_of((5, 13, 11))
    network = place(build_network(TWO_D, 1, 3), CPU, 2).eval()
    together = predict_logits([network], image, FLAT, CPU)
    for z in range(5):
        alone = predict_logits([network], image[:, z : z + 1].copy(), FLAT, CPU)
        torch.testing.assert_close(together[:, z : z + 1], alone, rtol=1e-4, atol=1e-5)


def test_2d_sees_every_slice_once():
    seen: list[int] = []

    class Counting(Identity):
        def forward(self, x: Tensor) -> list[Tensor]:
            seen.append(len(x))
            return super().forward(x)

    predict_logits([Counting(2)], image_of((9, 8, 6)), FLAT, CPU)
    assert sum(seen) == 9


@pytest.mark.parametrize("voxels", [1, 2 * 4 * 8 * 6, 10**9])
def test_how_many_tiles_go_together_changes_nothing(monkeypatch, voxels):
    image, network = image_of((7, 13, 11)), Uneven(TILE)
    expected = predict_logits([network], image, CONFIGURATION, CPU)
    monkeypatch.setitem(passes.VOXELS_TOGETHER, "cpu", voxels)
    assert torch.equal(predict_logits([network], image, CONFIGURATION, CPU), expected)


def test_small_volumes_lie_in_the_middle_of_zeros():
    seen: list[Tensor] = []

    class Watching(Identity):
        def forward(self, x: Tensor) -> list[Tensor]:
            seen.append(x.clone())
            return super().forward(x)

    image = image_of((3, 5, 6))
    predict_logits([Watching(3)], image, CONFIGURATION, CPU)
    (tile,) = seen
    assert np.array_equal(tile[0].numpy(), np.pad(image, ((0, 0), (0, 1), (1, 2), (0, 0))))


def test_a_real_network_segments_several_channels_without_changing_its_input():
    network = place(build_network(FLAT_KERNELS, 2, 3), CPU, 3).eval()
    image = np.concatenate([image_of((7, 13, 11), 1), image_of((7, 13, 11), 2)])
    kept = image.copy()
    found = predict_logits([network], image, CONFIGURATION, CPU, mirroring=Mirroring((0, 1, 2)))
    assert found.shape == (3, 7, 13, 11)
    assert torch.isfinite(found).all()
    assert np.array_equal(image, kept)


def test_half_precision_networks_give_float32_logits_near_those_of_float32():
    network = place(build_network(FLAT_KERNELS, 1, 3), CPU, 3).eval()
    image = image_of((7, 13, 11))
    half = Device(torch.device("cpu"), torch.bfloat16, "test")
    found = predict_logits([network], image, CONFIGURATION, half)
    expected = predict_logits([network], image, CONFIGURATION, CPU)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(0, 4, []), (23, 23, [16, 4, 2, 1]), (13, 5, [4, 4, 4, 1]), (3, 1, [1] * 3)]
)
def test_what_goes_together_is_a_power_of_two(count, most, sizes):
    found = list(passes.groups(range(count), most))
    assert [len(group) for group in found] == sizes
    assert [item for group in found for item in group] == list(range(count))
