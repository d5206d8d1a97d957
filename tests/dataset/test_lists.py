"""Lists of cases: CSV and JSON say the same, say all that is wrong with them, and stay literal about paths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from phantoms import dataset_json, make_dataset

from medseg.dataset.layouts import find_inputs, read_dataset, scan_dataset
from medseg.dataset.notation import join_labels, join_regions, parse_labels, parse_regions, region_order
from medseg.dataset.table import read_table, table_text
from medseg.errors import InputError
from medseg.imaging.volumes import read_channels

HEAD = "# name: Two\n# channels: T1, T2\n# labels: organ=3, tumour=40\n# ignore: 255\n"
ROWS = "case,T1,T2,label,group\na,x/a1.nii.gz,x/a2.nii.gz,y/a.nii.gz,p1\nb,x/b1.nii.gz,,y/b.nii.gz,p1\n"
FILES = ("x/a1.nii.gz", "x/a2.nii.gz", "x/b1.nii.gz", "y/a.nii.gz", "y/b.nii.gz")


def problems_of(path: Path) -> list[tuple[str, str | None]]:
    with pytest.raises(InputError) as error:
        read_dataset(path)
    assert all(str(problem).isprintable() for problem in error.value.problems)
    return sorted((problem.code, problem.case) for problem in error.value.problems)


def csv_list(folder: Path, text: str = HEAD + ROWS, files: tuple[str, ...] = FILES) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    path = folder / "two.csv"
    path.write_text(text, encoding="utf-8")
    return path


def json_list(folder: Path, **changes: object) -> Path:
    csv_list(folder)
    cases = {
        "b": {"images": ["x/b1.nii.gz", None], "label": "y/b.nii.gz", "group": "p1"},
        "a": {"images": ["x/a1.nii.gz", "x/a2.nii.gz"], "label": "y/a.nii.gz", "group": "p1"},
    }
    value = {
        "name": "Two",
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "organ": 3, "tumour": 40, "ignore": 255},
        "cases": cases,
    } | changes
    path = folder / "two.json"
    path.write_text(json.dumps(value))
    return path


def test_a_csv_list_gives_files_groups_missing_channels_labels_and_the_ignored_value(tmp_path: Path) -> None:
    dataset = read_dataset(csv_list(tmp_path))
    assert (dataset.layout, dataset.root, dataset.file_ending) == ("list", tmp_path / "two.csv", ".nii.gz")
    assert [case.id for case in dataset.cases] == ["a", "b"]
    assert dataset.cases[0].images == (tmp_path / "x/a1.nii.gz", tmp_path / "x/a2.nii.gz")
    assert dataset.cases[1].images == (tmp_path / "x/b1.nii.gz", None)
    assert dataset.cases[1].files == (tmp_path / "x/b1.nii.gz",)
    assert {case.group for case in dataset.cases} == {"p1"}
    assert (dataset.task.name, dataset.task.values, dataset.task.ignore_value) == ("Two", (0, 3, 40), 255)


def test_a_json_list_says_the_same_also_as_the_dataset_json_of_a_folder(tmp_path: Path) -> None:
    of_csv = read_dataset(csv_list(tmp_path))
    path = json_list(tmp_path)
    of_json = read_dataset(path)
    assert (of_json.task, of_json.cases) == (of_csv.task, of_csv.cases)
    path.rename(tmp_path / "dataset.json")
    of_folder = read_dataset(tmp_path)
    assert (of_folder.task, of_folder.cases, of_folder.root) == (of_csv.task, of_csv.cases, tmp_path)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_what_spreadsheets_make_of_a_list_is_read(tmp_path: Path, mark: str) -> None:
    expected = read_dataset(csv_list(tmp_path)).cases
    lines = [line if line.startswith("#") else line.replace(",", mark) for line in (HEAD + ROWS).splitlines()]
    head = [f"{line}{mark * 3}" for line in lines[:2]] + [f'"{line}"{mark}' for line in lines[2:4]]
    text = "\ufeff" + "\r\n".join([*head, *lines[4:], mark * 4, ""])
    found = read_dataset(csv_list(tmp_path, text))
    assert (found.cases, found.task.values) == (expected, (0, 3, 40))


def test_one_image_may_hold_all_channels(tmp_path: Path) -> None:
    text = "# channels: R, G, B\n# labels: cell=1\ncase,image,label\na,a.png,a_seg.png\n"
    case = read_dataset(csv_list(tmp_path, text, ("a.png", "a_seg.png"))).cases[0]
    assert case.images == (tmp_path / "a.png",) * 3


def test_regions_are_understood_in_lists_and_in_decathlon_folders(tmp_path: Path) -> None:
    regions = "# channels: T1, T2\n# labels: oedema=1, core=2\n# regions: whole=1+2, centre=2\n"
    task = read_dataset(csv_list(tmp_path, regions + ROWS)).task
    assert [(region.name, region.values) for region in task.regions] == [("whole", (1, 2)), ("centre", (2,))]
    assert task.regions_order == (1, 2)
    folder = tmp_path / "msd"
    csv_list(folder, files=("imagesTr/a.nii.gz", "labelsTr/a.nii.gz"))
    declaration = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "oedema", "2": "core", "5": "ignore"},
        "regions": {"whole": [1, 2], "centre": [2]},
        "regions_class_order": [1, 2],
        "training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}],
    }
    (folder / "dataset.json").write_text(json.dumps(declaration))
    found = read_dataset(folder).task
    assert (found.regions, found.regions_order, found.ignore_value) == (task.regions, (1, 2), 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "separators"),
        ("case,T1;T2,label\n", "separators"),
        ("# labels: a=1\n" + ROWS, "# channels"),
        ("# channels: T1, T2\n" + ROWS, "# labels"),
        ("# chanels: T1\n" + HEAD + ROWS, "chanels"),
        ("# ignore: 2\n" + HEAD + ROWS, "twice"),
        (HEAD.replace("T1, T2", "T1, T3") + ROWS, "no column 'T3'"),
        (HEAD + ROWS.replace("case,", "id,"), "no column 'case'"),
        (HEAD + ROWS.replace("group\n", "T1\n", 1), "twice"),
        (HEAD + ROWS.replace("group\n", "image\n", 1), "image"),
        (HEAD + ROWS + "c,x\n", "2 cells"),
        (HEAD.replace("=3", "=3.5") + ROWS, "3.5"),
        (HEAD.replace("=3", "=-3") + ROWS, "-3"),
        (HEAD.replace("=40", "=70000") + ROWS, "65535"),
        (HEAD.replace("tumour=40", "organ=40") + ROWS, "twice"),
        (HEAD.replace("tumour=40", "tumour=3") + ROWS, "same value"),
        (HEAD.replace("255", "40") + ROWS, "40"),
        (HEAD + "# regions: whole=3+40, part=3+40\n" + ROWS, "regions_class_order"),
        (HEAD + "# regions: whole=3+41, part=3\n" + ROWS, "41"),
        (HEAD + ROWS + 'c,"x\n', "line"),
    ],
    ids=str,
)
def test_a_csv_list_that_is_wrong_says_where(tmp_path: Path, text: str, said: str) -> None:
    path = csv_list(tmp_path, text)
    with pytest.raises(InputError, match="E0145") as error:
        read_dataset(path)
    assert said in str(error.value)


def test_bytes_that_are_no_text_and_lists_that_are_too_large_are_refused(tmp_path: Path) -> None:
    path = csv_list(tmp_path)
    path.write_bytes("# name: Größe\n".encode("latin-1"))
    assert problems_of(path) == [("E0145", None)]
    for name in ("two.csv", "dataset.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(17 * 2**20)
        assert problems_of(tmp_path / name) == [("E0145", None)]


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {"background": 0, "a": [1, 2]}},
        {"cases": []},
        {"cases": {"a": {"images": ["x/a1.nii.gz", None], "label": "y/a.nii.gz", "lable": "z"}}},
        {"cases": {"a": {"label": "y/a.nii.gz"}}},
        {"cases": {"a": {"image": "x/a1.nii.gz", "images": [], "label": "y/a.nii.gz"}}},
        {"cases": {"a": {"images": ["x/a1.nii.gz", 3], "label": "y/a.nii.gz"}}},
        {"cases": {"a": {"images": ["x/a1.nii.gz", None], "label": "y/a.nii.gz", "group": ""}}},
        {"labels": {f"label {n}": 1 for n in range(70_000)}},
        {"channel_names": {"9" * 5000: "T1"}},
        {"regions": {"whole": [3, 40]}, "regions_class_order": [1]},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_json_list_that_is_wrong_is_refused_in_few_words(tmp_path: Path, changes: dict) -> None:
    path = json_list(tmp_path, **changes)
    with pytest.raises(InputError, match="E0145") as error:
        read_dataset(path)
    assert max(len(line) for line in str(error.value).splitlines()) < 500
    assert "dataset.json" not in str(error.value)


def test_a_million_doubled_keys_are_refused_without_delay(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text("{" + ",".join(f'"{n % 300_000}":0' for n in range(600_000)) + "}")
    assert problems_of(tmp_path) == [("E0145", None)]


def test_paths_are_taken_literally_and_may_lead_out_of_the_lists_folder(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    csv_list(elsewhere, files=("$HOME.nii.gz", "~.nii.gz", "s e m;i.nii.gz", "t.nii.gz"))
    row = f'case,T1,T2,label\na,../elsewhere/$HOME.nii.gz,"{elsewhere}/s e m;i.nii.gz",../elsewhere/~.nii.gz\n'
    folder = tmp_path / "lists"
    case = read_dataset(csv_list(folder, HEAD + row)).cases[0]
    assert [path.resolve() for path in case.files] == [elsewhere / "$HOME.nii.gz", elsewhere / "s e m;i.nii.gz"]


def test_what_is_wrong_with_cases_is_said_at_once(tmp_path: Path) -> None:
    rows = [
        "case,T1,T2,label",
        "good,x/a1.nii.gz,x/a2.nii.gz,y/a.nii.gz",
        "gone,x/none.nii.gz,,y/a.nii.gz",
        "empty,,,y/a.nii.gz",
        "unlabelled,x/b1.nii.gz,,",
        "lost,x/c.nii.gz,,y/none.nii.gz",
        "url,https://host/x.nii.gz,,y/a.nii.gz",
        "windows,x\\a1.nii.gz,,y/a.nii.gz",
        "same,x/d.nii.gz,x/d.nii.gz,y/a.nii.gz",
        "mask,x/e.nii.gz,,x/e.nii.gz",
        "text,x/f.txt,,y/a.nii.gz",
        "copy,x/a1.nii.gz,,y/a.nii.gz",
        "GOOD,x/g.nii.gz,,y/a.nii.gz",
        "../up,x/h.nii.gz,,y/a.nii.gz",
        "link,x/link.nii.gz,,y/a.nii.gz",
    ]
    files = (*FILES, *(f"x/{name}.nii.gz" for name in "cdegh"), "x/f.txt")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/link.nii.gz").symlink_to(tmp_path / "nowhere")
    path = csv_list(tmp_path, HEAD + "\n".join(rows), files)
    assert problems_of(path) == sorted(
        [
            ("E0100", "gone"), ("E0133", "empty"), ("E0144", "unlabelled"), ("E0144", "lost"), ("E0142", "url"),
            ("E0142", "windows"), ("E0140", "same"), ("E0140", "mask"), ("E0106", "text"), ("E0142", "../up"),
            ("E0143", "link"), ("E0140", "good"), ("E0140", "good"),
        ]
    )  # fmt: skip
    assert [case.id for case in scan_dataset(path)[0].cases] == ["GOOD", "copy"]


def test_a_case_listed_twice_and_a_column_of_other_things_are_said(tmp_path: Path) -> None:
    assert problems_of(csv_list(tmp_path, HEAD + ROWS + "a,x/c.nii.gz,,y/a.nii.gz,\n")) == [("E0140", "a")]
    path = csv_list(tmp_path, HEAD + ROWS.replace("group\n", "group,age\n").replace("p1\n", "p1,71\n"))
    assert ["age" in str(problem) for problem in scan_dataset(path)[1].problems] == [True]


def test_a_name_in_another_unicode_form_is_recognised_in_the_message(tmp_path: Path) -> None:
    composed, decomposed = "M\u00fcller.nii.gz", "Mu\u0308ller.nii.gz"
    path = csv_list(tmp_path, HEAD + f"case,T1,T2,label\na,{composed},,y/a.nii.gz\n", (*FILES, decomposed))
    if not (tmp_path / composed).exists():  # some file systems know both
        with pytest.raises(InputError, match="Unicode form"):
            read_dataset(path)


def test_a_file_of_another_kind_is_no_data_set(tmp_path: Path) -> None:
    csv_list(tmp_path)
    assert problems_of(tmp_path / "x/a1.nii.gz") == [("E0106", None)]
    assert problems_of(tmp_path / "none.csv") == [("E0100", None)]
    (tmp_path / "other.json").write_text(json.dumps(dataset_json(1)))
    assert problems_of(tmp_path / "other.json") == [("E0145", None)]


def test_a_list_is_an_input_for_prediction_with_the_channels_of_the_model(tmp_path: Path) -> None:
    path = csv_list(tmp_path, (HEAD + ROWS).replace(",y/b.nii.gz,", ",,"))
    task = read_dataset(csv_list(tmp_path / "whole")).task
    found = find_inputs(path, task)
    assert [(case.id, case.images[1] is None, case.label) for case in found] == [("a", False, None), ("b", True, None)]
    swapped = task.model_copy(update={"channels": task.channels[::-1]})
    with pytest.raises(InputError, match="E0133"):
        find_inputs(path, swapped)


def test_channels_declared_missing_in_an_nnunet_folder_are_none_and_zeros(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path, cases=3, channels=2)
    (folder / "imagesTr" / "case_01_0000.nii.gz").unlink()
    assert problems_of(folder) == [("E0133", "case_01")]
    declaration = json.loads((folder / "dataset.json").read_text()) | {"missing_channels": {"case_01": [0]}}
    (folder / "dataset.json").write_text(json.dumps(declaration))
    case = read_dataset(folder).cases[1]
    assert case.images == (None, folder / "imagesTr" / "case_01_0001.nii.gz")
    volume = read_channels(case.images)
    assert volume.missing == (0,)
    assert not volume.array[0].any()
    np.testing.assert_array_equal(volume.array[1], read_channels(case.images[1:]).array[0])
    declaration["missing_channels"] = {"case_00": [1], "case_01": [0, 1], "case_09": [0], "case_02": [7]}
    (folder / "dataset.json").write_text(json.dumps(declaration))
    assert problems_of(folder) == [("E0133", "case_00"), ("E0133", "case_01"), ("E0133", "case_02"), ("E0145", None)]


names = st.text(st.characters(exclude_characters=',;="+', exclude_categories=["Cc", "Cs", "Z"]), min_size=1, max_size=8)


@given(st.dictionaries(names, st.integers(1, 65535), min_size=1), st.lists(st.integers(0, 9), min_size=1))
def test_notation_reads_back_what_it_writes(labels: dict[str, int], values: list[int]) -> None:
    assert parse_labels(join_labels({"zero zero": 0} | labels)) == {"zero zero": 0} | labels
    regions = dict.fromkeys(labels, values)
    assert parse_regions(join_regions(regions)) == regions


paths = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(st.dictionaries(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True), paths, min_size=1))
def test_a_table_reads_back_any_path(tmp_path_factory: pytest.TempPathFactory, images: dict[str, str]) -> None:
    cases = {case: {"images": [path, None], "label": path, "group": None} for case, path in images.items()}
    names = {"0": "T1", "1": "T2"}
    value = {"name": "x", "channel_names": names, "labels": {"background": 0, "a": 1, "ignore": 2}, "cases": cases}
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(table_text(value).encode())
    assert read_table(path) == value | {"unused_columns": []}


def test_the_order_of_regions_is_derived_only_where_there_is_no_choice() -> None:
    assert region_order({"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}) == [1, 2, 3]
    assert region_order({"whole": [1, 2, 3], "enhancing": [3]}) is None
    assert region_order({"core": [2], "whole": [1, 2]}) is None
