"""Mirrored views of what has a left and a right, and of what a first stage saw."""

from __future__ import annotations

import numpy as np
import torch
from test_sliding import CONFIGURATION, CPU, TILE, Uneven, image_of
from torch import Tensor, nn

from medseg.inference.sliding import Mirroring, PreviousLabels, predict_logits
from medseg.records.training import Swap

SWAP = Swap(axis=2, classes=(0, 2, 1), outputs=(1, 0))


class Echo(nn.Module):
    """Two outputs: what the labels of the first stage say of classes 1 and 2."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, -2:].clone()]


def test_outputs_change_sides_in_views_along_the_swapped_axis_only():
    image, network = image_of((4, 8, 6)), Uneven(TILE)
    x = torch.from_numpy(image)[None]
    plain, up, side = network(x)[0], network(x.flip(2))[0].flip(2), network(x.flip(4))[0].flip(4)
    both = network(x.flip((2, 4)))[0].flip((2, 4))
    expected = (plain + up + side[:, [1, 0]] + both[:, [1, 0]]) / 4
    found = predict_logits([network], image, CONFIGURATION, CPU, mirroring=Mirroring((0, 2), SWAP))
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)


def test_an_axis_that_is_not_mirrored_swaps_nothing():
    image, network = image_of((5, 9, 7)), Uneven(TILE)
    found = predict_logits([network], image, CONFIGURATION, CPU, mirroring=Mirroring((0, 1), SWAP))
    expected = predict_logits([network], image, CONFIGURATION, CPU, mirroring=Mirroring((0, 1)))
    assert torch.equal(found, expected)


def test_labels_of_a_first_stage_are_seen_where_they_are_also_in_mirrored_views():
    """Seen mirrored, the left structure is called right: undone twice, every view says the same."""
    labels = np.random.default_rng(0).integers(0, 3, (6, 13, 11)).astype(np.int16)
    image = image_of(labels.shape)
    previous = PreviousLabels(labels, 3)
    expected = torch.from_numpy(np.stack([labels == 1, labels == 2]).astype(np.float32))
    for mirroring in (Mirroring(), Mirroring((0, 1, 2)), Mirroring((0, 1, 2), SWAP)):
        found = predict_logits([Echo()], image, CONFIGURATION, CPU, mirroring=mirroring, previous=previous)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
