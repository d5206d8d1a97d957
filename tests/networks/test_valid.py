"""Convolutions without padding: tiles must fit together as if the network had seen the whole image at once."""

from __future__ import annotations

import numpy as np
import torch
from tiny_models import make_configuration

from medseg.inference.sliding import predict_logits
from medseg.networks.build import build_network
from medseg.networks.device import Device
from medseg.records.network import NetworkPlan

PLAN = NetworkPlan(
    name="unet2015",
    features=(3, 4),
    kernels=((3, 3), (3, 3)),
    strides=((1, 1), (2, 2)),
    convs_encoder=(2, 2),
    convs_decoder=(2,),
    deep_supervision=False,
    norm="batch",
    padding="valid",
)
CPU = Device(torch.device("cpu"), torch.float32, "test")


def test_tiles_without_padding_equal_the_whole_mirrored_image_at_once():
    network = build_network(PLAN, 1, 2).eval()
    assert PLAN.output_size((28, 32)) == (12, 16)
    image = np.random.default_rng(3).normal(size=(1, 2, 24, 48)).astype(np.float32)
    found = predict_logits([network], image, make_configuration((28, 32), PLAN), CPU)
    mirrored = np.pad(image, ((0, 0), (0, 0), (8, 8), (8, 8)), mode="reflect")
    with torch.no_grad():
        expected = torch.stack([network(torch.from_numpy(mirrored[:, z][None]))[0][0] for z in range(2)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_images_smaller_than_a_tile_come_back_in_their_size():
    network = build_network(PLAN, 1, 2).eval()
    image = np.ones((1, 1, 5, 7), np.float32)
    assert tuple(predict_logits([network], image, make_configuration((28, 32), PLAN), CPU).shape) == (2, 1, 5, 7)
