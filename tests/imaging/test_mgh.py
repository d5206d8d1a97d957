"""FreeSurfer's MGH files against nibabel, and against damage."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk

from medseg.errors import InputError
from medseg.imaging.geometry import nifti_affine
from medseg.imaging.mgh import read_mgh
from medseg.imaging.volumes import read_volume, write_labels

SHAPE = (6, 9, 5)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(17)


def make(path: Path, array: np.ndarray | None = None, edits: tuple = (), tail: bytes = b"") -> Path:
    """A small oblique volume of nibabel's, with raw bytes of the header changed: (offset, format, value)."""
    array = np.arange(270, dtype=np.int16).reshape(SHAPE) if array is None else array
    plain = path.with_name("plain.mgh")
    nib.save(nib.MGHImage(array, affine_ijk(degrees=(31, -22, 140))), plain)
    raw = bytearray(plain.read_bytes())
    plain.unlink()
    for offset, kind, value in edits:
        struct.pack_into(f">{kind}", raw, offset, value)
    raw += tail
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".mgz" else bytes(raw))
    return path


def code_of(path: Path, channels: int = 1, max_voxels: int = 2**31) -> str:
    with pytest.raises(InputError) as error:
        read_mgh(path, channels, max_voxels)
    assert path.name in str(error.value)
    return error.value.problems[0].code


@pytest.mark.parametrize("kind", ["u1", "i2", "i4", "f4"])
@pytest.mark.parametrize("name", ["a.mgz", "a.mgh"])
def test_every_type_is_read_as_nibabel_reads_it(tmp_path: Path, rng: np.random.Generator, kind: str, name: str) -> None:
    array = rng.integers(0, 100, SHAPE).astype(kind)
    volume = read_mgh(make(tmp_path / name, array))
    raw = (tmp_path / name).read_bytes()
    theirs = nib.MGHImage.from_bytes(gzip.decompress(raw) if name == "a.mgz" else raw)
    assert volume.array.dtype == np.dtype(kind)
    assert volume.array.dtype.isnative
    assert np.array_equal(volume.array[0].T, np.asanyarray(theirs.dataobj))
    assert np.allclose(nifti_affine(volume.grid), theirs.affine, rtol=0, atol=1e-5)
    assert np.allclose(nifti_affine(volume.grid), affine_ijk(degrees=(31, -22, 140)), atol=1e-4)


def test_frames_are_channels_only_when_asked(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.normal(size=(*SHAPE, 3)).astype(np.float32)
    path = make(tmp_path / "a.mgz", array)
    assert np.array_equal(read_mgh(path, 3).array.T, array)
    assert (code_of(path), code_of(path, 2)) == ("E0111", "E0133")


def test_what_follows_the_voxels_is_passed_over_and_its_checksum_verified(tmp_path: Path) -> None:
    tail = struct.pack(">5f", 2300, 0.1, 2.9, 900, 256) + b"tags" * 5000
    path = make(tmp_path / "a.mgz", tail=tail)
    assert read_mgh(path).array.size == 270
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + b"\0" * 8)
    assert code_of(path) == "E0102"
    path.write_bytes(whole[:-3])
    assert code_of(path) == "E0101"
    path.write_bytes(whole + b"more")
    assert code_of(path) == "E0102"
    assert code_of(make(tmp_path / "b.mgz", tail=bytes(66 * 2**20))) == "E0102"


BAD_HEADERS = [
    ((0, "i", 2), "E0102"),
    ((4, "i", 0), "E0111"),
    ((8, "i", -9), "E0111"),
    ((12, "i", 6), "E0101"),
    ((4, "i", 2**31 - 1), "E0104"),
    ((16, "i", 2), "E0111"),
    ((20, "i", 2), "E0111"),
    ((20, "i", 77), "E0111"),
    ((28, "h", 0), "E0121"),
    ((28, "h", -1), "E0121"),
    ((30, "f", 0.0), "E0124"),
    ((34, "f", -1.0), "E0124"),
    ((38, "f", float("nan")), "E0124"),
    ((38, "f", 1e3), "E0125"),
    ((42, "f", float("nan")), "E0121"),
    ((42, "f", 5.0), "E0121"),
    ((78, "f", float("inf")), "E0121"),
]


@pytest.mark.parametrize(("edit", "code"), BAD_HEADERS, ids=str)
@pytest.mark.parametrize("name", ["a.mgz", "a.mgh"])
def test_a_bad_header_has_its_code(tmp_path: Path, edit: tuple, code: str, name: str) -> None:
    assert code_of(make(tmp_path / name, edits=(edit,))) == code


def test_names_sizes_and_contents_must_agree(tmp_path: Path) -> None:
    make(tmp_path / "a.mgh").rename(tmp_path / "b.mgz")
    assert code_of(tmp_path / "b.mgz") == "E0102"
    make(tmp_path / "a.mgz").rename(tmp_path / "b.mgh")
    assert code_of(tmp_path / "b.mgh") in ("E0101", "E0102")
    assert code_of(make(tmp_path / "c.mgz"), max_voxels=269) == "E0104"


@pytest.mark.parametrize("name", ["a.mgz", "a.mgh"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    array = rng.integers(0, 99, SHAPE).astype(np.int16)
    whole = make(tmp_path / name, array).read_bytes()
    voxels_end = 284 + 540 if name == "a.mgh" else len(whole)
    for end in range(0, voxels_end, 5):
        (tmp_path / name).write_bytes(whole[:end])
        assert code_of(tmp_path / name) == "E0101", end


def test_no_flipped_bit_of_a_compressed_file_changes_a_voxel_unseen(tmp_path: Path, rng: np.random.Generator) -> None:
    path = make(tmp_path / "a.mgz", rng.integers(0, 99, SHAPE).astype(np.int16))
    whole, truth = path.read_bytes(), read_mgh(path)
    for bit in [*range(80), *rng.integers(80, 8 * len(whole), 300).tolist()]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            volume = read_mgh(path)
        except InputError:
            continue
        assert bit < 80, "only fields of the gzip header that hold no content may differ"
        assert np.array_equal(volume.array, truth.array)
        assert np.array_equal(volume.grid.affine, truth.grid.affine)


def test_labels_of_an_mgz_go_to_nifti_on_its_grid(tmp_path: Path) -> None:
    volume = read_volume(make(tmp_path / "a.mgz"))
    write_labels(tmp_path / "a.nii.gz", volume.array[0] % 3, volume.grid, volume.source)
    assert np.allclose(nib.load(tmp_path / "a.nii.gz").affine, nib.load(tmp_path / "a.mgz").affine, atol=1e-4)
    with pytest.raises(InputError):
        write_labels(tmp_path / "b.mgz", volume.array[0] % 3, volume.grid, volume.source)
