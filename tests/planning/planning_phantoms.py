"""Made-up fingerprints and tasks for the planner."""

from __future__ import annotations

from medseg.records.fingerprint import CasePrint, Fingerprint, Intensity
from medseg.records.task import Channel, Label, Task

INTENSITY = Intensity(mean=1, median=1, std=1, min=0, max=2, percentile_00_5=0, percentile_99_5=2)


def fingerprint(cases, channels: int = 1, relative: float = 1.0) -> Fingerprint:
    return Fingerprint(
        cases=tuple(
            CasePrint(id=f"c{i:03d}", shape_after_crop=n, spacing_mm=s, relative_size_after_cropping=relative)
            for i, (n, s) in enumerate(cases)
        ),
        intensities=(INTENSITY,) * channels,
        median_relative_size_after_cropping=relative,
    )


def task(channels: tuple[str, ...] = ("MRI",), classes: int = 2, **more) -> Task:
    return Task(
        channels=tuple(Channel(name=name) for name in channels),
        labels=tuple(Label(name=f"l{value}", value=value) for value in range(classes)),
        **more,
    )
