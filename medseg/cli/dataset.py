"""``medseg dataset``: write a list of cases from folders."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from medseg.cli import console
from medseg.errors import Problem, UsageError

if TYPE_CHECKING:
    from medseg.dataset.listing import Listing, ListingOptions

T = TypeVar("T")

HELP = "write a list of cases from folders or BIDS"
DESCRIPTION = (
    "Pair the images and labels of two folders, or of a BIDS tree, and write a list of cases (.csv or .json) that "
    "check, plan and run take as DATASET. Nothing is guessed in silence: what was paired, derived and left out is "
    "printed. The list may be edited by hand, in a spreadsheet too."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "images", type=Path, metavar="IMAGES", help="folder of images, BIDS tree, or a folder with images/ and labels/"
    )
    parser.add_argument("labels_folder", type=Path, nargs="?", metavar="LABELS", help="folder of labels")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="LIST", help="the list: .csv or .json")
    parser.add_argument(
        "--channels",
        required=True,
        metavar="NAMES",
        help="T1,FLAIR: names of the channels (CT chooses its normalisation); T1=_t1,FLAIR=_fl: with the ends of their "
        "files' names, in BIDS suffixes such as T1=acq-mprage_T1w",
    )
    parser.add_argument("--labels", metavar="NAMES", help="liver=1,tumour=2 (default: the values found)")
    parser.add_argument("--ignore-label", metavar="VALUE", help="value of voxels that nobody annotated")
    parser.add_argument("--regions", metavar="NAMES", help="organ=1+2,tumour=2: overlapping regions to learn")
    parser.add_argument("--regions-order", metavar="VALUES", help="1,2: the value to write for each region")
    parser.add_argument("--label-end", metavar="END", help="end of the names of label files (BIDS default: dseg)")
    parser.add_argument("--group", metavar="REGEX", help="what in a case's id names the patient, as 'patient[0-9]+'")
    parser.add_argument("--name", default=None, help="of the data set (default: that of the list)")
    parser.add_argument("--allow-missing", action="store_true", help="a case may lack some of the channels")
    parser.add_argument("--skip-incomplete", action="store_true", help="leave out what has no image or no label")
    parser.add_argument("--overwrite", action="store_true", help="replace a list that is there")


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.dataset.listing import make_listing, write_listing

    output: Path = arguments.output
    if output.suffix.lower() not in (".csv", ".json"):
        raise UsageError(Problem("E0001", f"--output {output.name}", "NAME.csv or NAME.json", "choose one"))
    if output.exists() and not arguments.overwrite:
        raise UsageError(Problem("E0001", f"{output} is there already", "", "choose another name, or add --overwrite"))
    progress = console.make_progress(arguments.progress)
    listing = make_listing(arguments.images, arguments.labels_folder, _options(arguments), progress)
    write_listing(output, listing)
    console.print_problems(listing.problems)
    for note in listing.notes:
        print(note)
    _print_tables(listing)
    print(f"{output}: {len(listing.cases)} cases. Next: medseg check {output}")
    return 0


def _options(arguments: argparse.Namespace) -> ListingOptions:
    from medseg.dataset.listing import ListingOptions
    from medseg.dataset.notation import parse_labels, parse_names, parse_regions, parse_values
    from medseg.dataset.pairing import ChannelFiles

    entries = [entry.partition("=") for entry in _parsed("--channels", arguments.channels, parse_names) or []]
    channels = tuple(ChannelFiles(name.strip(), end.strip() if equals else None) for name, equals, end in entries)
    names = [channel.name for channel in channels]
    if not all(names) or not names or len({*names}) < len(names):
        raise UsageError(Problem("E0001", f"--channels {arguments.channels}", "different names", "as in T1,FLAIR"))
    ignored = _parsed("--ignore-label", arguments.ignore_label, parse_values) or []
    if len(ignored) > 1:
        raise UsageError(Problem("E0001", f"--ignore-label {arguments.ignore_label}", "one value", "merge them"))
    return ListingOptions(
        channels=channels,
        name=arguments.name or arguments.output.stem,
        labels=_parsed("--labels", arguments.labels, parse_labels),
        ignore=ignored[0] if ignored else None,
        regions=_parsed("--regions", arguments.regions, parse_regions) or {},
        regions_order=tuple(_parsed("--regions-order", arguments.regions_order, parse_values) or ()),
        label_end=arguments.label_end,
        group=arguments.group,
        allow_missing=arguments.allow_missing,
        skip=arguments.skip_incomplete,
    )


def _parsed(option: str, text: str | None, parse: Callable[[str], T]) -> T | None:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise UsageError(Problem("E0001", f"{option}: {error}", "", "see medseg dataset --help")) from error


def _print_tables(listing: Listing) -> None:
    total = len(listing.cases)
    rows = [("channel", "cases", "missing")]
    for number, channel in enumerate(listing.task.channels):
        missing = sum(case.images[0 if listing.one_file else number] is None for case in listing.cases)
        rows.append((channel.name, str(total - missing), str(missing)))
    console.print_table(rows)
    labels = [("label", "value", "cases")]
    labels += [
        (label.name, str(label.value), str(listing.label_cases.get(label.value, 0))) for label in listing.task.labels
    ]
    if listing.task.ignore_value is not None:
        value = listing.task.ignore_value
        labels.append(("ignored", str(value), str(listing.label_cases.get(value, 0))))
    console.print_table(labels)
    if listing.task.regions:
        console.print_table(
            [("region", "values"), *((r.name, "+".join(map(str, r.values))) for r in listing.task.regions)]
        )
    groups = {case.group for case in listing.cases if case.group is not None}
    if groups:
        print(f"groups: {len(groups)}; a group is never on both sides of a split")
