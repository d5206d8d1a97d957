"""Two equal structures, one on each side: what mirroring does to a network that should tell them apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import make_configuration, make_task, store_case

from medseg.inference.sliding import Mirroring, predict_logits
from medseg.networks.device import Device
from medseg.records.network import NetworkPlan
from medseg.records.training import Laterality
from medseg.training.loop import Settings, train
from medseg.training.schedule import Length

CPU = Device(torch.device("cpu"), torch.float32, "test")
SHAPE = (8, 16, 24)
SIDES = Laterality(axis=2, pairs=((1, 2),))
NETWORK = NetworkPlan(
    features=(6, 10, 14, 18),
    kernels=((3, 3, 3),) * 4,
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 2, 2)),
    convs_encoder=(1, 1, 1, 1),
    convs_decoder=(1, 1, 1),
)


def body(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A body with two equal kidneys; left (1) has the small index along the last axis."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")
    labels = np.zeros(SHAPE, np.int16)
    for label, centre in ((1, 6.5), (2, 16.5)):
        inside = ((z - 4) / 3) ** 2 + ((y - 8 - rng.uniform(-1, 1)) / 5) ** 2 + ((x - centre) / 3.5) ** 2 < 1
        labels[inside] = label
    image = np.where(labels > 0, 1.5, -0.5) + rng.normal(0, 0.2, SHAPE)
    return image[None].astype(np.float32), labels


def dice_after_training(folder, mirror: tuple[int, ...], laterality: Laterality | None) -> list[float]:
    """Of both kidneys of a new body, averaged over mirrored views."""
    cases = [store_case(folder / "store", f"case_{seed}", *body(seed)).load() for seed in range(3)]
    recipe = {"momentum": 0.9, "initial_lr": 0.05, "mirror_axes": mirror, "laterality": laterality}
    configuration = make_configuration(SHAPE, NETWORK, batch_size=2, **recipe)
    trained = train(cases, Settings(make_task(), configuration, Length(steps=110), CPU), folder)
    image, labels = body(99)
    mirroring = Mirroring(mirror, configuration.swap(make_task()))
    logits = predict_logits([trained.network], image, configuration, CPU, mirroring=mirroring)
    found = logits.argmax(0).numpy()
    return [2 * ((found == n) & (labels == n)).sum() / ((found == n).sum() + (labels == n).sum()) for n in (1, 2)]


@pytest.mark.parametrize(
    ("mirror", "laterality"), [((0, 1, 2), SIDES), ((0, 1), None)], ids=["sides change places", "axis not mirrored"]
)
def test_sides_are_told_apart_where_mirroring_knows_of_them(tmp_path, mirror, laterality):
    assert min(dice_after_training(tmp_path, mirror, laterality)) > 0.8


def test_sides_are_mixed_up_where_it_does_not(tmp_path):
    """What nnU-Net's users report; it is the reason for the rule (medseg/planning/sides.py)."""
    assert min(dice_after_training(tmp_path, (0, 1, 2), None)) < 0.6
