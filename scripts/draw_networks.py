#!/usr/bin/env python3
"""Draw every network for docs/concepts/networks.md, as `medseg info --network NAME --patch 128 128 --draw` does.

python scripts/draw_networks.py                # writes docs/concepts/images/network-NAME.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from medseg.pipeline.info import Wanted, describe, draw
from medseg.planning.networks import NETWORK_PLANS

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "concepts" / "images"
ALIKE = ("unet2015-valid", "resnet18-unet", "resnet50-unet")  # the drawing would say nothing else
PATCH = (128, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the drawings (default: the docs')")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name in NETWORK_PLANS:
        if name not in ALIKE:
            draw(describe(Wanted(name, patch=PATCH)), output / f"network-{name}.svg")


if __name__ == "__main__":
    main()
