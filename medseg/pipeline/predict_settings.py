"""Settings of a prediction: the presets of speed, what they mean, and what single options change."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from medseg.errors import IncompatibleError, InputError, Problem, UsageError
from medseg.imaging.volumes import LABEL_ENDINGS
from medseg.inference.backend import Backend, BackendName, choose_backend
from medseg.inference.maps import Steps, Wanted
from medseg.inference.model import Model, cut, mirroring_of, with_attention
from medseg.inference.need import case_need
from medseg.inference.passes import PLAIN, power_of_two, split_heads, voxels_together
from medseg.inference.windows import STEP
from medseg.networks.device import Device
from medseg.records.base import read_record
from medseg.records.grid import Float3, Int3
from medseg.records.int8 import INT8, Int8Ranges
from medseg.records.model import PostProcessing, Refinement

Augmented = Literal["none", "mirror"]
Speed = Literal["fast", "balanced", "accurate"]

SMALLEST_STEP = 0.1


@dataclass(frozen=True, slots=True)
class Preset:
    """Distance of tiles in shares of the tile, views, and whether one network is enough where there are several."""

    step: float
    tta: Augmented
    one_network: bool = False


# A step of 0.8 costs a third of the tiles and 0.001 of Dice (TotalSegmentator's notes on its release 2.3).
PRESETS: dict[Speed, Preset] = {
    "fast": Preset(0.8, "none", one_network=True),
    "balanced": Preset(STEP, "none"),
    "accurate": Preset(STEP, "mirror"),
}


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """Which networks and how: ``folds`` () means the model of all cases, else all trained folds.

    ``tta``, ``step`` and ``folds`` go before what ``speed`` says. ``ending`` of the label files is one of
    ``LABEL_ENDINGS``; None keeps the input's own, see ``label_ending``. ``probabilities`` are written in 255 or 65535
    steps, None for not at all; ``uncertainty`` writes a map of it, and a score of quality into the manifest. With
    ``preview`` every case is also drawn, as ``previews/CASE.png`` in the output folder.

    ``postprocessing`` and ``refinement`` go before what cross-validation chose, see ``pipeline.processing``. ``depth``
    cuts a U-Net++; ``attention_maps`` writes what the gates of an attention U-Net let pass. ``backend`` computes the
    networks, see ``choose_backend``.
    """

    configuration: str | None = None
    folds: tuple[str, ...] = ()
    tta: Augmented | None = None
    device: Device | None = None
    ending: str | None = None
    preview: bool = False
    speed: Speed = "balanced"
    step: float | None = None
    probabilities: Steps | None = None
    uncertainty: bool = False
    postprocessing: PostProcessing | None = None
    refinement: Refinement | Literal["none"] | None = None
    depth: int | None = None
    attention_maps: bool = False
    backend: BackendName = "auto"

    @property
    def mirror(self) -> bool:
        """Whether mirrored views are averaged."""
        return (self.tta or PRESETS[self.speed].tta) == "mirror"

    @property
    def tile_step(self) -> float:
        """Distance of tiles in shares of the tile."""
        return PRESETS[self.speed].step if self.step is None else self.step

    @property
    def wanted(self) -> Wanted:
        """The maps to write."""
        return Wanted(self.probabilities, self.uncertainty, self.attention_maps)


def check_options(options: PredictOptions) -> None:
    """Refuse what is not written or makes no sense.

    Raises:
        UsageError: E0001.
    """
    if options.ending not in (None, *LABEL_ENDINGS):
        raise UsageError(Problem("E0001", f"ending {options.ending}", f"one of {' '.join(LABEL_ENDINGS)}"))
    if options.step is not None and not SMALLEST_STEP <= options.step <= 1:
        raise UsageError(Problem("E0001", f"step {options.step}", f"a share of the tile from {SMALLEST_STEP} to 1"))
    if options.attention_maps and options.uncertainty:
        raise UsageError(Problem("E0001", "attention maps and uncertainty", "one of them at a time", "leave one out"))


def adapted(model: Model, options: PredictOptions) -> Model:
    """The model as the options want it: fewer networks, cut at a depth, or showing its attention.

    Raises:
        UsageError: E0001 its networks cannot be cut there, or have no attention gates.
    """
    model = limited(model, options)
    if options.depth is not None:
        model = cut(model, options.depth)
    return with_attention(model) if options.attention_maps else model


def limited(model: Model, options: PredictOptions) -> Model:
    """The model with the networks that the preset of speed asks for, in all stages."""
    if options.folds or not PRESETS[options.speed].one_network:
        return model
    previous = None if model.previous is None else limited(model.previous, options)
    first = {name: getattr(model, name)[:1] for name in ("cards", "networks", "fold_folders")}
    return replace(model, previous=previous, **first)


def accelerated(model: Model, options: PredictOptions, cases: int) -> Model:
    """The model with the backend asked for, or the fastest for ``cases`` cases as the plan's median, in all stages.

    Raises:
        UsageError: E0001 the backend is not installed, or not for the device.
        InputError: E0100 int8 is asked for, and ranges were not measured.
        IncompatibleError: E0802 they were measured with other weights.
    """
    previous = None if model.previous is None else accelerated(model.previous, options, cases)
    if options.attention_maps:  # more outputs than the network has; and not on every stage
        return replace(model, backend=Backend("torch", "for attention maps"), previous=previous)
    alone = replace(model, previous=None)
    mirroring = mirroring_of(model) if options.mirror else PLAIN
    disagreement = options.uncertainty and len(model.networks) > 1
    split = None if disagreement else split_heads(model.networks, mirroring)
    need = case_need(alone, *_median(alone), options.tile_step, mirror=options.mirror, mapped=False)
    shape = (model.configuration.input_channels(model.plan.task), *model.configuration.patch_size)
    networks, passes = model.networks if split is None else split[0], need.passes // len(model.networks)
    group = power_of_two(max(1, min(passes, voxels_together(model.device) // math.prod(shape[1:]))))
    ranges = [read_ranges(model, n) for n in range(len(networks))] if options.backend == "int8" else []
    backend = choose_backend(options.backend, networks, shape, model.device, cases * passes, group, ranges)
    return replace(model, backend=backend, previous=previous)


def read_ranges(model: Model, number: int) -> Int8Ranges:
    """What ``medseg quantise`` measured for the network at place ``number`` of the model's.

    Raises:
        InputError: E0100 nothing yet.
        IncompatibleError: E0802 with other weights.
        IntegrityError: E0711 the file is damaged.
    """
    path, card = model.fold_folders[number] / INT8, model.cards[number]
    advice = "medseg quantise --model MODEL -i IMAGES measures them"
    if not path.is_file():
        raise InputError(Problem("E0100", f"--backend int8: {path} is not there", "", advice))
    ranges = read_record(path, Int8Ranges)
    if ranges.weights_sha256 != card.weights_sha256:
        raise IncompatibleError(Problem("E0802", f"{path} was measured with other weights", "", advice))
    return ranges


def engine_words(model: Model) -> str:
    """What computes each stage, in which precision, and why, in one line."""
    return "; ".join(
        f"{stage.configuration.name}: {stage.backend.name}, {stage.device.precision} ({stage.backend.reason})"
        for stage in model.stages
    )


def meaning(model: Model, options: PredictOptions) -> str:
    """What is going to be done and what it costs, in one line, for a case as the plan's median."""
    step, mirror = options.tile_step, options.mirror
    views = max(len(mirroring_of(stage).views) for stage in model.stages) if mirror else 1
    shape, spacing = _median(model)
    need = case_need(model, shape, spacing, step, mirror=mirror, mapped=options.wanted.any)
    mirrored = f"{views} mirrored views" if views > 1 else "no axis to mirror" if mirror else "no mirroring"
    networks = len(model.networks)
    how = f"tiles {step:g} of their size apart, {mirrored}, {networks} network{'s' * (networks > 1)}"
    how += "" if options.depth is None else f", cut at depth {options.depth}"
    return f"{options.speed}: {how}; a median case has {need.in_words}"


def _median(model: Model) -> tuple[Int3, Float3]:
    """Shape and spacing of the median case on the grid of the last stage."""
    configuration = model.configuration
    sizes = [max(1, math.ceil(n)) for n in configuration.median_shape]
    z, y, x = (1, *sizes)[-3:]
    spacing = (1.0, *configuration.spacing_mm)[-3:]
    return (z, y, x), (spacing[0], spacing[1], spacing[2])
