"""Normalisation: which scheme each channel gets, by the name of the channel."""

from __future__ import annotations

from medseg.planning.presets import Preset
from medseg.planning.wording import number
from medseg.records.plan import Normalisation, Reason, Scheme
from medseg.records.task import Channel, Task

SCHEMES: dict[str, Scheme] = {
    "ct": "ct",
    "nonorm": "none",
    "zscore": "zscore",
    "rescale_to_0_1": "rescale_0_1",
    "rgb_to_0_1": "rgb_0_1",
}
"""nnU-Net's channel names in lower case (map_channel_name_to_normalization.py); every other name means z-score."""


def scheme_of(channel: Channel) -> Scheme:
    """The scheme that a channel's name asks for, whatever its case."""
    return SCHEMES.get(channel.name.casefold(), "zscore")


def normalisations(task: Task, relative_size: float, preset: Preset) -> tuple[tuple[Normalisation, ...], Reason]:
    """One per channel. Z-score statistics leave out the zeros around the body when cropping removed much.

    Args:
        task: its channels' names decide the schemes.
        relative_size: median over the cases of the volume left by cropping to nonzero, 0 to 1.
        preset: ``mask_below`` is the relative size below which the mask is used.
    """
    masked = relative_size < preset.mask_below
    chosen = tuple(
        Normalisation(scheme=scheme, use_mask=masked and scheme == "zscore")
        for scheme in (scheme_of(channel) for channel in task.channels)
    )
    schemes = ", ".join(f"{channel.name}: {n.scheme}" for channel, n in zip(task.channels, chosen, strict=True))
    below = "below" if masked else "not below"
    where = "z-score inside the nonzero mask only" if masked else "z-score over the whole crop"
    text = (
        f"{schemes} (by channel name); cropping to nonzero left {number(100 * relative_size)} % of the median case, "
        f"{below} {number(100 * preset.mask_below)} %: {where}"
    )
    return chosen, Reason(topic="normalisation", text=text)
