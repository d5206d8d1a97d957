"""The store of prepared cases."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from prepared_phantoms import files_of

from medseg.artefacts import commit_json
from medseg.errors import IncompatibleError, InputError, IntegrityError
from medseg.preparation.arrays import BLOCK_BYTES, CHUNK_BYTES, CheckedArray, checks_of, chunk_layout, encode_array
from medseg.preparation.store import Provenance, StoredCase, finished, open_store, verify
from medseg.preparation.writer import write_case
from medseg.records.base import write_record
from medseg.records.preparation import Preparation, StoreManifest

SHAPE = (11, 40, 53)
PROVENANCE = Provenance("a" * 64, ("b" * 64, "c" * 64))


def make_preparation(shape: tuple[int, int, int] = SHAPE) -> Preparation:
    return Preparation(
        source_shape=shape,
        to_canonical=(0, 1, 2),
        flipped=(False, True, False),
        transpose=(0, 1, 2),
        uncropped_shape=shape,
        crop_box=tuple((0, n) for n in shape),
        spacing_mm=(3.0, 1.0, 1.1),
        target_spacing_mm=(3.0, 1.0, 1.1),
        target_shape=shape,
    )


def arrays(seed: int = 0, classes: int = 4, channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(channels, *SHAPE)).astype(np.float32)
    return image, rng.integers(-1, classes, SHAPE).astype(np.int16)


def make_store(folder, cases: int = 2, dimensions: int = 3):
    digests = {
        f"case_{i}": write_case(folder, f"case_{i}", *arrays(i), make_preparation(), PROVENANCE, dimensions)
        for i in range(cases)
    }
    manifest = StoreManifest(configuration="3d_fullres", settings_sha256=PROVENANCE.settings_sha256, cases=digests)
    write_record(folder / "manifest.json", manifest)
    return open_store(folder)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_what_is_written_is_read_whole_in_parts_and_in_memory(tmp_path, dimensions):
    store = make_store(tmp_path, dimensions=dimensions)
    assert store.cases == ("case_0", "case_1")
    image, labels = arrays(1)
    on_disk = store.case("case_1")
    in_memory = on_disk.load()
    for case in (on_disk, in_memory):
        assert case.image.dtype == np.float32
        assert case.labels.dtype == np.int8
        assert case.nbytes == image.nbytes + labels.size
        np.testing.assert_array_equal(case.image[:], image)
        np.testing.assert_array_equal(case.image[:, 3:9, 10:39, 50:], image[:, 3:9, 10:39, 50:])
        np.testing.assert_array_equal(case.labels[5:6, :, 7:8], labels[5:6, :, 7:8])
        for index, drawn in case.foreground.items():
            expected = labels.ravel()[drawn] >= 0 if index == -1 else labels.ravel()[drawn] == index
            assert expected.all()
    assert isinstance(in_memory.image, np.ndarray)
    assert on_disk.record.preparation == make_preparation()
    assert sorted(on_disk.foreground) == [-1, 1, 2, 3]


def test_equal_arguments_give_equal_bytes(tmp_path):
    make_store(tmp_path / "a")
    make_store(tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_many_classes_need_wider_labels(tmp_path):
    write_case(tmp_path, "many", *arrays(classes=500), make_preparation(), PROVENANCE, 3)
    commit_json(tmp_path / "manifest.json", manifest_of(tmp_path, "many"))
    assert open_store(tmp_path).case("many").labels.dtype == np.int16


def manifest_of(folder, case_id: str) -> dict:
    digest = finished(folder, case_id, PROVENANCE)
    return StoreManifest(configuration="x", settings_sha256="s", cases={case_id: digest}).to_json()


@pytest.mark.parametrize("ending", [".image.b2nd", ".labels.b2nd", ".foreground.b2nd"])
def test_a_flipped_bit_is_found_when_its_chunk_is_read_and_not_before(tmp_path, ending):
    """Of a copy that is large enough for several chunks; fault F38, goal G17."""
    shape = (70, 190, 210)
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    labels = np.zeros(shape, np.int16)
    labels[60:, 100:, 100:] = 1
    digest = write_case(tmp_path, "big", image, labels, make_preparation(shape), PROVENANCE, 3)
    manifest = StoreManifest(configuration="x", settings_sha256="s", cases={"big": digest})
    write_record(tmp_path / "manifest.json", manifest)
    assert len(open_store(tmp_path).case("big").record.checks["big.image.b2nd"].chunks_crc32) > 1
    path = tmp_path / f"big{ending}"
    before = path.read_bytes()
    rng = np.random.default_rng(7)
    for _ in range(30):
        content = bytearray(before)
        place = int(rng.integers(len(content) - 64))  # the trailer is read by nobody
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        case = open_store(tmp_path).case("big")
        with pytest.raises(IntegrityError, match=r"E0701. case=big: big\..*is damaged"):
            _ = case.foreground if ending == ".foreground.b2nd" else getattr(case, ending.split(".")[1])[:]
    content = bytearray(before)
    content[len(before) // 2 if ending == ".image.b2nd" else 40] ^= 1
    path.write_bytes(content)
    case = open_store(tmp_path).case("big")
    if ending == ".image.b2nd":
        np.testing.assert_array_equal(case.image[0, :8, :8, :8], image[0, :8, :8, :8])  # of another chunk
        with pytest.raises(IntegrityError, match=r"chunk \d of \d holds other bytes"):
            _ = case.image[:]


@pytest.mark.parametrize("key", [0, (0, 3), (Ellipsis, -1), (slice(None), slice(4, 90, 3), 5), (0, slice(-9, None))])
def test_only_the_chunks_that_a_part_touches_are_verified(tmp_path, key):
    array = np.random.default_rng(0).normal(size=(2, 90, 45, 61)).astype(np.float32)
    content = encode_array(array, (2, 32, 16, 32), (2, 16, 16, 16))
    (tmp_path / "a.b2nd").write_bytes(content)
    checked = CheckedArray(tmp_path / "a.b2nd", checks_of(content), "case")
    np.testing.assert_array_equal(checked[key], array[key])
    numbers = np.arange(3 * 3 * 2).reshape(3, 3, 2).repeat(32, 0).repeat(16, 1).repeat(32, 2)[:90, :45, :61]
    assert checked._verified == set(np.broadcast_to(numbers, array.shape)[key].ravel().tolist())


def test_half_precision_is_read_as_float32_and_differs_by_half_a_unit_in_the_last_place(tmp_path):
    image, labels = arrays(classes=3)
    for name, precision in (("half", "float16"), ("full", "float32")):
        digest = write_case(tmp_path / name, "case", image, labels, make_preparation(), PROVENANCE, 3, precision)
        manifest = StoreManifest(configuration="x", settings_sha256="s", precision=precision, cases={"case": digest})
        write_record(tmp_path / name / "manifest.json", manifest)
    half, full = (open_store(tmp_path / name).case("case") for name in ("half", "full"))
    assert half.image.dtype == half.image[:].dtype == np.float32
    assert half.nbytes == full.nbytes
    np.testing.assert_allclose(half.image[:], full.image[:], rtol=2**-11, atol=2**-24)
    sizes = [(tmp_path / name / "case.image.b2nd").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    with pytest.raises(InputError, match=r"E0104. case=case: .*65504"):
        write_case(tmp_path, "case", image * 1e5, labels, make_preparation(), PROVENANCE, 3, "float16")


def test_a_file_that_is_missing_or_cut_is_told_before_anything_is_read(tmp_path):
    store = make_store(tmp_path)
    (tmp_path / "case_0.labels.b2nd").unlink()
    (tmp_path / "case_0.image.b2nd").write_bytes(b"short")
    with pytest.raises(IntegrityError) as caught:
        store.case("case_0")
    assert [problem.measured.split()[0] for problem in caught.value.problems] == [
        "case_0.image.b2nd", "case_0.labels.b2nd"
    ]  # fmt: skip


def test_threads_share_a_case(tmp_path):
    case = make_store(tmp_path).case("case_0")
    image, _ = arrays(0)

    def same(seed: int) -> bool:
        z, y, x = (int(n) for n in np.random.default_rng(seed).integers(0, (6, 20, 30)))
        part = (slice(None), slice(z, z + 5), slice(y, y + 20), slice(x, x + 20))
        return bool((case.image[part] == image[part]).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(60)))


def test_a_folder_without_manifest_is_incomplete(tmp_path):
    write_case(tmp_path, "case", *arrays(), make_preparation(), PROVENANCE, 3)
    with pytest.raises(IncompatibleError, match="E0801"):
        open_store(tmp_path)


def test_a_case_that_the_manifest_does_not_name_does_not_exist(tmp_path):
    store = make_store(tmp_path)
    write_case(tmp_path, "extra", *arrays(), make_preparation(), PROVENANCE, 3)
    assert "extra" not in store.cases
    with pytest.raises(IncompatibleError, match="E0802"):
        store.case("extra")


@pytest.mark.parametrize("ending", [".image.b2nd", ".labels.b2nd", ".foreground.b2nd", ".case.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_every_damage_is_found(tmp_path, ending, damage):
    store = make_store(tmp_path)
    assert verify(store) == ()
    path = tmp_path / f"case_1{ending}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "flip":
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-7])
    else:
        path.unlink()
    (problem,) = verify(store)
    assert (problem.code, problem.case) == ("E0701", "case_1")
    assert path.name in problem.measured
    assert finished(tmp_path, "case_1", PROVENANCE) is None
    assert finished(tmp_path, "case_0", PROVENANCE) == store.manifest.cases["case_0"]


def test_random_bit_flips_never_go_unnoticed(tmp_path):
    make_store(tmp_path, cases=1)
    rng = np.random.default_rng(5)
    for _ in range(40):
        path = sorted(tmp_path.glob("case_0.*"))[rng.integers(4)]
        before = path.read_bytes()
        content = bytearray(before)
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        assert verify(open_store(tmp_path)) != ()
        path.write_bytes(before)
    assert verify(open_store(tmp_path)) == ()


def test_a_missing_array_is_told_as_damage(tmp_path):
    case = make_store(tmp_path).case("case_0")
    (tmp_path / "case_0.image.b2nd").unlink()
    with pytest.raises(IntegrityError, match=r"E0701.*case_0.image.b2nd"):
        _ = case.image
    unchecked = StoredCase(tmp_path, case.record.model_copy(update={"checks": {}}))
    with pytest.raises(IntegrityError, match=r"E0701.*not in the record"):
        _ = unchecked.labels


def test_a_record_cannot_point_outside_its_folder(tmp_path):
    make_store(tmp_path)
    path = tmp_path / "case_0.case.json"
    record = json.loads(path.read_text())
    record["files"]["../elsewhere"] = "0" * 64
    commit_json(path, record)
    assert finished(tmp_path, "case_0", PROVENANCE) is None


def test_another_source_or_setting_is_not_finished(tmp_path):
    make_store(tmp_path)
    assert finished(tmp_path, "case_0", Provenance("x" * 64, PROVENANCE.source_sha256)) is None
    assert finished(tmp_path, "case_0", Provenance(PROVENANCE.settings_sha256, ("b" * 64, "d" * 64))) is None
    assert finished(tmp_path, "case_9", PROVENANCE) is None


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a\x00", "a\nb", "x" * 201, "c:d"])
def test_ids_that_cannot_name_files_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="E0142"):
        write_case(tmp_path, name, *arrays(), make_preparation(), PROVENANCE, 3)
    assert files_of(tmp_path) == {}


@pytest.mark.parametrize("name", ["manifest", "a b", "Ünï-01", "1.2.840.1"])
def test_ids_may_be_any_other_name(tmp_path, name):
    write_case(tmp_path, name, *arrays(), make_preparation(), PROVENANCE, 3)
    assert finished(tmp_path, name, PROVENANCE)


def test_arrays_of_different_grids_are_refused(tmp_path):
    image, labels = arrays()
    with pytest.raises(ValueError, match="labels"):
        write_case(tmp_path, "case", image, labels[1:], make_preparation(), PROVENANCE, 3)


@pytest.mark.parametrize(
    ("shape", "spacing", "voxel_bytes", "dimensions"),
    [
        ((300, 512, 512), (1.5, 0.8, 0.8), 4, 3),
        ((20, 320, 260), (10.0, 1.4, 1.4), 4, 3),
        ((155, 240, 240), (1.0, 1.0, 1.0), 16, 3),
        ((1, 3000, 4000), (999.0, 1.0, 1.0), 12, 2),
        ((300, 512, 512), (1.0, 1.0, 1.0), 4, 2),
        ((1, 1, 1), (1.0, 1.0, 1.0), 1024, 3),
    ],
)
def test_chunks_and_blocks_stay_small_and_near_cubes(shape, spacing, voxel_bytes, dimensions):
    chunk, block = chunk_layout(shape, spacing, voxel_bytes, dimensions)
    assert np.prod(block) * voxel_bytes <= BLOCK_BYTES
    assert np.prod(chunk) * voxel_bytes <= CHUNK_BYTES
    assert all(b <= c <= n for b, c, n in zip(block, chunk, shape, strict=True))
    if dimensions == 2:
        assert block[0] == 1
    extents = [b * s for b, s, n in zip(block, spacing, shape, strict=True) if 1 < b < n]
    assert not extents or max(extents) < 4 * min(extents)
