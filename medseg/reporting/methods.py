"""Methods: what a paper says of how the segmentation was made, from the plan and the finished models, with sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from medseg.planning.wording import times
from medseg.records.fingerprint import Fingerprint
from medseg.records.model import ModelCard
from medseg.records.network import PADDING_NETWORKS
from medseg.records.plan import ConfigurationPlan, Plan
from medseg.records.run import Splits
from medseg.records.scores import Scores
from medseg.records.training import TrainingPlan
from medseg.reporting.network import TITLES
from medseg.reporting.sources import NETWORKS, SOURCES

_SCHEMES = {
    "zscore": "z-score of each image",
    "ct": "clipped to the 0.5th and 99.5th percentile of the training foreground, then standardised with its mean and "
    "standard deviation",
    "none": "not normalised",
    "rescale_0_1": "scaled to 0–1 by each image's own range",
    "rgb_0_1": "divided by 255",
}
_SPLINES = {0: "nearest neighbour", 1: "linear interpolation", 2: "quadratic splines", 3: "cubic splines"}


@dataclass(slots=True)
class Bibliography:
    """Sources in the order in which they are first cited."""

    keys: list[str] = field(default_factory=list)

    def cite(self, *keys: str) -> str:
        """``[1, 2]``."""
        for key in keys:
            if key not in self.keys:
                self.keys.append(key)
        return f"[{', '.join(str(self.keys.index(key) + 1) for key in keys)}]"

    @property
    def entries(self) -> tuple[str, ...]:
        """The sources, first cited first."""
        return tuple(SOURCES[key] for key in self.keys)


@dataclass(frozen=True, slots=True)
class Methods:
    """Paragraphs, and the sources that they cite by number."""

    paragraphs: tuple[str, ...]
    sources: tuple[str, ...]


def methods_text(
    plan: Plan,
    fingerprint: Fingerprint | None,
    splits: Splits | None,
    cards: Sequence[ModelCard],
    scores: Scores | None,
) -> Methods:
    """One paragraph on the data and one per trained configuration; only what was done, and how long it really took."""
    sources = Bibliography()
    paragraphs = [_data(plan, fingerprint, sources)]
    names = dict.fromkeys(card.configuration for card in cards)
    paragraphs += [_model([card for card in cards if card.configuration == name], sources) for name in names]
    if cards:
        paragraphs.append(_validation(splits, cards, scores, sources))
    else:
        paragraphs.append("No training has finished yet.")
    return Methods(tuple(paragraphs), sources.entries)


def _data(plan: Plan, fingerprint: Fingerprint | None, sources: Bibliography) -> str:
    task = plan.task
    preset = "its own preset" if plan.preset == "medseg" else f"the preset {plan.preset}"
    text = (
        f"Images were segmented with medseg, which configures U-Nets {sources.cite('unet', 'unet3d')} from the "
        f"properties of a data set after the rules of nnU-Net {sources.cite('nnunet')} ({preset}, planned for "
        f"{plan.budget.memory_gb:g} GB of memory). "
    )
    several = "s" if len(task.channels) > 1 else ""
    channels = f"channel{several} {_listed([channel.name for channel in task.channels])}"
    labels = ", ".join(label.name for label in task.foreground)
    counted = f"{len(task.foreground)} structure{'s' if len(task.foreground) > 1 else ''} ({labels})"
    if fingerprint is None:
        return f"{text}The images have the {channels}; {counted} were to be found."
    shape = np.median([case.shape_after_crop for case in fingerprint.cases], axis=0)
    spacing = np.median([case.spacing_mm for case in fingerprint.cases], axis=0)
    return (
        f"{text}The data set {task.name} holds {len(fingerprint.cases)} cases with {counted} and the image "
        f"{channels}; cropped to nonzero voxels they have a median of {times(shape)} voxels (z, y, x) of a median "
        f"size of {times(spacing)} mm."
    )


def _model(cards: Sequence[ModelCard], sources: Bibliography) -> str:
    """Of the models' own plan: that of the run may have been edited since."""
    plan = cards[0].plan
    configuration = plan.configurations[cards[0].configuration]
    return " ".join(
        (
            _preparation(plan, configuration),
            _network(configuration, sources),
            _training(plan, configuration, cards, sources),
        )
    )


def _preparation(plan: Plan, configuration: ConfigurationPlan) -> str:
    schemes = [
        f"{channel.name}: {_SCHEMES[n.scheme]}{' within the nonzero mask' if n.use_mask else ''}"
        for channel, n in zip(plan.task.channels, configuration.normalisation, strict=True)
    ]
    plane = " in plane" if configuration.dimensions == 2 else ""
    canonical = plan.orientation == "canonical"
    turned = "were turned to RAS orientation" if canonical else "were taken on the axes of their files"
    return (
        f"Configuration {configuration.name}: volumes {turned}, cropped to nonzero voxels, "
        f"normalised ({'; '.join(schemes)}) and resampled to {times(configuration.spacing_mm)} mm{plane} by "
        f"{_SPLINES[configuration.resampling.image_order]} (labels by {_SPLINES[configuration.resampling.label_order]}"
        f" of each)."
    )


def _network(configuration: ConfigurationPlan, sources: Bibliography) -> str:
    network = configuration.network
    keys = NETWORKS[network.name]
    cited = f" {sources.cite(*keys)}" if keys else ""
    norms = {"instance": f", instance normalisation {sources.cite('instance')}", "batch": ", batch normalisation"}
    norm = "" if network.name in PADDING_NETWORKS or network.norm == "none" else norms[network.norm]
    supervision = ", trained with deep supervision" if network.deep_supervision else ""
    cascade = (
        f" As the second stage of a cascade it also saw the labels predicted by {configuration.previous_stage}."
        if configuration.previous_stage
        else ""
    )
    return (
        f"The {configuration.dimensions}D network, {TITLES[network.name]}{cited}, has {len(network.features)} stages "
        f"with {', '.join(map(str, network.features))} features{norm}{supervision}.{cascade}"
    )


def _training(plan: Plan, configuration: ConfigurationPlan, cards: Sequence[ModelCard], sources: Bibliography) -> str:
    recipes = dict.fromkeys(
        f"batches of {c.batch_size}, an initial learning rate of {c.training.initial_lr:.3g}, Nesterov momentum "
        f"{c.training.momentum:g} and weight decay {c.training.weight_decay:g}"
        for c in cards
    )
    steps, seconds = [c.steps for c in cards], [c.training_seconds for c in cards]
    training = cards[0].training
    names = ("y", "x") if configuration.dimensions == 2 else ("z", "y", "x")
    mirrored = _listed([names[axis] for axis in training.mirror_axes])
    mirroring = f"mirroring along {mirrored} of the patch" if mirrored else "no mirroring"
    if training.laterality is not None:
        mirroring += " (labels of left and right changing places)"
    loss = _loss(plan, training, sources)
    begun = "" if plan.origin is None else "Beginning from the weights of another model (fine-tuning), "
    return (
        f"{begun}{'it' if begun else 'It'} was trained on patches of {times(configuration.patch_size)} voxels with "
        f"{' or '.join(recipes)}, the "
        f"learning rate falling to zero with the power 0.9 of the training left, with {loss}, for {_range(steps)} "
        f"steps ({_range(seconds, _minutes)}) in each of {len(cards)} training{'s' if len(cards) > 1 else ''}. "
        f"Augmentation: rotation, scaling, noise, blur, brightness, contrast, simulated low resolution, gamma, and "
        f"{mirroring}."
    )


def _loss(plan: Plan, training: TrainingPlan, sources: Bibliography) -> str:
    if training.loss != "dice-ce":
        return f"the loss that medseg calls {training.loss}"
    entropy = "binary cross-entropy of each region" if plan.task.regions else "cross-entropy"
    batch = "the batch" if training.batch_dice else "each sample"
    return f"the sum of {entropy} and soft Dice loss {sources.cite('dice')} (Dice over {batch}) as its loss"


def _validation(splits: Splits | None, cards: Sequence[ModelCard], scores: Scores | None, sources: Bibliography) -> str:
    folds = sorted({card.fold for card in cards})
    drawn = ""
    if splits is not None:
        seed = "" if splits.seed is None else f", seed {splits.seed}"
        drawn = f" of {len(splits.folds)} ({splits.method}{seed})"
        if splits.groups:
            drawn += f", with the cases of a group ({splits.grouped_by}) on one side"
    text = f"Trained folds: {', '.join(folds)}{drawn}. "
    if scores is None:
        return text + "Nothing has been scored yet."
    tolerance = f"{scores.tolerance_mm:g} mm"
    if scores.label_tolerances_mm:
        tolerance += " unless a structure has its own"
    return (
        f"{text}Whole volumes were segmented by a sliding window with half-overlapping, Gaussian-weighted patches, "
        f"brought back to the original grid and compared with the references: Dice, surface Dice at {tolerance} "
        f"{sources.cite('nsd')} (means over cases with 95 % bootstrap intervals {sources.cite('bootstrap')}) and the "
        f"95th percentile of the Hausdorff distance (median over cases). Structures absent from both prediction and "
        f"reference do not count; missed and spurious ones count as a Dice of 0. Validation scores are without "
        f"post-processing."
    )


def _listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _minutes(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def _range(values: Sequence[float], word: Callable[[float], str] = _count) -> str:
    low, high = word(min(values)), word(max(values))
    return low if low == high else f"{low} to {high}"
