"""Faults: every input fault of the catalogue (F01–F20, F44), planted in a data set, has its code and severity."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk, dataset_json, make_dataset, save_nifti

from medseg.dataset import case_check
from medseg.dataset.check import CheckReport, check_dataset
from medseg.errors import CODES
from medseg.records.grid import Volume

CASE = "case_01"
Fault = Callable[[Path], None]


def image(folder: Path, channel: int = 0, case: str = CASE) -> Path:
    return folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz"


def label(folder: Path, case: str = CASE) -> Path:
    return folder / "labelsTr" / f"{case}.nii.gz"


def patched(path: Path, offset: int, form: str, *values: float) -> None:
    """Change header fields of a NIfTI-1 file, as they are on disk."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<" + form, raw, offset, *values)
    path.write_bytes(gzip.compress(bytes(raw), 1))


def header(offset: int, form: str, *values: float, which: Callable[[Path], Path] = image) -> Fault:
    return lambda folder: patched(which(folder), offset, form, *values)


def voxels(change: Callable[[np.ndarray], np.ndarray], which: Callable[[Path], Path] = image) -> Fault:
    """Save a file again with other voxels."""

    def plant(folder: Path) -> None:
        old = nib.load(which(folder))
        save_nifti(which(folder), change(np.asanyarray(old.dataobj).copy()), old.affine)

    return plant


def put(value: float, dtype: type = np.float32) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype)
        array[4, 5, 6] = value
        return array

    return change


def placed(change: Callable[[np.ndarray], np.ndarray], which: Callable[[Path], Path] = label) -> Fault:
    """Save a file again with another affine (i, j, k)."""

    def plant(folder: Path) -> None:
        old = nib.load(which(folder))
        save_nifti(which(folder), np.asanyarray(old.dataobj), change(old.affine.copy()))

    return plant


def moved(share: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(affine: np.ndarray) -> np.ndarray:
        affine[:3, 3] += share * affine[:3, 0]
        return affine

    return change


def wider(affine: np.ndarray) -> np.ndarray:
    return affine @ np.diag([1.09, 1, 1, 1])


def sform(change: Callable[[np.ndarray], np.ndarray], code: int = 2, qform_code: int = 0) -> Fault:
    """Give image and labels another sform, so that only the header itself can be at fault."""

    def plant(folder: Path) -> None:
        for path in (image(folder), image(folder, 1), label(folder)):
            affine = change(nib.load(path).affine.copy())
            patched(path, 252, "2h", qform_code, code)
            patched(path, 280, "12f", *affine[:3].ravel())

    return plant


def sheared(by: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(affine: np.ndarray) -> np.ndarray:
        affine[:3, 1] += by * np.linalg.norm(affine[:3, 1]) * affine[:3, 0] / np.linalg.norm(affine[:3, 0])
        return affine

    return change


def two_axes_alike(affine: np.ndarray) -> np.ndarray:
    affine[:, 1] = affine[:, 0]
    return affine


def all_seven(folder: Path) -> None:
    for channel in (0, 1):
        voxels(lambda array: array * 0 + 7, lambda f, c=channel: image(f, c))(folder)


def declare(**changes: object) -> Fault:
    def plant(folder: Path) -> None:
        names = {"0": "MRI", "1": "MRI1"}
        (folder / "dataset.json").write_text(json.dumps(dataset_json(6, channel_names=names) | changes))

    return plant


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def flip_a_bit(folder: Path) -> None:
    raw = bytearray(image(folder).read_bytes())
    raw[len(raw) // 2] ^= 4
    image(folder).write_bytes(raw)


def bomb(folder: Path) -> None:
    raw = gzip.decompress(image(folder).read_bytes())
    image(folder).write_bytes(gzip.compress(raw + bytes(2**22), 1))


def four_dimensional(shape: tuple[int, ...], dtype: type) -> Fault:
    return lambda folder: save_nifti(image(folder), np.ones(shape, dtype), affine_ijk())


def empty_labels(folder: Path, *cases: int) -> None:
    for case in cases:
        voxels(lambda array: array * 0, lambda f, c=case: label(f, f"case_{c:02d}"))(folder)


def two_voxels_of_label_1(array: np.ndarray) -> np.ndarray:
    places = np.argwhere(array == 1)
    array[array == 1] = 0
    array[tuple(places[0])] = array[tuple(places[-1])] = 1
    return array


def without_label_2(folder: Path) -> None:
    for case in (0, 2, 3, 4, 5):
        voxels(lambda array: np.minimum(array, 1), lambda f, c=case: label(f, f"case_{c:02d}"))(folder)


def resized(shape: tuple[int, int, int]) -> Fault:
    def plant(folder: Path) -> None:
        rng = np.random.default_rng(0)
        for channel in (0, 1):
            save_nifti(image(folder, channel), rng.normal(100, 9, shape).astype(np.float32), affine_ijk())
        save_nifti(label(folder), np.ones(shape, np.uint8), affine_ijk())

    return plant


def copied(source: str, target: Callable[[Path], Path]) -> Fault:
    return lambda folder: shutil.copy(folder / source, target(folder))


def renamed(case: str) -> Fault:
    def plant(folder: Path) -> None:
        for channel in (0, 1):
            image(folder, channel).rename(image(folder, channel, case))
        label(folder).rename(label(folder, case))

    return plant


def linked(target: str) -> Fault:
    def plant(folder: Path) -> None:
        image(folder).unlink()
        image(folder).symlink_to(target)

    return plant


def explicit(key: str, path: str) -> Fault:
    """``dataset`` in dataset.json, with a hostile key or path beside a good case."""
    images = ["imagesTr/case_00_0000.nii.gz", "imagesTr/case_00_0001.nii.gz"]
    good = {"images": images, "label": "labelsTr/case_00.nii.gz"}
    return declare(dataset={"case_00": good, key: good | {"label": path}}, numTraining=2)


def same_name(folder: Path) -> None:
    for path in (image(folder), image(folder, 1), label(folder)):
        shutil.copy(path, path.with_name(path.name.upper().replace(".NII.GZ", ".nii.gz")))


def doubled_key(folder: Path) -> None:
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace('"numTraining"', '"labels": {"background": 0}, "numTraining"'))


FAULTS: list[tuple[str, str, Fault, str]] = [
    ("F01", "half a file", lambda f: cut(image(f), 4000), "E0101"),
    ("F01", "without its last byte", lambda f: cut(image(f), image(f).stat().st_size - 1), "E0101"),
    ("F01", "an empty label file", lambda f: cut(label(f), 0), "E0101"),
    ("F02", "one bit flipped", flip_a_bit, "E0102"),
    ("F03", "30000 x 30000 x 3000 voxels declared", header(42, "3h", 30000, 30000, 3000), "E0104"),
    ("F03", "more data than declared", bomb, "E0102"),
    ("F03", "voxels far beyond the end", header(108, "f", 1e9), "E0102"),
    ("F03", "a negative offset", header(108, "f", -100), "E0102"),
    ("F04", "one NaN", voxels(put(np.nan)), "E0110"),
    ("F04", "one Inf in the second channel", voxels(put(np.inf), lambda f: image(f, 1)), "E0110"),
    ("F04", "NaN in labels", voxels(put(np.nan), label), "E0110"),
    ("F04", "scaled to infinity", header(112, "2f", 3e38, 0), "E0110"),
    ("F05", "three time points", four_dimensional((8, 9, 10, 3), np.float32), "E0111"),
    ("F05", "five dimensions", four_dimensional((8, 9, 10, 1, 3), np.float32), "E0111"),
    ("F05", "complex voxels", four_dimensional((8, 9, 10), np.complex64), "E0111"),
    ("F05", "RGB voxels", header(70, "2h", 128, 24), "E0111"),
    ("F06", "another shape", voxels(lambda array: array[:-1], label), "E0119"),
    ("F06", "0.4 voxel away", placed(moved(0.4)), "W0120"),
    ("F06", "1.5 voxels away", placed(moved(1.5)), "E0120"),
    ("F06", "a flipped axis", placed(lambda a: a @ np.diag([-1, 1, 1, 1])), "E0120"),
    ("F06", "spacing of a channel 9 % off", placed(wider, lambda f: image(f, 1)), "E0120"),
    ("F07", "a shear of 0.005", sform(sheared(0.005)), "W0121"),
    ("F07", "a shear of 0.3", sform(sheared(0.3)), "E0121"),
    ("F07", "a singular matrix", sform(two_axes_alike), "E0121"),
    ("F07", "NaN in the sform", sform(lambda a: a * np.nan), "E0121"),
    ("F08", "sform and qform apart", sform(moved(7), qform_code=1), "E0122"),
    ("F08", "both codes 0", sform(lambda a: a, code=0), "W0123"),
    ("F09", "spacing 0", header(80, "f", 0), "E0124"),
    ("F09", "spacing NaN", header(80, "f", np.nan), "E0124"),
    ("F09", "spacing -1", header(80, "f", -1), "E0124"),
    ("F09", "spacing 1e6 mm", header(80, "f", 1e6), "E0125"),
    ("F09", "another unit in one case", sform(lambda a: a @ np.diag([20, 20, 20, 1])), "W0126"),
    ("F10", "labels of 0.5", voxels(put(0.5), label), "E0130"),
    ("F10", "labels of 1.0005", voxels(put(1.0005), label), "W0130"),
    ("F10", "a label of -1", voxels(put(-1), label), "E0131"),
    ("F10", "a label of 70000", voxels(put(70000), label), "E0131"),
    ("F11", "an undeclared value", voxels(put(7, np.uint8), label), "E0131"),
    ("F11", "a value that never occurs", declare(labels={"background": 0, "outer": 1, "inner": 2, "x": 5}), "W0132"),
    ("F11", "two names of one value", declare(labels={"background": 0, "outer": 1, "inner": 2, "x": 2}), "E0145"),
    ("F12", "the last channel missing", lambda f: image(f, 1).unlink(), "E0133"),
    ("F12", "the first channel missing", lambda f: image(f, 0).unlink(), "E0133"),
    ("F12", "a third channel", copied(f"imagesTr/{CASE}_0000.nii.gz", lambda f: image(f, 2)), "E0133"),
    ("F12", "_1 for _0001", lambda f: image(f, 1).rename(f / "imagesTr" / f"{CASE}_1.nii.gz"), "E0133"),
    ("F12", "a channel of another case", copied("imagesTr/case_00_0001.nii.gz", lambda f: image(f, 1)), "W0141"),
    ("F13", "one case without foreground", lambda f: empty_labels(f, 1), "W0134"),
    ("F13", "no case with foreground", lambda f: empty_labels(f, 0, 1, 2, 3, 4, 5), "E0135"),
    ("F13", "a label in one case only", without_label_2, "W0135"),
    ("F13", "a stray voxel of a label", voxels(two_voxels_of_label_1, label), "W0138"),
    ("F14", "both channels constant", all_seven, "E0136"),
    ("F14", "one channel all zero", voxels(lambda array: array * 0), "W0136"),
    ("F15", "3 x 3 x 3 voxels are taken as they are", resized((3, 3, 3)), "W0137"),
    ("F15", "one voxel", resized((1, 1, 1)), "W0137"),
    ("F15", "one slice among volumes", resized((20, 22, 1)), "W0126"),
    ("F17", "the same name twice on some systems", same_name, "E0140"),
    ("F17", "another case's labels", copied("labelsTr/case_00.nii.gz", label), "E0119"),
    ("F18", "a name with a blank", renamed("case 01"), "E0142"),
    ("F18", "a name with a line break", renamed("case\n01"), "E0142"),
    ("F18", "a name with a shell command", renamed("$(touch CANARY)"), "E0142"),
    ("F18", "a name with an umlaut", renamed("Müller"), "E0142"),
    ("F18", "a name like an option", renamed("-o"), "E0142"),
    ("F19", "a broken link", linked("nowhere.nii.gz"), "E0143"),
    ("F19", "a link to itself", linked(f"{CASE}_0000.nii.gz"), "E0143"),
    ("F44", "a key that climbs", explicit("../x", "labelsTr/case_01.nii.gz"), "E0142"),
    ("F44", "an absolute key", explicit("/abs", "labelsTr/case_01.nii.gz"), "E0142"),
    ("F44", "an empty key", explicit("", "labelsTr/case_01.nii.gz"), "E0142"),
    ("F44", "a key of 300 bytes", explicit("x" * 300, "labelsTr/case_01.nii.gz"), "E0142"),
    ("F44", "a path that climbs", explicit("b", "../secret.nii.gz"), "E0142"),
    ("F44", "a path with a variable", explicit("b", "$HOME/x.nii.gz"), "E0144"),
    ("F44", "a key twice", doubled_key, "E0145"),
]  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("sound") / "data", cases=6, channels=2)


@pytest.mark.parametrize(("fault", "what", "plant", "code"), FAULTS, ids=[f"{f}: {what}" for f, what, _, _ in FAULTS])
def test_every_fault_of_the_catalogue_has_its_code(
    sound: Path, tmp_path: Path, fault: str, what: str, plant: Fault, code: str
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "data"))
    plant(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    report = check_dataset(folder, workers=2)
    named = [problem for problem in report.problems if problem.code == code]
    assert named, [str(problem) for problem in report.problems]
    for problem in named:
        assert problem.severity == ("warning" if code.startswith("W") else "error")
        assert problem.measured
        assert problem.action or code == "E0145"
        assert len(str(replace(problem, case=CASE))) <= 320
        assert str(problem).isprintable()
    unexpected = {problem.case for problem in report.errors if problem.case not in (None, CASE)}
    assert unexpected <= {problem.case for problem in named} | {"CASE_01", "CASE"}, "other cases must not suffer"
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert not list(tmp_path.rglob("CANARY"))


def test_the_table_covers_the_faults_of_data_sets() -> None:
    covered = {fault for fault, _, _, _ in FAULTS}
    apart = {"F16", "F20"}  # memory and DICOM: below
    assert covered | apart == {f"F{number:02d}" for number in range(1, 21)} | {"F44"}
    assert {code for _, _, _, code in FAULTS} <= set(CODES)


def test_a_case_that_memory_does_not_suffice_for_is_read_again_alone(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = case_check.read_volume, []

    def short_of_memory(path: Path, channels: int = 1) -> Volume:
        tried.append(path.name)
        if path.name.startswith(CASE) and tried.count(path.name) == 1:
            raise MemoryError
        return real(path, channels)

    monkeypatch.setattr(case_check, "read_volume", short_of_memory)
    report = check_dataset(sound, workers=3)
    assert report.problems == ()
    assert len(report.findings) == 6


def test_what_never_fits_is_named_and_the_others_are_checked(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = case_check.read_volume

    def too_large(path: Path, channels: int = 1) -> Volume:
        if path.name == f"{CASE}_0000.nii.gz":
            raise MemoryError
        return real(path, channels)

    monkeypatch.setattr(case_check, "read_volume", too_large)
    report = check_dataset(sound, workers=3)
    assert [(problem.code, problem.case) for problem in report.problems] == [("E0600", CASE)]


def test_every_file_is_read_exactly_once(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = case_check.read_volume, []

    def counted(path: Path, channels: int = 1) -> Volume:
        tried.append(path)
        return real(path, channels)

    monkeypatch.setattr(case_check, "read_volume", counted)
    report: CheckReport = check_dataset(sound, workers=2)
    assert sorted(tried) == sorted(sound.glob("*Tr/*.nii.gz"))
    assert report.files_read == len(tried) == 18


@pytest.mark.parametrize(("what", "code"), [("missing", "E0150"), ("mixed", "E0151"), ("twice", "E0152")])
def test_a_faulty_dicom_series_is_named(shared: Path, tmp_path: Path, what: str, code: str) -> None:
    series = shared / "data" / "formats" / "dicom_mr" / "Study1_12-T1post-05670"
    folder = Path(shutil.copytree(series, tmp_path / "patient" / "scan"))
    folder.chmod(0o755)
    slices = sorted(folder.iterdir())
    if what == "missing":
        slices[len(slices) // 2].unlink()
    elif what == "twice":
        shutil.copy(slices[3], folder / "again.dcm")
    else:
        other = series.with_name("Study1_13_HCropVolume")
        for path in sorted(other.iterdir()):
            shutil.copy(path, folder / f"other_{path.name}")
    for path in (folder, tmp_path / "patient"):
        report = check_dataset(path)
        assert {problem.code for problem in report.errors} == {code}
        assert report.problems[0].case == "scan"
    assert check_dataset(series).problems == ()
