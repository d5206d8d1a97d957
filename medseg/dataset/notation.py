"""Notation: channels, labels and regions as short texts, on the command line and at the head of a CSV list.

    T1, T2                          channels
    liver=1, tumour=2               labels; background=0 goes without saying
    whole=1+2+3, core=2+3           regions
    1, 2, 3                         values

Semicolons separate as commas do: a spreadsheet may have put them there. Empty entries are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_VALUE = re.compile(r"[0-9]{1,5}")
_UNWRITABLE = re.compile(r"[,;=\"\x00-\x1f\x7f]")


def parse_names(text: str) -> list[str]:
    """Entries in order, without the spaces around them."""
    return [entry for entry in (part.strip() for part in re.split("[,;]", text)) if entry]


def parse_values(text: str) -> list[int]:
    """Whole numbers.

    Raises:
        ValueError: an entry is none; the message names it.
    """
    return [_value(entry) for entry in parse_names(text)]


def parse_pairs(text: str) -> dict[str, str]:
    """``name=what`` entries.

    Raises:
        ValueError: an entry is not of this form, or a name is there twice.
    """
    pairs: dict[str, str] = {}
    for entry in parse_names(text):
        name, equals, what = (part.strip() for part in entry.partition("="))
        if not (name and equals and what):
            raise ValueError(f"{entry!r} is not NAME=VALUE")
        if name in pairs:
            raise ValueError(f"{name!r} is there twice")
        pairs[name] = what
    return pairs


def parse_labels(text: str) -> dict[str, int]:
    """Values by name, background 0 added unless a name for 0 is given.

    Raises:
        ValueError: as ``parse_pairs``, or a value is no whole number.
    """
    labels = {name: _value(value) for name, value in parse_pairs(text).items()}
    return labels if 0 in labels.values() else {"background": 0} | labels


def parse_regions(text: str) -> dict[str, list[int]]:
    """Label values by region, written ``whole=1+2+3``.

    Raises:
        ValueError: as ``parse_pairs``, or a value is no whole number.
    """
    return {name: [_value(part.strip()) for part in values.split("+")] for name, values in parse_pairs(text).items()}


def region_order(regions: Mapping[str, Iterable[int]]) -> list[int] | None:
    """The value to write for each region, if there is no choice: the one that no later region has; else None.

    Regions are written one after the other, later ones over earlier ones.
    """
    sets = [set(values) for values in regions.values()]
    left = [values.difference(*sets[place + 1 :]) for place, values in enumerate(sets)]
    return [values.pop() for values in left] if all(len(values) == 1 for values in left) else None


def join_names(names: Iterable[str]) -> str:
    """The text of ``parse_names``.

    Raises:
        ValueError: a name holds a separator, a quote or a control character.
    """
    listed = list(names)
    for name in listed:
        if _UNWRITABLE.search(name) or name != name.strip():
            raise ValueError(f"the name {name!r} cannot be written in a CSV list")
    return ", ".join(listed)


def join_labels(labels: Mapping[str, int]) -> str:
    """The text of ``parse_labels``."""
    join_names(labels)
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def join_regions(regions: Mapping[str, Iterable[int]]) -> str:
    """The text of ``parse_regions``."""
    join_names(regions)
    return ", ".join(f"{name}={'+'.join(map(str, values))}" for name, values in regions.items())


def _value(text: str) -> int:
    if not _VALUE.fullmatch(text):
        raise ValueError(f"{text!r} is no label value, a whole number from 0 to 65535")
    return int(text)
