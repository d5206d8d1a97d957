"""Listing: what two folders and BIDS trees become, what is refused, and that the pipeline runs on it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from dicom_phantoms import voxels, write_series
from phantoms import affine_ijk, anatomy, save_nifti

from medseg.dataset.check import check_dataset
from medseg.dataset.layouts import read_dataset
from medseg.dataset.listing import ListingOptions, make_listing, write_listing
from medseg.dataset.pairing import ChannelFiles, safe_id
from medseg.errors import InputError, MedsegError, UsageError
from medseg.imaging.volumes import read_volume, write_labels


def channels(*names: str, ends: Sequence[str | None] = ()) -> tuple[ChannelFiles, ...]:
    return tuple(ChannelFiles(name, end) for name, end in zip(names, ends or [None] * len(names), strict=True))


def volume(path: Path, values: Mapping[int, float] | None = None, seed: int = 0) -> None:
    """An image, or labels with these values for 0, 1, 2."""
    image, labels = anatomy(np.random.default_rng(seed))
    if values is not None:
        image = np.array([values.get(n, n) for n in range(3)], np.float32)[labels]
    save_nifti(path, image, affine_ijk())


def folders(
    root: Path, images: Sequence[str], labels: Sequence[str], values: Mapping[int, float] | None = None
) -> Path:
    for seed, name in enumerate(images):
        volume(root / "images" / name, seed=seed)
    for name in labels:
        volume(root / "labels" / name, values or {})
    return root


def codes(call: object, *arguments: object) -> list[tuple[str, str | None]]:
    with pytest.raises(MedsegError) as error:
        call(*arguments)  # type: ignore[operator]
    return sorted((problem.code, problem.case) for problem in error.value.problems)


def test_two_folders_become_a_list_with_the_labels_found_in_float_files(tmp_path: Path) -> None:
    folders(tmp_path, ["b.nii.gz", "a.nii.gz"], ["a.nii.gz", "b.nii.gz"], {1: 7, 2: 300.0001})
    listing = make_listing(tmp_path, None, ListingOptions(channels("CT")))
    assert [case.id for case in listing.cases] == ["a", "b"]
    assert (listing.task.values, listing.label_cases[300], listing.problems) == ((0, 7, 300), 2, ())
    assert any("7, 300" in note for note in listing.notes)
    for name in ("list.csv", "list.json"):
        write_listing(tmp_path / name, listing)
        dataset = read_dataset(tmp_path / name)
        assert (dataset.task, dataset.cases) == (listing.task, listing.cases)
        assert str(tmp_path) not in (tmp_path / name).read_text()
    moved = Path(shutil.move(tmp_path / "images", tmp_path / "elsewhere")).parent
    with pytest.raises(InputError):
        read_dataset(moved / "list.csv")


@pytest.mark.parametrize(
    ("images", "ends"),
    [
        (["a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz"], ()),
        (["a_T1.nii.gz", "a-FLAIR.nii.gz", "b_T1.nii.gz", "b-FLAIR.nii.gz"], ()),
        (["a-t1c.nii", "a.fl.nii", "b-t1c.nii", "b.fl.nii"], ("-t1c", ".fl")),
    ],
    ids=str,
)
def test_channels_are_told_apart_by_numbers_names_or_given_ends(
    tmp_path: Path, images: list[str], ends: tuple[str, ...]
) -> None:
    folders(tmp_path, images, ["a_seg.nii.gz", "b_seg.nii.gz"])
    options = ListingOptions(channels("T1", "FLAIR", ends=ends), label_end="_seg")
    listing = make_listing(tmp_path, None, options)
    assert [[path and path.name for path in case.images] for case in listing.cases] == [images[:2], images[2:]]
    (tmp_path / "images" / images[3]).unlink()
    assert codes(make_listing, tmp_path, None, options) == [("E0133", "b")]
    allowing = ListingOptions(options.channels, label_end="_seg", allow_missing=True)
    assert [case.images[1] is None for case in make_listing(tmp_path, None, allowing).cases] == [False, True]


def test_what_has_no_partner_is_an_error_or_left_out_and_named(tmp_path: Path) -> None:
    folders(tmp_path, ["a.nii.gz", "b.nii.gz", "c.nii.gz", "c.nii"], ["a.nii.gz", "c.nii.gz", "z.nii.gz"])
    (tmp_path / "images" / "notes.txt").touch()
    expected = [("E0100", "z"), ("E0140", "c"), ("E0144", "b"), ("W0147", None)]
    assert codes(make_listing, tmp_path, None, ListingOptions(channels("MR"))) == expected
    listing = make_listing(tmp_path, None, ListingOptions(channels("MR"), skip=True))
    assert [case.id for case in listing.cases] == ["a"]
    assert sorted((p.code, p.case or "") for p in listing.problems) == [("W0147", n) for n in ("", "b", "c", "z")]


def test_names_become_safe_ids_and_both_unicode_forms_are_one_name(tmp_path: Path) -> None:
    odd = ["M\u00fcller, J\u00f6rg.nii.gz", "-o $(touch X).nii.gz", "new\nline.nii.gz"]
    labels = ["Mu\u0308ller, Jo\u0308rg.nii.gz", *odd[1:]]
    folders(tmp_path, odd, labels)
    listing = make_listing(tmp_path, None, ListingOptions(channels("MR")))
    assert [case.id for case in listing.cases] == ["Muller_Jorg", "new_line", "o_touch_X"]
    assert sum("stands for" in note for note in listing.notes) == 3
    write_listing(tmp_path / "x.csv", listing)
    assert read_dataset(tmp_path / "x.csv").cases == listing.cases
    folders(tmp_path, ["new line.nii.gz"], ["new line.nii.gz"])
    assert ("E0140", "new_line") in codes(make_listing, tmp_path, None, ListingOptions(channels("MR")))
    assert safe_id("\u6f22") == ""


def test_labels_that_were_not_named_or_are_no_labels_are_refused(tmp_path: Path) -> None:
    folders(tmp_path, ["a.nii.gz", "b.nii.gz"], ["a.nii.gz", "b.nii.gz"], {2: 4})
    options = ListingOptions(channels("MR"), labels={"background": 0, "outer": 1, "rest": 9})
    assert codes(make_listing, tmp_path, None, options) == [("E0131", "a"), ("E0131", "b")]
    ignoring = ListingOptions(channels("MR"), labels=options.labels, ignore=4)
    assert [p.code for p in make_listing(tmp_path, None, ignoring).problems] == ["W0132"]
    volume(tmp_path / "labels" / "a.nii.gz", {2: 1.5})
    volume(tmp_path / "labels" / "b.nii.gz", {2: -1})
    assert codes(make_listing, tmp_path, None, ignoring) == [("E0130", "a"), ("E0130", "b")]


def test_regions_need_an_order_where_there_is_a_choice(tmp_path: Path) -> None:
    folders(tmp_path, ["a.nii.gz"], ["a.nii.gz"])
    nested = ListingOptions(channels("MR"), regions={"whole": (1, 2), "core": (2,)})
    assert make_listing(tmp_path, None, nested).task.regions_order == (1, 2)
    with pytest.raises(UsageError, match="--regions-order"):
        make_listing(tmp_path, None, ListingOptions(channels("MR"), regions={"core": (2,), "whole": (1, 2)}))


def test_folders_that_are_not_there_or_hold_nothing_are_said(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    assert codes(make_listing, tmp_path, None, ListingOptions(channels("MR"))) == [("E0146", None)]
    assert codes(make_listing, tmp_path / "images", None, ListingOptions(channels("MR"))) == [("E0001", None)]
    assert codes(make_listing, tmp_path / "x", tmp_path / "y", ListingOptions(channels("MR"))) == [("E0100", None)]


def bids(root: Path) -> Path:
    for name in (
        "sub-01/ses-1/anat/sub-01_ses-1_acq-mprage_T1w.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_acq-mprage_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_FLAIR.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_acq-mprage_T1w.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_acq-fast_T1w.nii.gz",
    ):
        volume(root / name)
    for name in ("01_ses-1", "01_ses-2", "02_ses-1"):
        folder = root / "derivatives" / "manual" / f"sub-{name[:2]}"
        volume(folder / f"sub-{name}_space-orig_desc-lesion_dseg.nii.gz", {})
    volume(root / "derivatives/manual/sub-01/sub-01_ses-1_desc-brain_mask.nii.gz", {})
    return root


def test_a_bids_tree_is_paired_by_entities_with_the_subject_as_group(tmp_path: Path) -> None:
    bids(tmp_path)
    both = channels("T1", "FLAIR", ends=("acq-mprage_T1w", None))
    assert codes(make_listing, tmp_path, None, ListingOptions(both)) == [("E0133", "sub-02_ses-1")]
    listing = make_listing(tmp_path, None, ListingOptions(both, allow_missing=True))
    assert [case.id for case in listing.cases] == ["sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1"]
    assert [case.group for case in listing.cases] == ["sub-01", "sub-01", "sub-02"]
    assert listing.cases[2].images[1] is None
    assert all("acq-mprage" in case.files[0].name for case in listing.cases)
    single = codes(make_listing, tmp_path, None, ListingOptions(channels("T1w")))
    assert {("E0100", "sub-01_ses-1"), ("E0144", "sub-02_ses-1_acq-fast")} <= set(single)


def test_a_bids_label_may_keep_the_entities_of_the_image_it_was_drawn_on(tmp_path: Path) -> None:
    for session in ("1", "2"):
        stem = f"sub-01/anat/sub-01_ses-{session}_acq-mprage"
        volume(tmp_path / f"{stem}_T1w.nii.gz")
        volume(tmp_path / f"sub-01/anat/sub-01_ses-{session}_FLAIR.nii.gz")
        volume(tmp_path / "derivatives" / f"{stem}_space-orig_dseg.nii.gz", {})
        volume(tmp_path / "derivatives" / f"sub-01/anat/sub-01_ses-{session}_acq-fast_dseg.nii.gz", {})
    both = channels("T1", "FLAIR", ends=("acq-mprage_T1w", None))
    listing = make_listing(tmp_path, None, ListingOptions(both, skip=True))
    assert [case.id for case in listing.cases] == ["sub-01_ses-1", "sub-01_ses-2"]
    assert all(case.label and "acq-mprage" in case.label.name for case in listing.cases)


def test_a_bids_suffix_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"T1w \(4\)"):
        make_listing(bids(tmp_path), None, ListingOptions(channels("T2w")))
    with pytest.raises(InputError, match=r"dseg \(3\)"):
        make_listing(tmp_path, None, ListingOptions(channels("FLAIR"), label_end="lesion"))


def test_two_label_files_for_a_bids_case_are_not_chosen_from(tmp_path: Path) -> None:
    bids(tmp_path)
    volume(tmp_path / "derivatives/other/sub-01/ses-1/sub-01_ses-1_desc-lesion_dseg.nii.gz", {})
    flair = channels("FLAIR")
    found = codes(make_listing, tmp_path, None, ListingOptions(flair, skip=False))
    assert ("E0140", "sub-01_ses-1") in found
    listing = make_listing(tmp_path, tmp_path / "derivatives" / "manual", ListingOptions(flair, skip=True))
    assert [case.id for case in listing.cases] == ["sub-01_ses-1", "sub-01_ses-2"]


def test_the_real_bids_tree_is_paired(shared: Path) -> None:
    root = shared / "data" / "formats" / "bids_testing"
    both = channels("T1w", "T2w")
    listing = make_listing(root, None, ListingOptions(both, label_end="T1w_seg-manual", skip=True))
    assert [(case.id, case.group) for case in listing.cases] == [("sub-unf01", "sub-unf01")]
    label = listing.cases[0].label
    assert label is not None
    counted = np.unique(np.asarray(nib.load(label).dataobj)).astype(int).tolist()
    assert list(listing.task.values) == counted
    ct = make_listing(root / "ct_scan", None, ListingOptions(channels("CT", ends=["ct"]), label_end="ct_seg-manual"))
    assert [case.id for case in ct.cases] == ["sub-spleen2"]


def test_real_folders_are_paired_as_their_dataset_json_pairs_them(shared: Path) -> None:
    for name, names in (("cardiac", ["cineMRI"]), ("glioma", ["T1c", "FLAIR"]), ("membranes", ["EM"])):
        root = shared / "data" / name
        listing = make_listing(root / "imagesTr", root / "labelsTr", ListingOptions(channels(*names)))
        expected = read_dataset(root)
        assert listing.cases == expected.cases
        assert listing.task.values == expected.task.values


def test_dicom_series_in_folders_are_cases(shared: Path, tmp_path: Path) -> None:
    source = next((shared / "data" / "formats" / "dicom_mr").iterdir())
    shutil.copytree(source, tmp_path / "images" / "a")
    volume(tmp_path / "labels" / "a.nii.gz", {})
    listing = make_listing(tmp_path, None, ListingOptions(channels("MR")))
    assert listing.cases[0].images == (tmp_path / "images" / "a",)
    write_listing(tmp_path / "list.csv", listing)
    assert read_dataset(tmp_path / "list.csv").cases == listing.cases


@pytest.mark.parametrize("series", ["2", "1.2.9", "late"])
def test_a_list_may_choose_a_dicom_series(tmp_path: Path, series: str) -> None:
    write_series(tmp_path / "patient" / "a")
    write_series(tmp_path / "patient" / "b", voxels(seed=8), series="1.2.9", SeriesDescription="late", SeriesNumber=9)
    image = read_volume(tmp_path / "patient" / "b")
    write_labels(tmp_path / "label.nii.gz", np.ones(image.grid.shape, np.uint8), image.grid, image.source)
    rows = f"case,CT,label\np1,patient#{series},label.nii.gz\n"
    (tmp_path / "list.csv").write_text("# channels: CT\n# labels: liver=1\n" + rows)
    report = check_dataset(tmp_path / "list.csv")
    assert report.errors == ()
    (case,) = read_dataset(tmp_path / "list.csv").cases
    assert np.array_equal(read_volume(case.files[0]).array, image.array)


@pytest.mark.parametrize("ending", ["mhd", "nhdr"])
def test_the_voxels_of_a_detached_header_are_not_called_unused(tmp_path: Path, ending: str) -> None:
    for folder, kind in (("images", np.int16), ("labels", np.uint8)):
        (tmp_path / folder).mkdir()
        for case in "ab":
            image = SimpleITK.GetImageFromArray(np.arange(60, dtype=kind).reshape(3, 4, 5) % 2)
            SimpleITK.WriteImage(image, str(tmp_path / folder / f"{case}.{ending}"))
    assert make_listing(tmp_path, None, ListingOptions(channels("MR"))).problems == ()
    (tmp_path / "images" / "other.raw").write_bytes(b"x")
    (problem,) = make_listing(tmp_path, None, ListingOptions(channels("MR"))).problems
    assert (problem.code, problem.measured) == ("W0147", "1 of images not used: other.raw")
