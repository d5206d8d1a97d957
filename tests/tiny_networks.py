"""Tiny networks: every network that can be planned, narrow, on a small anisotropic patch."""

from __future__ import annotations

from medseg.planning.networks import NETWORK_PLANS, Variant, planned_network, rules_with
from medseg.planning.presets import MEDSEG
from medseg.planning.topology import topology
from medseg.records.network import NetworkPlan, TransformerPlan

NAMES = tuple(NETWORK_PLANS)
FOUND = {2: topology((1.0, 1.0), (16, 24), 4), 3: topology((3.0, 1.0, 1.0), (6, 16, 24), 4)}
FLAT_OR_SOLID = [(name, d) for name in NAMES for d in (2, 3) if (name, d) != ("unet2015-valid", 3)]


def planned(name: str, dimensions: int, **changes) -> NetworkPlan:
    """The planned network on a small anisotropic patch, narrow where its width can be chosen."""
    plan = planned_network(FOUND[dimensions], rules_with(MEDSEG, Variant(name)))
    stages = len(plan.features)
    narrow: dict = {"features": tuple(4 * 2**stage for stage in range(stages))}
    if name == "swinunetr":
        narrow = {"features": (12, 12, 24, 48, 96, 192)}
    elif name == "unetr":
        narrow = {"features": (4, 8, 16, 32, 24)}
    elif name.startswith("resnet"):
        wide = 4 if plan.block == "bottleneck" else 1
        narrow = {"features": (4, 8, *(8 * wide * 2**n for n in range(4))), "convs_encoder": (1, 1, 1, 2, 1, 1)}
    elif name == "transunet":
        narrow["transformer"] = TransformerPlan(layers=2, heads=2, width=24, mlp=32)
    return NetworkPlan.model_validate(plan.to_json() | narrow | changes)
