"""Layouts: nnU-Net v2 and Decathlon folders as they are, as they break, and names that must be refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from phantoms import affine_ijk, dataset_json, make_dataset, make_dataset_2d, save_nifti

from medseg.dataset.layouts import find_inputs, read_dataset, scan_dataset, scan_inputs
from medseg.errors import InputError
from medseg.imaging.volumes import read_channels
from medseg.records.task import Task


def problems_of(call: object, *arguments: object) -> list[tuple[str, str | None]]:
    with pytest.raises(InputError) as error:
        call(*arguments)  # type: ignore[operator]
    return sorted((problem.code, problem.case) for problem in error.value.problems)


def declare(folder: Path, **changes: object) -> None:
    (folder / "dataset.json").write_text(json.dumps(dataset_json(2, **changes)))


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def skeleton(folder: Path, image_files: tuple[str, ...], label_files: tuple[str, ...], **changes: object) -> Path:
    """Names only: reading a layout opens no image."""
    touch(folder / "imagesTr", *image_files)
    touch(folder / "labelsTr", *label_files)
    declare(folder, **changes)
    return folder


def task(*channels: str) -> Task:
    labels = [{"name": "background", "value": 0}, {"name": "organ", "value": 1}]
    return Task.model_validate({"channels": [{"name": name} for name in channels], "labels": labels})


def msd(folder: Path, channels: int, **changes: object) -> Path:
    rng = np.random.default_rng(0)
    shape = (6, 9, 5, channels) if channels > 1 else (6, 9, 5)
    for name in ("a", "b"):
        save_nifti(folder / "imagesTr" / f"{name}.nii.gz", rng.integers(0, 99, shape).astype(np.int16), affine_ijk())
        save_nifti(folder / "labelsTr" / f"{name}.nii.gz", rng.integers(0, 2, shape[:3]).astype(np.uint8), affine_ijk())
    declaration = {
        "name": "Decathlon",
        "modality": {str(n): f"M{n}" for n in range(channels)},
        "labels": {"0": "background", "1": "tumour"},
        "numTraining": 2,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ba"],
        "test": ["./imagesTs/c.nii.gz"],
    } | changes
    (folder / "dataset.json").write_text(json.dumps(declaration))
    return folder


# nnU-Net v2


def test_an_nnunet_folder_is_read_with_cases_sorted_by_id(tmp_path: Path) -> None:
    dataset = read_dataset(make_dataset(tmp_path, cases=3, channels=2))
    assert (dataset.layout, dataset.file_ending, dataset.root) == ("nnunet", ".nii.gz", tmp_path)
    assert [case.id for case in dataset.cases] == ["case_00", "case_01", "case_02"]
    assert [path.name for path in dataset.cases[1].images] == ["case_01_0000.nii.gz", "case_01_0001.nii.gz"]
    assert dataset.cases[1].label == tmp_path / "labelsTr" / "case_01.nii.gz"
    assert [channel.name for channel in dataset.task.channels] == ["MRI", "MRI1"]
    assert dataset.task.values == (0, 1, 2)


def test_a_colour_picture_stands_once_for_each_channel(tmp_path: Path) -> None:
    dataset = read_dataset(make_dataset_2d(tmp_path, cases=2))
    case = dataset.cases[0]
    assert case.images == (tmp_path / "imagesTr" / "img_00_0000.png",) * 3
    assert read_channels(case.images).array.shape[:2] == (3, 1)


def test_pictures_may_have_one_file_per_channel_too(tmp_path: Path) -> None:
    names = ("a_0000.png", "a_0001.png")
    skeleton(tmp_path, names, ("a.png",), channel_names={"0": "x", "1": "y"}, file_ending=".png", numTraining=1)
    assert [path.name for path in read_dataset(tmp_path).cases[0].images] == list(names)


def test_all_that_is_wrong_with_a_folder_is_said_at_once(tmp_path: Path) -> None:
    images = ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "c_0000.nii.gz", "c_0002.nii.gz", "d.nii.gz")
    images += ("e_0000.nii.gz", "e_0001.nii.gz", "é_0000.nii.gz", "é_0001.nii.gz", "notes.txt", ".hidden", "g_0000.nii")
    skeleton(
        tmp_path,
        images,
        ("a.nii.gz", "b.nii.gz", "c.nii.gz", "é.nii.gz", "z.nii.gz"),
        channel_names={"0": "T1", "1": "T2"},
    )
    (tmp_path / "imagesTr" / "f_0000.nii.gz").symlink_to(tmp_path / "gone")
    touch(tmp_path / "imagesTr", "f_0001.nii.gz")
    touch(tmp_path / "labelsTr", "f.nii.gz")
    assert problems_of(read_dataset, tmp_path) == [
        ("E0133", "b"),
        ("E0133", "c"),
        ("E0133", "d"),
        ("E0142", "é"),
        ("E0143", "f"),
        ("E0144", "e"),
        ("W0147", None),
        ("W0147", None),
        ("W0148", None),
    ]
    dataset, scan = scan_dataset(tmp_path)
    assert [case.id for case in dataset.cases] == ["a"]
    text = "\n".join(map(str, scan.problems))
    assert "has channels 0, 2 vs 0 (T1), 1 (T2)" in text
    assert "g_0000.nii, notes.txt" in text
    assert "z.nii.gz" in text
    assert ".hidden" not in text


def test_warnings_alone_do_not_refuse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skeleton(tmp_path, ("a_0000.nii.gz", "readme.md"), ("a.nii.gz",), numTraining=7)
    with caplog.at_level(logging.WARNING):
        assert len(read_dataset(tmp_path).cases) == 1
    assert "W0147" in caplog.text
    assert "W0148" in caplog.text


def test_ids_that_differ_only_in_case_clash(tmp_path: Path) -> None:
    skeleton(tmp_path, ("A_0000.nii.gz", "a_0000.nii.gz"), ("A.nii.gz", "a.nii.gz"))
    assert problems_of(read_dataset, tmp_path) == [("E0140", "a")]


def test_a_file_may_be_a_link(tmp_path: Path) -> None:
    whole = make_dataset(tmp_path / "whole", cases=2)
    linked = tmp_path / "linked"
    shutil.copytree(whole, linked, symlinks=True)
    for path in list((linked / "imagesTr").iterdir()):
        path.unlink()
        path.symlink_to(whole / "imagesTr" / path.name)
    assert len(read_dataset(linked).cases) == 2


def test_an_empty_folder_has_no_cases(tmp_path: Path) -> None:
    declare(tmp_path)
    assert ("E0146", None) in problems_of(read_dataset, tmp_path)
    (tmp_path / "dataset.json").unlink()
    assert problems_of(read_dataset, tmp_path) == [("E0100", None)]
    assert problems_of(read_dataset, tmp_path / "nowhere") == [("E0100", None)]


def test_regions_and_the_ignore_label_are_understood(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    skeleton(tmp_path, ("a_0000.nii.gz",), ("a.nii.gz",), labels=labels, regions_class_order=[1, 2, 3])
    found = read_dataset(tmp_path).task
    assert found.values == (0, 1, 2, 3)
    assert [label.name for label in found.labels] == ["background", "label_1", "label_2", "enhancing"]
    assert [(region.name, region.values) for region in found.regions] == [
        ("whole", (1, 2, 3)),
        ("core", (2, 3)),
        ("enhancing", (3,)),
    ]
    assert (found.regions_order, found.ignore_value) == ((1, 2, 3), 4)


def test_a_list_of_one_value_is_a_plain_label(tmp_path: Path) -> None:
    skeleton(tmp_path, ("a_0000.nii.gz",), ("a.nii.gz",), labels={"background": 0, "organ": [5]})
    found = read_dataset(tmp_path).task
    assert (found.values, found.regions) == ((0, 5), ())


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {"organ": 1}},
        {"labels": {"background": 0}},
        {"labels": {"background": 0, "a": 1, "b": 1}},
        {"labels": {"background": 0, "a": -1}},
        {"labels": {"background": 0, "a": 1.5}},
        {"labels": {"background": 0, "a": True}},
        {"labels": {"background": 0, "a": []}},
        {"labels": {"0": "background", "1": "organ"}},
        {"labels": {"background": 0, "a": 1, "ignore": 1}},
        {"labels": {"background": 0, "a": 1, "ignore": [2, 3]}},
        {"labels": {"background": 0, "a": [1, 2], "b": 2}},
        {"labels": {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order": [1]},
        {"labels": {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order": [1, 9]},
        {"labels": {"background": 0, "a": [1, 2], "b": 2, "ignore": 3}, "regions_class_order": [1, 3]},
        {"channel_names": {}},
        {"channel_names": {"1": "T1"}},
        {"channel_names": {"0": "T1", "2": "T2"}},
        {"channel_names": ["T1"]},
        {"numTraining": "many"},
        {"name": 3},
    ],
    ids=str,
)
def test_a_wrong_declaration_is_refused(tmp_path: Path, changes: dict) -> None:
    skeleton(tmp_path, ("a_0000.nii.gz",), ("a.nii.gz",), **changes)
    assert {code for code, _ in problems_of(read_dataset, tmp_path)} == {"E0145"}


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"a": 1, "a": 2}', '{"labels": NaN}', "[" * 100_000, '{"file_ending": ".nii.gz"}', "{}"]
)
def test_a_file_that_is_no_declaration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    assert {code for code, _ in problems_of(read_dataset, tmp_path)} == {"E0145"}


def test_all_fields_that_are_wrong_are_named(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"file_ending": 3, "labels": {"a": "x"}}')
    with pytest.raises(InputError) as error:
        read_dataset(tmp_path)
    assert all(field in str(error.value) for field in ("file_ending", "labels.a", "channel_names"))


def test_an_unsupported_ending_is_refused(tmp_path: Path) -> None:
    skeleton(tmp_path, (), (), file_ending=".xyz")
    assert problems_of(read_dataset, tmp_path) == [("E0106", None)]


def test_explicit_paths_are_taken_literally_and_stay_inside(tmp_path: Path) -> None:
    touch(tmp_path / "scans", "x.nii.gz", "$HOME.nii.gz", "seg.nii.gz")
    good = {"images": ["scans/x.nii.gz"], "label": "scans/seg.nii.gz"}
    declare(tmp_path, dataset={"one": good, "two": good | {"images": ["./scans/$HOME.nii.gz"]}})
    dataset = read_dataset(tmp_path)
    assert [case.id for case in dataset.cases] == ["one", "two"]
    assert dataset.cases[1].images[0].name == "$HOME.nii.gz"
    bad = {
        "../x": good,
        "a/b": good,
        "": good,
        "x" * 300: good,
        "-o": good,
        "up": good | {"label": "../seg.nii.gz"},
        "absolute": good | {"images": ["/etc/passwd"]},
        "backslash": good | {"images": ["..\\x.nii.gz"]},
        "nothing": good | {"images": [""]},
        "few": good | {"images": []},
        "gone": good | {"images": ["scans/y.nii.gz"]},
        "unlabelled": good | {"label": "scans/z.nii.gz"},
        "format": good | {"images": ["dataset.json"]},
    }
    declare(tmp_path, dataset=bad, numTraining=len(bad))
    assert problems_of(read_dataset, tmp_path) == sorted(
        [("E0142", case) for case in ("../x", "a/b", "", "x" * 300, "-o", "up", "absolute", "backslash", "nothing")]
        + [("E0133", "few"), ("E0100", "gone"), ("E0144", "unlabelled"), ("E0106", "format")]
    )


# Medical Segmentation Decathlon


@pytest.mark.parametrize("channels", [1, 3])
def test_a_decathlon_folder_is_read(tmp_path: Path, channels: int) -> None:
    dataset = read_dataset(msd(tmp_path, channels))
    assert (dataset.layout, dataset.file_ending, dataset.task.name) == ("msd", ".nii.gz", "Decathlon")
    assert [case.id for case in dataset.cases] == ["a", "b"]
    assert len(dataset.cases[0].images) == channels
    assert read_channels(dataset.cases[0].images).array.shape == (channels, 5, 9, 6)
    assert [label.name for label in dataset.task.labels] == ["background", "tumour"]


def test_a_broken_decathlon_folder_says_everything(tmp_path: Path) -> None:
    training = [
        {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"},
        {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"},
        {"image": "./imagesTr/c.nii.gz", "label": "./labelsTr/a.nii.gz"},
        {"image": "./imagesTr/b.nii.gz", "label": "./labelsTr/d.nii.gz"},
        {"image": "../e.nii.gz", "label": "./labelsTr/a.nii.gz"},
    ]
    msd(tmp_path, 1, training=training, numTraining=5)
    touch(tmp_path / "imagesTr", "._a.nii.gz", "spare.nii.gz")
    found = problems_of(read_dataset, tmp_path)
    assert {("E0140", "a"), ("E0100", "c"), ("E0144", "b"), ("E0142", "e")} <= set(found)
    assert [code for code, _ in found if code == "W0147"] == ["W0147", "W0147"]


def test_decathlon_labels_must_be_values_with_names(tmp_path: Path) -> None:
    msd(tmp_path, 1, labels={"background": "0"})
    assert problems_of(read_dataset, tmp_path) == [("E0145", None)]


# Inputs for prediction


def test_a_folder_of_one_channel_may_have_plain_names_or_channel_numbers(tmp_path: Path) -> None:
    touch(tmp_path / "plain", "a.nii.gz", "patient_0012.nii.gz", "patient_0013.nii.gz", ".DS_Store", "list.csv")
    touch(tmp_path / "numbered", "a_0000.nii.gz", "b_0000.nii")
    found = find_inputs(tmp_path / "plain", task("CT"))
    assert [case.id for case in found] == ["a", "patient_0012", "patient_0013"]
    assert [(case.id, case.images[0].name) for case in find_inputs(tmp_path / "numbered", task("CT"))] == [
        ("a", "a_0000.nii.gz"),
        ("b", "b_0000.nii"),
    ]


def test_a_single_file_and_a_list_of_files_are_inputs_too(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    assert find_inputs(tmp_path / "a.nii.gz", task("CT"))[0].images == (tmp_path / "a.nii.gz",)
    both = find_inputs([tmp_path / "b_0001.nii.gz", tmp_path / "b_0000.nii.gz"], task("T1", "T2"))
    assert [path.name for path in both[0].images] == ["b_0000.nii.gz", "b_0001.nii.gz"]


def test_one_file_may_hold_all_channels(tmp_path: Path) -> None:
    touch(tmp_path, "rgb_0000.png", "plain.png", "4d.nii.gz")
    found = find_inputs(tmp_path, task("R", "G", "B"))
    assert [(case.id, len(set(case.images)), len(case.images)) for case in found] == [
        ("4d", 1, 3),
        ("plain", 1, 3),
        ("rgb", 1, 3),
    ]


def test_bad_inputs_are_left_out_and_said_while_the_others_stay(tmp_path: Path) -> None:
    touch(
        tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "c_0001.nii.gz", "ü_0000.nii.gz", "ü_0001.nii.gz"
    )
    (tmp_path / "d_0000.nii.gz").symlink_to(tmp_path / "gone")
    touch(tmp_path, "d_0001.nii.gz", "e_0000.nii.gz", "e_0001.nii.gz", "e_0000.nii")
    scan = scan_inputs(tmp_path, task("T1", "T2"))
    assert [case.id for case in scan.cases] == ["a"]
    assert {("E0133", "b"), ("E0133", "c"), ("E0142", "ü"), ("E0143", "d")} <= {(p.code, p.case) for p in scan.errors}
    assert ("E0140", "e") in {(problem.code, problem.case) for problem in scan.errors}
    assert len(problems_of(find_inputs, tmp_path, task("T1", "T2"))) == 5


def test_numbers_that_may_be_channels_or_cases_are_not_guessed(tmp_path: Path) -> None:
    touch(tmp_path, "brain_0000.nii.gz", "brain_0001.nii.gz", "brain_0002.nii.gz")
    with pytest.raises(InputError, match="append _0000"):
        find_inputs(tmp_path, task("CT"))


def test_two_files_for_one_id_clash(tmp_path: Path) -> None:
    touch(tmp_path / "x", "a.nii.gz", "a.nii", "b.nii.gz", "b_0000.nii.gz")
    touch(tmp_path / "y", "c.nii.gz")
    touch(tmp_path / "z", "c.nii.gz")
    scan = scan_inputs([tmp_path / "x", tmp_path / "y", tmp_path / "z"], task("CT"))
    assert sorted((p.code, p.case) for p in scan.errors) == [("E0140", "a"), ("E0140", "b"), ("E0140", "c")]
    assert scan.cases == ()


def test_nothing_to_predict_is_said(tmp_path: Path) -> None:
    touch(tmp_path / "texts", "a.txt")
    assert problems_of(find_inputs, tmp_path / "texts", task("CT")) == [("E0146", None), ("W0147", None)]
    assert problems_of(find_inputs, tmp_path / "gone.nii.gz", task("CT")) == [("E0100", "gone")]
    assert problems_of(find_inputs, tmp_path / "texts" / "a.txt", task("CT")) == [("E0106", "a.txt")]


HOSTILE = [
    "with space", "quote'", 'quote"', "$(touch X)", "`id`", "a;b", "a&b", "%s", "{0}", "\u202eabc", "e\u0301",
    "new\nline", "tab\tx", "\x1b[31m", "-o", "..", "con ", "🧠", "x" * 129, "_x", "~", "a*b", "a|b", "a\\b", "a:b",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_on_one_escaped_line(tmp_path: Path, name: str) -> None:
    touch(tmp_path, f"{name}.nii.gz", "good.nii.gz")
    scan = scan_inputs(tmp_path, task("CT"))
    assert [case.id for case in scan.cases] == ["good"]
    if name != "..":  # "...nii.gz" is a hidden file
        assert [problem.code for problem in scan.errors] == ["E0142"]
        assert str(scan.errors[0]).isprintable()


# Real data


@pytest.mark.parametrize(
    ("name", "cases", "channels"),
    [
        ("hippocampus", 200, 1),
        ("cardiac", 60, 1),
        ("nuclei", 220, 3),
        ("membranes", 30, 1),
        ("glioma", 4, 2),
        ("ms_lesions", 1, 4),
    ],
)
def test_real_data_sets_are_read(shared: Path, name: str, cases: int, channels: int) -> None:
    dataset, scan = scan_dataset(shared / "data" / name)
    assert scan.problems == ()
    assert len(dataset.cases) == cases
    assert all(len(case.images) == channels for case in dataset.cases)
    found = find_inputs(shared / "data" / name / "imagesTr", dataset.task)
    assert [(case.id, case.images) for case in found] == [(case.id, case.images) for case in dataset.cases]


def test_declarations_of_the_reference_plans_are_read(shared: Path, tmp_path: Path) -> None:
    files = sorted((shared / "reference_plans" / "synthetic").glob("*/dataset.json"))
    assert len(files) > 20
    for path in files:
        folder = tmp_path / path.parent.name
        declared = json.loads(path.read_text())
        ending = declared["file_ending"]
        count = len(declared["channel_names"])
        touch(folder / "imagesTr", *(f"a_{n:04d}{ending}" for n in range(count)))
        touch(folder / "labelsTr", f"a{ending}")
        shutil.copy(path, folder / "dataset.json")
        found = read_dataset(folder).task
        assert len(found.channels) == count
        assert len(found.labels) == len(declared["labels"])
