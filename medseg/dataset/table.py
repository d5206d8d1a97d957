"""Table: a CSV list of cases, read into the words of a JSON list, and written from them.

    # name: Liver
    # channels: T1, T2
    # labels: liver=1, tumour=2
    # ignore: 3
    # regions: organ=1+2, tumour=2
    # regions_class_order: 1, 2
    case,T1,T2,label,group
    p01_a,p01/a_t1.nii.gz,p01/a_t2.nii.gz,p01/a_seg.nii.gz,p01
    p01_b,p01/b_t1.nii.gz,,p01/b_seg.nii.gz,p01

An empty cell under a channel says that the case does not have it. A column ``image`` instead of the channels names
one file that holds all of them. Commas, semicolons (as spreadsheets write them in many countries) or tabs separate.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

from medseg.dataset.notation import (
    join_labels,
    join_names,
    join_regions,
    parse_labels,
    parse_names,
    parse_regions,
    parse_values,
    region_order,
)
from medseg.errors import InputError, Problem

MAX_BYTES = 16 * 2**20  # some 80 000 cases
CASE, IMAGE, LABEL, GROUP = "case", "image", "label", "group"
IGNORE_NAME = "ignore"
_HEAD = ("name", "channels", "labels", "ignore", "regions", "regions_class_order")


def read_table(path: Path) -> dict[str, Any]:
    """A CSV list as the value of the JSON list that says the same; see ``ListDeclaration``.

    Raises:
        InputError: E0100 not found; E0106 not readable; E0140 a case twice; E0145 everything else that is wrong.
    """
    text = _read_text(path)
    head, header, rows = _split(text, path.name)
    task = _task(head, path.name)
    channels: list[str] = task.pop("channels")
    wanted = [IMAGE] if IMAGE in header else channels
    needed = [CASE, *wanted]
    problems = [_invalid(path.name, f"no column {name!r}", "one") for name in needed if name not in header]
    problems += [_invalid(path.name, f"column {name!r} is there twice") for name in {*header} if header.count(name) > 1]
    if IMAGE in header:
        problems += [
            _invalid(path.name, f"columns {IMAGE!r} and {n!r}", "one of them") for n in channels if n in header
        ]
    if problems:
        raise InputError(problems)
    cases: dict[str, dict[str, Any]] = {}
    for line, row in rows:
        if len(row) != len(header):
            problems.append(_invalid(path.name, f"line {line} has {len(row)} cells", f"{len(header)}"))
            continue
        cells = dict(zip(header, row, strict=True))
        case = cells[CASE].strip()
        if case in cases:
            problems.append(Problem("E0140", f"{path.name}: line {line} lists {case!r} again", "", "remove one", case))
        cases[case] = _entry(cells, wanted)
    if problems:
        raise InputError(problems)
    known = {CASE, *wanted, LABEL, GROUP}
    unused = [name for name in header if name not in known and name]
    names = {str(number): name for number, name in enumerate(channels)}
    return task | {"channel_names": names, "unused_columns": unused, "cases": cases}


def table_text(value: dict[str, Any]) -> str:
    """The CSV list that says the same as the value of a JSON list.

    Raises:
        ValueError: a name holds a character that the head of a CSV list cannot hold.
    """
    channels = list(value["channel_names"].values())
    labels = dict(value["labels"])
    ignore = labels.pop(IGNORE_NAME, None)
    lines = [f"# name: {join_names([value['name']])}", f"# channels: {join_names(channels)}"]
    lines += [f"# labels: {join_labels(labels)}"]
    lines += [f"# ignore: {ignore}"] if ignore is not None else []
    if value.get("regions"):
        lines += [f"# regions: {join_regions(value['regions'])}"]
        lines += [f"# regions_class_order: {', '.join(map(str, value['regions_class_order']))}"]
    one_file = any("image" in case for case in value["cases"].values())
    taken = {CASE, LABEL, GROUP, IMAGE}
    if not one_file and (len({*channels}) < len(channels) or taken & {*channels}):
        raise ValueError(f"channels called {', '.join(channels)} cannot be the columns of a CSV list")
    out = io.StringIO()
    writer = csv.writer(out)  # ends lines with \r\n, and so puts quotes around either
    writer.writerow([CASE, *([IMAGE] if one_file else channels), LABEL, GROUP])
    for case, entry in value["cases"].items():
        images = [entry["image"]] if one_file else [image or "" for image in entry["images"]]
        writer.writerow([case, *images, entry.get("label") or "", entry.get("group") or ""])
    return "".join(f"{line}\r\n" for line in lines) + out.getvalue()


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(_invalid(path.name, f"larger than {MAX_BYTES >> 20} MiB"))
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(Problem("E0100", f"{path} does not exist", "", "check the path")) from error
    except OSError as error:
        raise InputError(Problem("E0106", f"cannot read {path}: {error.strerror}", "", "check the file")) from error
    except UnicodeDecodeError as error:
        raise InputError(_invalid(path.name, "not UTF-8", "", "save it as CSV UTF-8")) from error


def _split(text: str, name: str) -> tuple[dict[str, str], list[str], list[tuple[int, list[str]]]]:
    """The lines above the header as words and texts, the header, and the rows with their line numbers."""
    header_line = next((line for line in re.split("[\r\n]", text) if line.strip() and line.lstrip('"')[:1] != "#"), "")
    separators = [mark for mark in ",;\t" if mark in header_line]
    if len(separators) != 1:
        found = f"a header with {len(separators)} kinds of separators: {header_line[:80]!r}"
        raise InputError(_invalid(name, found, "columns such as case, T1, label between commas"))
    head: dict[str, str] = {}
    header: list[str] = []
    rows = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separators[0], strict=True)
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if header:
                rows.append((reader.line_num, row))
            elif row[0].startswith("#"):
                word, _, said = ",".join(row)[1:].partition(":")
                if word.strip() in head:
                    raise InputError(_invalid(name, f"# {word.strip()} is there twice"))
                head[word.strip()] = said
            else:
                header = [cell.strip() for cell in row]
    except csv.Error as error:
        raise InputError(_invalid(name, f"line {reader.line_num}: {error}")) from error
    return head, header, rows


def _task(head: dict[str, str], name: str) -> dict[str, Any]:
    unknown = [word for word in head if word not in _HEAD]
    missing = [word for word in ("channels", "labels") if not head.get(word, "").strip(" ,;")]
    if unknown or missing:
        problems = [_invalid(name, f"# {word[:40]}", f"one of {', '.join(_HEAD)}") for word in unknown]
        problems += [_invalid(name, f"no line '# {word}: …' above the columns", "one") for word in missing]
        raise InputError(problems)
    try:
        labels = parse_labels(head["labels"])
        ignore = parse_values(head.get("ignore", ""))
        regions = parse_regions(head.get("regions", ""))
        order = parse_values(head.get("regions_class_order", "")) or region_order(regions)
        if len(ignore) > 1 or (ignore and IGNORE_NAME in labels):
            raise ValueError("more than one value is ignored")
    except ValueError as error:
        raise InputError(_invalid(name, str(error))) from error
    task: dict[str, Any] = {
        "name": head.get("name", "").strip(" ,;") or Path(name).stem,
        "channels": parse_names(head["channels"]),
        "labels": labels | ({IGNORE_NAME: ignore[0]} if ignore else {}),
    }
    return task | ({"regions": regions, "regions_class_order": order} if regions else {})


def _entry(cells: dict[str, str], wanted: list[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"label": cells.get(LABEL) or None, "group": cells.get(GROUP, "").strip() or None}
    if wanted == [IMAGE]:
        return {"image": cells[IMAGE]} | entry
    return {"images": [cells[channel] or None for channel in wanted]} | entry


def _invalid(name: str, measured: str, expected: str = "", action: str = "correct the list") -> Problem:
    return Problem("E0145", f"{name}: {measured}"[:300], expected, action)
