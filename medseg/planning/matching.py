"""Matching: which channels and labels of a new task are those of a model, by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medseg.errors import Problem, UsageError
from medseg.records.task import Task
from medseg.records.transfer import NameMap

Names = Sequence[str]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user says is the same under another name: NEW → OLD; "" for OLD means that NEW is not taken over."""

    channels: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Matched:
    """What was found; see ``Origin``."""

    channels: NameMap
    labels: NameMap
    outputs: NameMap


def match_tasks(new: Task, old: Task, asked: Asked) -> Matched:
    """Channels, labels and outputs of ``new`` that ``old`` knows by the same name, whatever its case.

    Backgrounds belong together whatever they are called. Outputs are regions if both tasks have them. Where only one
    has, they mean different things (labels exclude each other, regions do not) and all are new.

    Raises:
        UsageError: E0001 a name that was asked for is in neither task.
    """
    channels = match_names(_channels(new), _channels(old), _known(asked.channels, _channels(new), _channels(old)))
    both_new, both_old = [*_labels(new), *_regions(new)], [*_labels(old), *_regions(old)]
    wanted = _known(asked.labels, both_new, both_old)
    found = match_names(_labels(new), _labels(old), wanted)
    labels = NameMap(
        names=(old.labels[0].name, *found.names),
        places=(0, *(None if place is None else place + 1 for place in found.places)),
    )
    if new.regions and old.regions:
        outputs = match_names(_regions(new), _regions(old), wanted)
    elif not new.regions and not old.regions:
        outputs = labels
    else:
        outputs = NameMap(names=tuple(_outputs(old)), places=(None,) * new.outputs)
    return Matched(channels, labels, outputs)


def match_names(new: Names, old: Names, asked: Mapping[str, str]) -> NameMap:
    """For each new name the place of its like in ``old``.

    What is asked for goes first, then equal names, then names that differ in case only. Of several that are called
    alike, the first of one side goes with the first of the other.
    """
    places = {index: old.index(asked[name]) for index, name in enumerate(new) if asked.get(name, "") in old}
    taken: set[int] = set()
    for same in (str, str.casefold):
        for index, name in enumerate(new):
            like = (i for i, other in enumerate(old) if i not in taken and same(other) == same(name))
            if index not in places and name not in asked and (place := next(like, None)) is not None:
                places[index] = place
                taken.add(place)
    return NameMap(names=tuple(old), places=tuple(places.get(index) for index in range(len(new))))


def told(new: Names, found: NameMap, kind: str, ignored: int = 0) -> str:
    """What was matched in one line: ``labels: 2 taken over (liver, tumour), 1 new (cyst)``.

    Args:
        new: names of the new task.
        found: their places.
        kind: what they are, in the plural.
        ignored: so many first ones are not worth telling, such as the background.
    """
    pairs = list(zip(new, found.places, strict=True))[ignored:]
    taken = [
        name if name.casefold() == found.names[place].casefold() else f"{name} from {found.names[place]}"
        for name, place in pairs
        if place is not None
    ]
    used = {place for _, place in pairs}
    fresh = [name for name, place in pairs if place is None]
    left = [name for place, name in enumerate(found.names) if place >= ignored and place not in used]
    parts = [
        f"{len(names)} {words} ({_some(names)})"
        for names, words in ((taken, "taken over"), (fresh, "new"), (left, "of the model not used"))
        if names
    ]
    return f"{kind}: {', '.join(parts)}"


def told_all(new: Task, found: Matched) -> tuple[str, str]:
    """The line about channels, and that about regions or labels."""
    if new.regions:
        outputs = told(_regions(new), found.outputs, "regions")
    else:
        outputs = told([label.name for label in new.labels], found.outputs, "labels", ignored=1)
    return told(_channels(new), found.channels, "channels"), outputs


def _known(asked: Mapping[str, str], new: Names, old: Names) -> dict[str, str]:
    """What was asked for, with the names as they are written there."""
    return {_named(name, new, "the data set"): _named(other, old, "the model") for name, other in asked.items()}


def _named(name: str, there: Names, whose: str) -> str:
    """The one of ``there`` that is called so; a name that differs in case only will do, and "" is nothing."""
    found = [other for other in there if other == name] or [o for o in there if o.casefold() == name.casefold()]
    if name and not found:
        raise UsageError(Problem("E0001", f"{whose} has no {name!r}", ", ".join(there), "choose one of these"))
    return found[0] if name else ""


def _some(names: Names) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _channels(task: Task) -> list[str]:
    return [channel.name for channel in task.channels]


def _labels(task: Task) -> list[str]:
    return [label.name for label in task.foreground]


def _regions(task: Task) -> list[str]:
    return [region.name for region in task.regions]


def _outputs(task: Task) -> list[str]:
    return _regions(task) or [label.name for label in task.labels]
