"""Streaming: slabs equal the whole, features before the last layer equal logits, constant tiles are computed once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import FLAT_KERNELS, TWO_D, make_configuration
from torch import Tensor, nn

from medseg.errors import NonFiniteError
from medseg.inference import accumulator, passes
from medseg.inference.accumulator import Accumulator
from medseg.inference.passes import Mirroring, disagreement, split_heads
from medseg.inference.sliding import Blending, PreviousLabels, predict_logits, stream_logits
from medseg.inference.windows import importance, windows
from medseg.networks.build import build_network
from medseg.networks.device import Device, place

CPU = Device(torch.device("cpu"), torch.float32, "test")
TILE = (4, 8, 6)
CONFIGURATION = make_configuration(TILE, FLAT_KERNELS)
FLAT = make_configuration((8, 6), TWO_D)


class Counting(nn.Module):
    """Counts the tiles it sees; its output depends on the place in the tile."""

    def __init__(self) -> None:
        super().__init__()
        self.tiles = 0
        self.shift = torch.randn(1, 3, *TILE, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> list[Tensor]:
        self.tiles += len(x)
        return [torch.cat((x[:, :1], 2 * x[:, :1], -x[:, :1]), 1) + self.shift]


def image_of(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)


def networks_of(configuration, outputs: int, count: int) -> list[nn.Module]:
    dimensions = configuration.dimensions
    made = [build_network(configuration.network, 1, outputs, seed) for seed in range(count)]
    return [place(network, CPU, dimensions).eval() for network in made]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("at_most", [1, 500, 10**9])
@pytest.mark.parametrize("depth", [4, 5, 6, 11, 17])
def test_blending_in_a_moving_window_is_the_weighted_mean_of_all_tiles(monkeypatch, depth, at_most, channels_last):
    monkeypatch.setattr(accumulator, "SLAB_BYTES", at_most)
    shape, rng = (depth, 13, 9), np.random.default_rng(depth)
    weight = importance(TILE)
    total, weights = np.zeros((3, *shape)), np.zeros(shape)
    blend, slabs = None, []
    for start in windows(shape, TILE):
        tile = rng.normal(size=(1, 3, *TILE)).astype(np.float32)
        box = tuple(slice(s, s + t) for s, t in zip(start, TILE, strict=True))
        total[(slice(None), *box)] += tile[0] * weight
        weights[box] += weight
        given = torch.from_numpy(tile)
        given = given.to(memory_format=torch.channels_last_3d) if channels_last else given
        blend = blend or Accumulator(given[0], shape, torch.from_numpy(weight.copy()))
        slabs += blend.advance(start[0]) if start[0] > blend.first else []
        blend.add(given[0], start)
    slabs += blend.advance(depth)
    assert all(slab.is_contiguous() for slab in slabs)
    assert blend.total.numel() == 3 * TILE[0] * 13 * 9
    np.testing.assert_allclose(torch.cat(slabs, 1).numpy(), total / weights, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 8, 6), (11, 17, 9), (3, 5, 2)])
@pytest.mark.parametrize("configuration", [CONFIGURATION, FLAT], ids=["3d", "2d"])
@pytest.mark.parametrize("axes", [(), (0, 1)])
def test_features_blended_before_the_last_layer_give_the_same_logits(monkeypatch, shape, configuration, axes):
    """Two networks with few features and 12 outputs, against blending the logits."""
    networks, mirroring = networks_of(configuration, 12, 2), Mirroring(axes)
    bodies, head = split_heads(networks, mirroring)
    assert head.weight.shape == (12, 2 * configuration.network.features[0])
    assert next(bodies[0].parameters()) is next(networks[0].parameters())
    found = predict_logits(networks, image_of(shape), configuration, CPU, mirroring=mirroring)
    monkeypatch.setattr("medseg.inference.sliding.split_heads", lambda *_: None)
    expected = predict_logits(networks, image_of(shape), configuration, CPU, mirroring=mirroring)
    assert found.shape == (12, *shape)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_last_layer_stays_where_it_is_if_that_is_less_to_blend_or_the_network_is_another():
    assert split_heads(networks_of(CONFIGURATION, 3, 1), Mirroring()) is None
    assert split_heads(networks_of(CONFIGURATION, 12, 3), Mirroring()) is None
    assert split_heads([Counting()], Mirroring()) is None


def test_the_network_is_not_changed_by_blending_features():
    (network,) = networks_of(CONFIGURATION, 12, 1)
    x = torch.from_numpy(image_of(TILE))[None]
    before = network(x)[0]
    predict_logits([network], image_of((5, 9, 7)), CONFIGURATION, CPU)
    assert torch.equal(network(x)[0], before)


def test_tiles_of_constant_input_are_computed_once_and_blend_as_all_others():
    image = image_of((16, 24, 18))
    image[:, 4:] = -1.5
    image[:, 12:] = 0.25
    network, plain = Counting(), Counting()
    found = predict_logits([network], image, CONFIGURATION, CPU)
    shifted = image + 1e-12 * image_of(image.shape[1:], 2)  # nothing is constant, nearly the same
    shifted[:, 4:] += 1e-6 * image_of((12, 24, 18), 3)
    expected = predict_logits([plain], shifted.astype(np.float32), CONFIGURATION, CPU)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    tiles = windows((16, 24, 18), TILE)
    varying = [s for s in tiles if not (4 <= s[0] <= 8 or s[0] >= 12)]
    assert plain.tiles == len(tiles)
    assert network.tiles == len(varying) + 2


def test_a_tile_is_not_constant_if_the_labels_of_the_stage_before_vary():
    labels = np.zeros((4, 8, 12), np.int16)
    labels[2, 3, 4] = 1
    network = Counting()
    predict_logits(
        [network], np.ones((1, 4, 8, 12), np.float32), CONFIGURATION, CPU, previous=PreviousLabels(labels, 2)
    )
    assert network.tiles == 3  # the two tiles with the labelled voxel, and one without


@pytest.mark.parametrize("together", [1, 2 * 4 * 8 * 6, 10**9])
def test_how_many_views_go_together_changes_nothing(together):
    image, networks = image_of((7, 13, 11)), networks_of(CONFIGURATION, 3, 2)
    views = Mirroring((0, 1, 2))
    slabs = stream_logits(
        networks, image, CONFIGURATION, CPU, mirroring=views, blending=Blending(together=together, on_device=False)
    )
    expected = predict_logits(networks, image, CONFIGURATION, CPU, mirroring=views)
    torch.testing.assert_close(torch.cat(list(slabs), 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    image = image_of((9, 13, 11))
    image[0, 7, 6, 5] = bad
    with pytest.raises(NonFiniteError, match="E1002") as caught:
        predict_logits([Counting()], image, CONFIGURATION, CPU)
    assert caught.value.exit_code == 10


def test_networks_that_agree_have_no_disagreement_and_certain_opposites_all_of_it():
    logits = torch.randn(1, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    sure = torch.tensor([60.0, 0, 0]).view(1, 3, 1), torch.tensor([0, 60.0, 0]).view(1, 3, 1)
    assert disagreement([logits, logits.clone()], regions=False).abs().max() < 1e-6
    torch.testing.assert_close(disagreement(sure, regions=False), torch.ones(1, 1, 1))
    opposite = [torch.full((1, 2, 1), 50.0), torch.full((1, 2, 1), -50.0)]
    torch.testing.assert_close(disagreement(opposite, regions=True), torch.ones(1, 1, 1))


def test_disagreement_equals_scipys_jensen_shannon_distance_squared():
    from scipy.spatial.distance import jensenshannon

    a, b = torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(3))
    expected = [
        jensenshannon(torch.softmax(a, 1)[0, :, v], torch.softmax(b, 1)[0, :, v], base=2) ** 2 for v in range(6)
    ]
    np.testing.assert_allclose(disagreement([a, b], regions=False)[0, 0], expected, rtol=1e-4, atol=1e-6)


def test_the_disagreement_of_networks_is_one_more_channel():
    networks, image = networks_of(CONFIGURATION, 12, 2), image_of((7, 13, 11))
    slabs = stream_logits(networks, image, CONFIGURATION, CPU, blending=Blending(disagreement=True))
    found = torch.cat(list(slabs), 1)
    assert found.shape == (13, 7, 13, 11)
    torch.testing.assert_close(found[:12], predict_logits(networks, image, CONFIGURATION, CPU), rtol=1e-3, atol=1e-4)
    assert 0 < found[12].min() <= found[12].max() <= 1
    assert passes.entropy(torch.full((1, 4, 1), 0.25), False).item() == pytest.approx(np.log(4))
