"""The drawings of the networks in the docs are those of the networks that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from medseg.pipeline.info import Wanted, describe
from medseg.planning.networks import NETWORK_PLANS

CONCEPTS = Path(__file__).resolve().parents[2] / "docs" / "concepts"
ALIKE = {"unet2015-valid", "resnet18-unet", "resnet50-unet"}


def test_the_page_shows_every_network_that_looks_different():
    shown = re.findall(r"!\[([^]]+)]\(images/network-([^)]+)\.svg\)", (CONCEPTS / "networks.md").read_text())
    assert {name for name, _ in shown} == {file for _, file in shown} == set(NETWORK_PLANS) - ALIKE
    assert {path.stem for path in (CONCEPTS / "images").glob("network-*.svg")} == {f"network-{n}" for _, n in shown}


@pytest.mark.parametrize("name", sorted(set(NETWORK_PLANS) - ALIKE))
def test_drawings_are_current(name):
    drawing = (CONCEPTS / "images" / f"network-{name}.svg").read_text()
    info = describe(Wanted(name, patch=(128, 128)))
    assert f"{info.summary.parameters:,} weights" in drawing, "run scripts/draw_networks.py"
    assert all(f">{features}</text>" in drawing for features in info.network.features[1:])
    assert drawing.count("128 × 128") >= 3
