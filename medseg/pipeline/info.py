"""Info: what a network of a plan, or one that is only thought of, is made of and costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medseg.errors import Problem, UsageError
from medseg.networks.summary import Summary, summarise
from medseg.pipeline.plan import read_plan
from medseg.pipeline.run_folder import default_configuration
from medseg.planning.cost import step_memory_bytes
from medseg.planning.field import WHOLE, receptive_field
from medseg.planning.layers import layers_of
from medseg.planning.networks import NETWORK_PLANS, Variant, choice_of, input_patch, planned_network, rules_with
from medseg.planning.presets import DEFAULT_PRESET, NetworkChoice, preset_named
from medseg.planning.topology import topology
from medseg.records.network import NetworkPlan
from medseg.records.plan import Budget
from medseg.reporting.network import FORMATS, network_drawing

PATCHES = {2: (256, 256), 3: (96, 96, 96)}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A network by name, or that of a run's or plan file's configuration, and a patch instead of the planned one.

    Without a plan ``spacing_mm`` shapes the network, by default the same along all axes.
    """

    network: NetworkChoice | None = None
    plan: Path | None = None
    configuration: str | None = None
    patch: tuple[int, ...] | None = None
    spacing_mm: tuple[float, ...] | None = None
    channels: int = 1
    outputs: int = 2


@dataclass(frozen=True, slots=True)
class NetworkInfo:
    """A network on a patch: ``memory_bytes`` of a training step of one sample in float32 on the CPU, about.

    ``field`` is the receptive field in voxels, "whole patch", or None where it is not known.
    """

    choice: NetworkChoice
    network: NetworkPlan
    patch: tuple[int, ...]
    channels: int
    outputs: int
    summary: Summary
    memory_bytes: float
    field: tuple[int, ...] | str | None


def describe(wanted: Wanted) -> NetworkInfo:
    """What a network is made of.

    Raises:
        UsageError: E0001 neither network nor plan, or no such network, configuration or patch.
        InputError: E0100 no plan there.
    """
    network, patch, channels, outputs = _planned(wanted) if wanted.plan else _imagined(wanted)
    try:
        network.output_size(patch)
        summary = summarise(network, patch, channels, outputs)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            Problem("E0001", f"--patch {' '.join(map(str, patch))}: {reason}", "", "try another")
        ) from error
    budget = Budget(device="cpu", half=False)
    memory = step_memory_bytes(layers_of(network, patch, channels, outputs), 1, budget, len(patch))
    field = "whole patch" if network.name in WHOLE else receptive_field(network)
    return NetworkInfo(choice_of(network), network, patch, channels, outputs, summary, memory, field)


def draw(info: NetworkInfo, path: Path) -> str:
    """Draw the network into an SVG, PNG or PDF file; returns its SHA-256.

    Raises:
        UsageError: E0001 another ending.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(Problem("E0001", f"--draw {path.name}", ", ".join(FORMATS), "choose one of these endings"))
    return network_drawing(info.network, info.patch, info.channels, info.outputs, info.summary.parameters, path)


def _planned(wanted: Wanted) -> tuple[NetworkPlan, tuple[int, ...], int, int]:
    """Of a plan: its own network, or another one on the same patch and spacing."""
    assert wanted.plan is not None
    plan = read_plan(wanted.plan)
    name = wanted.configuration or default_configuration(plan)
    if name not in plan.configurations:
        known = ", ".join(plan.configurations)
        raise UsageError(Problem("E0001", f"configuration {name} is not in the plan", known, "choose one of these"))
    configuration = plan.configurations[name]
    patch = wanted.patch or configuration.patch_size
    _check_patch(patch, (configuration.dimensions,))
    network = configuration.network
    if wanted.network is not None and wanted.network != choice_of(network):
        network, patch = _on(wanted.network, configuration.spacing_mm, patch)
    return network, patch, configuration.input_channels(plan.task), plan.task.outputs


def _imagined(wanted: Wanted) -> tuple[NetworkPlan, tuple[int, ...], int, int]:
    if wanted.network is None:
        raise UsageError(Problem("E0001", "neither --network nor --plan", "one of them", "see medseg info --help"))
    patch = wanted.patch or PATCHES[len(wanted.spacing_mm) if wanted.spacing_mm else 3]
    _check_patch(patch, (2, 3))
    spacing_mm = wanted.spacing_mm or (1.0,) * len(patch)
    if len(spacing_mm) != len(patch) or min(spacing_mm) <= 0:
        raise UsageError(Problem("E0001", f"--spacing {spacing_mm}", f"{len(patch)} numbers above 0", ""))
    network, patch = _on(wanted.network, spacing_mm, patch)
    return network, patch, wanted.channels, wanted.outputs


def _on(
    choice: NetworkChoice, spacing_mm: tuple[float, ...], patch: tuple[int, ...]
) -> tuple[NetworkPlan, tuple[int, ...]]:
    """The network that would be planned for a patch of that spacing, and the patch it would see."""
    if choice not in NETWORK_PLANS:
        raise UsageError(Problem("E0001", f"--network {choice}", ", ".join(NETWORK_PLANS), "choose one of them"))
    rules = rules_with(preset_named(DEFAULT_PRESET), Variant(choice))
    found = topology(spacing_mm, patch, rules.min_edge)
    network = planned_network(found, rules)
    return network, input_patch(network, found.patch)


def _check_patch(patch: tuple[int, ...], dimensions: tuple[int, ...]) -> None:
    if len(patch) not in dimensions or not all(1 <= n <= 4096 for n in patch):
        expected = f"{' or '.join(map(str, dimensions))} numbers from 1 to 4096"
        raise UsageError(Problem("E0001", f"--patch {' '.join(map(str, patch))}", expected, ""))
